# SPDX-License-Identifier: MIT
"""What the crash tests share: daemons that die where they are told to, and the proof that nobody noticed.

A `Stage` has daemons and servers on all hosts. It stays from test to test, as most of the time would
go into starting Python programs; a test restarts the daemon that is to die, makes connections of its
own, and leaves nothing. A stage on which a test has failed is not used again.

The proof, after every crash: each connection lives on exactly one host, the journals of all hosts say
on which, the kernels lead it there and nowhere else, the clients got every byte, the wire shows nothing
wrong; and when the traffic has ended nothing is left in kernels, journals, spools and daemons.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest

from lab.capture import Capture, Trouble
from lab.daemons import GROUP_PORT, STREAM_PORT, Daemons
from lab.host import Host
from lab.labs import Lab
from lab.plan import PATIENCE, LabError
from lab.traffic.clients import DuplexClient, LineClient, Result
from lab.traffic.duplex import Terms
from lab.traffic.handover import local_text
from sockmi.crashpoints import VARIABLE
from sockmi.engine.duplicate import duplicate
from sockmi.journal import Journal, Record
from sockmi.refusal import Refusal
from sockmi.spool import chunk_in
from tests.lab.mode_lab import SERVICE, give_service, has_address, misled_by_rules, rules
from tests.lab.scenario import PORTS, ask, status, until, wait_for_members
from tests.laws import clean, law

HOSTS = "abc"
TIMING = {"look_again_s": 0.2, "linger_s": 1.0, "audit_interval_s": 0.5, "freeze_deadline_s": 2.0}
#: Why a connection may stay although all is right: the machine is busy.
BUSY = {"owner-unstoppable", "freeze-deadline"}
DUPLEX_PACE = 750_000  # bytes a second, each way
LINE_INTERVAL_S = 0.005
SILENCE_S = 60.0
WAITINGS = 64  # of each server, see lab.traffic.handover.library_import
LISTEN, CLOSED = 10, 7
#: Sets of ours that are empty when no connection is away, here from elsewhere, or on its way.
HOLDS = ("hold", "quiet", "hold_syn", "hold_port", "away", "away_port")
MAPS = ("flow", "addr", "next", "led")
#: What the upper half of a flow's mark says (sockmi.redirect.settings).
LEFT, CAME = (0x5341, 0x5343), (0x5342, 0x5344)


class Cluster:
    """Daemons of some hosts of a lab, which can be told where to die."""

    def __init__(self, lab: Lab, hosts: str = HOSTS, **overrides: Any) -> None:
        self.lab = lab
        self.hosts = hosts
        self.drains: list[Drain] = []
        timing = TIMING | overrides.pop("timing", {})
        redirect = {"devices": ["eth0"]} | overrides.pop("redirect", {})
        engines, modes = overrides.pop("engines", {}), overrides.pop("modes_of", {})
        self.modes = redirect.get("modes", [])
        self.daemons = Daemons(lab, hosts, {"timing": timing, "redirect": redirect} | overrides)
        for host, engine in engines.items():
            self.daemons[host].config["engine"] = engine
        for host, some in modes.items():
            self.daemons[host].config["redirect"] = redirect | {"modes": some}

    def start(self, host: str, crash_at: str = "") -> None:
        """Start one; it dies where ``crash_at`` says (sockmi.crashpoints)."""
        with _environment(crash_at):
            self.daemons[host].start()

    def dies_at_start(self, host: str, crash_at: str) -> None:
        """Start one that dies before it is ready."""
        with pytest.raises(LabError):
            self.start(host, crash_at)
        self.died(host)

    def ready(self) -> None:
        """Wait until all hear each other."""
        wait_for_members(self.lab, self.hosts)

    def kill(self, host: str) -> None:
        """kill -9, if it still runs."""
        self.daemons[host].kill()

    def process(self, host: str) -> subprocess.Popen[bytes]:
        """The daemon of a host."""
        process = self.daemons[host].process
        assert process is not None
        return process

    def signal(self, host: str, number: signal.Signals) -> None:
        """Send a signal to a daemon."""
        self.process(host).send_signal(number)

    def running(self) -> list[str]:
        """Hosts whose daemon runs."""
        return [
            name for name, one in self.daemons.by_host.items() if one.process and one.process.poll() is None
        ]

    def go_on(self) -> None:
        """Whoever is stopped goes on."""
        for host in self.running():
            self.signal(host, signal.SIGCONT)

    def died(self, host: str, timeout_s: float = 20.0) -> None:
        """Wait until a daemon has died where it was told to."""
        assert self.process(host).wait(timeout_s * PATIENCE) == -signal.SIGKILL, self.daemons[host].log()

    def stopped(self, host: str) -> None:
        """Wait until a daemon has stopped (SIGSTOP) where it was told to."""
        stat = Path(f"/proc/{self.daemons[host].pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def restart_dead(self, order: Sequence[str] | None = None) -> None:
        """Start those that do not run."""
        for host in order or self.hosts:
            if host not in self.running():
                self.start(host)

    def drain(self, source: str, target: str, port: int, kind: str = "connected") -> Drain:
        """Begin a drain."""
        self.drains.append(Drain(self.lab, source, target, port, kind))
        return self.drains[-1]

    def logged(self) -> dict[str, int]:
        """How much each daemon has logged, bytes."""
        return {name: one.log_file.stat().st_size for name, one in self.daemons.by_host.items()}

    def blunders(self, since: dict[str, int]) -> list[str]:
        """Errors that nobody expected, from the logs."""
        found = []
        for name, one in self.daemons.by_host.items():
            text = one.log_file.read_bytes()[since[name] :].decode(errors="replace")
            if wrong := re.search(r"^\S+ \S+ (ERROR|CRITICAL) |^Traceback", text, re.MULTILINE):
                found.append(f"{name}: {text[wrong.start() :]}")
        return found

    def notes(self) -> str:
        """The logs, for a failure."""
        return "\n".join(f"--- daemon on {host}:\n{self.daemons[host].log(60)}" for host in self.hosts)

    def close(self) -> None:
        """No daemon runs."""
        self.go_on()
        for host in self.hosts:
            self.kill(host)


@contextlib.contextmanager
def cluster(
    lab: Lab, hosts: str = "ab", crash_at: dict[str, str] | None = None, **overrides: Any
) -> Iterator[Cluster]:
    """Daemons without a past, for one test; those in ``crash_at`` die where it says."""
    one = Cluster(lab, hosts, **overrides)
    try:
        for host in hosts:
            for path in lab.host(host).state_dir.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            one.daemons[host].log_file.unlink(missing_ok=True)
            one.start(host, (crash_at or {}).get(host, ""))
        one.ready()
        yield one
    except BaseException as error:
        error.add_note(one.notes())
        raise
    finally:
        one.close()


@contextlib.contextmanager
def _environment(crash_at: str) -> Iterator[None]:
    if crash_at:
        os.environ[VARIABLE] = crash_at
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


class Drain(threading.Thread):
    """A drain in the background: its daemon, or the other one, will die of it."""

    def __init__(self, lab: Lab, source: str, target: str | None, port: int, kind: str = "connected") -> None:
        super().__init__(daemon=True)
        self._kind = kind
        self._source, self._target, self._port = lab.host(source), target, port
        self.records: list[dict[str, Any]] | None = None
        self.start()

    def run(self) -> None:
        """Ask, and keep the answer if there is one."""
        with contextlib.suppress(OSError):
            wanted = {"kinds": [self._kind], "local_port": self._port}
            answers = ask(self._source, "drain", filter=wanted, to=self._target)
            self.records = [record for answer in answers for record in answer["migrations"]]

    def ended(self, timeout_s: float = 40.0) -> list[dict[str, Any]] | None:
        """Wait; the records, or None if the daemon went away."""
        self.join(timeout_s * PATIENCE)
        assert not self.is_alive(), "the drain does not end"
        return self.records

    def told(self, where: dict[str, str]) -> None:
        """Its answer is true."""
        assert self.records, "the drain has no answer"
        for one in self.records:
            moved = one["outcome"] == "moved"
            assert moved == (where[one["remote"]] == self._target), (one, where)


# -- traffic


class _Seen:
    """A client whose connection can be looked at."""

    connection: socket.socket | None = None

    def _connect(self) -> socket.socket:
        self.connection = super()._connect()  # type: ignore[misc]
        return self.connection


class _Duplex(_Seen, DuplexClient):
    pass


class _Lines(_Seen, LineClient):
    pass


class Peer:
    """A client at the peer, in a thread of ours."""

    def __init__(self, host: Host, kind: str, remote: tuple[str, int], name: str) -> None:
        self.name = name
        self._client = (
            _Duplex(
                remote, Terms(1, server_pace=DUPLEX_PACE), pace=DUPLEX_PACE, name=name, silence_s=SILENCE_S
            )
            if kind == "duplex"
            else _Lines(remote, interval_s=LINE_INTERVAL_S, name=name, silence_s=SILENCE_S)
        )
        self._host = host
        self._result: Result | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        until(lambda: self._client.connection is not None or not self._thread.is_alive())
        assert self._client.connection is not None, self._result
        self.local = local_text(self._client.connection)

    def _run(self) -> None:
        with self._host.entered():
            self._result = self._client.run()

    @property
    def received(self) -> int:
        """Bytes so far."""
        return self._client.received

    def finish(self) -> None:
        """End in an orderly way; all must have been right."""
        self._thread.join(SILENCE_S + 5)
        assert self._result is not None, f"{self.name} does not end"
        assert self._result.ok, f"{self.name} ({self.local}): {self._result.error}"

    def stop(self) -> None:
        """Tell it to end."""
        self._client.stop()

    def kill(self) -> None:
        """End it at once."""
        self._client.stop()
        if self._client.connection is not None:
            with contextlib.suppress(OSError):
                self._client.connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


@dataclass(slots=True)
class Serving:
    """Servers of one kind, which listen on the first host for IPv4 and IPv6, and import everywhere."""

    lab: Lab
    kind: str
    hosts: str
    directory: Path
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    peers: list[Peer] = field(default_factory=list)
    began: datetime = datetime.min
    service: dict[int, str] = field(default_factory=dict)
    """Addresses of the first host, by IP version, if they are not its own."""

    def address(self, version: int) -> str:
        """Where they listen."""
        return self.service.get(version) or self.lab.host(self.hosts[0]).address(version)

    @property
    def port(self) -> int:
        """Where they listen."""
        return PORTS[self.kind]

    def start(self) -> None:
        """Start the servers; returns when all are ready and wait for imports."""
        home = self.lab.host(self.hosts[0])
        for version in (4, 6):
            self._start(home, f"{home.name}{version}", "--listen", self.address(version))
        for name in self.hosts[1:]:
            self._start(self.lab.host(name), name)
        for name in self.processes:
            self._ready(name)

    def serve(self, name: str) -> None:
        """Start one more server that imports."""
        self._start(self.lab.host(name), name)
        self._ready(name)

    def _start(self, host: Host, name: str, *more: str) -> None:
        words: list[str | Path] = ["serve", self.kind, "--port", str(self.port), "--import", *more]
        self.processes[name] = host.python_popen(
            "lab.traffic", *words, "--rendezvous", self.directory / "contexts",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _ready(self, name: str) -> None:
        output = self.processes[name].stdout
        assert output is not None
        line = output.readline()
        assert line == "ready\n", f"server on {name}: {line}{output.read()}"

    def clients(self, pairs: int = 1) -> None:
        """Connect pairs of clients, one over IPv4 and one over IPv6; returns when bytes flow."""
        home, peer = self.lab.host(self.hosts[0]), self.lab.host("peer")
        for version in (4, 6) * pairs:
            name = f"{self.kind}{len(self.peers)}"
            self.peers.append(Peer(peer, self.kind, (self.address(version), self.port), name))
        wanted = {"local_port": self.port, "kinds": ["connected"]}
        until(lambda: sum(len(one["sockets"]) for one in ask(home, "list", filter=wanted)) >= len(self.peers))
        flowing(self)

    def move(self, source: str, target: str) -> None:
        """All connections move."""
        left = {peer.local for peer in self.peers}
        while left:
            records = Drain(self.lab, source, target, self.port).ended() or []
            assert {one["remote"] for one in records} == left
            left = {one["remote"] for one in records if one["outcome"] != "moved"}
            assert all(one["refusal"]["code"] in BUSY for one in records if one["remote"] in left), records

    def finish(self) -> None:
        """The clients end; they have got every byte."""
        peers, self.peers = self.peers, []
        for peer in peers:
            peer.stop()
        for peer in peers:
            peer.finish()

    def end(self) -> None:
        """The servers end; they must be content, but for imports that failed with their daemon."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self.processes.items():
            output, _unused = process.communicate(timeout=30)
            failures = json.loads(output.splitlines()[-1])["failures"]
            wrong = [one for one in failures if not one.startswith("import: ")]
            assert not wrong, f"server on {name}: {output}"

    def kill(self) -> None:
        """Whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        for peer in self.peers:
            peer.kill()


def wait_for_servers(lab: Lab, servings: Sequence[Serving]) -> None:
    """Wait until all servers wait for imports."""
    names = Counter(name[0] for one in servings for name in one.processes)

    def missing(name: str) -> int:
        lists: dict[str, dict[str, int]] = status(lab.host(name))["import_lists"]
        return WAITINGS * names[name] - lists["connected"]["waiting"]

    until(lambda: all(missing(name) <= 0 for name in names))


@contextlib.contextmanager
def watched(daemons: Cluster, serving: Serving, directory: Path, *, calm: bool = True) -> Iterator[None]:
    """The wire shows nothing wrong, and the logs, if ``calm``, no error.

    After an outage the peer has many holes, and SACKs may forget some.
    """
    serving.began = datetime.now(UTC)
    logged = daemons.logged()
    with Capture(daemons.lab.host("peer"), f"tcp port {serving.port}", directory / "peer.pcap") as capture:
        yield
        for one in daemons.drains:
            one.ended()
        daemons.drains.clear()
    verdict = capture.check(allow={Trouble.SACK_RENEGED})
    clean(verdict)
    blunders = daemons.blunders(logged)
    assert not blunders or not calm, "\n".join(blunders)


@contextlib.contextmanager
def service(
    daemons: Cluster,
    kind: str,
    hosts: str,
    directory: Path,
    *,
    calm: bool = True,
    at: dict[int, str] | None = None,
) -> Iterator[Serving]:
    """Servers for one test; ``at``: the addresses of the first host, if they are not its own."""
    one = Serving(daemons.lab, kind, hosts, directory, service=at or {})
    try:
        one.start()
        wait_for_servers(one.lab, [one])
        with watched(daemons, one, directory, calm=calm):
            yield one
        one.end()
    finally:
        daemons.go_on()  # a process whose tracer is stopped does not end
        one.kill()


# -- stages


class Stage:
    """A lab with daemons and servers of all kinds on all hosts."""

    def __init__(self, name: str, directory: Path, **overrides: Any) -> None:
        self.lab = Lab(name)
        self.lab.up()
        self.daemons = Cluster(self.lab, **overrides)
        self.servings = [
            Serving(self.lab, kind, HOSTS, directory / kind) for kind in PORTS if kind != "download"
        ]
        if "takeover" in self.daemons.modes:
            for one in self.servings:
                one.service = SERVICE

    def start(self, crash_at: dict[str, str], kind: str) -> Serving:
        """Daemons and servers of that kind; those that run go on, but for daemons that are to die."""
        for host in HOSTS:
            if host in crash_at:
                self.daemons.kill(host)
            if host not in self.daemons.running():
                self.daemons.start(host, crash_at.get(host, ""))
        (serving,) = (one for one in self.servings if one.kind == kind)
        if serving.service:
            give_service(self.lab)
        if not serving.processes:
            serving.start()
        self.daemons.ready()
        wait_for_servers(self.lab, self.servings)
        return serving

    def end(self) -> None:
        """The servers end, content."""
        for one in self.servings:
            one.end()

    def close(self) -> None:
        """Nothing remains."""
        self.daemons.close()
        for one in self.servings:
            one.kill()
        self.lab.down()


class Stages:
    """The stages of a module; a test asks for one by what is special about its daemons."""

    def __init__(self, name: Any, directory: pytest.TempPathFactory) -> None:
        self._name, self._directory = name, directory
        self._by_overrides: dict[str, Stage] = {}

    @contextlib.contextmanager
    def __call__(
        self, kind: str, directory: Path, crash_at: dict[str, str], mode: str = "forward", **overrides: Any
    ) -> Iterator[tuple[Cluster, Serving]]:
        """Daemons, of which those in ``crash_at`` die where it says, and servers of a kind."""
        overrides["redirect"] = {"devices": ["eth0"], "modes": [mode]}
        key = json.dumps(overrides)
        stage = self._by_overrides.pop(key, None)
        if stage is None:
            stage = Stage(self._name(), self._directory.mktemp("stage"), **overrides)
        try:
            serving = stage.start(crash_at, kind)
            with watched(stage.daemons, serving, directory):
                yield stage.daemons, serving
        except BaseException as error:
            error.add_note(stage.daemons.notes())
            stage.close()
            raise
        self._by_overrides[key] = stage

    def close(self) -> None:
        """End all; their servers must be content."""
        try:
            for stage in self._by_overrides.values():
                stage.end()
        finally:
            for stage in self._by_overrides.values():
                stage.close()


# -- applications, disks, networks


class Sleeper:
    """An application that asks for two connections of a port, and then does nothing about them."""

    def __init__(self, host: Host, port: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(host.control_socket))
        wanted = {"states": ["connected"], "local_port": port}
        request = {"op": "import", "requests": [wanted, wanted], "timeout_ms": -1}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._descriptors: list[int] = []
        until(lambda: status(host)["import_lists"]["connected"]["waiting"] == 2)

    def served(self) -> None:
        """Wait until descriptors have been sent; they are not read."""
        self._socket.settimeout(20)
        self._socket.recv(1, socket.MSG_PEEK)

    def descriptors(self) -> list[int]:
        """Read them."""
        _unused, self._descriptors, _unused, _unused = socket.recv_fds(self._socket, 1 << 16, 16)
        assert len(self._descriptors) == 2
        return self._descriptors

    def close(self) -> None:
        """The application has gone."""
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()


@dataclass(slots=True)
class Disk:
    """A small file system that can be full."""

    path: Path

    def fill(self) -> None:
        """Nothing can be written any more."""
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        """There is room again."""
        (self.path / "filler").unlink()


@contextlib.contextmanager
def small_disk(host: Host) -> Iterator[Disk]:
    """The state of a host's daemon is on a file system of 8 MiB."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "sockmi-test", host.state_dir], check=True
    )
    try:
        yield Disk(host.state_dir)
    finally:
        subprocess.run(["umount", "--lazy", host.state_dir], check=True)


