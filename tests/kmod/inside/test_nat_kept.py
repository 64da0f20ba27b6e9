# SPDX-License-Identifier: MIT
"""What the peer sends to a held connection arrives after all, at whoever has the connection then.

Nobody here retransmits before ten seconds are over: what arrives is what the hold has kept.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.module_client import frozen
from tests.kmod.module_mover import Mover, netem
from tests.kmod.nat_client import Flag, Nat, Seen, held, redirect, translate
from tests.kmod.nat_lab import Triangle, offloads, triangle
from tests.lab.redirect_lab import Capture, Host, connect, ends, pattern, until

COPY_PORT = 40001
LIMIT = Path("/sys/module/sockmi/parameters/nat_kept_max_mb")
NEWEST = 256  # packets of a flow
SLOW_6 = pytest.param(6, marks=pytest.mark.slow)


def patient(host: Host, version: int) -> None:
    """No loss probe, and no retransmission before ten seconds are over."""
    subnet = "10.9.0.0/24" if version == 4 else "fd09::/64"
    metric = ("metric", "256") if version == 6 else ()
    host.ip(f"-{version}", "route", "replace", subnet, "dev", "eth0", *metric, "rto_min", "10s")
    host.sysctl("net/ipv4/tcp_early_retrans", 0)


class Pair:
    """A connection between peer and a, both patient."""

    def __init__(self, of: Triangle) -> None:
        self.of, self.lab, self.version = of, of.lab, of.version
        for host in (of.lab.peer, of.lab.a, of.lab.b):
            patient(host, of.version)
        self.peer, self.server = connect(of.lab.peer, of.lab.a, of.version)
        for sock in (self.peer, self.server):
            sock.settimeout(5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))  # leaves nothing
        self.ends = ends(self.server)
        self.nat: Nat = of.nat(of.lab.a)
        self.mover = Mover(of)

    def close(self) -> None:
        self.mover.close()
        self.peer.close()
        self.server.close()

    def kept(self, least: int) -> None:
        """So many packets wait at a."""
        until(lambda: self.nat.one(self.ends).kept >= least, f"{least} packets that wait")


@pytest.fixture(params=[4, SLOW_6])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with triangle(request.param) as of:
        made = Pair(of)
        try:
            yield made
        finally:
            made.close()


def tcp(sock: socket.socket) -> tuple[int, int]:
    """(tcpi_unacked, tcpi_total_retrans)"""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return struct.unpack_from("=I", info, 24)[0], struct.unpack_from("=I", info, 100)[0]


def read(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes."""
    parts = b""
    while len(parts) < length:
        parts += sock.recv(length - len(parts))
    return parts


def move(pair: Pair, port: int = COPY_PORT) -> socket.socket:
    """From a, where it is held, to b; the copy, alive."""
    to = Endpoint(type(pair.ends.local.address)(pair.lab.b.address(pair.version)), port)
    importer = pair.of.nat(pair.lab.b)
    source, target = pair.mover.device(pair.lab.a), pair.mover.device(pair.lab.b)
    with frozen(source, pair.server) as (freeze, image):
        source.commit(freeze)
    with pair.lab.b.inside():
        copy = socket.socket(pair.server.family, socket.SOCK_STREAM)
    copy.settimeout(5)
    made = pair.mover._restore(target, copy.fileno(), bytearray(image), to)
    importer.set(translate(to, pair.ends))
    pair.nat.replace(redirect(pair.ends, to))
    target.decide("activate", made.id)
    return copy


# ---- It arrives ----


def test_thawed_owner_gets_what_came_meanwhile(pair: Pair) -> None:
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(b"in")
    pair.kept(1)
    pair.nat.remove(held(pair.ends))
    assert pair.server.recv(2) == b"in"
    assert tcp(pair.peer)[1] == 0


def test_frozen_held_and_thawed(pair: Pair) -> None:
    """The abort of a move that had got as far as the hold."""
    device = pair.mover.device(pair.lab.a)
    with frozen(device, pair.server, deadline_ms=3000) as (freeze, _image):
        pair.nat.add(held(pair.ends))
        pair.peer.sendall(b"in")
        pair.kept(1)
        device.abort(freeze)
        pair.nat.remove(held(pair.ends))
        assert pair.server.recv(2) == b"in"
    assert tcp(pair.peer)[1] == 0


def test_end_of_time_hands_on(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.HOLD | Flag.MUTE, hold_ms=300))
    pair.peer.sendall(b"in")
    pair.kept(1)
    assert pair.server.recv(2) == b"in"
    flow = pair.nat.one(pair.ends)
    assert flow.flags == Flag.MUTE and Seen.LAPSE in flow.seen and flow.kept == 0
    assert tcp(pair.peer)[1] == 0


