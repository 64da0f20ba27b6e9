# SPDX-License-Identifier: MIT
"""TCP segments as they come off the wire: whose they are, and what they say."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from sockmi.addresses import Endpoint, FourTuple

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
_IPPROTO_TCP = 6
_TCP = struct.Struct("!HHIIBBH")
_PORTS = struct.Struct("!HH")
_SEQUENCE = 1 << 32


class Segment(NamedTuple):
    """``connection`` is as this host's socket has it; ``length``: bytes of data, ``ends``: the number after
    all that it occupies of the sequence space."""

    connection: FourTuple
    sequence: int
    acknowledges: int
    flags: int
    length: int

    @property
    def ends(self) -> int:
        """See above."""
        return (self.sequence + self.length + bool(self.flags & SYN) + bool(self.flags & FIN)) % _SEQUENCE


def key(connection: FourTuple) -> bytes:
    """Both addresses and both ports, as a packet that comes in for ``connection`` has them."""
    local, remote = connection.local, connection.remote
    return remote.address.packed + local.address.packed + _PORTS.pack(remote.port, local.port)


def key_of(packet: bytes) -> bytes | None:
    """The ``key`` of the connection that a packet is of; None if it is not what ``parse`` takes."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 40 and packet[9] == _IPPROTO_TCP:
        start = (packet[0] & 15) * 4
        return packet[12:20] + packet[start : start + 4]
    if version == 6 and len(packet) >= 60 and packet[6] == _IPPROTO_TCP:
        return packet[8:44]
    return None


def parse(packet: bytes) -> Segment | None:
    """A packet that has come in; None if it is no TCP over IPv4 or IPv6 (without extension headers)."""
    source: IPv4Address | IPv6Address
    target: IPv4Address | IPv6Address
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 40 and packet[9] == _IPPROTO_TCP:
        start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        source, target = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    elif version == 6 and len(packet) >= 60 and packet[6] == _IPPROTO_TCP:
        start, end = 40, 40 + int.from_bytes(packet[4:6], "big")
        source, target = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    else:
        return None
    if len(packet) < start + _TCP.size:
        return None
    remote_port, local_port, sequence, acknowledges, offset, flags, _unused = _TCP.unpack_from(packet, start)
    # A length of 0 is of a packet that was put together of several (BIG TCP).
    data = (end if end > start else len(packet)) - start - (offset >> 4) * 4
    connection = FourTuple(Endpoint(target, local_port), Endpoint(source, remote_port))
    return Segment(connection, sequence, acknowledges, flags, max(0, data))


class Expected(NamedTuple):
    """What a connection that does not run would have received next; ``window`` in bytes.

    ``awaits``: in SYN-SENT, the number whose acknowledgement makes a RST valid.
    """

    sequence: int
    window: int
    awaits: int | None = None

    def resets(self, segment: Segment, before: set[int]) -> bool:
        """Whether a RST ends the connection, as RFC 9293 (3.10.7) and RFC 5961 (3.2) have it.

        A sequence number that is merely in the window does not: a kernel would ask its sender to repeat it,
        which we cannot, and others could guess one. ``before``: where segments end that have come and wait.
        """
        if not segment.flags & RST:
            return False
        if self.awaits is not None:
            return bool(segment.flags & ACK) and segment.acknowledges == self.awaits
        exact = segment.sequence == self.sequence or segment.sequence in before
        return exact and (segment.sequence - self.sequence) % _SEQUENCE <= self.window
