# SPDX-License-Identifier: MIT
"""``sysctl -w sockmi.export=...`` from a plain shell, with whole daemons: hosts are network namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from guests.paths import PROJECT
from lab.capture import Capture
from lab.daemons import Daemon, Daemons
from lab.host import Host
from lab.labs import Lab
from sockmi.crashpoints import VARIABLE
from tests.kmod.inside.test_daemons import NAT, Peer, hear
from tests.kmod.module_client import Device
from tests.lab.client_callers import STATES, C, ImportReq
from tests.lab.scenario import ask, daemons, status, until, wait_for_members
from tests.lab.test_engine_states import receive

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
WAIT_MS = Path("/sys/module/sockmi/parameters/sysctl_wait_ms")


@pytest.fixture(scope="module")
def made(lab: Lab) -> Iterator[Daemons]:
    """They take long to start, where processors are emulated: all tests have the same ones."""
    with daemons(lab, "ab", redirect=NAT) as running:
        yield running


@pytest.fixture
def running(lab: Lab, made: Daemons) -> Iterator[Daemons]:
    """Daemons with the kernel engine. A write waits for as long as processors of this decade do not need."""
    for name in "ab":
        if made[name].config.pop("engine", None) or not made[name].answers():
            made[name].restart()
    wait_for_members(lab, "ab")
    with waiting(60_000):
        yield made


@dataclass
class Log:
    """What a daemon writes from now on."""

    daemon: Daemon
    start: int = 0

    def __post_init__(self) -> None:
        self.start = self.daemon.log_file.stat().st_size

    def text(self) -> str:
        return self.daemon.log_file.read_bytes()[self.start :].decode()


@contextlib.contextmanager
def waiting(milliseconds: int) -> Iterator[None]:
    """For so long the module waits for the daemon."""
    before = WAIT_MS.read_text()
    WAIT_MS.write_text(str(milliseconds))
    try:
        yield
    finally:
        WAIT_MS.write_text(before)


class Connection:
    """Of a server on host a, which is this process, with a client at the peer that says numbers."""

    def __init__(self, lab: Lab, version: int = 4) -> None:
        a, peer = lab.host("a"), lab.host("peer")
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with a.socket(family) as listener:
            listener.bind((a.address(version), 0))
            listener.listen()
            self.client = peer.socket(family)
            self.client.settimeout(60)
            self.client.connect(listener.getsockname()[:2])
            self.ours, _unused = listener.accept()
        self.ours.settimeout(60)
        self.port = self.ours.getsockname()[1]
        self.peer = Peer(self.client)
        self.heard = 0

    @property
    def command(self) -> str:
        return f"pid={os.getpid()} fd={self.ours.fileno()}"

    def lives(self, by: socket.socket | None = None) -> None:
        """Every byte arrives, both ways."""
        at = by or self.ours
        hear(at, self.heard, 5)
        self.heard += 5
        said = secrets.token_bytes(20_000)
        at.sendall(said)
        assert receive(self.client, len(said)) == said

    def end(self, by: socket.socket | None = None) -> None:
        at = by or self.ours
        hear(at, self.heard, self.peer.silence() - self.heard)
        at.close()
        assert self.client.recv(1) == b""
        self.client.close()
        self.ours.close()


@contextlib.contextmanager
def connection(lab: Lab, version: int = 4) -> Iterator[Connection]:
    one = Connection(lab, version)
    try:
        yield one
    finally:
        one.peer.silence()


class Importer:
    """An application in import_socket() of libsockmi on a host."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch, version: int = 4) -> None:
        monkeypatch.setenv("SOCKMI_CLIENT_LIBRARY", str(PROJECT / "daemon/libsockmi/build/libsockmi.so.0"))
        monkeypatch.setenv("SOCKMI_CONTROL", str(host.control_socket))
        self.socket = host.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        self._requests = (ImportReq * 1)()
        self._requests[0].fd, self._requests[0].states = self.socket.fileno(), STATES["connected"]
        self._count = 0
        self._error = 0
        self._thread = threading.Thread(target=self._take, args=[C().library])
        self._thread.start()
        until(lambda: not self._thread.is_alive() or self._waits(host))

    @staticmethod
    def _waits(host: Host) -> bool:
        """Else it may have got what was listed, at once."""
        waiting: int = status(host)["import_lists"]["connected"]["waiting"]
        return waiting > 0

    def _take(self, library: ctypes.CDLL) -> None:
        self._count = library.import_socket(self._requests, 1, 300_000)
        self._error = ctypes.get_errno()

    def got(self) -> socket.socket:
        self._thread.join(300)
        assert self._count == 1, os.strerror(self._error)
        self.socket.settimeout(60)
        return self.socket


def shell(host: Host, command: str) -> subprocess.CompletedProcess[str]:
    return host.run(["sh", "-c", f'sysctl -w sockmi.export="{command}"'], check=False, timeout_s=120)


def reading(host: Host) -> str:
    return host.run(["sysctl", "-n", "sockmi.export"]).stdout.strip()


