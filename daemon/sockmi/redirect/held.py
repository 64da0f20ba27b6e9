# SPDX-License-Identifier: MIT
"""Packets of held connections: kept, and delivered when the connection is alive again.

The hold drops what it meets, and netfilter logs it to us (NFLOG). Without this the peer would have to
send those packets again, a retransmission timeout (200 ms and more) later. A packet that
is lost here in spite of all is only that: lost, as on any network.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.native import library

_NETLINK_NETFILTER = 12
_SUBSYS_ULOG = 4
_MSG_PACKET, _MSG_CONFIG = 0, 1
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 3, 4, 5
_CMD_BIND, _COPY_PACKET = 1, 2
_ATTRIBUTE_PAYLOAD = 9
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR = 1, 4, 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_GROUP = struct.Struct("!16sI")
_LENGTH = struct.Struct("!I")
_SO_RCVBUFFORCE = 33
_IPPROTO_TCP = 6
_MAPPED = bytes(10) + b"\xff\xff"

PACKETS_PER_CONNECTION_MAX = 256
BYTES_MAX = 32 << 20


class _Endpoint(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_ubyte * 16),
        ("port", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
        ("scope_id", ctypes.c_uint32),
    )


class _Packet(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("local", _Endpoint))


@functools.cache
def _deliver() -> Any:
    function = library().sockmi_deliver
    function.argtypes = [ctypes.POINTER(_Packet), ctypes.c_size_t, ctypes.c_uint32]
    function.restype = ctypes.c_int
    return function


class HeldPackets:
    """What the holds of this host have dropped and still may be wanted; bounded."""

    def __init__(self, group: int, inject_mark: int) -> None:
        """``group``: the NFLOG group that the hold's rules name. Raises OSError if it is taken."""
        self._mark = inject_mark
        self._kept: dict[FourTuple, deque[bytes]] = {}
        self._bytes = 0
        self._wanted: set[FourTuple] = set()
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_NETFILTER,
        )
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        self._socket.bind((0, 0))
        self._configure(group, _CFG_CMD, struct.pack("=B", _CMD_BIND))
        self._configure(group, _CFG_MODE, struct.pack("!IBx", 0xFFFF, _COPY_PACKET))
        self._configure(group, _CFG_NLBUFSIZ, struct.pack("!I", 1 << 17))
        self._configure(group, _CFG_QTHRESH, struct.pack("!I", 1))
        self._configure(group, _CFG_TIMEOUT, struct.pack("!I", 1))

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Forget everything."""
        self._socket.close()
        self._kept.clear()

    # -- what is kept

    def want(self, tuples: Iterable[FourTuple]) -> None:
        """Keep packets of these from now on (they are being held)."""
        self._wanted.update(tuples)

    def forget(self, tuples: Iterable[FourTuple]) -> None:
        """The inverse of ``want``; what was kept is gone."""
        for connection in tuples:
            self._wanted.discard(connection)
            self._bytes -= sum(map(len, self._kept.pop(connection, ())))

    def take(self, tuples: Sequence[FourTuple]) -> dict[FourTuple, list[bytes]]:
        """The packets of these, oldest first, and ``forget``."""
        self.readable()
        found = {one: list(kept) for one in tuples if (kept := self._kept.get(one))}
        self.forget(tuples)
        return found

    def add(self, connection: FourTuple, packets: Iterable[bytes]) -> None:
        """Keep packets of ``connection`` that are wanted here, though they may have come to another host."""
        if connection not in self._wanted:
            return
        kept = self._kept.setdefault(connection, deque())
        for packet in packets:
            if self._bytes + len(packet) > BYTES_MAX:
                return
            if len(kept) == PACKETS_PER_CONNECTION_MAX:
                self._bytes -= len(kept.popleft())
            kept.append(packet)
            self._bytes += len(packet)

    def deliver(self, packets: dict[FourTuple, list[bytes]]) -> int:
        """Give packets to this host's sockets; the tuples are as those have them. Returns how many went."""
        rows = [(packet, connection.local) for connection, several in packets.items() for packet in several]
        if not rows:
            return 0
        buffers = [ctypes.create_string_buffer(packet, len(packet)) for packet, _ in rows]
        array = (_Packet * len(rows))()
        for entry, buffer, (packet, local) in zip(array, buffers, rows, strict=True):
            entry.data = ctypes.addressof(buffer)
            entry.length = len(packet)
            entry.local = _native_endpoint(local)
        return int(_deliver()(array, len(rows), self._mark))

    # -- netlink

    def readable(self) -> None:
        """Take in what the kernel has logged."""
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some were lost: their senders will repeat them
                    continue
                raise
            for packet in _payloads(data):
                connection = _connection(packet)
                if connection is not None:
                    self.add(connection, [packet])

    def _configure(self, group: int, attribute: int, value: bytes) -> None:
        padded = value + bytes(-len(value) % 4)
        body = struct.pack("!BBH", 0, 0, group) + _ATTRIBUTE.pack(4 + len(value), attribute) + padded
        kind = _SUBSYS_ULOG << 8 | _MSG_CONFIG
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK, 0, 0)
        self._socket.send(header + body)
        while True:
            answer = self._socket.recv(1 << 18)
            _, kind, *_ = _HEADER.unpack_from(answer)
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
                if code:
                    raise OSError(
                        code, f"NFLOG group {group}: {os.strerror(code)}; is another daemon using it?"
                    )
                return


