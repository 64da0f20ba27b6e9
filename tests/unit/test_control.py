# SPDX-License-Identifier: MIT
"""The control socket's server: lines, descriptors, limits, hostile clients."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sockmi import api
from sockmi.control import Client, ControlServer
from sockmi.processes import no_new_process
from sockmi.refusal import Code, Refusal


class Recorder:
    """Answers every request with its descriptors' names, or as told."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, list[int]]] = []
        self.gone_clients = 0
        self.fail: Exception | None = None

    def request(self, client: Client, request: Any, descriptors: list[int]) -> None:
        self.requests.append((request, [os.fstat(one).st_ino for one in descriptors]))
        if self.fail is not None:
            for one in descriptors:
                os.close(one)
            raise self.fail
        client.respond(api.InfoResponse(id=request.id, migrations=[]), descriptors)
        for one in descriptors:
            os.close(one)

    def gone(self, client: Client) -> None:
        self.gone_clients += 1


class Setting:
    """A server on a loop that runs as long as a client call takes."""

    def __init__(self, path: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.handler = Recorder()
        self.server = ControlServer(self.loop, path, 0o660, self.handler)
        self.path = path

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.path))
        client.settimeout(5)
        return client

    def turn(self, times: int = 8) -> None:
        for _turn in range(times):
            self.loop.run_until_complete(asyncio.sleep(0))


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    one = Setting(tmp_path / "run" / "control.sock")
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield one
    one.server.close()
    one.loop.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before, "descriptors leaked"


def answer(client: socket.socket) -> dict[str, Any]:
    line = client.recv(1 << 20)
    assert line.endswith(b"\n")
    return dict(json.loads(line.splitlines()[-1]))


def test_lines_and_descriptors_belong_together(setting: Setting) -> None:
    reader, writer = os.pipe()
    with setting.connect() as client:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))
        line = b'{"op":"info","id":1}\n{"op":"info","id":2,"fds":1}\n'
        client.sendmsg([line], [rights])
        setting.turn()
        assert [len(fds) for _unused, fds in setting.handler.requests] == [0, 1]
        assert setting.handler.requests[1][1] == [os.fstat(reader).st_ino]
        data, ancillary, _unused, _unused = client.recvmsg(65536, 1024)
        assert [json.loads(one)["id"] for one in data.splitlines()] == [1, 2]
        received = array.array("i", ancillary[0][2])
        assert os.fstat(received[0]).st_ino == os.fstat(reader).st_ino
        os.close(received[0])
    setting.turn()
    assert setting.handler.gone_clients == 1
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"nonsense\n", "JSON"),
        (b'{"op":"dance"}\n', "dance"),
        (b'{"op":"info","wait":3}\n', "wait"),
        (b'{"op":"info","fds":2}\n', "descriptors"),
        (b"[]\n", ""),
    ],
)
def test_bad_lines_get_a_sentence(setting: Setting, line: bytes, says: str) -> None:
    with setting.connect() as client:
        client.sendall(line)
        setting.turn()
        error = answer(client)["error"]
        assert error["code"] == "bad-request"
        assert error["errno"] == "EINVAL"
        assert says in error["message"]
    setting.turn()


def test_refusals_and_failures_are_answers(setting: Setting) -> None:
    with setting.connect() as client:
        setting.handler.fail = Refusal(Code.LIST_FULL, "Full; raise imports.max_connected.")
        client.sendall(b'{"op":"info","id":"x"}\n')
        setting.turn()
        got = answer(client)
        assert (got["id"], got["error"]["code"], got["error"]["errno"]) == ("x", "list-full", "ENOBUFS")
        setting.handler.fail = ZeroDivisionError("oops")
        client.sendall(b'{"op":"info"}\n')
        setting.turn()
        assert answer(client)["error"]["code"] == "internal"
        setting.handler.fail = None
        client.sendall(b'{"op":"info","id":3}\n')
        setting.turn()
        assert answer(client)["ok"] is True


def test_an_endless_line_is_cut_off(setting: Setting) -> None:
    with setting.connect() as client:
        client.setblocking(False)
        sent = 0
        while sent <= api.LINE_BYTES_MAX + 65536:
            try:
                sent += client.send(bytes(65536))
            except BlockingIOError:
                setting.turn(2)
            except (BrokenPipeError, ConnectionResetError):
                break
        setting.turn(40)
    assert setting.handler.gone_clients == 1
    assert setting.handler.requests == []


def test_a_client_that_does_not_read_is_disconnected(setting: Setting) -> None:
    with setting.connect() as client:
        for _turn in range(2000):
            with_id = b'{"op":"info","id":"' + b"x" * 60000 + b'"}\n'
            client.setblocking(False)
            while with_id:
                try:
                    with_id = with_id[client.send(with_id) :]
                except BlockingIOError:
                    setting.turn(1)
                except (BrokenPipeError, ConnectionResetError):
                    break
            if setting.handler.gone_clients:
                break
        assert setting.handler.gone_clients == 1


