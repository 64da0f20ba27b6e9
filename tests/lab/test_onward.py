# SPDX-License-Identifier: MIT
"""What waits in the import list of one host moves on to another, as safely as what an application has.

Listed at b, moved to c (or home), taken there: byte-exact, with what the peer sends meanwhile. What does not
move is listed at b as before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from lab.labs import Lab
from sockmi.client import ImportRequest
from sockmi.crashpoints import EXPORTER, IMPORTER
from sockmi.journal import Record
from tests.lab.client_callers import CALLERS, Caller
from tests.lab.crash_lab import Cluster, cluster, elements, journal_of, spooled
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
    verdict,
)
from tests.lab.mode_lab import (
    SERVICE,
    forget_other_tests,
    give_service,
    has_address,
    legacy_iptables,
    needs_legacy,
    take_service,
)
from tests.lab.scenario import ask, status, until
from tests.laws import LawBroken

HOSTS = "abc"
MODES = ["forward", "nat", pytest.param("iptables", marks=needs_legacy)]
#: Until then b has not decided, or its restart undoes it.
UNDECIDED = {
    "freeze.stopped", "freeze.held", "freeze.captured",
    "commit.led-away", "commit.journalled", "commit.accepted",
}  # fmt: skip
AT_B = [point for point in EXPORTER if point not in {"thaw.unheld", "queue.ended", "release.closed"}]
AT_C = [point for point in IMPORTER if point.startswith(("prepare", "activate"))]
BY_TAKEOVER = [
    ("b", "freeze.held"), ("b", "commit.led-away"), ("b", "commit.journalled"), ("b", "commit.released"),
    ("c", "prepare.journalled"), ("c", "activate.journalled"),
]  # fmt: skip
SHORT = {"freeze_deadline_s": 1.0, "linger_s": 1.0}
RESTING = b"sent while it was nobody's " * 300


@contextlib.contextmanager
def scene(
    lab: Lab, mode: str, crash_at: dict[str, str] | None = None, **more: Any
) -> Iterator[tuple[Cluster, Bench]]:
    forget_other_tests(lab, HOSTS)
    options = {
        "redirect": {"devices": ["eth0"], "modes": [mode]},
        "timing": {"freeze_deadline_s": 5.0, "linger_s": 1.0},
    }
    with (
        cluster(lab, HOSTS, crash_at, **(options | more)) as daemons,
        bench(lab, mode, daemons.daemons) as it,
    ):
        if mode == "takeover":
            give_service(lab)
            it.service = SERVICE
        try:
            yield daemons, it
        finally:
            daemons.go_on()
            daemons.restart_dead()
            it.clear(HOSTS)
            take_service(lab, HOSTS)


@pytest.fixture(scope="module", autouse=True)
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with legacy_iptables(tmp_path_factory.mktemp("bin")):
        yield


def rows(it: Bench, host: str, **wanted: Any) -> list[dict[str, Any]]:
    """What waits in the import lists of a host."""
    return [
        row
        for answer in ask(it.host(host), "list", table="imports", filter=wanted)
        for row in answer["imports"]
    ]


def send(it: Bench, case: Case) -> None:
    """To b, where nobody waits for it."""
    before = len(rows(it, "b"))
    moved(it.export_actively([case.ours]))
    until(lambda: len(rows(it, "b")) == before + 1)


def rest(case: Case) -> None:
    """The peer says more, which nobody acknowledges."""
    if case.peer is not None and case.state not in ("CLOSE-WAIT", "LAST-ACK", "CLOSING"):
        case.peer.sendall(RESTING)
        case.to_us += RESTING


def onward(it: Bench, to: str = "c", timeout_s: float = 20.0, **wanted: Any) -> list[dict[str, Any]]:
    """A drain of b; its records."""
    answers = ask(it.host("b"), "drain", filter=wanted, to=to, timeout_s=timeout_s)
    return [record for answer in answers for record in answer["migrations"]]


def take(it: Bench, case: Case, host: str) -> None:
    """An application takes it, and it goes on to its end."""
    [came] = it.take([it.request(case, it.target(host))], host)
    copy = copy_of(came)
    it.undeafen([case])
    it.finish(case, copy)
    copy.close()
    case.close()


def leftovers(it: Bench) -> list[str]:
    """Of all hosts: slots, spool, redirects, holds, records."""
    found = []
    for name in HOSTS:
        host = it.host(name)
        host.run(["ss", "--kill", "--tcp", "state", "time-wait"])
        now = status(host)
        counts = [
            now["redirects_in"],
            now["redirects_out"],
            *(one["length"] for one in now["import_lists"].values()),
        ]
        found += [f"{name}: {counts}"] if any(counts) else []
        found += [f"{name}: spooled {one}" for one in spooled(host)]
        found += [f"{name}: {one}" for one in elements(host) if not one.expires]
        with journal_of(host) as journal:
            found += [f"{name}: {kind} {records}" for kind in Record if (records := journal.records(kind))]
            found += [f"{name}: open {record}" for record in journal.history(is_open=True)]
    return found


def nothing_left(it: Bench) -> None:
    """Soon."""
    try:
        until(lambda: not leftovers(it), 20)
    except AssertionError:
        raise AssertionError("\n".join(leftovers(it))) from None


@pytest.mark.parametrize("mode", MODES)
def test_it_is_taken_at_the_next_host(lab: Lab, tmp_path: Path, mode: str) -> None:
    """In each state that matters, of each family, with what was queued and what comes while nobody has it."""
    with scene(lab, mode) as (_unused, it), it.watched(tmp_path):
        kinds = ["v4", "v6", "mapped"]
        cases = [it.make(kind, "ESTABLISHED", True) for kind in kinds]
        cases += [it.make("v4", wanted, True) for wanted in ("CLOSE-WAIT", "FIN-WAIT-1", "LAST-ACK")]
        cases.append(it.make("v6", "SYN-SENT", False))
        for case in cases:
            send(it, case)
            if case.state == "ESTABLISHED":
                rest(case)
        records = onward(it)
        moved(records)
        assert len(records) == len(cases)
        for one in records:
            assert (one["pid"], one["fd"], one["hop"], one["to"], one["listed"]) == (
                None,
                None,
                2,
                "c",
                True,
            ), one
        assert not rows(it, "b")
        for case in cases:
            if case.state == "ESTABLISHED":
                rest(case)
            take(it, case, "c")
        nothing_left(it)


@pytest.mark.parametrize("mode", MODES)
def test_it_comes_home(lab: Lab, tmp_path: Path, mode: str) -> None:
    """A to B to A: there is no redirect left, whoever had it."""
    with scene(lab, mode) as (_unused, it), it.watched(tmp_path):
        case = it.make("v4", "ESTABLISHED", True)
        send(it, case)
        rest(case)
        moved(onward(it, "a"))
        until(lambda: status(it.host("b"))["redirects_in"] == status(it.host("a"))["redirects_out"] == 0)
        take(it, case, "a")
        nothing_left(it)


@pytest.mark.parametrize("at_once", [True, False], ids=["together", "one-after-the-other"])
def test_the_listener_and_what_is_bound_too(lab: Lab, tmp_path: Path, at_once: bool) -> None:
    """A listener with what waited in its queue, which still is known as its own at the third host."""
    with scene(lab, "forward") as (daemons, it), it.watched(tmp_path):
        port = it.port()
        listener = it.listener("a", "v4", port, EVERYWHERE)
        peer = it.sock("peer", "v4")
        peer.connect((it.address("v4"), port))
        peer.sendall(b"first words")
        bound = it.sock("a", "v4")
        bound.bind((EVERYWHERE, it.port()))
        moved(it.export_actively([listener, bound]))
        until(lambda: len(rows(it, "b")) == 3)
        if at_once:
            moved(onward(it))
        else:
            moved(onward(it, kinds=["listening"]))
            daemons.daemons["b"].restart()
            daemons.ready()
            assert len(rows(it, "b")) == 2
            moved(onward(it))
        until(lambda: len(rows(it, "c")) == 3)
        assert not rows(it, "b")
        by_kind = {row["kind"]: row for row in rows(it, "c")}
        assert by_kind["connected"]["listener"] == by_kind["listening"]["migration_id"]
        wanted = ImportRequest(["connected"], listener=UUID(by_kind["listening"]["migration_id"]))
        [child] = it.take([wanted], "c")
        copy = copy_of(child)
        assert copy.recv(100) == b"first words"
        exchange(copy, peer, 10_000)
        [came] = it.take([ImportRequest(["listening"])], "c")
        accepting = copy_of(came)
        with it.sock("peer", "v4") as new:
            new.connect((it.address("v4", "c"), port))
            accepting.accept()[0].close()
        for each in (peer, copy, accepting, listener, bound):
            each.close()
        it.clear(HOSTS)
        nothing_left(it)


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_a_drain_empties_the_host(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Of what an application has, and of what waits for one; what no filter selects stays."""
    with scene(lab, mode) as (_unused, it), it.watched(tmp_path):
        cases = [it.pair(kind) for kind in ("v4", "v6", "v4", "v6")]
        for case in cases:
            send(it, case)
        taken = it.take([it.request(case, it.target()) for case in cases[:2]])
        assert not onward(it, process="nobody-is-called-so")
        assert not onward(it, pid=os.getpid(), local_port=1)
        ports = {case.port for case in cases}
        here = [row["local"] for row in rows(it, "b", local_port=cases[2].port)]
        assert len(here) == 1 and here[0].endswith(f":{cases[2].port}"), here
        [plan] = [
            one["migrations"] for one in ask(it.host("b"), "drain", to="c", dry_run=True) if not one["more"]
        ]
        assert [one["outcome"] for one in plan if one["pid"] is None] == ["planned"] * 2, plan
        assert len(rows(it, "b")) == 2
        records = onward(it)
        moved(records)
        assert len(records) == len(ports) == 4
        assert not rows(it, "b") and status(it.host("b"))["redirects_in"] == 0
        for came in taken:
            copy_of(came).close()
        for case in cases:
            take(it, case, "c")
        nothing_left(it)


