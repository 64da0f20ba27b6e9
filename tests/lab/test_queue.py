# SPDX-License-Identifier: MIT
"""What waits in the queue of a listener that moves is not lost, whatever dies, and wherever there is no room.

Each queue has connections over IPv4 and over IPv6, with bytes that nobody has read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.capture import Capture
from lab.labs import Lab
from lab.namespaces import processes_in
from sockmi.client import Imported, ImportRequest, import_socket
from sockmi.engine.owners import process_name
from sockmi.journal import Record
from tests.lab.crash_lab import Cluster, cluster, journal_of, open_records, partitioned
from tests.lab.scenario import ask, status, until
from tests.laws import clean

pytestmark = pytest.mark.timeout(240)

TIMEOUT_S = 20.0
PEERS = 4
#: Accepts and echoes when it is told to, so long the connections wait.
SERVER = """
import socket, sys, threading
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
sys.stdin.readline()
def echo(connection):
    while data := connection.recv(4096):
        connection.sendall(data)
while True:
    try:
        connection, _ = listener.accept()
    except OSError:
        break  # it has been moved away
    threading.Thread(target=echo, args=[connection], daemon=True).start()
sys.stdin.read()
"""


@dataclass(slots=True)
class Queue:
    """A listener on a, and the peers' ends of the connections that wait in its queue."""

    lab: Lab
    port: int
    server: subprocess.Popen[str]
    peers: list[socket.socket] = field(default_factory=list)

    def fill(self, count: int = PEERS) -> None:
        """Connect, and say something."""
        for index in range(count):
            peer = self.lab.host("peer").socket(socket.AF_INET6 if index % 2 else socket.AF_INET)
            self.peers.append(peer)
            peer.settimeout(TIMEOUT_S)
            peer.connect((self.lab.host("a").address(6 if index % 2 else 4), self.port))
            peer.sendall(b"hello %d" % peer.getsockname()[1])
        command = ["ss", "-Hltn", "sport", "=", str(self.port)]
        until(lambda: self.lab.host("a").run(command).stdout.split()[1] == str(len(self.peers)))

    def wait_at(self, host: str, children: int, listeners: int = 1) -> None:
        """Until they are in a host's import lists."""

        def arrived() -> list[int]:
            lists = status(self.lab.host(host))["import_lists"]
            return [lists[kind]["length"] for kind in ("listening", "connected")]

        until(lambda: arrived() == [listeners, children], 30)

    def import_at(self, host: str) -> None:
        """An application takes the listener and all that waited in its queue: nothing is missing."""
        control = self.lab.host(host).control_socket
        [listener] = import_socket([ImportRequest(["listening"])], TIMEOUT_S, control=control)
        children: list[Imported] = []
        while len(children) < len(self.peers):
            wanted = ImportRequest(["connected"], listener=listener.record.migration_id)
            arrived = import_socket([wanted] * len(self.peers), TIMEOUT_S, control=control)
            assert arrived, f"{len(children)} of {len(self.peers)} came"
            children += arrived
        by_port = {peer.getsockname()[1]: peer for peer in self.peers}
        for child in children:
            assert child.socket is not None and child.remote is not None
            with child.socket as ours:
                peer = by_port.pop(child.remote.port)
                ours.settimeout(TIMEOUT_S)
                assert ours.recv(99) == b"hello %d" % child.remote.port
                ours.sendall(b"welcome")
                assert peer.recv(99) == b"welcome"
                ours.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
                peer.close()
                assert ours.recv(1) == b""
        assert listener.socket is not None
        listener.socket.close()

    def stays(self) -> None:
        """The listener and its queue are where they were."""
        assert self.server.stdin is not None
        self.server.stdin.write("go on\n")
        self.server.stdin.flush()
        for peer in self.peers:
            wanted = b"hello %d" % peer.getsockname()[1]
            assert peer.recv(99) == wanted
            peer.close()


@contextlib.contextmanager
def queue(lab: Lab, port: int, directory: Path, **rules: Any) -> Iterator[Queue]:
    """A listener with a queue; the wire must show nothing wrong (``rules``: see `Capture.check`)."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        Capture(lab.host("peer"), f"tcp port {port}", directory / "peer.pcap") as capture,
        lab.host("a").popen([sys.executable, "-c", SERVER, str(port)], **pipes) as server,
    ):
        one = Queue(lab, port, server)
        try:
            assert server.stdout.readline() == "ready\n"
            one.fill()
            yield one
        finally:
            server.kill()
            for peer in one.peers:
                peer.close()
            for pid in keepers(lab, "a"):  # of a test that has failed; they outlive the daemon
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    verdict = capture.check(**rules)
    clean(verdict)


def keepers(lab: Lab, host: str) -> list[str]:
    """The processes that keep queues on a host."""
    pids = processes_in([lab.host(host).namespace]).get(0, [])
    return [str(pid) for pid in pids if process_name(pid) == "sockmi-keeper"]


def nothing_kept(daemons: Cluster) -> None:
    """No queue is kept any more, and every migration has its outcome."""

    def kept() -> list[Any]:
        with journal_of(daemons.lab.host("a")) as journal:
            records = list(journal.records(Record.QUEUE))
        return [*records, *keepers(daemons.lab, "a"), *open_records(daemons.lab, daemons.hosts)]

    until(lambda: not kept(), 30)


@pytest.mark.parametrize(
    "point",
    [
        "commit.accepted",
        "commit.released",
        "commit.done",
        "freeze.held:2",  # of the queue's connections
        "commit.journalled:2",
        "commit.released:2",
        "commit.done:2",
        "queue.ended",
    ],
)
def test_exporter_dies(lab: Lab, tmp_path: Path, point: str) -> None:
    """kill -9 after a listener's queue has been taken: all of it follows, once the daemon is back."""
    with cluster(lab, "ab", {"a": point}) as daemons, queue(lab, 7501, tmp_path) as one:
        daemons.drain("a", "b", one.port, "listening")
        daemons.died("a")
        daemons.restart_dead()
        one.wait_at("b", PEERS)
        one.import_at("b")
        nothing_kept(daemons)


