# SPDX-License-Identifier: MIT
"""A connection has one place at most: not where it exists already, unless that is in TIME-WAIT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Kind
from sockmi.placing import Placing
from sockmi.protocol.records import Item, Place
from sockmi.redirect.base import Mode
from sockmi.redirect.routes import ARPHRD_ETHER, RTN_UNICAST
from sockmi.redirect.ways import Way
from sockmi.refusal import Code, Refusal

OURS = IPv4Address("192.0.2.2")
LOCAL, REMOTE = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("192.0.2.3"), 4000)
PATH = Way(RTN_UNICAST, "eth0", ARPHRD_ETHER, None, OURS, 1500)
NOWHERE: Any = SimpleNamespace(here=lambda _addresses: (), neighbour_by=lambda _address: None)  # near
PRESERVED = Place(Endpoint(OURS, 80), Mode.FORWARD)


def item(number: int) -> Item:
    """An attempt to move the connection."""
    return Item(bytes([number]) * 16, bytes(16), Kind.CONNECTED, "", LOCAL, REMOTE, LOCAL, 1, bytes(16))


def placing(mode: Mode, state: str = "", *, led: bool = True, peers: Any = NOWHERE) -> Placing:
    """``state``: of what is here already. ``led``: whether the redirects know the device."""
    return Placing(
        [mode],
        lambda _address: PATH,
        lambda connections: [1 if state else None] * len(connections),
        lambda _connection: state == "TIME-WAIT",
        lambda *_unused: None,
        is_led=lambda device: led and device != "inside",
        peers=peers,
    )


def test_it_exists_here() -> None:
    with pytest.raises(Refusal, match=r"exists at the importer already; close it there first") as told:
        placing(Mode.FORWARD, "ESTABLISHED").choose(item(1), [Mode.FORWARD])
    assert told.value.code is Code.TUPLE_TAKEN


def test_one_in_time_wait_is_over() -> None:
    assert placing(Mode.FORWARD, "TIME-WAIT").choose(item(1), [Mode.FORWARD]) == PRESERVED


def test_a_translated_one_leaves_alone_what_is_in_time_wait() -> None:
    """Its peer may not have gone on to another: it knows another name. There are other ports."""
    with pytest.raises(Refusal) as told:
        placing(Mode.NAT, "TIME-WAIT").choose(item(1), [Mode.NAT])
    assert told.value.code is Code.PORT_TAKEN


@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.TAKEOVER])
def test_a_device_that_has_no_redirects_yet(mode: Mode) -> None:
    """What would be led here by it would not be delivered."""
    with pytest.raises(Refusal, match="No redirect of") as told:
        placing(mode, led=False).choose(item(1), [mode])
    assert told.value.code is Code.NO_REDIRECT
    with pytest.raises(Refusal, match="The connection was at"):
        placing(mode, led=False).choose(item(1), [mode], LOCAL)
    assert placing(Mode.NAT, led=False).choose(item(1), [Mode.NAT]).mode is Mode.NAT


def test_another_attempt_has_its_place() -> None:
    it = placing(Mode.FORWARD)
    assert it.choose(item(1), [Mode.FORWARD]) == PRESERVED
    with pytest.raises(Refusal, match=r"since another attempt.*try again in some seconds") as told:
        it.choose(item(2), [Mode.FORWARD])
    assert told.value.code is Code.TUPLE_TAKEN
    it.forget(item(1).migration)
    assert it.choose(item(2), [Mode.FORWARD]) == PRESERVED


def test_many_are_asked_about_at_once() -> None:
    """And what is not asked about then, or is asked later, is asked about by itself."""
    asked: list[list[FourTuple]] = []

    def states(connections: Sequence[FourTuple]) -> list[int | None]:
        asked.append(list(connections))
        return [None] * len(connections)

    it = Placing(
        [Mode.FORWARD],
        lambda _address: PATH,
        states,
        lambda _one: False,
        lambda *_unused: None,
        is_led=lambda _device: True,
        peers=NOWHERE,
    )
    items = [replace(item(number), remote=replace(REMOTE, port=4000 + number)) for number in range(1, 4)]
    with it.asked_at_once(items, [Mode.FORWARD]):
        for one in items:
            it.choose(one, [Mode.FORWARD])
    assert asked == [[FourTuple(LOCAL, one.remote) for one in items if one.remote]]
    it.forget(items[0].migration)
    it.choose(items[0], [Mode.FORWARD])
    assert len(asked) == 2, "what was absent then may be here now"


def test_one_that_is_here_is_found_among_many() -> None:
    it = placing(Mode.FORWARD, "ESTABLISHED")
    with it.asked_at_once([item(1)], [Mode.FORWARD]), pytest.raises(Refusal, match="exists at the importer"):
        it.choose(item(1), [Mode.FORWARD])


def test_a_peer_here_is_served_by_takeover_alone() -> None:
    """Over IPv4."""
    here: Any = SimpleNamespace(here=lambda addresses: addresses, neighbour_by=lambda _address: None)
    with pytest.raises(Refusal, match=r"is the importer itself, and over IPv4 .* by forward, nat; ") as told:
        placing(Mode.FORWARD, peers=here).choose(item(1), [Mode.FORWARD, Mode.NAT])
    assert told.value.code is Code.NO_REDIRECT
    place = placing(Mode.TAKEOVER, peers=here).choose(item(1), [Mode.FORWARD, Mode.TAKEOVER])
    assert place.mode is Mode.TAKEOVER


def test_forward_does_not_serve_who_is_behind_this_host() -> None:
    """By a device at which no redirects are made."""
    behind: Any = SimpleNamespace(here=lambda _addresses: (), neighbour_by=lambda _address: "inside")
    with pytest.raises(Refusal, match="allow nat") as told:
        placing(Mode.FORWARD, peers=behind).choose(item(1), [Mode.FORWARD])
    assert told.value.code is Code.NO_REDIRECT
    assert placing(Mode.NAT, peers=behind).choose(item(1), [Mode.NAT]).mode is Mode.NAT
