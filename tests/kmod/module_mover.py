# SPDX-License-Identifier: MIT
"""Moves live streams between the hosts of the NAT helper's triangle by the module; rough wires for them."""

from __future__ import annotations

import ctypes
import socket
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from sockmi import image as images
from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.module_client import NO_SLOT, Device, End, Restore, frozen
from tests.kmod.nat_client import NO_FLAG, held, redirect, translate
from tests.kmod.nat_lab import Moving, Triangle
from tests.lab.redirect_lab import Host, run

HOME = 0  # move(): the port of the original
LOST_SCOREBOARD = 1 << 19  # SOCKMI_LOSS_SACK_SCOREBOARD


def netem(host: Host, *words: str, device: str = "eth0") -> None:
    """What becomes of the packets that ``host`` sends."""
    inside = ("ip", "netns", "exec", host.namespace)
    run(*inside, "tc", "qdisc", "replace", "dev", device, "root", "netem", *words)


def extended(host: Host, counter: str) -> int:
    """One of the TcpExt counters of a host's TCP."""
    with host.inside():
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))[counter])


def packed(end: Endpoint) -> End:
    """As the module reads it."""
    made = End(port=end.port)
    mapped = bytes(10) + b"\xff\xff" if isinstance(end.address, IPv4Address) else b""
    made.address[:] = mapped + end.address.packed
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
        with target.inside():
            copy = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
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
        self.note(image)
        # The marks are not restored, which costs retransmissions at worst. That is told if there were any.
        assert bool(made.reset & LOST_SCOREBOARD) == bool(images.decode(image).sack_scoreboard)

    @staticmethod
    def _restore(device: Device, fd: int, memory: bytearray, to: Endpoint) -> Restore:
        kept = (ctypes.c_char * len(memory)).from_buffer(memory)
        argument = Restore(
            fd=fd, slot=NO_SLOT, image=ctypes.addressof(kept), bytes=len(memory), local=packed(to)
        )
        return device.call("restore", argument)
