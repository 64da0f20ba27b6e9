# SPDX-License-Identifier: MIT
"""Preflight: what a socket is, and what stands against moving it. Nothing is frozen to learn this.

The system calls are in libsockmi-engine (``inspect.c``, ``diag.c``, ``sockmap.c``); here their
findings become :class:`~sockmi.engine.base.SocketFacts` and refusals in words.

Cannot be seen from user space, and is not claimed to be: outgoing urgent data that the peer has
not acknowledged (``snd_up``), an announced urgent byte that has not arrived yet, and TCP-MD5 keys of
a socket that is neither connected nor listening.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from enum import IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Kind, Needs, SocketFacts
from sockmi.engine.inspector import FACTS_BYTES, PATIENCE_S, Facts, inspectors, own, unpacked
from sockmi.native import library
from sockmi.refusal import Code, Refusal

#: States of ``TCP_INFO`` and inet_diag (include/net/tcp_states.h) by their RFC 9293 names.
STATES = {
    1: "ESTABLISHED",
    2: "SYN-SENT",
    3: "SYN-RECEIVED",
    4: "FIN-WAIT-1",
    5: "FIN-WAIT-2",
    6: "TIME-WAIT",
    7: "CLOSED",
    8: "CLOSE-WAIT",
    9: "LAST-ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "SYN-RECEIVED",
    13: "CLOSED",
}

#: What an image holds besides the two queues, in bytes, generously.
IMAGE_OVERHEAD_BYTES = 8192

_CLOSED, _LISTEN = 7, 10
_IMMOBILE = frozenset({3, 6, 12})


class Finding(IntFlag):
    """``enum sockmi_finding`` of inspect.h."""

    NOT_TCP = 1 << 0
    MPTCP = 1 << 1
    BAD_DESCRIPTOR = 1 << 2
    OTHER_NETNS = 1 << 3
    URGENT = 1 << 4
    ULP = 1 << 5
    MD5 = 1 << 6
    MD5_UNKNOWN = 1 << 7
    AO = 1 << 8
    SOCKMAP = 1 << 9
    SOCKMAP_UNKNOWN = 1 << 10
    IN_REPAIR = 1 << 11
    NO_PRIVILEGE = 1 << 12
    ZERO_COPY = 1 << 13
    LINK_LOCAL = 1 << 14
    FAST_OPEN = 1 << 15
    ENDED = 1 << 16
    NOT_TAKEN = 1 << 17
    LOCKED = 1 << 18


_NO_FINDING = Finding(0)

#: In the order in which they are told: the first that applies is the refusal.
_REFUSALS: dict[Finding, tuple[Code, str]] = {
    Finding.LOCKED: (
        Code.LOCKED,
        f"a call on it, or on another socket of its user, has kept a socket locked for {PATIENCE_S:g} s, so "
        "that nobody can look at it; try again when the call has returned, or end its process",
    ),
    Finding.NOT_TAKEN: (
        Code.NO_SUCH_SOCKET,
        "descriptor {fd} cannot be taken ({error}); try again",
    ),
    Finding.BAD_DESCRIPTOR: (
        Code.NO_SUCH_SOCKET,
        "descriptor {fd} cannot be read ({error}); name an open one",
    ),
    Finding.MPTCP: (
        Code.MPTCP,
        "it is an MPTCP socket, whose subflows cannot be moved one by one; let the application open it "
        "with IPPROTO_TCP (Go: GODEBUG=multipathtcp=0)",
    ),
    Finding.NOT_TCP: (
        Code.NOT_TCP,
        "descriptor {fd} is not a TCP socket over IPv4 or IPv6; name another",
    ),
    Finding.OTHER_NETNS: (
        Code.NO_SUCH_SOCKET,
        "it lives in another network namespace than this daemon; use the daemon of that one",
    ),
    Finding.NO_PRIVILEGE: (
        Code.NO_PRIVILEGE,
        "this process may not repair it; it needs CAP_NET_ADMIN in the user namespace that owns the "
        "socket's network namespace",
    ),
    Finding.IN_REPAIR: (
        Code.IN_REPAIR,
        "it is in TCP_REPAIR mode already: another tool is at work on it; wait until that has finished",
    ),
    Finding.ENDED: (
        Code.ENDED,
        "its connection has ended, so there is nothing to move; close it",
    ),
    Finding.FAST_OPEN: (
        Code.STATE,
        "it is being opened with TCP Fast Open, and data may be in the SYN; try again when it is established",
    ),
    Finding.ULP: (
        Code.ULP,
        "the kernel protocol {ulp!r} is on top of it, whose state this engine cannot read; move the "
        "connection before that is set, or end it",
    ),
    Finding.AO: (
        Code.TCP_AO,
        "it is signed by TCP-AO, whose keys cannot be read; end the connection instead",
    ),
    Finding.MD5: (
        Code.TCP_MD5,
        "it is signed by TCP-MD5, whose keys this engine does not carry; end the connection instead",
    ),
    Finding.MD5_UNKNOWN: (
        Code.TCP_MD5,
        "TCP-MD5 cannot be ruled out, because inet_diag does not answer ({error}); load tcp_diag, or try "
        "again if the socket was just changing",
    ),
    Finding.SOCKMAP: (
        Code.SOCKMAP,
        "it is in a BPF map of sockets, so a program may take its data; remove it from the map first",
    ),
    Finding.SOCKMAP_UNKNOWN: (
        Code.SOCKMAP,
        "it may be in a BPF map of sockets, and they cannot be read ({error}); give the daemon "
        "CAP_SYS_ADMIN, and such maps values of 8 bytes",
    ),
    Finding.URGENT: (
        Code.URGENT_DATA,
        "urgent data, or the mark of it, is in the receive queue, and would lose its place; try again "
        "when the application has read it",
    ),
    Finding.ZERO_COPY: (
        Code.ZERO_COPY,
        "it sends with MSG_ZEROCOPY, and the application has completions to come; try again when it has "
        "read them",
    ),
    Finding.LINK_LOCAL: (
        Code.LINK_LOCAL,
        "an IPv6 link-local address belongs to this host's interface and means nothing elsewhere; use a "
        "global address",
    ),
}


@functools.lru_cache(maxsize=1024)
def _address(raw: bytes, version: int) -> IPv4Address | IPv6Address:
    return IPv4Address(raw[:4]) if version == 4 else IPv6Address(raw)


@functools.lru_cache(maxsize=256)
def _local(raw: bytes, version: int, port: int) -> Endpoint:
    """One for all connections that have it: their redirects keep it."""
    return Endpoint(_address(raw, version), port)


@functools.cache
def _inspect() -> Any:
    function = library().sockmi_inspect
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    function.restype = ctypes.c_int
    return function


def _refusal(fd: int, findings: int, state: int, error: int, ulp: bytes) -> Refusal | None:
    for finding, (code, sentence) in _REFUSALS.items():
        if findings & finding:
            text = sentence.format(
                fd=fd, error=os.strerror(error), ulp=ulp.split(b"\0", 1)[0].decode("ascii", "replace")
            )
            return Refusal(code, text)
    if state in _IMMOBILE:
        return Refusal(
            Code.STATE, f"a socket in {STATES[state]} cannot be moved; try again when it is established"
        )
    return None


def inspect(fds: Sequence[int], looks: int = 3, carried: Finding = _NO_FINDING) -> list[SocketFacts]:
    """Look at each descriptor of this process; the facts are in the same order. For any thread.

    An inspector does it, so that who keeps a socket locked keeps nobody waiting (``LOCKED``). Where there
    seems to be urgent data, ``looks`` times. ``carried``: what does not stand against a move by this engine.

    What is wrong with a descriptor is its ``refusal``; OSError only if none could be looked at
    (no memory, no descriptors left). ``receive_queue_bytes`` and ``send_queue_bytes`` of a listener are 0.
    """
    return _inspected(lambda some: inspectors().look(own(some)), fds, looks, carried)


def inspect_here(fds: Sequence[int], looks: int = 3, carried: Finding = _NO_FINDING) -> list[SocketFacts]:
    """The same without an inspector: it waits for as long as somebody keeps a socket locked."""
    return _inspected(_look_here, fds, looks, carried)


def _look_here(fds: Sequence[int]) -> list[Facts]:
    numbers = (ctypes.c_int * len(fds))(*fds)
    buffer = ctypes.create_string_buffer(FACTS_BYTES * len(fds))
    error = _inspect()(numbers, len(fds), buffer)
    if error < 0:
        raise OSError(-error, f"cannot inspect {len(fds)} sockets: {os.strerror(-error)}")
    return unpacked(buffer.raw)


def _inspected(
    look: Callable[[Sequence[int]], list[Facts]], fds: Sequence[int], looks: int, carried: Finding
) -> list[SocketFacts]:
    if not fds:
        return []
    found = [_facts(fd, one, carried) for fd, one in zip(fds, look(fds), strict=True)]
    if looks > 1:
        # A segment that comes between two of the calls looks like it; the mark itself stays.
        urgent = [at for at, one in enumerate(found) if one.needs.urgent]
        again = _inspected(look, [fds[at] for at in urgent], looks - 1, carried)
        for at, one in zip(urgent, again, strict=True):
            found[at] = one
    return found


def queued_at_most(fds: Sequence[int]) -> list[int]:
    """How many bytes may be queued at each connection, both ways: more than there are. Waits for no lock."""
    found = (ctypes.c_uint64 * len(fds))()
    library().sockmi_queued_at_most((ctypes.c_int * len(fds))(*fds), ctypes.c_size_t(len(fds)), found)
    return list(found)


def syn_offered(fd: int) -> tuple[int, bool]:
    """What the SYN of a socket offers: its window scale, and whether its timestamps count microseconds."""
    offered = library().sockmi_syn_offered(fd)
    return offered & 0xFF, bool(offered >> 8)


def _facts(fd: int, seen: Facts, carried: Finding) -> SocketFacts:
    findings, send_queue = seen.findings, seen.send_queue
    urgent = bool(findings & Finding.URGENT)
    findings &= ~carried
    listening = seen.state == _LISTEN
    if seen.state == _CLOSED and send_queue:
        # tcp_disconnect() moves SND.NXT away from SND.UNA: this socket has had a connection.
        findings |= Finding.ENDED
        send_queue = 0
    connected = seen.state not in (0, _CLOSED, _LISTEN)
    unseen = Finding.BAD_DESCRIPTOR | Finding.NOT_TCP | Finding.MPTCP | Finding.NOT_TAKEN | Finding.LOCKED
    queued = max(seen.receive_queue, seen.receive_buffer) + max(send_queue, seen.send_buffer)
    needs = Needs(
        max(seen.send_scale, seen.receive_scale),
        bool(seen.timestamp_us),
        IMAGE_OVERHEAD_BYTES if listening else queued + IMAGE_OVERHEAD_BYTES,
        BindFlag(0 if connected or findings & unseen else seen.bind_flags),
        urgent,
        bool(seen.direct),
    )
    return SocketFacts(
        seen.inode,
        seen.cookie,
        Kind.CONNECTED if connected else Kind.LISTENING if listening else Kind.BOUND,
        STATES.get(seen.state, "CLOSED"),
        seen.family,
        None if findings & unseen else _local(seen.local, seen.version, seen.local_port),
        Endpoint(_address(seen.remote, seen.version), seen.remote_port) if connected else None,
        0 if listening else seen.receive_queue,
        0 if listening else send_queue,
        needs,
        _refusal(fd, findings, seen.state, seen.error, seen.ulp)
        if findings or seen.state in _IMMOBILE
        else None,
        seen.receive_queue if listening else 0,
    )