def test_without_descriptors_the_loop_does_not_spin(setting: Setting) -> None:
    """Nobody can be accepted: who connects waits, and is served when there is a descriptor again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1

    errors: list[Any] = []
    setting.loop.set_exception_handler(lambda loop, context: errors.append(context))
    accept = setting.server._accept
    with setting.connect() as client:
        client.sendall(b'{"op":"info","id":4}\n')
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) - 1, hard))
        try:
            setting.loop.remove_reader(setting.server._listener)
            setting.server._accept = lambda: (turn(), accept())  # type: ignore[method-assign]
            setting.server._accept_again()
            setting.loop.run_until_complete(asyncio.sleep(0.5))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert 1 <= turns <= 4
        assert errors == []
        setting.loop.run_until_complete(asyncio.sleep(0.5))
        assert answer(client)["id"] == 4
    setting.turn()


def test_a_client_is_sent_more_when_it_has_read(setting: Setting) -> None:
    """`when_read` comes at once, or when what was queued has gone."""
    pages = 0
    with setting.connect() as client:
        client.sendall(b'{"op":"info"}\n')
        setting.turn()
        client.recv(65536)
        [served] = setting.server._clients

        def page() -> None:
            nonlocal pages
            pages += 1
            if pages < 200:
                served.respond({"more": True, "text": "x" * 100_000})
                served.when_read(page)

        page()
        setting.turn(400)
        assert pages < 20, "it is not waited for"
        client.setblocking(False)
        while pages < 200:
            with contextlib.suppress(BlockingIOError):
                client.recv(1 << 20)
            setting.turn(2)
    setting.turn()


def test_a_living_socket_is_not_taken_over_but_a_stale_one_is(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another daemon"):
        ControlServer(setting.loop, setting.path, 0o660, setting.handler)
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    server = ControlServer(setting.loop, stale, 0o600, setting.handler)
    assert stale.stat().st_mode & 0o777 == 0o600
    server.close()
    assert not stale.exists()


def test_nothing_is_read_while_a_process_is_begun(setting: Setting) -> None:
    """It would have a file that is sent just then; and none is begun until that is closed."""
    begun, ended = threading.Event(), threading.Event()

    def begin() -> None:
        with no_new_process:
            begun.set()
            ended.wait(5)

    with setting.connect() as client:
        thread = threading.Thread(target=begin)
        thread.start()
        assert begun.wait(5)
        client.sendall(b'{"op":"info","id":1}\n')
        setting.turn()
        assert not setting.handler.requests
        ended.set()
        thread.join()
        setting.turn()
        assert len(setting.handler.requests) == 1


def test_no_process_is_begun_while_what_came_is_closed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inspected: list[bool] = []

    def close_aside(descriptors: list[int], _unused: int) -> None:
        begins = threading.Thread(target=lambda: inspected.append(no_new_process.acquire(timeout=0.2)))
        begins.start()
        begins.join()
        for one in descriptors:
            os.close(one)

    monkeypatch.setattr("sockmi.control.close_aside", close_aside)
    with setting.connect() as client, (tmp_path / "file").open("w") as file:
        socket.send_fds(client, [b'{"op":"info","id":1,"fds":1}\n'], [file.fileno()])
        setting.turn()
    assert inspected == [False]
    assert no_new_process.acquire(blocking=False)
    no_new_process.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_one_user_leaves_room_for_the_others() -> None:
    """Whoever may connect may not keep all others out, and root gets in whoever is there."""
    place = Path(tempfile.mkdtemp(prefix="smt-control-"))
    place.chmod(0o755)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    setting = Setting(place / "control.sock")
    (place / "control.sock").chmod(0o666)

    def connect(uid: int, count: int) -> list[socket.socket]:
        made = []
        os.seteuid(uid)
        try:
            for _turn in range(count):
                made.append(setting.connect())
                if len(made) % 64 == 0:
                    os.seteuid(0)
                    setting.turn(100)
                    os.seteuid(uid)
        finally:
            os.seteuid(0)
        setting.turn(200)
        return made

    def served(clients: list[socket.socket]) -> int:
        for one in clients:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                one.send(b'{"op":"info"}\n')
        setting.turn(100)
        count = 0
        for one in clients:
            one.settimeout(0.001)
            with contextlib.suppress(ConnectionResetError, TimeoutError):
                count += one.recv(1 << 16) != b""
        return count

    clients: list[socket.socket] = []
    try:
        for uid, expected in ((2001, 256), (2002, 256), (2003, 256), (2004, 896 - 3 * 256), (0, 10)):
            made = connect(uid, 10 if uid == 0 else 300)
            clients += made
            assert served(made) == expected, uid
    finally:
        for one in clients:
            one.close()
        setting.turn(50)
        setting.server.close()
        setting.loop.close()
        shutil.rmtree(place)
