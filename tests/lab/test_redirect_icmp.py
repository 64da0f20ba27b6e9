# SPDX-License-Identifier: MIT
"""ICMP errors as bytes: parsed, carried, rebuilt; no input does harm."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.icmp import IcmpError, build, checksum, parse

PORT = st.integers(0, 0xFFFF)
WORD = st.integers(0, 0xFFFFFFFF)


@st.composite
def errors(draw: st.DrawFn) -> IcmpError:
    version = draw(st.sampled_from([4, 6]))
    address: st.SearchStrategy[IPv4Address | IPv6Address]
    address = st.ip_addresses(v=4) if version == 4 else st.ip_addresses(v=6)
    kind = draw(st.sampled_from([3, 11, 12] if version == 4 else [1, 2, 3, 4]))
    code = draw(st.integers(0, 15))
    info = draw(st.integers(0, 0xFFFF) if (version, kind, code) == (4, 3, 4) else WORD)
    ends = FourTuple(Endpoint(draw(address), draw(PORT)), Endpoint(draw(address), draw(PORT)))
    return IcmpError(kind, code, info, draw(address), ends, draw(WORD))


def body(packet: bytes, version: int) -> bytes:
    return packet[20:] if version == 4 else packet[40:]


@given(errors())
def test_what_is_built_is_parsed(error: IcmpError) -> None:
    assert parse(body(build(error), error.version), error.reporter) == error


@given(errors())
def test_checksums(error: IcmpError) -> None:
    packet = build(error)
    message = body(packet, error.version)
    if error.version == 4:
        assert checksum(packet[:20]) == 0 and checksum(message) == 0
    else:
        pseudo = packet[8:40] + len(message).to_bytes(4, "big") + (58).to_bytes(4, "big")
        assert checksum(pseudo + message) == 0


@given(errors())
def test_wire_form(error: IcmpError) -> None:
    assert IcmpError.from_bytes(error.to_bytes()) == error


@given(st.binary(max_size=200), st.sampled_from(["192.0.2.1", "2001:db8::1"]))
def test_any_message_is_parsed_or_left(data: bytes, reporter: str) -> None:
    found = parse(data, ip_address(reporter))
    if found is not None:
        assert found.version == found.reporter.version


@given(st.binary(max_size=80))
def test_any_wire_form_is_read_or_refused(data: bytes) -> None:
    try:
        error = IcmpError.from_bytes(data)
    except ValueError:
        return
    assert error.to_bytes() == data


@given(errors(), st.data())
def test_cut_messages_are_left(error: IcmpError, data: st.DataObject) -> None:
    message = body(build(error), error.version)
    length = data.draw(st.integers(0, len(message) - 1))
    assert parse(message[:length], error.reporter) is None


def test_later_fragments_are_left() -> None:
    ends = FourTuple(Endpoint(ip_address("192.0.2.1"), 1), Endpoint(ip_address("192.0.2.2"), 2))
    message = bytearray(body(build(IcmpError(3, 4, 1400, ip_address("192.0.2.9"), ends, 5)), 4))
    message[8 + 7] = 1  # fragment offset of the quoted packet
    assert parse(bytes(message), ip_address("192.0.2.9")) is None


def test_from_bytes_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="3 bytes; must be"):
        IcmpError.from_bytes(b"abc")
    with pytest.raises(ValueError, match="no ICMP error"):
        IcmpError.from_bytes(bytes([4, 8]) + bytes(len(good()) - 2))
    with pytest.raises(ValueError, match="other bytes"):
        IcmpError.from_bytes(good()[:12] + b"\1" + good()[13:])


def good() -> bytes:
    ends = FourTuple(Endpoint(ip_address("192.0.2.1"), 1), Endpoint(ip_address("192.0.2.2"), 2))
    return IcmpError(3, 4, 1400, ip_address("192.0.2.9"), ends, 5).to_bytes()
