# SPDX-License-Identifier: MIT
"""Two exporters want the same port of one importer: the second one hears it before it freezes anything."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from tests.lab.crash_lab import Cluster, cluster, state_of
from tests.lab.matrix_lab import Keeper
from tests.lab.scenario import ask, status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LISTEN = 10
SOON = {"freeze_deadline_s": 5.0}


def server(lab: Lab, host: str, port: int, kind: str, reuse: int) -> socket.socket:
    """A socket with a port of its own."""
    sock = lab.host(host).socket(socket.AF_INET6)
    if reuse:
        sock.setsockopt(socket.SOL_SOCKET, reuse, 1)
    sock.bind(("::", port))
    if kind == "listening":
        sock.listen()
    return sock


def export(daemons: Cluster, host: str, sock: socket.socket) -> dict[str, str | None]:
    """Move it to b; the outcome and the code."""
    with Keeper([sock.fileno()]) as keeper:  # it is frozen, and this process must not be
        sockets = [{"pid": keeper.pid, "fd": sock.fileno()}]
        [answer] = ask(daemons.lab.host(host), "export", sockets=sockets, to="b", timeout_s=5.0)
    [record] = answer["migrations"]
    return {"outcome": record["outcome"], "code": (record["refusal"] or {}).get("code")}


REFUSED = {"outcome": "refused", "code": "port-taken"}
MOVED = {"outcome": "moved", "code": None}


@pytest.mark.parametrize("kind", ["listening", "bound"])
@pytest.mark.parametrize("reuse", [0, socket.SO_REUSEADDR])
def test_while_the_first_is_on_its_way(lab: Lab, kind: str, reuse: int) -> None:
    """The port is kept from RESERVE on; when the first one is undone, it is free again."""
    port = 7600
    with (
        cluster(lab, "abc", {"a": "freeze.held:1:STOP"}, timing=SOON) as daemons,
        server(lab, "a", port, kind, reuse) as ours,
        server(lab, "c", port, kind, reuse) as theirs,
        Keeper([ours.fileno()]) as keeper,
    ):
        sockets = [{"pid": keeper.pid, "fd": ours.fileno()}]
        ours.close()
        first: list[str] = []

        def move() -> None:
            [answer] = ask(lab.host("a"), "export", sockets=sockets, to="b")
            first.append(answer["migrations"][0]["outcome"])

        moving = threading.Thread(target=move)
        moving.start()
        daemons.stopped("a")
        try:
            second = export(daemons, "c", theirs)
        finally:
            daemons.signal("a", signal.SIGCONT)
            moving.join(20)
        both = kind == "bound" and reuse  # then they can share it
        assert second == (MOVED if both else REFUSED)
        assert first == ["moved"]


@pytest.mark.parametrize("restart", [False, True])
def test_while_the_first_waits_for_its_application(lab: Lab, restart: bool) -> None:
    """It is an image in a list, but its port is taken: over a restart, until it lives and when it lives."""
    port = 7601
    with (
        cluster(lab, "abc", timing=SOON) as daemons,
        server(lab, "a", port, "listening", socket.SO_REUSEADDR) as ours,
        server(lab, "c", port, "listening", socket.SO_REUSEADDR) as theirs,
    ):
        assert export(daemons, "a", ours) == MOVED
        if restart:
            daemons.kill("b")
            daemons.restart_dead()
            daemons.ready()
        assert export(daemons, "c", theirs) == REFUSED
        control = lab.host("b").control_socket
        [came] = import_socket([ImportRequest(["listening"])], 10, control=control)
        assert came.socket is not None
        with came.socket:
            assert state_of(came.socket.fileno()) == LISTEN
            assert export(daemons, "c", theirs) == REFUSED
        until(lambda: status(lab.host("b"))["import_lists"]["listening"]["length"] == 0)
        assert export(daemons, "c", theirs) == MOVED
