# SPDX-License-Identifier: MIT
"""import_socket() in C, Python and asyncio, against a daemon that breaks everywhere."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from sockmi.refusal import Code, Refusal
from tests.lab.client_callers import CALLERS, Caller
from tests.lab.client_daemon import FakeDaemon


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "control"))
    with FakeDaemon(tmp_path / "control") as fake:
        yield fake


@pytest.fixture(params=CALLERS)
def caller(request: pytest.FixtureRequest) -> Caller:
    made: Caller = CALLERS[request.param]()
    return made


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.socket() as made:
        yield made


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def open_descriptors() -> dict[str, str]:
    found = {}
    for path in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the one that read the directory
            found[path.name] = str(path.readlink())
    return found


def want(sock: socket.socket, **criteria: Any) -> dict[str, Any]:
    return {"fd": sock.fileno(), "states": ["connected"], **criteria}


def echo(sock: socket.socket, peer: socket.socket) -> None:
    """The connection is alive, both ways."""
    peer.settimeout(10)
    sock.settimeout(10)
    peer.sendall(b"ping")
    assert sock.recv(9) == b"ping"
    sock.sendall(b"pong")
    assert peer.recv(9) == b"pong"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_replaces_the_descriptor_in_place(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, address: str
) -> None:
    dormant = daemon.put(address, context=b"session 7")
    wanted = inode(dormant.socket.fileno())
    [got] = caller.take([want(target)])
    assert dormant.peer
    assert got.fd == target.fileno()
    assert inode(target.fileno()) == wanted
    assert (got.request, got.kind, got.context) == (0, "connected", b"session 7")
    assert got.migration_id == dormant.migration_id
    peer = dormant.peer.getsockname()
    assert got.remote == (f"[{peer[0]}]:{peer[1]}" if ":" in address else f"{peer[0]}:{peer[1]}")
    with socket.socket(fileno=os.dup(target.fileno())) as arrived:
        echo(arrived, dormant.peer)


def test_flags_stay_and_duplicates_keep_the_old_socket(
    daemon: FakeDaemon, caller: Caller, target: socket.socket
) -> None:
    old = inode(target.fileno())
    twin = os.dup(target.fileno())
    try:
        for inheritable, blocking in ((False, True), (True, False)):
            os.set_inheritable(target.fileno(), inheritable)
            with socket.socket() as fresh:
                fresh.setblocking(blocking)
                os.set_inheritable(fresh.fileno(), inheritable)
                daemon.put()
                assert caller.take([want(fresh)])
                assert os.get_inheritable(fresh.fileno()) is inheritable
                assert os.get_blocking(fresh.fileno()) is blocking
        daemon.put()
        assert caller.take([want(target)])
        assert inode(target.fileno()) != old
        assert inode(twin) == old
    finally:
        os.close(twin)


def test_timeouts(daemon: FakeDaemon, caller: Caller, target: socket.socket) -> None:
    old = inode(target.fileno())
    started = time.monotonic()
    assert caller.take([want(target)], 0) == []
    assert caller.take([want(target)], 0.2) == []
    assert 0.2 <= time.monotonic() - started < 5
    assert inode(target.fileno()) == old
    timer = threading.Timer(0.2, daemon.put)
    timer.start()
    started = time.monotonic()
    assert len(caller.take([want(target)], None)) == 1
    assert time.monotonic() - started >= 0.15
    timer.join()


def test_best_effort_over_many_requests(daemon: FakeDaemon, caller: Caller) -> None:
    listener = uuid4()
    targets = [socket.socket() for _turn in range(5)]
    first, second = daemon.put(), daemon.put("127.0.0.2", listener=listener)
    daemon.put(kind="bound")
    listening = daemon.put("127.0.0.3", kind="listening")
    try:
        got = caller.take(
            [
                want(targets[0], local_address="127.0.0.9"),
                want(targets[1], states=["listening", "connected"], preferred=["listening"]),
                want(targets[2], listener=listener),
                want(targets[3], remote_port=first.peer.getsockname()[1] if first.peer else 0),
                want(targets[4], states=["bound"], local_port=1),
            ]
        )
        assert {one.request: one.migration_id for one in got} == {
            1: listening.migration_id,
            2: second.migration_id,
            3: first.migration_id,
        }
        assert [one.kind for one in got] == ["listening", "connected", "connected"]
        assert got[0].remote == "None"
        port = int(got[0].local.rpartition(":")[2])
        socket.create_connection(("127.0.0.3", port), timeout=5).close()
    finally:
        for one in targets:
            one.close()


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_contexts_up_to_the_limit(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, size: int
) -> None:
    context = os.urandom(size)
    daemon.put(context=context)
    [got] = caller.take([want(target)])
    assert got.context == context


@pytest.mark.parametrize("step", ["accept", "request", "fds", "half-line", "taken"])
def test_broken_daemon_leaves_the_descriptor_untouched(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, step: str
) -> None:
    dormant = daemon.put(context=b"x")
    old = inode(target.fileno())
    before = open_descriptors()
    daemon.break_at = step
    with pytest.raises(OSError) as caught:
        caller.take([want(target)], 5)
    assert caught.value.errno == errno.ECONNRESET
    assert inode(target.fileno()) == old
    daemon.break_at = ""
    assert wait_until(lambda: open_descriptors() == before)
    [got] = caller.take([want(target)], 5)
    assert got.migration_id == dormant.migration_id
    assert dormant.peer
    with socket.socket(fileno=os.dup(target.fileno())) as arrived:
        echo(arrived, dormant.peer)


@pytest.mark.parametrize("kind", ["connected", "listening", "bound"])
def test_what_came_to_life_unsaid_is_ours(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, kind: str
) -> None:
    dormant = daemon.put(kind=kind)
    wanted = inode(dormant.socket.fileno())
    daemon.break_at = "live"
    [got] = caller.take([want(target, states=[kind])], 5)
    assert got.migration_id == dormant.migration_id
    assert inode(target.fileno()) == wanted


def test_some_fail_to_come_to_life(daemon: FakeDaemon, caller: Caller) -> None:
    targets = [socket.socket(), socket.socket()]
    old = inode(targets[0].fileno())
    daemon.activation_refusal = Refusal(Code.RESTORE, "no such algorithm")
    try:
        daemon.put()
        daemon.put()
        [got] = caller.take([want(one) for one in targets])
        assert got.request == 1
        assert inode(targets[0].fileno()) == old
        with pytest.raises(OSError, match="no such algorithm") as caught:
            caller.take([want(targets[0])])
        assert (caught.value.errno, caught.value.code) == (errno.EREMOTEIO, "restore")  # type: ignore[attr-defined]
        assert inode(targets[0].fileno()) == old
    finally:
        for one in targets:
            one.close()


def test_an_undone_move_is_waited_through(daemon: FakeDaemon, caller: Caller, target: socket.socket) -> None:
    """What was handed out dormant never comes to life: the call goes on waiting, for the next."""
    daemon.undone = 2
    dead = [daemon.put(), daemon.put()]
    third = daemon.put()
    [got] = caller.take([want(target)], 10)
    assert got.migration_id == third.migration_id
    assert all(one.claimed for one in dead)
    assert third.peer is not None
    echo(target, third.peer)


def test_an_undecided_move_is_not_waited_for_too_long(
    daemon: FakeDaemon, caller: Caller, target: socket.socket
) -> None:
    old = inode(target.fileno())
    daemon.undecided = True
    daemon.put()
    assert caller.take([want(target)], 5) == []
    assert inode(target.fileno()) == old


def wait_until(condition: Any, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda answer, _unused: answer.pop("imported"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(request=7), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(request=-1), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(local="nonsense"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(local="1.2.3.4:99999"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(remote="[::1:1"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0]["record"].update(migration_id="7"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0]["record"].update(kind="bound"), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"].append(answer["imported"][0]), "SockMi daemon"),
        (lambda answer, _unused: answer.update(fds=9), "SockMi daemon"),
        (lambda answer, _unused: answer.update(fds=0), "SockMi daemon"),
        (lambda answer, fds: (answer.update(fds=0), fds.clear()), "SockMi daemon"),
        (lambda answer, _unused: answer["imported"][0].update(context=False), "SockMi daemon"),
        (lambda answer, _unused: answer.update(ok=False), "neither ok nor an error"),
        (lambda answer, _unused: answer.update(pad="x" * (1 << 20)), "longer"),
    ],
)
def test_strange_answers(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, change: Any, named: str
) -> None:
    old = inode(target.fileno())
    before = open_descriptors()
    dormant = daemon.put(context=b"x")
    listed = open_descriptors()
    daemon.corrupt = change
    with pytest.raises(OSError, match=named) as caught:
        caller.take([want(target)], 5)
    assert caught.value.errno == errno.EPROTO
    assert inode(target.fileno()) == old
    assert not dormant.taken
    assert len(before) < len(listed)
    wait_until(lambda: open_descriptors() == listed)
    assert open_descriptors() == listed


def test_garbage_and_silence(daemon: FakeDaemon, caller: Caller, target: socket.socket) -> None:
    daemon.break_at = "garbage"
    with pytest.raises(OSError) as caught:
        caller.take([want(target)], 0)
    assert caught.value.errno == errno.EPROTO
    daemon.break_at = "silent"
    with pytest.raises(OSError) as caught:
        caller.take([want(target)], 0)
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("code", list(Code))
def test_every_refusal_has_its_errno(
    daemon: FakeDaemon, caller: Caller, target: socket.socket, code: Code
) -> None:
    from sockmi.api import ERRNO

    daemon.refusal = Refusal(code, "because")
    with pytest.raises(OSError, match="because") as caught:
        caller.take([want(target)], 0)
    assert caught.value.errno == getattr(errno, ERRNO[code])
    assert caught.value.code == str(code)  # type: ignore[attr-defined]


def test_no_daemon(
    caller: Caller, target: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="nothing") as caught:
        caller.take([want(target)])
    assert caught.value.errno == errno.ENOENT
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "stale"))
    with pytest.raises(OSError, match="daemon") as caught:
        caller.take([want(target)])
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_full_backlog_is_waited_for(
    caller: Caller, target: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is behind with accepting is waited for, as long as the call may take."""
    path = str(tmp_path / "control")
    monkeypatch.setenv("SOCKMI_CONTROL", path)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                ahead = waiting.enter_context(socket.socket(socket.AF_UNIX))
                ahead.setblocking(False)
                ahead.connect(path)
        started = time.monotonic()
        with pytest.raises(OSError) as caught:
            caller.take([want(target)], 0.1)
        assert caught.value.errno == errno.ETIMEDOUT
        assert 0.1 <= time.monotonic() - started < 10


