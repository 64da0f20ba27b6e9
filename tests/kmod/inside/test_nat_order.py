# SPDX-License-Identifier: MIT
"""The end of a hold while the peer goes on sending: each packet arrives, and none overtakes another.

Numbered packets under the peer's name, by a raw socket on one processor; on another the hold ends, in every
way that it can. A raw socket where they come out sees all of them in their order.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod import forked
from tests.kmod.inside.test_nat_kept import NEWEST, Forger
from tests.kmod.nat_client import Flag, Flow, Nat, held, redirect
from tests.kmod.nat_lab import Triangle, triangle
from tests.lab.redirect_lab import Host, until

pytestmark = pytest.mark.processors(2)

ETH_P_ALL, ETH_P_IP = 3, 0x800
SERVER, PEER, COPY = 80, 5000, 40001
ROUNDS = 40
BURST = 200  # packets of a round: a hold has room for all of them
WAITING = 20  # when so many wait, the hold ends
assert BURST < NEWEST


def ends(of: Triangle, number: int) -> FourTuple:
    """Nobody's connection."""
    here, there = (ip_address(host.address(4)) for host in (of.lab.a, of.lab.peer))
    return FourTuple(Endpoint(here, SERVER), Endpoint(there, PEER + number))


class Passed:
    """The numbers of the packets to a port that have come to a host's own TCP, or have left the host.

    Between two hosts a veth lets packets overtake each other that different processors have sent.
    """

    def __init__(self, host: Host, port: int, *, leaving: bool) -> None:
        self._port, self._leaving = port, leaving
        with host.inside():
            if leaving:
                self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
            else:
                self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        self._sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._sock.setblocking(False)
        self.numbers: list[int] = []

    def count(self) -> int:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, address = self._sock.recvfrom(128)
                if self._leaving and (address[1] != ETH_P_IP or address[2] != socket.PACKET_OUTGOING):
                    continue
                body = packet[(packet[0] & 15) * 4 :]
                if int.from_bytes(body[2:4]) == self._port:
                    self.numbers.append(int.from_bytes(body[4:8]))
        return len(self.numbers)

    def close(self) -> None:
        self._sock.close()


@contextlib.contextmanager
def sender(of: Triangle, tuple_: FourTuple) -> Iterator[socket.socket]:
    """A process that sends a burst for each byte; one comes back when it is done."""
    with of.lab.peer.inside():
        forger = Forger(tuple_)

    def send(theirs: socket.socket) -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        number = 0
        while theirs.recv(1):
            for _turn in range(BURST):
                forger.send(1, seq=number, data=b"x")
                number += 1
            theirs.sendall(b"x")

    child, ours = forked.start(send, 60)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield ours
    finally:
        os.sched_setaffinity(0, before)
        forger.close()
        forked.end(child, ours)


def end_hold(nat: Nat, how: str, hold: Flow, to: Endpoint) -> None:
    ends_ = FourTuple(hold.local, hold.remote)  # type: ignore[arg-type]
    match how:
        case "replaced":
            nat.replace(held(ends_, Flag.MUTE))
        case "removed":
            nat.remove(hold)
        case "flushed":
            nat.flush()
        case "redirected":
            nat.replace(redirect(ends_, to))


@pytest.mark.parametrize("how", ["replaced", "removed", "flushed", "lapsed", "redirected"])
def test_all_arrives_in_order(how: str) -> None:
    with triangle(4) as of:
        hold_ends = ends(of, 0)
        nat = of.nat(of.lab.a)
        to = Endpoint(ip_address(of.lab.b.address(4)), COPY)
        hold = held(hold_ends, hold_ms=30 if how == "lapsed" else 0)
        leaving = how == "redirected"
        passed = Passed(of.lab.a, COPY if leaving else SERVER, leaving=leaving)
        with contextlib.closing(passed), sender(of, hold_ends) as bursts:
            for turn in range(ROUNDS):
                nat.set(hold)
                bursts.sendall(b"x")
                if how != "lapsed":
                    until(lambda: nat.one(hold_ends).kept >= WAITING, "packets that wait", 20)
                end_hold(nat, how, hold, to)
                assert bursts.recv(1) == b"x"
                until(lambda turn=turn: passed.count() >= (turn + 1) * BURST, "all packets", 20)
        assert passed.numbers == list(range(ROUNDS * BURST))
