# SPDX-License-Identifier: MIT
"""kill -9 of a daemon at any step, then a restart: every connection is live on exactly one host.

Also: both daemons at any time, partitions, stops in the middle, applications that die.
"""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.crashpoints import EXPORTER, IMPORTER
from tests.lab.crash_lab import (
    CLIENTS,
    Crashing,
    Drain,
    Sleeper,
    cluster,
    finish,
    flowing,
    is_closed,
    journals_agree,
    nothing_left,
    partitioned,
    places,
    service,
    settled,
    small_disk,
    tracers,
)
from tests.lab.scenario import drain, status, until

pytestmark = pytest.mark.timeout(240)

# Reached only when something else goes wrong, or later: they have tests of their own.
UNDOING = {"thaw.unheld", "discard.dropped", "discard.journalled"}
#: Until then the exporter has not decided, or can and does undo it.
UNDECIDED = {"freeze.stopped", "freeze.held", "freeze.captured", "commit.led-away", "commit.journalled"}
#: Where translation makes a difference.
TRANSLATED = {
    "commit.led-away", "commit.journalled", "commit.released",
    "prepare.journalled", "activate.journalled", "hand.sent", "taken.admitted", "taken.activated",
}  # fmt: skip


def pause(seconds: float = 0.2) -> None:
    """Let time pass: that much of it is part of the test."""
    threading.Event().wait(seconds)


def clients(serving: Crashing, count: int = 2) -> None:
    """Start clients and wait until they are connected."""
    for number in range(count):
        serving.client(*CLIENTS[serving.kind], "--silence-s", "60", "--name", f"{serving.kind}{number}")
    serving.connected(count)
    flowing(serving)


def proved(serving: Crashing, hosts: str, home: str = "a") -> dict[str, str]:
    """All that has to be true after a crash; where the connections were."""
    where = settled(serving, hosts)
    journals_agree(serving, hosts, home, where)
    assert not tracers(list(serving.processes.values()))
    finish(serving)
    nothing_left(serving.lab, hosts)
    return where


def cases(points: tuple[str, ...]) -> list[tuple[str, str]]:
    """(point, mode): forward everywhere, nat where it matters."""
    chosen = [point for point in points if point not in UNDOING]
    return [(point, "forward") for point in chosen] + [
        (point, "nat") for point in chosen if point in TRANSLATED
    ]


@pytest.mark.parametrize(("point", "mode"), cases(EXPORTER))
def test_exporter_dies(lab: Lab, tmp_path: Path, point: str, mode: str) -> None:
    """Two connections under two-way load; the exporter is killed at one step and comes back."""
    with (
        cluster(lab, "ab", {"a": point}, redirect={"modes": [mode]}) as daemons,
        service(daemons, "duplex", "ab", tmp_path) as serving,
    ):
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        daemons.died("a")
        assert moving.ended() is None
        daemons.restart_dead()
        where = proved(serving, "ab")
        assert set(where.values()) == ({"a"} if point in UNDECIDED else {"b"})