def state_of(descriptor: int) -> int:
    """The kernel's state number of a TCP socket."""
    with socket.socket(fileno=os.dup(descriptor)) as each:
        return each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


@contextlib.contextmanager
def partitioned(lab: Lab, hosts: str) -> Iterator[None]:
    """The daemons of ``hosts`` do not hear each other inside the block; everything else goes on."""
    words = [f"udp dport {GROUP_PORT}", f"tcp dport {STREAM_PORT}", f"tcp sport {STREAM_PORT}"]
    rules = "add table inet partition\nadd chain inet partition out { type filter hook output priority 0; }\n"
    rules += "".join(f"add rule inet partition out {one} drop\n" for one in words)
    try:
        for name in hosts:
            lab.host(name).run(["nft", "-f", "-"], input=rules)
        yield
    finally:
        for name in hosts:
            lab.host(name).run(["nft", "delete", "table", "inet", "partition"])


# -- the proof


def flowing(serving: Serving) -> None:
    """Every client gets more bytes."""
    before = [peer.received for peer in serving.peers]
    until(lambda: all(peer.received > then for peer, then in zip(serving.peers, before, strict=True)), 20)


def places(serving: Serving, hosts: str) -> dict[str, list[str]]:
    """The hosts of all sockets that there are of each client's connection, dormant ones included."""
    found: dict[str, list[str]] = {peer.local: [] for peer in serving.peers}
    for name in hosts:
        words = ["ss", "--tcp", "--numeric", "--no-header", "state", "connected", "exclude", "time-wait"]
        for line in serving.lab.host(name).run(words).stdout.splitlines():
            remote = line.split()[4]
            if remote in found:
                found[remote].append(name)
    return found


