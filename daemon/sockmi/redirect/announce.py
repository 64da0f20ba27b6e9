# SPDX-License-Identifier: MIT
"""Says to a segment that an address now lives here: gratuitous ARP and unsolicited neighbour advertisements.

As keepalived does: a burst, and after 5 s once more, for hosts and switches that missed it.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import Protocol

from sockmi.redirect.icmp import checksum
from sockmi.redirect.routes import Routes
from sockmi.redirect.ways import Address

BURST = 5
AGAIN_AFTER_S = 5.0
_ETH_ARP, _ETH_IPV6 = 0x0806, 0x86DD
_BROADCAST = b"\xff" * 6


class Timer(Protocol):
    """What a scheduler hands out."""

    def cancel(self) -> object:
        """The call is not made, if it was not yet."""


Scheduler = Callable[[float, Callable[[], None]], Timer]


def in_thread(delay_s: float, call: Callable[[], None]) -> Timer:
    """The default scheduler: a daemon thread that sleeps."""
    timer = threading.Timer(delay_s, call)
    timer.daemon = True
    timer.start()
    return timer


def frame(address: Address, mac: bytes) -> bytes:
    """The Ethernet frame that binds ``address`` to ``mac`` in its hearers' caches.

    IPv4: an ARP request whose sender and target are the address (RFC 5227 section 3, "ARP
    announcement"). IPv6: a neighbour advertisement to all nodes with the override flag
    (RFC 4861 section 7.2.6).
    """
    if address.version == 4:
        arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, address.packed, bytes(6), address.packed)
        return _BROADCAST + mac + struct.pack("!H", _ETH_ARP) + arp
    override, target_link_layer = 0x20000000, b"\x02\x01"
    body = struct.pack("!BBHI16s2s6s", 136, 0, 0, override, address.packed, target_link_layer, mac)
    all_nodes = bytes.fromhex("ff020000000000000000000000000001")
    pseudo = address.packed + all_nodes + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    hop_limit = 255
    ip6 = struct.pack(
        "!IHBB16s16s", 6 << 28, len(body), socket.IPPROTO_ICMPV6, hop_limit, address.packed, all_nodes
    )
    return b"\x33\x33\x00\x00\x00\x01" + mac + struct.pack("!H", _ETH_IPV6) + ip6 + body


class Announcer:
    """Announces addresses on their devices, without blocking; can be told to stop."""

    def __init__(self, routes: Routes, scheduler: Scheduler = in_thread) -> None:
        self._routes = routes
        self._schedule = scheduler
        self._pending: dict[Address, tuple[socket.socket, Timer]] = {}
        self._lock = threading.Lock()

    def announce(self, address: Address, device: str) -> None:
        """A burst now, a burst after ``AGAIN_AFTER_S`` seconds."""
        message = frame(address, self._routes.hardware_address(device))
        # one socket for both bursts: the second comes from a thread that may be in another namespace
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((device, 0))
        for _turn in range(BURST):
            sock.send(message)

        def again() -> None:
            with self._lock:
                mine = self._pending.get(address)
                if mine is None or mine[0] is not sock:
                    return
                del self._pending[address]
            with sock:
                for _turn in range(BURST):
                    try:
                        sock.send(message)
                    except OSError:  # the device has gone; there is nobody left to tell
                        return

        self.withdraw(address)
        with self._lock:
            self._pending[address] = (sock, self._schedule(AGAIN_AFTER_S, again))

    def withdraw(self, address: Address) -> None:
        """No further announcement of ``address``, as it has left again."""
        with self._lock:
            pending = self._pending.pop(address, None)
        if pending is not None:
            pending[1].cancel()
            pending[0].close()

    def close(self) -> None:
        """Withdraw all."""
        for address in list(self._pending):
            self.withdraw(address)
