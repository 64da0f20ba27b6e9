# SPDX-License-Identifier: MIT
"""The shell's keeping of redirects: routes that lead away, holdings that came, and their ends."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sockmi import durable
from sockmi.addresses import Endpoint, FourTuple
from sockmi.crashpoints import reached
from sockmi.engine.base import Kind, SocketFacts
from sockmi.journal import Change, Record
from sockmi.protocol.actions import Collect, ForgetHoldings, ForgetNotices, Reroute, SaveRoutes
from sockmi.protocol.events import CollectDone, ConnectionsEnded, RerouteDone
from sockmi.protocol.records import Holding, Route
from sockmi.redirect.base import Mode, Outbound
from sockmi.redirect.takeover import Takeover
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, by_mode, inbound, living, outbound, unwritable

_log = logging.getLogger(__name__)

# What the kernel says nothing of when it ends: until then late packets belong to the copy's host.
_SILENT_STATES = frozenset({5, 6})  # FIN-WAIT-2 (of which the same is left), TIME-WAIT: 60 s at most
_AT_ONCE_S = 0.2
_RESERVE_S = 0.05  # for a whole batch
_ABORTED_S = 1.0  # there may be many that one of these could have been
_LOST_S = 1.0  # who floods us with news has us look at all no more often


class Redirecting:
    """``routes`` and ``holdings`` (by connection id) are what the journal holds of them."""

    def __init__(  # noqa: PLR0917 - what it needs of the daemon
        self,
        shell: Shell,
        routes: dict[bytes, Route],
        holdings: dict[bytes, Holding],
        states_of: Callable[[Sequence[FourTuple]], list[int | None]],
        listeners: Callable[[], Counter[Endpoint]],
        is_waiting: Callable[[Holding], bool],
    ) -> None:
        """``states_of``: the kernel's state of each connection. ``is_waiting``: no application has it yet.

        ``listeners``: how many sockets of this host listen at each endpoint.
        """
        self._shell = shell
        self.routes = routes
        self.holdings = holdings
        self._states_of = states_of
        self._listeners = listeners
        self._is_waiting = is_waiting
        self._listening: dict[Endpoint, dict[bytes, None]] = {}
        self._by_inode: dict[int, bytes] = {}  # which of the listeners at one endpoint a socket was taken for
        self._missed: dict[tuple[Record, bytes], Endpoint] = {}
        self._watched: set[bytes] = set()
        self._destroyed: list[bytes] = []  # since the loop's last turn
        self._begun: dict[bytes, None] = {}
        self._lost = False
        self._aborted: set[tuple[Endpoint, IPv4Address | IPv6Address]] = set()
        # More than one only until an ended connection is forgotten whose tuple another has by now: the last.
        self._by_tuple: dict[FourTuple, tuple[bytes, ...]] = {}
        self._routes_by_tuple: dict[FourTuple, bytes] = {}
        self._known_as: dict[FourTuple, Endpoint] = {}
        self._ports: Counter[int] = Counter()  # this host's, of what is led away
        self._reserves = False
        self._takeover = shell.redirects.get(Mode.TAKEOVER)
        for direction, table in (("export", routes), ("import", holdings)):
            shell.metrics.redirects.labels(direction=direction).set_function(functools.partial(len, table))

    def led_from(self) -> set[IPv4Address | IPv6Address]:
        """Addresses of this host from which connections are led on."""
        return {
            route.local.address
            for route in self.routes.values()
            if route.local and route.place.mode not in (None, Mode.TAKEOVER)
        }

    def _leave_addresses(self, gone: Iterable[Route | Holding]) -> None:
        """What takeover has brought for connections that other redirects have led on, or brought back."""
        if isinstance(self._takeover, Takeover):
            by_others = (one for one in gone if one.place.mode not in (None, Mode.TAKEOVER))
            self._takeover.leave({one.local.address for one in by_others if one.local})

    # -- what is where

    def add_routes(self, routes: Iterable[Route]) -> None:
        """A chunk was committed."""
        routes = tuple(routes)
        for route in routes:
            self._set(route)
            if (one := outbound(route)) is not None:
                self._ports[one.tuple.local.port] += one.tuple not in self._routes_by_tuple
                self._routes_by_tuple[one.tuple] = route.connection
                self._reserve_soon()
        self.miss_listeners(_listeners_of(routes))

    def drop_route(self, connection: bytes) -> Route | None:
        """It came home, or has ended."""
        route = self.routes.pop(connection, None)
        if route is not None:
            self._unknow(route)
            if (one := self._led(route)) is not None:
                del self._routes_by_tuple[one.tuple]
                self._ports[one.tuple.local.port] -= 1
                if not self._ports[one.tuple.local.port]:
                    del self._ports[one.tuple.local.port]
                self._reserve_soon()
            self.listener_found((Record.ROUTE, connection))
        return route

    def _set(self, route: Route) -> None:
        if (old := self.routes.get(route.connection)) is not None:
            self._unknow(old)
        self.routes[route.connection] = route
        self._known_as.update(_known_as(route))

    def _unknow(self, route: Route) -> None:
        for ends, known in _known_as(route).items():
            if self._known_as.get(ends) == known:
                del self._known_as[ends]

    def known_as(self, ends: FourTuple) -> Endpoint | None:
        """What a peer (``local``) knows as the other end of what is translated to a host (``remote``)."""
        return self._known_as.get(ends)

    def _reserve_soon(self) -> None:
        if not self._reserves:
            self._reserves = True
            self._shell.loop.call_later(_RESERVE_S, self.reserve_ports)

    def reserve_ports(self) -> None:
        """New connections of this host shall not get the ports of those that are led away."""
        self._reserves = False
        try:
            self._shell.holds.reserve_ports(self._ports)
        except OSError as error:
            _log.warning("ports of connections that have left cannot be reserved: %s", error)

    def _led(self, route: Route) -> Outbound | None:
        """What the kernel has of a route; None if that is another connection's by now, or nothing is led."""
        one = outbound(route)
        ours = one is not None and self._routes_by_tuple.get(one.tuple) == route.connection
        return one if ours else None

    def add_holdings(self, holdings: Iterable[Holding]) -> None:
        """A chunk was activated. Sockets that nothing leads to are no concern of ours."""
        for holding in (one for one in holdings if one.durable):
            self.holdings[holding.connection] = holding
            if (lives := living(holding)) is not None:
                there = self._by_tuple.get(lives, ())
                if holding.connection not in there:
                    self._by_tuple[lives] = (*there, holding.connection)
            elif holding.kind is Kind.LISTENING and holding.local is not None:
                self._listening.setdefault(holding.local, {})[holding.connection] = None

    def drop_holding(self, connection: bytes) -> Holding | None:
        """It left again, or has ended."""
        holding = self.holdings.pop(connection, None)
        if holding is not None and (lives := living(holding)) in self._by_tuple:
            if left := tuple(one for one in self._by_tuple[lives] if one != connection):
                self._by_tuple[lives] = left
            else:
                del self._by_tuple[lives]
        if holding is not None and holding.local in self._listening:
            self._drop_listener(holding.local, connection)
        return holding

    def _drop_listener(self, local: Endpoint, connection: bytes) -> None:
        there = self._listening[local]
        there.pop(connection, None)
        if not there:
            del self._listening[local]
        for inode in [inode for inode, known in self._by_inode.items() if known == connection]:
            del self._by_inode[inode]

    def holding_of(self, facts: SocketFacts) -> Holding | None:
        """The holding of a socket of this host, if it was imported."""
        if facts.kind is Kind.LISTENING and facts.local is not None:
            return self._listener_of(facts.local, facts.inode)
        there = self._by_tuple.get(facts.tuple) if facts.tuple is not None else None
        return self.holdings[there[-1]] if there else None

    def is_led_here(self, connection: FourTuple) -> bool:
        """Whether its packets come from another host, its home, wherever its peer is; for any thread."""
        holdings = [self.holdings.get(one) for one in self._by_tuple.get(connection, ())]
        return any(
            one and one.home != self._shell.host_id and one.place.mode not in (None, Mode.TAKEOVER)
            for one in holdings
        )

    def _listener_of(self, local: Endpoint, inode: int) -> Holding | None:
        """One of those at its endpoint (SO_REUSEPORT), always the same: nothing tells them apart."""
        there = self._listening.get(local, {})
        if self._by_inode.get(inode) not in there:
            known = set(self._by_inode.values())
            free = (each for each in there if each not in known and not self._is_waiting(self.holdings[each]))
            if (chosen := next(free, None)) is None:
                return None
            self._by_inode[inode] = chosen
        return self.holdings[self._by_inode[inode]]

    # -- listeners that are not here

    def miss_listeners(self, missed: Mapping[tuple[Record, bytes], Endpoint]) -> None:
        """Who connects to them is not refused; by the record that says so (see ``listener_found``)."""
        if missed:
            self._shell.holds.miss_listeners(list(missed.values()))
            self._missed.update(missed)

    def miss_again(self) -> None:
        """All of them, whatever the kernel has."""
        self.miss_listeners(dict(self._missed))

    def miss_routes(self, routes: Iterable[Route]) -> None:
        """As ``add_routes`` will do, before their originals are closed: while they live it has no effect."""
        self._shell.holds.miss_listeners(list(_listeners_of(routes).values()))

    def listener_found(self, record: tuple[Record, bytes]) -> None:
        """It is here and lives, or is nowhere any more."""
        if (local := self._missed.pop(record, None)) is not None:
            self.look_for_listeners([local])

    def look_for_listeners(self, no_more: Iterable[Endpoint]) -> None:
        """Those endpoints are answered again, if none of what is still missed has them."""
        gone = list(no_more)
        ports = {local.port for local in gone}
        left = [local for local in self._missed.values() if local.port in ports]
        self._shell.holds.miss_listeners(left, gone)

    def suspend(self, connections: Iterable[bytes], *, decided: bool) -> None:
        """They come back: out of the kernel, though not yet out of the journal.

        What takeover leads away stays so until that is ``decided``: their address is elsewhere, and who sends
        to it must not hear of two hosts that have it.
        """
        routes = [
            route
            for one in connections
            if (route := self.routes.get(one)) and (decided or route.place.mode is not Mode.TAKEOVER)
        ]
        for mode, group in by_mode((route.place.mode, route) for route in routes).items():
            self._shell.redirects[mode].take_back([one.tuple for route in group if (one := outbound(route))])

    def lead_again(self, connections: Iterable[bytes]) -> None:
        """The inverse of ``suspend``; connections that have no route here are skipped."""
        routes = [route for one in connections if (route := self.routes.get(one))]
        for mode, group in by_mode((route.place.mode, route) for route in routes).items():
            self._shell.redirects[mode].send_away([one for route in group if (one := outbound(route))])

    def admit(self, holdings: Iterable[Holding]) -> None:
        """What came to this host is received here, under the name that the peer knows; holds are lifted."""
        for mode, group in by_mode((holding.place.mode, holding) for holding in holdings).items():
            self._shell.redirects[mode].admit([one for holding in group if (one := inbound(holding))])

    def expect(self, holding: Holding) -> None:
        """What waits for its application: its peer's packets come to this host, where they are held."""
        mode, one = holding.place.mode, inbound(holding)
        if mode not in self._shell.redirects or one is None:
            return
        try:
            self._shell.redirects[mode].expect([one])
        except Exception:  # it goes on waiting; its application will be told if that cannot be mended
            _log.exception("what the peer of %s sends does not come here now", one.tuple)

    def left_by_takeover(self, connection: bytes) -> bool:
        """Whether its address is no more this host's."""
        route = self.routes.get(connection)
        return route is not None and route.place.mode is Mode.TAKEOVER

    def route_of(self, connection: FourTuple) -> Route | None:
        """The route that leads a connection's packets away."""
        found = self._routes_by_tuple.get(connection)
        return self.routes.get(found) if found else None

    # -- the core's actions

    def carry_out(self) -> dict[type, Callable[[Any], None]]:
        """What carries out which action of the core."""
        return {
            Reroute: self.reroute,
            SaveRoutes: self.save_routes,
            Collect: self.collect,
            ForgetNotices: self.forget_notices,
            ForgetHoldings: self.forget_holdings,
        }

    def reroute(self, action: Reroute) -> None:
        """Lead connections straight to their new holders."""
        results: list[tuple[bytes, int, Refusal | None]] = []
        change = Change()
        former: dict[bytes, Route] = {}
        for route in action.routes:
            refusal = self._reroute_one(route)
            if refusal is None:
                former.setdefault(route.connection, self.routes[route.connection])
                self._set(route)
                durable.keep(change, [route])
            results.append((route.connection, route.hop, refusal))
        reached("reroute.led")
        try:
            if change.keep:
                self._shell.journal.write(change)
        except Exception as error:  # a full disk: as before, and whoever asked keeps its own redirect
            _log.exception("the journal cannot be written; %d redirects are led back", len(former))
            self._lead_back(former.values())
            why_not = unwritable(error)
            results = [(connection, hop, refusal or why_not) for connection, hop, refusal in results]
        reached("reroute.journalled")
        self._shell.dispatch(RerouteDone(tuple(results)))

    def _lead_back(self, former: Iterable[Route]) -> None:
        """The inverse of ``_reroute_one``; raises if it fails, as then nobody knows who leads where."""
        for route in former:
            if (refusal := self._reroute_one(route)) is not None:
                raise refusal
            self._set(route)

    def _reroute_one(self, route: Route) -> Refusal | None:
        old, new = self.routes.get(route.connection), outbound(route)
        if old is not None and old.kind is Kind.LISTENING:
            return None  # no packet is led to it; only who has it changes
        if old is None or new is None or route.place.mode is None:
            return Refusal(Code.REDIRECT, "This host has no redirect for that connection.")
        redirect = self._shell.redirects.get(route.place.mode)
        if redirect is None:
            return Refusal(Code.NO_REDIRECT, f"The redirect {route.place.mode} is not enabled here.")
        if old.place.mode is Mode.TAKEOVER and route.place.mode is not Mode.TAKEOVER:
            return Refusal(
                Code.NO_REDIRECT, f"Takeover has led {new.tuple.local.address} away from this host."
            )
        try:
            if obstacle := redirect.reachable(new.importer.address):
                return Refusal(Code.NO_REDIRECT, obstacle)
            if old.place.mode is route.place.mode:
                redirect.reroute([new])
            else:
                # New before old, so that no packet meets neither; then again, for what both have.
                redirect.send_away([new])
                if old.place.mode is not None:
                    self._shell.redirects[old.place.mode].relinquish([new.tuple])
                redirect.send_away([new])
        except Exception as error:
            return Refusal(Code.REDIRECT, f"The redirect could not be changed: {error}.")
        return None

    def save_routes(self, action: SaveRoutes) -> None:
        """Journal routes whose bookkeeping changed."""
        change = Change()
        durable.keep(change, action.routes)
        for route in action.routes:
            self._set(route)
        self._shell.journal.write(change)

    def collect(self, action: Collect) -> None:
        """The connection has ended, or is led past this host: stop diverting."""
        change = Change()
        gone = [
            route
            for route in action.routes
            if (known := self.routes.get(route.connection)) is not None and known.hop == route.hop
        ]
        for mode, routes in by_mode((route.place.mode, route) for route in gone).items():
            tuples = [
                one.tuple for route in routes if (one := self._led(route)) and one.tuple not in self._by_tuple
            ]
            self._shell.redirects[mode].expire(tuples, self._shell.config.timing.linger_s)
        reached("collect.expired")
        for route in gone:
            self.drop_route(route.connection)
        self._leave_addresses(gone)
        durable.drop(change, gone)
        if change.drop:
            self._shell.note(change)
        reached("collect.journalled")
        self._shell.dispatch(CollectDone(tuple((route.connection, route.hop) for route in action.routes)))

    def forget_notices(self, action: ForgetNotices) -> None:
        """The home has answered."""
        names = [durable.notice_name(connection, hop) for connection, hop in action.notices]
        self._shell.note(Change(drop=[(Record.NOTICE, name) for name in names]))

    def forget_holdings(self, action: ForgetHoldings) -> None:
        """Ended and collected everywhere: remove the translation."""
        change = Change()
        gone = []
        for connection, hop in action.holdings:
            known = self.holdings.get(connection)
            if known is not None and known.hop == hop:
                self.drop_holding(connection)
                gone.append(known)
        for mode, holdings in by_mode((one.place.mode, one) for one in gone).items():
            self._shell.redirects[mode].evict(
                [one for holding in holdings if (one := inbound(holding)) and self._is_free(one.tuple)]
            )
        self._leave_addresses(gone)
        reached("forget-holdings.evicted")
        durable.drop(change, gone)
        if change.drop:
            self._shell.note(change)
        reached("forget-holdings.journalled")

    def _is_free(self, connection: FourTuple) -> bool:
        """Whether no other connection has come with this tuple, or left by now."""
        return connection not in self._by_tuple and connection not in self._routes_by_tuple

    # -- ends

    def destroyed(self, connection: FourTuple) -> None:
        """The kernel has destroyed a socket; if it was imported, see what is left of it."""
        known = self._by_tuple.get(connection, ())
        if known and not self._destroyed:
            self._shell.loop.call_later(0, self._look_at_destroyed)
        self._destroyed += known

    def _look_at_destroyed(self) -> None:
        """All that has come in one turn of the loop is looked at together."""
        destroyed, self._destroyed = self._destroyed, []
        self._shell.loop.call_later(_AT_ONCE_S, self._look, destroyed)

    def aborted(self, local: Endpoint, remote: IPv4Address | IPv6Address) -> None:
        """The kernel has destroyed a connection of this host that its owner had reset."""
        if self.holdings and not self._aborted:
            self._shell.loop.call_later(_ABORTED_S, self._look_at_aborted)
        if self.holdings:
            self._aborted.add((local, remote))

    def _look_at_aborted(self) -> None:
        aborted, self._aborted = self._aborted, set()
        there = [known for t, known in self._by_tuple.items() if (t.local, t.remote.address) in aborted]
        self._look([each for known in there for each in known])

    def begun_anew(self, connection: FourTuple) -> None:
        """Its peer begins a new one with the same ends, and here is no more of it than TIME-WAIT.

        So the peer waits for nothing; it repeats its SYN, which the connection's home is to answer. Of many
        SYNs that are read together the kernel is asked once.
        """
        known = self._by_tuple.get(connection, ())
        if known and not self._begun:
            self._shell.loop.call_later(0, self._look_at_begun)
        self._begun.update(dict.fromkeys(known))

    def _look_at_begun(self) -> None:
        begun, self._begun = self._begun, {}
        self._look(begun, _SILENT_STATES)

    def listener_destroyed(self, local: Endpoint) -> None:
        """The kernel has destroyed a socket that was not connected."""
        if local in self._listening:
            self._shell.loop.call_later(_AT_ONCE_S, self.look_at_listeners)

    def news_lost(self) -> None:
        """News of the kernel were lost."""
        if not self._lost:
            self._lost = True
            self._shell.loop.call_later(_LOST_S, self.look_at_all)

    def look_at_all(self) -> None:
        """After a restart, or when news of the kernel were lost."""
        self._lost = False
        self._look([each for there in self._by_tuple.values() for each in there])
        self.look_at_listeners()

    def look_at_listeners(self) -> None:
        """End the listeners that are no more; a socket at the same endpoint that listens stands for one."""
        if not self._listening:
            return
        try:
            alive = self._listeners()
        except OSError:
            _log.exception("listeners cannot be counted; looking again later")
            return
        ended: list[bytes] = []
        for local, there in self._listening.items():
            taken = [each for each in there if not self._is_waiting(self.holdings[each])]
            ended += taken[: max(0, len(taken) - alive[local])]
        if ended:
            self._shell.dispatch(ConnectionsEnded(tuple(ended)))

    def _look(self, connections: Iterable[bytes], over: Collection[int] = ()) -> None:
        """End those that are no more, or are in a state of ``over``."""
        lives: dict[bytes, FourTuple] = {}
        for connection in connections:
            holding = self.holdings.get(connection)
            if holding is not None and not self._is_waiting(holding) and (there := living(holding)):
                lives[connection] = there
        states, unanswered = self._ask(lives)
        ended = tuple(one for one, state in states.items() if state is None or state in over)
        if ended:
            self._shell.dispatch(ConnectionsEnded(ended))
        silent = [one for one, state in states.items() if state in _SILENT_STATES and one not in ended]
        later = [one for one in silent + unanswered if one not in self._watched]
        if later:
            self._watched.update(later)
            self._shell.loop.call_later(self._shell.config.timing.look_again_s, self._look_again, later)

    def _ask(self, lives: dict[bytes, FourTuple]) -> tuple[dict[bytes, int | None], list[bytes]]:
        """The state of each, and those of which the kernel says nothing: no other waits for them."""
        try:
            return dict(zip(lives, self._states_of(list(lives.values())), strict=True)), []
        except OSError as error:
            if len(lives) == 1 or isinstance(error, TimeoutError):  # each would wait as long
                _log.warning("%d ended connections cannot be looked at (%s); later", len(lives), error)
                return {}, list(lives)
        named = list(lives.items())
        half = len(named) // 2
        first, second = self._ask(dict(named[:half])), self._ask(dict(named[half:]))
        return first[0] | second[0], first[1] + second[1]

    def _look_again(self, connections: list[bytes]) -> None:
        self._watched.difference_update(connections)
        self._look(connections)


def _known_as(route: Route) -> dict[FourTuple, Endpoint]:
    """Peer and importer of what is led away under another name, and the one that the peer knows."""
    one = outbound(route)
    if one is None or route.place.mode not in (Mode.NAT, Mode.IPTABLES):
        return {}
    return {FourTuple(one.tuple.remote, one.importer): one.tuple.local}


def _listeners_of(routes: Iterable[Route]) -> dict[tuple[Record, bytes], Endpoint]:
    return {
        (Record.ROUTE, route.connection): route.local
        for route in routes
        if route.kind is Kind.LISTENING and route.local is not None
    }
