# SPDX-License-Identifier: MIT
"""HOLD and MUTE, seen on the wire: nothing of a dead original reaches the peer, and holds end in time."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import Flag, Flow, Seen, held
from tests.kmod.nat_lab import Triangle, triangle
from tests.lab.redirect_lab import Capture, connect, ends, until


class Pair:
    """An ordinary connection between peer and a, and what arrives at the peer."""

    def __init__(self, of: Triangle) -> None:
        self.of = of
        self.peer, self.server = connect(of.lab.peer, of.lab.a, of.version)
        self.peer.setblocking(True)
        self.server.setblocking(True)
        self.peer.settimeout(10)
        self.server.settimeout(10)
        self.ends = ends(self.server)
        self.nat = of.nat(of.lab.a)
        self.capture = Capture(of.lab.peer)

    def close(self) -> None:
        self.capture.close()
        self.peer.close()
        self.server.close()


@pytest.fixture(params=[4, 6])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with triangle(request.param) as of:
        made = Pair(of)
        try:
            yield made
        finally:
            made.close()


def test_reset_of_a_closed_socket_is_muted(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.MUTE))
    pair.peer.send(b"unread")
    until(lambda: pair.server.recv(6, socket.MSG_PEEK) == b"unread", "the data")
    pair.server.close()  # unread data: a RST at once
    until(lambda: pair.nat.one(pair.ends).muted == 1, "the muted RST")
    pair.peer.send(b"to nobody")  # no socket: the host itself answers with a RST
    until(lambda: pair.nat.one(pair.ends).muted >= 2, "the host's RST, muted")
    assert pair.capture.resets == 0 and pair.capture.fins == 0
    pair.nat.remove(held(pair.ends))
    until(lambda: pair.capture.resets > 0, "the control: without the flow the RST comes")


def test_fin_is_muted_and_comes_when_the_flow_goes(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.MUTE))
    pair.server.shutdown(socket.SHUT_WR)
    until(lambda: pair.nat.one(pair.ends).muted >= 1, "the muted FIN")
    pair.peer.send(b"still heard")
    assert pair.server.recv(20) == b"still heard"
    assert pair.capture.fins == 0
    pair.nat.remove(held(pair.ends))
    assert pair.peer.recv(1) == b""
    until(lambda: pair.capture.fins, "the FIN in the capture")
    assert pair.capture.fins == 1


def test_data_passes_a_mute(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.MUTE))
    pair.server.send(b"x" * 5000)
    assert len(pair.peer.recv(5000, socket.MSG_WAITALL)) == 5000
    assert pair.nat.one(pair.ends).muted == 0


def test_hold_stops_both_directions(pair: Pair) -> None:
    before = pair.capture.segments
    pair.nat.add(held(pair.ends, Flag.HOLD))
    pair.peer.send(b"in")
    pair.server.send(b"out")
    until(lambda: pair.nat.one(pair.ends).held >= 2, "both held")
    assert pair.capture.segments == before
    pair.server.settimeout(0.1)
    with pytest.raises(TimeoutError):
        pair.server.recv(2)
    pair.nat.remove(held(pair.ends))
    pair.server.settimeout(10)
    assert pair.server.recv(2) == b"in"
    assert pair.peer.recv(3) == b"out"


def test_hold_without_other_flags_ends_with_its_flow(pair: Pair) -> None:
    started = time.monotonic()
    pair.nat.add(held(pair.ends, Flag.HOLD, hold_ms=400))
    pair.peer.send(b"late")
    left = pair.nat.one(pair.ends).hold_ms
    assert 0 < left <= 400
    assert pair.server.recv(4) == b"late"
    assert time.monotonic() - started >= 0.4
    assert pair.nat.list() == []
    assert pair.capture.resets == 0


def test_hold_ends_but_mute_stays(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.HOLD | Flag.MUTE, hold_ms=100))
    pair.server.close()
    until(lambda: not pair.nat.one(pair.ends).flags & Flag.HOLD, "the end of the hold")
    flow = pair.nat.one(pair.ends)
    assert flow.flags == Flag.MUTE and Seen.LAPSE in flow.seen and flow.hold_ms == 0
    pair.peer.send(b"to nobody")
    time.sleep(0.3)
    assert pair.capture.resets == 0 and pair.capture.fins == 0


def test_a_new_hold_replaces_the_deadline(pair: Pair) -> None:
    pair.nat.add(held(pair.ends, Flag.HOLD, hold_ms=100))
    pair.nat.set(held(pair.ends, Flag.HOLD))
    time.sleep(0.4)
    flow = pair.nat.one(pair.ends)
    assert flow.flags == Flag.HOLD and flow.hold_ms == 0 and Seen.LAPSE not in flow.seen


def test_a_new_connection_of_a_redirected_name_does_not_begin(pair: Pair) -> None:
    """The exporter's own programs may come upon the tuple again."""
    lab, version = pair.of.lab, pair.of.version
    away = Endpoint(type(pair.ends.local.address)(lab.b.address(version)), 40001)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    name = FourTuple(Endpoint(pair.ends.local.address, 45678), pair.ends.remote)
    pair.nat.add(Flow(name.local, name.remote, Flag.REDIRECT, away))
    with lab.a.inside():
        fresh = socket.socket(family, socket.SOCK_STREAM)
    fresh.bind((str(name.local.address), name.local.port))
    fresh.settimeout(0.3)
    with pytest.raises(TimeoutError):
        fresh.connect((str(name.remote.address), name.remote.port))
    assert pair.nat.one(name).muted >= 1
    fresh.close()


@pytest.mark.parametrize("anywhere", [False, True])
def test_new_connections_to_a_held_port_wait(pair: Pair, anywhere: bool) -> None:
    lab, version = pair.of.lab, pair.of.version
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.a.inside():
        listener = socket.create_server((lab.a.address(version), 0), family=family)
    port = listener.getsockname()[1]
    kind = type(pair.ends.local.address)
    local = kind(0) if anywhere else pair.ends.local.address
    flow = Flow(Endpoint(local, port), None, Flag.HOLD)
    pair.nat.add(flow)
    with lab.peer.inside():
        client = socket.socket(family, socket.SOCK_STREAM)
    client.setblocking(False)
    assert client.connect_ex((lab.a.address(version), port)) != 0
    until(lambda: pair.nat.one(flow).held >= 1, "the held SYN")
    pair.peer.send(b"others go on")
    assert pair.server.recv(20) == b"others go on"
    pair.nat.remove(flow)
    listener.settimeout(10)
    accepted, _unused = listener.accept()  # the peer's SYN comes again by itself
    for sock in (client, accepted, listener):
        sock.close()
