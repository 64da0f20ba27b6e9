# SPDX-License-Identifier: MIT
"""A wire that guests share: a multicast group on this machine's loopback, chosen at random."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass, field

LOOPBACK = "127.0.0.1"


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Segment:
    """``index`` makes the addresses: 10.77.index.N/24 and fd77:index::N/64 for the guest with number N."""

    index: int = 0
    group: str = field(
        default_factory=lambda: f"239.{192 + secrets.randbelow(60)}.{secrets.randbelow(250)}.1"
    )
    port: int = field(default_factory=_free_port)
    tag: int = field(default_factory=lambda: secrets.randbelow(256))

    def mac(self, number: int) -> str:
        """The hardware address of guest ``number`` here."""
        return f"52:54:00:{self.tag:02x}:{self.index:02x}:{number:02x}"

    def ipv4(self, number: int) -> str:
        """Its IPv4 address, without the length."""
        return f"10.77.{self.index}.{number}"

    def ipv6(self, number: int) -> str:
        """Its IPv6 address, without the length."""
        return f"fd77:{self.index:x}::{number:x}"

    def qemu(self, number: int, name: str) -> list[str]:
        """QEMU's options for a network card of guest ``number`` on this wire."""
        backend = f"socket,id={name},mcast={self.group}:{self.port},localaddr={LOOPBACK}"
        return [
            "-netdev",
            backend,
            "-device",
            f"virtio-net-pci,netdev={name},mac={self.mac(number)},romfile=",
        ]
