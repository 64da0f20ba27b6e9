# SPDX-License-Identifier: MIT
"""All TCP sockets of this network namespace, and who holds them (``sockmi list``).

An inet_diag dump (Documentation: sock_diag(7)) joined with one scan of ``/proc`` by inode. Raw
netlink, because the state of thousands of sockets is wanted at once and few fields of each.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.inspector import Look, inspectors
from sockmi.engine.owners import find_holders, process_name
from sockmi.engine.preflight import STATES
from sockmi.frozen import frozen

_NETLINK_SOCK_DIAG = 4
_TCPDIAG_GETSOCK = 18  # one walk through the kernel's tables for all families, unlike SOCK_DIAG_BY_FAMILY
_NLM_F_REQUEST_DUMP = 0x301
_NLM_F_DUMP_INTR = 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=4x48xI4x")  # struct inet_diag_req: its states
# struct inet_diag_msg: family, state, ports (network order), addresses, cookie, queues, uid, inode
_MESSAGE = struct.Struct("=BBxx2s2s16s16s4xQ4xIIII")
_RECEIVED = struct.Struct("=128xQ")  # of struct tcp_info
_TRIES = 3
# Of a dump's states: TCP_SYN_RECV, TCP_TIME_WAIT, TCP_LISTEN, TCP_NEW_SYN_RECV, TCP_BOUND_INACTIVE.
_SYN_RECV, _TIME_WAIT, _LISTEN, _NEW_SYN_RECV, _BOUND = 1 << 3, 1 << 6, 1 << 10, 1 << 12, 1 << 13
_ALL = 0xFFFFFFFF
_OWNABLE = _ALL & ~(_SYN_RECV | _TIME_WAIT | _NEW_SYN_RECV)


@frozen
class Holder:
    """One descriptor of a socket; ``fd`` -1 is a registered file of an io_uring.

    ``has_ring``: its process has an io_uring.
    """

    pid: int
    fd: int
    name: str
    has_ring: bool = False


@frozen
class ListedSocket:
    """A TCP socket of this namespace.

    ``inode`` is 0 for orphans, which no descriptor leads to. Queues in bytes; of a listener,
    ``receive_queue`` counts connections that wait for accept, ``send_queue`` is its backlog.
    ``remote`` is None unless connected. ``quiet``: only if it was asked for.
    """

    inode: int
    cookie: int
    family: int
    state: str
    local: Endpoint
    remote: Endpoint | None
    receive_queue: int
    send_queue: int
    uid: int
    holders: tuple[Holder, ...]
    quiet: Quiet | None = None


@frozen
class Quiet:
    """A connection on which nothing is under way: nothing is queued, and what came last has been answered.

    ``since_s``: since data last came or went, in seconds. ``received``: how many bytes have come; more of
    them make an end of the quiet.
    """

    since_s: float
    received: int


def list_sockets(
    pids: set[int] | None = None,
    *,
    wanted: Callable[[ListedSocket], bool] = lambda _unused: True,
    quiet: bool = False,
) -> list[ListedSocket]:
    """Every TCP socket of this thread's network namespace, by tuple; only those of ``pids`` if given.

    But for those of which there may be very many and that nobody has: TIME-WAIT, SYN-RECEIVED.
    ``wanted``: which of them, asked before their holders are looked for, as that takes longest.
    ``quiet``: look for that too, which takes longer. Holders without this process. A socket that
    changes its state meanwhile may be missing. OSError if the kernel refuses the dump.
    """
    if pids is not None and not pids:
        return []
    listed = (_listed(row, ()) for row in _dump(_OWNABLE))
    sockets = {one.cookie: one for one in listed if wanted(one)}
    holders, rings = find_holders({one.inode for one in sockets.values()} - {0}, sorted(pids or ()))
    names = {pid: process_name(pid) for pid in {pid for held in holders.values() for pid in held}}
    for cookie in list(sockets):
        one = sockets[cookie]
        if held := holders.pop(one.inode, None):
            by = tuple(
                Holder(pid, fd, names[pid], pid in rings) for pid in sorted(held) for fd in sorted(held[pid])
            )
            sockets[cookie] = replace(one, holders=by)
        elif pids is not None:
            del sockets[cookie]
    found = sorted(sockets.values(), key=_order)
    return _with_quiet(found) if quiet else found


def _with_quiet(found: list[ListedSocket]) -> list[ListedSocket]:
    """By an inspector, as the kernel tells the times only with a socket's lock, which its owner may keep."""
    looks: list[Look] = []
    at: list[int] = []
    for index, one in enumerate(found):
        by = next((each for each in one.holders if each.fd >= 0), None)
        if by is not None and one.state == "ESTABLISHED" and not one.receive_queue and not one.send_queue:
            looks.append(Look(by.pid, by.fd, one.inode))
            at.append(index)
    for index, seen in zip(at, inspectors().look(looks, brief=True), strict=True):
        if not seen.findings and seen.state == 1 and seen.sent_ms <= seen.received_ms:
            found[index] = replace(found[index], quiet=Quiet(seen.sent_ms / 1000, seen.received))
    return found


