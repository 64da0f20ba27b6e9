# SPDX-License-Identifier: MIT
"""Fragments of a connection that is held or redirected, without conntrack and with it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import held, redirect
from tests.kmod.nat_lab import Triangle, triangle
from tests.lab.redirect_lab import Host, until

WHOLE, LARGE = 1000, 4000  # bytes of a segment: one packet, and three fragments
IPV6_CHECKSUM, TCP_CHECKSUM_AT = 7, 16
LOOKS = "table inet seen { chain in { type filter hook prerouting priority raw; ct state new accept; }; }"


class Wire:
    """Segments from the peer to a, as numbers of bytes; what of them reaches b's TCP."""

    def __init__(self, of: Triangle) -> None:
        self.of = of
        hosts = of.lab.hosts
        at = {name: ip_address(hosts[name].address(of.version)) for name in ("peer", "a", "b")}
        self.ends = FourTuple(Endpoint(at["a"], 80), Endpoint(at["peer"], 5000))
        self.copy = Endpoint(at["b"], 40001)
        self.nat = of.nat(of.lab.a)
        self._out, self._in = (self._raw(host) for host in (of.lab.peer, of.lab.b))
        if of.version == 6:
            self._out.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, TCP_CHECKSUM_AT)
        self._in.setblocking(False)

    def _raw(self, host: Host) -> socket.socket:
        family = socket.AF_INET if self.of.version == 4 else socket.AF_INET6
        with host.inside():
            return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)

    def send(self, length: int) -> None:
        ports = self.ends.remote.port.to_bytes(2) + self.ends.local.port.to_bytes(2)
        head = ports + bytes(8) + b"\x50\x10" + bytes(6)
        self._out.sendto(head + os.urandom(length), (str(self.ends.local.address), 0))

    def arrived(self) -> list[int]:
        """Bytes of each segment to the copy."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._in.recv(1 << 16)
                body = packet[(packet[0] & 15) * 4 :] if self.of.version == 4 else packet
                if int.from_bytes(body[2:4]) == self.copy.port:
                    found.append(len(body) - 20)
        return found

    def close(self) -> None:
        self._out.close()
        self._in.close()


@pytest.fixture(params=[4, 6])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with triangle(request.param) as of, contextlib.closing(Wire(of)) as made:
        yield made


def test_redirected(wire: Wire) -> None:
    wire.nat.add(redirect(wire.ends, wire.copy))
    wire.send(LARGE)
    wire.send(WHOLE)
    found: list[int] = []
    until(lambda: found.extend(wire.arrived()) or WHOLE in found, "the whole packet")
    time.sleep(0.1)
    assert found + wire.arrived() == [LARGE, WHOLE]


def test_held_and_then_redirected(wire: Wire) -> None:
    wire.nat.add(held(wire.ends))
    wire.send(LARGE)
    wire.send(WHOLE)
    until(lambda: wire.nat.one(wire.ends).kept == 2, "two packets that wait")
    wire.nat.replace(redirect(wire.ends, wire.copy))
    found: list[int] = []
    until(lambda: found.extend(wire.arrived()) or WHOLE in found, "the whole packet")
    time.sleep(0.1)
    assert found + wire.arrived() == [LARGE, WHOLE]


def test_where_conntrack_is_at_work_they_are_whole(wire: Wire) -> None:
    wire.of.lab.a.nft("-f", "-", text=LOOKS)
    wire.nat.add(redirect(wire.ends, wire.copy))
    wire.send(LARGE)
    found: list[int] = []
    until(lambda: found.extend(wire.arrived()) or found, "the packet")
    assert found == [LARGE]
