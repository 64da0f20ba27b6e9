# SPDX-License-Identifier: MIT
"""export_socket() in C, Python and asyncio."""

from __future__ import annotations

import ast
import asyncio
import errno
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import sockmi
from sockmi import aio, api
from sockmi.refusal import Code, Refusal
from tests.lab.client_callers import CALLERS, Caller
from tests.lab.client_daemon import FakeDaemon, connection

MIB = 1 << 20


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
def here() -> Iterator[socket.socket]:
    made, peer = connection()
    with made, peer:
        yield made


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """A process that holds a TCP socket: its pid and descriptor."""
    code = "import socket,sys; s=socket.socket(); print(s.fileno(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdin
        yield process.pid, int(process.stdout.readline())
        process.stdin.close()


def test_active_export(daemon: FakeDaemon, caller: Caller, here: socket.socket) -> None:
    identity = uuid4()
    count = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert caller.export(here.fileno(), to="b", timeout_s=3.0, migration_id=identity) == identity
    [request] = daemon.requests
    [item] = request.sockets
    assert (request.to, request.timeout_s, request.dry_run) == ("b", 3.0, False)
    assert (item.pid, item.fd, item.migration_id) == (os.getpid(), here.fileno(), identity)
    assert daemon.inodes == [os.fstat(here.fileno()).st_ino]
    assert len(os.listdir("/proc/self/fd")) <= count + 2  # noqa: PTH208 (the fake's side)


@pytest.mark.parametrize("to", ["192.0.2.7", "2001:db8::7", "host-b"])
def test_targets(daemon: FakeDaemon, caller: Caller, here: socket.socket, to: str) -> None:
    caller.export(here.fileno(), to=to)
    assert daemon.requests[0].to == to
    caller.export(here.fileno(), dry_run=True)
    assert daemon.requests[1].to is None
    assert daemon.requests[1].dry_run


def test_passive_export(daemon: FakeDaemon, caller: Caller, other: tuple[int, int]) -> None:
    pid, fd = other
    caller.export(fd, pid)
    assert daemon.inodes == [Path(f"/proc/{pid}/fd/{fd}").stat().st_ino]
    assert (daemon.requests[0].sockets[0].pid, daemon.requests[0].sockets[0].fd) == (pid, fd)


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_contexts(daemon: FakeDaemon, caller: Caller, here: socket.socket, size: int) -> None:
    context = os.urandom(size)
    caller.export(here.fileno(), context=context)
    assert daemon.contexts == ([context] if size else [])


def test_what_is_listed(daemon: FakeDaemon, caller: Caller, here: socket.socket) -> None:
    """It has no descriptor, and its context already."""
    listed, identity = uuid4(), uuid4()
    assert caller.export(listed, to="c", migration_id=identity) == identity
    [item] = daemon.requests[0].sockets
    assert (item.listed, item.migration_id, item.descriptor) == (listed, identity, False)
    with pytest.raises(OSError, match="keeps its context") as caught:
        caller.export(listed, context=b"another")
    assert caught.value.errno == errno.EINVAL
    assert len(daemon.requests) == 1


def test_what_is_listed_among_others(daemon: FakeDaemon, here: socket.socket) -> None:
    listed = uuid4()
    sockets = [sockmi.Export(listed), sockmi.Export(here, context=b"here"), sockmi.Export(listed)]
    records = sockmi.export_sockets(sockets, "c")
    assert [one.migration_id for one in records] == [one.migration_id for one in sockets]
    assert [one.listed for one in daemon.requests[0].sockets] == [listed, None, listed]
    assert daemon.contexts == [b"here"]
    with pytest.raises(sockmi.SockMiError, match="no process"):
        sockmi.export_socket(listed, pid=os.getpid())


