# SPDX-License-Identifier: MIT
"""What the group says before anything is frozen: room, places, and who else may take what one refused."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lab.labs import Lab
from sockmi.client import ImportRequest
from sockmi.queues import queue_length
from sockmi.refusal import Code
from tests.lab.matrix_lab import (
    EVERYWHERE,
    Bench,
    Case,
    Later,
    bench,
    call,
    copy_of,
    exchange,
    moved,
    reconfigured,
    verdict,
)
from tests.lab.scenario import ask, daemons, status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def it(lab: Lab) -> Iterator[Bench]:
    """Three hosts."""
    modes = {"devices": ["eth0"], "modes": ["forward"]}
    with daemons(lab, "abc", redirect=modes) as running, bench(lab, "forward", running) as made:
        yield made


def test_who_is_refused_tries_another_host(it: Bench) -> None:
    """b has no place for a listener's port; c has, as soon as its list has room."""
    port = it.port()
    with it.listener("b", "v4", port, EVERYWHERE), it.listener("a", "v4", port, EVERYWHERE) as mine:
        sockets = [(os.getpid(), mine.fileno())]
        with reconfigured(it, "c", imports={"max_listening": 0}):
            exporting = Later(it.export_passively, sockets, to=None, timeout_s=10.0)
            time.sleep(0.7)  # b has been asked twice
            assert not exporting.done
        [record] = exporting.result()
    moved([record])
    assert record["to"] == "c"
    [came] = it.take([ImportRequest(["listening"], local_port=port)], "c")
    copy_of(came).close()


def test_a_dry_run_asks_for_room(it: Bench) -> None:
    """It says who offers how much, and keeps nothing of it: the same room is there for the move at once."""
    cases = [it.pair("v4") for _turn in range(5)]
    sockets = [(os.getpid(), case.fd) for case in cases]

    def plan(**more: Any) -> Counter[tuple[str | None, str | None]]:
        records = it.export_passively(sockets, dry_run=True, **more)
        return Counter((record["outcome"], record["to"]) for record in records)

    with (
        reconfigured(it, "b", imports={"max_connected": 3}),
        reconfigured(it, "c", imports={"max_connected": 2}),
    ):
        assert plan(to=None) == {("planned", "b"): 3, ("planned", "c"): 2}
        records = it.export_passively(sockets, to="b", dry_run=True)
        assert "room for 3 of 5" in verdict(records[-1])[2] and verdict(records[-1])[1] == Code.NO_OFFER
        assert plan(to="b") == {("planned", "b"): 3, ("refused", None): 2}
        wanted = {"pid": os.getpid(), "kinds": ["connected"]}
        answer = call(it.host("a"), "drain", filter=wanted, dry_run=True)
        assert (answer["progress"]["planned"], answer["progress"]["refused"]) == (5, 0)
        for case in cases:
            exchange(case.ours, case.peer, 1000)  # type: ignore[arg-type]
        started = time.monotonic()
        moved(it.export_passively(sockets, to=None))
        assert time.monotonic() < started + 2  # less than a lease
        sockets = [(os.getpid(), it.pair("v4").fd)]
        assert plan(to=None) == {("refused", None): 1}, "both lists are full"
    for case in cases:
        host = next(name for name in "bc" if listed(it, name, case))
        [came] = it.take([it.request(case)], host)
        it.finish(case, copy_of(came))
        copy_of(came).close()


def test_a_dry_run_counts_the_queue_of_a_listener(it: Bench) -> None:
    """It goes only where there is room for what waits in its queue, too."""
    port = it.port()
    listener, peers = it.listener("a", "v4", port), [it.sock("peer", "v4") for _turn in range(4)]
    for peer in peers:
        peer.connect((it.address("v4"), port))
    until(lambda: queue_length(listener.fileno()) == 4)
    sockets = [(os.getpid(), listener.fileno())]
    full, roomy = {"max_connected": 3}, {"max_connected": 4}
    with reconfigured(it, "b", imports=full), reconfigured(it, "c", imports=full):
        [record] = it.export_passively(sockets, to=None, dry_run=True)
        assert verdict(record)[1] == Code.NO_OFFER and "4 of the others wait" in verdict(record)[2]
        with reconfigured(it, "c", imports=roomy):
            [record] = it.export_passively(sockets, to=None, dry_run=True)
            assert (record["outcome"], record["to"]) == ("planned", "c")
    assert queue_length(listener.fileno()) == 4
    for sock in (listener, *peers):
        sock.close()


