# SPDX-License-Identifier: MIT
"""Where a copy will live on this host: which redirect leads to it, at which address and port."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Kind, Needs, Placement
from sockmi.peers import Peers, at_both, at_importer, serving_importer
from sockmi.ports import Ports
from sockmi.protocol.records import Item, MigrationId, Place
from sockmi.redirect.base import Mode
from sockmi.redirect.routes import ARPHRD_ETHER, RTN_LOCAL, RTN_UNICAST
from sockmi.redirect.ways import Way
from sockmi.refusal import Code, Refusal

_PATH_TTL_S = 2.0
_PORT_TRIES = 64
_EPHEMERAL = (32768, 60999)
_PRESERVING = frozenset({Mode.FORWARD, Mode.TAKEOVER})
_DIRECT = Refusal(
    Code.NO_REDIRECT,
    "Its application looks at the TTL of what comes (IP_MINTTL, IPV6_MINHOPCOUNT), or has set its own to 1, "
    "and redirects that forward lower it; allow takeover (redirect.modes) on both hosts.",
)


class Placing:
    """Chooses places, and keeps those it has given until they are taken or forgotten."""

    def __init__(
        self,
        modes: Sequence[Mode],
        path_to: Callable[[IPv4Address | IPv6Address], Way | None],
        states_of: Callable[[Sequence[FourTuple]], list[int | None]],
        bury: Callable[[FourTuple], bool],
        obstacle: Callable[[Needs, str, Placement, Endpoint | None], Refusal | None],
        *,
        is_led: Callable[[str], bool],
        peers: Peers,
    ) -> None:
        """``path_to``: this host's route to an address. ``states_of``: of connections; None: not here.

        ``bury``: ends one that is in TIME-WAIT; False if it is not, or this kernel cannot.
        ``obstacle``: why this host could not restore such a socket at a place (engine/trial.py).
        ``is_led``: whether what comes in by a device for another host's address would be delivered here.
        ``peers`` knows for a while what it was asked about together.
        """
        self._modes = frozenset(modes)
        self._path_to = path_to
        self._states_of = states_of
        self._bury = bury
        self._obstacle = obstacle
        self._is_led = is_led
        self._peers = peers
        self._paths: dict[IPv4Address | IPv6Address, tuple[float, Way | None]] = {}
        self._led: dict[str, tuple[float, bool]] = {}
        self._given: dict[MigrationId, FourTuple] = {}
        self._taken: set[FourTuple] = set()
        self._absent: frozenset[FourTuple] = frozenset()  # as long as `asked_at_once` lasts
        self._ports = Ports()

    @contextlib.contextmanager
    def asked_at_once(self, items: Collection[Item], modes: Sequence[Mode]) -> Iterator[None]:
        """While their places are chosen: one question to the kernel about all that they will likely be."""
        self._peers.here({item.remote.address for item in items if item.remote})
        preserved = bool(self._modes & _PRESERVING & set(modes))
        with contextlib.suppress(OSError):  # then each is asked for by itself, and fails by itself
            likely = [one for item in items if (one := self._likely(item, preserved=preserved))]
            states = zip(likely, self._states_of(likely), strict=True)
            self._absent = frozenset(one for one, state in states if state is None)
        try:
            yield
        finally:
            self._absent = frozenset()

    def _likely(self, item: Item, *, preserved: bool) -> FourTuple | None:
        if item.kind is not Kind.CONNECTED or item.local is None or item.remote is None:
            return None
        path = None if preserved else self._path(item.local.address)
        source = path.source if path else None
        return FourTuple(Endpoint(source, item.local.port) if source else item.local, item.remote)

    def choose(self, item: Item, modes: Sequence[Mode], former: Endpoint | None = None) -> Place:
        """A place for one socket; raises Refusal if there is none, or the socket could not live there.

        ``former``: where this host had the connection before it led it away. Others still send
        there, so it must be there again.
        """
        place = self._choose(item, modes, former)
        refusal = self._obstacle(item.needs, item.state, self.placement(item, place), item.remote)
        if refusal is None:
            return place
        self.forget(item.migration)
        raise refusal

    def _choose(self, item: Item, modes: Sequence[Mode], former: Endpoint | None) -> Place:
        if item.kind is not Kind.CONNECTED or item.local is None or item.remote is None:
            return self._bind(item)
        origin = item.origin or item.local
        if self._peers.here([item.remote.address]):
            if not (serving := serving_importer(modes, item.remote.version)):
                raise at_importer(item.remote.address, modes)
            modes = serving
        if item.needs.direct and not self._is_local(origin.address):
            modes = [mode for mode in modes if mode is Mode.TAKEOVER]
            if not modes:
                raise _DIRECT
        if former is None and self._is_local(origin.address):
            if item.hop == 1 and Mode.TAKEOVER not in self._modes.intersection(modes):
                raise Refusal(Code.NO_REDIRECT, at_both(origin.address))
            former = origin
        if former is not None:
            return self._return(item, modes, former, item.remote)
        path = self._path(item.local.address)
        for mode in modes:
            if mode in self._modes and (place := self._try(item, origin, mode, path)):
                return place
        raise Refusal(
            Code.NO_REDIRECT,
            f"No redirect of {', '.join(modes)} can lead packets for {item.local} to this host; "
            "allow nat (redirect.modes) on both, or use a host on the same segment.",
        )

    def _bind(self, item: Item) -> Place:
        if self._ports.taken(item):
            raise Refusal(
                Code.PORT_TAKEN,
                f"{item.local} is promised to another socket that moves to the importer, or waits there for "
                "its application; move it to another host, or wait until that one has ended",
            )
        self.forget(item.migration)
        self._ports.keep(item)
        return Place()

    def _return(self, item: Item, modes: Sequence[Mode], former: Endpoint, remote: Endpoint) -> Place:
        """Back to where it has been: unchanged if its address still is the same, else by translation."""
        mine = self._is_local(former.address)
        if former == item.local:
            fitting = [mode for mode in modes if mode in _PRESERVING]
            path = self._path(former.address)
            there = path if path and self._delivers(path.device) else None
            address = former.address if mine else there.source if there else None
        else:
            fitting = [mode for mode in modes if mode not in _PRESERVING] if mine else []
            address = former.address
        if not fitting or address is None:
            raise Refusal(
                Code.NO_REDIRECT,
                f"The connection was at {former} here and must be there again, but none of "
                f"{', '.join(modes)} can lead packets for {item.local} to it; export it to another host.",
            )
        connection = FourTuple(former, remote)
        self._free(connection)
        return self._keep(item, _place(address, former.port, fitting[0]), connection)

    def _try(self, item: Item, origin: Endpoint, mode: Mode, path: Way | None) -> Place | None:
        assert item.local is not None and item.remote is not None
        if path is None or path.kind != RTN_UNICAST or path.source is None:
            return None
        if mode in _PRESERVING:
            direct = path.gateway is None and path.device_type == ARPHRD_ETHER
            if not direct or origin != item.local or not self._delivers(path.device):
                return None
            behind = self._peers.neighbour_by(item.remote.address)
            if mode is Mode.FORWARD and behind and not self._delivers(behind):
                return None
            connection = FourTuple(item.local, item.remote)
            self._free(connection)
            return self._keep(item, _place(path.source, item.local.port, mode), connection)
        for port in _ports(item.local.port):
            connection = FourTuple(Endpoint(path.source, port), item.remote)
            if not self._is_taken(connection):
                return self._keep(item, Place(connection.local, mode), connection)
        raise Refusal(
            Code.PORT_TAKEN, f"The importer found no free port on {path.source} towards {item.remote}."
        )

    def placement(self, item: Item, place: Place) -> Placement:
        """How the engine must bind the copy."""
        if place.mode is None or item.local is None:
            transparent = item.local is not None and not self._is_local(item.local.address)
            return Placement(item.local, transparent)
        if place.mode in _PRESERVING:
            return Placement(item.local, not self._is_local(item.local.address))
        return Placement(place.endpoint, False)

    def keep(self, item: Item, connection: FourTuple | None) -> None:
        """A place that was given, be it before a restart; ``connection``: as it lives there, if it is one."""
        if connection is None:
            self._ports.keep(item)
        else:
            self._given[item.migration] = connection
            self._taken.add(connection)

    def stranger(self, migration: MigrationId) -> FourTuple | None:
        """The connection that has a place here, as it will live here, if none of its packets pass here yet.

        They might, if this host is a router between its peer and where it lives now.
        """
        connection = self._given.get(migration)
        if connection is None or self._is_local(connection.local.address):
            return connection
        there, peer = self._path(connection.local.address), self._path(connection.remote.address)
        return connection if there and peer and there.device == peer.device else None

    def device_to(self, address: IPv4Address | IPv6Address) -> str | None:
        """The device by which this host reaches an address; None if there is no way."""
        path = self._path(address)
        return path.device if path else None

    def forget(self, migration: MigrationId) -> None:
        """Give up a place (the copy is there, or will not come)."""
        if (connection := self._given.pop(migration, None)) is not None:
            self._taken.discard(connection)
        self._ports.forget(migration)

    def _keep(self, item: Item, place: Place, connection: FourTuple) -> Place:
        self.forget(item.migration)
        self.keep(item, connection)
        return place

    def _free(self, connection: FourTuple) -> None:
        """See that there is none yet: one in TIME-WAIT is of the past, as its peer has gone on to another."""
        if connection in self._taken:
            raise Refusal(
                Code.TUPLE_TAKEN,
                f"{connection} has a place at the importer since another attempt, of which the importer "
                "does not know yet what became; that ends by itself, try again in some seconds.",
            )
        if self._exists(connection) and not self._bury(connection):
            raise Refusal(
                Code.TUPLE_TAKEN,
                f"{connection} exists at the importer already; close it there first (one in TIME-WAIT "
                "ends by itself within a minute).",
            )

    def _exists(self, connection: FourTuple) -> bool:
        return connection not in self._absent and self._states_of([connection])[0] is not None

    def _is_taken(self, connection: FourTuple) -> bool:
        return connection in self._taken or self._exists(connection)

    def _is_local(self, address: IPv4Address | IPv6Address) -> bool:
        if address.is_unspecified:
            return True
        path = self._path(address)
        return path is not None and path.kind == RTN_LOCAL

    def _delivers(self, device: str) -> bool:
        now = time.monotonic()
        known = self._led.get(device)
        if known is None or known[0] < now:
            known = self._led[device] = (now + _PATH_TTL_S, self._is_led(device))
        return known[1]

    def _path(self, address: IPv4Address | IPv6Address) -> Way | None:
        now = time.monotonic()
        known = self._paths.get(address)
        if known is None or known[0] < now:
            if len(self._paths) > 4096:
                self._paths.clear()
            known = self._paths[address] = (now + _PATH_TTL_S, self._path_to(address))
        return known[1]


@functools.lru_cache(maxsize=256)
def _place(address: IPv4Address | IPv6Address, port: int, mode: Mode) -> Place:
    """One for all connections that have it: their redirects keep it."""
    return Place(Endpoint(address, port), mode)


def _ports(preferred: int) -> list[int]:
    """The exporter's own port first: it is what operators expect to see."""
    return [preferred, *(random.randint(*_EPHEMERAL) for _turn in range(_PORT_TRIES))]  # noqa: S311
