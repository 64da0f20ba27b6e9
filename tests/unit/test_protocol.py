# SPDX-License-Identifier: MIT
"""The core by hand: its rules for imports and tables, and each path through a batch."""

from __future__ import annotations

import ast
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

import pytest

import sockmi.protocol
from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Kind, Needs
from sockmi.policy import POLICIES, LeastLoaded, Policy, Weighted
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.context import Capacity, Settings, Timers
from sockmi.protocol.core import Core
from sockmi.protocol.describe import refresh
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import (
    Arrival,
    ChunkId,
    Counts,
    Decision,
    Holding,
    Item,
    Notice,
    Place,
    PreparedChunk,
    Route,
)
from sockmi.protocol.tables import TABLES, UndeclaredTransition, step
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

ROOT = Path(__file__).parents[2]
ME, B, C = (bytes([letter]) * 16 for letter in b"ABC")
BATCH = b"batch-batch-batc"
PLACE = Place(Endpoint(IPv4Address("192.0.2.2"), 4000), Mode.NAT)
ROOMY = Counts(9, 9, 9)
T = TypeVar("T")

# --- rules ---------------------------------------------------------------------------------

PURE = {
    "__future__", "abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "enum",
    "functools", "heapq", "ipaddress", "re", "struct", "typing",
    "sockmi.addresses", "sockmi.engine.base", "sockmi.frozen", "sockmi.policy", "sockmi.redirect.base",
    "sockmi.refusal",
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [*Path(sockmi.protocol.__path__[0]).glob("*.py"), ROOT / "daemon/sockmi/policy.py"],
    ids=lambda p: p.name,
)
def test_no_io_enters(path: Path) -> None:
    """The core may import only what can do no I/O, has no clock and no chance."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input", "__import__", "eval", "exec"}
        for name in names:
            assert name in PURE or name.split(".")[:2] == ["sockmi", "protocol"], (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name: str) -> None:
    """Each state has a row, every target is a state, every state is reached, some state ends it."""
    table = TABLES[name]
    states = set(type(next(iter(table))))
    reached = {target for row in table.values() for target in row.values()} | {next(iter(table))}
    assert set(table) == states == reached
    assert any(not row for row in table.values())
    with pytest.raises(UndeclaredTransition, match="is not declared"):
        step(table, next(iter(table)), "no such trigger")


def test_the_document_is_in_step() -> None:
    """After a change of a table, see sockmi/protocol/describe.py."""
    text = (ROOT / "docs/protocol.md").read_text()
    assert refresh(text) == text


def test_timers() -> None:
    timers = Timers()
    assert timers.next() is None
    timers.set("a", 5.0)
    timers.set("b", 3.0)
    timers.set("a", 1.0)
    assert timers.next() == 1.0
    timers.cancel("a")
    assert (timers.pop(2.9), timers.pop(3.0), timers.pop(9.0), timers.next()) == (None, "b", None, None)


@pytest.mark.parametrize(
    "wrong",
    [{"chunk_items": 0}, {"chunk_items": 257}, {"pipeline_depth": 9}, {"lease_s": 0}, {"retry_max_s": 0.01},
     {"offer_grace_s": -1}, {"freeze_deadline_s": float("nan")}, {"chunk_bytes": 0}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


# --- helpers -------------------------------------------------------------------------------


def item(number: int, **fields: Any) -> Item:
    name = bytes([number]) * 16
    ends = [Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), number)]
    base: dict[str, Any] = {
        "migration": name, "connection": name, "kind": Kind.CONNECTED, "state": "ESTABLISHED",
        "local": ends[0], "remote": ends[1], "origin": ends[0], "hop": 1, "home": ME,
    }  # fmt: skip
    return Item(**(base | fields))


def only(out: list[a.Action], kind: type[T]) -> T:
    found = [one for one in out if isinstance(one, kind)]
    assert len(found) == 1, out
    return found[0]


def sent(out: list[a.Action], kind: type[T]) -> list[tuple[bytes | None, T]]:
    return [(one.to, one.message) for one in out if isinstance(one, a.Send) and isinstance(one.message, kind)]


def results(out: list[a.Action]) -> dict[bytes, tuple[Outcome, Code | None]]:
    return {
        one.migration: (one.outcome, one.refusal.code if one.refusal else None)
        for action in out
        if isinstance(action, a.Report)
        for one in action.results
    }


def reported(out: list[a.Action]) -> list[a.Result]:
    return [one for action in out if isinstance(action, a.Report) for one in action.results]


class Bench:
    """One core under test; the test plays the shell and the other hosts."""

    def __init__(
        self, capacity: Capacity | None = None, started: e.Started | None = None, **settings: Any
    ) -> None:
        capacity = capacity or Capacity(
            ROOMY, modes=(Mode.NAT,), addresses=frozenset({IPv4Address("192.0.2.1")})
        )
        self.core = Core(ME, Settings(**settings), capacity)
        self.capacity = capacity
        self.now = 100.0
        self.begun = self.core.handle(started or e.Started(), self.now)

    def do(self, event: e.Event) -> list[a.Action]:
        return self.core.handle(event, self.now)

    def hear(self, source: bytes, message: m.Message, channel: Channel = Channel.DATAGRAM) -> list[a.Action]:
        return self.do(e.Received(source, message, channel))

    def stream(self, source: bytes, message: m.Message) -> list[a.Action]:
        return self.hear(source, message, Channel.STREAM)

    def wait(self, seconds: float) -> list[a.Action]:
        """Let time go on, ringing each deadline at its time."""
        out: list[a.Action] = []
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            out += self.core.handle_timer(self.now)
        self.now = end
        return out

    # exporter's path, up to some point
    def export(self, *items: Item, **fields: Any) -> list[a.Action]:
        return self.do(e.StartExport(BATCH, items, (Mode.NAT,), 5.0, **fields))

    def offer(self, host: bytes, rooms: Counts = ROOMY, waiting: int = 0, load: int = 0) -> list[a.Action]:
        offer = m.Offer(BATCH, rooms, Counts(0, 0, waiting), load, 1, (Mode.NAT,), 1000)
        return self.hear(host, offer)

    def reserved(self, out: list[a.Action]) -> a.Freeze:
        if any(isinstance(one, a.OpenStream) for one in out):
            out = self.do(e.StreamOpened(B))
        ((_unused, reserve),) = sent(out, m.Reserve)
        return only(self.stream(B, m.Reserved(BATCH, reserve.page, (PLACE,) * len(reserve.items))), a.Freeze)

    def to_freezing(self, *items: Item) -> a.Freeze:
        self.export(*items)
        return self.reserved(self.offer(B))

    def to_shipped(self, *items: Item) -> ChunkId:
        freeze = self.to_freezing(*items)
        self.do(e.FreezeDone(freeze.chunk, tuple(b"image" for _unused in freeze.items)))
        return freeze.chunk

    def to_committing(self, *items: Item) -> ChunkId:
        chunk = self.to_shipped(*items)
        only(self.stream(B, m.Prepared(chunk, (Fidelity(),) * len(items))), a.Commit)
        return chunk

    # importer's path
    def to_prepared(self, *items: Item, source: bytes = B, batch: bytes = BATCH) -> ChunkId:
        out = self.stream(source, m.Reserve(batch, 0, items, (Mode.NAT,)))
        reserve = only(out, a.Reserve)
        self.do(e.ReserveDone(batch, source, reserve.page, (PLACE,) * len(items)))
        chunk = ChunkId(batch, 0)
        names = tuple(one.migration for one in items)
        prepare = only(
            self.stream(source, m.Ship(chunk, names, (PLACE,) * len(items), (b"image",) * len(items))),
            a.Prepare,
        )
        out = self.do(e.PrepareDone(prepare.chunk, (Fidelity(),) * len(items)))
        assert sent(out, m.Prepared)[0][0] == source
        return chunk

    def to_held(self, *items: Item, source: bytes = B, batch: bytes = BATCH) -> None:
        chunk = self.to_prepared(*items, source=source, batch=batch)
        out = self.stream(source, m.Confirm(chunk, tuple(range(len(items)))))
        only(out, a.Activate)
        assert sent(self.do(e.ActivateDone(chunk, (None,) * len(items))), m.Active)


# --- exporter ------------------------------------------------------------------------------


def test_a_move_step_by_step() -> None:
    bench = Bench()
    out = bench.export(
        item(1, needs=Needs(7, True, 900), size_bytes=500), item(2, needs=Needs(9), size_bytes=70)
    )
    ((to, request),) = sent(out, m.Request)
    assert to is None
    assert (request.counts, request.needs, request.size_bytes) == (Counts(0, 0, 2), Needs(9, True, 900), 570)
    out = bench.offer(B)
    assert only(out, a.OpenStream).host == B
    assert sent(out, m.Release) == [(None, m.Release(BATCH, (B,)))]
    ((_unused, reserve),) = sent(bench.do(e.StreamOpened(B)), m.Reserve)
    out = bench.stream(B, m.Reserved(BATCH, reserve.page, (PLACE, PLACE)))
    freeze = only(out, a.Freeze)
    assert [one.migration[0] for one in freeze.items] == [1, 2]
    out = bench.do(e.FreezeDone(freeze.chunk, (b"one", b"two")))
    ((_unused, ship),) = sent(out, m.Ship)
    assert ship.images == (b"one", b"two")
    out = bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(), Refusal(Code.RESTORE, "no"))))
    assert only(out, a.Thaw).migrations == (bytes([2]) * 16,)
    assert results(out) == {bytes([2]) * 16: (Outcome.REFUSED, Code.RESTORE)}
    commit = only(out, a.Commit)
    assert (commit.decision.committed, commit.notices, len(commit.routes)) == ((0,), (), 1)
    out = bench.do(e.CommitDone(freeze.chunk, (None,)))
    assert sent(out, m.Confirm) == [(B, m.Confirm(freeze.chunk, (0,)))]
    assert sent(out, m.Release) == [(B, m.Release(BATCH))]
    out = bench.hear(B, m.Active(freeze.chunk))
    assert results(out) == {bytes([1]) * 16: (Outcome.ACTIVE, None)}
    only(out, a.ForgetDecision)
    only(out, a.BatchDone)
    assert bench.core.exporter.idle


def test_request_is_repeated_then_refused() -> None:
    bench = Bench(request_interval_s=1.0)
    bench.export(item(1))
    out = bench.wait(6.0)
    assert len(sent(out, m.Request)) == 4
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.NO_OFFER)}
    only(out, a.BatchDone)


def test_a_target_is_asked_alone_and_no_other_is_heard() -> None:
    bench = Bench()
    assert sent(bench.export(item(1), target=C), m.Request)[0][0] == C
    assert only(bench.offer(B), a.Ignored).why == "another host is the target"
    only(bench.offer(C), a.OpenStream)


@pytest.mark.parametrize("target", [{"target": ME}, {"target_address": IPv4Address("192.0.2.1")}])
def test_this_host_is_no_target(target: dict[str, Any]) -> None:
    assert results(Bench().export(item(1), **target)) == {
        bytes([1]) * 16: (Outcome.REFUSED, Code.NO_SUCH_HOST)
    }


def test_a_large_batch_is_split_over_importers() -> None:
    bench = Bench()
    bench.export(*(item(number) for number in range(1, 8)))
    bench.offer(B, Counts(0, 0, 3))
    out = bench.wait(0.3)
    assert sent(out, m.Request)[0][1].counts.connected == 4
    out = bench.offer(C)
    assert sent(out, m.Release) == [(None, m.Release(BATCH, (B, C)))]
    reserved = {
        host: [one.migration[0] for one in sent(bench.do(e.StreamOpened(host)), m.Reserve)[0][1].items]
        for host in (B, C)
    }
    assert reserved == {B: [1, 2, 3], C: [4, 5, 6, 7]}


def test_a_dry_run_says_who_has_room_and_keeps_none() -> None:
    bench = Bench()
    bench.export(item(1), item(2), item(3), dry_run=True)
    assert bench.offer(B, Counts(0, 0, 2)) == []
    assert bench.offer(B, Counts(0, 0, 2)) == []  # the same room once more
    out = bench.offer(C, Counts(0, 0, 3))
    assert [(one.migration[0], one.outcome, one.importer) for one in reported(out)] == [
        (1, Outcome.PLANNED, B), (2, Outcome.PLANNED, B), (3, Outcome.PLANNED, C)
    ]  # fmt: skip
    assert sent(out, m.Release) == [(None, m.Release(BATCH))]
    only(out, a.BatchDone)
    assert bench.core.exporter.idle


def test_a_dry_run_without_enough_room() -> None:
    bench = Bench()
    bench.core.policy = Weighted()
    bench.export(item(1), item(2), dry_run=True, target=B)
    bench.offer(B, Counts(0, 0, 1))
    out = bench.wait(1.1)  # no longer, whatever the timeout is
    assert results(out) == {
        bytes([1]) * 16: (Outcome.PLANNED, None),
        bytes([2]) * 16: (Outcome.REFUSED, Code.NO_OFFER),
    }
    assert "room for 1 of 2 sockets" in str(reported(out)[1].refusal)
    assert sent(out, m.Release) == [(B, m.Release(BATCH))]
    assert bench.core.policy._credit == {}  # nobody has got anything
    assert bench.core.exporter.idle


def listener(number: int, queued: int) -> Item:
    return item(number, kind=Kind.LISTENING, state="LISTEN", remote=None, queued=queued)


def test_a_dry_run_counts_what_waits_in_queues() -> None:
    bench = Bench()
    out = bench.export(item(1), listener(2, 3), dry_run=True)
    assert sent(out, m.Request)[0][1].counts == Counts(0, 1, 4)
    assert bench.offer(B, Counts(0, 1, 2)) == [], "no room for the queue"
    assert bench.offer(C, Counts(0, 0, 9)) == [], "room enough, but not where the listener would go"
    out = bench.offer(C, Counts(0, 1, 3))
    assert {one.migration[0]: (one.outcome, one.importer) for one in reported(out)} == {
        1: (Outcome.PLANNED, B), 2: (Outcome.PLANNED, C)
    }  # fmt: skip
    assert bench.core.exporter.idle


def test_a_dry_run_without_room_for_a_queue() -> None:
    bench = Bench()
    bench.export(item(1), listener(2, 3), dry_run=True, target=B)
    bench.offer(B, Counts(0, 1, 3))
    out = bench.wait(1.1)
    assert results(out) == {
        bytes([1]) * 16: (Outcome.REFUSED, Code.NO_OFFER),
        bytes([2]) * 16: (Outcome.PLANNED, None),
    }
    assert "room for 4 of 5 sockets" in str(reported(out)[1].refusal)


def test_grace_lets_the_policy_choose() -> None:
    bench = Bench(offer_grace_s=0.05)
    bench.core.policy = LeastLoaded()
    bench.export(item(1))
    assert bench.offer(B, load=500) == [] == bench.offer(C, load=10)
    assert only(bench.wait(0.06), a.OpenStream).host == C


def test_full_importers_send_items_elsewhere_others_refuse_them() -> None:
    bench = Bench()
    bench.export(item(1), item(2))
    bench.offer(B)
    bench.do(e.StreamOpened(B))
    full, no = Refusal(Code.LIST_FULL, "full"), Refusal(Code.INTERNAL, "no")
    out = bench.stream(B, m.Reserved(BATCH, 0, (full, no)))
    assert results(out) == {bytes([2]) * 16: (Outcome.REFUSED, Code.INTERNAL)}
    only(bench.offer(C), a.OpenStream)
    out = bench.do(e.StreamLost(C)) + bench.wait(10)
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.LIST_FULL)}  # the first real reason


NO_SCALE, NO_TUPLE = Refusal(Code.WINDOW_SCALE, "scale"), Refusal(Code.TUPLE_TAKEN, "taken")


def refuse(bench: Bench, host: bytes, *refusals: Refusal) -> list[a.Action]:
    """A host offers, and refuses all that it is asked for."""
    bench.offer(host)
    ((_unused, reserve),) = sent(bench.do(e.StreamOpened(host)), m.Reserve)
    assert len(reserve.items) == len(refusals)
    return bench.stream(host, m.Reserved(BATCH, reserve.page, refusals))


def test_who_is_refused_for_good_by_all_does_not_wait() -> None:
    bench = Bench()
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1))
    assert not results(refuse(bench, B, NO_SCALE))
    out = refuse(bench, C, NO_TUPLE) + bench.wait(0.3)
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.WINDOW_SCALE)}  # the first real reason
    only(out, a.BatchDone)
    assert bench.core.exporter.idle


def test_who_has_refused_for_good_is_not_asked_again() -> None:
    """But it gets the others, and whoever has not refused may still come."""
    bench = Bench()
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1), item(2), item(3))
    refuse(bench, B, NO_SCALE, NO_SCALE, NO_SCALE)
    for _turn in range(3):
        assert sent(bench.wait(0.3), m.Request)
        assert bench.offer(B) == []
    assert only(bench.offer(C, Counts(0, 0, 1)), a.OpenStream).host == C
    bench.do(e.StreamOpened(C))
    assert not results(bench.wait(0.3))
    bench.capacity.members = frozenset({B})  # the other two have only had that one to go to
    assert results(bench.wait(0.3)) == {
        bytes([2]) * 16: (Outcome.REFUSED, Code.WINDOW_SCALE),
        bytes([3]) * 16: (Outcome.REFUSED, Code.WINDOW_SCALE),
    }


def test_what_may_pass_is_waited_for() -> None:
    bench = Bench()
    bench.capacity.members = frozenset({B})
    bench.export(item(1))
    refuse(bench, B, Refusal(Code.LIST_FULL, "full"))
    assert not results(bench.wait(1.0))
    bench.offer(B)
    out = bench.do(e.StreamLost(B)) + bench.wait(0.3)
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.LIST_FULL)}  # it has failed twice


def test_a_mode_that_was_not_offered_is_refused() -> None:
    bench = Bench()
    bench.export(item(1))
    bench.offer(B)
    bench.do(e.StreamOpened(B))
    place = Place(PLACE.endpoint, Mode.TAKEOVER)
    assert results(bench.stream(B, m.Reserved(BATCH, 0, (place,)))) == {
        bytes([1]) * 16: (Outcome.REFUSED, Code.NO_REDIRECT)
    }


def test_chunks_and_the_pipeline() -> None:
    bench = Bench(chunk_items=2, pipeline_depth=2, chunk_bytes=1000)
    bench.export(*(item(number, size_bytes=300) for number in range(1, 5)), item(5, size_bytes=5000))
    bench.offer(B)
    bench.do(e.StreamOpened(B))
    first = only(bench.stream(B, m.Reserved(BATCH, 0, (PLACE,) * 5)), a.Freeze)
    second = only(bench.do(e.FreezeDone(first.chunk, (b"", b""))), a.Freeze)  # one on its way, one freezing
    assert [len(first.items), len(second.items)] == [2, 2]
    assert not any(isinstance(one, a.Freeze) for one in bench.do(e.FreezeDone(second.chunk, (b"", b""))))
    out = bench.stream(B, m.Prepared(first.chunk, (Fidelity(),) * 2))
    third = only(bench.do(e.CommitDone(first.chunk, (None, None))), a.Freeze)
    assert third.items[0].migration[0] == 5  # too large for chunk_bytes, so it goes alone
    assert only(out, a.Commit).decision.chunk == first.chunk


def test_freeze_deadline_thaws_and_tries_again() -> None:
    bench = Bench(freeze_deadline_s=0.5)
    chunk = bench.to_shipped(item(1))
    out = bench.wait(0.6)
    assert only(out, a.Thaw).chunk == chunk
    assert sent(out, m.Abort) == [(B, m.Abort(chunk))]
    assert sent(out, m.Request)
    # what comes too late is told so
    assert sent(bench.stream(B, m.Prepared(chunk, (Fidelity(),))), m.Abort)
    assert sent(bench.hear(B, m.Query(chunk)), m.Abort)


def test_one_that_is_always_too_late_costs_only_itself() -> None:
    """Of three that are frozen together one is too large for the time: each is tried alone then."""
    slow = bytes([1]) * 16
    bench = Bench(freeze_deadline_s=0.5, chunk_items=3, pipeline_depth=1)
    bench.export(*(item(number) for number in range(1, 8)), target=B)
    chunks: list[list[int]] = []
    done: dict[bytes, tuple[Outcome, Code | None]] = {}
    todo = bench.offer(B)
    for _turn in range(99):
        if not todo:
            break
        action, *todo = todo
        match action:
            case a.OpenStream():
                todo += bench.do(e.StreamOpened(B))
            case a.Send(message=m.Request(counts=counts)):
                todo += bench.offer(B, counts)
            case a.Send(message=m.Reserve(page=page, items=items)):
                todo += bench.stream(B, m.Reserved(BATCH, page, (PLACE,) * len(items)))
            case a.Freeze(chunk=chunk, items=items):
                chunks.append([one.migration[0] for one in items])
                todo += bench.do(e.FreezeDone(chunk, (b"image",) * len(items)))
            case a.Send(message=m.Ship(chunk=chunk, migrations=migrations)):
                if slow in migrations:
                    todo += bench.wait(0.6)
                else:
                    todo += bench.stream(B, m.Prepared(chunk, (Fidelity(),) * len(migrations)))
            case a.Commit(decision=decision):
                todo += bench.do(e.CommitDone(decision.chunk, (None,) * len(decision.committed)))
            case a.Send(message=m.Confirm(chunk=chunk)):
                todo += bench.stream(B, m.Active(chunk))
            case a.Report():
                done |= results([action])
    assert chunks[0] == [1, 2, 3]
    assert [1] in chunks
    assert [2] in chunks
    assert done.pop(slow) == (Outcome.REFUSED, Code.FREEZE_DEADLINE)
    assert set(done.values()) == {(Outcome.ACTIVE, None)}
    assert len(done) == 6


def test_what_waits_behind_a_late_chunk_is_not_another_miss() -> None:
    bench = Bench(freeze_deadline_s=0.5, chunk_items=1, pipeline_depth=2)
    first = bench.to_freezing(item(1), item(2), item(3))
    bench.wait(0.1)
    second = only(bench.do(e.FreezeDone(first.chunk, (b"image",))), a.Freeze)
    bench.do(e.FreezeDone(second.chunk, (b"image",)))
    out = bench.wait(0.6)
    assert [one.chunk for one in out if isinstance(one, a.Thaw)] == [first.chunk, second.chunk]
    assert not sent(out, m.Release)
    ((_unused, probe),) = sent(out, m.Reserve)
    assert probe.items == ()
    # Nothing is frozen before the stream is known to be free.
    assert not any(isinstance(one, a.Freeze) for one in out)
    third = only(bench.stream(B, m.Reserved(BATCH, probe.page, ())), a.Freeze)
    assert names(third.items) == [3]


def test_deadlines_missed_in_succession_end_the_leg() -> None:
    bench = Bench(freeze_deadline_s=0.5, chunk_items=1, pipeline_depth=1, leg_failures_max=2)
    first = bench.to_freezing(item(1), item(2), item(3))
    bench.do(e.FreezeDone(first.chunk, (b"image",)))
    ((_unused, probe),) = sent(bench.wait(0.6), m.Reserve)
    second = only(bench.stream(B, m.Reserved(BATCH, probe.page, ())), a.Freeze)
    bench.do(e.FreezeDone(second.chunk, (b"image",)))
    out = bench.wait(0.6)
    assert sent(out, m.Release) == [(B, m.Release(BATCH))]
    assert not any(isinstance(one, a.Freeze) for one in out)


def test_a_probe_that_is_not_answered_ends_the_leg() -> None:
    bench = Bench(freeze_deadline_s=0.5, chunk_items=1, pipeline_depth=1, reserve_timeout_s=1.0)
    first = bench.to_freezing(item(1), item(2))
    bench.do(e.FreezeDone(first.chunk, (b"image",)))
    bench.wait(0.6)
    assert sent(bench.wait(1.0), m.Release) == [(B, m.Release(BATCH))]


def test_a_freeze_that_may_succeed_in_a_moment_is_repeated() -> None:
    """Of the two items one cannot be stopped now; the other is not held up, nor tried twice."""
    bench = Bench()
    busy = Refusal(Code.OWNER_UNSTOPPABLE, "busy")
    freeze = bench.to_freezing(item(1), item(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (busy, b"image")))
    assert sent(out, m.Ship)[0][1].migrations == (bytes([2]) * 16,)
    assert not results(out)
    for last in (False, True):
        asked = sent(out + bench.wait(0.3), m.Request)[0][1]
        assert asked.counts.connected == 1
        freeze = bench.reserved(bench.offer(B))
        assert [one.migration for one in freeze.items] == [bytes([1]) * 16]
        out = bench.do(e.FreezeDone(freeze.chunk, (busy,)))
        assert results(out) == ({bytes([1]) * 16: (Outcome.REFUSED, Code.OWNER_UNSTOPPABLE)} if last else {})


# -- addresses that leave with all their connections

ALIAS, OTHER_ALIAS = (IPv4Address(f"192.0.2.{last}") for last in (7, 8))


def of_address(number: int, address: IPv4Address = ALIAS, **fields: Any) -> Item:
    end = Endpoint(address, 80)
    return item(number, local=end, origin=end, **fields)


def place_with(address: IPv4Address) -> Place:
    return Place(Endpoint(address, 80), Mode.TAKEOVER)


class TakeoverBench(Bench):
    """Every connection is led away by takeover."""

    def export(self, *items: Item, **fields: Any) -> list[a.Action]:
        return self.do(e.StartExport(BATCH, items, (Mode.TAKEOVER,), 5.0, **fields))

    def offer(self, host: bytes, rooms: Counts = ROOMY, waiting: int = 0, load: int = 0) -> list[a.Action]:
        return self.hear(host, m.Offer(BATCH, rooms, Counts(0, 0, waiting), load, 1, (Mode.TAKEOVER,), 1000))

    def place(self, page: m.Reserve) -> list[a.Action]:
        places = tuple(place_with(one.local.address) for one in page.items if one.local)  # type: ignore[arg-type]
        return self.stream(B, m.Reserved(BATCH, page.page, places))

    def to_freezing(self, *items: Item) -> a.Freeze:
        self.export(*items)
        return self.frozen_next(self.offer(B))

    def frozen_next(self, out: list[a.Action]) -> a.Freeze:
        if any(isinstance(one, a.OpenStream) for one in out):
            out = self.do(e.StreamOpened(B))
        ((_unused, reserve),) = sent(out, m.Reserve)
        return only(self.place(reserve), a.Freeze)


def names(items: Any) -> list[int]:
    return [one.migration[0] for one in items]


def test_an_address_is_frozen_whole() -> None:
    """Neither the number of items nor that of bytes divides it, and its items need not stand together."""
    bench = TakeoverBench(chunk_items=3, chunk_bytes=1000)
    freeze = bench.to_freezing(
        of_address(1, size_bytes=900), of_address(2, OTHER_ALIAS), of_address(3, size_bytes=900),
        of_address(4, OTHER_ALIAS), of_address(5, size_bytes=900),
    )  # fmt: skip
    assert names(freeze.items) == [1, 3, 5]
    assert names(only(bench.do(e.FreezeDone(freeze.chunk, (b"",) * 3)), a.Freeze).items) == [2, 4]


def test_an_address_waits_for_all_of_its_places() -> None:
    bench = TakeoverBench(page_items=2, chunk_items=9)
    bench.export(*(of_address(number) for number in (1, 2, 3)))
    bench.offer(B)
    first, second = (one for _unused, one in sent(bench.do(e.StreamOpened(B)), m.Reserve))
    assert not any(isinstance(one, a.Freeze) for one in bench.place(first))
    assert names(only(bench.place(second), a.Freeze).items) == [1, 2, 3]


def test_an_address_with_too_many_connections_stays() -> None:
    bench = TakeoverBench(chunk_items=2)
    bench.export(of_address(1), of_address(2), of_address(3), of_address(4, OTHER_ALIAS))
    bench.offer(B)
    ((_unused, reserve),) = sent(bench.do(e.StreamOpened(B)), m.Reserve)
    out = bench.place(reserve)
    assert names(only(out, a.Freeze).items) == [4]
    assert {one.migration[0] for one in reported(out)} == {1, 2, 3}
    for one in reported(out):
        assert one.refusal and one.refusal.code is Code.REDIRECT
        assert "3 connections have 192.0.2.7" in one.refusal.message
        assert "raise chunk_size" in one.refusal.message


def test_an_address_goes_to_one_importer() -> None:
    """Two have room for half of the connections each; those of one address do not part for that."""
    bench = TakeoverBench()
    bench.export(*(of_address(number) for number in (1, 3, 5)), of_address(2, OTHER_ALIAS))
    assert only(bench.offer(B, Counts(9, 9, 2)), a.OpenStream).host == B
    assert only(bench.offer(C, Counts(9, 9, 3)), a.OpenStream).host == C
    ((_unused, few),) = sent(bench.do(e.StreamOpened(B)), m.Reserve)
    ((_unused, many),) = sent(bench.do(e.StreamOpened(C)), m.Reserve)
    assert (names(few.items), names(many.items)) == ([2], [1, 3, 5])


def test_an_address_that_nobody_has_room_for_stays_whole() -> None:
    bench = TakeoverBench()
    bench.export(of_address(1), of_address(2))
    for host in (B, C):
        assert not any(isinstance(one, a.OpenStream) for one in bench.offer(host, Counts(9, 9, 1)))
    out = reported(bench.wait(30))
    assert {one.refusal.code for one in out if one.refusal} == {Code.NO_OFFER} and len(out) == 2
    assert out[0].refusal
    assert "0 of 2 sockets (takeover leads all connections of an address to one)" in out[0].refusal.message


def test_an_address_is_frozen_again_whole() -> None:
    """One cannot be frozen now: the others of its address are let go, and tried again with it."""
    bench = TakeoverBench()
    changed = Refusal(Code.CHANGED, "a packet came")
    freeze = bench.to_freezing(of_address(1), of_address(2), of_address(3, OTHER_ALIAS))
    out = bench.do(e.FreezeDone(freeze.chunk, (changed, b"image", b"image")))
    assert sent(out, m.Ship)[0][1].migrations == (bytes([3]) * 16,)
    assert only(out, a.Thaw).migrations == (bytes([2]) * 16,)
    assert not results(out)
    assert sent(out, m.Request)[0][1].counts.connected == 2
    freeze = bench.frozen_next(bench.offer(B))
    assert names(freeze.items) == [1, 2]
    # What was only in the other's company is not tried out.
    for _turn in range(2):
        out = bench.do(e.FreezeDone(freeze.chunk, (b"image", changed)))
        assert not results(out)
        bench.wait(0.3)
        freeze = bench.frozen_next(bench.offer(B))
        assert sorted(names(freeze.items)) == [1, 2]
    out = bench.do(e.FreezeDone(freeze.chunk, (b"image", b"image")))
    assert len(sent(out, m.Ship)[0][1].migrations) == 2


def test_an_address_stays_with_one_that_cannot_be_frozen() -> None:
    """The others are tried again: it may have ended. If it has not, the redirect says so."""
    bench = TakeoverBench()
    freeze = bench.to_freezing(of_address(1), of_address(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.OWNER_TRACED, "traced"), b"image")))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.OWNER_TRACED)}
    assert only(out, a.Thaw).migrations == (bytes([2]) * 16,)
    assert not sent(out, m.Ship)
    freeze = bench.frozen_next(bench.offer(B))
    (result,) = reported(bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.REDIRECT, "one is there"),))))
    assert result.refusal and result.refusal.code is Code.REDIRECT


def test_that_another_of_its_address_has_ended_is_not_its_end() -> None:
    """`no-such-socket` is told as closed; what stays with the address is not."""
    bench = TakeoverBench()
    freeze = bench.to_freezing(of_address(1), of_address(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.NO_SUCH_SOCKET, "closed"), b"image")))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.NO_SUCH_SOCKET)}
    (result,) = reported(bench.wait(30))  # nobody offers any more
    assert result.refusal and result.refusal.code is Code.CHANGED
    assert result.refusal.message == "Its address stays, as another connection does that has it: closed"


def test_an_address_stays_with_one_that_the_importer_refuses() -> None:
    """What it has prepared of that address it is told to forget."""
    bench = TakeoverBench()
    items = of_address(1), of_address(2), of_address(3, OTHER_ALIAS)
    freeze = bench.to_freezing(*items)
    bench.do(e.FreezeDone(freeze.chunk, (b"image",) * 3))
    no = Refusal(Code.RESTORE, "no route")
    out = bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(), no, Fidelity())))
    assert only(out, a.Commit).decision.committed == (2,)
    assert set(only(out, a.Thaw).migrations) == {one.migration for one in items[:2]}
    assert set(results(out).values()) == {(Outcome.REFUSED, Code.RESTORE)}

    bench = TakeoverBench()
    freeze = bench.to_freezing(*items[:2])
    bench.do(e.FreezeDone(freeze.chunk, (b"image",) * 2))
    out = bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(), no)))
    assert not any(isinstance(one, a.Commit) for one in out)
    assert sent(out, m.Abort) == [(B, m.Abort(freeze.chunk))]
    assert len(results(out)) == 2


def test_undecided_while_the_shell_commits_whatever_happens() -> None:
    bench = Bench(freeze_deadline_s=0.5)
    chunk = bench.to_committing(item(1))
    for event in (e.StreamLost(B), e.CancelExport(BATCH)):
        assert not [one for one in bench.do(event) if isinstance(one, a.Thaw)]
    assert not [one for one in bench.wait(30) if isinstance(one, a.Thaw)]
    assert sent(bench.hear(B, m.Query(chunk)), m.Undecided)
    bench.do(e.CommitDone(chunk, (None,)))
    assert sent(bench.hear(B, m.Query(chunk)), m.Confirm)
    assert only(bench.hear(C, m.Query(chunk)), a.Ignored)
    assert only(bench.hear(C, m.Active(chunk)), a.Ignored)


def test_confirm_backs_off_for_ever() -> None:
    bench = Bench(retry_s=1.0, retry_max_s=8.0)
    chunk = bench.to_committing(item(1))
    bench.do(e.CommitDone(chunk, (None,)))
    assert len(sent(bench.wait(15.5), m.Confirm)) == 4  # after 1, 3, 7, 15
    assert len(sent(bench.wait(8000), m.Confirm)) == 1000


def test_nothing_committed_is_an_abort() -> None:
    bench = Bench()
    chunk = bench.to_committing(item(1))
    out = bench.do(e.CommitDone(chunk, (Refusal(Code.CHANGED, "moved on"),)))
    assert sent(out, m.Abort) == [(B, m.Abort(chunk))]
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.CHANGED)}
    only(out, a.BatchDone)
    bench.export(item(1))  # and it can be tried again


def test_lost_while_freezing_waits_for_the_shell() -> None:
    bench = Bench()
    bench.export(item(1), target=B)
    bench.offer(B)
    bench.do(e.StreamOpened(B))
    freeze = only(bench.stream(B, m.Reserved(BATCH, 0, (PLACE,))), a.Freeze)
    assert not [one for one in bench.do(e.CancelExport(BATCH)) if isinstance(one, a.Thaw)]
    out = bench.do(e.FreezeDone(freeze.chunk, (b"image",)))
    assert only(out, a.Thaw)
    assert not sent(out, m.Ship)
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.TIMEOUT)}


def test_the_same_connection_twice() -> None:
    bench = Bench()
    bench.export(item(1))
    again = e.StartExport(b"other batch id!!", (item(1),), (Mode.NAT,), 1.0)
    assert results(bench.do(again)) == {bytes([1]) * 16: (Outcome.REFUSED, Code.ALREADY_MIGRATING)}
    third = e.StartExport(b"third batch id!!", (item(1),), (Mode.NAT,), 1.0)
    assert results(bench.do(third)) == {bytes([1]) * 16: (Outcome.REFUSED, Code.ALREADY_MIGRATING)}
    assert results(bench.do(e.CancelExport(BATCH))) == {bytes([1]) * 16: (Outcome.REFUSED, Code.TIMEOUT)}


def test_what_has_left_or_a_wrong_hop_is_refused() -> None:
    bench = Bench()
    chunk = bench.to_committing(item(1))
    bench.do(e.CommitDone(chunk, (None,)))
    bench.hear(B, m.Active(chunk))
    for one in (item(1), item(1, hop=2), item(2, hop=2)):
        out = bench.do(e.StartExport(BATCH, (one,), (Mode.NAT,), 1.0))
        assert results(out) == {one.migration: (Outcome.REFUSED, Code.ALREADY_MIGRATING)}


def test_children_go_straight_to_the_listeners_new_host() -> None:
    bench = Bench()
    out = bench.do(e.ChildrenFound(BATCH, C, (item(1, listener=bytes([9]) * 16),), (Mode.NAT,), 2.0))
    assert only(out, a.OpenStream).host == C
    assert not sent(out, m.Request)
    assert sent(bench.do(e.StreamOpened(C)), m.Reserve)[0][1].items[0].listener == bytes([9]) * 16
    out = bench.do(e.StreamLost(C)) + bench.wait(0)
    assert only(out, a.OpenStream).host == C  # once more, but not for ever
    out = bench.do(e.StreamLost(C))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.PEER_LOST)}


def test_decisions_are_confirmed_after_a_restart() -> None:
    chunk = ChunkId(BATCH, 3)
    decision = Decision(chunk, B, (bytes([1]) * 16, bytes([2]) * 16), (1,))
    bench = Bench(started=e.Started(decisions=(decision,)))
    assert sent(bench.begun, m.Confirm) == [(B, m.Confirm(chunk, (1,)))]
    out = bench.hear(B, m.Active(chunk, ((1, Code.RESTORE),)))
    assert results(out) == {bytes([2]) * 16: (Outcome.LOST, Code.RESTORE)}
    only(out, a.ForgetDecision)


def test_nothing_is_said_before_the_journal_is_read() -> None:
    core = Core(ME, Settings(), Capacity())
    assert core.handle(e.Received(B, m.Query(ChunkId(BATCH, 1)), Channel.DATAGRAM), 0.0) == []
    with pytest.raises(ValueError, match="16 bytes"):
        Core(b"short", Settings(), Capacity())


def test_answers_that_do_not_fit_raise() -> None:
    bench = Bench()
    chunk = ChunkId(BATCH, 0)
    for event in (
        e.FreezeDone(chunk, ()), e.CommitDone(chunk, ()), e.PrepareDone(chunk, ()), e.ActivateDone(chunk, ()),
    ):  # fmt: skip
        with pytest.raises(UndeclaredTransition):
            bench.do(event)
    committing = bench.to_committing(item(1))
    with pytest.raises(UndeclaredTransition, match="'frozen' is not declared"):
        bench.do(e.FreezeDone(committing, (b"again",)))


# --- importer ------------------------------------------------------------------------------


def request(counts: Counts, batch: bytes = BATCH, **fields: Any) -> m.Request:
    base: dict[str, Any] = {"needs": Needs(), "size_bytes": 0, "modes": (Mode.NAT,)}
    return m.Request(batch, counts, **(base | fields))


def test_offers_are_kept_under_a_lease() -> None:
    bench = Bench(Capacity(Counts(0, 1, 5), modes=(Mode.NAT,)), lease_s=2.0)
    ((to, offer),) = sent(bench.hear(B, request(Counts(1, 1, 3))), m.Offer)
    assert (to, offer.rooms, offer.lease_ms) == (B, Counts(0, 1, 3), 2000)
    ((_unused, other),) = sent(bench.hear(C, request(Counts(0, 1, 9))), m.Offer)
    assert other.rooms == Counts(0, 0, 2)
    assert sent(bench.hear(B, request(Counts(1, 1, 3))), m.Offer) == [(B, offer)]  # the same again
    assert sent(bench.hear(C, request(Counts(0, 0, 9), b"another batch id")), m.Offer) == []  # full: silence
    bench.hear(B, m.Release(BATCH, (C,)))
    ((_unused, more),) = sent(bench.hear(C, request(Counts(0, 0, 9))), m.Offer)
    assert more.rooms.connected == 5
    bench.wait(2.1)
    assert bench.core.importer.idle
    assert bench.core.importer._kept == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({}, True),
        ({"target": ME}, True),
        ({"target": C}, False),
        ({"target_address": IPv4Address("192.0.2.1")}, True),
        ({"target_address": IPv4Address("192.0.2.9")}, False),
        ({"modes": (Mode.IPTABLES,)}, False),
        ({"needs": Needs(14, True, 1 << 20)}, True),  # RESERVE says which ones, and why
    ],
)
def test_who_answers_a_request(fields: dict[str, Any], answers: bool) -> None:
    capacity = Capacity(
        ROOMY, modes=(Mode.NAT,), image_bytes_max=1 << 19, addresses=frozenset({IPv4Address("192.0.2.1")})
    )
    assert bool(sent(Bench(capacity).hear(B, request(Counts(0, 0, 1), **fields)), m.Offer)) is answers


def test_reserve_without_room() -> None:
    bench = Bench(Capacity(Counts(0, 0, 1), modes=(Mode.NAT,)))
    out = bench.stream(B, m.Reserve(BATCH, 0, (item(1), item(2)), (Mode.NAT,)))
    reserve = only(out, a.Reserve)
    assert (len(reserve.items), reserve.former) == (1, (None,))
    ((_unused, reserved),) = sent(bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE,))), m.Reserved)
    assert reserved.places[0] == PLACE
    assert isinstance(reserved.places[1], Refusal)
    assert reserved.places[1].code is Code.LIST_FULL


def test_one_that_is_too_large_is_refused_alone() -> None:
    bench = Bench(Capacity(ROOMY, modes=(Mode.NAT,), image_bytes_max=1 << 19))
    large = item(2, needs=Needs(image_bytes_max=1 << 20))
    reserve = only(bench.stream(B, m.Reserve(BATCH, 0, (item(1), large), (Mode.NAT,))), a.Reserve)
    ((_unused, reserved),) = sent(bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE,))), m.Reserved)
    assert reserved.places[0] == PLACE
    assert isinstance(reserved.places[1], Refusal) and reserved.places[1].code is Code.TOO_LARGE


def test_what_was_reserved_is_given_up_when_the_stream_breaks() -> None:
    bench = Bench()
    reserve = only(bench.stream(B, m.Reserve(BATCH, 0, (item(1), item(2)), (Mode.NAT,))), a.Reserve)
    assert only(bench.do(e.StreamLost(B)), a.Unreserve).migrations == (bytes([1]) * 16, bytes([2]) * 16)
    assert bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE, PLACE))) == []
    assert bench.core.importer._kept == [0, 0, 0]


def test_ship_of_something_else_is_refused() -> None:
    bench = Bench()
    reserve = only(bench.stream(B, m.Reserve(BATCH, 0, (item(1),), (Mode.NAT,))), a.Reserve)
    bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE,)))
    chunk, name = ChunkId(BATCH, 0), bytes([1]) * 16
    other = Place(Endpoint(IPv4Address("192.0.2.2"), 4001), Mode.NAT)
    for names, place, source in (((name,), other, B), ((b"x" * 16,), PLACE, B), ((name,), PLACE, C)):
        ((_unused, answer),) = sent(bench.stream(source, m.Ship(chunk, names, (place,), (b"",))), m.Prepared)
        assert isinstance(answer.results[0], Refusal)
    assert only(bench.hear(B, m.Ship(chunk, (name,), (PLACE,), (b"",))), a.Ignored).why == "it needs a stream"
    only(bench.stream(B, m.Ship(chunk, (name,), (PLACE,), (b"",))), a.Prepare)


def test_in_doubt_asks_until_told() -> None:
    bench = Bench(retry_s=1.0, retry_max_s=4.0)
    chunk = bench.to_prepared(item(1))
    assert len(sent(bench.wait(20), m.Query)) == 6  # 1, 3, 7, 11, 15, 19
    assert bench.hear(B, m.Undecided(chunk)) == []
    assert only(bench.hear(C, m.Abort(chunk)), a.Ignored)
    assert only(bench.hear(C, m.Confirm(chunk, (0,))), a.Ignored)
    assert only(bench.hear(B, m.Confirm(chunk, (5,))), a.Ignored)
    assert only(bench.hear(B, m.Abort(chunk)), a.Discard).migrations == (bytes([1]) * 16,)
    assert bench.wait(60) == []
    assert bench.core.idle


def test_in_doubt_over_a_restart_and_confirmed_in_part() -> None:
    chunk = ChunkId(BATCH, 4)
    arrivals = tuple(Arrival(item(number, home=B), PLACE) for number in (1, 2, 3))
    bench = Bench(started=e.Started(prepared=(PreparedChunk(chunk, B, arrivals, (0, 2)),)))
    assert sent(bench.begun, m.Query) == [(B, m.Query(chunk))]
    out = bench.hear(B, m.Confirm(chunk, (2,)))
    assert only(out, a.Discard).migrations == (bytes([1]) * 16,)
    assert [one.migration[0] for one in only(out, a.Activate).holdings] == [3]
    assert bench.hear(B, m.Confirm(chunk, (2,))) == []  # not twice
    assert only(bench.hear(B, m.Abort(chunk)), a.Ignored)
    out = bench.do(e.ActivateDone(chunk, (None,)))
    assert (
        sent(out, m.Active) == [(B, m.Active(chunk))] == sent(bench.hear(B, m.Confirm(chunk, (2,))), m.Active)
    )


def test_aborted_while_preparing() -> None:
    bench = Bench()
    reserve = only(bench.stream(B, m.Reserve(BATCH, 0, (item(1),), (Mode.NAT,))), a.Reserve)
    bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE,)))
    chunk = ChunkId(BATCH, 0)
    bench.stream(B, m.Ship(chunk, (bytes([1]) * 16,), (PLACE,), (b"",)))
    assert bench.stream(B, m.Abort(chunk)) == []
    out = bench.do(e.PrepareDone(chunk, (Fidelity(),)))
    assert only(out, a.Discard).chunk == chunk
    assert not sent(out, m.Prepared)


# --- redirects over hops -------------------------------------------------------------------


def route(hop: int = 1, holder: bytes = B, home: bytes = ME, **fields: Any) -> Route:
    one = item(1)
    ends = (one.local, one.remote, one.origin)
    return Route(one.connection, one.migration, one.kind, hop, home, holder, PLACE, *ends, **fields)


def holding(hop: int, home: bytes, exporter: bytes) -> Holding:
    one = item(1)
    ends = (one.local, one.remote, one.origin)
    return Holding(one.connection, one.migration, one.kind, hop, home, exporter, PLACE, *ends)


ONE = bytes([1]) * 16


def move(hop: int, holder: bytes) -> m.Reroute:
    return m.Reroute((m.Move(ONE, hop, holder, PLACE),))


def test_home_obeys_only_the_present_holder_and_the_next_hop() -> None:
    bench = Bench(started=e.Started(routes=(route(),)))
    for source, message in ((C, move(2, C)), (B, move(3, C)), (B, move(2, ME))):
        assert bench.hear(source, message) == []
    ((new,),) = (only(bench.hear(B, move(2, C)), a.Reroute).routes,)
    assert (new.hop, new.holder) == (2, C)
    assert bench.hear(B, move(2, C)) == []  # the shell is at it
    done = ((m.Hop(ONE, 2), m.Verdict.DONE),)
    assert sent(bench.do(e.RerouteDone(((ONE, 2, None),))), m.Rerouted) == [(B, m.Rerouted(done))]
    assert sent(bench.hear(B, move(2, C)), m.Rerouted) == [(B, m.Rerouted(done))]
    gone = m.Reroute((m.Move(b"unknown unknown ", 2, C, PLACE),))
    assert sent(bench.hear(B, gone), m.Rerouted)[0][1].verdicts[0][1] is m.Verdict.GONE


def test_home_that_cannot_reach_the_holder_stays_pinned() -> None:
    bench = Bench(started=e.Started(routes=(route(),)))
    bench.hear(B, move(2, C))
    out = bench.do(e.RerouteDone(((ONE, 2, Refusal(Code.NO_REDIRECT, "no way")),)))
    assert only(out, a.SaveRoutes).routes[0].pinned
    assert not sent(out, m.Rerouted), "nobody hears of it before it is journalled"
    assert sent(bench.hear(B, move(2, C)), m.Rerouted)[0][1].verdicts[0][1] is m.Verdict.REFUSED


def test_who_is_no_home_moves_no_redirect() -> None:
    bench = Bench(started=e.Started(routes=(route(home=C),)))
    assert bench.hear(B, move(2, C)) == []


@pytest.mark.parametrize("verdict", m.Verdict)
def test_waypoint_goes_when_home_has_answered(verdict: m.Verdict) -> None:
    bench = Bench(started=e.Started(holdings=(holding(1, C, C),)), audit_interval_s=1000)
    chunk = bench.to_committing(item(1, hop=2, home=C))
    bench.do(e.CommitDone(chunk, (None,)))
    assert sent(bench.wait(3), m.Reroute)[0] == (C, m.Reroute((m.Move(ONE, 2, B, PLACE),)))
    assert bench.hear(B, m.Rerouted(((m.Hop(ONE, 2), verdict),))) == []  # it is not the home
    out = bench.hear(C, m.Rerouted(((m.Hop(ONE, 2), verdict),)))
    assert only(out, a.ForgetNotices).notices == ((ONE, 2),)
    if verdict is m.Verdict.REFUSED:
        assert only(out, a.SaveRoutes).routes[0].pinned
    else:
        assert only(out, a.Collect).routes[0].upstream == C
        bench.do(e.CollectDone(((ONE, 2),)))
        assert not bench.core.routes.routes


def test_notices_survive_a_restart() -> None:
    bench = Bench(started=e.Started(notices=(Notice(ONE, 2, C, B, PLACE),)))
    assert sent(bench.wait(0.1), m.Reroute)[0][0] == C


def test_coming_home_keeps_the_endpoint_and_takes_the_redirect_back() -> None:
    bench = Bench(started=e.Started(routes=(route(),)), audit_interval_s=1000)
    back = item(1, hop=2)
    reserve = only(bench.stream(B, m.Reserve(BATCH, 0, (back,), (Mode.NAT,))), a.Reserve)
    assert reserve.former == (route().local,)
    bench.do(e.ReserveDone(BATCH, B, reserve.page, (PLACE,)))
    chunk = ChunkId(BATCH, 0)
    only(bench.stream(B, m.Ship(chunk, (ONE,), (PLACE,), (b"",))), a.Prepare)
    bench.do(e.PrepareDone(chunk, (Fidelity(),)))
    assert bench.hear(B, move(2, ME)) == []  # not yet
    assert only(bench.hear(B, m.Confirm(chunk, (0,))), a.Activate).returning == (ONE,)
    bench.do(e.ActivateDone(chunk, (None,)))
    assert not bench.core.routes.routes
    assert sent(bench.hear(B, move(2, ME)), m.Rerouted)[0][1].verdicts[0][1] is m.Verdict.DONE


def test_abort_of_a_return_keeps_the_route() -> None:
    bench = Bench(started=e.Started(routes=(route(),)), audit_interval_s=1000)
    chunk = bench.to_prepared(item(1, hop=2))
    assert only(bench.hear(B, m.Abort(chunk)), a.Discard).migrations == (ONE,)
    assert list(bench.core.routes.routes.values()) == [route()]


def test_an_old_hop_is_not_imported() -> None:
    bench = Bench(started=e.Started(holdings=(holding(3, B, B),)))
    out = bench.stream(C, m.Reserve(BATCH, 0, (item(1, hop=3),), (Mode.NAT,)))
    assert sent(out, m.Reserved)[0][1].places[0].code is Code.ALREADY_MIGRATING  # type: ignore[union-attr]


def test_the_end_is_told_until_both_have_collected() -> None:
    bench = Bench(started=e.Started(holdings=(holding(2, C, B),)))
    bench.do(e.ConnectionsEnded((ONE, b"never heard of it")))
    told = [to for to, _unused in sent(bench.wait(1.0), m.Ended)]
    assert set(told) == {B, C}
    assert len(told) > 2
    assert bench.hear(B, m.Collected((m.Hop(ONE, 1),))) == []
    assert bench.hear(B, m.Collected((m.Hop(ONE, 2),))) == []
    assert only(bench.hear(C, m.Collected((m.Hop(ONE, 2),))), a.ForgetHoldings).holdings == ((ONE, 2),)
    assert bench.core.idle


def test_the_end_between_live_and_its_answer() -> None:
    bench = Bench()
    chunk = bench.to_prepared(item(1, home=B))
    bench.stream(B, m.Confirm(chunk, (0,)))
    bench.do(e.ConnectionsEnded((ONE,)))
    bench.do(e.ActivateDone(chunk, (None,)))
    assert sent(bench.wait(0.1), m.Ended) == [(B, m.Ended((m.Hop(ONE, 1),)))]


def test_home_collects_what_its_holder_says_has_ended() -> None:
    bench = Bench(started=e.Started(routes=(route(),)))
    assert only(bench.hear(B, m.Ended((m.Hop(ONE, 1),))), a.Collect).routes == (route(),)
    bench.hear(C, m.Ended((m.Hop(ONE, 2),)))  # to whom it went on, though it is not led there
    out = bench.do(e.CollectDone(((ONE, 1),)))
    assert dict(sent(out, m.Collected)) == {
        B: m.Collected((m.Hop(ONE, 1),)),
        C: m.Collected((m.Hop(ONE, 2),)),
    }
    assert sent(bench.hear(B, m.Ended((m.Hop(ONE, 1),))), m.Collected)  # again: it is not known


def test_waypoint_that_collects_passes_it_on() -> None:
    bench = Bench(started=e.Started(routes=(route(2, B, home=C, upstream=C),)), audit_interval_s=1000)
    only(bench.hear(B, m.Ended((m.Hop(ONE, 2),))), a.Collect)
    assert sent(bench.wait(0), m.Ended) == [(C, m.Ended((m.Hop(ONE, 1),)))]


def test_audit() -> None:
    bench = Bench(started=e.Started(routes=(route(),)), audit_interval_s=10)
    assert sent(bench.wait(35), m.Audit) == [(B, m.Audit((m.Hop(ONE, 1),)))] * 3
    assert bench.hear(C, m.Audited((m.Hop(ONE, 1),))) == []
    assert bench.hear(B, m.Audited((m.Hop(ONE, 7),))) == []
    only(bench.hear(B, m.Audited((m.Hop(ONE, 1),))), a.Collect)
    holder = Bench()
    holder.to_prepared(item(2), item(3), source=C)
    hops = tuple(m.Hop(bytes([number]) * 16, 1) for number in (1, 2, 3))
    assert sent(holder.hear(C, m.Audit(hops)), m.Audited) == [(C, m.Audited(hops[:1]))]


def test_large_audits_and_endings_are_paged_in_turn() -> None:
    routes = tuple(
        Route(bytes([n >> 8, n & 255]) * 8, ONE, Kind.CONNECTED, 1, ME, B, PLACE, None, None, None)
        for n in range(2000)
    )
    bench = Bench(started=e.Started(routes=routes), audit_interval_s=10)
    asked = [hop for _unused, audit in sent(bench.wait(35), m.Audit) for hop in audit.hops]
    assert len(set(asked)) == 2000


def test_calm_until_a_freeze_is_near() -> None:
    """From RESERVE to the decision, on both hosts: what then is repeated for ever does not disturb."""
    bench = Bench()
    assert bench.core.calm
    out = bench.export(item(1))
    assert bench.core.calm, "nobody has offered"
    out = bench.offer(B)
    assert not bench.core.calm
    freeze = bench.reserved(out)
    assert not bench.core.calm
    bench.do(e.FreezeDone(freeze.chunk, (b"image",)))
    assert not bench.core.calm
    bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(),)))
    assert not bench.core.calm
    bench.do(e.CommitDone(freeze.chunk, (None,)))
    assert bench.core.calm and not bench.core.idle, "B has not said ACTIVE"
    bench.wait(100_000)
    assert bench.core.calm and bench.core.awaited == {B}

    bench = Bench()
    bench.to_prepared(item(1, home=C))
    assert not bench.core.calm, "the decision is to be expected"
    bench.wait(60)
    assert bench.core.calm and not bench.core.idle, "B is dead"


def test_calm_though_a_host_is_dead() -> None:
    """For days: ENDED, REROUTE and CONFIRM to it are repeated, and nothing else is kept from its turn."""
    holding = Holding(ONE, ONE, Kind.CONNECTED, 1, C, B, PLACE, *[Endpoint(IPv4Address("192.0.2.1"), 80)] * 3)
    bench = Bench(started=e.Started(holdings=(holding,)))
    bench.do(e.ConnectionsEnded((ONE,)))
    assert sent(bench.wait(3600), m.Ended)
    assert bench.core.calm and not bench.core.idle and bench.core.awaited == {B, C}
    bench.do(e.Forget(B))
    assert bench.core.awaited == {C}
    assert only(bench.do(e.Forget(C)), a.ForgetHoldings).holdings == ((ONE, 1),)
    assert bench.core.idle and not bench.core.awaited


def test_forget_a_host() -> None:
    chunk = ChunkId(BATCH, 0)
    started = e.Started(
        (Decision(chunk, B, (ONE,), (0,)),),
        (route(2, B, home=C, upstream=C),),
        (Notice(ONE, 2, C, B, PLACE),),
    )
    bench = Bench(started=started)
    out = bench.do(e.Forget(B))
    assert results(out) == {ONE: (Outcome.LOST, Code.PEER_LOST)}
    only(out, a.Collect)
    bench.do(e.CollectDone(((ONE, 2),)))
    assert only(bench.do(e.Forget(C)), a.ForgetNotices).notices == ((ONE, 2),)
    assert bench.core.idle


# --- stopping ------------------------------------------------------------------------------


def test_stop_undoes_what_is_not_committed() -> None:
    bench = Bench()
    chunk = bench.to_shipped(item(1))
    out = bench.do(e.Stop())
    assert only(out, a.Thaw).chunk == chunk
    assert sent(out, m.Abort)
    assert results(out) == {ONE: (Outcome.REFUSED, Code.SHUTTING_DOWN)}
    only(out, a.Quiet)
    assert results(bench.export(item(2))) == {bytes([2]) * 16: (Outcome.REFUSED, Code.SHUTTING_DOWN)}
    assert bench.hear(B, request(Counts(0, 0, 1))) == []


def test_stop_finishes_what_is_committed() -> None:
    bench = Bench()
    chunk = bench.to_committing(item(1))
    assert not [one for one in bench.do(e.Stop(3.0)) if isinstance(one, a.Quiet)]
    bench.do(e.CommitDone(chunk, (None,)))
    only(bench.hear(B, m.Active(chunk)), a.Quiet)


def test_stop_does_not_wait_for_ever() -> None:
    bench = Bench()
    bench.to_prepared(item(1))
    assert not [one for one in bench.do(e.Stop(3.0)) if isinstance(one, a.Quiet)]
    only(bench.wait(3.0), a.Quiet)


def test_our_own_multicast_is_not_heard() -> None:
    assert Bench().hear(ME, request(Counts(0, 0, 1))) == []


# --- messages that cannot be written -------------------------------------------------------


def unwritable(bench: Bench, out: list[a.Action], kind: type[m.Message]) -> list[a.Action]:
    ((to, message),) = sent(out, kind)
    assert to is not None
    return bench.do(e.SendFailed(to, message, "too long"))  # type: ignore[arg-type]


def test_an_unwritable_ship_undoes_its_chunk() -> None:
    """Refused and thawed at once, not at the deadline; the next chunk goes on."""
    bench = Bench(chunk_items=1, pipeline_depth=1)
    freeze = bench.to_freezing(item(1), item(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (b"image",)))
    out = unwritable(bench, out, m.Ship)
    assert only(out, a.Thaw).migrations == (bytes([1]) * 16,)
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.INTERNAL)}
    assert sent(out, m.Abort) == [(B, m.Abort(freeze.chunk))]
    following = only(out, a.Freeze)
    assert [one.migration[0] for one in following.items] == [2]
    ship = m.Ship(freeze.chunk, (bytes([1]) * 16,), (PLACE,), (b"image",))
    assert bench.do(e.SendFailed(B, ship, "once more")) == []


def test_an_unwritable_reserve_refuses_its_page() -> None:
    bench = Bench(page_items=1, pages_in_flight=2)
    bench.export(item(1), item(2))
    bench.offer(B)
    out = bench.do(e.StreamOpened(B))
    first, second = sent(out, m.Reserve)
    out = bench.do(e.SendFailed(B, first[1], "a strange item"))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.INTERNAL)}
    only(bench.stream(B, m.Reserved(BATCH, second[1].page, (PLACE,))), a.Freeze)


def test_unwritable_answers_become_refusals() -> None:
    """And what was prepared is undone when its exporter has said so."""
    bench = Bench()
    out = bench.stream(B, m.Reserve(BATCH, 0, (item(1),), (Mode.NAT,)))
    out = bench.do(e.ReserveDone(BATCH, B, only(out, a.Reserve).page, (PLACE,)))
    out = unwritable(bench, out, m.Reserved)
    ((_unused, reserved),) = sent(out, m.Reserved)
    assert [one.code for one in reserved.places if isinstance(one, Refusal)] == [Code.INTERNAL]
    assert bench.do(e.SendFailed(B, reserved, "this too")) == []
    bench = Bench()
    chunk = bench.to_prepared(item(1))
    out = bench.do(e.SendFailed(B, m.Prepared(chunk, (Fidelity(["x" * 99]),)), "a long name"))
    ((_unused, prepared),) = sent(out, m.Prepared)
    assert [one.code for one in prepared.results if isinstance(one, Refusal)] == [Code.INTERNAL]
    assert sent(bench.wait(1.0), m.Query)
    only(bench.hear(B, m.Abort(chunk)), a.Discard)
    assert not bench.core.importer._chunks


def test_other_unwritable_messages_are_as_good_as_lost() -> None:
    bench = Bench()
    out = unwritable(bench, bench.export(item(1), target=C), m.Request)
    assert out == [] and sent(bench.wait(0.3), m.Request)


# --- how long offers are collected ---------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_nobody_waits_in_vain_for_offers(policy: type[Policy]) -> None:
    """All have offered, or only one was asked."""
    for targeted in (False, True):
        bench = Bench(offer_grace_s=1.0)
        bench.core.policy, bench.capacity.members = policy(), frozenset({B, C})
        bench.export(item(1), target=B if targeted else None)
        out = bench.offer(B, load=10)
        if not targeted:
            assert out == []
            out = bench.offer(C, load=20)
        assert only(out, a.OpenStream).host == B


def test_who_waits_comes_before_who_was_faster() -> None:
    """And then nobody waits for more."""
    bench = Bench(offer_grace_s=1.0)
    bench.capacity.members = frozenset({B, C, b"D" * 16})
    bench.export(item(1))
    assert bench.offer(B) == []
    assert only(bench.offer(C, waiting=1), a.OpenStream).host == C
    bench = Bench(offer_grace_s=1.0)
    bench.export(item(1))
    assert only(bench.offer(B, waiting=1), a.OpenStream).host == B


def test_without_grace_the_first_offer_is_taken() -> None:
    bench = Bench(offer_grace_s=0.0)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1))
    assert only(bench.offer(B), a.OpenStream).host == B


def test_an_offer_counts_though_the_time_is_over() -> None:
    """While better ones are waited for the batch's time ends: what is there is taken."""
    bench = Bench(offer_grace_s=10.0)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1), item(2))
    bench.wait(4.9)
    assert bench.offer(B, Counts(0, 0, 1)) == []
    out = bench.wait(0.2)
    assert only(out, a.OpenStream).host == B
    assert results(out) == {bytes([2]) * 16: (Outcome.REFUSED, Code.NO_OFFER)}


def test_who_has_failed_is_not_waited_for() -> None:
    bench = Bench(offer_grace_s=1.0, leg_failures_max=1)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1))
    bench.offer(B)
    out = bench.wait(1.1)
    assert only(out, a.OpenStream).host == B
    bench.do(e.StreamLost(B))
    assert only(bench.offer(C), a.OpenStream).host == C