def settled(serving: Serving, hosts: str) -> dict[str, str]:
    """Wait until each connection is one socket and bytes flow; where each is."""
    until(lambda: all(len(where) == 1 for where in places(serving, hosts).values()), 30)
    flowing(serving)
    where = places(serving, hosts)
    assert all(len(each) == 1 for each in where.values()), where
    return {remote: each[0] for remote, each in where.items()}


def histories(lab: Lab, hosts: str) -> dict[str, list[dict[str, Any]]]:
    """The journals' migrations that have an outcome, newest first."""
    return {
        name: [row for page in ask(lab.host(name), "history", limit=1000) for row in page["migrations"]]
        for name in hosts
    }


def spooled(host: Host) -> list[str]:
    """The chunks whose images a host's spool has."""
    return [chunk for path in (host.state_dir / "spool").iterdir() if (chunk := chunk_in(path)) is not None]


@contextlib.contextmanager
def journal_of(host: Host) -> Iterator[Journal]:
    """A copy of what a host's journal holds now: reading it here would interfere with the daemon."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        # First what is appended: what is folded meanwhile is in the database, and not taken in twice.
        shutil.copy(host.state_dir / "journal.db-events", Path(directory) / "events")
        with (
            contextlib.closing(
                sqlite3.connect(f"file:{host.state_dir}/journal.db?mode=ro", uri=True)
            ) as there,
            contextlib.closing(sqlite3.connect(path)) as here,
        ):
            there.backup(here)
        (Path(directory) / "events").rename(f"{path}-events")
        journal = Journal(path)
        try:
            yield journal
        finally:
            journal.close()


def open_records(lab: Lab, hosts: str) -> list[dict[str, Any]]:
    """Migrations without an outcome, of all journals."""
    found = []
    for name in hosts:
        with journal_of(lab.host(name)) as journal:
            found += list(journal.history(is_open=True))
    return found


def was_busy(serving: Serving, hosts: str, remote: str) -> bool:
    """Whether a connection stayed because its owner did not stop in time, say."""
    rows = [row for each in histories(serving.lab, hosts).values() for row in each if row["remote"] == remote]
    return any((row["refusal"] or {}).get("code") in BUSY for row in rows)


def journals_agree(serving: Serving, hosts: str, home: str, where: dict[str, str]) -> None:
    """The journals say where each connection is: follow the moves from ``home``."""
    until(lambda: not open_records(serving.lab, hosts), 30)
    moved = {
        (row["migration_id"], row["direction"]): row
        for each in histories(serving.lab, hosts).values()
        for row in each
        if row["outcome"] == "moved" and datetime.fromisoformat(row["started_at"]) >= serving.began
    }
    for remote, host in where.items():
        told = home
        exports = [
            row
            for (_unused, direction), row in moved.items()
            if direction == "export" and row["remote"] == remote
        ]
        for hop, row in enumerate(sorted(exports, key=lambda row: row["hop"] or 0), 1):
            assert (row["from"], row["hop"]) == (told, hop), (remote, row)
            told = row["to"]
            taken = moved.pop((row["migration_id"], "import"), None)
            assert taken is not None and taken["to"] == told, (row, taken)
        assert told == host, f"{remote} is on {host}, but the journals say {told}: {exports}"
    alone = [
        row for (_unused, direction), row in moved.items() if direction == "import" and row["remote"] in where
    ]
    assert not alone, f"imported, but nobody has exported it: {alone}"


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a set or map of ours in a kernel; ``expires``: it goes by itself."""

    name: str  # of the set, without the IP version
    key: Any
    data: Any
    expires: bool

    @property
    def remote(self) -> str:
        """The client's end, if the key is a connection."""
        address, port = self.key["concat"][:2]
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def elements(host: Host) -> list[Element]:
    """What our sets and maps of a host hold of connections."""
    found = []
    for item in json.loads(host.run(["nft", "--json", "list", "ruleset"]).stdout)["nftables"]:
        one = item.get("set") or item.get("map") or {}
        name = one.get("name", "")[:-1]
        if one.get("table") != "sockmi" or name not in HOLDS + MAPS:
            continue
        for raw in one.get("elem", []):
            key, data = raw if isinstance(raw, list) else (raw, None)
            timed = isinstance(key, dict) and "elem" in key
            found.append(Element(name, key["elem"]["val"] if timed else key, data, timed))
    return found