def test_bad_descriptors(daemon: FakeDaemon, caller: Caller, target: socket.socket) -> None:
    dormant = daemon.put()
    read, write = os.pipe()
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        cases = [(1000, errno.EBADF), (read, errno.ENOTSOCK)]
        cases += [(udp.fileno(), errno.EPROTOTYPE), (unix.fileno(), errno.EPROTOTYPE)]
        assert dormant.peer
        cases += [(dormant.peer.fileno(), errno.EISCONN)]
        for fd, expected in cases:
            with pytest.raises(OSError) as caught:
                caller.take([{"fd": fd, "states": ["connected"]}], 0)
            assert caught.value.errno == expected
    os.close(read)
    os.close(write)
    with pytest.raises(OSError) as caught:
        caller.take([want(target), want(target)], 0)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        caller.take([], 0)
    assert caught.value.errno == errno.EINVAL
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = os.dup2(target.fileno(), 900)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (800, limits[1]))
        with pytest.raises(OSError) as caught:
            caller.take([{"fd": high, "states": ["connected"]}], 0)
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(high)
    assert not daemon.requests


def test_many_threads_at_once(daemon: FakeDaemon, caller: Caller) -> None:
    before = len(open_descriptors())  # 40 ends of peers stay, and threads of the fake
    taken: list[Any] = []

    def run() -> None:
        for _turn in range(5):
            with socket.socket() as mine:
                [got] = caller.take([want(mine)])
                taken.append(got.migration_id)

    threads = [threading.Thread(target=run) for _turn in range(8)]
    for thread in threads:
        thread.start()
    for _turn in range(40):
        daemon.put(context=b"c")
    for thread in threads:
        thread.join(20)
    assert len(set(taken)) == 40
    assert wait_until(lambda: len(open_descriptors()) <= before + 40 + 8)


