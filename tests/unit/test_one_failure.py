# SPDX-License-Identifier: MIT
"""What fails for one socket is refused for that one; the others and the daemon go on."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint
from sockmi.config import Config
from sockmi.engine.base import Kind, Needs, Placement
from sockmi.engine.trial import obstacle
from sockmi.importing import Importing
from sockmi.placing import Placing
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol.context import Capacity
from sockmi.protocol.records import Item, Place, Route
from sockmi.redirect.base import Mode
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal

ERRORS = [OSError(errno.EMFILE, "Too many open files"), AssertionError("a bug")]
HOME, BATCH = b"h" * 16, b"b" * 16


def bound(number: int) -> Item:
    name = bytes([number]) * 16
    local = Endpoint(IPv4Address("192.0.2.1"), 8000 + number)
    return Item(name, name, Kind.BOUND, "CLOSED", local, None, local, 1, HOME)


def told(**parts: Any) -> tuple[Any, list[e.Event]]:
    """A shell that keeps what it dispatches."""
    events: list[e.Event] = []
    return SimpleNamespace(config=Config(), dispatch=events.append, **parts), events


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_place_that_cannot_be_tried_is_refused_alone(error: Exception) -> None:
    def trying(_: Needs, __: str, placement: Placement, ___: Endpoint | None) -> Refusal | None:
        assert placement.local
        if placement.local.port == 8001:
            raise error
        return None

    shell, events = told()
    placing = Placing([Mode.NAT], lambda _: None, lambda _: False, trying)
    importing = Importing(shell, placing, Capacity(), None)  # type: ignore[arg-type]
    importing.reserve(a.Reserve(BATCH, HOME, 1, (bound(1), bound(2)), (Mode.NAT,), (None, None)))
    [done] = events
    assert isinstance(done, e.ReserveDone)
    refused, good = done.places
    assert isinstance(refused, Refusal) and refused.code is Code.INTERNAL and str(error) in refused.message
    assert good == Place()
    again: Sequence[Place] = [placing.choose(bound(3), [Mode.NAT])]
    assert again == [Place()]
    assert not placing._ports.taken(bound(1)), "its port is not kept"


def test_nothing_is_tried_without_a_local_end() -> None:
    remote = Endpoint(IPv4Address("198.51.100.1"), 80)
    assert obstacle(Needs(), "SYN-SENT", Placement(None, False), remote) is None


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_reroute_that_fails_is_refused(error: Exception) -> None:
    def reachable(_: object) -> str | None:
        raise error

    ends = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), 4000)
    place = Place(Endpoint(IPv4Address("192.0.2.3"), 4000), Mode.NAT)
    route = Route(b"c" * 16, b"m" * 16, Kind.CONNECTED, 2, HOME, b"x" * 16, place, *ends, ends[0])
    shell, events = told(redirects={Mode.NAT: SimpleNamespace(reachable=reachable)})
    redirecting = Redirecting(shell, {route.connection: route}, {}, lambda _: None, lambda _: False)
    redirecting.reroute(a.Reroute((route,)))
    [done] = events
    assert isinstance(done, e.RerouteDone)
    [(_, hop, refusal)] = done.results
    assert hop == 2 and refusal is not None and refusal.code is Code.REDIRECT
