# SPDX-License-Identifier: MIT
"""The wire: every message there and back, and no bytes that do harm."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Fidelity, Kind, Needs
from sockmi.protocol import messages as m
from sockmi.protocol.codec import DATAGRAM_BYTES_MAX, LAYOUT, TYPES, VERSION, decode, encode
from sockmi.protocol.fields import TEXT_BYTES_MAX, CodecError
from sockmi.protocol.messages import STREAM_ONLY
from sockmi.protocol.records import ChunkId, Counts, Item, Place
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

IDS = st.binary(min_size=16, max_size=16).filter(any)
U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
ADDRESSES = st.one_of(st.integers(0, 2**32 - 1).map(IPv4Address), st.integers(0, 2**128 - 1).map(IPv6Address))
ENDPOINTS = st.none() | st.builds(Endpoint, ADDRESSES, U16)
MODES = st.lists(st.sampled_from(Mode), unique=True).map(tuple)
COUNTS = st.builds(Counts, U32, U32, U32)
NEEDS = st.builds(
    Needs, st.integers(0, 14), st.booleans(), U64, st.integers(0, 15).map(BindFlag), st.booleans()
)
PLACES = st.builds(Place, ENDPOINTS, st.none() | st.sampled_from(Mode))
TEXTS = st.text(max_size=100)
REFUSALS = st.builds(Refusal, st.sampled_from(Code), TEXTS)
NAMES = st.lists(st.text(max_size=12), max_size=4)
FIDELITIES = st.builds(Fidelity, NAMES, NAMES, NAMES)
CHUNKS = st.builds(ChunkId, IDS, U32)
ITEM = {
    "migration": IDS, "connection": IDS, "hop": st.integers(1, 2**32 - 1), "home": IDS, "needs": NEEDS,
    "size_bytes": U64, "listener": st.none() | IDS, "handle": st.none(),
}  # fmt: skip


def ends(version: type[IPv4Address | IPv6Address]) -> st.SearchStrategy[Endpoint]:
    """Of this IP version, with a port."""
    addresses = st.integers(0, 2 ** (32 if version is IPv4Address else 128) - 1).map(version)
    return st.builds(Endpoint, addresses, st.integers(1, 0xFFFF))


def unconnected(kind: Kind, state: str, local: st.SearchStrategy[Endpoint | None]) -> st.SearchStrategy[Item]:
    """Without a remote end; the peer knows it by its own name."""
    return local.flatmap(
        lambda one: st.builds(
            Item, kind=st.just(kind), state=st.just(state), local=st.just(one), remote=st.none(),
            origin=st.just(one), **ITEM,
        )
    )  # fmt: skip


def connected(version: type[IPv4Address | IPv6Address]) -> st.SearchStrategy[Item]:
    """All three ends of one IP version."""
    return st.builds(
        Item, kind=st.just(Kind.CONNECTED), state=st.sampled_from(["ESTABLISHED", "FIN-WAIT-1"]),
        local=ends(version), remote=ends(version), origin=ends(version), **ITEM,
    )  # fmt: skip


ITEMS = st.one_of(
    unconnected(Kind.BOUND, "CLOSED", ENDPOINTS),
    unconnected(Kind.LISTENING, "LISTEN", ends(IPv4Address) | ends(IPv6Address)),
    connected(IPv4Address),
    connected(IPv6Address),
)
HOPS = st.lists(st.builds(m.Hop, IDS, U32), max_size=48).map(tuple)


def many(one: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    return st.lists(one, max_size=most).map(tuple)


STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    m.Request: st.builds(m.Request, IDS, COUNTS, NEEDS, U64, MODES, st.none() | IDS, st.none() | ADDRESSES),
    m.Offer: st.builds(m.Offer, IDS, COUNTS, COUNTS, U16, U16, MODES, U32),
    m.Release: st.builds(m.Release, IDS, many(IDS, 60)),
    m.Reserve: st.builds(m.Reserve, IDS, U32, many(ITEMS, 4), MODES),
    m.Reserved: st.builds(m.Reserved, IDS, U32, many(PLACES | REFUSALS, 6)),
    m.Ship: st.builds(m.Ship, CHUNKS, many(IDS, 5), many(PLACES, 5), many(st.binary(max_size=50), 5)),
    m.Prepared: st.builds(m.Prepared, CHUNKS, many(FIDELITIES | REFUSALS, 6)),
    m.Confirm: st.builds(m.Confirm, CHUNKS, st.sets(st.integers(0, 255)).map(lambda s: tuple(sorted(s)))),
    m.Active: st.builds(m.Active, CHUNKS, many(st.tuples(U16, st.sampled_from(Code)), 256)),
    m.Abort: st.builds(m.Abort, CHUNKS),
    m.Query: st.builds(m.Query, CHUNKS),
    m.Undecided: st.builds(m.Undecided, CHUNKS),
    m.Reroute: st.builds(m.Reroute, many(st.builds(m.Move, IDS, U32, IDS, PLACES), 16)),
    m.Rerouted: st.builds(
        m.Rerouted, many(st.tuples(st.builds(m.Hop, IDS, U32), st.sampled_from(m.Verdict)), 48)
    ),
    m.Ended: st.builds(m.Ended, HOPS),
    m.Collected: st.builds(m.Collected, HOPS),
    m.Audit: st.builds(m.Audit, HOPS),
    m.Audited: st.builds(m.Audited, HOPS),
}
ANY = st.one_of(*STRATEGIES.values())


def test_every_message_has_a_layout() -> None:
    assert set(LAYOUT) == set(STRATEGIES) == set(m.Message.__args__)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_there_and_back(kind: type, data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[kind])
    octets = encode(message)
    assert octets[:2] == bytes((VERSION, TYPES.index(kind)))
    assert decode(octets) == message
    if kind not in STREAM_ONLY:
        assert len(octets) < DATAGRAM_BYTES_MAX


@settings(max_examples=400, deadline=None)
@given(message=ANY, data=st.data())
def test_garbled_bytes_are_refused_or_another_message(message: m.Message, data: st.DataObject) -> None:
    """Never anything but CodecError; what is accepted is written back to the same bytes."""
    octets = bytearray(encode(message))
    for _turn in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    octets = octets[: data.draw(st.integers(len(octets) - 2, len(octets)))]
    try:
        other = decode(bytes(octets))
    except CodecError:
        return
    assert decode(encode(other)) == other


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=200).map(lambda tail: bytes((VERSION, tail[0] % len(TYPES) if tail else 0)) + tail[1:])
)
def test_random_bytes(octets: bytes) -> None:
    with suppress(CodecError):
        decode(octets)


@given(ANY)
@settings(max_examples=100, deadline=None)
def test_every_truncation_and_extension_is_refused(message: m.Message) -> None:
    octets = encode(message)
    for end in (0, 1, 2, len(octets) // 2, len(octets) - 1):
        if end < len(octets):
            with pytest.raises(CodecError):
                decode(octets[:end])
    with pytest.raises(CodecError, match="too many"):
        decode(octets + b"\0")


def test_sizes_are_checked_before_contents() -> None:
    """A count of what is not there allocates nothing."""
    ship = (
        bytes((VERSION, TYPES.index(m.Ship))) + bytes(20) + b"\0\0" + b"\0\0" + b"\0\1" + b"\xff\xff\xff\xff"
    )
    with pytest.raises(CodecError, match="longer than the message"):
        decode(ship)
    reserve = bytes((VERSION, TYPES.index(m.Reserve))) + bytes(20) + b"\xff\xff"
    with pytest.raises(CodecError, match="entries"):
        decode(reserve)
    with pytest.raises(CodecError, match="at most"):
        decode(bytes((VERSION, TYPES.index(m.Ended))) + bytes(DATAGRAM_BYTES_MAX))


def test_other_versions_and_types_are_named() -> None:
    with pytest.raises(CodecError, match="version 9"):
        decode(bytes((9, 0)))
    with pytest.raises(CodecError, match="type 250"):
        decode(bytes((VERSION, 250)))


def test_long_texts_are_cut_not_refused() -> None:
    message = m.Reserved(bytes(16), 0, (Refusal(Code.RESTORE, "ü" * TEXT_BYTES_MAX),))
    (refusal,) = decode(encode(message)).places  # type: ignore[union-attr]
    assert isinstance(refusal, Refusal)
    assert refusal.message == "ü" * (TEXT_BYTES_MAX // 2)


@pytest.mark.parametrize(
    "message",
    [
        m.Abort(ChunkId(b"short", 1)),
        m.Abort(ChunkId(bytes(16), 1 << 32)),
        m.Confirm(ChunkId(bytes(16), 1), (256,)),
        m.Release(bytes(16), (bytes(16),) * 61),
        m.Ended((m.Hop(bytes(16), 1),) * 49),
        m.Offer(bytes(16), Counts(), Counts(), 1 << 16, 0, (), 0),
    ],
)
def test_what_does_not_fit_is_not_written(message: m.Message) -> None:
    with pytest.raises(CodecError):
        encode(message)


HERE, THERE = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), 4000)
V6 = Endpoint(IPv6Address("2001:db8::1"), 80)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": Kind.BOUND, "state": "SYN-SENT", "local": None, "origin": None},
        {"kind": Kind.BOUND, "state": "CLOSED"},
        {"kind": Kind.BOUND, "state": "LISTEN", "remote": None},
        {"kind": Kind.LISTENING, "state": "LISTEN"},
        {"kind": Kind.LISTENING, "state": "ESTABLISHED", "remote": None},
        {"kind": Kind.LISTENING, "state": "LISTEN", "remote": None, "local": None, "origin": None},
        {"kind": Kind.LISTENING, "state": "LISTEN", "remote": None, "local": Endpoint(HERE.address, 0)},
        {"local": None},
        {"remote": None},
        {"origin": None},
        {"local": None, "remote": None, "origin": None},
        {"remote": V6},
        {"origin": V6},
        {"remote": Endpoint(THERE.address, 0)},
        {"state": "LISTEN"},
        {"state": "TIME-WAIT"},
        {"state": "NOWHERE"},
    ],
    ids=str,
)
def test_what_cannot_be_is_no_item(wrong: dict[str, Any]) -> None:
    base: dict[str, Any] = {
        "migration": b"m" * 16, "connection": b"c" * 16, "kind": Kind.CONNECTED, "state": "ESTABLISHED",
        "local": HERE, "remote": THERE, "origin": HERE, "hop": 1, "home": b"h" * 16,
    }  # fmt: skip
    good = m.Reserve(b"b" * 16, 0, (Item(**base),), (Mode.NAT,))
    assert decode(encode(good)) == good
    with pytest.raises(CodecError, match="RESERVE: "):
        decode(encode(m.Reserve(b"b" * 16, 0, (Item(**(base | wrong)),), (Mode.NAT,))))
