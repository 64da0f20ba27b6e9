# SPDX-License-Identifier: MIT
"""The exporter's core: each path through a batch, and whose turn it is when."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from sockmi.engine.base import Fidelity, Kind, Needs
from sockmi.policy import LeastLoaded, Weighted
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.context import Capacity, Settings
from sockmi.protocol.core import Core
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import ChunkId, Counts, Decision, Item, Place
from sockmi.protocol.tables import UndeclaredTransition
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal
from tests.unit.core_bench import BATCH, ME, PLACE, B, Bench, C, item, names, only, reported, results, sent


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