def _order(listed: ListedSocket) -> tuple[bool | int, ...]:
    """By tuple, listeners first; in numbers, as there may be many."""
    local, remote = listed.local, listed.remote
    far = (int(remote.address), remote.port) if remote else (-1, -1)
    return listed.state != "LISTEN", local.version, int(local.address), local.port, *far, listed.cookie


def known(inodes: Collection[int]) -> dict[int, ListedSocket]:
    """What there is to see of these sockets without their locks; without their holders."""
    return {row[-1]: _listed(row, ()) for row in _dump() if row[-1] in inodes}


def listeners() -> Counter[Endpoint]:
    """How many sockets of this network namespace listen at each endpoint."""
    return Counter(
        _endpoint(family, source, sport)
        for family, _unused, sport, _unused, source, *_unused in _dump(_LISTEN)
    )


def listening() -> set[int]:
    """The inodes of all sockets of this network namespace that listen."""
    return _inodes(_LISTEN)


def bound() -> set[int]:
    """The inodes of all sockets of this network namespace that are bound, and no more than that.

    Before Linux 6.8 the kernel tells of none.
    """
    return _inodes(_BOUND)


def _inodes(states: int) -> set[int]:
    return {row[-1] for row in _dump(states)}


def half_open(at: Collection[Endpoint]) -> dict[FourTuple, int]:
    """Connections of listeners at these endpoints whose peer has not ended the handshake; their cookies."""
    anywhere = {local.port for local in at if local.address.is_unspecified}
    found: dict[FourTuple, int] = {}
    for family, _unused, sport, dport, source, destination, cookie, *_unused in _dump(_SYN_RECV):
        one = FourTuple(_endpoint(family, source, sport), _endpoint(family, destination, dport))
        if one.local in at or one.local.port in anywhere:
            found[one] = cookie
    return found


def _dump(states: int = _ALL) -> Iterator[tuple[Any, ...]]:
    """Fields of ``_MESSAGE``, for which no socket is locked; unpacked one by one, as there may be many."""
    for _turn in range(_TRIES):
        sockets, complete = _dump_once(states)
        if complete:
            break
    return map(_MESSAGE.unpack, sockets)


def received_bytes(descriptor: int) -> int:
    """How many bytes have come in order on a connection, as ``Quiet.received`` counts them."""
    with socket.socket(fileno=os.dup(descriptor)) as each:
        info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
    return int(_RECEIVED.unpack(info)[0])


def unlistable() -> str | None:
    """None if the kernel lists TCP sockets, else why not: without tcp_diag it lists none."""
    try:
        _dump_once(states=0)
    except OSError as error:
        return str(error)
    return None


def _dump_once(states: int) -> tuple[list[bytes], bool]:
    """One dump; the second value is False if the tables changed under it (NLM_F_DUMP_INTR)."""
    body = _REQUEST.pack(states)
    header = _HEADER.pack(_HEADER.size + len(body), _TCPDIAG_GETSOCK, _NLM_F_REQUEST_DUMP, 1, 0)
    sockets: list[bytes] = []
    complete = True
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as netlink:
        netlink.send(header + body)
        while True:
            for kind, flags, data in _messages(netlink.recv(65536)):
                complete &= not flags & _NLM_F_DUMP_INTR
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    # A dump that fails ends like one that does not, but with an errno.
                    if error := -struct.unpack_from("=i", data)[0]:
                        raise OSError(error, f"inet_diag does not list TCP sockets: {os.strerror(error)}")
                    return sockets, complete
                sockets.append(data[: _MESSAGE.size])


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, _unused, _unused = _HEADER.unpack_from(data, at)
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


@functools.lru_cache(maxsize=1024)
def _address(family: int, address: bytes) -> IPv4Address | IPv6Address:
    if family == socket.AF_INET:
        return IPv4Address(address[:4])
    v6 = IPv6Address(address)
    return v6.ipv4_mapped or v6


def _endpoint(family: int, address: bytes, port: bytes) -> Endpoint:
    return Endpoint(_address(family, address), int.from_bytes(port, "big"))


_local = functools.lru_cache(maxsize=256)(_endpoint)  # thousands of connections have the same


def _listed(fields: tuple[Any, ...], holders: tuple[Holder, ...]) -> ListedSocket:
    family, state, sport, dport, source, destination, cookie, receive, send, uid, inode = fields
    connected = STATES.get(state) not in (None, "CLOSED", "LISTEN")
    return ListedSocket(
        inode,
        cookie,
        family,
        STATES.get(state, f"state {state}"),
        _local(family, source, sport),
        _endpoint(family, destination, dport) if connected else None,
        receive,
        send,
        uid,
        holders,
    )
