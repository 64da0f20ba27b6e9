# SPDX-License-Identifier: MIT
"""kill -9 of a daemon at any step, then a restart: every connection is live on exactly one host.

Also: both daemons at any time, partitions, stops in the middle, applications that die. Each test moves
connections over IPv4 and over IPv6 at the same time.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lab.labs import Lab
from sockmi.crashpoints import ENGINE, EXPORTER, IMPORTER, IN_REPAIR, POINTS, REHEARSAL
from tests.lab.crash_lab import (
    CLOSED,
    Sleeper,
    Stages,
    cluster,
    elements,
    flowing,
    journals_agree,
    nothing_left,
    partitioned,
    places,
    proved,
    service,
    settled,
    small_disk,
    state_of,
    tracers,
)
from tests.lab.mode_lab import WITHOUT_LEGACY, hardware_address, legacy_iptables, lives_at, needs_legacy
from tests.lab.scenario import drain, status, until

pytestmark = pytest.mark.timeout(240)

#: For what waits for the end of a freeze.
SOON = {"freeze_deadline_s": 0.5}
#: Until then the exporter has not decided, or can and does undo it.
UNDECIDED = {
    "freeze.stopped", "freeze.held", "freeze.captured",
    "commit.led-away", "commit.journalled", "commit.accepted", *IN_REPAIR, REHEARSAL[0],
}  # fmt: skip
#: Where translation makes a difference.
TRANSLATED = {
    "commit.led-away", "commit.journalled", "commit.released",
    "prepare.journalled", "activate.journalled", "hand.sent",
    "taken.admitted", "taken.activated", "taken.answered", "taken.unspooled", *REHEARSAL,
}  # fmt: skip
#: For the special modes: about each change of their own, and of the journal. iptables is slow to start.
BY_IPTABLES = {"commit.led-away", "commit.journalled", "commit.done", "activate.journalled", "taken.admitted"}
BY_TAKEOVER = BY_IPTABLES | {"freeze.held", "release.arrested", "prepare.journalled", "taken.answered"}

UNDOING = [
    ({"a": "thaw.unheld", "b": "prepare.journalled:1:STOP"}, "a"),
    ({"b": "prepare.journalled:1:STOP,discard.dropped"}, "b"),
    ({"b": "prepare.journalled:1:STOP,discard.journalled"}, "b"),
]
FURTHER_HOP = [
    ("a", "reroute.led", "forward"),
    ("a", "reroute.led", "nat"),
    ("a", "reroute.journalled", "forward"),
    ("b", "collect.expired", "forward"),
    ("b", "collect.expired", "nat"),
    ("b", "collect.journalled", "forward"),
    ("b", "commit.journalled", "nat"),
    ("b", "commit.done", "forward"),
    ("c", "taken.admitted", "nat"),
    ("a", "reroute.led", "takeover"),
    ("a", "reroute.led", "iptables"),
    ("b", "commit.journalled", "takeover"),
    ("b", "commit.done", "iptables"),
]
END = [
    ("a", "collect.expired", "forward"),
    ("a", "collect.expired", "nat"),
    ("a", "collect.journalled", "forward"),
    ("b", "forget-holdings.evicted", "forward"),
    ("b", "forget-holdings.evicted", "nat"),
    ("b", "forget-holdings.journalled", "forward"),
    ("a", "collect.expired", "iptables"),
    ("b", "forget-holdings.evicted", "takeover"),
    ("b", "forget-holdings.evicted", "iptables"),
]
RETURN = [
    (point, mode)
    for point in ("drop.led-again", "discard.dropped")
    for mode in ("forward", "nat", "takeover")
]
TOGETHER = ["activate.journalled", "taken.activated"]
AGAIN = "recovery.taken-back"
#: Only listeners with connections in their queues get there: test_queue.py.
QUEUE = {"queue.ended", "queue.closing"}
#: Only connections with something unsent get there: test_tail.py.
UNSENT = {"restore.open"}
#: Only connections with something unread get there: test_killed_in_repair.py.
UNREAD = {"capture.inlined", "capture.peeked"}
#: In a child of the daemon: test_released_together.py.
CLOSED_TOGETHER = "release.closed"
#: Reached only when something else goes wrong: they have tests of their own.
UNDONE = {
    CLOSED_TOGETHER,
    "thaw.unheld",
    "drop.led-again",
    "discard.dropped",
    "discard.journalled",
    *QUEUE,
    *UNSENT,
    *UNREAD,
}


def by(mode: str, *where: str) -> Any:
    """A case, if this host can do it."""
    return pytest.param(*where, mode, marks=[needs_legacy] if mode == "iptables" else [])


def cases(points: tuple[str, ...]) -> list[Any]:
    """(point, mode): forward everywhere, nat where it matters, the special ones where they differ most."""
    chosen = [point for point in points if point not in UNDONE]
    return (
        [by("forward", point) for point in chosen]
        + [by("nat", point) for point in chosen if point in TRANSLATED]
        + [by("takeover", point) for point in chosen if point in BY_TAKEOVER]
        + [by("iptables", point) for point in chosen if point in BY_IPTABLES]
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Daemons and servers that stay for as long as no test fails."""
    serial = itertools.count()
    made = Stages(lambda: f"t{os.getpid()}-s{next(serial)}", tmp_path_factory)
    legacy = nullcontext() if WITHOUT_LEGACY else legacy_iptables(tmp_path_factory.mktemp("bin"))
    with legacy:
        yield made
        made.close()