def test_flush_hands_on(pair: Pair) -> None:
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(b"in")
    pair.kept(1)
    pair.nat.flush()
    assert pair.server.recv(2) == b"in"


def test_one_hold_after_another_goes_on_keeping(pair: Pair) -> None:
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(b"one,")
    pair.kept(1)
    pair.nat.set(held(pair.ends, Flag.HOLD))
    pair.peer.sendall(b"two")
    pair.kept(2)
    pair.nat.remove(held(pair.ends))
    assert read(pair.server, 7) == b"one,two"
    assert tcp(pair.peer)[1] == 0


def late_ack(pair: Pair) -> None:
    """The peer has what the server sent, and its ACK waits at a."""
    netem(pair.lab.peer, "delay", "300ms")
    pair.server.sendall(pattern(0, 3000))
    pair.nat.add(held(pair.ends))
    assert read(pair.peer, 3000) == pattern(0, 3000)
    pair.kept(1)


def test_ack_reaches_the_copy(pair: Pair) -> None:
    late_ack(pair)
    copy = move(pair)
    until(lambda: tcp(copy)[0] == 0, "the ACK, at the copy", 5)
    assert tcp(copy)[1] == 0
    copy.close()


def test_ack_reaches_the_copy_by_two_holds(pair: Pair) -> None:
    """The exporter redirects before the importer is ready: the importer's hold keeps it then."""
    late_ack(pair)
    to = Endpoint(type(pair.ends.local.address)(pair.lab.b.address(pair.version)), COPY_PORT)
    there = FourTuple(to, pair.ends.remote)
    importer = pair.of.nat(pair.lab.b)
    importer.set(held(there))
    source, target = pair.mover.device(pair.lab.a), pair.mover.device(pair.lab.b)
    with frozen(source, pair.server) as (freeze, image):
        with pair.lab.b.inside():
            copy = socket.socket(pair.server.family, socket.SOCK_STREAM)
        made = pair.mover._restore(target, copy.fileno(), bytearray(image), to)
        source.commit(freeze)
    pair.nat.replace(redirect(pair.ends, to))
    assert pair.nat.one(pair.ends).kept == 0
    until(lambda: importer.one(there).kept >= 1, "the ACK, at the importer")
    importer.set(translate(to, pair.ends))
    target.decide("activate", made.id)
    until(lambda: tcp(copy)[0] == 0, "the ACK, at the copy", 5)
    assert tcp(copy)[1] == 0
    copy.close()


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
def test_data_reaches_the_copy(pair: Pair, offload: bool) -> None:
    """Large segments and small ones, checksums by hardware or not: all is right when it is led on."""
    for host in pair.lab.hosts.values():
        offloads(host, offload)
    capture = Capture(pair.lab.peer)
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(pattern(0, 12000))  # fits the first congestion window
    until(lambda: pair.nat.one(pair.ends).bytes == 0 and tcp(pair.peer)[0] > 0, "segments under way")
    pair.kept(1)
    time.sleep(0.1)
    copy = move(pair)
    assert read(copy, 12000) == pattern(0, 12000)
    assert tcp(pair.peer)[1] == 0
    copy.sendall(b"heard")
    assert read(pair.peer, 5) == b"heard"
    assert (capture.resets, capture.fins) == (0, 0)
    capture.close()
    copy.close()


def test_end_of_the_peer_is_kept_too(pair: Pair) -> None:
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(b"last")
    pair.peer.shutdown(socket.SHUT_WR)
    pair.kept(1)
    time.sleep(0.1)
    copy = move(pair)
    assert read(copy, 4) == b"last"
    assert copy.recv(1) == b""
    copy.close()


# ---- Forged packets, and bounds ----


class Forger:
    """Sends whatever it likes under the peer's name, by a raw socket of its host; IPv4 only."""

    def __init__(self, ends_: FourTuple) -> None:
        self.ends = ends_
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)

    def send(self, ack: int, seq: int = 1, flags: int = 0x10, data: bytes = b"") -> None:
        local, remote = self.ends.local, self.ends.remote
        words = remote.port, local.port, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 100, 0, 0
        head = struct.pack("!HHIIBBHHH", *words)
        pseudo = remote.address.packed + local.address.packed + struct.pack("!HH", 6, len(head + data))
        whole = pseudo + head + data + bytes(len(data) % 2)
        total = sum(struct.unpack(f"!{len(whole) // 2}H", whole))
        total = (total & 0xFFFF) + (total >> 16)
        check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        head = head[:16] + struct.pack("!H", check) + head[18:]
        self.sock.sendto(head + data, (str(local.address), 0))

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def forged() -> Iterator[tuple[Pair, Forger]]:
    with triangle(4) as of:
        pair = Pair(of)
        with of.lab.peer.inside():
            forger = Forger(pair.ends)
        pair.nat.add(held(pair.ends))
        try:
            yield pair, forger
        finally:
            forger.close()
            pair.close()


