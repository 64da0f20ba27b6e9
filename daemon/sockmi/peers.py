# SPDX-License-Identifier: MIT
"""Where peers are: a redirect leads what comes in from the network to where the importer is in the network.

The peer of a connection may be a process of this host, or of the importer, or behind this host, in a
container for instance. What it sends then takes another way, or comes back to the host whose address it has
as its source, which drops it. That is known before a move; the kernel is asked about many peers at once.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_network

from sockmi.addresses import FourTuple
from sockmi.engine.base import SocketFacts
from sockmi.protocol.records import Place
from sockmi.redirect.base import Mode
from sockmi.redirect.lookup import Ends, Hop, Own, hops, is_segment, own_addresses
from sockmi.redirect.routes import RTN_LOCAL, RTN_UNICAST
from sockmi.redirect.ways import Address
from sockmi.refusal import Code, Refusal

_FRESH_S = 2.0
_NEGOTIATED_S = 60.0  # what was so when a move was asked for
_KNOWN_MAX = 1 << 16
#: What serves a peer that is a process of the importer, by IP version. What IPv4 gets from the network with a
#: source of its own it drops; iptables' translation of what never leaves the host is not undone.
_SERVE_IMPORTER = {
    4: frozenset({Mode.TAKEOVER}),
    6: frozenset({Mode.FORWARD, Mode.NAT, Mode.TAKEOVER}),
}


def serving_importer(modes: Iterable[Mode], version: int) -> list[Mode]:
    """Those of ``modes`` that serve a peer which is a process of the importer."""
    return [mode for mode in modes if mode in _SERVE_IMPORTER[version]]


def at_both(address: Address) -> str:
    """Of an importer's place."""
    return (
        f"The importer and the exporter both have the address {address}, so what is sent to it does not "
        "leave the exporter; remove it from one of them, or move to a host that does not have it."
    )


def at_importer(address: Address, modes: Sequence[Mode]) -> Refusal:
    """None of the modes serves it."""
    return Refusal(
        Code.NO_REDIRECT,
        f"Its peer {address} is the importer itself, and over IPv{address.version} what a host sends does "
        f"not come back to it by {', '.join(modes)}; move it to another host, or use takeover.",
    )