def pause(seconds: float) -> None:
    """Let time pass: that much of it is part of the test."""
    threading.Event().wait(seconds)


def test_every_point_has_its_test() -> None:
    """None is forgotten."""
    crashes = [at for ats, _unused in UNDOING for at in ats.values()] + [
        at for _unused, at, _unused in FURTHER_HOP + END
    ]
    crashes += [case.values[0] for case in cases(EXPORTER + IN_REPAIR + IMPORTER + ENGINE + REHEARSAL)]
    crashes += [point for point, _unused in RETURN]
    crashes += [AGAIN, CLOSED_TOGETHER, *QUEUE, *UNSENT, *UNREAD]
    assert {one.partition(":")[0] for at in crashes for one in at.split(",")} == set(POINTS)


@pytest.mark.parametrize(("point", "mode"), cases(EXPORTER + IN_REPAIR + REHEARSAL[:1]))
def test_exporter_dies(stages: Stages, tmp_path: Path, point: str, mode: str) -> None:
    """Two-way load; the exporter is killed at one step and comes back."""
    with stages("duplex", tmp_path, {"a": point}, mode) as (daemons, serving):
        serving.clients()
        moving = daemons.drain("a", "b", serving.port)
        daemons.died("a")
        assert moving.ended() is None
        daemons.restart_dead()
        assert not [one for one in elements(daemons.lab.host("a")) if one.name == "hold"]  # at once
        proved(daemons, serving, "a" if point in UNDECIDED else "b")


@pytest.mark.parametrize(("point", "mode"), cases(IMPORTER + ENGINE + REHEARSAL[1:]))
def test_importer_dies(stages: Stages, tmp_path: Path, point: str, mode: str) -> None:
    """The same for the importer."""
    with stages("lines", tmp_path, {"b": point}, mode) as (daemons, serving):
        serving.clients()
        moving = daemons.drain("a", "b", serving.port)
        daemons.died("b")
        daemons.restart_dead()
        moving.ended()
        # What was not yet promised is tried again, if the importer is back in time.
        moving.told(proved(daemons, serving, "" if point.startswith(("prepare", "rehearsal")) else "b"))


@pytest.mark.parametrize(
    ("victim", "point", "mode"),
    [
        ("a", "freeze.held:2", "forward"),
        ("a", "commit.journalled:2", "nat"),
        ("a", "commit.done:2", "forward"),
        ("b", "taken.activated:2", "nat"),
    ],
)
def test_second_chunk(stages: Stages, tmp_path: Path, victim: str, point: str, mode: str) -> None:
    """One connection has moved already when the daemon dies of the next."""
    with stages("duplex", tmp_path, {victim: point}, mode, chunk_size=1) as (daemons, serving):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.died(victim)
        daemons.restart_dead()
        assert "b" in proved(daemons, serving).values()