def test_one_is_named(lab: Lab, tmp_path: Path) -> None:
    """By the migration id of its import; under a migration id of its own that is done once."""
    with scene(lab, "forward") as (_unused, it), it.watched(tmp_path):
        one, other = it.pair("v4"), it.pair("v4")
        send(it, one)
        send(it, other)
        [row] = rows(it, "b", remote_port=one.remote[1])
        again = str(uuid4())
        for _turn in range(2):
            named = [{"listed": row["migration_id"], "migration_id": again}]
            [record] = call(it.host("b"), "export", sockets=named, to="c")["migrations"]
            assert (record["outcome"], record["migration_id"]) == ("moved", again)
        [record] = call(it.host("b"), "export", sockets=[{"listed": row["migration_id"]}], to="c")[
            "migrations"
        ]
        assert (record["outcome"], record["refusal"]["code"]) == ("refused", "no-such-socket")
        assert len(rows(it, "b")) == len(rows(it, "c")) == 1
        take(it, one, "c")
        take(it, other, "b")
        nothing_left(it)


@pytest.mark.parametrize("form", CALLERS)
def test_a_program_names_one(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """In each form of the API: by the id that its exporter had from the move before."""
    caller: Caller = CALLERS[form]()
    with scene(lab, "forward") as (_unused, it), it.watched(tmp_path):
        one, other = it.pair("v4"), it.pair("v4")
        send(it, other)
        monkeypatch.setenv("SOCKMI_CONTROL", str(it.host("a").control_socket))
        listed = caller.export(one.ours.fileno(), to="b", context=b"what a knew")
        until(lambda: len(rows(it, "b")) == 2)
        monkeypatch.setenv("SOCKMI_CONTROL", str(it.host("b").control_socket))
        caller.export(listed, to="c", dry_run=True)
        assert len(rows(it, "b")) == 2
        again = uuid4()
        for _turn in range(2):
            assert caller.export(listed, to="c", migration_id=again) == again
        with pytest.raises(OSError, match="Nothing waits") as caught:
            caller.export(listed, to="c")
        assert caught.value.errno == errno.EBADF
        [row] = rows(it, "c")
        assert (row["migration_id"], row["context_bytes"]) == (str(again), 11)
        assert len(rows(it, "b")) == 1
        take(it, one, "c")
        take(it, other, "b")
        nothing_left(it)


def test_what_is_refused_is_listed_as_before(lab: Lab, tmp_path: Path) -> None:
    """No room, no such host."""
    with scene(lab, "forward", imports={"max_connected": 1}) as (_unused, it), it.watched(tmp_path):
        cases = [it.pair("v4"), it.pair("v6")]
        send(it, cases[0])
        before = rows(it, "b")
        moved(it.export_actively([cases[1].ours], "c"))
        [record] = onward(it, "c", 1.0)
        assert verdict(record)[:2] == ("refused", "no-offer"), record
        assert rows(it, "b") == before
        take(it, cases[0], "b")
        take(it, cases[1], "c")
        nothing_left(it)


def owners_of(lab: Lab, address: str) -> str:
    return "".join(name for name in HOSTS if has_address(lab.host(name), address))


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("to", ["c", "a"])
def test_takeover_brings_the_address_at_once(lab: Lab, tmp_path: Path, kind: str, to: str) -> None:
    """Before an application has it, so what the peer says is kept; and it moves on, with its address."""
    address = SERVICE[6 if kind == "v6" else 4]
    with scene(lab, "takeover") as (daemons, it), it.watched(tmp_path):
        case = it.make(kind, "ESTABLISHED", True)
        send(it, case)
        until(lambda: owners_of(lab, address) == "b")
        rest(case)
        daemons.daemons["b"].restart()
        daemons.ready()
        assert len(rows(it, "b")) == 1
        moved(onward(it, to))
        until(lambda: len(rows(it, to)) == 1)
        assert owners_of(lab, address) == to
        rest(case)
        take(it, case, to)


def test_takeover_leaves_with_all_or_none(lab: Lab, tmp_path: Path) -> None:
    """One that an application has, and one that waits: neither goes without the other."""
    with scene(lab, "takeover") as (_unused, it), it.watched(tmp_path):
        cases = [it.pair("v4"), it.pair("v4")]
        moved(it.export_actively([case.ours for case in cases]))
        until(lambda: len(rows(it, "b")) == 2)
        [came] = it.take([it.request(cases[0], it.target())])
        copy = copy_of(came)
        for case in cases:
            [record] = onward(it, remote_port=case.remote[1])
            assert verdict(record)[:2] == ("refused", "redirect"), record
            assert "is not in the batch" in verdict(record)[2]
        assert owners_of(lab, SERVICE[4]) == "b" and len(rows(it, "b")) == 1
        exchange(copy, cases[0].peer, 10_000)
        moved(onward(it))
        until(lambda: len(rows(it, "c")) == 2)
        assert owners_of(lab, SERVICE[4]) == "c"
        copy.close()
        for case in cases:
            take(it, case, "c")


def test_takeover_ends_with_the_last_that_waits(lab: Lab) -> None:
    """An alias stays for as long as something waits at it."""
    with scene(lab, "takeover") as (_unused, it):
        cases = [it.pair("v4"), it.pair("v4")]
        moved(it.export_actively([case.ours for case in cases]))
        until(lambda: len(rows(it, "b")) == 2)
        for left, case in zip((1, 0), cases, strict=True):
            assert case.peer is not None and owners_of(lab, SERVICE[4]) == "b"
            case.peer.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: 0 s
            case.peer.close()
            until(lambda left=left: len(rows(it, "b")) == left)  # type: ignore[misc]
        until(lambda: owners_of(lab, SERVICE[4]) == "")


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_an_abort_leaves_it_listed(lab: Lab, tmp_path: Path, mode: str) -> None:
    """C does not answer; who asks at b meanwhile waits, and gets it when that is undone."""
    with (
        scene(lab, mode, {"c": "prepare.journalled:1:STOP"}, timing=SHORT) as (
            daemons,
            it,
        ),
        it.watched(tmp_path),
    ):
        case = it.make("v4", "ESTABLISHED", True)
        send(it, case)
        before = rows(it, "b")
        moving = Later(onward, it, "c", 1.0)
        daemons.stopped("c")
        assert rows(it, "b") == before
        rest(case)
        asking = Later(it.take, [it.request(case, it.target())])
        [record] = moving.result()
        assert verdict(record)[0] == "aborted", record
        [came] = asking.result()
        daemons.signal("c", signal.SIGCONT)
        copy = copy_of(came)
        it.undeafen([case])
        it.finish(case, copy)
        copy.close()
        case.close()
        nothing_left(it)


def test_who_asks_too_late_does_not_get_it(lab: Lab, tmp_path: Path) -> None:
    """It is on its way, and goes: at b nothing comes, at c it does."""
    with scene(lab, "forward", {"c": "prepare.journalled:1:STOP"}) as (daemons, it), it.watched(tmp_path):
        case = it.pair("v4")
        send(it, case)
        moving = Later(onward, it)
        daemons.stopped("c")
        asking = Later(call, it.host("b"), "import", requests=[{"states": ["connected"]}], timeout_ms=1500)
        until(lambda: status(it.host("b"))["import_lists"]["connected"]["waiting"] == 1)
        daemons.signal("c", signal.SIGCONT)
        moved(moving.result())
        assert asking.result()["imported"] == []
        take(it, case, "c")
        nothing_left(it)


def test_an_abort_and_a_reset(lab: Lab) -> None:
    """The peer ends it while it is on its way; it is undone, and ended."""
    with scene(lab, "forward", {"c": "prepare.journalled:1:STOP"}, timing=SHORT) as (daemons, it):
        case = it.pair("v4")
        assert case.peer
        send(it, case)
        moving = Later(onward, it, "c", 1.0)
        daemons.stopped("c")
        case.peer.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: 0 s
        case.peer.close()
        [record] = moving.result()
        assert verdict(record)[0] == "aborted", record
        until(lambda: not rows(it, "b"))
        daemons.signal("c", signal.SIGCONT)
        nothing_left(it)


def _crashes() -> list[Any]:
    found: list[Any] = [("b", point, mode) for point in AT_B for mode in ("forward", "nat")]
    found += [("c", point, mode) for point in AT_C for mode in ("forward", "nat")]
    return found + [(*each, "takeover") for each in BY_TAKEOVER]


@pytest.mark.parametrize(("host", "point", "mode"), _crashes())
def test_a_daemon_dies(lab: Lab, tmp_path: Path, host: str, point: str, mode: str) -> None:
    """And starts again: it waits at exactly one of the two, and is taken there."""
    with scene(lab, mode, {host: point}) as (daemons, it), it.watched(tmp_path):
        cases: Sequence[Case] = [it.make("v4", "ESTABLISHED", True), it.pair("v6")]
        for case in cases:
            send(it, case)
        rest(cases[0])
        drain = daemons.drain("b", "c", cases[0].port)
        daemons.died(host)
        daemons.restart_dead()
        daemons.ready()
        drain.ended()
        first, second = cases
        until(lambda: not _open(it) and len(_where(it, first)) == 1, 30)
        where = _where(it, first)
        if len(where) != 1:
            raise LawBroken(f"it is at {where}")
        if host == "b":
            assert where == (["b"] if point in UNDECIDED else ["c"]), where
        assert _where(it, second) == ["b"]
        if mode == "takeover":
            assert [owners_of(lab, SERVICE[version]) for version in (4, 6)] == [where[0], "b"]
        take(it, first, where[0])
        moved(onward(it))
        take(it, second, "c")
        nothing_left(it)


def _where(it: Bench, case: Case) -> list[str]:
    return [name for name in HOSTS if rows(it, name, remote_port=case.remote[1])]


def _open(it: Bench) -> list[Any]:
    return [
        one
        for name in "bc"
        for one in call(it.host(name), "info")["migrations"]
        if one["direction"] == "export"
    ]