def refused(host: Host, command: str, error: int) -> str:
    """The write ends with that errno; what a read shows then."""
    done = shell(host, command)
    assert done.returncode, done.stdout
    assert os.strerror(error) in done.stderr, (done.stderr, reading(host))
    read = reading(host)
    assert read.startswith(f"{command}: ")
    return read


@pytest.mark.parametrize("engine", ["kernel", "repair"])
def test_moves_to_who_waits(
    lab: Lab, running: Daemons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """To an application in import_socket(), whichever engine is there: every byte, and no RST."""
    b = lab.host("b")
    if engine == "repair":
        running["b"].config["engine"] = engine
        running["b"].restart()
        wait_for_members(lab, "ab")
    assert [status(lab.host(name))["engine"] for name in "ab"] == ["kernel", engine]
    for version, to in ((4, ""), (4, f" to={b.address4}"), (6, f" to={b.address6}")):
        with (
            connection(lab, version) as one,
            Capture(lab.host("peer"), f"tcp port {one.port}", tmp_path / f"{version}.pcap") as capture,
        ):
            moves(lab, one, Importer(b, monkeypatch, version), to, Log(running["a"]))
        verdict = capture.check()
        assert verdict.clean, str(verdict)


def moves(lab: Lab, one: Connection, importer: Importer, to: str, log: Log) -> None:
    a = lab.host("a")
    one.lives()
    waits = secrets.token_bytes(30_000)
    one.ours.sendall(waits)
    command = one.command + to
    done = shell(a, command)
    assert done.returncode == 0, (done.stderr, reading(a))
    heir = importer.got()
    with pytest.raises(ConnectionAbortedError):
        one.ours.recv(1)
    assert receive(one.client, len(waits)) == waits
    one.lives(heir)
    found = re.fullmatch(f"{command}: ok moved to b, migration ([0-9a-f-]+)", reading(a))
    assert found, reading(a)
    [answer] = ask(a, "info", migration_ids=[found[1]])
    [record] = answer["migrations"]
    assert (record["outcome"], record["to"], record["engine"]) == ("moved", "b", "kernel")
    assert (record["pid"], record["fd"]) == (os.getpid(), one.ours.fileno())
    assert f"sysctl sockmi.export={command} by process" in log.text()
    one.end(heir)


def test_who_cannot_be_reached(lab: Lab, running: Daemons) -> None:
    """An address that no member has, then nobody at all: an errno, a line, and the connection goes on."""
    a, log = lab.host("a"), Log(running["a"])
    with waiting(8_000), connection(lab) as one:
        assert "no-offer" in refused(a, f"{one.command} to=192.0.2.77", errno.EHOSTUNREACH)
        one.lives()
        running["b"].stop()
        assert "no-offer" in refused(a, one.command, errno.EHOSTUNREACH)
        one.lives()
        assert log.text().count(f"{one.command} by process") == 1
        one.end()
    assert log.text().count("(EHOSTUNREACH)") == 2


@pytest.mark.complains("sockmi.export:")
def test_what_cannot_be_moved(lab: Lab, running: Daemons) -> None:
    """Refused by the module or by the daemon."""
    a, log = lab.host("a"), Log(running["a"])
    with connection(lab) as one:
        with a.socket(kind=socket.SOCK_DGRAM) as datagrams:
            read = refused(a, f"pid={os.getpid()} fd={datagrams.fileno()}", errno.EOPNOTSUPP)
            assert "refused, reason 2" in read
        read = refused(a, own_listener(running["a"].pid), errno.EOPNOTSUPP)
        assert "owner-is-daemon" in read
        assert "(ENOTSUP)" in log.text()
        refused(a, f"pid={os.getpid()} fd=4000", errno.EBADF)
        done = shell(a, f"{one.command} to=b")
        assert os.strerror(errno.EINVAL) in done.stderr
        one.lives()
        one.end()


def own_listener(pid: int) -> str:
    """The command that names a TCP socket of the daemon itself."""
    tcp = Path(f"/proc/{pid}/net/tcp").read_text()
    inodes = {line.split()[9] for line in tcp.splitlines()[1:] if line.split()[3] == "0A"}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))
        if found and found[1] in inodes:
            return f"pid={pid} fd={entry.name}"
    raise AssertionError(f"process {pid} does not listen")


