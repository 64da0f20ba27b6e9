# SPDX-License-Identifier: MIT
"""TCP segments of connections that nobody need have, sent by a raw socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sockmi.addresses import FourTuple
from sockmi.redirect.icmp import _ipv4, _ipv6, _RawSender, checksum
from tests.lab.redirect_lab import Host

_ACK_PSH = 0x18


@contextmanager
def segments(
    t: FourTuple, data: bytes = b"", mark: int = 0, *, sequence: int = 1, ack: int = 1
) -> Iterator[Callable[[], None]]:
    """What sends a segment with ACK and ``data`` from this namespace, each time it is called."""
    ports = t.local.port, t.remote.port
    numbers = sequence & 0xFFFFFFFF, ack & 0xFFFFFFFF
    tcp = struct.pack("!HHIIBBHHH", *ports, *numbers, 0x50, _ACK_PSH, 4096, 0, 0) + data
    ends = t.local.address.packed, t.remote.address.packed
    total = checksum(b"".join(ends) + struct.pack("!II", len(tcp), socket.IPPROTO_TCP) + tcp)
    tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
    if t.version == 4:
        packet = _ipv4(socket.IPPROTO_TCP, 20 + len(tcp), *ends) + tcp
    else:
        packet = _ipv6(socket.IPPROTO_TCP, len(tcp), *ends) + tcp
    sender = _RawSender(mark)
    try:
        yield lambda: sender.send(packet, t.remote.address)
    finally:
        sender.close()


def segment(
    host: Host, t: FourTuple, data: bytes = b"", mark: int = 0, *, sequence: int = 1, ack: int = 1
) -> None:
    """Send one from ``host``, whoever has these addresses."""
    with host.inside(), segments(t, data, mark, sequence=sequence, ack=ack) as send:
        send()
