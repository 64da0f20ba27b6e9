# SPDX-License-Identifier: MIT
"""The waiting room: room, matching, preference, permission, cancelling."""

from __future__ import annotations

from ipaddress import ip_address
from uuid import UUID, uuid4

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.import_lists import Candidate, Criteria, ImportLists, Waiting

ANY = Criteria(frozenset(Kind))


def lists(maximum: int = 2) -> ImportLists:
    return ImportLists(dict.fromkeys(Kind, maximum))


def candidate(
    kind: Kind = Kind.CONNECTED, *, uid: int = 0, local: str = "192.0.2.1:80", listener: UUID | None = None
) -> Candidate:
    remote = Endpoint.parse("192.0.2.9:4000") if kind is Kind.CONNECTED else None
    return Candidate(uuid4(), kind, Endpoint.parse(local), remote, uid, listener)


def test_a_full_list_has_no_room_and_each_list_counts_alone() -> None:
    room = lists(2)
    first, second = candidate(), candidate()
    assert room.reserve(first.migration_id, Kind.CONNECTED)
    assert room.reserve(first.migration_id, Kind.CONNECTED), "repeating takes no second place"
    room.put(second)
    assert not room.reserve(uuid4(), Kind.CONNECTED)
    assert room.reserve(uuid4(), Kind.LISTENING)
    room.unreserve(first.migration_id)
    assert room.room(Kind.CONNECTED) == 1
    assert room.remove(second.migration_id) == second
    assert room.remove(second.migration_id) is None
    assert room.counts()[Kind.CONNECTED] == 0


def test_a_request_that_prefers_the_kind_goes_first() -> None:
    room = lists()
    plain = Waiting("one", 0, ANY, 0)
    fond = Waiting("two", 0, Criteria(frozenset(Kind), preferred=frozenset({Kind.LISTENING})), 0)
    room.wait([plain, fond])
    came = candidate(Kind.LISTENING)
    assert room.waiting_for(Kind.LISTENING) == 2
    assert room.claim(came) is fond
    assert room.claimed(came.migration_id) is fond
    assert room.claim(candidate(Kind.LISTENING)) is plain
    assert room.claim(candidate(Kind.LISTENING)) is None
    room.unreserve(came.migration_id)
    assert room.waiting() == 1, "a migration that failed frees its request"


def test_take_gives_the_preferred_kind_then_the_oldest() -> None:
    room = lists(5)
    old, young, listener = candidate(), candidate(), candidate(Kind.LISTENING)
    for one in (old, young, listener):
        room.put(one)
    fond = Waiting("x", 0, Criteria(frozenset(Kind), preferred=frozenset({Kind.LISTENING})), 0)
    assert room.take(fond) == listener
    assert room.take(Waiting("y", 0, ANY, 0)) == old
    assert room.take(Waiting("z", 0, ANY, 0)) == young, "a claimed socket is not given twice"


@pytest.mark.parametrize(
    ("criteria", "fits"),
    [
        (ANY, True),
        (Criteria(frozenset({Kind.BOUND})), False),
        (Criteria(frozenset(Kind), local_port=80), True),
        (Criteria(frozenset(Kind), local_port=81), False),
        (Criteria(frozenset(Kind), remote_address=ip_address("192.0.2.9")), True),
        (Criteria(frozenset(Kind), remote_address=ip_address("192.0.2.8")), False),
        (Criteria(frozenset(Kind), remote_port=4001), False),
        (Criteria(frozenset(Kind), listener=uuid4()), False),
    ],
)
def test_criteria(criteria: Criteria, fits: bool) -> None:
    assert criteria.match(candidate()) is fits


def test_only_the_owner_or_root_takes_a_socket() -> None:
    room = lists()
    room.wait([Waiting("stranger", 0, ANY, 1001)])
    assert room.claim(candidate(uid=1000)) is None
    assert not room.waits_for(candidate(uid=1000))
    owner = Waiting("owner", 0, ANY, 1000)
    room.wait([owner])
    assert room.claim(candidate(uid=1000)) is owner
    root = Waiting("root", 0, ANY, 0)
    room.wait([root])
    assert room.claim(candidate(uid=1000)) is root


def test_cancelled_requests_get_nothing() -> None:
    room = lists()
    room.wait([Waiting("gone", 0, ANY, 0), Waiting("gone", 1, ANY, 0)])
    came = candidate()
    assert room.claim(came) is not None
    room.cancel("gone")
    assert room.claimed(came.migration_id) is None
    assert room.claim(candidate()) is None
    assert room.waiting() == 0


def test_what_is_being_moved_on_stays_listed_and_is_nobodys() -> None:
    """And in its place when it comes back."""
    room = lists()
    first, second = candidate(), candidate()
    room.put(first)
    room.put(second)
    room.lend(first.migration_id)
    assert list(room.listed()) == [first, second]
    assert room.is_listed(first.migration_id) and not room.is_free(first.migration_id)
    assert room.room(Kind.CONNECTED) == 0
    assert room.take(Waiting("one", 0, ANY, 0)) == second
    assert room.take(Waiting("two", 0, ANY, 0)) is None
    room.give_back(first.migration_id)
    assert list(room.listed()) == [first, second]
    assert room.take(Waiting("three", 0, ANY, 0)) == first
    room.lend(first.migration_id)
    room.remove(first.migration_id)
    assert not room.is_lent(first.migration_id) and not room.is_listed(first.migration_id)


def test_one_user_costs_another_nothing() -> None:
    """Thousands of requests for what nobody sends, thousands of looks at what is not to be had."""
    room = lists(5000)
    for number in range(1, 5000):
        room.put(candidate(uid=1000, local=f"192.0.2.1:{number}"))
    looked = 0

    class Hostile(Waiting):
        def accepts(self, candidate: Candidate) -> bool:
            nonlocal looked
            looked += 1
            return super().accepts(candidate)

    hostile = [
        Hostile("he", number, Criteria(frozenset(Kind), local_port=1 + number), 2000)
        for number in range(4096)
    ]
    assert [room.take(one) for one in hostile] == [None] * 4096
    room.wait(hostile)
    assert room.waiting() == room.waiting_for(Kind.BOUND) == room.waiting_of(2000) == 4096
    assert room.waiting_of(1000) == 0
    mine = Waiting("me", 0, ANY, 1000)
    room.wait([mine])
    assert room.claim(candidate(uid=1000)) is mine
    assert looked == 0
    room.cancel("he")
    room.cancel("me")
    assert room.waiting() == room.waiting_for(Kind.BOUND) == 0


def test_who_waits_longest_is_served_first() -> None:
    room = lists()
    waiting = [Waiting(str(uid), 0, ANY, uid) for uid in (0, 1000, 0, 1000)]
    room.wait(waiting)
    assert [room.claim(candidate(uid=1000)) for _turn in waiting] == waiting
