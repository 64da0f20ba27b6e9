# SPDX-License-Identifier: MIT
"""kill -9 of a daemon while a socket is in repair: its owner goes on as if nothing had been."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sockmi.crashpoints import VARIABLE
from sockmi.engine.duplicate import duplicate
from tests.lab.crash_lab import CLOSED, state_of
from tests.lab.scenario import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

CAPTURE = ["capture.inlined", "capture.peeked", "capture.in-repair"]
UNREAD = b"unread"
#: Options that the daemon changes for a moment, and what the owner has set.
OPTIONS = {
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    "SO_OOBINLINE": (socket.SOL_SOCKET, socket.SO_OOBINLINE, 0),
    "SO_PEEK_OFF": (socket.SOL_SOCKET, 42, 2),
}
DAEMON = """
import sys, time
from sockmi import crashpoints, native
from sockmi.engine import repair
from sockmi.engine.duplicate import duplicate
crashpoints.arm(native.library())
step, record, pid, *sockets = sys.argv[1:]
repair.keep_record(record)
engine, pairs = repair.RepairEngine(), [[int(part) for part in one.split(":")] for one in sockets]
inodes = [inode for _fd, inode in pairs]
fds = [duplicate(int(pid), fd, inode) for fd, inode in pairs]
assert engine.stop(inodes, [int(pid)], 5) == [None] * len(fds)
if step != "capture":
    time.sleep(0.2)  # nothing is held: until nobody acknowledges anything any more
images = [one.image for one in engine.capture(fds)]
if step == "compare":
    engine.compare(fds, images)
elif step != "capture":
    engine.release(fds, images, together=step == "together")
engine.resume(inodes)
"""
#: Does nothing until it is told to: then it reads, writes and ends.
IDLE = """
import socket, sys
ours = socket.socket(fileno=int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(ours.recv(100), flush=True)
ours.sendall(b"written")
sys.stdin.readline()
"""
#: Asks and writes all the time; says what went wrong.
BUSY = """
import os, select, socket, sys
sockets = [socket.socket(fileno=int(word)) for word in sys.argv[1:]]
print("ready", flush=True)
count = 0
try:
    while not select.select([0], [], [], 0)[0]:
        for ours in sockets:
            ours.recv(0, socket.MSG_DONTWAIT)
            if count < 20000:
                ours.send(b"%d " % count, socket.MSG_DONTWAIT)
            assert ours.recv(6, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"unread"
        count += count < 20000
    for ours in sockets:
        assert ours.recv(100) == b"unread"
    print(count, flush=True)
except (OSError, AssertionError) as error:
    print(repr(error), flush=True)
    sys.stdin.readline()
"""


class Owner:
    """A process that alone has one or more sockets; ``peers`` are their other ends."""

    daemon: subprocess.Popen[bytes] | None = None

    def __init__(self, stack: ExitStack, script: str, sockets: int = 1) -> None:
        self.peers: list[socket.socket] = []
        ours = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _turn in range(sockets):
                self.peers.append(stack.enter_context(socket.create_connection(listener.getsockname())))
                self.peers[-1].settimeout(20)
                ours.append(listener.accept()[0])
        for one, peer in zip(ours, self.peers, strict=True):
            one.setsockopt(*OPTIONS["SO_REUSEADDR"])
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.sendall(UNREAD)
        fds = [one.fileno() for one in ours]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
        )
        stack.callback(self.end)
        self.sockets = [(fd, os.fstat(fd).st_ino) for fd in fds]
        for one in ours:
            one.close()
        assert self.line() == b"ready\n"

    def end(self) -> None:
        if self.daemon is not None:  # what a stopped one traces does not end
            self.daemon.kill()
            self.daemon.wait()
        self.process.kill()
        self.process.communicate()

    def tell(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def line(self) -> bytes:
        assert self.process.stdout
        return self.process.stdout.readline()

    def looked_at(self) -> int:
        """A descriptor of ours for its first socket."""
        return duplicate(self.process.pid, *self.sockets[0])

    def options(self) -> dict[str, int]:
        """As they are now."""
        with socket.socket(fileno=self.looked_at()) as one:
            return {name: one.getsockopt(level, option) for name, (level, option, _unused) in OPTIONS.items()}

    def set_options(self) -> None:
        with socket.socket(fileno=self.looked_at()) as one:
            for level, option, value in OPTIONS.values():
                one.setsockopt(level, option, value)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends owners and peers."""
    with ExitStack() as made:
        yield made


def daemon(owner: Owner, point: str, step: str, record: Path) -> subprocess.Popen[bytes]:
    """One that stops the owner, and dies, or stops, at ``point``."""
    sockets = [f"{fd}:{inode}" for fd, inode in owner.sockets]
    owner.daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, step, str(record), str(owner.process.pid), *sockets],
        env=os.environ | {VARIABLE: point},
    )
    return owner.daemon


def killed(owner: Owner, point: str, step: str, record: Path) -> None:
    assert daemon(owner, point, step, record).wait(30) == -signal.SIGKILL


def wanted() -> dict[str, int]:
    return {name: value for name, (_unused, _unused2, value) in OPTIONS.items()}


POINTS = [(point, "capture") for point in CAPTURE] + [
    ("release.arrested", "release"),
    ("release.arrested", "compare"),
]


