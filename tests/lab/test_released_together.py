# SPDX-License-Identifier: MIT
"""Originals that go together are closed all or none, also if the daemon is killed in the middle of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from sockmi.crashpoints import VARIABLE
from sockmi.engine.base import Captured
from sockmi.engine.repair import RepairEngine
from sockmi.refusal import Code, Refusal
from tests.lab.crash_lab import CLOSED, state_of
from tests.lab.scenario import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ESTABLISHED = 1
DAEMON = """
import sys
from sockmi import crashpoints, native
from sockmi.engine.repair import RepairEngine
crashpoints.arm(native.library())
engine, fds = RepairEngine(), [int(word) for word in sys.argv[1:]]
images = [one.image for one in engine.capture(fds)]
print(engine.release(fds, images, together=True))
"""


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connections over loopback, and their peers."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:
        made = []
        for _turn in range(5):
            peer = stack.enter_context(socket.create_connection(listener.getsockname()))
            made.append((stack.enter_context(listener.accept()[0]), peer))
        yield made


def test_the_process_is_killed_when_one_is_closed(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    fds = [ours.fileno() for ours, _unused in pairs]
    run = subprocess.run(
        [sys.executable, "-c", DAEMON, *map(str, fds)],
        env=os.environ | {VARIABLE: "release.closed"},
        pass_fds=fds,
        timeout=30,
        check=False,
        stdout=subprocess.PIPE,
    )
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, b"")
    until(lambda: [state_of(fd) for fd in fds] == [CLOSED] * len(fds))
    assert {state_of(peer.fileno()) for _unused, peer in pairs} == {ESTABLISHED}


def test_one_has_changed(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """All stay, and go on."""
    engine, fds = RepairEngine(), [ours.fileno() for ours, _unused in pairs]
    captured = engine.capture(fds)
    images = [one.image for one in captured if isinstance(one, Captured)]
    pairs[3][0].sendall(b"x")
    refusals = engine.release(fds, images, together=True)
    assert [one.code for one in refusals if isinstance(one, Refusal)] == [Code.CHANGED] * len(fds)
    for ours, peer in pairs:
        ours.sendall(b"y")
        peer.sendall(b"z")
        assert ours.recv(1) == b"z"
    assert [peer.recv(2) for _unused, peer in pairs] == [b"y", b"y", b"y", b"xy", b"y"]
