# SPDX-License-Identifier: MIT
"""What the matrix tests share: connections in any state, owners, moves through real daemons, proper ends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from lab.capture import Capture, Trouble
from lab.daemons import Daemons
from lab.host import Host
from lab.labs import Lab
from sockmi.client import Export, Imported, ImportRequest, MigrationRecord, export_sockets, import_socket
from sockmi.engine.duplicate import duplicate
from tests.lab.scenario import ask, until
from tests.laws import LawBroken, clean

TCP = socket.IPPROTO_TCP
KINDS = ("v4", "v6", "mapped")
NAMES = {
    1: "ESTABLISHED", 2: "SYN-SENT", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 7: "CLOSED",
    8: "CLOSE-WAIT", 9: "LAST-ACK", 10: "LISTEN", 11: "CLOSING",
}  # fmt: skip
CONNECTED = (
    "SYN-SENT", "ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "CLOSING", "LAST-ACK",
)  # fmt: skip
WE_CLOSED = frozenset({"FIN-WAIT-1", "FIN-WAIT-2", "CLOSING", "LAST-ACK"})
PEER_CLOSED = frozenset({"CLOSE-WAIT", "CLOSING", "LAST-ACK"})
#: What the copy may be in already when the hold is lifted: the packets that were held have been heard.
NEXT = {
    "SYN-SENT": {"ESTABLISHED"},
    "FIN-WAIT-1": {"FIN-WAIT-2"},
    "CLOSING": {"LAST-ACK", "CLOSED"},
    "LAST-ACK": {"CLOSED"},
}
PATIENCE_S = 20.0
EVERYWHERE = "0.0.0.0"  # noqa: S104

_ports = itertools.count(20000)  # never the same again: redirects linger for as long as TIME-WAIT lasts

_DEAF = """
table inet deaf {
  set ports { type inet_service; }
  chain in {
    type filter hook prerouting priority -400
    tcp sport @ports drop
  }
}
"""
_STALL = """
table inet stall {
  set hit { type ipv4_addr; flags dynamic; }
  chain in {
    type filter hook prerouting priority -400
    tcp dport 7781 meta length > %d add @hit { ip saddr } counter drop
    tcp dport 7781 meta length > 900 ip saddr @hit drop
  }
}
"""


def state(sock: socket.socket) -> str:
    """RFC 9293 name of a socket's state."""
    return NAMES[sock.getsockopt(TCP, socket.TCP_INFO, 1)[0]]


def unread(sock: socket.socket) -> int:
    """Bytes in the receive queue."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def receive(sock: socket.socket, count: int) -> bytes:
    """``count`` bytes, fewer at the end of the stream."""
    data = bytearray()
    while len(data) < count and (part := sock.recv(min(count - len(data), 1 << 20))):
        data += part
    return bytes(data)


def same(one: bytes, other: bytes, what: str) -> None:
    """They are equal; else where they begin to differ, without printing megabytes."""
    if hashlib.sha256(one).digest() != hashlib.sha256(other).digest():
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
        raise LawBroken(f"{what}: {len(one)} bytes came, {len(other)} were sent, they differ at {at}")


def nft(host: Host, text: str) -> None:
    """Change a host's firewall."""
    host.run(["nft", "-f", "-"], input=text)


def moved(records: Sequence[dict[str, Any] | MigrationRecord]) -> None:
    """All have moved; else why not."""
    bad = [verdict(record) for record in records if verdict(record)[0] != "moved"]
    assert not bad, f"{len(bad)} of {len(records)} did not move: {bad[:5]}"


def verdict(record: dict[str, Any] | MigrationRecord) -> tuple[str | None, str, str]:
    """Outcome, code and sentence of a record in either form."""
    if isinstance(record, MigrationRecord):
        return record.outcome, record.code, record.message
    why = record.get("refusal") or {}
    return record.get("outcome"), why.get("code", ""), why.get("message", "")


