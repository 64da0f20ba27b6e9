# SPDX-License-Identifier: MIT
"""An owner that keeps its sockets locked: they stay, and are told by name; nobody else waits for them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lab.host import Host
from lab.labs import Lab
from lab.plan import PATIENCE
from sockmi.engine.inspector import PATIENCE_S
from tests.lab.answering import answering
from tests.lab.locking import PAGE, Locking, locking
from tests.lab.scenario import ask, daemons, drain, status, until

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(180)]

PORT, GOOD_PORT = 7710, 7720
NOBODY = 65534
LOCKED = 70  # more than an inspector looks at together
REDIRECT = {"devices": ["eth0"], "modes": ["forward"]}


def connected(lab: Lab, port: int, count: int) -> list[socket.socket]:
    peers = [lab.host("peer").socket() for _turn in range(count)]
    for one in peers:
        one.settimeout(30)
        one.connect((str(lab.host("a").address4), port))
    return peers


@contextmanager
def locked(lab: Lab, count: int = 1, uid: int = 0) -> Iterator[tuple[Locking, list[socket.socket]]]:
    with locking(lab.host("a"), PORT, count, uid) as server:
        peers = connected(lab, PORT, count)
        server.locked()
        yield server, peers


def asked(peer: socket.socket) -> bytes:
    peer.sendall(b"?")
    return peer.recv(1)


def slowest_status(host: Host, until_s: float) -> float:
    """How long the daemon takes to answer what concerns no socket, at worst, in seconds."""
    worst = 0.0
    while time.monotonic() < until_s:
        begun = time.monotonic()
        status(host)
        worst = max(worst, time.monotonic() - begun)
    return worst


def rows(host: Host, **wanted: object) -> list[dict[str, object]]:
    return [row for answer in ask(host, "list", filter=wanted) for row in answer["sockets"]]


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_it_stays_and_nobody_waits(lab: Lab, uid: int) -> None:
    a = lab.host("a")
    with (
        daemons(lab, "ab", redirect=REDIRECT) as running,
        answering(a, GOOD_PORT),
        locked(lab, LOCKED, uid) as (server, peers),
    ):
        good = connected(lab, GOOD_PORT, 40)
        assert {asked(one) for one in good} == {b"a"}

        begun = time.monotonic()
        listed = rows(a, kinds=["connected"])
        assert time.monotonic() - begun < (2 * PATIENCE_S + 1) * PATIENCE
        by_port = {PORT: set(), GOOD_PORT: set()}  # type: ignore[var-annotated]
        for row in listed:
            by_port[int(str(row["local"]).rsplit(":", 1)[1])].add((row["refusal"] or {}).get("code"))  # type: ignore[attr-defined]
        assert by_port == {PORT: {"locked"}, GOOD_PORT: {None}}

        begun = time.monotonic()
        records = drain(a, "b")
        assert time.monotonic() - begun < (2 * PATIENCE_S + 5) * PATIENCE
        assert {str(one["local"]).rsplit(":", 1)[1] for one in records} == {str(PORT), str(GOOD_PORT)}
        outcomes = [(one["outcome"], (one["refusal"] or {}).get("code")) for one in records]
        assert sorted(outcomes, key=str) == [("moved", None)] * 40 + [("refused", "locked")] * LOCKED
        assert slowest_status(a, time.monotonic() + 0.5) < 0.5 * PATIENCE

        # It does not outlive its lock: then it can be looked at, and moved.
        server.free()
        for one in peers:
            one.sendall(b"?")
            got = b""
            while len(got) < PAGE + 1:
                got += one.recv(PAGE + 1 - len(got))
            assert got == bytes(PAGE) + b"?"
        until(lambda: {row["movable"] for row in rows(a, local_port=PORT, kinds=["connected"])} == {True})
        assert {one["outcome"] for one in drain(a, "b", local_port=PORT)} == {"moved"}
        assert running["a"].stop() == 0


def test_the_loop_goes_on_meanwhile(lab: Lab) -> None:
    """While a look is under way others are answered at once."""
    a = lab.host("a")
    with daemons(lab, "ab", redirect=REDIRECT), locked(lab), ThreadPoolExecutor(1) as beside:
        listing = beside.submit(rows, a, kinds=["connected"])
        assert slowest_status(a, time.monotonic() + 0.8) < 0.4 * PATIENCE
        assert [row["refusal"]["code"] for row in listing.result()] == ["locked"]  # type: ignore[index]


def test_what_others_close_ends_at_once(lab: Lab) -> None:
    """What was looked at together with one that is locked: who is left behind has nothing of it."""
    a = lab.host("a")
    with daemons(lab, "ab", redirect=REDIRECT), locked(lab):
        with answering(a, GOOD_PORT):
            good = connected(lab, GOOD_PORT, 5)
            assert {asked(one) for one in good} == {b"a"}
            codes = {str((row["refusal"] or {}).get("code")) for row in rows(a, kinds=["connected"])}  # type: ignore[attr-defined]
            assert codes == {"locked", "None"}
        for one in good:
            one.settimeout(3 * PATIENCE)
            assert one.recv(1) == b""
        assert len(rows(a, local_port=PORT, kinds=["connected"])) == 1


def test_a_daemon_stops_and_starts_meanwhile(lab: Lab) -> None:
    a = lab.host("a")
    with daemons(lab, "ab", redirect=REDIRECT) as running, locked(lab):
        assert [one["refusal"]["code"] for one in drain(a, "b", local_port=PORT)] == ["locked"]
        begun = time.monotonic()
        assert running["a"].stop() == 0
        assert time.monotonic() - begun < 3 * PATIENCE
        running["a"].start()
        assert [row["refusal"]["code"] for row in rows(a, local_port=PORT, kinds=["connected"])] == ["locked"]  # type: ignore[index]


def test_quiet_connections_are_found_all_the_same(lab: Lab) -> None:
    a = lab.host("a")
    with (
        daemons(lab, "ab", redirect=REDIRECT),
        answering(a, GOOD_PORT),
        locked(lab),
    ):
        good = connected(lab, GOOD_PORT, 5)
        assert {asked(one) for one in good} == {b"a"}
        time.sleep(0.3)
        records = drain(a, "b", idle_s=0.2)
        assert [one["outcome"] for one in records] == ["moved"] * 5
