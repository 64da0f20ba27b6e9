# SPDX-License-Identifier: MIT
"""Packets on their way between hosts: packed, unpacked, nothing malformed accepted; and no flood of them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockmi.diag import DestroyedSockets
from sockmi.redirect.held import HeldPackets, pack, unpack

GROUPS = st.dictionaries(
    st.binary(min_size=16, max_size=16), st.lists(st.binary(max_size=200), max_size=5), max_size=5
)


@given(GROUPS)
def test_round_trip(packets: dict[bytes, list[bytes]]) -> None:
    assert unpack(pack(packets)) == packets


@given(GROUPS.filter(bool), st.data())
def test_truncated_is_refused_or_a_shorter_whole(
    packets: dict[bytes, list[bytes]], data: st.DataObject
) -> None:
    whole = pack(packets)
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    try:
        found = unpack(cut)
    except ValueError as error:
        assert "cut off" in str(error)
    else:
        assert pack(found) == cut


@given(st.binary(max_size=300))
def test_garbage_never_crashes(content: bytes) -> None:
    try:
        unpack(content)
    except ValueError:
        return


def test_empty() -> None:
    assert unpack(b"") == {}
    with pytest.raises(ValueError, match="byte 0"):
        unpack(b"x")


class Flood:
    """A netlink socket at which there is always more."""

    def __init__(self, message: bytes) -> None:
        self.message, self.reads = message, 0

    def recv_into(self, buffer: memoryview) -> int:
        self.reads += 1
        buffer[: len(self.message)] = self.message
        return len(self.message)

    def recv(self, _unused: int) -> bytes:
        self.reads += 1
        return self.message


def test_who_sends_faster_than_is_read_keeps_nobody_waiting() -> None:
    """The loop has its turn, and so has who takes what is kept."""
    held = HeldPackets.__new__(HeldPackets)
    held._kept, held._buffer = {}, memoryview(bytearray(64))
    held._socket = flood = Flood(struct.pack("=IHHII", 16, 4 << 8, 0, 0, 0))  # type: ignore[assignment]
    assert held.readable(), "it is read on in the loop's next turn"
    assert flood.reads <= 1000
    held.take([])
    assert flood.reads <= 20_000


def test_sockets_that_end_faster_than_is_read_keep_nobody_waiting() -> None:
    news = DestroyedSockets.__new__(DestroyedSockets)
    news.socket = flood = Flood(struct.pack("=IHHII", 16, 0, 0, 0, 0))  # type: ignore[assignment]
    news.readable()
    assert flood.reads <= 1000
