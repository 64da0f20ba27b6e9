# SPDX-License-Identifier: MIT
"""Policies: who gets how much."""

from __future__ import annotations

from collections import Counter

import pytest

from sockmi.policy import POLICIES, Candidate, FirstValid, LeastLoaded, Share, Weighted
from sockmi.protocol.records import Counts

A, B, C = (bytes([letter]) * 16 for letter in b"ABC")
ROOM = Counts(10, 10, 10)


def candidate(
    host: bytes, rooms: Counts = ROOM, waiting: int = 0, load: int = 0, weight: int = 1
) -> Candidate:
    return Candidate(host, rooms, Counts(0, 0, waiting), load, weight)


def test_names() -> None:
    assert {name: cls.name for name, cls in POLICIES.items()} == {
        "first": "first", "least-loaded": "least-loaded", "weighted": "weighted",
    }  # fmt: skip


@pytest.mark.parametrize("policy", [cls() for cls in POLICIES.values()], ids=list(POLICIES))
def test_no_one_gets_more_than_there_is(policy: FirstValid) -> None:
    wanted = Counts(1, 0, 25)
    offers = [candidate(A, Counts(0, 5, 10)), candidate(B, Counts(1, 0, 7)), candidate(C, Counts(0, 0, 0))]
    shares = policy.assign(wanted, offers)
    rooms = {one.host: one.rooms for one in offers}
    assert all(
        got <= room for share in shares for got, room in zip(share.counts, rooms[share.host], strict=True)
    )
    assert [sum(column) for column in zip(*(share.counts for share in shares), strict=True)] == [1, 0, 17]
    assert policy.assign(wanted, []) == []


def test_first_valid_prefers_a_waiting_importer() -> None:
    policy = FirstValid()
    assert policy.assign(Counts(0, 0, 1), [candidate(A), candidate(B)]) == [Share(A, Counts(0, 0, 1))]
    assert policy.assign(Counts(0, 0, 1), [candidate(A), candidate(B, waiting=1)]) == [
        Share(B, Counts(0, 0, 1))
    ]
    big = policy.assign(Counts(0, 0, 12), [candidate(A), candidate(B, waiting=1)])
    assert big == [Share(B, Counts(0, 0, 10)), Share(A, Counts(0, 0, 2))]


def test_least_loaded() -> None:
    offers = [candidate(A, load=500), candidate(B, load=20), candidate(C, load=20, waiting=3)]
    assert [one.host for one in LeastLoaded().order(offers)] == [C, B, A]


def shares(wanted: int, *offers: Candidate) -> dict[bytes, int]:
    return {host: counts.connected for host, counts in LeastLoaded().assign(Counts(0, 0, wanted), offers)}


def test_least_loaded_levels_the_loads() -> None:
    """One batch is not for the first host alone."""
    room = Counts(0, 0, 1000)
    assert shares(300, *(candidate(host, room) for host in (A, B, C))) == {A: 100, B: 100, C: 100}
    half = candidate(A, Counts(0, 0, 500), load=500)
    assert shares(400, half, candidate(B, room)) == {B: 400}
    divided = shares(700, half, candidate(B, room))
    assert divided[A] + divided[B] == 700 and abs(divided[A] - 100) <= 1
    assert shares(9, *(candidate(host, Counts(0, 0, 2), load=1000) for host in (A, B))) == {A: 2, B: 2}
    assert shares(2, candidate(A, room), candidate(B, room, waiting=1)) == {A: 1, B: 1}
    assert shares(1, candidate(A, room), candidate(B, room, waiting=1)) == {B: 1}


def test_weights_hold_over_many_small_batches_and_in_one_large() -> None:
    offers = [candidate(A, weight=3), candidate(B, weight=1), candidate(C, weight=0)]
    policy, got = Weighted(), Counter[bytes]()
    for _turn in range(400):
        for host, counts in policy.assign(Counts(0, 0, 1), offers):
            got[host] += counts.total
    assert got == {A: 300, B: 100}
    large = [candidate(one.host, Counts(0, 0, 1000), weight=one.weight) for one in offers]
    assert dict(Weighted().assign(Counts(0, 0, 400), large)) == {A: Counts(0, 0, 300), B: Counts(0, 0, 100)}


def test_weight_0_gets_only_the_rest() -> None:
    offers = [candidate(A, weight=0), candidate(B, Counts(0, 0, 4))]
    assert dict(Weighted().assign(Counts(0, 0, 6), offers)) == {A: Counts(0, 0, 2), B: Counts(0, 0, 4)}
    assert dict(Weighted().assign(Counts(0, 0, 2), offers[:1])) == {A: Counts(0, 0, 2)}


def test_weights_hold_for_what_cannot_be_divided() -> None:
    offers = [candidate(A, weight=3), candidate(B, weight=1), candidate(C, weight=0)]
    policy, got = Weighted(), Counter[bytes]()
    for _turn in range(40):
        got[policy.choose(Counts(0, 0, 5), offers)] += 5
    assert got == {A: 150, B: 50}
    assert policy.choose(Counts(0, 0, 1), [candidate(C, weight=0)]) == C