class Keeper:
    """A process of its own that holds descriptors: a fork of ours with nothing else open.

    It calls ``work`` (default: it sleeps), and gives its pickled result to `result`.
    """

    def __init__(self, keep: Sequence[int], work: Callable[[], Any] | None = None) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _be_keeper({*keep, writing}, writing, work)
        os.close(writing)
        self._reading = reading
        self._ended = False

    def result(self, timeout_s: float = PATIENCE_S) -> Any:
        """What ``work`` returned; AssertionError if it takes too long or failed."""
        data = b""
        deadline = time.monotonic() + timeout_s
        os.set_blocking(self._reading, False)
        while True:
            with contextlib.suppress(BlockingIOError):
                part = os.read(self._reading, 1 << 16)
                if not part:
                    break
                data += part
                continue
            assert time.monotonic() < deadline, "the owner does not end"
            time.sleep(0.005)
        assert data, "the owner died"
        good, value = pickle.loads(data)  # noqa: S301
        assert good, value
        return value

    def kill(self) -> None:
        """End it, if it has not ended."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._reading)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.kill()


def _be_keeper(keep: set[int], writing: int, work: Callable[[], Any] | None) -> None:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            if int(name) > 2 and int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        if work is None:
            while True:
                signal.pause()
        try:
            answer = (True, work())
        except BaseException as error:
            answer = (False, repr(error))
        content = memoryview(pickle.dumps(answer))
        while content:
            content = content[os.write(writing, content) :]
    finally:
        os._exit(0)


@dataclass(slots=True)
class Case:
    """A connection of host a in some state, and what has still to arrive at each end."""

    name: str
    kind: str
    state: str
    ours: socket.socket
    port: int
    peer: socket.socket | None = None
    to_us: bytes = b""
    to_peer: bytes = b""
    listener: socket.socket | None = None  # at the peer, for SYN-SENT
    remote: tuple[str, int] = ("", 0)
    deaf: bool = False

    @property
    def fd(self) -> int:
        """Descriptor of our end."""
        return self.ours.fileno()

    def close(self) -> None:
        """Whatever is still open."""
        for sock in (self.ours, self.peer, self.listener):
            if sock is not None:
                sock.close()


@dataclass(slots=True)
class Bench:
    """A lab with daemons on a and b; makes cases, moves them and ends them."""

    lab: Lab
    mode: str
    daemons: Daemons
    cases: list[Case] = field(default_factory=list)
    service: dict[int, str] = field(default_factory=dict)
    """By IP version: an address of host a that is to move with its connections (takeover)."""

    def host(self, name: str) -> Host:
        """A host of the lab."""
        return self.lab.host(name)

    def port(self) -> int:
        """A port that no other test uses."""
        return next(_ports)

    def address(self, kind: str, name: str = "a") -> str:
        """The host's address as a socket of that kind writes it; of a the one that moves, if there is one."""
        version = 6 if kind == "v6" else 4
        plain = self.service.get(version) if name == "a" else None
        plain = plain or str(self.host(name).address(version))
        return f"::ffff:{plain}" if kind == "mapped" else plain

    def sock(self, name: str, kind: str) -> socket.socket:
        """A new socket on a host."""
        sock = self.host(name).socket(socket.AF_INET if kind == "v4" else socket.AF_INET6)
        if kind == "mapped":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.settimeout(PATIENCE_S)
        return sock

    def listener(
        self, name: str, kind: str, port: int, address: str | None = None, backlog: int = 64
    ) -> socket.socket:
        """A listening socket."""
        sock = self.sock(name, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.address(kind, name) if address is None else address, port))
        sock.listen(backlog)
        return sock

    def pair(self, kind: str, port: int | None = None, host: str = "a") -> Case:
        """An established connection."""
        port = port or self.port()
        with self.listener(host, kind, port) as listener:
            peer = self.sock("peer", "v6" if kind == "v6" else "v4")
            peer.connect((self.address("v6" if kind == "v6" else "v4", host), port))
            ours, _unused = listener.accept()
        ours.settimeout(PATIENCE_S)
        case = Case("ESTABLISHED", kind, "ESTABLISHED", ours, port, peer, remote=peer.getsockname()[:2])
        self.cases.append(case)
        return case

    def deafen(self, ports: Sequence[int], deaf: bool = True) -> None:
        """The peer hears nothing from these ports of ours."""
        if ports:
            elements = ", ".join(map(str, ports))
            verb = "add" if deaf else "delete"
            nft(self.host("peer"), f"{verb} element inet deaf ports {{ {elements} }}\n")

    def make(self, kind: str, wanted: str, queued: bool, receive_buffer_bytes: int = 0) -> Case:
        """A connection in a state, with bytes in all queues if ``queued``; the peer may be deaf then.

        ``receive_buffer_bytes``: SO_RCVBUF before the SYN of one in SYN-SENT.
        """
        case = self._syn_sent(kind, receive_buffer_bytes) if wanted == "SYN-SENT" else self.pair(kind)
        case.name, case.state = f"{wanted}{'+queued' if queued else ''}", wanted
        if wanted == "SYN-SENT":
            return case
        peer, ours = case.peer, case.ours
        assert peer is not None
        randomness = random.Random(f"{kind}{wanted}{queued}")  # noqa: S311
        if queued:
            case.to_us = randomness.randbytes(70_001)
            peer.sendall(case.to_us)
            until(lambda: unread(ours) == len(case.to_us))
        if wanted in ("CLOSE-WAIT", "LAST-ACK"):
            peer.shutdown(socket.SHUT_WR)
            until(lambda: state(ours) == "CLOSE-WAIT")
        if (queued or wanted in ("FIN-WAIT-1", "CLOSING", "LAST-ACK")) and wanted != "FIN-WAIT-2":
            self.deafen([case.port])
            case.deaf = True
        if queued:
            case.to_peer = randomness.randbytes(60_007)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 131072)  # some hosts begin with less
            ours.setblocking(False)
            assert ours.send(case.to_peer) == len(case.to_peer)
            ours.settimeout(PATIENCE_S)
        if wanted in WE_CLOSED:
            ours.shutdown(socket.SHUT_WR)
        if wanted == "FIN-WAIT-2":
            same(receive(peer, len(case.to_peer)), case.to_peer, "before the move")
            case.to_peer = b""
        if wanted == "CLOSING":
            peer.shutdown(socket.SHUT_WR)
        until(lambda: state(ours) == wanted)
        return case

    def _syn_sent(self, kind: str, receive_buffer_bytes: int) -> Case:
        port, kind_there = self.port(), "v6" if kind == "v6" else "v4"
        there = self.port()
        ours = self.sock("a", kind)
        if receive_buffer_bytes:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        ours.bind((self.address(kind), port))
        ours.setblocking(False)
        case = Case("SYN-SENT", kind, "SYN-SENT", ours, port, deaf=True)
        self.cases.append(case)
        case.listener = self.listener("peer", kind_there, there)
        case.remote = (self.address(kind_there, "peer"), there)
        self.deafen([port])
        ours.connect_ex((self.address(kind, "peer"), there))
        assert state(ours) == "SYN-SENT"
        return case

    # -- moves

    def request(
        self, case: Case, replace: socket.socket | int | None = None, address: str = "", **more: Any
    ) -> ImportRequest:
        """The import request that only this connection satisfies."""
        address = address or self.address("v6" if case.kind == "v6" else "v4")
        return ImportRequest(
            ["connected"], [], address, case.port, str(ip_address(case.remote[0])), case.remote[1],
            replace=replace, **more,
        )  # fmt: skip

    def take(
        self, requests: Sequence[ImportRequest], host: str = "b", timeout_s: float = 10.0
    ) -> list[Imported]:
        """Import all of these, over as many calls as it needs; in the order of ``requests``."""
        left = dict(enumerate(requests))
        found: dict[int, Imported] = {}
        deadline = time.monotonic() + timeout_s
        while left:
            indices = list(left)
            arrived = import_socket(
                [left[index] for index in indices],
                max(0.0, deadline - time.monotonic()),
                control=self.host(host).control_socket,
            )
            assert arrived, f"{len(left)} sockets did not come: {list(left.values())[:3]}"
            for one in arrived:
                found[indices[one.request]] = one
                del left[indices[one.request]]
        return [found[index] for index in range(len(requests))]

    def export_passively(
        self, pairs: Sequence[tuple[int, int]], to: str = "b", source: str = "a", **more: Any
    ) -> list[dict[str, Any]]:
        """Move (pid, fd)s away from their owners; the records."""
        sockets = [{"pid": pid, "fd": fd} for pid, fd in pairs]
        answers = ask(self.host(source), "export", sockets=sockets, to=to, **more)
        return [record for answer in answers for record in answer["migrations"]]

    def export_actively(
        self,
        sockets: Sequence[socket.socket],
        to: str = "b",
        source: str = "a",
        context: bytes = b"",
        **more: Any,
    ) -> list[MigrationRecord]:
        """Move sockets of this process."""
        exports = [Export(sock, context=context) for sock in sockets]
        return export_sockets(exports, to, control=self.host(source).control_socket, **more)

    def target(self, host: str = "b") -> int:
        """A descriptor to be replaced: an unconnected socket."""
        return self.host(host).socket().detach()

    def undeafen(self, cases: Sequence[Case]) -> None:
        """The peer hears again."""
        self.deafen([case.port for case in cases if case.deaf], deaf=False)
        for case in cases:
            case.deaf = False

    def finish(self, case: Case, copy: socket.socket) -> None:
        """All that was queued arrives, both directions go on as far as they may, and it ends properly."""
        copy.settimeout(PATIENCE_S)
        if case.listener is not None:
            case.peer, _unused = case.listener.accept()
            case.peer.settimeout(PATIENCE_S)
            until(lambda: state(copy) == "ESTABLISHED")
            assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        peer = case.peer
        assert peer is not None
        same(receive(copy, len(case.to_us)), case.to_us, "receive queue")
        same(receive(peer, len(case.to_peer)), case.to_peer, "send queue")
        if case.state not in WE_CLOSED:
            exchange(copy, peer, 200_000)
            copy.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b"", "the peer heard no FIN"
        if case.state not in PEER_CLOSED:
            exchange(peer, copy, 200_000)
            peer.shutdown(socket.SHUT_WR)
        assert copy.recv(1) == b"", "the copy heard no FIN"
        until(lambda: state(copy) == "CLOSED")
        until(lambda: state(peer) == "CLOSED")

    def warm(self) -> None:
        """Open the stream between the daemons: from then on only images are stalled."""
        case = self.pair("v4")
        moved(self.export_actively([case.ours]))
        self.clear()

    def clear(self, hosts: str = "ab") -> None:
        """Close what a test has left open or listed, and let nobody be deaf."""
        for host in hosts:
            while left := import_socket(ImportRequest(), 0, control=self.host(host).control_socket):
                for one in left:
                    copy_of(one).close()
        for case in self.cases:
            case.close()
        self.cases.clear()
        nft(self.host("peer"), "flush set inet deaf ports\n")

    @contextlib.contextmanager
    def watched(self, directory: Path, allow: Sequence[Trouble] = (), **rules: Any) -> Iterator[None]:
        """What passes the peer meanwhile must be clean."""
        with Capture(self.host("peer"), "tcp", directory / "peer.pcap") as capture:
            yield
        judged = capture.check(allow=allow, **rules)
        clean(judged)

    @contextlib.contextmanager
    def stalled(self, above_bytes: int = 900) -> Iterator[Stall]:
        """Images do not arrive at b: what is being moved stays frozen until the block's end, or `lift`.

        Its owner must be another process than this one, which would be frozen too. ``above_bytes``: what is
        shorter is no image, nor many of them; nothing of them arrives from then on.
        """
        self.settle()
        stall = Stall(self.host("b"))
        nft(self.host("b"), _STALL % above_bytes)
        try:
            yield stall
        finally:
            stall.lift()
            self.settle()

    def settle(self) -> None:
        """Until all that a's daemon has sent to b's has arrived."""
        command = ["ss", "-Htn", "state", "established", "dport", "=", "7781"]
        until(lambda: all(line.split()[1] == "0" for line in self.host("a").run(command).stdout.splitlines()))