@pytest.mark.parametrize("code", list(Code))
def test_every_refusal_has_its_errno(
    daemon: FakeDaemon, caller: Caller, here: socket.socket, code: Code
) -> None:
    from sockmi.api import ERRNO

    why = {"code": str(code), "message": "because", "errno": ERRNO[code]}
    daemon.outcomes = {"outcome": "refused", "refusal": why}
    with pytest.raises(OSError, match="because") as caught:
        caller.export(here.fileno())
    assert caught.value.errno == getattr(errno, ERRNO[code])
    assert caught.value.code == str(code)  # type: ignore[attr-defined]
    daemon.refusal = Refusal(code, "for the whole request")
    with pytest.raises(OSError, match="whole") as caught:
        caller.export(here.fileno())
    assert caught.value.errno == getattr(errno, ERRNO[code])


def test_multipath_tcp_is_for_the_daemon_to_refuse(daemon: FakeDaemon, caller: Caller) -> None:
    """Sockets of Go's listeners are such: what it says of them is more than that they are not TCP's."""
    try:
        multipath = socket.socket(proto=socket.IPPROTO_MPTCP)
    except OSError:
        pytest.skip("no MPTCP in this kernel")
    daemon.refusal = Refusal(Code.MPTCP, "Multipath TCP cannot move.")
    with multipath, pytest.raises(OSError, match="Multipath") as caught:
        caller.export(multipath.fileno())
    assert caught.value.errno == errno.ENOTSUP
    assert caught.value.code == "mptcp"  # type: ignore[attr-defined]


def test_unknown_codes_are_eio(daemon: FakeDaemon, caller: Caller, here: socket.socket) -> None:
    daemon.outcomes = {"outcome": "refused"}
    why = {"code": "new", "message": "of tomorrow", "errno": "ENEW"}

    def renew(answer: dict[str, Any], _fds: list[int]) -> None:
        for record in answer["migrations"]:
            record["refusal"] = why

    daemon.corrupt = renew
    with pytest.raises(OSError, match="of tomorrow") as caught:
        caller.export(here.fileno())
    assert caught.value.errno == errno.EIO


def test_bad_arguments(
    daemon: FakeDaemon, caller: Caller, here: socket.socket, other: tuple[int, int]
) -> None:
    read, write = os.pipe()
    gone = subprocess.Popen(["true"])
    gone.wait()
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        cases: list[tuple[tuple[Any, ...], dict[str, Any], int]] = [
            ((-1,), {}, errno.EBADF),
            ((1000,), {}, errno.EBADF),
            ((read,), {}, errno.ENOTSOCK),
            ((udp.fileno(),), {}, errno.EPROTOTYPE),
            ((here.fileno(), 0), {}, errno.EINVAL),
            ((5, gone.pid), {}, errno.ESRCH),
            ((1000, other[0]), {}, errno.EBADF),
            ((0, other[0]), {}, errno.ENOTSOCK),
            ((here.fileno(),), {"context": bytes(MIB + 1)}, errno.EMSGSIZE),
            ((here.fileno(),), {"to": "x" * 256}, errno.EINVAL),
        ]
        for arguments, options, expected in cases:
            with pytest.raises(OSError) as caught:
                caller.export(*arguments, **options)
            assert caught.value.errno == expected, (arguments, caught.value)
    os.close(read)
    os.close(write)
    assert not daemon.requests


def test_outcome_is_learnt_after_a_restart(daemon: FakeDaemon, caller: Caller, here: socket.socket) -> None:
    daemon.break_at = "live"
    stopped = threading.Event()

    def restart() -> None:
        while not daemon.records:
            stopped.wait(0.01)
        daemon.stop()
        stopped.wait(0.2)
        daemon.break_at = ""
        daemon.start()

    helper = threading.Thread(target=restart)
    helper.start()
    identity = caller.export(here.fileno())
    helper.join()
    assert identity in daemon.records
    assert [one.op for one in daemon.requests][-1] == "info"


