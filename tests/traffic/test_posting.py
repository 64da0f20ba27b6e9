# SPDX-License-Identifier: MIT
"""Contexts go from machine to machine (here addresses of the loopback): who has one gives it, once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lab.traffic.posting import RemoteRendezvous

PEER = "192.0.2.9:40000"


def machines(tmp_path: Path, count: int) -> list[RemoteRendezvous]:
    """So many servers' rendezvous, each asking all others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    addresses = [f"127.0.0.{10 + number}" for number in range(count)]
    return [
        RemoteRendezvous(
            tmp_path / address,
            [other for other in addresses if other != address],
            address=address,
            port=port,
        )
        for address in addresses
    ]


def test_context_is_taken_from_who_has_it(tmp_path: Path) -> None:
    first, second, third = machines(tmp_path, 3)
    second.put(PEER, b"x" * 100_000)
    assert third.take(PEER, 5) == b"x" * 100_000
    with pytest.raises(TimeoutError, match="none of"):
        first.take(PEER, 0.3)


def test_second_move_takes_the_second_context(tmp_path: Path) -> None:
    first, second, third = machines(tmp_path, 3)
    first.put(PEER, b"one")
    assert second.take(PEER, 5) == b"one"
    second.put(PEER, b"two")
    assert third.take(PEER, 5) == b"two"
    third.put(PEER, b"three")
    assert first.take(PEER, 5) == b"three"


def test_who_cannot_be_reached_does_not_matter(tmp_path: Path) -> None:
    first, second = machines(tmp_path, 2)
    second.others = ["127.0.0.99", *second.others]
    first.put(PEER, b"one")
    assert second.take(PEER, 5) == b"one"
