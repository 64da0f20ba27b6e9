# SPDX-License-Identifier: MIT
"""The parts, inside the guest: ``python -m bench.kernel.inside PART QUICK``; the last line is JSON."""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Captured, Placement, Restored
from sockmi.engine.repair import RepairEngine
from tests.kmod.inside.test_nat_scale import MANY, change
from tests.kmod.inside.test_nat_scale import packed as many_flows
from tests.kmod.module_mover import Mover, netem
from tests.kmod.nat_client import Action, Flag, held, redirect, translate
from tests.kmod.nat_lab import Triangle, offloads, triangle
from tests.lab.redirect_lab import Host, connect, ends, pattern, run

RATE_MBIT = 16
ONE_WAY = "25ms"
WINDOW = (
    110_000  # bytes under way: a little more than the path has room for, lest queues make another RTT of it
)
AWAY = 43000  # the copy's port
LOST_S = 0.06  # when the lost segment has met its end, and no probe is on its way yet
WARM_S = 4.0  # until the congestion window is what it will be
BEFORE_S = 2.0
SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_RCVBUFFORCE = 26, 27, 33
BPF_RETURN = 6  # BPF_RET | BPF_K
RTT_US, TOTAL_RETRANSMITS = 68, 100  # of struct tcp_info


# ---- Engines ----


def engines(quick: bool) -> dict[str, dict[str, list[list[int]]]]:
    """Nanoseconds of each phase, by what is queued and by engine; the first moves warm the caches."""
    moves = 50 if quick else 300
    told: dict[str, dict[str, list[list[int]]]] = {}
    for queued in (0, 1024):
        out = subprocess.run(
            ["/run/engines", str(moves + 10), str(queued)],
            check=True,
            capture_output=True,
            text=True,
            timeout=900,
        ).stdout
        each: dict[str, list[list[int]]] = {}
        for line in out.splitlines():
            name, *phases = line.split()
            each.setdefault(name, []).append([int(value) for value in phases])
        told[f"{queued} bytes" if queued else "nothing"] = {name: rows[10:] for name, rows in each.items()}
    return told


# ---- A stream that is moved ----


@dataclass
class Stream:
    """``server``, on a or b, sends as fast as it may; ``peer`` notes when what has arrived."""

    of: Triangle
    server: socket.socket
    peer: socket.socket
    tuple: FourTuple  # the server's view, as the peer knows it
    here: Endpoint
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    received: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _feeder: threading.Thread | None = None

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.peer.recv(1 << 18):
                self.received += len(data)
                self.arrivals.append((time.monotonic(), len(data)))

    def feed(self) -> None:
        self._stop = threading.Event()
        self._feeder = threading.Thread(target=self._feed, args=(self.server, self._stop), daemon=True)
        self._feeder.start()

    @staticmethod
    def _feed(sock: socket.socket, stop: threading.Event) -> None:
        block = pattern(0, 16384)
        sock.settimeout(0.05)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                sock.send(block)

    def pause(self) -> None:
        if self._feeder:
            self._stop.set()
            self._feeder.join()
            self._feeder = None

    def between(self, start: float, end: float) -> int:
        """Bytes that arrived in that time."""
        return sum(size for at, size in self.arrivals if start <= at < end)

    def close(self) -> None:
        self.pause()
        self.peer.close()
        self.server.close()


@contextlib.contextmanager
def stream(of: Triangle) -> Iterator[Stream]:
    """From a to the peer."""
    client, accepted = connect(of.lab.peer, of.lab.a, 4)
    for sock in (client, accepted):
        sock.setblocking(True)
    made = Stream(of, accepted, client, ends(accepted), ends(accepted).local)
    try:
        yield made
    finally:
        made.close()


def by_kernel(of: Triangle, mover: Mover) -> Callable[[Stream], None]:
    """A move from a to b by the module, with all that can be ready before the freeze."""
    source, target = mover.device(of.lab.a), mover.device(of.lab.b)
    exporter, importer = of.nat(of.lab.a), of.nat(of.lab.b)

    def move(one: Stream) -> None:
        to = Endpoint(IPv4Address(of.lab.b.address(4)), AWAY)
        with of.lab.b.inside():
            copy = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        claim = source.claim(one.server)
        exporter.set(held(one.tuple))
        frozen = source.freeze(claim)
        image = bytearray(source.image(frozen))
        source.commit(frozen)
        made = mover._restore(target, copy.fileno(), image, to)
        importer.set(translate(to, one.tuple))
        exporter.replace(redirect(one.tuple, to))
        target.decide("activate", made.id)
        source.release(claim)
        one.server.close()
        one.server, one.here = copy, to

    return move


