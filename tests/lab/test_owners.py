# SPDX-License-Identifier: MIT
"""Owners: found, stopped and resumed; real processes, real system calls."""

from __future__ import annotations

import array
import ctypes
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from sockmi.engine import owners as engine_owners
from sockmi.engine.listing import list_sockets
from sockmi.engine.owners import Scan, find_holders, pids_of_unit, process_name
from sockmi.refusal import Code

EINTR, ETIMEDOUT = 4, 110
PRELUDE = """
import ctypes, os, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a test that is killed leaves nobody behind
FD = int(sys.argv[1]) if len(sys.argv) > 1 else -1
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def call(name, *args):
    say("calling")
    began = time.monotonic()
    result = getattr(libc, name)(*args)
    say(result, ctypes.get_errno() if result < 0 else 0, round(time.monotonic() - began, 3))
def epoll(ms, fd=None):
    e = libc.epoll_create1(0)
    libc.epoll_ctl(e, 1, FD if fd is None else fd, struct.pack("=IQ", 1, 0))
    call("epoll_wait", e, ctypes.create_string_buffer(64), 4, ms)
"""


class Owners(engine_owners.Owners):
    """Remembered, so that a test that fails leaves nobody stopped."""

    made: ClassVar[list[Owners]] = []

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


class Owner:
    """A process that runs ``script`` with one inherited descriptor."""

    def __init__(self, script: str, fd: int = -1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(fd)],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            pass_fds=[fd] if fd >= 0 else [],
        )
        self.pid = self.process.pid

    def line(self) -> list[str]:
        assert self.process.stdout
        return self.process.stdout.readline().decode().split()

    def state(self) -> str:
        return task_state(self.pid)

    def wait_asleep(self) -> None:
        eventually(lambda: self.state() == "S", f"{self.pid} sleeps")

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def task_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def census() -> tuple[int, int]:
    """Stopped threads, and strays, in the C library's hands."""
    from sockmi.engine.owners import _native

    stopped, strays = ctypes.c_size_t(), ctypes.c_size_t()
    _native().sockmi_stop_census(ctypes.byref(stopped), ctypes.byref(strays))
    return stopped.value, strays.value


@pytest.fixture
def start() -> Iterator[Callable[..., Owner]]:
    made: list[Owner] = []

    def make(script: str, fd: int = -1) -> Owner:
        made.append(Owner(script, fd))
        return made[-1]

    yield make
    while Owners.made:
        Owners.made.pop().resume_all()
    for owner in reversed(made):  # debuggers before what they trace
        owner.end()
    eventually(lambda: census() == (0, 0), "nothing is left stopped")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection over loopback: the end to be owned, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        owned, _unused = listener.accept()
    with owned, peer:
        yield owned, peer


def stop_and_resume(sock: socket.socket, times: int = 5) -> None:
    owners = Owners()
    for _turn in range(times):
        assert owners.stop([inode(sock)], [], 2) == [None]
        owners.resume([inode(sock)])


# -- interrupted system calls: script, how to let it finish, expected (result, errno), seconds --

