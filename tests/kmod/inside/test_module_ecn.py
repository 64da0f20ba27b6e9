# SPDX-License-Identifier: MIT
"""Congestion that a router has marked is told and answered by the copy, if the original had not yet."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import move, pair, read_exactly, wait_for
from tests.kmod.inside.test_module_windows import looked_at
from tests.kmod.module_client import Device

QUEUE_CWR, DEMAND_CWR, SEEN = 1, 2, 4  # flags of ECN, docs/image.md


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair that has negotiated ECN."""
    switch = Path("/proc/sys/net/ipv4/tcp_ecn")
    before = switch.read_text()
    switch.write_text("1")
    try:
        made = pair()
    finally:
        switch.write_text(before)
    yield made
    for sock in made:
        sock.close()


def nft(*words: str, text: str | None = None) -> str:
    done = subprocess.run(["nft", *words], input=text, text=True, check=True, capture_output=True)
    return done.stdout


@contextlib.contextmanager
def marking(sender: socket.socket) -> Iterator[None]:
    """The data that ``sender`` sends meets a full queue: CE (RFC 3168)."""
    rule = f"tcp sport {sender.getsockname()[1]} ip length > 60 ip ecn set ce"
    nft(
        "-f",
        "-",
        text=f"table ip marks {{ chain out {{ type filter hook output priority -150; {rule}; }}; }}",
    )
    try:
        yield
    finally:
        nft("delete", "table", "ip", "marks")


@contextlib.contextmanager
def counting(sport: int, flag: str) -> Iterator[None]:
    rule = f"tcp sport {sport} tcp flags & {flag} == {flag} counter"
    nft("-f", "-", text=f"table ip seen {{ chain out {{ type filter hook output priority 0; {rule}; }}; }}")
    try:
        yield
    finally:
        nft("delete", "table", "ip", "seen")


def counted() -> int:
    found = re.search(r"packets (\d+)", nft("list", "table", "ip", "seen"))
    assert found
    return int(found[1])


def test_a_mark_that_came_in_is_told_until_the_peer_has_answered(
    device: Device, ends: tuple[socket.socket, socket.socket]
) -> None:
    """ECE on every ACK, the copy's too, until a CWR comes."""
    ours, peer = ends
    with marking(peer):
        peer.sendall(b"m" * 500)
        assert read_exactly(ours, 500) == b"m" * 500
    before = looked_at(device, ours)
    assert before.ecn
    assert before.ecn.flags == DEMAND_CWR | SEEN
    with counting(ours.getsockname()[1], "ecn"):
        copy = move(device, ours, "ipv4")
        wait_for(lambda: counted() > 0)
        after = looked_at(device, copy)
        assert after.ecn == before.ecn
    peer.sendall(b"answered")
    assert read_exactly(copy, 8) == b"answered"
    answered = looked_at(device, copy)
    assert answered.ecn
    assert answered.ecn.flags == SEEN, "the peer's CWR ends it"
    copy.close()


def test_an_answer_that_is_due_is_given_by_the_copy(
    device: Device, ends: tuple[socket.socket, socket.socket]
) -> None:
    """The peer has told of a mark: the next new data says CWR, and the window is the smaller one."""
    ours, peer = ends
    with marking(ours):
        ours.sendall(b"m" * 500)
        assert read_exactly(peer, 500) == b"m" * 500
        wait_for(lambda: bool((ecn := looked_at(device, ours).ecn) and ecn.delivered_ce))
    before = looked_at(device, ours)
    assert before.ecn
    assert before.path_model
    assert before.ecn.flags & QUEUE_CWR
    assert before.ecn.delivered_ce == 1
    copy = move(device, ours, "ipv4")
    after = looked_at(device, copy)
    assert after.ecn == before.ecn
    assert after.path_model
    assert after.path_model.cwnd == before.path_model.cwnd
    with counting(copy.getsockname()[1], "cwr"):
        copy.sendall(b"smaller")
        assert read_exactly(peer, 7) == b"smaller"
        assert counted() == 1
    done = looked_at(device, copy)
    assert done.ecn
    assert not done.ecn.flags & QUEUE_CWR
    copy.close()
