# SPDX-License-Identifier: MIT
"""A listener, a bound and an unconnected socket have one life, whenever the importing daemon is killed.

An application on b waits for one. It asks again after an error, and again when it has it: nothing more comes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from lab.labs import Lab
from lab.plan import PATIENCE
from sockmi.client import Imported, ImportRequest, SockMiError, import_socket
from sockmi.journal import Record
from tests.lab.crash_lab import Cluster, cluster, journal_of, spooled
from tests.lab.scenario import ask, status, until

pytestmark = pytest.mark.timeout(120)

#: One for each test: what has ended may keep it for a while.
PORTS = itertools.count(7600)
#: When b's daemon dies, and whether the socket had waited in the import list before.
MOMENTS = [
    ("hand.sent", False),
    ("activate.journalled", False),
    ("taken.admitted", False),
    ("taken.activated", False),
    ("taken.answered", False),
    ("taken.unspooled", False),
    ("hand.sent", True),
    ("taken.admitted", True),
    ("taken.activated", True),
]
CASES = [(kind, *moment) for kind in ("listening", "bound") for moment in MOMENTS]
CASES += [("unconnected", "hand.sent", False), ("unconnected", "taken.activated", True)]
#: For a daemon to start in, on a busy machine.
RESTART_S = 30.0 * PATIENCE
#: For another offer of what is listed.
A_WHILE_S = 0.6


def in_list(daemons: Cluster, what: str) -> int:
    """How many sockets without a connection wait on b (``length``), or applications for one (``waiting``)."""
    lists = status(daemons.lab.host("b"))["import_lists"]
    return int(lists["bound"][what] + lists["listening"][what])


@contextlib.contextmanager
def owned(lab: Lab, kind: str, port: int) -> Iterator[socket.socket]:
    """A socket of this process on a."""
    with lab.host("a").socket() as sock:
        if kind != "unconnected":
            sock.bind(("0.0.0.0", port))  # noqa: S104
        if kind == "listening":
            sock.listen(7)
        yield sock


def take(lab: Lab, kind: str, timeout_s: float) -> list[Imported]:
    """An application on b: its import, again after each error."""
    wanted = ImportRequest([kind.replace("unconnected", "bound")])
    deadline_s = time.monotonic() + RESTART_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(SockMiError):
            return import_socket(wanted, timeout_s, control=lab.host("b").control_socket)
        Event().wait(0.1)
    raise AssertionError("no import succeeds")


def works(lab: Lab, kind: str, port: int, sock: socket.socket) -> None:
    """It is good for what it was good for."""
    sock.settimeout(10)
    if kind == "unconnected":
        with lab.host("peer").socket() as listener:
            listener.bind(("0.0.0.0", 0))  # noqa: S104
            listener.listen()
            sock.connect((lab.host("peer").address(4), listener.getsockname()[1]))
        return
    assert sock.getsockname() == ("0.0.0.0", port)  # noqa: S104
    if kind == "bound":
        sock.listen(1)
    with lab.host("peer").socket() as peer:
        peer.connect((lab.host("b").address(4), port))
        sock.accept()[0].close()


@pytest.mark.parametrize(("kind", "point", "late"), CASES)
def test_the_importer_dies(lab: Lab, kind: str, point: str, late: bool) -> None:
    """The application gets it once, working."""
    the_importer_dies(lab, kind, point, late)


def the_importer_dies(
    lab: Lab, kind: str, point: str, late: bool, back: str = "auto", **overrides: Any
) -> None:
    """``back``: the engine that the importer comes back with; ``overrides``: of both daemons' settings."""
    port = next(PORTS)
    with (
        ThreadPoolExecutor() as pool,
        cluster(lab, "ab", {"b": point}, **overrides) as daemons,
        owned(lab, kind, port) as ours,
    ):
        sockets = [{"pid": os.getpid(), "fd": ours.fileno()}]
        if late:
            [answer] = ask(lab.host("a"), "export", sockets=sockets)
            assert answer["migrations"][0]["outcome"] == "moved", answer
        taking = pool.submit(take, lab, kind, 20 * PATIENCE)
        if not late:
            until(lambda: in_list(daemons, "waiting") == 1)
            pool.submit(ask, lab.host("a"), "export", sockets=sockets)
        daemons.died("b")
        Event().wait(A_WHILE_S)  # the application looks at what it has
        daemons.daemons["b"].config["engine"] = back
        daemons.restart_dead()
        [arrived] = taking.result(30 * PATIENCE)
        assert arrived.socket
        with arrived.socket as copy:
            until(lambda: not in_list(daemons, "length"))
            assert take(lab, kind, A_WHILE_S) == []
            works(lab, kind, port, copy)
        until(lambda: not spooled(lab.host("b")))
        with journal_of(lab.host("b")) as journal:
            assert not journal.records(Record.LISTED)


@pytest.mark.parametrize("kind", ["bound", "unconnected"])
@pytest.mark.parametrize("point", ["commit.journalled", "commit.released", "commit.done"])
def test_the_exporter_dies(lab: Lab, kind: str, point: str) -> None:
    """After its decision: what the owner has left is dead, whether or not the daemon had come to that."""
    port = next(PORTS)
    with (
        ThreadPoolExecutor() as pool,
        cluster(lab, "ab", {"a": point}) as daemons,
        owned(lab, kind, port) as ours,
    ):
        taking = pool.submit(take, lab, kind, 20 * PATIENCE)
        until(lambda: in_list(daemons, "waiting") == 1)
        sockets = [{"pid": os.getpid(), "fd": ours.fileno()}]
        pool.submit(ask, lab.host("a"), "export", sockets=sockets)
        daemons.died("a")
        daemons.restart_dead()
        with pytest.raises(OSError) as raised:
            ours.listen()
        assert raised.value.errno == errno.EINVAL
        with pytest.raises(OSError) as raised:
            ours.connect((lab.host("peer").address(4), port))
        assert raised.value.errno == errno.EISCONN
        [arrived] = taking.result(30 * PATIENCE)
        assert arrived.socket
        with arrived.socket as copy:
            works(lab, kind, port, copy)