@pytest.mark.parametrize(("point", "step"), POINTS)
def test_reads_writes_and_ends(stack: ExitStack, tmp_path: Path, point: str, step: str) -> None:
    """No daemon runs again."""
    owner = Owner(stack, IDLE)
    owner.set_options()
    killed(owner, point, step, tmp_path / "record")
    until(lambda: owner.options() == wanted())
    owner.tell()
    assert owner.line() == repr(UNREAD).encode() + b"\n"
    assert owner.peers[0].recv(100) == b"written"
    owner.tell()
    assert owner.peers[0].recv(100) == b""  # a FIN


@pytest.mark.parametrize(("point", "step"), POINTS)
def test_ends_at_once(stack: ExitStack, tmp_path: Path, point: str, step: str) -> None:
    """Its owner is killed as well: the peer is told, though no daemon runs again."""
    owner = Owner(stack, BUSY)
    killed(owner, point, step, tmp_path / "record")
    owner.process.kill()
    with pytest.raises(ConnectionResetError):  # something was not read
        while owner.peers[0].recv(1 << 16):
            pass


@pytest.mark.parametrize(("point", "step"), POINTS)
def test_is_busy(stack: ExitStack, tmp_path: Path, point: str, step: str) -> None:
    """At no moment does the owner, which never rests, see an error, or lose or gain a byte."""
    for turn in range(3):
        owner = Owner(stack, BUSY)
        until(lambda owner=owner: owner.peers[0].recv(1, socket.MSG_PEEK))
        killed(owner, point, step, tmp_path / f"record{turn}")
        owner.tell()
        count = int(owner.line())
        owner.process.wait(20)
        got = b""
        while piece := owner.peers[0].recv(1 << 20):
            got += piece
        assert got == b"".join(b"%d " % number for number in range(count))


def test_goes_all_the_way(stack: ExitStack, tmp_path: Path) -> None:
    """Of what goes together all is closed before its owner runs again: it learns that, and nothing else."""
    owner = Owner(stack, BUSY, sockets=20)
    killed(owner, "release.arrested", "together", tmp_path / "record")
    assert error_number(owner.line()) == errno.ECONNABORTED
    for fd, inode in owner.sockets:
        ours = duplicate(owner.process.pid, fd, inode)
        assert state_of(ours) == CLOSED
        os.close(ours)


def error_number(line: bytes) -> int:
    name, _unused, rest = line.decode().partition("(")
    assert name in ("ConnectionAbortedError", "OSError"), line
    return int(rest.split(",")[0])


@pytest.mark.parametrize("point", [*CAPTURE, "release.arrested"])
def test_whoever_would_mend_is_killed_too(stack: ExitStack, tmp_path: Path, point: str) -> None:
    """Then the next daemon does, and knows what to put back."""
    owner, record = Owner(stack, IDLE), tmp_path / "record"
    owner.set_options()
    process = daemon(owner, f"{point}:1:STOP", "capture" if point in CAPTURE else "release", record)
    kill_the_tracer(process)
    process.kill()
    process.wait()
    assert owner.options()["SO_REUSEADDR"] == 2  # in repair
    program = f"""
import os
from sockmi.engine import repair
from sockmi.engine.duplicate import duplicate
repair.keep_record({str(record)!r})
engine = repair.RepairEngine()
for inode in engine.left_in_repair():
    fd = duplicate({owner.process.pid}, {owner.sockets[0][0]}, inode)
    assert engine.end_repair(fd)
    assert not engine.end_repair(fd)
assert not engine.left_in_repair()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert owner.options() == wanted()
    owner.tell()
    assert owner.line() == repr(UNREAD).encode() + b"\n"
    assert owner.peers[0].recv(100) == b"written"


def test_what_another_boot_has_left_is_nobodys(stack: ExitStack, tmp_path: Path) -> None:
    """Its numbers are those of other sockets by now; run_dir need not be in memory."""
    owner, record = Owner(stack, IDLE), tmp_path / "record"
    process = daemon(owner, "release.arrested:1:STOP", "release", record)
    kill_the_tracer(process)
    process.kill()
    process.wait()
    program = f"from sockmi.engine import repair; print(repair.keep_record({str(record)!r}))"

    def left() -> int:
        return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)

    assert left() == 1
    with record.open("r+b") as file:
        file.seek(file.read().index(Path("/proc/sys/kernel/random/boot_id").read_text().strip().encode()))
        file.write(b"0" * 36)
    assert left() == 0


def kill_the_tracer(process: subprocess.Popen[bytes]) -> None:
    """As soon as a daemon has stopped: the child of one of its threads."""
    folder = Path(f"/proc/{process.pid}")
    until(lambda: (folder / "stat").read_text().rpartition(")")[2].split()[0] == "T")
    (tracer,) = "".join(one.read_text() for one in folder.glob("task/*/children")).split()
    os.kill(int(tracer), signal.SIGKILL)


def test_whoever_stops_owners_is_killed_alone(stack: ExitStack, tmp_path: Path) -> None:
    """The daemon ends as well: it would take owners for stopped that run."""
    owner, record = Owner(stack, IDLE), tmp_path / "record"
    process = daemon(owner, "capture.in-repair:1:STOP", "capture", record)
    kill_the_tracer(process)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == -signal.SIGKILL
