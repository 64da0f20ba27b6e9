# SPDX-License-Identifier: MIT
"""Segments off the wire, and which RST ends a connection that does not run."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockmi.redirect.segment import ACK, FIN, RST, SYN, Expected, Segment, parse


def packet(version: int, flags: int, sequence: int, acknowledges: int = 0, data: bytes = b"") -> bytes:
    """From [::2]:4000 or 192.0.2.2:4000 to port 80; with 12 bytes of TCP options."""
    tcp = struct.pack("!HHIIBBHHH", 4000, 80, sequence, acknowledges, 8 << 4, flags, 100, 0, 0)
    tcp += bytes(12) + data
    if version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0)
        return header + ip_address("192.0.2.2").packed + ip_address("192.0.2.1").packed + tcp
    header = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
    return header + ip_address("2001:db8::2").packed + ip_address("2001:db8::1").packed + tcp


def segment(flags: int, sequence: int, acknowledges: int = 0) -> Segment:
    found = parse(packet(4, flags, sequence, acknowledges))
    assert found
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_parsed(version: int) -> None:
    found = parse(packet(version, FIN | ACK, 0xFFFFFFFE, 7, b"abc") + b"padding")
    assert found
    assert str(found.connection.local).endswith(":80") and found.connection.remote.port == 4000
    assert (found.sequence, found.acknowledges, found.flags, found.length) == (0xFFFFFFFE, 7, FIN | ACK, 3)
    assert found.ends == 2
    assert parse(packet(version, SYN, 5)).ends == 6  # type: ignore[union-attr]


@given(st.binary(max_size=120))
def test_garbage_never_crashes(content: bytes) -> None:
    for first in (b"", b"\x45", b"\x60", b"\x4f"):
        parse(first + content)


def test_which_rst_is_the_end() -> None:
    expected = Expected(0xFFFFFF00, 1000)
    assert expected.resets(segment(RST, 0xFFFFFF00), set())
    assert expected.resets(segment(RST | ACK, 0xFFFFFF00, 5), set())
    assert not expected.resets(segment(ACK, 0xFFFFFF00), set())
    assert not expected.resets(segment(RST, 0xFFFFFF01), set()), "in the window, but not exact"
    assert expected.resets(segment(RST, 100), {100}), "after data that waits"
    assert not expected.resets(segment(RST, 5000), {5000}), "beyond the window"
    assert not expected.resets(segment(RST, 0xFFFFFEFF), {0xFFFFFEFF}), "of the past"


def test_in_syn_sent() -> None:
    expected = Expected(0, 0, awaits=77)
    assert expected.resets(segment(RST | ACK, 0, 77), set())
    assert not expected.resets(segment(RST | ACK, 0, 76), set())
    assert not expected.resets(segment(RST, 0, 77), set())
