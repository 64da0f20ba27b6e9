# SPDX-License-Identifier: MIT
"""Redirects over hops: home leads to the present holder, waypoints keep nothing."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Kind
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.records import ChunkId, Decision, Holding, Notice, Route
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal
from tests.unit.core_bench import BATCH, ME, ONE, PLACE, B, Bench, C, item, only, results, sent


def route(hop: int = 1, holder: bytes = B, home: bytes = ME, **fields: Any) -> Route:
    one = item(1)
    ends = (one.local, one.remote, one.origin)
    return Route(one.connection, one.migration, one.kind, hop, home, holder, PLACE, *ends, **fields)


def holding(hop: int, home: bytes, exporter: bytes) -> Holding:
    one = item(1)
    ends = (one.local, one.remote, one.origin)
    return Holding(one.connection, one.migration, one.kind, hop, home, exporter, PLACE, *ends)


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