@pytest.mark.parametrize("point", TOGETHER)
def test_all_that_come_with_an_address(stages: Stages, tmp_path: Path, point: str) -> None:
    """The importer dies with the first of several: the others follow."""
    with stages("lines", tmp_path, {"b": point}, "takeover") as (daemons, serving):
        serving.clients(2)
        daemons.drain("a", "b", serving.port)
        daemons.died("b")
        daemons.restart_dead()
        proved(daemons, serving, "b")


@pytest.mark.parametrize(("crash_at", "victim"), UNDOING)
def test_undoing(stages: Stages, tmp_path: Path, crash_at: dict[str, str], victim: str) -> None:
    """The importer is too late, and a daemon dies while the chunk is undone."""
    with stages("duplex", tmp_path, crash_at, timing=SOON) as (daemons, serving):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.stopped("b")
        if victim == "b":
            until(lambda: not tracers(serving))  # the freeze has been undone
            daemons.signal("b", signal.SIGCONT)
        daemons.died(victim)
        daemons.go_on()
        daemons.restart_dead()
        proved(daemons, serving)


@pytest.mark.parametrize(("point", "mode"), RETURN)
def test_undoing_a_return(stages: Stages, tmp_path: Path, point: str, mode: str) -> None:
    """a -> b -> a, but the home is too late, and dies while it goes back to leading the packets to b."""
    crash_at = {"a": f"prepare.journalled:1:STOP,{point}"}
    with stages("duplex", tmp_path, crash_at, mode, timing=SOON) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        daemons.drain("b", "a", serving.port)
        daemons.stopped("a")
        until(lambda: not tracers(serving))
        daemons.signal("a", signal.SIGCONT)
        daemons.died("a")
        daemons.restart_dead()
        proved(daemons, serving)


def test_an_address_that_does_not_return_after_all(stages: Stages, tmp_path: Path) -> None:
    """a -> b -> a by takeover, but a is too late: the peer goes on sending to b."""
    crash_at = {"a": "prepare.journalled:1:STOP,drop.led-again:1:STOP"}
    with stages("lines", tmp_path, crash_at, "takeover", timing=SOON) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        daemons.drain("b", "a", serving.port)
        daemons.stopped("a")
        until(lambda: not tracers(serving))
        daemons.signal("a", signal.SIGCONT)
        daemons.stopped("a")
        assert {lives_at(daemons.lab.host("peer"), one) for one in serving.service.values()} == {
            hardware_address(daemons.lab.host("b"))
        }
        flowing(serving)
        daemons.go_on()
        proved(daemons, serving)


@pytest.mark.parametrize("mode", [by(mode) for mode in ("forward", "nat", "takeover", "iptables")])
def test_dies_again_while_it_recovers(stages: Stages, tmp_path: Path, mode: str) -> None:
    """a -> b -> c: the waypoint dies before its commit, and once more before it has undone its redirect."""
    with stages("duplex", tmp_path, {"b": "commit.led-away"}, mode) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        daemons.drain("b", "c", serving.port)
        daemons.died("b")
        daemons.dies_at_start("b", AGAIN)
        # They stay held until a daemon has put things right, however late.
        held = [one for one in elements(daemons.lab.host("b")) if one.name == "hold"]
        assert {one.remote for one in held if not one.expires} == {peer.local for peer in serving.peers}
        daemons.restart_dead()
        proved(daemons, serving, "b")