def test_a_broken_export_that_never_began(daemon: FakeDaemon, caller: Caller, here: socket.socket) -> None:
    daemon.break_at = "request"
    timer = threading.Timer(0.2, lambda: setattr(daemon, "break_at", ""))
    timer.start()
    with pytest.raises(OSError, match="before it began") as caught:
        caller.export(here.fileno())
    timer.join()
    assert caught.value.errno == errno.ECONNRESET


def test_a_slow_daemon_is_asked(
    daemon: FakeDaemon, caller: Caller, here: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits no longer learns whether its socket has moved."""
    monkeypatch.setattr("sockmi.client.link._GRACE_S", 0.2)
    daemon.break_at = "late"
    identity = caller.export(here.fileno(), timeout_s=0.1)
    assert identity in daemon.records and daemon.requests[-1].op == "info"
    why = {"code": "timeout", "message": "in time it was undone", "errno": "ETIMEDOUT"}
    daemon.outcomes = {"outcome": "aborted", "refusal": why}
    with pytest.raises(OSError, match="undone") as caught:
        caller.export(here.fileno(), timeout_s=0.1)
    assert (caught.value.errno, caught.value.code) == (errno.ETIMEDOUT, "timeout")  # type: ignore[attr-defined]
    daemon.break_at = "unbegun"
    with pytest.raises(OSError, match="has not begun in time") as caught:
        caller.export(here.fileno(), timeout_s=0.1)
    assert caught.value.errno == errno.ETIMEDOUT
    count = len(daemon.requests)
    with pytest.raises(OSError, match="does not answer") as caught:
        caller.export(here.fileno(), timeout_s=0.1, dry_run=True)
    assert caught.value.errno == errno.ETIMEDOUT and len(daemon.requests) == count + 1


def test_an_outcome_that_cannot_be_learnt(
    daemon: FakeDaemon, caller: Caller, here: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That says so, by an errno of its own."""
    monkeypatch.setattr("sockmi.client.exports._RECONNECT_S", 0.5)
    monkeypatch.setattr("sockmi.client.link._GRACE_S", 0.2)
    daemon.break_at = "mute"
    with pytest.raises(OSError, match="not known") as caught:
        caller.export(here.fileno(), timeout_s=0.1)
    assert caught.value.errno == errno.ECONNRESET


def test_no_privilege_to_trace(
    daemon: FakeDaemon, other: tuple[int, int], tmp_path: Path, enterable: Callable[[Path], None]
) -> None:
    """The kernel's own check, of a user that is not root."""
    daemon.path.chmod(0o777)
    enterable(tmp_path)
    code = (
        "import os,sys,sockmi,sockmi.client; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"try: sockmi.export_socket({other[1]}, pid={other[0]}, control={str(daemon.path)!r})\n"
        "except OSError as e: print(e.errno, e)"
    )
    root = Path(__file__).parents[2] / "daemon"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
        timeout=30,
        capture_output=True,
        check=False,
    )
    assert done.stdout.startswith(f"{errno.EPERM} "), done
    assert "may not trace" in done.stdout


def test_batches_and_records(daemon: FakeDaemon) -> None:
    pairs = [connection() for _turn in range(100)]
    exports = [sockmi.Export(one, context=str(i).encode()) for i, (one, _unused) in enumerate(pairs)]
    records = sockmi.export_sockets(exports, "b")
    assert [one.migration_id for one in records] == [one.migration_id for one in exports]
    assert daemon.contexts == [str(i).encode() for i in range(100)]
    assert {one.blackout_us for one in records} == {900}
    assert all(one.succeeded and one.source == "a" and one.target == "b" for one in records)
    assert len(asyncio.run(aio.export_sockets(exports))) == 100
    with pytest.raises(sockmi.SockMiError) as caught:
        sockmi.export_sockets(exports * 2)
    assert caught.value.errno == errno.EINVAL
    for one, peer in pairs:
        one.close()
        peer.close()


