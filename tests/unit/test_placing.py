# SPDX-License-Identifier: MIT
"""A connection has one place at most: not where it exists already, unless that is in TIME-WAIT."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from sockmi.addresses import Endpoint
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
PRESERVED = Place(Endpoint(OURS, 80), Mode.FORWARD)


def item(number: int) -> Item:
    """An attempt to move the connection."""
    return Item(bytes([number]) * 16, bytes(16), Kind.CONNECTED, "", LOCAL, REMOTE, LOCAL, 1, bytes(16))


def placing(mode: Mode, state: str = "") -> Placing:
    """``state``: of what is here already."""
    return Placing(
        [mode],
        lambda _address: PATH,
        lambda _connection: bool(state),
        lambda _connection: state == "TIME-WAIT",
        lambda *_unused: None,
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


def test_another_attempt_has_its_place() -> None:
    it = placing(Mode.FORWARD)
    assert it.choose(item(1), [Mode.FORWARD]) == PRESERVED
    with pytest.raises(Refusal, match=r"since another attempt.*try again in some seconds") as told:
        it.choose(item(2), [Mode.FORWARD])
    assert told.value.code is Code.TUPLE_TAKEN
    it.forget(item(1).migration)
    assert it.choose(item(2), [Mode.FORWARD]) == PRESERVED
