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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.native import library
from sockmi.redirect.ruleset import BEGUN
from sockmi.redirect.segment import RST, Expected, key, key_of, parse

_NETLINK_NETFILTER = 12
_SUBSYS_ULOG = 4
_MSG_PACKET, _MSG_CONFIG = 0, 1
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 3, 4, 5
_CMD_BIND, _COPY_PACKET = 1, 2
_ATTRIBUTE_PAYLOAD, _ATTRIBUTE_PREFIX = 9, 10  # the prefix is there, and empty, if a rule has none
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR = 1, 4, 2
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER_BYTES = 1 << 17
_GROUP = struct.Struct("!16sI")
_LENGTH = struct.Struct("!I")
_SO_RCVBUFFORCE = 33
_MAPPED = bytes(10) + b"\xff\xff"
_PACKET = struct.Struct("@PN16sHHIi4x")  # struct sockmi_packet, with its struct sockmi_endpoint
_NO_SOCKETS: Mapping[FourTuple, int] = {}

PACKETS_PER_CONNECTION_MAX = 256
BYTES_PER_CONNECTION_MAX = 1 << 20
BYTES_MAX = 32 << 20
# Of connections that rest in the import list, which may be many, and for long.
RESTING_BYTES_PER_CONNECTION_MAX = 64 << 10
RESTING_BYTES_MAX = 8 << 20
# Read before the loop gets its turn, however fast packets come; and at most what the kernel's buffer can have
# had when whoever takes them came.
_READ_AT_ONCE = 512
_READ_TO_TAKE = 16384


@functools.cache
def _deliver() -> Any:
    function = library().sockmi_deliver
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32]
    function.restype = ctypes.c_int
    return function


@dataclass(slots=True)
class _Kept:
    """Packets of one connection. ``expected`` and ``reset`` are of one that rests."""

    packets: deque[bytes] = field(default_factory=deque)
    bytes: int = 0
    expected: Expected | None = None
    reset: Callable[[], None] | None = None

    @property
    def resting(self) -> bool:
        return self.reset is not None


