# SPDX-License-Identifier: MIT
"""Timers go on in the copy; what had to be set anew is told."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from sockmi import image as images
from tests.kmod.inside.test_module_core import (
    held,
    new_socket,
    nothing_kept,
    pair,
    read_exactly,
    tcp_info,
    wait_for,
)
from tests.kmod.inside.test_module_windows import fill, looked_at
from tests.kmod.module_client import Device, Restore, frozen

APPROXIMATED = 2  # of docs/image.md, section 23
LOST_CONGESTION_STATE, LOST_TIMERS = 1 << 15, 1 << 20  # SOCKMI_LOSS_*
IDLE_S = 6
SLACK_S = 1.5  # of the machine's, not of the kernel's


@pytest.fixture
def device() -> Iterator[Device]:
    with Device(slot_bytes=8 << 20) as made:
        yield made


def move_out(device: Device, sock: socket.socket) -> tuple[socket.socket, images.Image, Restore]:
    """The copy, not yet alive; its image, and what the restore says."""
    copy = new_socket("ipv4")
    with held(sock), frozen(device, sock) as (freeze, image):
        device.commit(freeze)
        made = device.restore(copy, image, flags=0)
    return copy, images.decode(image), made


def names(image: images.Image, what: int) -> set[str]:
    return {one.name for one in image.fidelity if one.what == what}


def segments_in(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 240)[140:144], "little")


def keep_alive(sock: socket.socket, idle_s: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)


def test_a_keep_alive_probe_comes_when_it_would_have_come(device: Device) -> None:
    """The silence before the move counts."""
    ours, peer = pair()
    keep_alive(ours, IDLE_S)
    started = time.monotonic()
    time.sleep(IDLE_S / 2)
    copy, image, made = move_out(device, ours)
    assert image.timers
    assert IDLE_S / 2 - SLACK_S < image.timers.keepalive_us / 1e6 <= IDLE_S / 2
    device.decide("activate", made.id)
    time.sleep(0.1)  # the ACK at activation
    before = segments_in(peer)
    wait_for(lambda: segments_in(peer) > before, IDLE_S)
    assert IDLE_S - SLACK_S < time.monotonic() - started < IDLE_S + SLACK_S
    assert not (made.reset | made.approximated) & LOST_TIMERS
    copy.close()


def test_what_came_in_puts_a_keep_alive_probe_off(device: Device) -> None:
    """The kernel leaves its timer as it is then, and looks when it expires: the image tells the true time."""
    ours, peer = pair()
    keep_alive(ours, IDLE_S)
    time.sleep(IDLE_S / 2)
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"
    image = looked_at(device, ours)
    assert image.timers
    assert image.timers.keepalive_us / 1e6 > IDLE_S - SLACK_S


def test_two_hours_are_two_hours(device: Device) -> None:
    """More microseconds than 32 bits hold."""
    ours, _peer = pair()
    keep_alive(ours, 7200)
    copy, image, made = move_out(device, ours)
    assert image.timers
    assert 7190 < image.timers.keepalive_us / 1e6 <= 7200
    device.decide("activate", made.id)
    again = looked_at(device, copy)
    assert again.timers
    assert 7190 < again.timers.keepalive_us / 1e6 <= 7200


def test_window_probes_go_on_as_far_apart(device: Device) -> None:
    """Their distance doubles from probe to probe; the first is never later than an RTO, and that is told."""
    ours, peer = pair()
    fill(ours)
    with held(peer):  # an answer would begin to count anew
        wait_for(lambda: (looked_at(device, ours).path_model or pytest.fail("no path")).backoff >= 3, 20)
        copy, image, made = move_out(device, ours)
    assert image.timers
    assert image.path_model
    assert image.timers.probe_us
    assert made.approximated & LOST_TIMERS
    assert "timers" in names(image, APPROXIMATED), "how many probes were in vain is not carried"
    device.decide("activate", made.id)
    after = looked_at(device, copy)
    assert after.path_model
    assert after.path_model.backoff >= image.path_model.backoff
    assert after.timers
    assert after.timers.probe_us


def test_data_in_flight_gets_a_probe_of_its_own(device: Device) -> None:
    """It is told: what the original's timer was for, the copy does by another."""
    ours, peer = pair()
    with nothing_kept(), held(peer):
        ours.sendall(b"lost")
        copy, image, made = move_out(device, ours)
        assert image.timers
        assert image.timers.retransmit_us or image.timers.loss_probe_us
        assert made.approximated & LOST_TIMERS
    device.decide("activate", made.id)
    assert read_exactly(peer, 4) == b"lost"
    wait_for(lambda: tcp_info(copy)["unacked"] == 0)


def test_an_idle_connection_loses_nothing(device: Device) -> None:
    ours, _peer = pair()
    _copy, image, made = move_out(device, ours)
    assert not image.fidelity
    assert made.reset == made.approximated == made.lost == 0
    device.decide("activate", made.id)


def test_a_recovery_that_begins_anew_is_told(device: Device) -> None:
    ours, peer = pair()
    with held(peer):
        ours.sendall(b"lost")
        wait_for(lambda: tcp_info(ours)["ca_state"] == 4, 20)  # TCP_CA_Loss
        _copy, image, made = move_out(device, ours)
        assert "congestion-state" in names(image, APPROXIMATED)
        assert made.approximated & LOST_CONGESTION_STATE
        device.decide("discard", made.id)