@pytest.mark.parametrize("point", ["freeze.held", "commit.led-away", "commit.journalled"])
def test_exporter_dies_before(lab: Lab, tmp_path: Path, point: str) -> None:
    """As long as nothing has been taken out of the queue, it never happened."""
    with cluster(lab, "ab", {"a": point}) as daemons, queue(lab, 7502, tmp_path) as one:
        daemons.drain("a", "b", one.port, "listening")
        daemons.died("a")
        daemons.restart_dead()
        nothing_kept(daemons)
        one.stays()
        assert not ask(lab.host("b"), "list", table="imports")[-1]["imports"]


def test_dies_twice(lab: Lab, tmp_path: Path) -> None:
    """The daemon dies again while it closes what the first one had begun to."""
    crash_at = {"a": "commit.accepted"}
    with cluster(lab, "ab", crash_at) as daemons, queue(lab, 7503, tmp_path) as one:
        daemons.drain("a", "b", one.port, "listening")
        daemons.died("a")
        daemons.dies_at_start("a", "queue.closing")
        daemons.restart_dead()
        one.wait_at("b", PEERS)
        one.import_at("b")
        nothing_kept(daemons)


@pytest.mark.parametrize("point", ["prepare.journalled:2", "activate.journalled:2"])
def test_importer_dies(lab: Lab, tmp_path: Path, point: str) -> None:
    """The importer is killed when the listener is there, and the queue on its way."""
    with cluster(lab, "ab", {"b": point}) as daemons, queue(lab, 7504, tmp_path) as one:
        daemons.drain("a", "b", one.port, "listening")
        daemons.died("b")
        daemons.restart_dead()
        one.wait_at("b", PEERS)
        one.import_at("b")
        nothing_kept(daemons)


def test_clean_stop(lab: Lab, tmp_path: Path) -> None:
    """SIGTERM in between: nothing new is begun, and nothing is given up."""
    with cluster(lab, "ab", {"a": "commit.released:1:STOP"}) as daemons, queue(lab, 7505, tmp_path) as one:
        daemons.drain("a", "b", one.port, "listening")
        daemons.stopped("a")
        daemons.signal("a", signal.SIGTERM)
        daemons.signal("a", signal.SIGCONT)
        assert daemons.process("a").wait(15) == 0
        daemons.restart_dead()
        one.wait_at("b", PEERS)
        one.import_at("b")
        nothing_kept(daemons)


def test_no_room(lab: Lab, tmp_path: Path) -> None:
    """The importer's list is too short: what does not fit waits until there is room."""
    with cluster(lab, "ab", imports={"max_connected": 1}) as daemons, queue(lab, 7506, tmp_path) as one:
        moving = daemons.drain("a", "b", one.port, "listening")
        one.wait_at("b", 1)
        outcomes = [record["outcome"] for record in moving.ended() or []]
        assert outcomes.count("moved") == 2 and outcomes.count("refused") == PEERS - 1
        assert len(keepers(lab, "a")) == 1
        one.import_at("b")
        nothing_kept(daemons)


def test_partition(lab: Lab, tmp_path: Path) -> None:
    """The hosts stop hearing each other when the listener has gone."""
    with (
        cluster(lab, "ab", {"a": "commit.done:1:STOP"}) as daemons,
        queue(lab, 7507, tmp_path) as one,
    ):
        daemons.drain("a", "b", one.port, "listening")
        daemons.stopped("a")
        with partitioned(lab, "ab"):
            daemons.signal("a", signal.SIGCONT)
            until(lambda: any(row["outcome"] == "refused" for row in history(daemons)), 40)
        one.wait_at("b", PEERS)
        one.import_at("b")
        nothing_kept(daemons)


def history(daemons: Cluster) -> list[dict[str, Any]]:
    """The exporter's migrations that have an outcome."""
    return [row for page in ask(daemons.lab.host("a"), "history", limit=100) for row in page["migrations"]]


def test_what_ends_meanwhile_is_let_go(lab: Lab, tmp_path: Path) -> None:
    """A peer that resets its connection while it waits for room leaves no trace."""
    resetting = {lab.host("peer").address(version) for version in (4, 6)}
    with (
        cluster(lab, "ab", imports={"max_connected": 1}) as daemons,
        queue(lab, 7508, tmp_path, rst_from=resetting) as one,
    ):
        moving = daemons.drain("a", "b", one.port, "listening")
        one.wait_at("b", 1)
        moving.ended()
        [entry] = [
            entry
            for entry in ask(lab.host("b"), "list", table="imports")[-1]["imports"]
            if entry["kind"] == "connected"
        ]
        gone = [peer for peer in one.peers if not entry["remote"].endswith(f":{peer.getsockname()[1]}")]
        for peer in gone:
            one.peers.remove(peer)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a RST of the peer's
            peer.close()
        until(lambda: not keepers(lab, "a"), 30)
        one.import_at("b")
        nothing_kept(daemons)
