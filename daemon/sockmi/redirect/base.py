# SPDX-License-Identifier: MIT
"""What a redirect does: lead the peer's packets from the exporter to the importer.

One contract test suite runs against every mode. Each call is one kernel transaction for the
whole chunk, and idempotent: repeating it after a crash is safe. Tuples are written as the
host that makes the call sees them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from sockmi.addresses import Endpoint, FourTuple
from sockmi.frozen import frozen


class Mode(StrEnum):
    """The redirects, in order of preference where each is possible."""

    FORWARD = "forward"
    NAT = "nat"
    TAKEOVER = "takeover"
    IPTABLES = "iptables"


@frozen
class Outbound:
    """A connection that has left this host.

    ``tuple``: as the peer's packets arrive here (local is this host's end).
    ``importer``: the importer's endpoint; for ``forward`` and ``takeover`` its address is the
    next hop on the segment and its port is ``tuple.local.port``.
    """

    tuple: FourTuple
    importer: Endpoint


@frozen
class Inbound:
    """A connection that has come to this host.

    ``tuple``: the socket as it lives here. ``origin``: the endpoint that the peer knows;
    equal to ``tuple.local`` for address-preserving modes.
    """

    tuple: FourTuple
    origin: Endpoint


class Holds(Protocol):
    """The hold: nothing of a tuple in or out; needed by every mode on both hosts."""

    def hold(self, tuples: Sequence[FourTuple], timeout_s: float | None) -> None:
        """Drop all packets of ``tuples``, both ways.

        The kernel lifts it after ``timeout_s`` (None: never); repeated, the new timeout holds.
        """

    def hold_listeners(self, endpoints: Sequence[Endpoint], timeout_s: float | None) -> None:
        """Drop SYNs to ``endpoints`` (an unspecified address: any address of this host)."""

    def unhold(self, tuples: Sequence[FourTuple]) -> None:
        """The inverse of ``hold``."""

    def settle(self, tuples: Sequence[FourTuple]) -> None:
        """What was held for ever lives, and the journal knows it.

        Until then this host never answers that there is no such connection: ``admit`` lifts the hold,
        but if the daemon dies then, its dormant copy may be gone until the restart makes it anew.
        """

    def unhold_listeners(self, endpoints: Sequence[Endpoint]) -> None:
        """The inverse of ``hold_listeners``."""

    def miss_listeners(self, endpoints: Sequence[Endpoint], no_more: Sequence[Endpoint] = ()) -> None:
        """Drop what comes for ``endpoints`` (as above) and for no socket of this host: it is not answered
        by RST that nobody listens. For listeners that live elsewhere, or wait for their application.

        ``no_more`` are answered again, unless they are among ``endpoints``.
        """

    def reserve_ports(self, ports: Collection[int]) -> None:
        """Of connections that were led away: no new connection of this host gets such a port by chance.

        Replaces what was reserved before, also by an earlier daemon.
        """

    def missed_listeners(self) -> list[Endpoint]:
        """All of ``miss_listeners``, read back; an unspecified address may be of either IP version."""


class Redirect(Protocol):
    """One mode; see the module docstring."""

    mode: Mode

    def setup(self) -> None:
        """Make the tables, rules and routes that all connections share. Idempotent."""

    def teardown(self) -> None:
        """The inverse of ``setup``; leaves nothing."""

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if this mode can lead packets from here to ``importer``, else why not."""

    def obstacle(self, leaving: Sequence[FourTuple]) -> str | None:
        """Exporter, before the freeze: why these, all at once, could not be sent away; None if they could."""

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """Exporter, at COMMIT: divert the peer's packets, drop the late and mute our own
        stack for these tuples, and lift the hold, in one transaction."""

    def reroute(self, connections: Sequence[Outbound]) -> None:
        """Exporter, after a further hop: replace the importer of existing entries."""

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """Exporter: remove the entries of ``send_away`` (undone before COMMIT, or the connection is home)."""

    def relinquish(self, tuples: Sequence[FourTuple]) -> None:
        """Exporter: another mode leads them away by now: remove what only this one has.

        What both have (flows, and some maps) is the other's by now, or is given to it again by ``send_away``.
        """

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """Exporter: the connection has ended; stop diverting, but go on dropping late packets
        silently for ``linger_s`` (no RST), then nothing is left.

        A new connection with the same ends is not hindered meanwhile, neither the peer's nor this host's."""

    def expect(self, connections: Sequence[Inbound]) -> None:
        """Importer, of what waits for its application under a hold: the peer's packets come here."""

    def admit(self, connections: Sequence[Inbound]) -> None:
        """Importer, at activation: translation or marking in place, the hold lifted, in one transaction.

        For a connection that has come home it also does what ``take_back`` does.
        """

    def evict(self, connections: Sequence[Inbound]) -> None:
        """Importer: the inverse of ``admit``."""

    def outbound(self) -> list[Outbound]:
        """What ``send_away`` has installed in this kernel, read back (for reconciling after a restart)."""

    def inbound(self) -> list[Inbound]:
        """What ``admit`` has installed in this kernel, read back."""
