# SPDX-License-Identifier: MIT
"""Windows that are shut while a connection moves, and urgent data on its way out."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

import pytest

from sockmi import image as images
from tests.kmod.inside.test_module_core import (
    FAMILIES,
    four_tuple,
    held,
    move,
    new_socket,
    nothing_kept,
    pair,
    read_exactly,
    tcp_info,
    wait_for,
)
from tests.kmod.module_client import Device, frozen
from tests.kmod.nat_client import Nat

PERSIST_S = 20  # in which a window that opened unseen must have been found: probes are an RTO apart, and more


@pytest.fixture
def device() -> Iterator[Device]:
    with Device(slot_bytes=8 << 20) as made:
        yield made


def fill(sock: socket.socket) -> bytes:
    """Send until nothing more is taken, and the peer's window is shut; all that was sent."""
    data = random.Random(9).randbytes(8_000_000)  # noqa: S311
    sock.setblocking(False)
    sent, quiet_since = 0, time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        with contextlib.suppress(BlockingIOError):
            sent += sock.send(data[sent : sent + 65536])
            quiet_since = time.monotonic()
        time.sleep(0.002)
    return data[:sent]


def looked_at(device: Device, sock: socket.socket) -> images.Image:
    with frozen(device, sock) as (freeze, image):
        device.abort(freeze)
        return images.decode(image)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shut_window_of_the_peer_s_stays_shut_until_it_opens(device: Device, family: str) -> None:
    ours, peer = pair(family)
    data = fill(ours)
    before = looked_at(device, ours)
    assert before.window.snd_wnd == 0
    assert before.unsent_queue
    arrived = tcp_info(peer)["bytes_received"]
    copy = move(device, ours, family)
    after = looked_at(device, copy)
    assert after.window.snd_wnd == 0
    assert after.sequence.snd_nxt == before.sequence.snd_nxt, "something was sent into a shut window"
    assert tcp_info(peer)["bytes_received"] == arrived
    copy.setblocking(True)
    assert read_exactly(peer, len(data)) == data
    copy.sendall(b"and on")
    assert read_exactly(peer, 6) == b"and on"


def test_a_window_that_opens_unseen_is_found(device: Device) -> None:
    """The update meets nobody: the original is closed, the copy not there yet. A probe has to ask."""
    ours, peer = pair()
    data = fill(ours)
    copy = new_socket("ipv4")
    with nothing_kept(), held(ours):
        ends = four_tuple(ours)
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        assert images.decode(image).window.snd_wnd == 0
        got = read_exactly(peer, tcp_info(peer)["bytes_received"])
        nat = Nat()
        assert nat.one(ends).held, "the update was not on its way yet"
        nat.close()
        dormant = device.restore(copy, image, flags=0)
    started = time.monotonic()
    device.decide("activate", dormant.id)
    peer.settimeout(PERSIST_S)
    copy.setblocking(True)
    while len(got) < len(data):
        part = peer.recv(1 << 20)
        assert part
        got += part
    assert got == data
    assert time.monotonic() - started < PERSIST_S


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_shut_window_opens_after_the_move(device: Device, family: str) -> None:
    ours, peer = pair(family)
    data = fill(peer)
    peer.setblocking(True)
    before = looked_at(device, ours)
    assert before.window.rcv_wnd < 4096 or tcp_info(peer)["unacked"] == 0
    copy = move(device, ours, family)
    after = looked_at(device, copy)
    assert after.window.rcv_right_edge == before.window.rcv_right_edge, "a window never shrinks"
    assert bytes(after.receive_queue) == bytes(before.receive_queue)
    assert read_exactly(copy, len(data)) == data


def test_urgent_data_that_has_not_arrived_is_carried(device: Device) -> None:
    """Sent, and lost: the copy sends it again, with the mark where it was."""
    ours, peer = pair()
    with held(ours):
        ours.sendall(b"x" * 1000)
        ours.send(b"!", socket.MSG_OOB)
        ours.sendall(b"y" * 10)
        before = looked_at(device, ours)
        assert before.urgent
        copy = move(device, ours, "ipv4")
        assert looked_at(device, copy).urgent == before.urgent
    assert read_exactly(peer, 1000) == b"x" * 1000
    wait_for(lambda: tcp_info(copy)["unacked"] == 0)
    assert peer.recv(1, socket.MSG_OOB) == b"!"
    assert read_exactly(peer, 10) == b"y" * 10