@pytest.mark.parametrize("how", ["connected", "listening", "another"])
def test_what_has_taken_its_place_meanwhile_is_not_replaced(
    daemon: FakeDaemon, caller: Caller, how: str
) -> None:
    """Another thread has used the descriptor while the call waited: nothing is taken."""
    target, other = socket.socket(), socket.socket()
    fd = target.detach()
    with other, socket.create_server(("127.0.0.1", 0)) as server:
        failures: list[int | None] = []

        def run() -> None:
            with pytest.raises(OSError) as caught:
                caller.take([{"fd": fd, "states": ["connected"]}], 10)
            failures.append(caught.value.errno)

        thread = threading.Thread(target=run)
        thread.start()
        assert wait_until(lambda: bool(daemon.requests))
        if how in ("connected", "listening"):
            view = socket.socket(fileno=os.dup(fd))
            if how == "connected":
                view.connect(server.getsockname())
            else:
                view.listen()
            view.close()
        else:
            os.dup2(other.fileno(), fd)
        kept = inode(fd)
        dormant = daemon.put()
        thread.join(20)
        assert failures == [errno.EBADF if how == "another" else errno.EISCONN]
        assert inode(fd) == kept
        os.close(fd)
        assert not dormant.taken
        with socket.socket() as next_one:
            [got] = caller.take([want(next_one)], 10)
            assert got.migration_id == dormant.migration_id


def test_a_child_does_not_keep_the_connection(
    daemon: FakeDaemon, caller: Caller, target: socket.socket
) -> None:
    """A server forks its workers while another thread imports; the daemon has room for 1,024 clients."""
    thread = threading.Thread(target=lambda: caller.take([want(target)], 1))
    thread.start()
    assert wait_until(lambda: bool(daemon.requests))
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        thread.join(20)
        assert wait_until(lambda: not daemon._connections)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_as_many_requests_as_are_promised(daemon: FakeDaemon, caller: Caller) -> None:
    """4,096 with long criteria fit into one line of the control socket."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 6000:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (6000, limits[1]))
    ends = {
        "states": ["bound", "listening", "connected"],
        "local_address": "2001:db8:1111:2222:3333:4444:5555:6666",
        "local_port": 60000,
        "remote_address": "2001:db8:1111:2222:3333:4444:5555:7777",
        "remote_port": 60000,
        "listener": uuid4(),
    }
    targets = [socket.socket() for _turn in range(4096)]
    try:
        assert caller.take([want(one, **ends) for one in targets], 0) == []
        assert len(daemon.requests[0].requests) == 4096
    finally:
        for one in targets:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
