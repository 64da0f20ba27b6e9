# SPDX-License-Identifier: MIT
"""Three hosts on one segment for the engine's tests: ``peer``, ``a`` and ``b``.

``a`` and ``b`` have the same service addresses; a fixed neighbour entry of ``peer`` says which of
them it talks to. A hold is a pair of sets of local ports per host; everything that ``peer`` sees is recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sockmi.engine.base import Captured, Engine, Kind, Placement, Restored, SocketFacts
from sockmi.engine.kernel import KernelEngine
from sockmi.engine.repair import INJECT_MARK, RepairEngine
from sockmi.refusal import Refusal

PEER4, HOST4 = "10.77.0.1", "10.77.0.9"
PEER6, HOST6 = "fd77::1", "fd77::9"
MAC = {"peer": "02:00:00:00:77:01", "a": "02:00:00:00:77:0a", "b": "02:00:00:00:77:0b"}
TCP = socket.IPPROTO_TCP
REPAIR, REPAIR_QUEUE, QUEUE_SEQ, REPAIR_OPTIONS, REPAIR_WINDOW = 19, 20, 21, 22, 29
STATES = {
    1: "ESTABLISHED", 2: "SYN-SENT", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 7: "CLOSED",
    8: "CLOSE-WAIT", 9: "LAST-ACK", 10: "LISTEN", 11: "CLOSING",
}  # fmt: skip

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)

_RULES = f"""
table inet hold {{
  set in {{ type inet_service; }}
  set out {{ type inet_service; }}
  set deaf {{ type inet_service; }}
  chain pre {{ type filter hook prerouting priority -310;
    meta mark {INJECT_MARK} accept
    tcp dport @in counter drop
    tcp sport @deaf counter drop
  }}
  chain out {{ type filter hook output priority -310;
    meta mark {INJECT_MARK} accept
    tcp sport @out counter drop
  }}
}}
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Poll until ``condition`` holds; fail after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.002)


def state(sock: socket.socket) -> str:
    """RFC 9293 name of the socket's state."""
    return STATES[sock.getsockopt(TCP, socket.TCP_INFO, 1)[0]]


@dataclass(frozen=True)
class Segment:
    """One TCP segment that peer has sent or seen."""

    from_peer: bool
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    length: int
    tsval: int | None
    tsecr: int | None


def _segment(frame: bytes, outgoing: bool) -> Segment | None:
    kind = struct.unpack_from("!H", frame, 12)[0]
    if kind == 0x0800 and frame[23] == TCP:
        start, total = 14 + (frame[14] & 15) * 4, struct.unpack_from("!H", frame, 16)[0] + 14
    elif kind == 0x86DD and frame[20] == TCP:
        start, total = 54, struct.unpack_from("!H", frame, 18)[0] + 54
    else:
        return None
    sport, dport, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", frame, start)
    header = (offset >> 4) * 4
    options, tsval, tsecr = frame[start + 20 : start + header], None, None
    while options and options[0]:
        if options[0] == 1:
            options = options[1:]
            continue
        if options[0] == 8:
            tsval, tsecr = struct.unpack_from("!II", options, 2)
        options = options[options[1] :]
    return Segment(outgoing, sport, dport, seq, ack, flags, window, total - start - header, tsval, tsecr)