@pytest.mark.parametrize(("victim", "point", "mode"), [by(mode, *where) for *where, mode in FURTHER_HOP])
def test_further_hop(stages: Stages, tmp_path: Path, victim: str, point: str, mode: str) -> None:
    """a -> b -> c: the home, the waypoint or the new holder dies while the redirects are collapsed."""
    with stages("lines", tmp_path, {victim: point}, mode) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        daemons.drain("b", "c", serving.port)
        daemons.died(victim)
        daemons.restart_dead()
        proved(daemons, serving, "b" if point == "commit.journalled" else "c")


@pytest.mark.parametrize(
    ("point", "mode"),
    [
        ("prepare.journalled", "nat"),
        ("activate.suspended", "forward"),
        ("activate.suspended", "nat"),
        ("activate.journalled", "nat"),
        ("taken.admitted", "forward"),
    ],
)
def test_coming_home(stages: Stages, tmp_path: Path, point: str, mode: str) -> None:
    """a -> b -> a: the home dies while its own redirect is out of force."""
    with stages("lines", tmp_path, {"a": point}, mode) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        moving = daemons.drain("b", "a", serving.port)
        daemons.died("a")
        daemons.restart_dead()
        moving.ended()
        moving.told(proved(daemons, serving, "" if point.startswith("prepare") else "a"))


@pytest.mark.parametrize(("victim", "point", "mode"), [by(mode, *where) for *where, mode in END])
def test_end_of_the_connection(stages: Stages, tmp_path: Path, victim: str, point: str, mode: str) -> None:
    """A daemon dies while the redirects of connections that have ended are collected."""
    with stages("lines", tmp_path, {victim: point}, mode) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        where = settled(serving, "abc")
        serving.finish()
        daemons.lab.host("b").run(["ss", "--kill", "--tcp", "state", "time-wait"])
        daemons.died(victim)
        daemons.restart_dead()
        journals_agree(serving, "abc", "a", where)
        nothing_left(daemons, serving)


@pytest.mark.parametrize(("dead", "mode"), [("a", "nat"), ("b", "nat"), ("ab", "forward")])
def test_ended_while_a_daemon_is_down(stages: Stages, tmp_path: Path, dead: str, mode: str) -> None:
    """Redirects go on without the daemons; what ends meanwhile is collected when they are back."""
    with stages("lines", tmp_path, {}, mode) as (daemons, serving):
        serving.clients()
        serving.move("a", "b")
        for host in dead:
            daemons.kill(host)
        flowing(serving)
        serving.finish()
        daemons.restart_dead()
        nothing_left(daemons, serving)


@pytest.mark.parametrize(
    ("first", "point", "order"),
    [
        ("a", "commit.done", "ab"),
        ("a", "commit.done", "ba"),
        ("a", "commit.journalled", "ba"),
        ("b", "prepare.journalled", "ab"),
    ],
)
def test_both_die(stages: Stages, tmp_path: Path, first: str, point: str, order: str) -> None:
    """One dies at a step, then the other; they are restarted in either order, the later one much later."""
    with stages("duplex", tmp_path, {first: point}) as (daemons, serving):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.died(first)
        daemons.kill("b" if first == "a" else "a")
        daemons.start(order[0])
        pause(1.0)
        daemons.start(order[1])
        proved(daemons, serving, "b" if point == "commit.done" else "a")


@pytest.mark.parametrize(("seed", "mode"), [(0, "forward"), (1, "nat")])
def test_at_random_times(stages: Stages, tmp_path: Path, seed: int, mode: str) -> None:
    """Connections go to and fro under load; daemons are killed whenever it pleases the dice."""
    dice = random.Random(seed)  # noqa: S311
    with stages("duplex", tmp_path, {}, mode, chunk_size=1) as (daemons, serving):
        serving.clients(2)
        for _turn in range(5):
            drains = [daemons.drain("a", "b", serving.port)]
            if dice.random() < 0.5:
                drains.append(daemons.drain("b", "a", serving.port))
            victims = dice.choice(["a", "b", "ab"])
            for host in victims:
                pause(dice.uniform(0.0, 0.12))
                daemons.kill(host)
            daemons.restart_dead(dice.choice(["ab", "ba"]))
            daemons.ready()
            for one in drains:
                one.ended()
            journals_agree(serving, "abc", "a", settled(serving, "abc"))
        proved(daemons, serving)