class Peers:
    """For any thread."""

    def __init__(self, modes: Sequence[Mode]) -> None:
        """``modes``: of this host's redirects."""
        #: Whether another host leads a connection here: then its peer's packets come from there.
        self.led_here: Callable[[FourTuple], bool] = lambda _connection: False
        self._modes = modes
        self._known: dict[Ends, tuple[float, Hop | None]] = {}
        self._segments: dict[int, tuple[float, str | None]] = {}

    def judge(self, facts: list[SocketFacts]) -> list[SocketFacts]:
        """Preflight: the same facts, with a refusal of what no importer could be sent."""
        pairs = {_ends(one.tuple) for one in facts if one.tuple and one.refusal is None}
        found = self._hops(pairs, _FRESH_S)
        own: dict[Address, Own] = {}
        with contextlib.suppress(OSError):
            if any(hop and hop.direct for hop in found.values()):
                own = own_addresses()
        refusals = {
            pair: why for pair, hop in found.items() if hop and (why := self._refusal(pair, hop, own))
        }
        if not refusals:
            return facts
        return [
            replace(one, refusal=why)
            if one.refusal is None
            and one.tuple
            and (why := refusals.get(_ends(one.tuple)))
            and not self.led_here(one.tuple)
            else one
            for one in facts
        ]

    def judge_importer(self, facts: list[SocketFacts], importer: Collection[Address]) -> list[SocketFacts]:
        """The same for what would go to the host that has these addresses; it may have others."""
        refusals = {
            address: at_importer(address, self._modes)
            for address in importer
            if not serving_importer(self._modes, address.version)
        }
        if not refusals:
            return facts
        return [
            replace(one, refusal=why)
            if one.refusal is None and one.tuple and (why := refusals.get(one.tuple.remote.address))
            else one
            for one in facts
        ]

    def obstacles(self, connections: Sequence[tuple[FourTuple | None, Place]]) -> list[str | None]:
        """Why the packets of each connection's peer could not be led to its place; before the freeze."""
        led = [
            (connection, place.mode, place.endpoint.address)
            if connection and place.mode and place.endpoint
            else None
            for connection, place in connections
        ]
        # From the same address: rules may give each of this host's addresses a device of its own.
        importers = self._hops({(one[0].local.address, one[2]) for one in led if one}, _FRESH_S)
        peers = self._hops({_ends(one[0]) for one in led if one}, _NEGOTIATED_S)
        return [
            self._obstacle(*one, peers.get(_ends(one[0])), importers.get((one[0].local.address, one[2])))
            if one
            else None
            for one in led
        ]

    def here(self, addresses: Collection[Address]) -> frozenset[Address]:
        """Those that are this host's own."""
        found = self._hops({(None, address) for address in addresses}, _FRESH_S)
        return frozenset(address for (_from, address), hop in found.items() if hop and hop.kind == RTN_LOCAL)

    def neighbour_by(self, address: Address) -> str | None:
        """The device by which an address is a neighbour of this host; None if it is none."""
        hop = self._hops({(None, address)}, _FRESH_S).get((None, address))
        if hop is None or hop.kind != RTN_UNICAST or not hop.direct:
            return None
        now = time.monotonic()
        known = self._segments.get(hop.device)
        if known is None or known[0] < now - _FRESH_S:
            name = _name(hop) if is_segment(hop.device) else None
            known = self._segments[hop.device] = now, name
        return known[1]

    def _refusal(self, ends: Ends, hop: Hop, own: dict[Address, Own]) -> Refusal | None:
        local, remote = ends
        why = None
        if hop.kind == RTN_LOCAL:
            # By takeover the peer reaches the importer as any host, if it has another address, which stays.
            stays = self._modes[0] is Mode.TAKEOVER and remote != local and not remote.is_loopback
            why = None if stays else _on_this_host(remote)
        elif local is not None and (there := own.get(local)) and _is_apart(local, remote, hop, there):
            why = _behind_this_host(remote, hop)
        return Refusal(Code.NO_REDIRECT, why) if why else None

    def _obstacle(
        self, connection: FourTuple, mode: Mode, importer: Address, peer: Hop | None, to: Hop | None
    ) -> str | None:
        if to is not None and to.kind == RTN_LOCAL:
            return at_both(importer)
        if peer is None or self.led_here(connection):
            return None
        remote = connection.remote.address
        if peer.kind == RTN_LOCAL:
            return None if mode is Mode.TAKEOVER else _on_this_host(remote)
        if to is not None and peer.device != to.device and _is_neighbour(peer):
            return _behind_this_host(remote, peer)
        return None

    def _hops(self, ends: Collection[Ends], age_s: float) -> dict[Ends, Hop | None]:
        """Of what the kernel does not tell nothing is known, which is no obstacle."""
        now = time.monotonic()
        known = self._known
        found = {one: known[one][1] for one in ends if one in known and known[one][0] >= now - age_s}
        if missing := [one for one in ends if one not in found]:
            with contextlib.suppress(OSError):
                news = dict(zip(missing, hops(missing), strict=True))
                if len(known) > _KNOWN_MAX:
                    self._known = known = {}
                known.update((one, (now, hop)) for one, hop in news.items())
                found.update(news)
        return found


def _ends(connection: FourTuple) -> Ends:
    return connection.local.address, connection.remote.address


def _is_neighbour(hop: Hop) -> bool:
    return hop.kind == RTN_UNICAST and hop.direct and is_segment(hop.device)


def _is_apart(local: Address, remote: Address, hop: Hop, there: Own) -> bool:
    """Whether a neighbour is in another network than the address that it has connected to.

    An address without a network, as services have them, says nothing of where packets to it come in.
    """
    if hop.device == there.device or there.prefix_length == local.max_prefixlen or local.is_loopback:
        return False
    if remote in ip_network((local, there.prefix_length), strict=False):  # of two devices in one network
        return False
    return _is_neighbour(hop)


def _name(hop: Hop) -> str:
    try:
        return socket.if_indextoname(hop.device)
    except OSError:
        return "a device that is gone"


def _on_this_host(remote: Address) -> str:
    return (
        f"Its peer {remote} is this host itself: what that sends does not come in from the network, so it "
        "cannot be led to another host; have the peer connect to that one, or let the connection end."
    )


def _behind_this_host(remote: Address, hop: Hop) -> str:
    return (
        f"Its peer {remote} is a neighbour by {_name(hop)}, behind this host as seen from the importer, and "
        "what passes here would be dropped; have the peer connect to that one, or let the connection end."
    )