class HeldPackets:
    """What the holds of this host have dropped and still may be wanted; bounded.

    A connection that is being moved, for milliseconds, has precedence over those that rest in the import
    list, for as long as it takes. Of the first the latest packets are kept, of the others the earliest: a
    peer goes on from there.
    """

    def __init__(self, group: int, inject_mark: int) -> None:
        """``group``: the NFLOG group that the hold's rules name. Raises OSError if it is taken."""
        #: Gets the ends of a SYN, and of a connection that had come to this host.
        self.begun_anew: Callable[[FourTuple], None] = lambda _unused: None
        self._mark = inject_mark
        self._kept: dict[bytes, _Kept] = {}  # by segment.key
        self._bytes = 0
        self._resting: dict[bytes, None] = {}  # of which something is kept, in the order of its coming
        self._resting_bytes = 0
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
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
        self._configure(group, _CFG_NLBUFSIZ, struct.pack("!I", _BUFFER_BYTES))
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
        """Keep packets of these from now on (they are being held, and moved)."""
        for connection in tuples:
            name = key(connection)
            kept = self._kept.setdefault(name, _Kept())
            if kept.resting:
                kept.expected = kept.reset = None
                self._resting.pop(name, None)
                self._resting_bytes -= kept.bytes

    def rest(self, connection: FourTuple, expected: Expected | None, reset: Callable[[], None]) -> None:
        """It waits for an application. ``reset`` is called as soon as its peer has ended it by a RST.

        ``expected``: what it would receive next; None if that is not known, then a RST is only kept. It
        may have come already: ``reset`` must not call back into this object.
        """
        self.want([connection])
        name = key(connection)
        kept = self._kept[name]
        kept.expected, kept.reset = expected, reset
        for packet in kept.packets:
            self._judge(kept, packet)
        most = min(RESTING_BYTES_PER_CONNECTION_MAX, RESTING_BYTES_MAX - self._resting_bytes)
        while kept.bytes > most:
            self._drop(kept, kept.packets.pop())
        if kept.packets:
            self._resting[name] = None
            self._resting_bytes += kept.bytes

    def forget(self, tuples: Iterable[FourTuple]) -> None:
        """The inverse of ``want`` and ``rest``; what was kept is gone."""
        for connection in tuples:
            self._forget(key(connection))

    def _forget(self, name: bytes) -> _Kept | None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._bytes -= kept.bytes
            if kept.resting:
                self._resting.pop(name, None)
                self._resting_bytes -= kept.bytes
        return kept

    def take(self, tuples: Sequence[FourTuple]) -> dict[FourTuple, list[bytes]]:
        """The packets of these, oldest first, and ``forget``."""
        self.readable(_READ_TO_TAKE)
        forgotten = ((one, self._forget(key(one))) for one in tuples)
        return {one: list(kept.packets) for one, kept in forgotten if kept and kept.packets}

    def add(self, connection: FourTuple, packets: Iterable[bytes]) -> None:
        """Keep packets of ``connection`` that are wanted here, though they may have come to another host."""
        name = key(connection)
        for packet in packets:
            self._add(name, packet)

    def _add(self, name: bytes, packet: bytes) -> None:
        kept = self._kept.get(name)
        if kept is None:
            return
        if kept.resting:
            self._add_resting(name, kept, packet)
        else:
            self._add_moving(kept, packet)

    def _add_moving(self, kept: _Kept, packet: bytes) -> None:
        most = BYTES_PER_CONNECTION_MAX
        while kept.packets and (
            len(kept.packets) >= PACKETS_PER_CONNECTION_MAX or kept.bytes + len(packet) > most
        ):
            self._drop(kept, kept.packets.popleft())
        while self._bytes + len(packet) > BYTES_MAX and self._resting_bytes:
            self._displace()
        if self._bytes + len(packet) <= BYTES_MAX:
            self._keep(kept, packet)

    def _add_resting(self, name: bytes, kept: _Kept, packet: bytes) -> None:
        self._judge(kept, packet)
        size = len(packet)
        if (
            len(kept.packets) < PACKETS_PER_CONNECTION_MAX
            and kept.bytes + size <= RESTING_BYTES_PER_CONNECTION_MAX
            and self._resting_bytes + size <= RESTING_BYTES_MAX
            and self._bytes + size <= BYTES_MAX
            and packet not in kept.packets
        ):
            self._keep(kept, packet)
            self._resting[name] = None
            self._resting_bytes += size

    def _displace(self) -> None:
        """Give up what is kept for the resting connection of which something has been kept the longest."""
        name = next(iter(self._resting))
        del self._resting[name]
        kept = self._kept[name]
        self._resting_bytes -= kept.bytes
        while kept.packets:
            self._drop(kept, kept.packets.pop())

    def _keep(self, kept: _Kept, packet: bytes) -> None:
        kept.packets.append(packet)
        kept.bytes += len(packet)
        self._bytes += len(packet)

    def _drop(self, kept: _Kept, packet: bytes) -> None:
        kept.bytes -= len(packet)
        self._bytes -= len(packet)

    def _judge(self, kept: _Kept, packet: bytes) -> None:
        """Tell if it is a RST that ends a connection that rests."""
        segment = parse(packet) if kept.expected else None
        if segment is None or not segment.flags & RST or kept.expected is None or kept.reset is None:
            return
        if kept.expected.resets(segment, {end for one in kept.packets for end in _ends(one)}):
            kept.reset()

    def deliver(
        self, packets: dict[FourTuple, list[bytes]], sockets: Mapping[FourTuple, int] = _NO_SOCKETS
    ) -> int:
        """Give packets to this host's sockets; the tuples are as those have them. Returns how many went.

        ``sockets``: descriptors of those that may be bound to a device.
        """
        content = b"".join([packet for several in packets.values() for packet in several])
        if not content:
            return 0
        buffer = ctypes.create_string_buffer(content, len(content))
        at, rows = ctypes.addressof(buffer), []
        for connection, several in packets.items():
            address, port = _wide(connection.local), connection.local.port
            descriptor = sockets.get(connection, -1)
            for packet in several:
                rows.append(_PACKET.pack(at, len(packet), address, port, 0, 0, descriptor))
                at += len(packet)
        return int(_deliver()(ctypes.create_string_buffer(b"".join(rows)), len(rows), self._mark))

    # -- netlink

    def readable(self, most: int = _READ_AT_ONCE) -> bool:
        """Take in what the kernel has logged, ``most`` of its messages; whether there may be more."""
        for _turn in range(most):
            try:
                length = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ENOBUFS:  # some were lost: their senders will repeat them
                    continue
                raise
            for packet, held in _payloads(self._buffer[:length]):
                if not held:
                    if (segment := parse(packet)) is not None:
                        self.begun_anew(segment.connection)
                elif (name := key_of(packet)) is not None:
                    self._add(name, packet)
        return True

    def _configure(self, group: int, attribute: int, value: bytes) -> None:
        padded = value + bytes(-len(value) % 4)
        body = struct.pack("!BBH", 0, 0, group) + _ATTRIBUTE.pack(4 + len(value), attribute) + padded
        kind = _SUBSYS_ULOG << 8 | _MSG_CONFIG
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK, 0, 0)
        self._socket.send(header + body)
        while True:
            answer = self._socket.recv(_BUFFER_BYTES)
            _unused, kind, *_unused = _HEADER.unpack_from(answer)
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
        for _turn in range(count):
            if at + _LENGTH.size > len(content):
                raise ValueError(f"cut off at byte {at}")
            (length,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            if at + length > len(content):
                raise ValueError(f"cut off at byte {at}")
            several.append(content[at : at + length])
            at += length
    return found


def _payloads(data: memoryview) -> Iterator[tuple[bytes, bool]]:
    """The packets in netlink messages, and whether a hold has dropped them: the other rule says BEGUN."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_unused = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        if kind == _SUBSYS_ULOG << 8 | _MSG_PACKET:
            position, end, held = at + _HEADER.size + 4, at + length, True
            while position + 4 <= end:
                size, attribute = _ATTRIBUTE.unpack_from(data, position)
                if size < 4:
                    break
                if attribute & 0x3FFF == _ATTRIBUTE_PREFIX:
                    held = bytes(data[position + 4 : position + size]).rstrip(b"\0") != BEGUN.encode()
                elif attribute & 0x3FFF == _ATTRIBUTE_PAYLOAD:
                    yield bytes(data[position + 4 : position + size]), held
                position += (size + 3) & ~3
        at += (length + 3) & ~3


def _ends(packet: bytes) -> set[int]:
    """The sequence number after a packet's data, if it has any."""
    segment = parse(packet)
    return {segment.ends} if segment and segment.ends != segment.sequence else set()


def _wide(endpoint: Endpoint) -> bytes:
    packed = endpoint.address.packed
    return _MAPPED + packed if len(packed) == 4 else packed
