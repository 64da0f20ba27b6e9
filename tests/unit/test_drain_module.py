# SPDX-License-Identifier: MIT
"""The Ansible module drain, with a daemon that has sockets, hosts that take them, and its moods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.moody_daemon import Daemon
from tests.unit.test_modules import collections, run, waiting

pytest.importorskip("ansible")
__all__ = ["collections"]  # a fixture


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[int], Daemon]]:
    """Makes a daemon with so many sockets."""
    made: list[Daemon] = []

    def make(count: int) -> Daemon:
        made.append(Daemon(tmp_path / f"{len(made)}.sock", count))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def drain(collections: Path) -> Callable[..., dict[str, Any]]:
    """Runs the module on a daemon."""

    def go(there: Daemon, **options: Any) -> dict[str, Any]:
        return run(collections, "drain", control=str(there.path), **{"all": True, **options})

    return go


Run = Callable[..., dict[str, Any]]
Make = Callable[[int], Daemon]


def test_all_are_spread_as_check_mode_has_said(daemon: Make, drain: Run) -> None:
    there = daemon(7)
    there.rows[1]["movable"] = False  # now; it is tried last
    planned = drain(there, check=True, to=["b", "c"])
    assert (planned["rc"], planned["changed"], planned["moved"], planned["left"]) == (0, True, 7, 0)
    assert not there.moves
    done = drain(there, to=["b", "c"])
    assert there.moves == [(2, "b"), (4, "b"), (6, "b"), (1, "b"), (3, "c"), (5, "c"), (7, "c")]
    assert (done["rc"], done["changed"], done["moved"], done["left"], done["done"]) == (0, True, 7, 0, True)
    assert planned["diff"] == done["diff"]
    assert done["diff"]["after"].count(": b\n") == 4
    again = drain(there, to=["b", "c"])
    assert (again["rc"], again["changed"], again["migrations"]) == (0, False, [])


def test_steps_are_one_drain(daemon: Make, drain: Run) -> None:
    """At a rate, each going on with the next host, and without what did not move."""
    there = daemon(9)
    there.say = lambda number, _target: "port-taken" if number in (1, 2) else None
    planned = drain(daemon(9), check=True, to=["b", "c"])
    steps: list[dict[str, Any]] = []
    began = time.monotonic()
    while not steps or not steps[-1]["done"]:
        so_far = {"so_far": steps[-1]["so_far"]} if steps else {}
        steps.append(drain(there, to=["b", "c"], rate=4, count=4, **so_far))
        assert steps[-1]["moved"] + steps[-1]["refused"] <= 4
    assert time.monotonic() - began >= 7 / 4
    assert len(steps) >= 3
    assert [number for number, _target in there.moves] == [3, 4, 5, 6, 7, 8, 9]
    tried = [one for request in there.requests if request["op"] == "export" for one in request["sockets"]]
    assert len(tried) == 9  # nothing twice
    records = [one for step in steps for one in step["migrations"]]
    after = {one["remote"]: one["to"] for one in records if one["outcome"] == "moved"}
    shown = [f"- {remote}: {target}" in planned["diff"]["after"] for remote, target in after.items()]
    assert all(shown)
    assert len(shown) == 7
    last = steps[-1]
    assert (last["failed"], last["left"], last["so_far"]["moved"]) == (True, 2, 7)
    assert last["msg"] == "Sockets that are left: 2; that did not move: 2."


def test_it_stops_at_its_threshold(daemon: Make, drain: Run) -> None:
    there = daemon(20)
    there.say = lambda number, _target: "port-taken" if number == 2 else None
    stopped = drain(there, to=["b"], rate=4, stop_after=1)
    assert (stopped["failed"], stopped["stopped"], stopped["done"]) == (True, True, True)
    assert (stopped["moved"], stopped["refused"], stopped["left"]) == (1, 1, 19)
    assert "Stopped: 1 of 2 sockets did not move (stop_after is 1), 19 are left" in stopped["msg"]
    assert "port-taken (1): It said port-taken." in stopped["msg"]
    never = drain(there, to=["b"], stop_after=0)
    assert (never["stopped"], never["moved"], never["left"]) == (False, 18, 1)


@pytest.mark.parametrize("idle", [{}, {"idle_s": 0.1}])
def test_check_mode_ends_where_a_run_does(daemon: Make, drain: Run, idle: dict[str, Any]) -> None:
    """At `count`, at the batch in which `stop_after` is reached, or with none left."""

    def told(there: Daemon, *, check: bool, **options: Any) -> tuple[Any, ...]:
        there.say = lambda number, _target: "port-taken" if number in (2, 5, 6) else None
        result = drain(there, check=check, to=["b"], **idle, **options)
        names = ("failed", "changed", "moved", "refused", "left", "done", "stopped")
        return *(result.get(name) for name in names), len(result["migrations"])

    for options in (
        {"count": 1},
        {"count": 2},
        {"count": 6},
        {"count": 9},
        {"rate": 4, "stop_after": 1},
        {"rate": 4, "stop_after": 2},
        {"rate": 4, "stop_after": 2, "count": 5},
        {"stop_after": 3},
        {"stop_after": 0},
    ):
        planned, done = (told(daemon(6), check=check, **options) for check in (True, False))
        assert planned == done, options
    assert told(daemon(6), check=True, count=1)[:6] == (None, True, 1, 0, 5, False)
    assert told(daemon(6), check=True, rate=4, stop_after=1)[2:7] == (1, 1, 5, True, True)


@pytest.mark.parametrize("said", [ValueError("no-such-host"), "no-offer"])
def test_what_has_gone_gets_nothing_more(daemon: Make, drain: Run, said: Any) -> None:
    there = daemon(8)
    there.say = lambda _number, target: said if target == "c" and len(there.moves) >= 4 else None
    result = drain(there, to=["b", "c"], rate=8, stop_after=1)
    assert (result["rc"], result["moved"], result["refused"], result["left"]) == (0, 8, 0, 0)
    assert (result["so_far"]["gone"], len(result["migrations"])) == (["c"], 8)
    assert "c gets nothing more" in str(result["warnings"])
    later = drain(daemon(2), to=["b", "c"], so_far=result["so_far"])
    assert {one["to"] for one in later["migrations"]} == {"b"}


def test_when_all_have_gone_what_was_done_is_told(daemon: Make, drain: Run) -> None:
    there = daemon(8)
    there.say = lambda _number, _target: ValueError("no-such-host") if len(there.moves) >= 4 else None
    result = drain(there, to=["b", "c"], rate=8)
    assert (result["failed"], result["changed"], result["moved"], result["left"]) == (True, True, 4, None)
    assert "None of b, c takes sockets" in result["msg"]
    nobody = drain(there, check=True, to=["x", "y"])
    assert (nobody["failed"], nobody["changed"]) == (True, False)


def test_the_last_one_without_room_refuses(daemon: Make, drain: Run) -> None:
    there = daemon(2)
    there.say = lambda _number, _target: "no-offer"
    result = drain(there, to=["b", "c"])
    assert (result["failed"], result["refused"], result["left"]) == (True, 2, 2)
    assert len(result["so_far"]["gone"]) == 1


def test_what_comes_meanwhile_is_moved_too(daemon: Make, drain: Run) -> None:
    there = daemon(2)
    there.listed = lambda: there.add(9) if len(there.moves) == 2 else None
    assert drain(there)["moved"] == 3


def test_what_still_comes_is_left(daemon: Make, drain: Run) -> None:
    there = daemon(2)
    there.listed = lambda: there.add(100 + len(there.requests))
    result = drain(there, rate=4, count=4)
    assert (result["rc"], result["done"]) == (0, False)
    assert result["left"] >= 1


def test_only_what_is_quiet_is_moved(daemon: Make, drain: Run) -> None:
    """It waits for the others, and tells of them; what was woken is tried again when it is quiet."""
    there = daemon(4)
    woken: list[int] = []
    moved_at: list[float] = []
    in_vain: list[int] = []  # looks at 3 when no other was left that is ever quiet

    def quiet(number: int) -> bool:
        if number == 3 and not {1, 2} & there.rows.keys():
            in_vain.append(number)
        return number < 3 or (number == 3 and len(in_vain) > 1)

    def say(number: int, _target: str | None) -> str | None:
        moved_at.append(time.monotonic())
        if number == 1 and not woken:
            woken.append(number)
            return "changed"
        return None

    there.quiet, there.say = quiet, say
    result = drain(there, idle_s=1.5)
    assert time.monotonic() - moved_at[-1] >= 1.5, "so long it has waited for the last one"
    assert sorted(number for number, _target in there.moves) == [1, 2, 3]
    assert all(
        one["received_bytes"] == 7
        for request in there.requests
        if request["op"] == "export"
        for one in request["sockets"]
    )
    assert (result["failed"], result["moved"], result["refused"], result["left"]) == (True, 3, 0, 1)
    assert "that did not move: 0; that were not quiet for 1.5 s: 1." in result["msg"]


def test_what_had_ended_is_no_failure(daemon: Make, drain: Run) -> None:
    there = daemon(3)

    def say(number: int, _target: str | None) -> str | None:
        if number == 2:
            there.rows.pop(2, None)
            return "no-such-socket"
        return None

    there.say = say
    result = drain(there)
    assert (result["rc"], result["moved"], result["refused"], result["closed"]) == (0, 2, 0, 1)


def test_what_an_application_took_has_not_ended(daemon: Make, drain: Run) -> None:
    """Of two that waited one has ended, one has an application now, and is tried as what it is."""
    there = daemon(1)
    there.imports = [waiting(1), waiting(2)]

    def say(_id: str) -> None:
        there.imports.clear()
        there.add(7)
        there.rows[7] |= {"remote": waiting(2)["remote"]}

    there.say_listed = say
    result = drain(there, to=["b"])
    assert (result["rc"], result["moved"], result["refused"], result["closed"]) == (0, 2, 0, 1)
    assert sorted(number for number, _target in there.moves) == [1, 7]


@pytest.mark.parametrize("code", ["changed", "freeze-deadline"])
def test_what_passes_is_tried_again(daemon: Make, drain: Run, code: str) -> None:
    there = daemon(3)
    said: list[int] = []

    def say(number: int, _target: str | None) -> str | None:
        said.append(number)
        return code if number == 3 or (number == 2 and said.count(2) == 1) else None

    there.say = say
    result = drain(there)
    assert (result["failed"], result["moved"], result["refused"], result["left"]) == (True, 2, 1, 1)
    assert (said.count(2), said.count(3)) == (2, 3)
    assert f"{code} (1)" in result["msg"]


def test_what_is_listed_but_not_found_is_refused_in_the_end(daemon: Make, drain: Run) -> None:
    there = daemon(2)
    there.say = lambda number, _target: "no-such-socket" if number == 2 else None
    result = drain(there)
    assert (result["failed"], result["moved"], result["refused"], result["left"]) == (True, 1, 1, 1)


def test_what_has_moved_is_told_though_another_was_never_begun(daemon: Make, drain: Run) -> None:
    """Each listing shows a new one, which moves; each time the daemon breaks down at the first one."""
    there = daemon(1)
    there.say = lambda number, _target: ConnectionError() if number == 1 else None
    there.listed = lambda: there.add(max(there.rows) + 1 + len(there.moves))
    result = drain(there, to=["b"])
    assert result["failed"]
    assert "1 migrations were not begun" in result["msg"]
    assert result["moved"] == len(result["migrations"]) == len(there.moves) >= 3
    assert result["so_far"]["moved"] == len(there.moves)
