# SPDX-License-Identifier: MIT
"""Packets on their way between hosts: packed, unpacked, and nothing malformed accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockmi.redirect.held import pack, unpack

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