@dataclass(slots=True)
class Stall:
    """See `Bench.stalled`."""

    host: Host
    _lifted: bool = False

    def hit(self) -> bool:
        """Whether an image has been dropped: something is frozen."""
        said = self.host.run(["nft", "list", "table", "inet", "stall"]).stdout
        return "packets 0 " not in said

    def wait(self) -> None:
        """Until something is frozen."""
        until(self.hit)

    def lift(self) -> None:
        """Images pass again (TCP repeats them)."""
        if not self._lifted:
            self._lifted = True
            nft(self.host, "delete table inet stall\n")


class Later:
    """A call in a thread of its own: ``Later(f, x).result()``."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        self._box: list[Any] = []
        self._failure: list[BaseException] = []

        def run() -> None:
            try:
                self._box.append(call(*arguments, **more))
            except BaseException as error:
                self._failure.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has returned."""
        return not self._thread.is_alive()

    def result(self, timeout_s: float = PATIENCE_S) -> Any:
        """Its result, or its exception."""
        self._thread.join(timeout_s)
        assert self.done, "the call does not return"
        if self._failure:
            raise self._failure[0]
        return self._box[0]


def exchange(one: socket.socket, other: socket.socket, count: int) -> None:
    """``count`` random bytes from one to the other, whatever their buffers hold."""
    data = os.urandom(count)
    sending = Later(one.sendall, data)
    same(receive(other, count), data, "after the move")
    sending.result()


