# SPDX-License-Identifier: MIT
"""SO_LINGER is between an application and its peer: the daemon waits for neither."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.labs import Lab
from sockmi.engine.closing import close_all
from tests.lab.crash_lab import Drain, cluster
from tests.lab.scenario import daemons, status, until
from tests.lab.test_owners import task_state

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LINGERS_S = 8
SOON_S = 1.0
PORT = 7779

# Fills its send queue, which its peer does not read: close() has to wait for as long as it may.
FULL = """
import array, socket, struct, sys, time
def full(connection):
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, int(sys.argv[1])))
    try:
        while True:
            connection.send(bytes(65536))
    except BlockingIOError:
        return connection
"""

# Passes such a socket to the daemon, whose descriptor is the last one then.
PASSES = (
    FULL
    + """
listener = socket.create_server(("127.0.0.1", 0))
mine = full(socket.create_connection(listener.getsockname()))
daemon = socket.socket(socket.AF_UNIX)
daemon.connect(sys.argv[2])
socket.send_fds(daemon, [b'{"op":"status",'], [mine.fileno()])
mine.close()
daemon.send(b'"id":1,"fds":1}\\n')
print(daemon.makefile().readline(), flush=True)
time.sleep(60)
"""
)

OWNS = (
    FULL
    + """
listener = socket.create_server((sys.argv[2], int(sys.argv[3])))
print("ready", flush=True)
mine = full(listener.accept()[0])
print("full", flush=True)
time.sleep(60)
"""
)


@contextlib.contextmanager
def lingering() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection over which nothing goes any more, and its silent peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine, (peer, _unused) = socket.create_connection(listener.getsockname()), listener.accept()
    with mine, peer:
        mine.setblocking(False)
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGERS_S))
        with contextlib.suppress(BlockingIOError):
            while True:
                mine.send(bytes(65536))
        yield mine, peer


def _took_s(descriptors: list[int]) -> float:
    began = time.monotonic()
    close_all(descriptors)
    return time.monotonic() - began


def test_many_are_closed_at_once() -> None:
    """Whatever thread does it; and the peer gets all of it, and the end."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        pairs = [stack.enter_context(lingering()) for _turn in range(50)]
        for take_s in (_took_s, lambda some: thread.submit(_took_s, some).result()):
            assert take_s([pairs.pop()[0].detach() for _turn in range(20)]) < SOON_S
        mine, peer = pairs.pop()
        close_all([mine.detach()])
        peer.settimeout(5)
        while peer.recv(1 << 20):
            pass


def test_what_others_still_have_stays_as_it_is() -> None:
    with lingering() as (mine, _unused):
        close_all([os.dup(mine.fileno())])
        option = mine.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", option) == (1, LINGERS_S)
        assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_client_cannot_stop_the_daemon(lab: Lab) -> None:
    """By leaving it the last descriptor of a socket that lingers, with any request."""
    with daemons(lab, "a"):
        host = lab.host("a")
        words = [sys.executable, "-c", PASSES, str(LINGERS_S), str(host.control_socket)]
        with host.popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert '"ok":true' in process.stdout.readline()
            began = time.monotonic()
            status(host)
            took_s = time.monotonic() - began
            process.kill()
        assert took_s < LINGERS_S / 2


def test_an_owner_that_is_killed_while_it_is_frozen(lab: Lab) -> None:
    """Its socket ends with the daemon's descriptor, and the next freeze does not wait for that."""
    with cluster(lab, "ab", {"a": "freeze.stopped:1:STOP"}) as running:
        host, peer = lab.host("a"), lab.host("peer")
        words = [sys.executable, "-c", OWNS, str(LINGERS_S), host.address(4), str(PORT)]
        with host.popen(words, stdout=subprocess.PIPE, text=True) as process, peer.socket() as client:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            client.connect((host.address(4), PORT))
            assert process.stdout.readline() == "full\n"
            drain = Drain(lab, "a", "b", PORT)
            running.stopped("a")
            process.kill()
            until(lambda: task_state(process.pid) == "Z")
            began = time.monotonic()
            running.signal("a", signal.SIGCONT)
            status(host)
            drain.join(20)
            assert time.monotonic() - began < LINGERS_S / 2