CALLS = {
    "epoll": ("epoll(-1)", "send", ("1", "0"), None),
    "epoll_pwait": (
        """
        e = libc.epoll_create1(0)
        libc.epoll_ctl(e, 1, FD, struct.pack("=IQ", 1, 0))
        call("epoll_pwait", e, ctypes.create_string_buffer(64), 4, -1, ctypes.create_string_buffer(128))
        """,
        "send", ("1", "0"), None,
    ),
    "epoll_pwait2": (
        """
        e = libc.epoll_create1(0)
        libc.epoll_ctl(e, 1, FD, struct.pack("=IQ", 1, 0))
        call("syscall", 441, e, ctypes.create_string_buffer(64), 4, None, None, 8)
        """,
        "send", ("1", "0"), None,
    ),
    "epoll-short": ("epoll(400)", "", ("0", "0"), (0.4, 3)),
    "recv": ("call('recv', FD, ctypes.create_string_buffer(64), 64, 0)", "send", ("1", "0"), None),
    "read": ("call('read', FD, ctypes.create_string_buffer(64), 64)", "send", ("1", "0"), None),
    "recv-timeout": (
        """
        libc.setsockopt(FD, 1, 20, struct.pack("=qq", 30, 0), 16)
        call("recv", FD, ctypes.create_string_buffer(64), 64, 0)
        """,
        "send", ("1", "0"), None,
    ),
    "accept": ("s = socket.create_server(('127.0.0.1', 0)); say(s.getsockname()[1])\n"
               "call('accept', s.fileno(), None, None)", "connect", None, None),
    "accept-timeout": ("s = socket.create_server(('127.0.0.1', 0)); say(s.getsockname()[1])\n"
                       "libc.setsockopt(s.fileno(), 1, 20, struct.pack('=qq', 30, 0), 16)\n"
                       "call('accept', s.fileno(), None, None)", "connect", None, None),
    "poll": ("call('poll', struct.pack('=ihh', FD, 1, 0), 1, 300)", "", ("0", "0"), (0.3, 3)),
    "select": ("call('select', 0, None, None, None,"
               " ctypes.create_string_buffer(struct.pack('=qq', 0, 300000)))",
               "", ("0", "0"), (0.3, 3)),
    "nanosleep": ("call('nanosleep', struct.pack('=qq', 0, 300000000), None)", "", ("0", "0"), (0.3, 3)),
    "futex": ("word = ctypes.c_int(0)\ncall('syscall', 202, ctypes.byref(word), 0, 0,"
              " struct.pack('=qq', 0, 300000000), None, 0)", "", ("-1", str(ETIMEDOUT)), (0.3, 3)),
    "io_getevents": (
        """
        context = ctypes.c_ulong(0)
        libc.syscall(206, 8, ctypes.byref(context))
        events = ctypes.create_string_buffer(64)
        wanted = struct.pack("=QIIHhIQQqQII", 7, 0, 0, 5, 0, FD, 1, 0, 0, 0, 0, 0)  # IOCB_CMD_POLL
        poll = ctypes.create_string_buffer(wanted, 64)
        libc.syscall(209, context, 1, ctypes.byref(ctypes.c_void_p(ctypes.addressof(poll))))
        call("syscall", 208, context, 1, 1, events, None)
        """,
        "send", ("1", "0"), None,
    ),
    "splice-timeout": (
        """
        libc.setsockopt(FD, 1, 20, struct.pack("=qq", 30, 0), 16)
        reading, writing = os.pipe()
        call("splice", FD, None, writing, None, 64, 0)
        """,
        "send", ("1", "0"), None,
    ),
    "sigwaitinfo": ("signal.pthread_sigmask(signal.SIG_BLOCK, [10])\n"
                    "call('sigwaitinfo', ctypes.create_string_buffer(struct.pack('=Q', 1 << 9), 128), None)",
                    "usr1", ("10", "0"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_stop_is_not_seen(
    name: str, start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    script, finish, expected, seconds = CALLS[name]
    owner = start(script, owned.fileno())
    port = int(owner.line()[0]) if finish == "connect" else 0
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    stop_and_resume(owned)
    client = None
    if finish == "send":
        peer.send(b"x")
    elif finish == "connect":
        client = socket.create_connection(("127.0.0.1", port))
    elif finish == "usr1":
        os.kill(owner.pid, signal.SIGUSR1)
    result, error, took = owner.line()
    if client:
        client.close()
        assert int(result) > 2 and error == "0"
    else:
        assert (result, error) == expected
    if seconds:
        assert seconds[0] <= float(took) <= seconds[1]


def test_a_long_epoll_wait_with_a_timeout_is_interrupted(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """The documented exception: event loops compute the time that remains."""
    owner = start("epoll(30000)", pair[0].fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    stop_and_resume(pair[0], 1)
    assert owner.line()[:2] == ["-1", str(EINTR)]


@pytest.mark.parametrize("when", ["before", "stopped", "after"])
def test_a_real_signal_still_interrupts(
    when: str, start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owner = start("signal.signal(10, lambda *_: say('handled'))\nepoll(-1)", pair[0].fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    owners, number = Owners(), inode(pair[0])
    if when == "after":
        stop_and_resume(pair[0], 1)
        owner.wait_asleep()
        os.kill(owner.pid, signal.SIGUSR1)
    else:
        owners.find([number])
        if when == "before":
            os.kill(owner.pid, signal.SIGUSR1)
        assert owners.stop([number], [], 2) == [None]
        if when == "stopped":
            os.kill(owner.pid, signal.SIGUSR1)
        owners.resume([number])
    words = sorted([owner.line(), owner.line()])  # Python runs the handler when the call has returned
    assert words[0][:2] == ["-1", str(EINTR)] and words[1] == ["handled"]


def test_ignored_signals_do_not_interrupt(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """A traced process is woken even by a signal that it ignores."""
    owned, peer = pair
    owner = start("signal.signal(10, signal.SIG_IGN)\nepoll(-1)", owned.fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    owners = Owners()
    for _turn in range(20):
        owners.find([inode(owned)])
        os.kill(owner.pid, signal.SIGUSR1)
        assert owners.stop([inode(owned)], [], 2) == [None]
        os.kill(owner.pid, signal.SIGUSR1)
        owners.resume([inode(owned)])
    peer.send(b"x")
    assert owner.line()[:2] == ["1", "0"]


def test_a_blocked_send_returns_what_it_has_sent(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """The documented exception: a short count, exact to the byte (as after SIGSTOP and SIGCONT)."""
    owned, peer = pair
    size = 64 << 20
    owner = start(f"call('send', FD, ctypes.create_string_buffer({size}), {size}, 0)", owned.fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    stop_and_resume(owned, 1)
    sent, error, _unused = owner.line()
    assert 0 < int(sent) < size and error == "0"
    owner.process.wait()
    owned.close()
    received = 0
    while chunk := peer.recv(1 << 20):
        received += len(chunk)
    assert received == int(sent)


# -- whom a stop reaches --


def test_every_thread_stops_and_runs_again(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owner = start(
        """
        for _ in range(40): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        say("ready")
        epoll(-1)
        """,
        pair[0].fileno(),
    )
    assert owner.line() == ["ready"]
    owners, number = Owners(), inode(pair[0])
    tasks = [int(p.name) for p in Path(f"/proc/{owner.pid}/task").iterdir()]
    assert len(tasks) == 41
    assert owners.stop([number], [owner.pid], 2) == [None]
    assert census() == (41, 0)
    assert {task_state(tid) for tid in tasks} == {"t"}
    assert owners.stopped_pids() == {owner.pid}
    owners.resume([number])
    eventually(lambda: {task_state(tid) for tid in tasks} == {"S"}, "all threads sleep again")


def test_the_main_thread_may_have_ended(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owner = start(
        """
        def rest():
            while True: time.sleep(0.01)
        threading.Thread(target=rest).start()
        say("ready")
        libc.syscall(60, 0)  # exit of this thread alone
        """,
        pair[0].fileno(),
    )
    assert owner.line() == ["ready"]
    eventually(lambda: owner.state() == "Z", "the main thread has ended")
    owners, number = Owners(), inode(pair[0])
    assert set(owners.find([number])[number]) == {owner.pid}
    assert owners.stop([number], [], 2) == [None]
    assert census() == (1, 0)
    owners.resume([number])


def test_nested_stops_count(start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    os.set_inheritable(peer.fileno(), True)
    owner = start("say('ready'); time.sleep(60)", owned.fileno())
    assert owner.line() == ["ready"]
    owner.wait_asleep()
    owners, number = Owners(), inode(owned)
    assert owners.stop([number], [], 2) == [None]
    assert owners.stop([number, number], [], 2) == [None, None]
    owners.resume([number])
    owners.resume([number])
    assert owner.state() == "t"
    owners.resume([number])
    eventually(lambda: owner.state() == "S", "it runs")
    owners.resume([number])  # one too many is harmless


def test_sockets_that_share_an_owner(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    owner = start("say('ready'); time.sleep(60)", owned.fileno())
    other = start("say('ready'); time.sleep(60)", peer.fileno())
    assert owner.line() == other.line() == ["ready"]
    owners, first, second = Owners(), inode(owned), inode(peer)
    assert owners.stop([first, second], [], 2) == [None, None]
    assert owners.stopped_pids() == {owner.pid, other.pid}
    owners.resume([first])
    eventually(lambda: owner.state() == "S", "the first runs")
    assert other.state() == "t"
    owners.resume([second])


def test_forked_and_passed_descriptors_are_found(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, _unused = pair
    parent = start("child = os.fork()\nif child: say(child)\ntime.sleep(60)", owned.fileno())
    child = int(parent.line()[0])
    here, there = socket.socketpair()
    with here, there:
        receiver = start(
            """
            message = socket.socket(fileno=FD).recvmsg(1, 64)
            say("ready"); time.sleep(60)
            """,
            there.fileno(),
        )
        rights = array.array("i", [owned.fileno()])
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert receiver.line() == ["ready"]
        owners, number = Owners(), inode(owned)
        try:
            assert set(owners.find([number])[number]) == {parent.pid, child, receiver.pid}
            assert owners.stop([number], [], 2) == [None]
            assert {task_state(pid) for pid in (parent.pid, child, receiver.pid)} == {"t"}
            owners.resume([number])
        finally:
            os.kill(child, signal.SIGKILL)


def test_what_another_scan_has_found_is_not_looked_for_again(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """Once, and for seconds; a child that the owner has made since is found all the same."""
    owned, peer = pair
    parent = start(
        """
        say("ready")
        socket.socket(fileno=os.dup(FD)).recv(1)
        child = os.fork()
        if child: say(child)
        time.sleep(60)
        """,
        owned.fileno(),
    )
    assert parent.line() == ["ready"]
    owners, number, scan = Owners(), inode(owned), Scan.now()
    found, rings = find_holders([number])
    assert set(found[number]) == {parent.pid}
    peer.send(b"x")
    child = int(parent.line()[0])
    try:
        owners.remember(scan, found, rings)
        assert set(owners.find([number])[number]) == {parent.pid}
        assert owners.stop([number], [], 2) == [None]
        assert {task_state(pid) for pid in (parent.pid, child)} == {"t"}
        owners.resume([number])
        owners.remember(scan, found, rings)
        owners.find([number])
        assert set(owners.find([number])[number]) == {parent.pid, child}
        owners.remember(replace(scan, time_s=scan.time_s - 10), found, rings)
        assert set(owners.find([number])[number]) == {parent.pid, child}
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_scan_in_a_thread_does_not_disturb_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forgets what nobody has asked for lately: not what is about to be stopped."""
    owners, scan = Owners(), Scan.now()
    owners.remember(replace(scan, time_s=scan.time_s - 1000), {1: {}}, set())
    scans = threading.Thread(target=owners.find, args=([2],))

    def meanwhile(_unused: object) -> None:
        scans.start()
        scans.join(1)

    monkeypatch.setattr(owners, "_refresh", meanwhile)
    assert owners.stop([1], [], 1) == [None]
    scans.join(10)
    assert not scans.is_alive()
    owners.resume([1])


def test_a_descriptor_passed_after_the_scan_is_a_stranger(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, _unused = pair
    here, there = socket.socketpair()
    with here, there:
        late = start("say('up')\nm = socket.socket(fileno=FD).recvmsg(1, 64)\nsay('got')\ntime.sleep(60)",
                     there.fileno())  # fmt: skip
        assert late.line() == ["up"]
        owner = start("say('ready'); time.sleep(60)", owned.fileno())
        assert owner.line() == ["ready"]
        owners, number = Owners(), inode(owned)
        assert owners.stop([number], [], 2) == [None]
        assert owners.strangers([number]) == {}
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [owned.fileno()]))])
        assert late.line() == ["got"]
        assert owners.strangers([number]) == {number: {late.pid}}
        owners.resume([number])


STORMS = {
    "fork": """
        say("ready")
        while True:
            if not os.fork():
                time.sleep(0.002); os._exit(0)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
    """,
    "thread": """
        say("ready")
        while True:
            for t in [threading.Thread(target=time.sleep, args=(0.0005,)) for _ in range(4)]: t.start()
    """,
    "exec": """
        say("ready")
        os.set_inheritable(FD, True)
        again = 'n=$0; [ $n = 0 ] || { sleep 0.001; exec sh -c "$1" $((n-1)) "$1"; }'
        os.execv("/bin/sh", ["sh", "-c", again, "100000", again])
    """,
    "orphan": """
        say("ready")
        end = time.monotonic() + 60         # whatever becomes of the test
        while time.monotonic() < end:
            if os.fork(): os._exit(0)       # only the orphan goes on
    """,
}


@pytest.mark.parametrize("storm", STORMS)
def test_storms_come_to_rest(
    storm: str, start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """After a stop no holder runs, whatever was being born."""
    owned, _unused = pair
    owner = start(8 * " " + "os.setpgid(0, 0)" + STORMS[storm], owned.fileno())
    assert owner.line() == ["ready"]
    owners, number = Owners(), inode(owned)
    rounds = 0
    try:
        for _turn in range(25):
            owners.find([number])
            time.sleep(0.002)  # let some be born between the scan and the stop
            verdict = owners.stop([number], [], 2)[0]
            if verdict is not None:  # a child in vfork or exec may need longer than we give it
                assert verdict.code is Code.OWNER_UNSTOPPABLE, verdict
                print(verdict)
                continue
            rounds += 1
            # A chain of processes that fork and end at once can outrun every look (see owners.py); with
            # it the test shows that a stop ends in time and leaves nobody stopped.
            if storm != "orphan":
                states = {pid: task_state(pid) for pid in find_holders([number])[0].get(number, {})}
                assert set(states.values()) <= set("tZXD"), states  # D: in vfork, its child is stopped
                assert owners.strangers([number]) == {}
            owners.resume([number])
    finally:
        # All at once: a chain of forks outruns whoever looks for its members one by one.
        os.killpg(owner.pid, signal.SIGKILL)
    eventually(lambda: not find_holders([number])[0].get(number), "the storm is over")
    assert rounds >= 20


def test_a_descriptor_that_moves_down_is_found(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    """As every import does it (dup2, close), between the two looks of a scan at its two places."""
    owned, _unused = pair
    owner = start(
        """
        import resource
        both = {signal.SIGUSR1, signal.SIGUSR2}
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        low = os.open("/dev/null", os.O_RDONLY)
        many = [os.open("/dev/null", os.O_RDONLY) for i in range(4000)]
        high = os.dup(FD)
        os.close(FD)
        say("ready")
        while True:
            source, target = (high, low) if signal.sigwait(both) == signal.SIGUSR1 else (low, high)
            os.dup2(source, target)
            os.close(source)
            say("moved")
        """,
        owned.fileno(),
    )
    assert owner.line() == ["ready"]
    number = inode(owned)
    began = time.monotonic()
    assert set(find_holders([number])[0][number]) == {owner.pid}
    scan_s = time.monotonic() - began
    for turn in range(40):
        moving = threading.Timer(scan_s * turn / 40, os.kill, (owner.pid, signal.SIGUSR1))
        moving.start()
        found = find_holders([number])[0]
        assert owner.line() == ["moved"]
        assert set(found.get(number, {})) == {owner.pid}, f"missed at the {turn + 1}th time"
        os.kill(owner.pid, signal.SIGUSR2)
        assert owner.line() == ["moved"]


def test_a_process_stopped_by_a_signal_stays_stopped(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    owner = start("epoll(-1)", owned.fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    os.kill(owner.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(owner.pid, os.WUNTRACED)[1])
    stop_and_resume(owned, 3)
    eventually(lambda: owner.state() == "T", "it is stopped as it was")
    assert os.waitpid(owner.pid, os.WUNTRACED | os.WNOHANG | os.WCONTINUED) == (0, 0), (
        "its parent saw nothing"
    )
    owners = Owners()
    assert owners.stop([inode(owned)], [], 2) == [None]
    os.kill(owner.pid, signal.SIGCONT)
    assert owner.state() == "t", "SIGCONT does not undo our stop"
    owners.resume([inode(owned)])
    eventually(lambda: owner.state() == "S", "it was continued")
    peer.send(b"x")
    result = owner.line()
    assert result[:2] in (["1", "0"], ["-1", str(EINTR)])  # SIGSTOP itself interrupts epoll_wait


def test_a_process_killed_while_stopped_is_reaped_by_its_parent(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, _unused = pair
    # The owner is a grandchild: what we trace and what we wait for must not be the same.
    script = "p = os.fork()\nif not p: time.sleep(60)\nsay(p)\nsay(os.waitpid(p, 0)[1])"
    parent = start(script, owned.fileno())
    child = int(parent.line()[0])
    owners, number = Owners(), inode(owned)
    assert owners.stop([number], [], 2) == [None]
    os.kill(child, signal.SIGKILL)
    owners.resume([number])
    assert parent.line() == [str(int(signal.SIGKILL))]


TRACER = """
import sys, time
from sockmi.engine.owners import Owners
print(Owners().stop([int(sys.argv[1])], [], 5), flush=True)
time.sleep(60)
"""


def test_the_kernel_lets_go_when_the_daemon_is_killed(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    owner = start("epoll(-1)", owned.fileno())
    assert owner.line() == ["calling"]
    owner.wait_asleep()
    number = inode(owned)
    duplicate = os.dup(owned.fileno())
    owned.close()  # this process must not be stopped as a holder
    os.close(duplicate)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", TRACER, str(number)], stdout=subprocess.PIPE, env=environment
    ) as daemon:
        assert daemon.stdout
        assert daemon.stdout.readline() == b"[None]\n"
        assert owner.state() == "t"
        daemon.kill()
    eventually(lambda: owner.state() == "S", "it runs again")
    peer.send(b"x")
    assert owner.line()[:2] == ["1", "0"]


# -- refusals --


def test_a_debugger_is_named(start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]) -> None:
    owned, _unused = pair
    owner = start("say('ready'); time.sleep(60)", owned.fileno())
    assert owner.line() == ["ready"]
    debugger = start(f"libc.ptrace(0x4206, {owner.pid}, None, None); say('attached'); time.sleep(60)")
    assert debugger.line() == ["attached"]
    owners, number = Owners(), inode(owned)
    for refusal in (owners.verdicts([number])[0], owners.stop([number], [], 1)[0]):
        assert refusal and refusal.code is Code.OWNER_TRACED
        assert f"pid {debugger.pid}" in refusal.message
    assert owner.state() == "S"


def test_io_uring_is_refused(start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    script = """
        ring = libc.syscall(425, 4, ctypes.create_string_buffer(120))
        assert ring >= 0
        {more}
        say("ready"); time.sleep(60)
    """
    plain = start(script.format(more=""), owned.fileno())
    registered = start(
        script.format(more="assert not libc.syscall(427, ring, 2, (ctypes.c_int * 1)(FD), 1); os.close(FD)"),
        peer.fileno(),
    )
    assert plain.line() == registered.line() == ["ready"]
    owners = Owners()
    for number in (inode(owned), inode(peer)):
        for refusal in (owners.verdicts([number])[0], owners.stop([number], [], 1)[0]):
            assert refusal and refusal.code is Code.OWNER_IO_URING
    assert find_holders([inode(peer)])[0] == {inode(peer): {registered.pid: [-1]}}
    assert owners.stopped_pids() == set()


def test_the_daemon_itself_is_refused_and_its_duplicates_do_not_count(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, _unused = pair
    owners, number = Owners(), inode(owned)
    refusal = owners.stop([number], [os.getpid()], 1)[0]
    assert refusal and refusal.code is Code.OWNER_IS_DAEMON
    assert owners.find([number]) == {number: {}}
    assert owners.stop([number], [], 1) == [None]  # nobody else holds it
    assert owners.stopped_pids() == set()
    owners.resume([number])


def test_a_parent_in_vfork_counts_as_stopped(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """It sleeps uninterruptibly until its child execs or ends; that child is a holder too."""
    source, program = tmp_path / "vfork.c", tmp_path / "vfork"
    source.write_text(
        "#include <unistd.h>\n#include <sys/wait.h>\n"
        "int main(void) { pid_t p = vfork(); if (!p) { usleep(800000); _exit(0); }"
        ' write(1, "done\\n", 5); wait(0); pause(); }\n'
    )
    subprocess.run(["gcc", "-w", "-o", str(program), str(source)], check=True, timeout=30)
    owner = start(f"os.set_inheritable(FD, True); os.execv({str(program)!r}, ['vfork'])", pair[0].fileno())
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children")
    eventually(lambda: owner.state() == "D" and children.read_text(), "it is in vfork")
    child = int(children.read_text())
    owners, number = Owners(), inode(pair[0])
    assert owners.stop([number], [], 1) == [None]
    assert owners.stopped_pids() == {owner.pid, child}
    assert (owner.state(), task_state(child)) == ("D", "t")
    owners.resume([number])
    assert owner.line() == ["done"]
    eventually(lambda: owner.state() == "S", "it was let go as soon as it could stop")
    stop_and_resume(pair[0], 1)


def test_a_clock_that_is_set_back_keeps_nobody_stopped(tmp_path: Path) -> None:
    """Who cannot be let go at once is let go soon; here the wall clock was an hour ahead when it was read."""
    source, ahead = tmp_path / "ahead.c", tmp_path / "ahead.so"
    source.write_text(
        "#include <sys/syscall.h>\n#include <time.h>\n#include <unistd.h>\n"
        "int clock_gettime(clockid_t id, struct timespec *now)\n"
        "{ long result = syscall(SYS_clock_gettime, id, now);"
        " if (id == CLOCK_REALTIME) now->tv_sec += 3600; return (int)result; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(ahead), str(source)], check=True, timeout=30)
    test = f"{__file__}::{test_a_parent_in_vfork_counts_as_stopped.__name__}"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = os.environ | {"LD_PRELOAD": str(ahead)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE in this kernel")
def test_an_unstoppable_owner_is_refused_and_runs_on(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """A file system that never answers keeps its users in uninterruptible sleep."""
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    assert not libc.mount(b"none", os.fsencode(tmp_path), b"fuse", 0, options), ctypes.get_errno()
    try:
        owner = start(
            f"""
            say("calling")
            try: os.stat({str(tmp_path / "file")!r})
            except OSError as e: say(e.errno)
            time.sleep(60)
            """,
            pair[0].fileno(),
        )
        assert owner.line() == ["calling"]
        eventually(lambda: owner.state() in "DS", "it waits for the file system")
        owners, number = Owners(), inode(pair[0])
        refusal = owners.stop([number], [], 0.05)[0]
        assert refusal and refusal.code is Code.OWNER_UNSTOPPABLE and str(owner.pid) in refusal.message
        assert owners.stopped_pids() == set()
        assert census() == (0, 1)
        again = owners.stop([number], [], 0.01)[0]  # and once more, with the first try still pending
        assert again and again.code is Code.OWNER_UNSTOPPABLE
    finally:
        libc.umount2(os.fsencode(tmp_path), 1 | 2)  # MNT_FORCE | MNT_DETACH
        os.close(fuse)
    assert owner.line() == [str(107)]  # ENOTCONN: the call went on as if we had not been there
    eventually(lambda: owner.state() == "S" and census() == (0, 0), "it was let go as soon as it stopped")
    stop_and_resume(pair[0], 1)


def test_one_refusal_does_not_hold_the_others(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    good = start("say('ready'); time.sleep(60)", owned.fileno())
    bad = start("say('ready'); time.sleep(60)", peer.fileno())
    helper = start("say('ready'); time.sleep(60)", peer.fileno())
    assert good.line() == bad.line() == helper.line() == ["ready"]
    debugger = start(f"libc.ptrace(0x4206, {bad.pid}, None, None); say('attached'); time.sleep(60)")
    assert debugger.line() == ["attached"]
    owners = Owners()
    verdicts = owners.stop([inode(owned), inode(peer)], [], 2)
    assert verdicts[0] is None
    assert verdicts[1] and verdicts[1].code is Code.OWNER_TRACED
    assert owners.stopped_pids() == {good.pid}
    eventually(lambda: helper.state() == "S", "who was stopped for the refused socket alone runs")
    owners.resume([inode(owned)])


def test_an_owner_that_has_ended_is_no_obstacle(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owner = start("say('ready'); time.sleep(60)", pair[0].fileno())
    assert owner.line() == ["ready"]
    owners, number = Owners(), inode(pair[0])
    assert owner.pid in owners.find([number])[number]
    owner.end()
    assert owners.stop([number], [], 1) == [None]
    owners.resume([number])


# -- listing --


def test_sockets_are_listed_with_their_holders(
    start: Callable[..., Owner], pair: tuple[socket.socket, socket.socket]
) -> None:
    owned, peer = pair
    owner = start("say('ready'); time.sleep(60)", owned.fileno())
    assert owner.line() == ["ready"]
    peer.send(b"hello")
    eventually(lambda: owned.recv(16, socket.MSG_PEEK) == b"hello", "the bytes are there")
    (listed,) = [s for s in list_sockets({owner.pid}) if s.inode == inode(owned)]
    assert (listed.state, listed.receive_queue, listed.family) == ("ESTABLISHED", 5, socket.AF_INET)
    assert str(listed.local) == "{}:{}".format(*owned.getsockname())
    assert listed.remote and listed.remote.port == peer.getsockname()[1]
    assert [(h.pid, h.fd) for h in listed.holders] == [(owner.pid, owned.fileno())]
    assert listed.holders[0].name == process_name(owner.pid) != "?"
    everything = {s.inode: s for s in list_sockets()}
    assert everything[inode(peer)].holders == ()  # only this process holds it


def test_units_are_found_by_cgroup() -> None:
    group = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.split(":", 2)[1] in ("", "name=systemd")
    )
    if group != "/":
        assert os.getpid() in pids_of_unit(group)
        assert os.getpid() in pids_of_unit(
            group.rsplit("/", 1)[1] if "." in group.rsplit("/", 1)[1] else group
        )
    assert pids_of_unit("no-such-unit.service") == set()
    with pytest.raises(ValueError, match=r"nginx\.service"):
        pids_of_unit("/")