def copy_of(imported: Imported) -> socket.socket:
    """A socket object for an import that replaced a descriptor (whose family may be another now)."""
    sock = imported.socket or socket.socket(fileno=imported.fd)
    sock.settimeout(PATIENCE_S)
    return sock


def call(host: Host, op: str, **fields: Any) -> dict[str, Any]:
    """The last line of a host's daemon's answer."""
    return ask(host, op, **fields)[-1]


def begin(host: Host, op: str, **fields: Any) -> socket.socket:
    """Send a request and do not wait for its answer; closing the connection cancels it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_S)
    connection.connect(str(host.control_socket))
    connection.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
    return connection


class Held:
    """Connections in the hands of another process than this one, which would be frozen too."""

    def __init__(self, it: Bench, *cases: Case) -> None:
        self.keeper = Keeper([case.fd for case in cases])
        self.pairs = [(self.keeper.pid, case.fd) for case in cases]
        self._it, self._cases = it, cases
        for case in cases:
            case.ours.close()

    def move(self, **more: Any) -> Later:
        """A passive export, under way."""
        return Later(self._it.export_passively, self.pairs, **more)

    def begin(self) -> socket.socket:
        """The same, to be cancelled by closing this."""
        sockets = [{"pid": pid, "fd": fd} for pid, fd in self.pairs]
        return begin(self._it.host("a"), "export", sockets=sockets, to="b")

    def back(self) -> None:
        """They are this process's again."""
        for case, (pid, fd) in zip(self._cases, self.pairs, strict=True):
            case.ours = socket.socket(fileno=duplicate(pid, fd))
        self.keeper.kill()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.keeper.kill()


@contextlib.contextmanager
def reconfigured(it: Bench, host: str, **news: Any) -> Iterator[None]:
    """Other settings while the block runs (`reload`)."""
    daemon = it.daemons[host]
    before = daemon.config
    daemon.config_file.write_text(yaml.safe_dump(before | news))
    call(it.host(host), "reload")
    try:
        yield
    finally:
        daemon.config_file.write_text(yaml.safe_dump(before))
        call(it.host(host), "reload")


@contextlib.contextmanager
def bench(lab: Lab, mode: str, running: Daemons) -> Iterator[Bench]:
    """A bench over running daemons."""
    nft(lab.host("peer"), _DEAF)
    try:
        yield Bench(lab, mode, running)
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            nft(lab.host("peer"), "delete table inet deaf\n")
