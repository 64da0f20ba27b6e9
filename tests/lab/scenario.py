# SPDX-License-Identifier: MIT
"""A service on a lab host, clients at the peer, and moves between: what the migration tests share."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.capture import Capture, Trouble
from lab.daemons import Daemons
from lab.host import Host
from lab.labs import Lab
from lab.plan import PATIENCE
from sockmi.client import Control
from sockmi.refusal import Code
from tests.laws import clean

PORTS = {"lines": 7000, "duplex": 9000, "download": 8080}


def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Poll; AssertionError when it takes too long (in an emulated guest: much longer)."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def ask(host: Host, op: str, **fields: Any) -> list[dict[str, Any]]:
    """All lines of the answer of a host's daemon."""
    with Control(host.control_socket, timeout_s=60 * PATIENCE) as control:
        return list(control.call(op, **fields))


def status(host: Host) -> dict[str, Any]:
    """The daemon's status."""
    [answer] = ask(host, "status")
    return answer


def wait_for_members(lab: Lab, hosts: str) -> None:
    """Every daemon has heard all the others."""

    def heard(name: str) -> int:
        [answer] = ask(lab.host(name), "groups")
        return len({member["host"] for group in answer["groups"] for member in group["members"]})

    until(lambda: all(heard(name) == len(hosts) - 1 for name in hosts))


