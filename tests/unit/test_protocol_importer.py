# SPDX-License-Identifier: MIT
"""The importer's core: what is offered, kept under a lease, and in doubt."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Needs
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.context import Capacity
from sockmi.protocol.records import Arrival, ChunkId, Counts, Place, PreparedChunk
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal
from tests.unit.core_bench import BATCH, ME, PLACE, ROOMY, B, Bench, C, item, only, request, sent


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
