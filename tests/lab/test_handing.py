# SPDX-License-Identifier: MIT
"""Descriptors reach an application before its exporter has decided: what if the move is undone then?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

from lab.labs import Lab
from sockmi.client import Imported, ImportRequest, import_socket
from tests.lab.crash_lab import cluster
from tests.lab.scenario import drain, status, until

PORT = 7400
TIMEOUT_S = 20.0
TIMING = {"freeze_deadline_s": 0.5}
TOO_LATE_S = 1.3  # for the freeze
SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
connection, _ = listener.accept()
try:
    while data := connection.recv(4096):
        connection.sendall(data)
except OSError:
    pass  # it has been moved away
sys.stdin.read()
"""


@contextlib.contextmanager
def echoed(lab: Lab) -> Iterator[socket.socket]:
    """The peer's end of a connection to an echo server on a."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = [sys.executable, "-c", SERVER, lab.host("a").address(4), str(PORT)]
    with lab.host("a").popen(words, **pipes) as server, lab.host("peer").socket() as peer:
        try:
            assert server.stdout.readline() == b"ready\n"
            peer.settimeout(TIMEOUT_S)
            peer.connect((lab.host("a").address(4), PORT))
            goes_on(peer)
            yield peer
        finally:
            server.kill()


def goes_on(peer: socket.socket) -> None:
    """The echo server has the connection."""
    peer.sendall(b"ping")
    assert peer.recv(9) == b"ping"


def move(lab: Lab) -> list[dict[str, Any]]:
    """Drain a."""
    return drain(lab.host("a"), "b", local_port=PORT, kinds=["connected"])


def asks(pool: ThreadPoolExecutor, lab: Lab, timeout_s: float) -> Future[list[Imported]]:
    """An application on b waits."""
    control = lab.host("b").control_socket
    asking = pool.submit(import_socket, ImportRequest(["connected"]), timeout_s, control=control)
    until(lambda: status(lab.host("b"))["import_lists"]["connected"]["waiting"] > 0)
    return asking


def test_the_import_waits_again(lab: Lab) -> None:
    """The application notices nothing of a move that is undone; its call returns with the next."""
    points = {"a": "commit.led-away:1:STOP"}
    with ThreadPoolExecutor() as pool, cluster(lab, "ab", points, timing=TIMING) as daemons:
        asking = asks(pool, lab, TIMEOUT_S)
        with echoed(lab) as peer:
            moving = pool.submit(move, lab)
            daemons.stopped("a")
            assert status(lab.host("b"))["import_lists"]["connected"]["waiting"] == 0
            Event().wait(TOO_LATE_S)
            daemons.signal("a", signal.SIGCONT)
            [record] = moving.result(TIMEOUT_S)
            assert (record["outcome"], record["refusal"]["code"]) == ("aborted", "freeze-deadline")
            goes_on(peer)
            until(lambda: status(lab.host("b"))["import_lists"]["connected"]["waiting"] == 1)
            assert not asking.done()
            [record] = move(lab)
            assert record["outcome"] == "moved", record
            [got] = asking.result(TIMEOUT_S)
            assert got.socket is not None
            with got.socket:
                got.socket.sendall(b"here")
                assert peer.recv(9) == b"here"


def test_an_import_ends_in_time_though_nothing_is_decided(lab: Lab) -> None:
    """The exporter sleeps before it has decided, and undoes the move when the application is long gone."""
    points = {"a": "commit.led-away:1:STOP"}
    with ThreadPoolExecutor() as pool, cluster(lab, "ab", points, timing=TIMING) as daemons:
        started = time.monotonic()
        asking = asks(pool, lab, 3.0)
        with echoed(lab) as peer:
            moving = pool.submit(move, lab)
            daemons.stopped("a")
            assert asking.result(TIMEOUT_S) == []
            assert time.monotonic() - started >= 2.9
            daemons.signal("a", signal.SIGCONT)
            [record] = moving.result(TIMEOUT_S)
            assert record["outcome"] == "aborted"
            goes_on(peer)
            until(lambda: status(lab.host("b"))["import_lists"]["connected"]["length"] == 0)


def test_an_application_that_answers_late_and_dies(lab: Lab) -> None:
    """A timer of its copy has run out by then: it is listed, for the next one, not for the dead one."""
    silence = "table inet silent { chain in { type filter hook input priority 0; tcp sport 7401 drop; }; }"
    a, b = lab.host("a"), lab.host("b")
    with cluster(lab, "ab"), lab.host("peer").socket() as peer, a.socket() as listener:
        listener.bind((a.address(4), 7401))
        listener.listen()
        peer.settimeout(TIMEOUT_S)
        peer.connect(listener.getsockname())
        ours, _unused = listener.accept()
        lab.host("peer").run(["nft", silence])
        try:
            with ours:
                ours.sendall(b"unacknowledged")
                [record] = drain(a, "b", local_port=7401, kinds=["connected"], states=["ESTABLISHED"])
            assert record["outcome"] == "moved"
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(b.control_socket))
                control.sendall(b'{"op":"import","requests":[{"states":["connected"]}],"timeout_ms":-1}\n')
                answer, descriptors, _flags, _address = socket.recv_fds(control, 65536, 16)
                [imported] = json.loads(answer)["imported"]
                time.sleep(3)  # the timer of its retransmission, which is a second at most in a copy
                for descriptor in descriptors:
                    os.close(descriptor)
                taken = {"op": "taken", "migrations": [imported["record"]["migration_id"]]}
                control.sendall(json.dumps(taken).encode() + b"\n")
        finally:
            lab.host("peer").run(["nft", "delete table inet silent"])
        [arrived] = import_socket(ImportRequest(["connected"]), TIMEOUT_S, control=b.control_socket)
        with arrived.socket:
            assert peer.recv(99) == b"unacknowledged"
            arrived.socket.sendall(b"on")
            assert peer.recv(9) == b"on"
