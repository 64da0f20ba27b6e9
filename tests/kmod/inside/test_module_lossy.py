# SPDX-License-Identifier: MIT
"""Loss, delay and reordering on the wire, by netem, while the connection is frozen, thawed and moved."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi import image as images
from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.inside.test_module_core import new_socket
from tests.kmod.module_client import NO_SLOT, Device, End, Restore, frozen
from tests.kmod.nat_client import NO_FLAG, held, redirect, translate
from tests.kmod.nat_lab import Moving, Triangle, live, quiet, triangle
from tests.lab.redirect_lab import Host, run

HOME = 0  # move(): the port of the original
LARGEST = 60000  # bytes of a talker's send(): many segments at once, so that they overtake each other


def netem(host: Host, *words: str) -> None:
    """What becomes of the packets that ``host`` sends."""
    inside = ("ip", "netns", "exec", host.namespace)
    run(*inside, "tc", "qdisc", "replace", "dev", "eth0", "root", "netem", *words)


def extended(host: Host, counter: str) -> int:
    """One of the TcpExt counters of a host's TCP."""
    with host.inside():
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))[counter])


def packed(end: Endpoint) -> End:
    """As the module reads it."""
    assert isinstance(end.address, IPv4Address)
    made = End(port=end.port)
    made.address[:] = bytes(10) + b"\xff\xff" + end.address.packed
    return made


@dataclass
class Mover:
    """Freezes, thaws and moves by the module; one device for each host."""

    of: Triangle
    devices: dict[str, Device] = field(default_factory=dict)
    early: int = 0  # images with an out-of-order queue
    marked: int = 0  # images with a SACK scoreboard

    def device(self, host: Host) -> Device:
        if host.name not in self.devices:
            with host.inside():
                self.devices[host.name] = Device(slot_bytes=16 << 20)
        return self.devices[host.name]

    def close(self) -> None:
        for device in self.devices.values():
            device.close()

    def note(self, image: bytes) -> None:
        decoded = images.decode(image)
        self.early += bool(decoded.out_of_order)
        self.marked += bool(decoded.sack_scoreboard)

    def blink(self, moving: Moving, host: Host, seconds: float) -> None:
        """Freeze and thaw, while both ends go on."""
        device = self.device(host)
        with frozen(device, moving.server.sock, deadline_ms=3000) as (freeze, image):
            self.note(image)
            time.sleep(seconds)
            device.abort(freeze)

    def move(self, moving: Moving, source: Host, target: Host, port: int) -> None:
        """From ``source`` to ``target``; with port HOME to where it was made."""
        ends = moving.ends
        to = ends.local if port == HOME else Endpoint(IPv4Address(target.address(4)), port)
        sock = moving.server.pause()
        here = FourTuple(moving.here, ends.remote)
        exporter, importer = self.of.nat(source), self.of.nat(target)
        exporter.set(held(here))
        device = self.device(source)
        with frozen(device, sock) as (freeze, image):
            device.commit(freeze)
        sock.close()
        self.note(image)
        with target.inside():
            copy = new_socket("ipv4")
        memory = bytearray(image)
        made = self._restore(self.device(target), copy.fileno(), memory, to)
        if to == ends.local:
            importer.remove(held(ends))
        else:
            importer.set(translate(to, ends, NO_FLAG))
        self.device(target).decide("activate", made.id)
        exporter.replace(redirect(here, to))
        moving.server.resume(copy)
        moving.here = to

    @staticmethod
    def _restore(device: Device, fd: int, memory: bytearray, to: Endpoint) -> Restore:
        kept = (ctypes.c_char * len(memory)).from_buffer(memory)
        argument = Restore(
            fd=fd, slot=NO_SLOT, image=ctypes.addressof(kept), bytes=len(memory), local=packed(to)
        )
        return device.call("restore", argument)


@contextlib.contextmanager
def rough(*words: str) -> Iterator[tuple[Mover, Moving]]:
    """A stream in both directions between ``peer`` and ``a``, on wires as netem's ``words`` have them."""
    with triangle(4) as of:
        for host in (of.lab.peer, of.lab.a, of.lab.b):
            netem(host, *words)
        mover = Mover(of)
        try:
            with live(of, of.lab.peer, of.lab.a, largest=LARGEST) as moving:
                moving.progress()
                yield mover, moving
                quiet(moving)
        finally:
            mover.close()


LOSSY = ("delay", "10ms", "3ms", "loss", "2%")


def test_frozen_and_thawed_among_losses() -> None:
    with rough(*LOSSY) as (mover, moving):
        for turn in range(40):
            mover.blink(moving, mover.of.lab.a, (0, 0.005, 0.03)[turn % 3])
            time.sleep(0.01)
        moving.progress()
        assert mover.early, "no freeze met an out-of-order queue: this test shows nothing"
        assert extended(mover.of.lab.peer, "TCPSACKReneging") == 0


def test_moved_among_losses() -> None:
    """To another host and home again, many times; nobody ever goes back on what the peer was SACKed."""
    with rough(*LOSSY) as (mover, moving):
        lab = mover.of.lab
        for turn in range(12):
            away = turn % 2 == 0
            mover.move(moving, *((lab.a, lab.b, 41000) if away else (lab.b, lab.a, HOME)))
            if turn % 4 == 3:
                moving.progress()
            else:
                time.sleep(0.1)
        moving.progress()
        assert mover.early, "no move met an out-of-order queue: this test shows nothing"
        assert extended(lab.peer, "TCPSACKReneging") == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "words", [("delay", "40ms"), ("delay", "25ms", "20ms", "loss", "5%"), ("loss", "20%")]
)
def test_moved_on_worse_wires(words: tuple[str, ...]) -> None:
    with rough(*words) as (mover, moving):
        lab = mover.of.lab
        for turn in range(10):
            away = turn % 2 == 0
            mover.move(moving, *((lab.a, lab.b, 42000) if away else (lab.b, lab.a, HOME)))
            mover.blink(moving, lab.b if away else lab.a, 0.02)
            moving.progress(100)
        assert extended(lab.peer, "TCPSACKReneging") == 0
