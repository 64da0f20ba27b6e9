# SPDX-License-Identifier: MIT
"""The kernel's news of network devices and their addresses: that something has changed, not what."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ATTRIBUTE = struct.Struct("=HH")
_RTM_NEWLINK, _RTM_DELLINK = 16, 17
_IFLA_IFNAME = 3
_IFF_UP = 1


class DeviceNews:
    """Heard since it was made; in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self.socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        self.socket.bind((0, _GROUPS))
        self._known: dict[int, tuple[bytes, bool]] = {}

    def read(self) -> bool:
        """Read all; whether devices or addresses have come or gone, were renamed, or went up or down.

        Much else is told of devices that is no matter: the states of ports, wireless scans, counters.
        What the kernel had no room to tell (ENOBUFS) may be.
        """
        changed = False
        while True:
            try:
                news = self.socket.recv(65536)
            except BlockingIOError:
                return changed
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._known.clear()
                changed = True
                continue
            for kind, body in _messages(news):
                changed |= self._is_new(kind, body)

    def _is_new(self, kind: int, body: bytes) -> bool:
        if kind not in (_RTM_NEWLINK, _RTM_DELLINK):
            return True
        _family, _type, index, flags, _changed = _LINK.unpack_from(body)
        if kind == _RTM_DELLINK:
            self._known.pop(index, None)
            return True
        now = _name(body), bool(flags & _IFF_UP)
        was, self._known[index] = self._known.get(index), now
        return was != now

    def close(self) -> None:
        """Close the netlink socket."""
        self.socket.close()


def _messages(news: bytes) -> Iterator[tuple[int, bytes]]:
    while len(news) >= _HEADER.size:
        length, kind, *_unused = _HEADER.unpack_from(news)
        if length < _HEADER.size:
            return
        yield kind, news[_HEADER.size : length]
        news = news[(length + 3) & ~3 :]


def _name(body: bytes) -> bytes:
    attributes = body[_LINK.size :]
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _IFLA_IFNAME or length < _ATTRIBUTE.size:
            return attributes[_ATTRIBUTE.size : length].rstrip(b"\0")
        attributes = attributes[(length + 3) & ~3 :]
    return b""