def misled(lab: Lab, hosts: str, home: str, where: dict[str, str]) -> list[str]:
    """What is wrong with the redirects and holds of connections: led from ``home`` to where they are."""
    found = []
    ends: dict[str, dict[str, list[str]]] = {remote: {"left": [], "came": [], "to": []} for remote in where}
    for name in hosts:
        for one in elements(lab.host(name)):
            if (
                one.name.startswith(("hold_", "away"))
                or one.remote not in where
                or (one.expires and one.name in MAPS)
            ):
                continue
            if one.name in HOLDS:
                found.append(f"{name}: {one}")
            elif one.name == "flow":
                kind = {**dict.fromkeys(LEFT, "left"), **dict.fromkeys(CAME, "came")}[one.data >> 16]
                ends[one.remote][kind].append(name)
            elif name == home:
                ends[one.remote]["to"].append(one.data)
    for remote, host in where.items():
        away = host != home
        address = lab.host(host).address(6 if remote.startswith("[") else 4)
        right = {"left": [home] * away, "came": [host], "to": [address] * away}
        # At home it is marked if it has ever been away.
        if ends[remote] != right and (away or any(ends[remote].values())):
            found.append(f"{remote}: {ends[remote]}, not {right}")
    return found


def led_right(lab: Lab, hosts: str, home: str, where: dict[str, str], modes: Sequence[str] = ()) -> None:
    """Soon the kernels lead each connection from ``home`` to where it is, not elsewhere, and hold nothing."""

    def wrong() -> list[str]:
        if "iptables" in modes:
            held = [one for name in hosts for one in elements(lab.host(name)) if one.name in HOLDS]
            return [*map(str, held), *misled_by_rules(lab, hosts, home, where)]
        return misled(lab, hosts, home, where)

    try:
        until(lambda: not wrong(), 20)
    except AssertionError:
        raise AssertionError("\n".join(wrong())) from None


