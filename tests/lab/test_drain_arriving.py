# SPDX-License-Identifier: MIT
"""A drain while a connection is on its way to its application: in no list, in no process or dormant."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest

from lab.host import Host
from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from sockmi.journal import Record
from tests.lab.crash_lab import cluster, journal_of
from tests.lab.scenario import drain, until

PORT = 7500
TIMEOUT_S = 20.0


class Application:
    """Asks b for a connection; has been sent one by ``receive``, and does not say so before ``take``."""

    def __init__(self, lab: Lab) -> None:
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(TIMEOUT_S)
        self._control.connect(str(lab.host("b").control_socket))
        self._say(op="import", requests=[{"states": ["connected"]}], timeout_ms=-1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._control.close()

    def receive(self) -> None:
        line, [descriptor], _flags, _address = socket.recv_fds(self._control, 65536, 1)
        self.connection = socket.socket(fileno=descriptor)
        [imported] = json.loads(line)["imported"]
        self._migration = imported["record"]["migration_id"]

    def take(self) -> None:
        self._say(op="taken", migrations=[self._migration])
        assert json.loads(self._control.recv(65536))["ok"]

    def go(self) -> None:
        """It hangs up."""
        self.connection.close()
        self._control.close()

    def _say(self, **fields: Any) -> None:
        self._control.sendall(json.dumps(fields).encode() + b"\n")


@contextlib.contextmanager
def sent(lab: Lab, *, listed: bool = True) -> Iterator[tuple[socket.socket, Application]]:
    """A connection's peer, and the application that b has sent it to; ``listed``: from its list."""
    a, b = lab.host("a"), lab.host("b")
    with (
        cluster(lab, "abc"),
        a.socket() as listener,
        lab.host("peer").socket() as peer,
        ThreadPoolExecutor() as pool,
    ):
        listener.bind((a.address(4), PORT))
        listener.listen()
        peer.settimeout(TIMEOUT_S)
        peer.connect(listener.getsockname())
        ours, _unused = listener.accept()
        with contextlib.ExitStack() as stack:
            if not listed:
                application = stack.enter_context(Application(lab))
            moving = pool.submit(drain, a, "b", local_port=PORT)
            if listed:
                moving.result(TIMEOUT_S)
                application = stack.enter_context(Application(lab))
            application.receive()
            until(lambda: is_decided(b))
            yield peer, application
            [record] = moving.result(TIMEOUT_S)
            assert record["outcome"] == "moved", record
            ours.close()


def is_decided(host: Host) -> bool:
    """Whether what comes is the host's by now."""
    with journal_of(host) as journal:
        return bool(journal.records(Record.LISTED))


def is_at(lab: Lab, name: str, peer: socket.socket) -> None:
    """The connection lives there, and is listed."""
    peer.sendall(b"ping")
    control = lab.host(name).control_socket
    [arrived] = import_socket(ImportRequest(["connected"]), TIMEOUT_S, control=control)
    with arrived.socket:
        assert arrived.socket.recv(9) == b"ping"
        arrived.socket.sendall(b"pong")
        assert peer.recv(9) == b"pong"


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "waited-for"])
def test_until_the_application_has_it(lab: Lab, listed: bool) -> None:
    """It moves on from the application."""
    with ThreadPoolExecutor() as pool, sent(lab, listed=listed) as (peer, application):
        moving = pool.submit(drain, lab.host("b"), "c", local_port=PORT)
        time.sleep(0.5)
        assert not moving.done()
        application.take()
        [record] = moving.result(TIMEOUT_S)
        assert record["outcome"] == "moved", record
        with pytest.raises(OSError, match="connection abort"):
            application.connection.recv(1)
        is_at(lab, "c", peer)


def test_until_the_application_has_gone(lab: Lab) -> None:
    """It moves on from the list."""
    with ThreadPoolExecutor() as pool, sent(lab) as (peer, application):
        moving = pool.submit(drain, lab.host("b"), "c", local_port=PORT)
        time.sleep(0.5)
        application.go()
        [record] = moving.result(TIMEOUT_S)
        assert record["outcome"] == "moved", record
        is_at(lab, "c", peer)


def test_no_other_is_waited_for(lab: Lab) -> None:
    """What the filter does not want may be on its way for as long as it likes."""
    with sent(lab) as (_peer, application):
        started = time.monotonic()
        assert drain(lab.host("b"), "c", local_port=PORT + 1) == []
        assert time.monotonic() - started < 2
        application.take()


@pytest.mark.parametrize("received, code", [(False, "changed"), (True, "in-repair")])
def test_not_for_ever(lab: Lab, received: bool, code: str) -> None:
    """One application after the other does not answer: what has not arrived is told, once."""
    with ThreadPoolExecutor() as pool, sent(lab) as (_peer, application), Application(lab) as second:
        moving = pool.submit(drain, lab.host("b"), "c", local_port=PORT)
        if received:
            second.receive()  # when the first has had it for too long
            application.go()
        [record] = moving.result(TIMEOUT_S)
        assert (record["outcome"], record["refusal"]["code"]) == ("refused", code)
        if not received:
            second.receive()
        second.take()