@pytest.mark.parametrize(
    ("paused", "point", "mode"),
    [
        ("a", "freeze.captured", "forward"),
        ("b", "prepare.journalled", "nat"),
        ("a", "commit.done", "nat"),
        ("b", "activate.journalled", "forward"),
        ("b", "taken.answered", "nat"),
    ],
)
def test_partition(stages: Stages, tmp_path: Path, paused: str, point: str, mode: str) -> None:
    """The hosts stop hearing each other just there; some time later they do again."""
    with stages("lines", tmp_path, {paused: f"{point}:1:STOP"}, mode) as (daemons, serving):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.stopped(paused)
        with partitioned(daemons.lab, "ab"):
            daemons.signal(paused, signal.SIGCONT)
            pause(1.0)
            until(lambda: not tracers(serving))
        proved(daemons, serving, "" if point in ("freeze.captured", "prepare.journalled") else "b")


@pytest.mark.parametrize("point", ["freeze.captured", "commit.led-away"])
def test_stopped_for_longer_than_the_freeze_may_last(stages: Stages, tmp_path: Path, point: str) -> None:
    """The kernel lifts the hold by itself, and the belated commit is refused."""
    with stages("duplex", tmp_path, {"a": f"{point}:1:STOP"}, timing=SOON) as (daemons, serving):
        serving.clients()
        moving = daemons.drain("a", "b", serving.port)
        daemons.stopped("a")
        assert (
            any(one.name == "hold" for one in elements(daemons.lab.host("a"))) or point != "freeze.captured"
        )
        until(lambda: not any(one.name == "hold" for one in elements(daemons.lab.host("a"))))
        pause(0.5)
        daemons.signal("a", signal.SIGCONT)
        assert moving.ended() is not None
        proved(daemons, serving)


@pytest.mark.parametrize(
    ("stopped", "point", "mode"),
    [
        ("a", "freeze.captured", "nat"),
        ("a", "commit.journalled", "forward"),
        ("a", "commit.done", "nat"),
        ("b", "prepare.journalled", "forward"),
        ("b", "activate.journalled", "nat"),
        ("b", "hand.sent", "forward"),
    ],
)
def test_clean_stop_in_the_middle(
    stages: Stages, tmp_path: Path, stopped: str, point: str, mode: str
) -> None:
    """SIGTERM: what is committed is finished, what is not is undone; then a restart."""
    with stages("lines", tmp_path, {stopped: f"{point}:1:STOP"}, mode) as (daemons, serving):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.stopped(stopped)
        daemons.signal(stopped, signal.SIGTERM)
        daemons.signal(stopped, signal.SIGCONT)
        assert daemons.process(stopped).wait(15) == 0
        assert not tracers(serving)
        flowing(serving)  # without that daemon
        daemons.restart_dead()
        proved(daemons, serving)


def test_reload_in_the_middle(stages: Stages, tmp_path: Path) -> None:
    """SIGHUP while connections move changes nothing for them."""
    with stages("duplex", tmp_path, {}, chunk_size=1) as (daemons, serving):
        serving.clients(2)
        moving = daemons.drain("a", "b", serving.port)
        while moving.is_alive():
            daemons.signal("a", signal.SIGHUP)
            daemons.signal("b", signal.SIGHUP)
            pause(0.01)
        moving.ended()
        moving.told(proved(daemons, serving, "b"))


@pytest.mark.parametrize("point", ["freeze.held", "commit.journalled"])
def test_listener_stays(stages: Stages, tmp_path: Path, point: str) -> None:
    """The exporter dies before its listeners have gone: they go on listening."""
    with stages("lines", tmp_path, {"a": point}) as (daemons, serving):
        moving = daemons.drain("a", "b", serving.port, "listening")
        daemons.died("a")
        assert moving.ended() is None
        daemons.restart_dead()
        serving.clients()
        proved(daemons, serving, "a")