@law()
def proved(daemons: Cluster, serving: Serving, goal: str = "", home: str = "a") -> dict[str, str]:
    """All that has to be true after a crash; where the connections were.

    ``goal``: where all have to be, but for those for which the machine was too busy.
    """
    lab, hosts = daemons.lab, daemons.hosts
    for one in daemons.drains:
        one.ended()  # it might try again
    where = settled(serving, hosts)
    for remote, host in where.items():
        assert host == goal or not goal or was_busy(serving, hosts, remote), where
    assert goal in where.values() or not goal, where
    journals_agree(serving, hosts, home, where)
    led_right(lab, hosts, home, where, daemons.modes)
    assert not tracers(serving)
    assert places(serving, hosts) == {remote: [host] for remote, host in where.items()}
    serving.finish()
    nothing_left(daemons, serving)
    return where


def leftovers(daemons: Cluster, serving: Serving) -> list[str]:
    """What of moved connections is still in the kernels, the journals, the spools and the daemons."""
    found = [f"context of {path.name}" for path in (serving.directory / "contexts").iterdir()]
    for name in daemons.hosts:
        host = daemons.lab.host(name)
        # What is dropped for a while longer goes by itself.
        found += [f"{name}: {one}" for one in elements(host) if not (one.expires and one.name in MAPS)]
        found += [f"{name}: {one}" for one in rules(host)] if "iptables" in daemons.modes else []
        found += [
            f"{name}: has {one}" for one in serving.service.values() if name != "a" and has_address(host, one)
        ]
        found += [f"{name}: spooled {chunk}" for chunk in spooled(host)]
        found += [f"{name}: descriptor {one}" for one in descriptors(daemons.process(name).pid)]
        now = status(host)
        counts = [now["migrations_under_way"], now["redirects_in"], now["redirects_out"]]
        counts += [each["length"] for each in now["import_lists"].values()]
        if any(counts):
            found.append(f"{name}: status {now}")
    if found:
        return found
    for name in daemons.hosts:
        with journal_of(daemons.lab.host(name)) as journal:
            found += [f"{name}: {kind} {records}" for kind in Record if (records := journal.records(kind))]
            found += [f"{name}: open: {record}" for record in journal.history(is_open=True)]
    return found


def descriptors(pid: int) -> list[str]:
    """TCP sockets that a daemon has, besides its own."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        with contextlib.suppress(Refusal, OSError), socket.socket(fileno=duplicate(pid, int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                state = state_of(one.fileno())
                ours = state != CLOSED and one.getsockname()[1] == STREAM_PORT
                if state != LISTEN and not ours and (state == CLOSED or one.getpeername()[1] != STREAM_PORT):
                    found.append(f"{name}: {one}, state {state}")
    return found


def nothing_left(daemons: Cluster, serving: Serving) -> None:
    """Once the connections have ended, all is as it was before the first of them moved."""

    def clean() -> bool:
        for name in daemons.hosts:  # it would last a minute
            daemons.lab.host(name).run(["ss", "--kill", "--tcp", "state", "time-wait"])
        return not leftovers(daemons, serving)

    try:
        until(clean, 30)
    except AssertionError:
        raise AssertionError("\n".join(leftovers(daemons, serving))) from None


def tracers(serving: Serving) -> list[int]:
    """Who traces the servers: nobody, unless they are frozen."""
    found = []
    for process in serving.processes.values():
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found += [int(line.split()[1]) for line in lines if line.startswith("TracerPid")]
    return [pid for pid in found if pid]