def test_several_at_once(lab: Lab, running: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shell gets the answer to its own command; what has moved waits for whoever asks."""
    a, b, log = lab.host("a"), lab.host("b"), Log(running["a"])
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connection(lab)) for _turn in range(6)]
        wrong = f"{many[0].command} to=192.0.2.77"
        commands = [wrong, *(one.command for one in many[1:])]
        shells = [
            a.popen(["sysctl", "-w", f"sockmi.export={command}"], stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        said = [process.communicate(timeout=120)[1] for process in shells]
        assert [process.returncode == 0 for process in shells] == [False, True, True, True, True, True], said
        assert os.strerror(errno.EHOSTUNREACH) in said[0]
        assert log.text().count(": moved to b, migration") == 5
        many[0].lives()
        by_client = {one.client.getsockname(): one for one in many[1:]}
        while by_client:
            heir = Importer(b, monkeypatch).got()
            one = by_client.pop(heir.getpeername())
            one.lives(heir)
            one.end(heir)


def test_the_same_socket_twice(lab: Lab, running: Daemons) -> None:
    a = lab.host("a")
    with waiting(8_000), connection(lab) as one:
        nowhere = f"sockmi.export={one.command} to=192.0.2.77"
        first = a.popen(["sysctl", "-w", nowhere], stderr=subprocess.PIPE, text=True)
        until(lambda: status(a)["migrations_under_way"] == 1)
        assert "already-migrating" in refused(a, one.command, errno.EALREADY)
        assert os.strerror(errno.EHOSTUNREACH) in first.communicate(timeout=60)[1]
        one.end()


@pytest.mark.complains("sockmi.export:")
def test_a_daemon_that_ends_meanwhile(lab: Lab, running: Daemons) -> None:
    """Asked to stop, it undoes what it has begun; killed, the module answers for it; then nobody serves."""
    a = lab.host("a")
    with connection(lab) as one:
        for number, error, text in (
            (signal.SIGTERM, errno.ESHUTDOWN, "shutting-down"),
            (signal.SIGKILL, errno.ECONNRESET, "the daemon ended; its history tells what came of it"),
        ):
            nowhere = f"sockmi.export={one.command} to=192.0.2.77"
            writer = a.popen(["sysctl", "-w", nowhere], stderr=subprocess.PIPE, text=True)
            until(lambda: status(a)["migrations_under_way"] == 1)
            os.kill(running["a"].pid, number)
            assert os.strerror(error) in writer.communicate(timeout=60)[1]
            assert text in reading(a)
            one.lives()
            assert running["a"].process is not None
            running["a"].process.wait(60)
            assert "no daemon" in refused(a, one.command, errno.ENOTCONN)
            running["a"].start()
        one.end()


def test_a_daemon_that_does_not_begin_in_time(lab: Lab, running: Daemons) -> None:
    """The writer's timeout withdraws the command: when the daemon runs again, nothing moves."""
    a, log = lab.host("a"), Log(running["a"])
    with connection(lab) as one:
        with waiting(500):
            os.kill(running["a"].pid, signal.SIGSTOP)
            try:
                assert "nothing was done" in refused(a, one.command, errno.ETIMEDOUT)
            finally:
                os.kill(running["a"].pid, signal.SIGCONT)
        until(lambda: "it was read too late: nothing was done" in log.text())
        assert "the daemon did not begin: nothing was done" in reading(a)
        assert " moved" not in log.text() and status(a)["migrations_under_way"] == 0
        one.lives()
        one.end()


def test_an_importer_that_falls_silent_before_the_commit(lab: Lab, running: Daemons) -> None:
    """It is undone before the writer would have waited too long, and the daemon itself says why."""
    a = lab.host("a")
    with waiting(12_000), connection(lab) as one:
        os.kill(running["b"].pid, signal.SIGSTOP)
        try:
            done = shell(a, one.command)
            assert done.returncode
            assert "nothing was done" not in reading(a) and "under way" not in reading(a)
            assert any(outcome in reading(a) for outcome in ("refused, ", "aborted, ")), reading(a)
        finally:
            os.kill(running["b"].pid, signal.SIGCONT)
        one.lives()
        one.end()


def test_an_importer_that_dies_after_the_commit(
    lab: Lab, running: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer learns that it is under way, the readers the end: it may not be told that it was in vain."""
    a, b = lab.host("a"), lab.host("b")
    with connection(lab) as one:
        running["b"].stop()
        monkeypatch.setenv(VARIABLE, "activate.suspended")
        running["b"].start()
        monkeypatch.delenv(VARIABLE)
        wait_for_members(lab, "ab")
        one.lives()
        with waiting(12_000):
            read = refused(a, one.command, errno.EINPROGRESS)
        assert read == f"{one.command}: under way; read this again"
        assert running["b"].process is not None
        running["b"].process.wait(60)
        running["b"].start()
        importer = Importer(b, monkeypatch)
        until(lambda: reading(a).startswith(f"{one.command}: ok moved to b, migration "))
        heir = importer.got()
        one.lives(heir)
        one.end(heir)


def test_where_another_program_serves(lab: Lab, running: Daemons) -> None:
    """The daemon waits for its turn."""
    a = lab.host("a")
    running["a"].stop()
    with a.entered():
        other = Device(slots=0)
    other.serve()
    log = Log(running["a"])
    running["a"].start()
    until(lambda: "another program serves" in log.text())
    other.close()
    until(lambda: "serves the sysctl sockmi.export now" in log.text())
    with waiting(8_000), connection(lab) as one:
        assert "no-offer" in refused(a, f"{one.command} to=192.0.2.77", errno.EHOSTUNREACH)
        one.end()
