# SPDX-License-Identifier: MIT
"""Memory of packets that wait is shared: whoever fills what he gets of it leaves something to the others."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod import forked
from tests.kmod.inside.test_nat_kept import LIMIT, Forger
from tests.kmod.nat_client import held, opened
from tests.lab.redirect_lab import until

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
LIBC = ctypes.CDLL(None, use_errno=True)
HOME = IPv4Address("127.0.0.1")
USER = 4242
FLOWS, PACKETS = 6, 200  # of 1400 bytes: more than all of the memory


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("=16sh14x", b"lo", IFF_UP))


def fill(uid: int, theirs: socket.socket) -> None:
    """Holds connections of a network namespace of its own, and sends to them; tells how many packets wait."""
    flags = CLONE_NEWNET
    if uid:
        os.setresuid(uid, uid, uid)
        flags |= CLONE_NEWUSER
    assert not LIBC.unshare(flags), os.strerror(ctypes.get_errno())
    loopback_up()
    all_ends = [FourTuple(Endpoint(HOME, 80), Endpoint(HOME, 5000 + number)) for number in range(FLOWS)]
    with opened() as nat:
        nat.add(*map(held, all_ends))
        forger = Forger(all_ends[0])
        for forger.ends in all_ends:
            for number in range(PACKETS):
                forger.send(1, seq=number, data=bytes(1400))
        until(lambda: sum(flow.held for flow in nat.list()) == FLOWS * PACKETS, "all packets")
        theirs.sendall(sum(flow.kept for flow in nat.list()).to_bytes(4))
        theirs.recv(1)


@pytest.fixture
def filler() -> Callable[[int], int]:
    """``filler(uid)``: a process of that user fills what it can until the test ends; how many packets."""
    children: list[tuple[int, socket.socket]] = []

    def start(uid: int) -> int:
        child, ours = forked.start(functools.partial(fill, uid), 50, *(sock for _child, sock in children))
        children.append((child, ours))
        return int.from_bytes(ours.recv(4))

    before = LIMIT.read_text()
    LIMIT.write_text("2")
    yield start
    for child, sock in children:
        forked.end(child, sock)
    LIMIT.write_text(before)


def test_one_namespace_leaves_half(filler: Callable[[int], int]) -> None:
    first, second, third = (filler(0) for _turn in range(3))
    assert first > 200
    # 2 of 2 MiB: one alone gets 1, the next 1/2, the third 1/4.
    assert first * 0.4 < second < first * 0.6
    assert first * 0.2 < third < first * 0.3


@pytest.mark.skipif(not Path("/proc/self/ns/user").exists(), reason="no user namespaces")
def test_a_user_gets_no_more_by_more_namespaces(filler: Callable[[int], int]) -> None:
    first = filler(USER)
    assert first > 200
    assert filler(USER) <= 1
    assert filler(USER + 1) > first * 0.4
    assert filler(0) > first * 0.2


def test_what_was_taken_is_given_back(filler: Callable[[int], int]) -> None:
    """The fixture of the tests before this one has ended all holds."""
    assert filler(USER) > 200
