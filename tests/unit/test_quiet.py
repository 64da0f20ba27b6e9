# SPDX-License-Identifier: MIT
"""Which connections are quiet: nothing queued, the last request answered, and for how long."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from sockmi import api
from sockmi.engine.listing import Quiet, list_sockets, received_bytes
from sockmi.selection import select

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look at another process's sockets")

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(the server's, the client's). Another process has them too, as only what others have is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _unused = listener.accept()
    fds = (server.fileno(), client.fileno())
    with server, client, subprocess.Popen(["sleep", "60"], pass_fds=fds) as holder:
        try:
            yield server, client
        finally:
            holder.kill()


def quiet(server: socket.socket) -> Quiet | None:
    inode = os.fstat(server.fileno()).st_ino
    [row] = [one for one in list_sockets(quiet=True) if one.inode == inode]
    return row.quiet


def ask_and_answer(server: socket.socket, client: socket.socket) -> None:
    client.sendall(b"request")
    assert server.recv(100) == b"request"
    time.sleep(0.02)
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    time.sleep(0.02)


def test_between_two_requests(pair: Pair) -> None:
    server, client = pair
    ask_and_answer(server, client)
    first = quiet(server)
    assert first is not None
    assert first.received == received_bytes(server.fileno()) == 7
    time.sleep(0.3)
    second = quiet(server)
    assert second is not None
    assert second.since_s >= first.since_s + 0.2


def test_a_request_that_is_not_read(pair: Pair) -> None:
    server, client = pair
    ask_and_answer(server, client)
    client.sendall(b"another")
    time.sleep(0.02)
    assert quiet(server) is None


def test_a_request_that_is_read_and_not_answered(pair: Pair) -> None:
    server, client = pair
    ask_and_answer(server, client)
    client.sendall(b"another")
    assert server.recv(100) == b"another"
    time.sleep(0.02)
    assert quiet(server) is None


def test_an_answer_that_is_not_read(pair: Pair) -> None:
    """Of the client, who has it in its queue; the server's end is quiet."""
    server, client = pair
    client.sendall(b"request")
    server.recv(100)
    time.sleep(0.02)
    server.sendall(b"answer")
    time.sleep(0.02)
    assert quiet(client) is None
    assert quiet(server) is not None


def test_one_that_is_closing(pair: Pair) -> None:
    server, client = pair
    ask_and_answer(server, client)
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.02)
    assert quiet(server) is None


def test_the_filter(pair: Pair) -> None:
    server, client = pair
    ask_and_answer(server, client)
    port = server.getsockname()[1]

    def found(idle_s: float | None) -> int:
        return len(select(api.SocketFilter(local_port=port, idle_s=idle_s)))

    assert found(1000) == 0
    assert found(0) == 1
    rows = [one for one in list_sockets(quiet=True) if one.local.port == port]
    assert rows
    assert all(one.quiet is not None for one in rows)
    assert all(one.quiet is None for one in list_sockets() if one.local.port == port)
