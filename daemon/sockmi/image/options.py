# SPDX-License-Identifier: MIT
"""Ids of socket options in an image; docs/image.md maps them to the options of Linux."""

from __future__ import annotations

from enum import IntEnum

from sockmi.image.words import OptionType


class Option(IntEnum):
    """Option ids. Names with ``_US`` are durations in microseconds."""

    REUSEADDR = 1
    REUSEPORT = 2
    KEEPALIVE = 3
    BROADCAST = 4
    OOBINLINE = 5
    DONTROUTE = 6
    LINGER = 7
    RCVBUF = 8
    SNDBUF = 9
    RCVLOWAT = 10
    RCVTIMEO_US = 11
    SNDTIMEO_US = 12
    PRIORITY = 13
    MARK = 14
    BINDTODEVICE = 15
    MAX_PACING_RATE = 16
    TIMESTAMP = 17
    TIMESTAMPNS = 18
    TIMESTAMPING = 19
    BUSY_POLL_US = 20
    PREFER_BUSY_POLL = 21
    BUSY_POLL_BUDGET = 22
    INCOMING_CPU = 23
    ZEROCOPY = 24
    TXTIME = 25
    NO_CHECK = 26
    RXQ_OVFL = 27
    WIFI_STATUS = 28
    NOFCS = 29
    LOCK_FILTER = 30
    SELECT_ERR_QUEUE = 31
    PEEK_OFF = 32
    TXREHASH = 33
    RCVMARK = 34
    RCVPRIORITY = 35
    RESERVE_MEM = 36
    FILTER = 37
    DEBUG = 38
    NODELAY = 100
    MAXSEG = 101
    CORK = 102
    KEEPIDLE_US = 103
    KEEPINTVL_US = 104
    KEEPCNT = 105
    SYNCNT = 106
    LINGER2_US = 107
    DEFER_ACCEPT_US = 108
    WINDOW_CLAMP = 109
    QUICKACK = 110
    CONGESTION = 111
    THIN_LINEAR_TIMEOUTS = 112
    THIN_DUPACK = 113
    USER_TIMEOUT_US = 114
    NOTSENT_LOWAT = 115
    SAVE_SYN = 116
    SAVED_SYN = 117
    FASTOPEN_CONNECT = 118
    FASTOPEN_KEY = 119
    FASTOPEN_NO_COOKIE = 120
    INQ = 121
    TX_DELAY_US = 122
    RTO_MAX_US = 123
    RTO_MIN_US = 124
    DELACK_MAX_US = 125
    IP_TOS = 200
    IP_TTL = 201
    IP_MTU_DISCOVER = 202
    IP_RECVTOS = 203
    IP_RECVTTL = 204
    IP_RECVERR = 205
    IP_PKTINFO = 206
    IP_RECVOPTS = 207
    IP_RETOPTS = 208
    IP_FREEBIND = 209
    IP_TRANSPARENT = 210
    IP_MINTTL = 211
    IP_OPTIONS = 212
    IP_BIND_ADDRESS_NO_PORT = 213
    IP_RECVORIGDSTADDR = 214
    IP_RECVFRAGSIZE = 215
    IP_RECVERR_RFC4884 = 216
    IP_PASSSEC = 217
    IP_UNICAST_IF = 218
    IP_MULTICAST_LOOP = 219
    IP_MULTICAST_ALL = 220
    IP_LOCAL_PORT_RANGE = 221
    IP_MULTICAST_TTL = 222
    IPV6_TCLASS = 300
    IPV6_UNICAST_HOPS = 301
    IPV6_MULTICAST_HOPS = 302
    IPV6_MTU_DISCOVER = 303
    IPV6_RECVERR = 304
    IPV6_RECVPKTINFO = 305
    IPV6_RECVHOPLIMIT = 306
    IPV6_RECVTCLASS = 307
    IPV6_RECVRTHDR = 308
    IPV6_RECVHOPOPTS = 309
    IPV6_RECVDSTOPTS = 310
    IPV6_RECVPATHMTU = 311
    IPV6_FLOWINFO = 312
    IPV6_FLOWINFO_SEND = 313
    IPV6_AUTOFLOWLABEL = 314
    IPV6_FLOWLABEL = 315
    IPV6_DONTFRAG = 316
    IPV6_MINHOPCOUNT = 317
    IPV6_ADDR_PREFERENCES = 318
    IPV6_FREEBIND = 319
    IPV6_TRANSPARENT = 320
    IPV6_RECVORIGDSTADDR = 321
    IPV6_RECVFRAGSIZE = 322
    IPV6_UNICAST_IF = 323
    IPV6_MULTICAST_LOOP = 324
    IPV6_MULTICAST_IF = 325
    IPV6_MULTICAST_ALL = 326
    IPV6_MTU = 327
    IPV6_USE_MIN_MTU = 328
    IPV6_HOPOPTS = 329
    IPV6_RTHDRDSTOPTS = 330
    IPV6_RTHDR = 331
    IPV6_DSTOPTS = 332
    IPV6_RECVERR_RFC4884 = 333


BYTES_OPTIONS = frozenset(
    {
        Option.BINDTODEVICE,
        Option.FILTER,
        Option.CONGESTION,
        Option.SAVED_SYN,
        Option.FASTOPEN_KEY,
        Option.IP_OPTIONS,
        Option.IPV6_HOPOPTS,
        Option.IPV6_RTHDRDSTOPTS,
        Option.IPV6_RTHDR,
        Option.IPV6_DSTOPTS,
    }
)
"""Options whose value is bytes; all others are integers."""

LINGER_ON = 1 << 62
"""Bit of LINGER: l_onoff; the bits below are l_linger in microseconds."""

_KNOWN = {int(option): OptionType.BYTES if option in BYTES_OPTIONS else OptionType.INT for option in Option}


def option_type(option: int) -> OptionType | None:
    """Type of a known option id, else None."""
    return _KNOWN.get(option)