def by_repair(of: Triangle, _mover: Mover) -> Callable[[Stream], None]:
    """The same by TCP_REPAIR, with the engine that the daemon has."""
    engine = RepairEngine(rare_options=False)
    exporter, importer = of.nat(of.lab.a), of.nat(of.lab.b)

    def move(one: Stream) -> None:
        to = Endpoint(IPv4Address(of.lab.b.address(4)), AWAY)
        fd = one.server.fileno()
        exporter.set(held(one.tuple))
        (captured,) = engine.capture([fd])
        assert isinstance(captured, Captured), captured
        refused = engine.release([fd], [captured.image])
        assert refused == [None], refused
        with of.lab.b.inside():
            (restored,) = engine.restore([captured.image], [Placement(to, transparent=False)])
        assert isinstance(restored, Restored), restored
        importer.set(translate(to, one.tuple))
        exporter.replace(redirect(one.tuple, to))
        assert engine.activate([restored.fd], [captured.image]) == [None]
        one.server.close()
        one.server, one.here = socket.socket(fileno=restored.fd), to
        one.server.setblocking(True)

    return move


WAYS = {"kernel": by_kernel, "repair": by_repair}


@contextlib.contextmanager
def wired(*more: str) -> Iterator[tuple[Triangle, Mover]]:
    """The triangle; the peer is 50 ms of round trip away from the others, which are neighbours."""
    with triangle(4) as of:
        for host in (of.lab.peer, of.lab.a, of.lab.b):
            offloads(host, True)
        # Whoever is 50 ms away is behind a router, whose link address every host knows.
        for host in (of.lab.a, of.lab.b):
            run("ip", "netns", "exec", host.namespace, "ping", "-q", "-c", "1", of.lab.peer.address(4))
        netem(of.lab.peer, "delay", ONE_WAY, "limit", "2000")
        netem(of.lab.switch, "delay", ONE_WAY, "limit", "2000", *more, device="ppeer")
        mover = Mover(of)
        try:
            yield of, mover
        finally:
            mover.close()


def tcp_info(sock: socket.socket, at: int) -> int:
    """A word of TCP_INFO."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[at : at + 4], sys.byteorder)


@contextlib.contextmanager
def deaf(sock: socket.socket) -> Iterator[None]:
    """What comes in is lost, by a socket filter that lets nothing pass."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", BPF_RETURN, 0, 0, 0))
    fprog = struct.pack("@HP", 1, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def goodput(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Share of the goodput before, in the first second of the copy's life; ms of moves and RTTs."""
    told: dict[str, dict[str, list[float]]] = {name: {"shares": [], "moves": [], "rtts": []} for name in WAYS}
    for _turn in range(2 if quick else 7):
        for name, way in WAYS.items():
            with wired("rate", f"{RATE_MBIT}mbit") as (of, mover), stream(of) as one:
                move = way(of, mover)
                one.peer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 * WINDOW)
                one.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, WINDOW)
                one.feed()
                time.sleep(WARM_S)
                one.pause()
                start = time.monotonic()
                one.feed()
                time.sleep(BEFORE_S)
                before = one.between(start, time.monotonic()) / (time.monotonic() - start)
                one.pause()
                told[name]["rtts"].append(tcp_info(one.server, RTT_US) / 1000)
                begun = time.monotonic()
                move(one)
                alive = time.monotonic()
                told[name]["moves"].append(1000 * (alive - begun))
                one.feed()
                time.sleep(1.3)
                told[name]["shares"].append(one.between(alive, alive + 1) / before)
    return told


# ---- A lost tail ----