def listed(it: Bench, name: str, case: Case) -> bool:
    """Whether a connection waits in a host's import list."""
    rows = [row for one in ask(it.host(name), "list", table="imports") for row in one["imports"]]
    return any(row["origin"].endswith(f":{case.port}") for row in rows)


def test_nobody_is_asked_in_vain_for_long(it: Bench) -> None:
    """A dry run ends after four requests."""
    case = it.pair("v4")
    started = time.monotonic()
    [record] = it.export_passively([(os.getpid(), case.fd)], to="10.77.1.99", dry_run=True)
    assert verdict(record)[:2] == ("refused", Code.NO_OFFER)
    assert time.monotonic() < started + 5


def test_who_is_refused_by_all_does_not_wait(it: Bench) -> None:
    """Neither b nor c has a place for the port, and that will not change by itself."""
    port = it.port()
    with (
        it.listener("b", "v4", port, EVERYWHERE),
        it.listener("c", "v4", port, EVERYWHERE),
        it.listener("a", "v4", port, EVERYWHERE) as mine,
    ):
        started = time.monotonic()
        [record] = it.export_passively([(os.getpid(), mine.fileno())], to=None, timeout_s=30.0)
        assert time.monotonic() < started + 5
    assert verdict(record)[:2] == ("refused", Code.PORT_TAKEN)


def spread(it: Bench, count: int) -> Counter[str]:
    """Where so many connections go that are exported one after the other to any host."""
    found: Counter[str] = Counter()
    for _turn in range(count):
        [record] = it.export_passively([(os.getpid(), it.pair("v4").fd)], to=None)
        moved([record])
        found[record["to"]] += 1
    return found


@pytest.fixture
def emptied(it: Bench) -> Iterator[Bench]:
    """Nothing is listed before and afterwards."""
    it.clear("abc")
    yield it
    it.clear("abc")


@pytest.mark.parametrize("busy", ["b", "c"])
def test_the_least_loaded_gets_it(emptied: Bench, busy: str) -> None:
    """Whoever of them is faster."""
    it, idle = emptied, {"b": "c", "c": "b"}[busy]
    moved(it.export_passively([(os.getpid(), it.pair("v4").fd) for _turn in range(40)], to=busy))
    with reconfigured(it, "a", policy="least-loaded"):
        assert spread(it, 8) == {idle: 8}


def test_weights_divide_it(emptied: Bench) -> None:
    it = emptied
    with (
        reconfigured(it, "b", weight=750),
        reconfigured(it, "c", weight=250),
        reconfigured(it, "a", policy="weighted"),
    ):
        assert spread(it, 8) == {"b": 6, "c": 2}


@pytest.mark.parametrize("name", ["b", "c"])
def test_where_an_application_waits(emptied: Bench, name: str) -> None:
    """It comes there, though another host may be faster."""
    it = emptied
    for _turn in range(4):
        importing = Later(it.take, [ImportRequest(["connected"])], name)
        until(lambda: status(it.host(name))["import_lists"]["connected"]["waiting"] == 1)
        assert spread(it, 1) == {name: 1}
        [came] = importing.result()
        copy_of(came).close()


@pytest.mark.parametrize("policy", ["first", "least-loaded"])
def test_the_grace_can_be_chosen(emptied: Bench, policy: str) -> None:
    """One of three has no room, and is silent: it is waited for as long as an operator has said."""
    it = emptied
    with reconfigured(it, "c", imports={"max_connected": 0}):
        for grace_s in (1.0, 0.0):
            timing = {"freeze_deadline_s": 5.0, "offer_grace_s": grace_s}
            with reconfigured(it, "a", policy=policy, timing=timing):
                started = time.monotonic()
                assert spread(it, 1) == {"b": 1}
                assert (time.monotonic() - started >= 1.0) == (grace_s == 1.0)
