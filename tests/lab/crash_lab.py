# SPDX-License-Identifier: MIT
"""What the crash tests share: daemons that die where they are told to, and the proof that nobody noticed.

The proof, after every crash: each connection lives on exactly one host, the journals of both hosts
say on which, the clients got every byte, the wire shows nothing wrong (`scenario.service`), and when
the traffic has ended nothing is left in the kernel, the journal, or the spool.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lab.capture import Capture, Trouble
from lab.daemons import GROUP_PORT, STREAM_PORT, Daemons
from lab.host import Host
from lab.labs import Lab
from sockmi.crashpoints import VARIABLE
from sockmi.journal import Journal, Record
from tests.lab.scenario import Service, ask, status, until, wait_for_members

TIMING = {"look_again_s": 0.2, "linger_s": 1.0, "audit_interval_s": 1.0}
CLIENTS = {"duplex": ("duplex", "--pace", "1500000"), "lines": ("lines", "--interval-s", "0.005")}
MAPS = ("flow", "addr", "next")
SETS = [
    f"{name}{version}"
    for name in ("hold", "quiet", "hold_syn", "hold_port", "flow", "addr")
    for version in (4, 6)
]


class Cluster:
    """Daemons of some hosts of a lab, which can be told where to die."""

    def __init__(self, lab: Lab, hosts: str, **overrides: Any) -> None:
        self.lab = lab
        self.hosts = hosts
        timing = TIMING | overrides.pop("timing", {})
        redirect = {"devices": ["eth0"]} | overrides.pop("redirect", {})
        self.daemons = Daemons(lab, hosts, {"timing": timing, "redirect": redirect} | overrides)

    def start(self, host: str, crash_at: str = "") -> None:
        """Start one; it dies where ``crash_at`` says (sockmi.crashpoints)."""
        with _environment(crash_at):
            self.daemons[host].start(timeout_s=30)

    def ready(self) -> None:
        """Wait until all hear each other."""
        wait_for_members(self.lab, self.hosts)

    def kill(self, host: str) -> None:
        """kill -9, if it still runs."""
        self.daemons[host].kill()

    def signal(self, host: str, number: signal.Signals) -> None:
        """Send a signal to a daemon."""
        process = self.daemons[host].process
        assert process is not None
        process.send_signal(number)

    def go_on(self) -> None:
        """Whoever is stopped goes on."""
        for daemon in self.daemons.by_host.values():
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGCONT)

    def died(self, host: str, timeout_s: float = 20.0) -> None:
        """Wait until a daemon has died where it was told to."""
        process = self.daemons[host].process
        assert process is not None
        assert process.wait(timeout_s) == -signal.SIGKILL, self.daemons[host].log()

    def stopped(self, host: str) -> None:
        """Wait until a daemon has stopped (SIGSTOP) where it was told to."""
        pid = self.daemons[host].pid
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def restart_dead(self, order: Sequence[str] | None = None) -> None:
        """Start those that do not run."""
        for host in order or self.hosts:
            process = self.daemons[host].process
            if process is None or process.poll() is not None:
                self.start(host)

    def notes(self) -> str:
        """The logs, for a failure."""
        return "\n".join(f"--- daemon on {host}:\n{self.daemons[host].log(60)}" for host in self.hosts)


@contextlib.contextmanager
def cluster(
    lab: Lab, hosts: str = "ab", crash_at: dict[str, str] | None = None, **overrides: Any
) -> Iterator[Cluster]:
    """Running daemons; those in ``crash_at`` die where it says. At the end none runs."""
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
        one.go_on()
        for host in hosts:
            one.kill(host)


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
        self.join(timeout_s)
        assert not self.is_alive(), "the drain does not end"
        return self.records


class Crashing(Service):
    """A service whose servers may come and go."""

    def serve(self, name: str) -> None:
        """Start another server that imports, in place of the one that there was."""
        words: list[str | Path] = ["serve", self.kind, "--port", str(self.port), "--import"]
        words += ["--rendezvous", self.directory / "contexts"]
        process = self.lab.host(name).python_popen(
            "lab.traffic", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.processes[name] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"


@contextlib.contextmanager
def service(daemons: Cluster, kind: str, hosts: str, directory: Path, **options: Any) -> Iterator[Crashing]:
    """As `scenario.service`. After an outage the peer has many holes, and SACKs may forget some."""
    one = Crashing(daemons.lab, kind, hosts, directory, **options)
    with Capture(daemons.lab.host("peer"), f"tcp port {one.port}", directory / "peer.pcap") as capture:
        try:
            one.start()
            yield one
        finally:
            daemons.go_on()  # a process whose tracer is stopped does not end
            one.kill()
    verdict = capture.check(allow={Trouble.SACK_RENEGED})
    assert verdict.clean, str(verdict)


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
        _, self._descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
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

    def __exit__(self, *_: object) -> None:
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


def is_closed(descriptor: int) -> bool:
    """Whether a TCP socket is in CLOSED."""
    with socket.socket(fileno=os.dup(descriptor)) as each:
        return each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"


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


def remotes(serving: Service) -> list[str]:
    """The clients' ends."""
    found = []
    for number in range(len(serving.clients)):
        timeline = serving.directory / f"{serving.kind}-{number}.jsonl"
        until(lambda timeline=timeline: len(timeline.read_text().splitlines()) > 1)
        found.append(json.loads(timeline.read_text().splitlines()[1])["local"])
    return found