def arrived(pair: Pair, count: int) -> int:
    """How many are kept, once the hold has met ``count``."""
    until(lambda: pair.nat.one(pair.ends).held >= count, f"{count} packets")
    return pair.nat.one(pair.ends).kept


def test_of_acks_the_newest_stays(forged: tuple[Pair, Forger]) -> None:
    pair, forger = forged
    for number in range(500):
        forger.send(0xFFFFFF00 + number)  # across zero
    assert arrived(pair, 500) == 1


def test_repeated_acks_stay(forged: tuple[Pair, Forger]) -> None:
    """They say that something was lost."""
    pair, forger = forged
    for _turn in range(4):
        forger.send(1000)
    assert arrived(pair, 4) == 4


def test_an_older_ack_and_one_with_data_replace_nothing(forged: tuple[Pair, Forger]) -> None:
    pair, forger = forged
    forger.send(1000, seq=10)
    forger.send(2000, seq=9)
    forger.send(900, seq=10)
    forger.send(3000, seq=10, data=b"x")
    forger.send(4000, seq=11)
    forger.send(5000, seq=11, flags=0x14)
    assert arrived(pair, 6) == 6


def test_a_flood_takes_a_bounded_place(forged: tuple[Pair, Forger]) -> None:
    """Of 2000 forged packets some wait, then the connection goes on unhurt."""
    pair, forger = forged
    for number in range(2000):
        forger.send(number, seq=5000 - number, data=bytes(number % 1000))
    assert arrived(pair, 2000) == NEWEST
    pair.peer.sendall(b"true")
    arrived(pair, 2001)
    pair.nat.remove(held(pair.ends))
    assert read(pair.server, 4) == b"true"
    assert tcp(pair.peer)[1] == 0


def test_no_memory_for_it_is_a_lost_packet(forged: tuple[Pair, Forger]) -> None:
    pair, forger = forged
    before = LIMIT.read_text()
    LIMIT.write_text("0")
    try:
        forger.send(1)
        assert arrived(pair, 1) == 0
    finally:
        LIMIT.write_text(before)
    forger.send(1)
    assert arrived(pair, 2) == 1


def test_a_full_house_makes_place_by_its_own_oldest(forged: tuple[Pair, Forger]) -> None:
    pair, forger = forged
    before = LIMIT.read_text()
    LIMIT.write_text("1")
    try:
        for number in range(2000):
            forger.send(number, data=bytes(1400))
        kept = arrived(pair, 2000)
        assert 100 < kept <= NEWEST
        # What waits elsewhere is not displaced.
        other = FourTuple(pair.ends.local, Endpoint(pair.ends.remote.address, 999))
        pair.nat.add(held(other))
        forger.ends = other
        forger.send(1, data=bytes(1400))
        until(lambda: pair.nat.one(other).held == 1, "another's packet")
        assert pair.nat.one(other).kept + pair.nat.one(pair.ends).kept <= kept + 1
        assert pair.nat.one(pair.ends).kept == kept
    finally:
        LIMIT.write_text(before)


# ---- Ends ----


def test_device_goes_while_packets_wait(pair: Pair) -> None:
    """They are lost, like on a wire that is cut."""
    pair.nat.add(held(pair.ends))
    pair.peer.sendall(b"in")
    pair.kept(1)
    pair.lab.a.ip("link", "del", "dev", "eth0")
    pair.nat.remove(held(pair.ends))
    pair.server.settimeout(0.3)
    with pytest.raises(TimeoutError):
        pair.server.recv(2)


def test_namespace_goes_while_packets_wait() -> None:
    """kmemleak tells if anything is left; and the next lab has the whole memory again."""
    for _turn in range(3):
        with triangle(4) as of:
            pair = Pair(of)
            pair.nat.add(held(pair.ends))
            pair.peer.sendall(bytes(10_000))
            pair.kept(1)
            pair.close()
            pair.nat.close()
            of.nats.clear()  # nobody flushes