@pytest.mark.parametrize(("point", "mode"), cases(IMPORTER))
def test_importer_dies(lab: Lab, tmp_path: Path, point: str, mode: str) -> None:
    """The same for the importer."""
    with (
        cluster(lab, "ab", {"b": point}, redirect={"modes": [mode]}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        daemons.died("b")
        daemons.restart_dead()
        records = moving.ended()
        assert records is not None
        where = proved(serving, "ab")
        # What was not yet promised is tried again, if the importer is back in time.
        assert {one["outcome"] for one in records} == ({"moved"} if "b" in where.values() else {"aborted"})
        assert "b" in where.values() or point.startswith("prepare")


@pytest.mark.parametrize(
    ("victim", "point"),
    [
        ("a", "freeze.held:2"),
        ("a", "commit.journalled:2"),
        ("a", "commit.done:2"),
        ("b", "taken.activated:2"),
    ],
)
def test_second_chunk(lab: Lab, tmp_path: Path, victim: str, point: str) -> None:
    """One connection has moved already when the daemon dies of the next."""
    with (
        cluster(lab, "ab", {victim: point}, chunk_size=1) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        Drain(lab, "a", "b", serving.port)
        daemons.died(victim)
        daemons.restart_dead()
        assert "b" in proved(serving, "ab").values()


@pytest.mark.parametrize(
    ("crash_at", "victim"),
    [
        ({"a": "thaw.unheld", "b": "prepare.journalled:1:STOP"}, "a"),
        ({"b": "prepare.journalled:1:STOP,discard.dropped"}, "b"),
        ({"b": "prepare.journalled:1:STOP,discard.journalled"}, "b"),
    ],
)
def test_undoing(lab: Lab, tmp_path: Path, crash_at: dict[str, str], victim: str) -> None:
    """The importer is too late, and a daemon dies while the chunk is undone."""
    with cluster(lab, "ab", crash_at) as daemons, service(daemons, "duplex", "ab", tmp_path) as serving:
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        daemons.stopped("b")
        if victim == "b":
            until(lambda: not tracers(list(serving.processes.values())))  # the freeze has been undone
            daemons.signal("b", signal.SIGCONT)
        daemons.died(victim)
        daemons.signal("b", signal.SIGCONT) if victim == "a" else None
        daemons.restart_dead()
        moving.ended()
        proved(serving, "ab")


@pytest.mark.parametrize(
    ("victim", "point", "mode"),
    [
        ("a", "reroute.led", "forward"),
        ("a", "reroute.led", "nat"),
        ("a", "reroute.journalled", "forward"),
        ("b", "collect.expired", "forward"),
        ("b", "collect.expired", "nat"),
        ("b", "collect.journalled", "forward"),
        ("b", "commit.journalled", "nat"),
        ("c", "taken.admitted", "nat"),
    ],
)
def test_further_hop(lab: Lab, tmp_path: Path, victim: str, point: str, mode: str) -> None:
    """a -> b -> c: the home, the waypoint or the new holder dies while the redirects are collapsed."""
    with (
        cluster(lab, "abc", {victim: point}, redirect={"modes": [mode]}) as daemons,
        service(daemons, "lines", "abc", tmp_path) as serving,
    ):
        clients(serving)
        serving.move("a", "b")
        Drain(lab, "b", "c", serving.port)
        daemons.died(victim)
        daemons.restart_dead()
        where = set(proved(serving, "abc").values())
        assert where == ({"b"} if point == "commit.journalled" else {"c"})


@pytest.mark.parametrize(
    ("point", "mode"),
    [("prepare.journalled", "nat"), ("activate.suspended", "forward"), ("activate.journalled", "nat")],
)
def test_coming_home(lab: Lab, tmp_path: Path, point: str, mode: str) -> None:
    """a -> b -> a: the home dies while its own redirect is out of force."""
    with (
        cluster(lab, "ab", {"a": point}, redirect={"modes": [mode]}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        serving.move("a", "b")
        moving = Drain(lab, "b", "a", serving.port)
        daemons.died("a")
        daemons.restart_dead()
        assert moving.ended() is not None
        where = set(proved(serving, "ab").values())
        assert where == {"a"} or point.startswith("prepare")


@pytest.mark.parametrize(
    ("victim", "point"),
    [
        ("a", "collect.expired"),
        ("a", "collect.journalled"),
        ("b", "forget-holdings.evicted"),
        ("b", "forget-holdings.journalled"),
    ],
)
def test_end_of_the_connection(lab: Lab, tmp_path: Path, victim: str, point: str) -> None:
    """A daemon dies while the redirects of connections that have ended are collected."""
    with cluster(lab, "ab", {victim: point}) as daemons, service(daemons, "lines", "ab", tmp_path) as serving:
        clients(serving)
        serving.move("a", "b")
        where = settled(serving, "ab")
        finish(serving)
        until(lambda: lab.host("b").run(["ss", "--kill", "--tcp", "state", "time-wait"]).returncode == 0)
        daemons.died(victim)
        daemons.restart_dead()
        journals_agree(serving, "ab", "a", where)
        nothing_left(lab, "ab")


@pytest.mark.parametrize("dead", ["a", "b", "ab"])
def test_ended_while_a_daemon_is_down(lab: Lab, tmp_path: Path, dead: str) -> None:
    """Redirects go on without the daemons; what ends meanwhile is collected when they are back."""
    with cluster(lab, "ab") as daemons, service(daemons, "lines", "ab", tmp_path) as serving:
        clients(serving)
        serving.move("a", "b")
        for host in dead:
            daemons.kill(host)
        flowing(serving)
        finish(serving)
        daemons.restart_dead()
        nothing_left(lab, "ab")


@pytest.mark.parametrize(
    ("first", "point", "order"),
    [
        ("a", "commit.done", "ab"),
        ("a", "commit.done", "ba"),
        ("a", "commit.journalled", "ba"),
        ("b", "prepare.journalled", "ab"),
    ],
)
def test_both_die(lab: Lab, tmp_path: Path, first: str, point: str, order: str) -> None:
    """One dies at a step, then the other; they are restarted in either order, the later one much later."""
    with cluster(lab, "ab", {first: point}) as daemons, service(daemons, "duplex", "ab", tmp_path) as serving:
        clients(serving)
        Drain(lab, "a", "b", serving.port)
        daemons.died(first)
        daemons.kill("b" if first == "a" else "a")
        daemons.start(order[0])
        pause(1.0)
        daemons.start(order[1])
        where = set(proved(serving, "ab").values())
        assert where == ({"b"} if point == "commit.done" else {"a"})


@pytest.mark.parametrize("seed", range(2))
def test_at_random_times(lab: Lab, tmp_path: Path, seed: int) -> None:
    """Four connections go to and fro under load; daemons are killed whenever it pleases the dice."""
    dice = random.Random(seed)  # noqa: S311
    with (
        cluster(lab, "ab", chunk_size=1, redirect={"modes": [dice.choice(["forward", "nat"])]}) as daemons,
        service(daemons, "duplex", "ab", tmp_path) as serving,
    ):
        clients(serving, 4)
        for _ in range(5):
            drains = [Drain(lab, "a", "b", serving.port)]
            if dice.random() < 0.5:
                drains.append(Drain(lab, "b", "a", serving.port))
            victims = dice.choice(["a", "b", "ab"])
            for host in victims:
                pause(dice.uniform(0.0, 0.12))
                daemons.kill(host)
            daemons.restart_dead(dice.choice(["ab", "ba"]))
            daemons.ready()
            for one in drains:
                one.ended()
            journals_agree(serving, "ab", "a", settled(serving, "ab"))
        proved(serving, "ab")


@pytest.mark.parametrize(
    ("paused", "point"),
    [
        ("a", "freeze.captured"),
        ("b", "prepare.journalled"),
        ("a", "commit.done"),
        ("b", "activate.journalled"),
        ("b", "taken.answered"),
    ],
)
def test_partition(lab: Lab, tmp_path: Path, paused: str, point: str) -> None:
    """The hosts stop hearing each other just there; some time later they do again."""
    with (
        cluster(lab, "ab", {paused: f"{point}:1:STOP"}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        Drain(lab, "a", "b", serving.port)
        daemons.stopped(paused)
        with partitioned(lab, "ab"):
            daemons.signal(paused, signal.SIGCONT)
            pause(2.0)
            assert not tracers(list(serving.processes.values()))
        where = set(proved(serving, "ab").values())
        if point in UNDECIDED:
            assert where <= {"a", "b"}
        elif point != "prepare.journalled":
            assert where == {"b"}


@pytest.mark.parametrize("point", ["freeze.captured", "commit.led-away"])
def test_stopped_for_longer_than_the_freeze_may_last(lab: Lab, tmp_path: Path, point: str) -> None:
    """The kernel lifts the hold by itself, and the belated commit is refused."""
    with (
        cluster(lab, "ab", {"a": f"{point}:1:STOP"}, timing={"freeze_deadline_s": 0.3}) as daemons,
        service(daemons, "duplex", "ab", tmp_path) as serving,
    ):
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        daemons.stopped("a")
        pause(2.0)
        held = lab.host("a").run(["nft", "list", "set", "inet", "sockmi", "hold4"]).stdout
        assert "elements" not in held
        daemons.signal("a", signal.SIGCONT)
        assert moving.ended() is not None
        where = proved(serving, "ab")
        assert set(where.values()) <= {"a", "b"}


@pytest.mark.parametrize(
    ("stopped", "point"),
    [
        ("a", "freeze.captured"),
        ("a", "commit.journalled"),
        ("a", "commit.done"),
        ("b", "prepare.journalled"),
        ("b", "activate.journalled"),
        ("b", "hand.sent"),
    ],
)
def test_clean_stop_in_the_middle(lab: Lab, tmp_path: Path, stopped: str, point: str) -> None:
    """SIGTERM: what is committed is finished, what is not is undone; then a restart."""
    with (
        cluster(lab, "ab", {stopped: f"{point}:1:STOP"}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        Drain(lab, "a", "b", serving.port)
        daemons.stopped(stopped)
        daemons.signal(stopped, signal.SIGTERM)
        daemons.signal(stopped, signal.SIGCONT)
        process = daemons.daemons[stopped].process
        assert process is not None
        assert process.wait(15) == 0
        assert not tracers(list(serving.processes.values()))
        flowing(serving)  # without that daemon
        daemons.restart_dead()
        proved(serving, "ab")


def test_reload_in_the_middle(lab: Lab, tmp_path: Path) -> None:
    """SIGHUP while connections move changes nothing for them."""
    with cluster(lab, "ab", chunk_size=1) as daemons, service(daemons, "duplex", "ab", tmp_path) as serving:
        clients(serving, 4)
        moving = Drain(lab, "a", "b", serving.port)
        while moving.is_alive():
            daemons.signal("a", signal.SIGHUP)
            daemons.signal("b", signal.SIGHUP)
            pause(0.01)
        assert {one["outcome"] for one in moving.ended() or []} == {"moved"}
        assert set(proved(serving, "ab").values()) == {"b"}


def test_application_dies_with_descriptors_on_their_way(lab: Lab, tmp_path: Path) -> None:
    """It is gone before it has read them; another one gets the connections."""
    with cluster(lab, "ab") as daemons, service(daemons, "lines", "a", tmp_path) as serving:
        clients(serving)
        sleeper = Sleeper(lab.host("b"), serving.port)
        moving = Drain(lab, "a", "b", serving.port)
        sleeper.served()
        sleeper.close()
        assert {one["outcome"] for one in moving.ended() or []} == {"moved"}
        until(lambda: status(lab.host("b"))["import_lists"]["connected"]["length"] == 2)
        serving.serve("b")
        assert set(proved(serving, "ab").values()) == {"b"}


@pytest.mark.parametrize("read", [False, True])
def test_application_that_is_late(lab: Lab, tmp_path: Path, read: bool) -> None:
    """It does not answer in time: what it was sent is worth nothing, another one gets the connections."""
    with (
        cluster(lab, "ab") as daemons,
        service(daemons, "lines", "a", tmp_path) as serving,
        Sleeper(lab.host("b"), serving.port) as sleeper,
    ):
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        sleeper.served()
        descriptors = sleeper.descriptors() if read else []
        serving.serve("b")
        assert {one["outcome"] for one in moving.ended() or []} == {"moved"}
        assert set(proved(serving, "ab").values()) == {"b"}
        assert all(is_closed(descriptor) for descriptor in descriptors)


@pytest.mark.parametrize("read", [False, True])
def test_daemon_dies_and_the_application_sleeps(lab: Lab, tmp_path: Path, read: bool) -> None:
    """It sits on dormant descriptors, or has not even read them; after the restart another one is served."""
    with (
        cluster(lab, "ab", {"b": "hand.sent"}) as daemons,
        service(daemons, "lines", "a", tmp_path) as serving,
        Sleeper(lab.host("b"), serving.port) as sleeper,
    ):
        clients(serving)
        Drain(lab, "a", "b", serving.port)
        daemons.died("b")
        descriptors = sleeper.descriptors() if read else []
        daemons.restart_dead()
        serving.serve("b")
        assert set(proved(serving, "ab").values()) == {"b"}
        assert all(is_closed(descriptor) for descriptor in descriptors)


def test_listed_over_a_restart(lab: Lab, tmp_path: Path) -> None:
    """Nobody waits at b; its daemon is killed; then an application comes."""
    with cluster(lab, "ab") as daemons, service(daemons, "lines", "a", tmp_path) as serving:
        clients(serving)
        records = drain(lab.host("a"), "b", local_port=serving.port)
        assert {one["outcome"] for one in records} == {"moved"}
        daemons.kill("b")
        daemons.restart_dead()
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 2
        assert all(not where for where in places(serving, "ab").values())  # no socket: an image, held
        serving.serve("b")
        assert set(proved(serving, "ab").values()) == {"b"}


@pytest.mark.parametrize(
    ("paused", "point", "home"),
    [("a", "commit.led-away", "a"), ("b", "prepare.restored", "a"), ("b", "activate.suspended", "b")],
)
def test_full_disk(lab: Lab, tmp_path: Path, paused: str, point: str, home: str) -> None:
    """The journal or the spool cannot be written just then: that must not cost a connection.

    What cannot be undone any more is finished by a restart, when there is room again.
    """
    with (
        small_disk(lab.host(paused)) as disk,
        cluster(lab, "ab", {paused: f"{point}:1:STOP"}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        moving = Drain(lab, "a", "b", serving.port)
        daemons.stopped(paused)
        disk.fill()
        daemons.signal(paused, signal.SIGCONT)
        process = daemons.daemons[paused].process
        assert process is not None
        if home == "b":
            assert process.wait(15) == 1
        elif paused == "a":
            assert {one["refusal"]["code"] for one in moving.ended() or []} == {"internal"}
        else:
            flowing(serving)
        disk.empty()
        daemons.restart_dead()
        assert moving.ended() is not None
        assert set(proved(serving, "ab").values()) == {home}


@pytest.mark.parametrize("point", ["freeze.held", "commit.journalled"])
def test_listener_stays(lab: Lab, tmp_path: Path, point: str) -> None:
    """The exporter dies before its listener has gone: it goes on listening."""
    with cluster(lab, "ab", {"a": point}) as daemons, service(daemons, "lines", "a", tmp_path) as serving:
        moving = Drain(lab, "a", "b", serving.port, "listening")
        daemons.died("a")
        assert moving.ended() is None
        daemons.restart_dead()
        clients(serving)
        assert set(proved(serving, "ab").values()) == {"a"}
