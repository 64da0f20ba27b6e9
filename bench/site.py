# SPDX-License-Identifier: MIT
"""Where the benchmark runs: a lab, its daemons, and the programs in C that play application and peer."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.daemons import Daemons
from lab.host import Host
from lab.labs import Lab
from sockmi.client import Control
from sockmi.redirect.base import Mode
from sockmi.redirect.tables import Tables

PROJECT = Path(__file__).resolve().parent.parent
_LIBRARY = PROJECT / "daemon" / "libsockmi"
_BUILD = PROJECT / ".build" / "bench"
_FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
_serial = itertools.count()

ECHO_PORT, SINK_PORT, BARE_PORT = 7300, 7301, 7302
CONTROL_TIMEOUT_S = 120.0


def build() -> None:
    """Compile the programs that are older than their sources."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parent
    engine = "libsockmi-engine.so"
    libraries = {"bare": engine, "bare_bulk": engine, "server": "libsockmi.so", "peer": ""}
    for name, library in libraries.items():
        made, used = _BUILD / name, [here / f"{name}.c", here / "common.h", here / "forward.h"]
        link = [str(_LIBRARY / "build" / library), f"-Wl,-rpath,{_LIBRARY / 'build'}"] if library else []
        if library:
            used.append(_LIBRARY / "build" / library)
        if made.exists() and made.stat().st_mtime > max(one.stat().st_mtime for one in used):
            continue
        include = [f"-I{_LIBRARY / ('engine' if library == engine else 'include')}"]
        command = ["gcc", *_FLAGS, *include, "-o", made, here / f"{name}.c", *link, "-lpthread"]
        subprocess.run([str(word) for word in command], check=True, timeout=60)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll; TimeoutError says what did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.005)


def ask(host: Host, op: str, **fields: Any) -> list[dict[str, Any]]:
    """All lines of the answer of a host's daemon."""
    with Control(host.control_socket, timeout_s=CONTROL_TIMEOUT_S) as control:
        return list(control.call(op, **fields))


class Program:
    """A running program of ours; its output is read line by line.

    ``processors``: those that it may use; the scheduler's choice of another one each time would
    be measured instead of what is to be compared.
    """

    def __init__(self, host: Host | None, name: str, *words: object, processors: Sequence[int]) -> None:
        self.name = name
        command = [
            "taskset",
            "--cpu-list",
            ",".join(map(str, processors)),
            str(_BUILD / name),
            *map(str, words),
        ]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process: subprocess.Popen[bytes] = (
            host.popen(command, **pipes) if host is not None else subprocess.Popen(command, **pipes)
        )
        self._pending = b""

    def line(self, timeout_s: float = 60.0) -> str:
        """The next line; RuntimeError if it ends, TimeoutError if it says nothing."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"{self.name} says nothing for {timeout_s:g} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")
            self._pending += more
        line, _unused, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def lines(self, count: int, timeout_s: float = 60.0) -> list[str]:
        """The next ``count`` lines."""
        return [self.line(timeout_s) for _turn in range(count)]

    def ready(self) -> None:
        """Wait until it says so."""
        if (line := self.line()) != "ready":
            raise RuntimeError(f"{self.name} said {line!r}")

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def finish(self, timeout_s: float = 30.0) -> str:
        """SIGTERM, and the rest of what it wrote; RuntimeError if it failed."""
        self.process.terminate()
        output, _unused = self.process.communicate(timeout=timeout_s)
        if self.process.returncode:
            raise RuntimeError(f"{self.name} ended with code {self.process.returncode}")
        return (self._pending + output).decode()

    def kill(self) -> None:
        """SIGKILL if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Site:
    """A lab; ``daemons`` and ``programs`` start and end what runs there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.a, self.b, self.peer = lab.host("a"), lab.host("b"), lab.host("peer")

    @staticmethod
    def processors(host: Host | None) -> list[int]:
        """Every other one for a, the rest for b: two machines do not wait for each other's. Else all."""
        usable = sorted(os.sched_getaffinity(0))
        first = {"a": 0, "b": 1}.get(host.name) if host is not None else None
        return usable if first is None else usable[first::2] or usable

    @contextlib.contextmanager
    def daemons(self, **overrides: Any) -> Iterator[Daemons]:
        """Daemons without a past on a and b, which know each other."""
        for host in (self.a, self.b):
            shutil.rmtree(host.state_dir, ignore_errors=True)
            host.state_dir.mkdir(parents=True)
            host.run(["nft", "flush", "ruleset"])
        limits = {"max_bound": 1000, "max_listening": 1000, "max_connected": 100_000}
        settings = {"log_level": "info", "imports": limits, **overrides}
        with Daemons(self.lab, "ab", settings) as running:
            for host in (self.a, self.b):
                for task in Path(f"/proc/{running[host.name].pid}/task").iterdir():
                    os.sched_setaffinity(int(task.name), self.processors(host))
            self.acquainted()
            yield running

    def acquainted(self) -> None:
        """Wait until the daemons have heard each other."""

        def heard(host: Host) -> int:
            [answer] = ask(host, "groups")
            return sum(len(group["members"]) for group in answer["groups"])

        until(lambda: heard(self.a) > 0 and heard(self.b) > 0, "the daemons do not hear each other")

    @contextlib.contextmanager
    def programs(self) -> Iterator[Callable[..., Program]]:
        """``start(host, name, *words, cpu=None)``, ``cpu``: one processor; all are killed at the end."""
        running: list[Program] = []

        def start(host: Host | None, name: str, *words: object, cpu: int | None = None) -> Program:
            program = Program(host, name, *words, processors=self.processors(host) if cpu is None else [cpu])
            running.append(program)
            program.ready()
            return program

        try:
            yield start
        finally:
            for program in reversed(running):
                program.kill()

    def bare_words(self, *words: object) -> list[object]:
        """The arguments of a bare program that moves from a to b, in the daemons' tables there."""
        tables = Tables()
        marks = [tables.moved(Mode.FORWARD), tables.local(Mode.FORWARD)]
        tables.close()
        return [
            *(f"/run/netns/{host.namespace}" for host in (self.a, self.b)),
            *(host.address(4) for host in (self.a, self.b)),
            BARE_PORT,
            *words,
            tables.settings.table,
            *(struct.unpack("=I", mark)[0] for mark in marks),
            tables.settings.inject_mark,
        ]

    def wait_for_importers(self, *hosts: Host, count: int = 1) -> None:
        """Applications wait for imports on each of the hosts."""

        def waiting(host: Host) -> int:
            [answer] = ask(host, "status")
            return int(answer["import_lists"]["connected"]["waiting"])

        for host in hosts:
            until(lambda host=host: waiting(host) >= count, f"nobody imports on {host.name}")  # type: ignore[misc]

    def sockets(self, host: Host, port: int, count: int = 1) -> list[dict[str, Any]]:
        """The connections at a local port of a host, when there are ``count``."""

        def rows() -> list[dict[str, Any]]:
            answers = ask(host, "list", filter={"local_port": port, "kinds": ["connected"]})
            return [row for answer in answers for row in answer["sockets"]]

        until(lambda: len(rows()) >= count, f"connections at port {port} of {host.name}")
        return rows()


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A lab of our own, removed at the end."""
    build()
    # As installed: the daemon does not compile itself at each start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with Lab(f"bench{os.getpid()}-{next(_serial)}") as lab:
        yield Site(lab)