def test_imports_goes_on_and_survives_a_restart(daemon: FakeDaemon) -> None:
    async def run() -> list[sockmi.Imported]:
        found = []
        async for arrived in sockmi.imports(["connected"]):
            assert arrived.socket
            assert not arrived.socket.getblocking()
            found.append(arrived)
            if len(found) == 2:
                await asyncio.to_thread(daemon.stop)
                daemon.start()
                daemon.put(context=b"3")
            if len(found) == 3:
                break
            if len(found) == 1:
                daemon.put(context=b"2")
        return found

    daemon.put(context=b"1")
    found = asyncio.run(asyncio.wait_for(run(), 20))
    assert [one.context for one in found] == [b"1", b"2", b"3"]
    for one in found:
        assert one.socket
        one.socket.close()


def test_cancelling_an_import_cancels_it(daemon: FakeDaemon) -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(aio.import_socket(sockmi.ImportRequest()), 0.2)

    asyncio.run(run())
    daemon.put()  # whoever asked is gone
    assert len(sockmi.import_socket(sockmi.ImportRequest(), 5)) == 1


def test_cancelling_an_import_whose_socket_is_not_decided(daemon: FakeDaemon) -> None:
    """Its descriptor has come and is taken, but does not live: it goes back, and nobody waits any more."""
    daemon.deciding = threading.Event()
    dormant = daemon.put()

    async def run() -> None:
        waiting = asyncio.create_task(aio.import_socket(sockmi.ImportRequest()))
        while not any(isinstance(one, api.TakenRequest) for one in daemon.requests):
            await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(waiting), 2)

    asyncio.run(run())
    daemon.deciding = None
    [got] = sockmi.import_socket(sockmi.ImportRequest(), 5)
    assert got.record.migration_id == dormant.migration_id


async def cancelled_as_decided(waiting: asyncio.Task[Any], daemon: FakeDaemon) -> None:
    """Cancel it when the daemon's decision has been sent, and the loop has not yet seen it."""
    while not any(isinstance(one, api.TakenRequest) for one in daemon.requests):
        await asyncio.sleep(0.01)
    assert daemon.deciding
    daemon.deciding.set()
    time.sleep(0.3)
    waiting.cancel()
    done, _pending = await asyncio.wait([waiting], timeout=5)
    assert done
    assert waiting.cancelled()


def test_a_cancelled_import_does_not_wait_again(daemon: FakeDaemon) -> None:
    """The move is undone just when the task is cancelled."""
    daemon.deciding = threading.Event()
    daemon.undone = 1
    daemon.put()

    async def run() -> None:
        waiting = asyncio.create_task(aio.import_socket(sockmi.ImportRequest()))
        await cancelled_as_decided(waiting, daemon)

    asyncio.run(run())


def test_a_cancellation_that_comes_too_late(daemon: FakeDaemon) -> None:
    """The socket lives and is not lost; whoever asks for the next one is cancelled."""
    daemon.deciding = threading.Event()
    dormant = daemon.put()

    async def run() -> list[sockmi.Imported]:
        found: list[sockmi.Imported] = []

        async def collect() -> None:
            async for arrived in sockmi.imports(["connected"]):
                found.append(arrived)

        waiting = asyncio.create_task(collect())
        await cancelled_as_decided(waiting, daemon)
        return found

    [got] = asyncio.run(run())
    assert got.record.migration_id == dormant.migration_id
    assert got.socket
    assert dormant.peer
    dormant.peer.sendall(b"still here")
    got.socket.setblocking(True)
    assert got.socket.recv(99) == b"still here"
    got.socket.close()


def test_ctrl_c_while_a_socket_is_not_decided(daemon: FakeDaemon) -> None:
    daemon.deciding = threading.Event()
    dormant = daemon.put()

    def interrupt() -> None:
        while not any(isinstance(one, api.TakenRequest) for one in daemon.requests):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        sockmi.import_socket(sockmi.ImportRequest(), 10)
    thread.join()
    daemon.deciding = None
    [got] = sockmi.import_socket(sockmi.ImportRequest(), 5)
    assert got.record.migration_id == dormant.migration_id