def tail(quick: bool) -> dict[str, list[float]]:
    """Seconds from sending a segment that is lost until the peer has it."""
    told: dict[str, list[float]] = {"unmoved": [], **{name: [] for name in WAYS}}
    for _turn in range(3 if quick else 12):
        for name, times in told.items():
            with wired() as (of, mover), stream(of) as one:
                for _turn in range(10):  # the RTT is known then
                    one.server.sendall(pattern(0, 1000))
                    time.sleep(0.12)
                move = WAYS[name](of, mover) if name in WAYS else None
                # It is lost at the peer, not on the way: the sender must not know.
                with deaf(one.peer):
                    before, start = one.received, time.monotonic()
                    one.server.sendall(b"tail" * 25)
                    if move:
                        move(one)
                    time.sleep(max(0.0, start + LOST_S - time.monotonic()))
                while one.received < before + 100:
                    if time.monotonic() > start + 20:
                        raise TimeoutError(f"{name}: the tail has not arrived after 20 s")
                    time.sleep(0.0005)
                times.append(one.arrivals[-1][0] - start)
                if not tcp_info(one.server, TOTAL_RETRANSMITS):
                    raise RuntimeError(f"{name}: the tail was not lost")
    return told


# ---- Packets through the NAT helper ----


def map_rules(count: int, one: Stream, to: Endpoint) -> str:
    """What the helper does at the exporter, as a stateless map of nftables with ``count`` entries."""
    peer = one.tuple.remote
    base = int(IPv4Address("10.64.0.1"))
    others = [f"{IPv4Address(base + i // 1000)} . {1024 + i % 1000}" for i in range(count - 1)]
    addresses = ", ".join(f"{key} : {to.address}" for key in (f"{peer.address} . {peer.port}", *others))
    ports = ", ".join(f"{key} : {to.port}" for key in (f"{peer.address} . {peer.port}", *others))
    local = one.tuple.local
    return f"""
table ip bench {{
    map addresses {{ type ipv4_addr . inet_service : ipv4_addr; elements = {{ {addresses} }} }}
    map ports {{ type ipv4_addr . inet_service : inet_service; elements = {{ {ports} }} }}
    chain in {{
        type filter hook prerouting priority -301;
        ip daddr {local.address} tcp dport {local.port} notrack \\
            tcp dport set ip saddr . tcp sport map @ports ip daddr set ip saddr . tcp sport map @addresses
    }}
}}
"""


def load(host: Host, rules: str) -> None:
    """A hundred thousand elements take nft a while."""
    words = ["ip", "netns", "exec", host.namespace, "nft", "-f", "-"]
    subprocess.run(words, input=rules, text=True, check=True, timeout=600)


def packets(host: Host) -> int:
    """That have come in so far."""
    told = json.loads(host.ip("-s", "-j", "link", "show", "dev", "eth0"))
    return int(told[0]["stats64"]["rx"]["packets"])


def nat(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Packets per second from the peer through the exporter to the copy; small segments, in turns."""
    seconds, rounds = (0.7, 3) if quick else (1.5, 7)
    told: dict[str, dict[str, list[float]]] = {"NAT helper": {}, "nftables map": {}}
    with triangle(4) as of:
        lab = of.lab
        for host in lab.hosts.values():
            offloads(host, False)
        mover = Mover(of)
        with stream(of) as one:
            by_kernel(of, mover)(one)
            source, sink = one.peer, one.server
            stop = threading.Event()

            def write() -> None:
                block = pattern(0, 60000)
                with contextlib.suppress(OSError):
                    while not stop.is_set():
                        source.sendall(block)

            def read() -> None:
                with contextlib.suppress(OSError):
                    while not stop.is_set() and sink.recv(1 << 18):
                        pass

            threads = [threading.Thread(target=each, daemon=True) for each in (write, read)]
            for thread in threads:
                thread.start()
            helper = of.nat(lab.a)
            batches = many_flows(4, Flag.REDIRECT | Flag.MUTE)

            def measure(way: str, count: int) -> None:
                time.sleep(0.4)
                before, start = packets(lab.a), time.monotonic()
                time.sleep(seconds)
                after, end = packets(lab.a), time.monotonic()
                told[way].setdefault(str(count), []).append((after - before) / (end - start))

            for _turn in range(rounds):
                measure("NAT helper", 1)
                change(helper, Action.ADD, batches)
                measure("NAT helper", MANY)
                change(helper, Action.REMOVE, batches)
            for count in (1, MANY):
                load(lab.a, map_rules(count, one, one.here))
                helper.remove(held(one.tuple))
                for _turn in range(rounds):
                    measure("nftables map", count)
                helper.add(redirect(one.tuple, one.here))
                lab.a.nft("delete", "table", "ip", "bench")
            stop.set()
        mover.close()
    return told


PARTS: dict[str, Callable[[bool], Any]] = {"engines": engines, "goodput": goodput, "tail": tail, "nat": nat}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](sys.argv[2] == "1")))
