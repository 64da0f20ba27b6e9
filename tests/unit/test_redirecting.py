# SPDX-License-Identifier: MIT
"""An ended connection is forgotten late: a newer one of the same tuple keeps its redirect; none is missed."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint, FourTuple
from sockmi.config import Config
from sockmi.engine.base import Kind
from sockmi.metrics import Metrics
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol.records import Holding, Place, Route
from sockmi.redirect.base import Inbound, Mode
from sockmi.redirecting import Redirecting
from sockmi.shell import inbound

LOCAL, REMOTE = Endpoint.parse("192.0.2.1:80"), Endpoint.parse("198.51.100.1:4000")
TUPLE = FourTuple(LOCAL, REMOTE)
PLACE = Place(LOCAL, Mode.FORWARD)
TIME_WAIT = 6
HOME, OLD, NEW = (letter * 16 for letter in (b"h", b"o", b"n"))


def holding(connection: bytes) -> Holding:
    return Holding(connection, connection, Kind.CONNECTED, 1, HOME, HOME, PLACE, LOCAL, REMOTE, LOCAL)


def route(connection: bytes) -> Route:
    return Route(connection, connection, Kind.CONNECTED, 1, HOME, HOME, PLACE, LOCAL, REMOTE, LOCAL)


class Host:
    """Redirecting, and what it does to the kernel; ``state``: of the one socket."""

    def __init__(self) -> None:
        self.evicted: list[Inbound] = []
        self.expired: list[FourTuple] = []
        self.events: list[e.Event] = []
        self.state: int | None = 1
        self.failing: dict[FourTuple, OSError] = {}
        self.questions = 0
        self.later: list[Callable[[], None]] = []
        redirect = SimpleNamespace(
            evict=self.evicted.extend, expire=lambda tuples, _unused: self.expired.extend(tuples)
        )
        loop = SimpleNamespace(call_later=lambda _unused, call, *args: self.later.append(lambda: call(*args)))
        shell: Any = SimpleNamespace(
            loop=loop,
            config=Config(),
            redirects={Mode.FORWARD: redirect},
            metrics=Metrics(),
            dispatch=self.events.append,
            note=lambda _unused: None,
            holds=SimpleNamespace(miss_listeners=lambda *_unused: None),
            journal=SimpleNamespace(write=lambda _unused: None),
        )
        self.shell = shell
        self.redirecting = Redirecting(shell, {}, {}, self._states, Counter, lambda _unused: False)

    def _states(self, connections: Sequence[FourTuple]) -> list[int | None]:
        self.questions += 1
        for one in connections:
            if one in self.failing:
                raise self.failing[one]
        return [self.state] * len(connections)

    def forget(self, connection: bytes) -> None:
        self.redirecting.forget_holdings(a.ForgetHoldings(((connection, 1),)))


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_holding_is_forgotten_alone(host: Host) -> None:
    host.redirecting.add_holdings([holding(OLD)])
    host.redirecting.add_holdings([holding(NEW)])
    facts: Any = SimpleNamespace(kind=Kind.CONNECTED, tuple=TUPLE)
    host.forget(OLD)
    assert not host.evicted, "the newer one is received with it"
    assert host.redirecting.holding_of(facts) == holding(NEW)
    host.state = None
    host.redirecting.look_at_all()
    assert host.events == [e.ConnectionsEnded((NEW,))]
    host.forget(NEW)
    assert host.evicted == [inbound(holding(NEW))]
    assert host.redirecting.holding_of(facts) is None


def test_in_any_order(host: Host) -> None:
    """After a restart nobody knows which is the newer one: both are looked at; the last takes it along."""
    host.redirecting.add_holdings([holding(NEW), holding(OLD)])
    host.state = None
    host.redirecting.look_at_all()
    assert {one for event in host.events for one in event.connections} == {OLD, NEW}  # type: ignore[union-attr]
    host.forget(NEW)
    assert not host.evicted
    host.forget(OLD)
    assert host.evicted == [inbound(holding(OLD))]


def test_one_that_has_left_again_stays_led_away(host: Host) -> None:
    host.redirecting.add_holdings([holding(OLD)])
    host.redirecting.add_holdings([holding(NEW)])
    host.redirecting.drop_holding(NEW)
    host.redirecting.add_routes([route(NEW)])
    host.forget(OLD)
    assert not host.evicted


def test_a_route_is_collected_alone(host: Host) -> None:
    host.redirecting.add_routes([route(OLD)])
    host.redirecting.add_routes([route(NEW)])
    host.redirecting.collect(a.Collect((route(OLD),)))
    assert not host.expired and host.redirecting.route_of(TUPLE) == route(NEW)
    host.redirecting.collect(a.Collect((route(NEW),)))
    assert host.expired == [TUPLE] and host.redirecting.route_of(TUPLE) is None


def test_what_its_peer_knows_of_a_translated_one(host: Host) -> None:
    """As errors about its packets come fast, and there may be thousands: looked up, not looked for."""
    first, second = (Endpoint.parse(f"192.0.2.{number}:4000") for number in (8, 9))

    def led(connection: bytes, to: Endpoint, hop: int = 1) -> Route:
        return replace(route(connection), hop=hop, place=Place(to, Mode.NAT))

    def known(to: Endpoint) -> Endpoint | None:
        return host.redirecting.known_as(FourTuple(REMOTE, to))

    redirect: Any = SimpleNamespace(reachable=lambda _unused: None, reroute=lambda _unused: None)
    host.shell.redirects[Mode.NAT] = redirect
    host.redirecting.add_routes([led(OLD, first), route(NEW)])
    assert known(first) == LOCAL and known(PLACE.endpoint or first) is None
    host.redirecting.reroute(a.Reroute((led(OLD, second, 2),)))
    assert known(first) is None and known(second) == LOCAL
    host.redirecting.add_routes([led(NEW, second)])  # of the same tuple, and later
    host.redirecting.drop_route(NEW)
    assert known(second) is None
    host.redirecting.save_routes(a.SaveRoutes((led(OLD, second, 2),)))
    assert known(second) == LOCAL
    host.redirecting.drop_route(OLD)
    assert known(second) is None


def test_a_route_is_collected_when_another_has_come(host: Host) -> None:
    host.redirecting.add_routes([route(OLD)])
    host.redirecting.add_holdings([replace(holding(NEW), place=PLACE)])
    host.redirecting.collect(a.Collect((route(OLD),)))
    assert not host.expired


def others(count: int) -> list[Holding]:
    """Connections of other clients."""
    return [
        replace(holding(bytes([at]) * 16), remote=Endpoint(REMOTE.address, 5000 + at)) for at in range(count)
    ]


def test_one_that_the_kernel_says_nothing_of_keeps_no_other_waiting(host: Host) -> None:
    many = others(5)
    host.redirecting.add_holdings(many)
    host.state = None
    mute = FourTuple(LOCAL, Endpoint(REMOTE.address, 5003))
    host.failing[mute] = OSError(errno.ENOMEM, "Cannot allocate memory")
    host.redirecting.look_at_all()
    (seen,) = host.events
    assert isinstance(seen, e.ConnectionsEnded)
    assert set(seen.connections) == {one.connection for one in many} - {many[3].connection}
    (again,) = host.later
    host.redirecting.look_at_all()
    assert len(host.later) == 1, "it is not looked at more often for having been asked about twice"
    host.events.clear()
    host.failing.clear()
    again()
    assert host.events == [e.ConnectionsEnded((many[3].connection,))]


def test_a_flood_of_syns_is_one_question(host: Host) -> None:
    """Whoever begins anew, as fast as he can, from ports of what has moved."""
    many = others(5)
    host.redirecting.add_holdings(many)
    host.state = TIME_WAIT
    for _turn in range(1000):
        for at in range(5):
            host.redirecting.begun_anew(FourTuple(LOCAL, Endpoint(REMOTE.address, 5000 + at)))
        host.redirecting.begun_anew(FourTuple(LOCAL, Endpoint(REMOTE.address, 4999)))
    (look,) = host.later
    look()
    assert host.questions == 1
    assert host.events == [e.ConnectionsEnded(tuple(one.connection for one in many))]


def test_lost_news_have_all_looked_at_once_in_a_while(host: Host) -> None:
    host.redirecting.add_holdings(others(5))
    host.state = None
    for _turn in range(1000):
        host.redirecting.news_lost()
    (look,) = host.later
    look()
    assert host.questions == 1 and len(host.events) == 1
    host.redirecting.news_lost()
    assert len(host.later) == 2


def test_a_kernel_that_does_not_answer_is_asked_once(host: Host) -> None:
    """Each question would keep the daemon from all else for as long."""
    many = others(5)
    host.redirecting.add_holdings(many)
    host.state = None
    host.failing[FourTuple(LOCAL, Endpoint(REMOTE.address, 5003))] = TimeoutError()
    host.redirecting.look_at_all()
    assert host.questions == 1 and not host.events
    host.failing.clear()
    (again,) = host.later
    again()
    assert host.events == [e.ConnectionsEnded(tuple(one.connection for one in many))]