def pack(packets: dict[bytes, list[bytes]]) -> bytes:
    """Packets by migration id (16 bytes), for the way to the importer."""
    parts = []
    for migration, several in packets.items():
        parts.append(_GROUP.pack(migration, len(several)))
        for packet in several:
            parts += (_LENGTH.pack(len(packet)), packet)
    return b"".join(parts)


def unpack(content: bytes) -> dict[bytes, list[bytes]]:
    """The inverse of ``pack``; ValueError if it is malformed."""
    found: dict[bytes, list[bytes]] = {}
    at = 0
    while at < len(content):
        if at + _GROUP.size > len(content):
            raise ValueError(f"cut off at byte {at}")
        migration, count = _GROUP.unpack_from(content, at)
        at += _GROUP.size
        several = found.setdefault(migration, [])
        for _ in range(count):
            if at + _LENGTH.size > len(content):
                raise ValueError(f"cut off at byte {at}")
            (length,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            if at + length > len(content):
                raise ValueError(f"cut off at byte {at}")
            several.append(content[at : at + length])
            at += length
    return found


def _payloads(data: bytes) -> Iterator[bytes]:
    """The packets in netlink messages."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        if kind == _SUBSYS_ULOG << 8 | _MSG_PACKET:
            position, end = at + _HEADER.size + 4, at + length
            while position + 4 <= end:
                size, attribute = _ATTRIBUTE.unpack_from(data, position)
                if size < 4:
                    break
                if attribute & 0x3FFF == _ATTRIBUTE_PAYLOAD:
                    yield data[position + 4 : position + size]
                position += (size + 3) & ~3
        at += (length + 3) & ~3


def _connection(packet: bytes) -> FourTuple | None:
    """The connection of a packet that has come in, as this host's socket has it."""
    source: IPv4Address | IPv6Address
    target: IPv4Address | IPv6Address
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 40 and packet[9] == _IPPROTO_TCP:
        start = (packet[0] & 15) * 4
        source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    elif version == 6 and len(packet) >= 60 and packet[6] == _IPPROTO_TCP:
        start = 40
        source, target = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    else:
        return None
    if len(packet) < start + 4:
        return None
    remote_port, local_port = struct.unpack_from("!HH", packet, start)
    return FourTuple(Endpoint(target, local_port), Endpoint(source, remote_port))


def _native_endpoint(endpoint: Endpoint) -> _Endpoint:
    packed = endpoint.address.packed
    full = _MAPPED + packed if len(packed) == 4 else packed
    return _Endpoint((ctypes.c_ubyte * 16)(*full), endpoint.port, 0, 0)