def received(serving: Service) -> list[int]:
    """Bytes that each client has received so far, as of its last sample."""
    counts = []
    for number in range(len(serving.clients)):
        lines = (serving.directory / f"{serving.kind}-{number}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines if line.startswith('{"t"')]
        counts.append(samples[-1]["received"] if samples else 0)
    return counts


def flowing(serving: Service) -> None:
    """Every client gets more bytes."""
    before = received(serving)
    until(lambda: all(now > then for now, then in zip(received(serving), before, strict=True)), 8)


def places(serving: Service, hosts: str) -> dict[str, set[str]]:
    """On which hosts there is a socket for each client's connection, dormant ones included."""
    found: dict[str, set[str]] = {remote: set() for remote in remotes(serving)}
    for name in hosts:
        words = ["ss", "--tcp", "--numeric", "--no-header", "state", "connected", "exclude", "time-wait"]
        for line in serving.lab.host(name).run(words).stdout.splitlines():
            remote = (
                line.split()[4].replace("[::ffff:", "").replace("]", "")
                if "ffff" in line
                else line.split()[4]
            )
            if remote in found:
                found[remote].add(name)
    return found


def settled(serving: Service, hosts: str) -> dict[str, str]:
    """Wait until each connection is on one host and bytes flow; where each is."""
    until(lambda: all(len(where) == 1 for where in places(serving, hosts).values()), 30)
    flowing(serving)
    where = places(serving, hosts)
    assert all(len(each) == 1 for each in where.values()), where
    return {remote: each.pop() for remote, each in where.items()}


def histories(lab: Lab, hosts: str) -> dict[str, list[dict[str, Any]]]:
    """The journals' migrations that have an outcome, newest first."""
    return {
        name: [row for page in ask(lab.host(name), "history", limit=1000) for row in page["migrations"]]
        for name in hosts
    }


def open_records(lab: Lab, hosts: str) -> list[dict[str, Any]]:
    """Migrations without an outcome, of all journals."""
    found = []
    for name in hosts:
        journal = Journal(lab.host(name).state_dir / "journal.db")
        found += list(journal.history(is_open=True))
        journal.close()
    return found


def journals_agree(serving: Service, hosts: str, home: str, where: dict[str, str]) -> None:
    """The journals say where each connection is: follow the moves from ``home``."""
    until(lambda: not open_records(serving.lab, hosts), 30)
    rows = histories(serving.lab, hosts)
    moved = {
        (row["migration_id"], row["direction"]): row
        for each in rows.values()
        for row in each
        if row["outcome"] == "moved"
    }
    for remote, host in where.items():
        told = home
        exports = [
            row for (_, direction), row in moved.items() if direction == "export" and row["remote"] == remote
        ]
        for row in sorted(exports, key=lambda row: row["hop"] or 0):
            assert row["from"] == told, (remote, row)
            told = row["to"]
            taken = moved.get((row["migration_id"], "import"))
            assert taken is not None and taken["to"] == told, (row, taken)
        assert told == host, f"{remote} is on {host}, but the journals say {told}: {exports}"


def finish(serving: Service) -> None:
    """End clients and servers; all must be content, but for imports that failed with their daemon."""
    for client in serving.clients:
        client.send_signal(signal.SIGTERM)
    for client in serving.clients:
        output, _ = client.communicate(timeout=60)
        assert client.returncode == 0, output
    for name, process in serving.processes.items():
        if process.poll() == -signal.SIGKILL:
            continue  # the test did that
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        failures = json.loads(output.splitlines()[-1])["failures"]
        wrong = [one for one in failures if not one.startswith("import: ")]
        assert not wrong, f"server on {name}: {output}"


def leftovers(lab: Lab, hosts: str) -> list[str]:
    """What of moved connections is still in the kernels, the journals, the spools and the daemons."""
    found = []
    for name in hosts:
        host = lab.host(name)
        for family, sets in (("inet", SETS), ("netdev", ["next4", "next6"])):
            for each in sets:
                listed = host.run(
                    ["nft", "-j", "list", "map" if each[:-1] in MAPS else "set", family, "sockmi", each]
                )
                [entry] = [one.get("set") or one["map"] for one in json.loads(listed.stdout)["nftables"][1:]]
                if entry.get("elem"):
                    found.append(f"{name}: {each}: {entry['elem']}")
        found += [f"{name}: spooled {path.name}" for path in (host.state_dir / "spool").iterdir()]
        journal = Journal(host.state_dir / "journal.db")
        found += [
            f"{name}: journal: {kind} {records}" for kind in Record if (records := journal.records(kind))
        ]
        found += [f"{name}: open: {record}" for record in journal.history(is_open=True)]
        journal.close()
        now = status(host)
        counts = [now["migrations_under_way"], now["redirects_in"], now["redirects_out"]]
        counts += [each["length"] for each in now["import_lists"].values()]
        if any(counts):
            found.append(f"{name}: status {now}")
    return found


def nothing_left(lab: Lab, hosts: str) -> None:
    """Once the connections have ended, all is as it was before the first of them moved."""

    def clean() -> bool:
        for name in hosts:  # it would last a minute
            lab.host(name).run(["ss", "--kill", "--tcp", "state", "time-wait"])
        return not leftovers(lab, hosts)

    try:
        until(clean, 30)
    except AssertionError:
        raise AssertionError("\n".join(leftovers(lab, hosts))) from None


def tracers(processes: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Who traces the servers: nobody, unless they are frozen."""
    lines = [
        Path(f"/proc/{one.pid}/status").read_text().splitlines() for one in processes if one.poll() is None
    ]
    return [
        int(line.split()[1])
        for each in lines
        for line in each
        if line.startswith("TracerPid") and line.split()[1] != "0"
    ]
