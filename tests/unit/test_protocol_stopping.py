# SPDX-License-Identifier: MIT
"""A core that stops, and messages that cannot be written."""

from __future__ import annotations

from sockmi.engine.base import Fidelity
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.records import Counts
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal
from tests.unit.core_bench import BATCH, ME, ONE, PLACE, B, Bench, C, item, only, request, results, sent


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