class Pair:
    """Two hosts' engines as one: what is exported by the first is imported by the second."""

    def __init__(self, exporter: Engine, importer: Engine) -> None:
        self.exporter, self.importer = exporter, importer
        self.name = f"{exporter.name}-to-{importer.name}"
        self.owners = exporter.owners

    def inspect(self, fds: Sequence[int]) -> list[SocketFacts]:
        return self.exporter.inspect(fds)

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        return self.exporter.stop(inodes, pids, timeout_s)

    def resume(self, inodes: Sequence[int]) -> None:
        self.exporter.resume(inodes)

    def capture(self, fds: Sequence[int], thaw_after_s: float = 1.0) -> list[Captured | Refusal]:
        return self.exporter.capture(fds, thaw_after_s)

    def compare(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        return self.exporter.compare(fds, images)

    def release(
        self, fds: Sequence[int], images: Sequence[bytes], *, owned: bool = False, together: bool = False
    ) -> list[Refusal | None]:
        return self.exporter.release(fds, images, owned=owned, together=together)

    def deaden(self, fd: int) -> Refusal | None:
        return self.exporter.deaden(fd)

    def lives(self, fd: int, kind: Kind) -> bool:
        return self.importer.lives(fd, kind)

    def restore(self, images: Sequence[bytes], placements: Sequence[Placement]) -> list[Restored | Refusal]:
        return self.importer.restore(images, placements)

    def renew(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        return self.importer.renew(fds, images)

    def discard(self, fds: Sequence[int]) -> None:
        self.importer.discard(fds)

    def activate(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        return self.importer.activate(fds, images)


def make_pair(exporter: str, importer: str | None = None) -> Pair:
    """The engines of two hosts, ``repair`` or ``kernel``; one for both if the other is not named."""
    makers: dict[str, Callable[[], Engine]] = {"repair": RepairEngine, "kernel": KernelEngine}
    first = makers[exporter]()
    return Pair(first, first if importer is None else makers[importer]())


class Lab:
    """See the module docstring. Made and removed by :func:`lab`."""

    def __init__(self) -> None:
        self._prefix = f"smt-{os.getpid()}-eng{next(_numbers)}"
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._namespaces: dict[str, int] = {}
        self._recorder: socket.socket | None = None
        self._port = 20000

    def name(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def start(self) -> None:
        run = ["ip", "-batch", "-"]
        hosts = [*MAC, "wire"]
        lines = [f"netns add {self.name(host)}" for host in hosts]
        subprocess.run(run, input="\n".join(lines), text=True, check=True, timeout=20)
        for host in hosts:
            self._namespaces[host] = os.open(f"/run/netns/{self.name(host)}", os.O_RDONLY)
        lines = ["link add wire0 type bridge", "link set wire0 up"]
        for host in MAC:
            lines.append(f"link add to-{host} type veth peer name eth0 netns {self.name(host)}")
            lines.append(f"link set to-{host} master wire0 up")
        subprocess.run(
            ["ip", "-n", self.name("wire"), *run[1:]],
            input="\n".join(lines),
            text=True,
            check=True,
            timeout=20,
        )
        for host, mac in MAC.items():
            four, six = (PEER4, PEER6) if host == "peer" else (HOST4, HOST6)
            lines = [f"link set eth0 address {mac}", "link set lo up", "link set eth0 up"]
            lines += [f"addr add {four}/24 dev eth0", f"addr add {six}/64 dev eth0 nodad"]
            if host != "peer":
                lines += [
                    f"neigh replace {peer} lladdr {MAC['peer']} dev eth0 nud permanent"
                    for peer in (PEER4, PEER6)
                ]
            command = ["ip", "-n", self.name(host), *run[1:]]
            subprocess.run(command, input="\n".join(lines), text=True, check=True, timeout=20)
            with self.host(host):
                for path in Path("/proc/sys/net/ipv6/conf").glob("*/accept_dad"):
                    path.write_text("0")
                subprocess.run(["nft", "-f", "-"], input=_RULES, text=True, check=True, timeout=20)
        self.switch("a")
        with self.host("peer"):
            self._recorder = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._recorder.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
            self._recorder.setblocking(False)

    def stop(self) -> None:
        if self._recorder:
            self._recorder.close()
        for fd in self._namespaces.values():
            os.close(fd)
        os.close(self._home)
        for host in [*MAC, "wire"]:
            subprocess.run(
                ["ip", "netns", "del", self.name(host)], check=False, capture_output=True, timeout=20
            )

    @contextlib.contextmanager
    def host(self, host: str) -> Iterator[None]:
        """Sockets made inside belong to this host."""
        assert _libc.setns(self._namespaces[host], 0) == 0
        try:
            yield
        finally:
            assert _libc.setns(self._home, 0) == 0

    def switch(self, host: str) -> None:
        """From now on peer talks to ``host``."""
        lines = [f"neigh replace {a} lladdr {MAC[host]} dev eth0 nud permanent" for a in (HOST4, HOST6)]
        command = ["ip", "-n", self.name("peer"), "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, timeout=20)

    def _elements(self, verb: str, host: str, port: int, which: str) -> None:
        sets = ["in", "out"] if which == "both" else [which]
        lines = "\n".join(f"{verb} element inet hold {name} {{ {port} }}" for name in sets)
        with self.host(host):
            subprocess.run(["nft", "-f", "-"], input=lines, text=True, check=True, timeout=20)

    def hold(self, host: str, port: int, which: str = "both") -> None:
        """Nothing of the local ``port`` in or out (``both``), or one of these.

        ``deaf``: nothing from the remote ``port`` arrives. (What ``out`` drops, TCP takes for unsent.)
        """
        self._elements("add", host, port, which)

    def unhold(self, host: str, port: int, which: str = "both") -> None:
        self._elements("delete", host, port, which)

    def port(self) -> int:
        """A port that no other test uses."""
        self._port += 1
        return self._port

    def recorded(self, port: int) -> list[Segment]:
        """What has passed peer since the last call, of connections of ``port``."""
        assert self._recorder
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._recorder.recvfrom(65600)
                segment = _segment(frame, where[2] == socket.PACKET_OUTGOING)
                if segment and port in (segment.sport, segment.dport):
                    found.append(segment)
        return found

    def listener(self, kind: str, port: int, host: str = "a") -> socket.socket:
        """``kind``: ``v4``, ``v6`` or ``mapped`` (IPv4 packets, IPv6 socket)."""
        family = socket.AF_INET if kind == "v4" else socket.AF_INET6
        with self.host(host):
            sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == "mapped":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(({"v4": HOST4, "v6": HOST6, "mapped": "::"}[kind], port))
        sock.listen(1024)
        return sock

    def client(self, kind: str) -> tuple[socket.socket, str]:
        """An unconnected socket of peer, and the address to connect it to."""
        with self.host("peer"):
            sock = socket.socket(socket.AF_INET6 if kind == "v6" else socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(10)
        return sock, HOST6 if kind == "v6" else HOST4

    def pair(self, kind: str, port: int) -> tuple[socket.socket, socket.socket]:
        """A connection: a's end and peer's end."""
        listener = self.listener(kind, port)
        peer, address = self.client(kind)
        peer.connect((address, port))
        ours, _unused = listener.accept()
        listener.close()
        ours.settimeout(10)
        return ours, peer


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """A lab that is gone afterwards."""
    it = Lab()
    try:
        it.start()
        yield it
    finally:
        it.stop()