# -- applications, and disks: daemons and servers for each test


def test_application_dies_with_descriptors_on_their_way(lab: Lab, tmp_path: Path) -> None:
    """It is gone before it has read them; another one gets the connections."""
    with cluster(lab) as daemons, service(daemons, "lines", "a", tmp_path) as serving:
        serving.clients()
        sleeper = Sleeper(lab.host("b"), serving.port)
        moving = daemons.drain("a", "b", serving.port)
        sleeper.served()
        sleeper.close()
        moving.ended()
        until(lambda: status(lab.host("b"))["import_lists"]["connected"]["length"] == 2)
        serving.serve("b")
        proved(daemons, serving, "b")


@pytest.mark.parametrize("read", [False, True])
def test_application_that_is_late(lab: Lab, tmp_path: Path, read: bool) -> None:
    """It does not answer in time: what it was sent is worth nothing, another one gets the connections."""
    with (
        cluster(lab) as daemons,
        service(daemons, "lines", "a", tmp_path) as serving,
        Sleeper(lab.host("b"), serving.port) as sleeper,
    ):
        serving.clients()
        moving = daemons.drain("a", "b", serving.port)
        sleeper.served()
        descriptors = sleeper.descriptors() if read else []
        serving.serve("b")
        moving.ended()
        moving.told(proved(daemons, serving, "b"))
        assert all(state_of(descriptor) == CLOSED for descriptor in descriptors)


@pytest.mark.parametrize("read", [False, True])
def test_daemon_dies_and_the_application_sleeps(lab: Lab, tmp_path: Path, read: bool) -> None:
    """It sits on dormant descriptors, or has not even read them; after the restart another one is served."""
    with (
        cluster(lab, "ab", {"b": "hand.sent"}) as daemons,
        service(daemons, "lines", "a", tmp_path) as serving,
        Sleeper(lab.host("b"), serving.port) as sleeper,
    ):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.died("b")
        descriptors = sleeper.descriptors() if read else []
        daemons.restart_dead()
        serving.serve("b")
        proved(daemons, serving, "b")
        assert all(state_of(descriptor) == CLOSED for descriptor in descriptors)


def test_listed_over_a_restart(lab: Lab, tmp_path: Path) -> None:
    """Nobody waits at b; its daemon is killed; then an application comes."""
    with cluster(lab) as daemons, service(daemons, "lines", "a", tmp_path) as serving:
        serving.clients()
        records = drain(lab.host("a"), "b", local_port=serving.port)
        assert {one["outcome"] for one in records} == {"moved"}
        daemons.kill("b")
        daemons.restart_dead()
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 2
        assert all(not where for where in places(serving, "ab").values())  # no socket: an image, held
        assert sum(one.name == "hold" for one in elements(lab.host("b"))) == 2
        serving.serve("b")
        proved(daemons, serving, "b")


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
        service(daemons, "lines", "ab", tmp_path, calm=False) as serving,
    ):
        serving.clients()
        moving = daemons.drain("a", "b", serving.port)
        daemons.stopped(paused)
        disk.fill()
        # What the journal appends may fit into the last page that its file has.
        size = (lab.host(paused).state_dir / "journal.db-events").stat().st_size
        stopped = daemons.process(paused).pid
        limits = resource.prlimit(stopped, resource.RLIMIT_FSIZE)
        resource.prlimit(stopped, resource.RLIMIT_FSIZE, (size, limits[1]))
        daemons.signal(paused, signal.SIGCONT)
        if home == "b":
            # 120 is Python's word for a last line that could not be written: the log has the same limit.
            assert daemons.process(paused).wait(15) in (1, 120)
        elif paused == "a":
            assert {one["refusal"]["code"] for one in moving.ended() or []} == {"internal"}
        else:
            flowing(serving)
        disk.empty()
        if home == "a":
            resource.prlimit(stopped, resource.RLIMIT_FSIZE, limits)
        daemons.restart_dead()
        assert moving.ended() is not None
        proved(daemons, serving, home)
