# SPDX-License-Identifier: MIT
"""The triangle for the NAT helper's tests: peer, exporter and importers as network namespaces of one kernel.

Hosts, streams and the bare TCP_REPAIR mover are those of the redirects' contract tests, so that nothing of
the module but the NAT helper is at work.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import NO_FLAG, Flag, Nat, held, redirect, translate
from tests.lab.redirect_lab import Capture, Host, Lab, Talker, connect, dump, ends, restore, until, wake

SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO = 0x17, 0x1F, 0x24


@dataclass
class Triangle:
    """A lab with the helper of each host opened."""

    lab: Lab
    version: int
    nats: dict[str, Nat] = field(default_factory=dict)

    def nat(self, host: Host) -> Nat:
        if host.name not in self.nats:
            with host.inside():
                self.nats[host.name] = Nat()
        return self.nats[host.name]

    def close(self) -> None:
        for nat in self.nats.values():
            nat.flush()
            nat.close()


@contextlib.contextmanager
def triangle(version: int, with_d: bool = False) -> Iterator[Triangle]:
    """peer, a (exporter), b and c (importers) on one segment; ``with_d``: d, a far peer behind router r."""
    with Lab(with_d) as lab:
        for host in lab.hosts.values():
            for device in ("all", "eth0"):
                host.sysctl(f"net/ipv4/conf/{device}/send_redirects", 0)
        made = Triangle(lab, version)
        try:
            yield made
        finally:
            made.close()


def offloads(host: Host, on: bool, device: str = "eth0") -> None:
    """Checksums by the 'hardware', and large segments; or every checksum computed and small segments only."""
    with host.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in (ETHTOOL_SGSO, ETHTOOL_STSO, ETHTOOL_STXCSUM)[:: -1 if on else 1]:
            value = ctypes.create_string_buffer(struct.pack("=II", command, on), 8)
            request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock, SIOCETHTOOL, request)


@dataclass
class Moving:
    """A live connection between a peer and wherever it is served."""

    of: Triangle
    peer: Talker
    server: Talker
    ends: FourTuple  # the server's view, as the peer knows it
    here: Endpoint  # where the server's end really is
    capture: Capture

    def progress(self, least: int = 4000, what: str = "both ends hear new bytes") -> None:
        """Both directions move on, and nobody was lied to."""
        before = self.peer.received, self.server.received

        def moved() -> bool:
            self.peer.check()
            self.server.check()
            return self.peer.received > before[0] + least and self.server.received > before[1] + least

        until(moved, what, 20)

    def move(self, source: Host, target: Host, port: int, flags: Flag = NO_FLAG) -> Endpoint:
        """Move the server's end from ``source`` to ``target``; where it is then."""
        image_ends = FourTuple(self.here, self.ends.remote)
        sock = self.server.pause()
        exporter = self.of.nat(source)
        exporter.set(held(image_ends))
        image = dump(sock)
        sock.close()
        to = Endpoint(_address(target, self.of.version), port)
        back = to == self.ends.local
        importer = self.of.nat(target)
        with target.inside():
            copy = restore(image, to)
        if back:
            importer.remove(held(FourTuple(to, self.ends.remote)))
        else:
            importer.set(translate(to, self.ends, flags))
        wake(copy, image)
        exporter.replace(redirect(image_ends, to))
        self.server.resume(copy)
        self.here = to
        return to

    def close(self) -> None:
        for talker in (self.peer, self.server):
            with contextlib.suppress(AssertionError):
                talker.pause()
            talker.sock.close()
        self.capture.close()


def _address(host: Host, version: int):

    return ip_address(host.address(version))


@contextlib.contextmanager
def live(of: Triangle, peer: Host, server: Host, largest: int = 900) -> Iterator[Moving]:
    """A stream in both directions."""
    client, accepted = connect(peer, server, of.version)
    here = ends(accepted)
    moving = Moving(
        of,
        Talker(client, largest=largest),
        Talker(accepted, largest=largest),
        here,
        here.local,
        Capture(peer),
    )
    try:
        yield moving
    finally:
        moving.close()


def quiet(moving: Moving) -> None:
    """The peer has seen neither RST nor FIN nor a redirect."""
    assert moving.capture.segments > 0
    assert (moving.capture.resets, moving.capture.fins, moving.capture.redirects) == (0, 0, 0)