def test_a_default_timeout_is_no_business_of_the_owner(daemon: FakeDaemon, here: socket.socket) -> None:
    """Looking at a descriptor by a socket object would make it non-blocking, for all that share it."""
    here.settimeout(None)
    socket.setdefaulttimeout(5)
    try:
        sockmi.export_socket(here.fileno())
        with socket.socket() as target:
            os.set_blocking(target.fileno(), True)
            sockmi.import_socket(sockmi.ImportRequest(replace=target.fileno()), 0)
            assert os.get_blocking(target.fileno())
    finally:
        socket.setdefaulttimeout(None)
    assert os.get_blocking(here.fileno())


def test_python_types(daemon: FakeDaemon) -> None:
    dormant = daemon.put()
    [arrived] = sockmi.import_socket(sockmi.ImportRequest("connected"))
    assert arrived.socket
    assert dormant.peer
    assert arrived.remote is not None
    assert arrived.remote.port == dormant.peer.getsockname()[1]
    assert arrived.record.hop == 1
    arrived.socket.close()
    bad: dict[str, Any]
    for bad in (
        {"states": []},
        {"states": ["flying"]},
        {"states": ["bound"], "preferred": ["connected"]},
        {"states": ["bound"], "remote_port": 1},
    ):
        with pytest.raises(ValueError, match=r"states|flying|among|remote"):
            sockmi.ImportRequest(**bad)
    with pytest.raises(sockmi.SockMiError):
        sockmi.import_socket(sockmi.ImportRequest(), -1)
    with sockmi.Control() as control:
        assert [line["more"] for line in control.call("list", table="redirects")] == [True, True, False]
        with pytest.raises(sockmi.SockMiError, match="colour"):
            list(control.call("list", colour="red"))
        assert next(control.call("reload"))["changed"] == ["policy"]


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, sockmi; assert not {'pydantic', 'asyncio', 'json'} & set(sys.modules)\n"
        "sockmi.import_socket; sockmi.imports; assert 'pydantic' not in sys.modules"
    )
    root = Path(__file__).parents[2] / "daemon"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, check=True, timeout=30)


def test_the_modules_client(daemon: FakeDaemon, tmp_path: Path) -> None:
    """plugins/module_utils/_client.py, loaded as Ansible does: alone, without the sockmi package."""
    path = Path(__file__).parents[2] / "plugins/module_utils/_client.py"
    spec = importlib.util.spec_from_file_location("_client", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.ControlClient() as client:
        records = client.export([{"pid": 7, "fd": number} for number in range(9)], to="b")
        assert [one["outcome"] for one in records] == ["moved"] * 9
        assert client.migrations([one["migration_id"] for one in records]) == records
        assert client.redirects() == []
        assert client.one("reload")["changed"] == ["policy"]
        with pytest.raises(module.ControlError, match="colour") as caught:
            client.one("list", colour=1)
        assert (caught.value.code, caught.value.errno_name) == ("bad-request", "EINVAL")
        daemon.corrupt = lambda answer, _fds: answer.update(migrations=[])
        with pytest.raises(module.ControlError, match="0 records for 1"):
            client.export([{"pid": 7, "fd": 1}])
    daemon.break_at = "garbage"
    with module.ControlClient(timeout_s=5) as client, pytest.raises(module.ControlError, match="no JSON"):
        client.one("reload")
    daemon.break_at = "request"
    with module.ControlClient() as client, pytest.raises(module.ControlError, match="closed the connection"):
        client.status()
    daemon.stop()
    with pytest.raises(module.ControlError, match="control: No such file"):
        module.ControlClient.when_ready(wait_s=0.2)


def test_the_modules_client_speaks_old_python() -> None:
    """No syntax of a Python later than 3.8."""
    path = Path(__file__).parents[2] / "plugins/module_utils/_client.py"
    ast.parse(path.read_text(), feature_version=(3, 8))