@contextlib.contextmanager
def daemons(
    lab: Lab,
    hosts: str = "abc",
    *,
    unicast: bool = False,
    engines: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Iterator[Daemons]:
    """Daemons that know each other. No freeze is given up only because this machine is busy.

    ``engines``: of some hosts; the others choose for themselves.
    """
    overrides["timing"] = {"freeze_deadline_s": 5.0} | overrides.get("timing", {})
    made = Daemons(lab, hosts, overrides, unicast=unicast)
    for name, engine in (engines or {}).items():
        made[name].config["engine"] = engine
    with made as running:
        wait_for_members(lab, hosts)
        try:
            yield running
        except BaseException as error:
            for name in hosts:
                error.add_note(f"--- what did not move on {name}: {unmoved(lab.host(name))}")
            raise


def unmoved(host: Host) -> list[Any]:
    """For a report: the migrations of a host that did not end as `moved`, and its state."""
    try:
        rows = [one for answer in ask(host, "history") for one in answer["migrations"]]
        [now] = ask(host, "info")
        keys = ("migration_id", "direction", "step", "outcome", "refusal")
        found = [{key: row.get(key) for key in keys} for row in rows if row["outcome"] != "moved"]
        return [*found, now, status(host)]
    except Exception as error:  # a report must not hide what it reports
        return [repr(error)]


def drain(host: Host, to: str | None = None, **wanted: Any) -> list[dict[str, Any]]:
    """Move all connected sockets that the filter selects; their records."""
    wanted.setdefault("kinds", ["connected"])
    answers = ask(host, "drain", filter=wanted, to=to)
    return [record for answer in answers for record in answer["migrations"]]


@contextlib.contextmanager
def captured_connection(
    lab: Lab, pcap: Path, address: str, port: int, *, device: str = "eth0", but: str = ""
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """From the peer to that address of a: (the peer's end, a's). What passes is held to the laws.

    ``but``: not what is to or from this address.
    """
    seen = f"tcp port {port}" + (f" and not host {but}" if but else "")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        Capture(lab.host("peer"), seen, pcap, device=device) as capture,
        lab.host("a").socket(family) as listener,
        lab.host("peer").socket(family) as client,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        client.settimeout(20)
        client.connect((address, port))
        ours, _unused = listener.accept()
        listener.close()
        with ours:
            ours.settimeout(20)
            yield client, ours
    clean(capture.check())


@dataclass(slots=True)
class Service:
    """Servers of one kind on several hosts: the first listens, the others import."""

    lab: Lab
    kind: str
    hosts: str
    directory: Path
    version: int = 4
    listen: str = ""
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    clients: list[subprocess.Popen[str]] = field(default_factory=list)
    active_targets: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """Where it listens."""
        return PORTS[self.kind]

    def start(self) -> None:
        """Start the servers; returns when all are ready and wait for imports."""
        for name in self.hosts:
            words: list[str | Path] = ["serve", self.kind, "--port", str(self.port), "--import"]
            words += ["--rendezvous", self.directory / "contexts"]
            if name in self.active_targets:
                words += ["--to", self.active_targets[name]]
            if name == self.hosts[0]:
                words += ["--listen", self.listen or self.lab.host(name).address(self.version)]
            self.processes[name] = self.lab.host(name).python_popen(
                "lab.traffic", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for name, process in self.processes.items():
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "ready\n", f"server on {name}: {line}{process.stdout.read()}"
        for name in self.hosts:
            until(lambda name=name: status(self.lab.host(name))["import_lists"]["connected"]["waiting"] > 0)

    def client(self, command: str, *options: str | Path) -> subprocess.Popen[str]:
        """Start a client at the peer."""
        address = self.listen or self.lab.host(self.hosts[0]).address(self.version)
        timeline = self.directory / f"{self.kind}-{len(self.clients)}.jsonl"
        process = self.lab.host("peer").python_popen(
            "lab.traffic", command, address, str(self.port), "--timeline", timeline, *options,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.clients.append(process)
        return process

    def connected(self, count: int) -> None:
        """Wait until so many clients are connected."""
        host = self.lab.host(self.hosts[0])
        wanted = {"local_port": self.port, "kinds": ["connected"]}
        until(lambda: sum(len(one["sockets"]) for one in ask(host, "list", filter=wanted)) >= count)

    def move(self, source: str, target: str) -> list[dict[str, Any]]:
        """Passive: the daemon takes all connections of the service away from its owner.

        In an emulated guest a host may take another for lost, before anything is frozen: then once more.
        """
        for _turn in range(3 if PATIENCE > 1 else 1):
            records = drain(self.lab.host(source), target, local_port=self.port)
            if {(record.get("refusal") or {}).get("code") for record in records} != {Code.PEER_LOST}:
                break
        for record in records:
            assert record["outcome"] == "moved", record
        assert len(records) == len(self.clients)
        return records

    def move_actively(self, source: str, target: str) -> None:
        """Active: the server exports its connections itself, with their contexts."""
        before = status(self.lab.host(target))["outcomes"].get("moved", 0)
        self.processes[source].send_signal(signal.SIGUSR1)
        goal = before + len(self.clients)
        until(lambda: status(self.lab.host(target))["outcomes"].get("moved", 0) >= goal)

    def finish(self) -> list[dict[str, Any]]:
        """End the clients, then the servers; all must be content. Returns the clients' results."""
        results = []
        for client in self.clients:
            if client.poll() is None:
                client.send_signal(signal.SIGTERM)
        for client in self.clients:
            output, _unused = client.communicate(timeout=60 * PATIENCE)
            assert client.returncode == 0, output
            results.append(json.loads(output.splitlines()[-1]))
        for name, process in self.processes.items():
            process.send_signal(signal.SIGTERM)
            output, _unused = process.communicate(timeout=30 * PATIENCE)
            assert process.returncode == 0, f"server on {name}: {output}"
        return results

    def last_words(self) -> str:
        """For a report: end what still runs, and what it says at the end."""
        said = []
        running = [(f"client {n}", process) for n, process in enumerate(self.clients)]
        running += [(f"server on {name}", process) for name, process in self.processes.items()]
        for name, process in running:
            process.terminate()
            try:
                output, _unused = process.communicate(timeout=10)
            except (subprocess.TimeoutExpired, ValueError) as error:  # stuck; already read to its end
                output = repr(error)
            said.append(f"--- {name} (code {process.returncode}): {output}")
        return "\n".join(said)

    def kill(self) -> None:
        """Whatever still runs."""
        for process in [*self.clients, *self.processes.values()]:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def service(lab: Lab, kind: str, hosts: str, directory: Path, **options: Any) -> Iterator[Service]:
    """A running service, and a capture at the peer that must be clean at the end."""
    one = Service(lab, kind, hosts, directory, **options)
    with Capture(lab.host("peer"), f"tcp port {one.port}", directory / f"peer-{hosts}.pcap") as capture:
        try:
            one.start()
            yield one
        except BaseException as error:
            error.add_note(one.last_words())
            raise
        finally:
            one.kill()
    # This engine cannot carry out-of-order data (its fidelity report says so): what a loss had put out of
    # order at the moment of a move is acknowledged anew.
    verdict = capture.check(allow={Trouble.SACK_RENEGED})
    clean(verdict)
