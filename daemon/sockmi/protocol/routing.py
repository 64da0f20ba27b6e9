# SPDX-License-Identifier: MIT
"""Redirects over hops and to the end of the connection, for the home, waypoints and holders.

- After a further hop the former holder asks the home to lead the connection straight to the
  new holder (REROUTE, fenced: only the present holder may move it, by exactly one hop), and
  then drops its own redirect.
- When a connection ends, its holder tells the home and its exporter (ENDED), which collect.
- Lost knowledge is repaired by AUDIT: who leads packets away asks the holder, now and then,
  whether it still has the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from sockmi.protocol import actions, events, messages
from sockmi.protocol.context import Context
from sockmi.protocol.messages import Channel, Hop, Move, Verdict
from sockmi.protocol.records import ConnectionId, Holding, HostId, Notice, Route
from sockmi.protocol.tables import ROUTING, Routing, UndeclaredTransition, step

MOVES_MAX = 16  # per REROUTE
HOPS_MAX = 48  # per REROUTED, ENDED, COLLECTED, AUDIT, AUDITED
_PAGES_PER_TURN = 16

V = TypeVar("V")


class _Outbox(Generic[V]):
    """What one host after another still has to be told; repeated until it is settled."""

    def __init__(
        self, context: Context, name: str, page_max: int, message: Callable[[tuple[V, ...]], messages.Message]
    ) -> None:
        self._context, self._name, self._page_max, self._message = context, name, page_max, message
        self.pending: dict[HostId, dict[Hop, V]] = {}
        self._attempts: dict[HostId, int] = {}

    def add(self, host: HostId, key: Hop, value: V) -> None:
        """Tell ``host``, soon (with whatever else is added at this time) and until settled."""
        self.pending.setdefault(host, {})[key] = value
        self._attempts[host] = 0
        self._context.timers.set((self._name, host), self._context.now)

    def settle(self, host: HostId, key: Hop) -> V | None:
        """It has answered for ``key``."""
        waiting = self.pending.get(host)
        if waiting is None:
            return None
        value = waiting.pop(key, None)
        if not waiting:
            self.drop(host)
        return value

    def drop(self, host: HostId) -> dict[Hop, V]:
        """Do not tell ``host`` any more."""
        self._attempts.pop(host, None)
        self._context.timers.cancel((self._name, host))
        return self.pending.pop(host, {})

    def turn(self, host: HostId) -> None:
        """Send some pages, oldest first; come back to the rest and for the answers."""
        waiting = self.pending[host]
        for _turn in range(min(_PAGES_PER_TURN, -(-len(waiting) // self._page_max))):
            page = []
            for key in list(_first(waiting, self._page_max)):
                value = waiting.pop(key)
                waiting[key] = value  # to the end of the queue
                page.append(value)
            self._context.datagram(host, self._message(tuple(page)))
        attempt = self._attempts[host]
        self._attempts[host] = attempt + 1
        self._context.timers.set((self._name, host), self._context.now + self._context.backoff(attempt))


def _first(keys: Iterable[V], count: int) -> Iterable[V]:
    return (key for key, _unused in zip(keys, range(count), strict=False))


def _pages(hops: Sequence[V], size: int) -> Iterable[tuple[V, ...]]:
    return (tuple(hops[start : start + size]) for start in range(0, len(hops), size))


class Routes:
    """See the module docstring. The exporter and the importer tell it what left and what came."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._routes: dict[ConnectionId, Route] = {}
        self._states: dict[ConnectionId, Routing] = {}  # of those that are not just ROUTED
        self._moving: dict[ConnectionId, Route] = {}  # what a pending Reroute will make of a route
        self._by_holder: dict[HostId, dict[ConnectionId, None]] = {}
        self._holdings: dict[ConnectionId, Holding] = {}
        self._ending: dict[ConnectionId, tuple[int, set[HostId]]] = {}
        # Who gets COLLECTED, for which of his hops, after the CollectDone of which of ours.
        self._replies: dict[Hop, set[tuple[HostId, Hop]]] = {}
        self._noticed: set[ConnectionId] = set()
        self._notices: _Outbox[Move] = _Outbox(context, "reroute", MOVES_MAX, messages.Reroute)
        self._endings: _Outbox[Hop] = _Outbox(context, "ended", HOPS_MAX, messages.Ended)
        self._ended_early: set[ConnectionId] = set()  # before the ActivateDone that made them ours
        self.arriving: Callable[[ConnectionId], bool] = lambda _unused: False
        self.activating: Callable[[ConnectionId], bool] = lambda _unused: False

    # --- the other roles -------------------------------------------------------------------

    def next_hop(self, connection: ConnectionId) -> int | None:
        """The hop that an export from here would make; None if the connection is not here."""
        holding = self._holdings.get(connection)
        if holding is not None:
            return None if connection in self._ending else holding.hop + 1
        return None if connection in self._routes else 1

    def known_hop(self, connection: ConnectionId) -> int | None:
        """The highest hop of which this host knows, or None."""
        holding, route = self._holdings.get(connection), self._routes.get(connection)
        hops = [known.hop for known in (holding, route) if known is not None]
        return max(hops, default=None)

    def upstream(self, connection: ConnectionId) -> HostId | None:
        """The host from which the connection came here."""
        holding = self._holdings.get(connection)
        return holding.exporter if holding is not None else None

    def departed(self, route: Route) -> None:
        """Committed: its packets are led away from here now."""
        if not route.durable:
            return
        self._holdings.pop(route.connection, None)
        self._stop_ending(route.connection)
        self._put(route)
        if route.home != self._context.host:
            self._notice(Notice(route.connection, route.hop, route.home, route.holder, route.place))
        self._audit_later()

    def returning(self, holdings: Iterable[Holding]) -> tuple[ConnectionId, ...]:
        """Those that this host itself leads away: their activation takes the route back."""
        back = tuple(one.connection for one in holdings if one.connection in self._routes)
        for connection in back:
            self._step(connection, "CONFIRM of its return")
            self._moving.pop(connection, None)
        return back

    def arrived(self, holding: Holding, alive: bool) -> None:
        """Activated here, or it failed and is no more."""
        connection = holding.connection
        if connection in self._routes:
            self._step(connection, "activated")
            self._remove(connection)
        if not holding.durable:
            return
        self._holdings[connection] = holding
        early = connection in self._ended_early
        self._ended_early.discard(connection)
        if early or not alive:
            self._end(connection)  # a crash may lose this: AUDIT repairs it

    # --- the shell -------------------------------------------------------------------------

    def started(self, event: events.Started) -> None:
        """Take up what the journal holds."""
        for holding in event.holdings:
            self._holdings[holding.connection] = holding
        for route in event.routes:
            self._put(route)
        for notice in event.notices:
            self._notice(notice)
        self._audit_later()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be told or done now (routes and holdings may stay for long)."""
        return not (self._notices.pending or self._endings.pending or self._states)

    @property
    def busy(self) -> bool:
        """Whether the shell is still to answer something."""
        return bool(self._states)

    @property
    def routes(self) -> dict[ConnectionId, Route]:
        """What this host leads away (read only)."""
        return self._routes

    @property
    def holdings(self) -> dict[ConnectionId, Holding]:
        """What has come here (read only)."""
        return self._holdings

    def reroute_done(self, event: events.RerouteDone) -> None:
        """Answer the former holders: of a pin when they ask again, as it has been journalled by then."""
        verdicts: dict[HostId, list[tuple[Hop, Verdict]]] = {}
        pinned: list[Route] = []
        for connection, hop, refusal in event.results:
            moved = self._moving.get(connection)
            if moved is None or moved.hop != hop:
                continue  # it has come back meanwhile
            del self._moving[connection]
            former = self._routes[connection]
            self._step(connection, "rerouted")
            if refusal is not None:
                pinned.append(self._pin(former))
                continue
            self._put(moved)
            verdicts.setdefault(former.holder, []).append((Hop(connection, hop), Verdict.DONE))
        if pinned:
            self._context.out.append(actions.SaveRoutes(tuple(pinned)))
        for host, answers in verdicts.items():
            for page in _pages(answers, HOPS_MAX):
                self._context.datagram(host, messages.Rerouted(page))

    def collect_done(self, event: events.CollectDone) -> None:
        """Answer those who said that it had ended."""
        answers: dict[HostId, list[Hop]] = {}
        for connection, hop in event.routes:
            route = self._routes.get(connection)
            if route is not None and route.hop == hop and self._state(connection) is Routing.COLLECTING:
                self._step(connection, "collected")
                self._remove(connection)
            for host, ended in self._replies.pop(Hop(connection, hop), ()):
                answers.setdefault(host, []).append(ended)
        for host, hops in answers.items():
            for page in _pages(hops, HOPS_MAX):
                self._context.datagram(host, messages.Collected(page))

    def connections_ended(self, event: events.ConnectionsEnded) -> None:
        """Tell whoever might still lead packets here."""
        for connection in event.connections:
            if self.activating(connection):
                self._ended_early.add(connection)
            elif connection in self._holdings and connection not in self._ending:
                self._end(connection)

    def forget(self, host: HostId) -> None:
        """``host`` will never come back."""
        dropped = self._notices.drop(host)
        for key in dropped:
            self._noticed.discard(key.connection)
        if dropped:
            self._context.out.append(actions.ForgetNotices(tuple(dropped)))
        for hop in self._endings.drop(host):
            self._ended_at(hop, host)
        self._collect([self._routes[one] for one in self._by_holder.get(host, ())])

    @property
    def awaited(self) -> set[HostId]:
        """Hosts that are still to be told something, or to which connections are led."""
        return {*self._notices.pending, *self._endings.pending, *self._by_holder}

    def timer(self, key: tuple[object, ...]) -> bool:
        """A deadline of this role; False if ``key`` is none."""
        match key:
            case ("reroute", bytes() as host):
                self._notices.turn(host)
            case ("ended", bytes() as host):
                self._endings.turn(host)
            case ("audit",):
                self._audit()
            case _:
                return False
        return True

    # --- messages --------------------------------------------------------------------------

    def on_reroute(self, source: HostId, message: messages.Reroute, _unused: Channel) -> None:
        """Home: lead them to their new holders."""
        verdicts: list[tuple[Hop, Verdict]] = []
        moved: list[Route] = []
        for move in message.moves:
            verdict = self._judge(source, move, moved)
            if verdict is not None:
                verdicts.append((Hop(move.connection, move.hop), verdict))
        if moved:
            self._context.out.append(actions.Reroute(tuple(moved)))
        for page in _pages(verdicts, HOPS_MAX):
            self._context.datagram(source, messages.Rerouted(page))

    def _judge(self, source: HostId, move: Move, moved: list[Route]) -> Verdict | None:
        """The verdict, or None: not now (it is asked again)."""
        known = self.known_hop(move.connection)
        if self.arriving(move.connection):
            if known is not None and known >= move.hop:
                return Verdict.DONE
        elif known is None:
            return Verdict.GONE
        elif known >= move.hop:
            return Verdict.DONE
        route = self._routes.get(move.connection)
        if route is None or self._state(move.connection) is not Routing.ROUTED:
            return None
        if route.home != self._context.host:
            return None  # not for us: who is no home drops its redirect, and never moves it
        if route.pinned:
            return Verdict.REFUSED
        if route.holder != source or move.hop != route.hop + 1 or move.holder == self._context.host:
            return None  # an earlier move is still to be told, or it is on its way back to us
        self._step(move.connection, "REROUTE")
        new = Route(
            route.connection, route.migration, route.kind, move.hop, route.home, move.holder,
            move.place, route.local, route.remote, route.origin, route.upstream,
        )  # fmt: skip
        self._moving[move.connection] = new
        moved.append(new)
        return None

    def on_rerouted(self, source: HostId, message: messages.Rerouted, _unused: Channel) -> None:
        """Former holder: the home leads past us; our own redirect may go, or has to stay."""
        settled: list[tuple[ConnectionId, int]] = []
        gone: list[Route] = []
        pinned: list[Route] = []
        for hop, verdict in message.verdicts:
            if self._notices.settle(source, hop) is None:
                continue
            self._noticed.discard(hop.connection)
            settled.append((hop.connection, hop.hop))
            route = self._routes.get(hop.connection)
            if route is None or route.hop != hop.hop:
                continue
            if verdict is Verdict.REFUSED:
                pinned.append(self._pin(route))
            else:
                gone.append(route)
        if pinned:
            self._context.out.append(actions.SaveRoutes(tuple(pinned)))
        self._collect(gone)
        if settled:
            self._context.out.append(actions.ForgetNotices(tuple(settled)))

    def on_ended(self, source: HostId, message: messages.Ended, _unused: Channel) -> None:
        """Collect: what has ended at some hop needs none of the redirects made up to that hop.

        It need not be the sender that we lead it to: a home that could not follow (its redirect is
        pinned) knows an early hop for ever.
        """
        done: list[Hop] = []
        gone: list[Route] = []
        for hop in message.hops:
            route = self._routes.get(hop.connection)
            if route is None or route.hop > hop.hop:
                done.append(hop)
            elif self._state(hop.connection) in (Routing.ROUTED, Routing.COLLECTING):
                self._replies.setdefault(Hop(route.connection, route.hop), set()).add((source, hop))
                gone.append(route)
            # else: the shell is changing it; we are told again
        self._finish(gone)
        for page in _pages(done, HOPS_MAX):
            self._context.datagram(source, messages.Collected(page))

    def on_collected(self, source: HostId, message: messages.Collected, _unused: Channel) -> None:
        """One host less that leads packets here."""
        for hop in message.hops:
            if self._endings.settle(source, hop) is not None:
                self._ended_at(hop, source)

    def on_audit(self, source: HostId, message: messages.Audit, _unused: Channel) -> None:
        """Say what is not here. What is on its way, either way, is here."""
        gone = tuple(
            hop for hop in message.hops
            if hop.connection not in self._holdings
            and hop.connection not in self._routes
            and hop.connection not in self._noticed
            and not self.arriving(hop.connection)
        )  # fmt: skip
        for page in _pages(gone, HOPS_MAX):
            self._context.datagram(source, messages.Audited(page))

    def on_audited(self, source: HostId, message: messages.Audited, _unused: Channel) -> None:
        """Collect what is gone, if it is still the sender that we lead it to."""
        gone: list[Route] = []
        for hop in message.gone:
            route = self._routes.get(hop.connection)
            if route is not None and route.holder == source and route.hop == hop.hop:
                gone.append(route)
        self._finish(gone)

    # --- within ----------------------------------------------------------------------------

    def _state(self, connection: ConnectionId) -> Routing:
        """Of one of ``_routes``."""
        return self._states.get(connection, Routing.ROUTED)

    def _step(self, connection: ConnectionId, trigger: str) -> None:
        state = step(ROUTING, self._state(connection), trigger)
        if state is Routing.ROUTED:
            self._states.pop(connection, None)
        else:
            self._states[connection] = state

    def _put(self, route: Route) -> None:
        former = self._routes.get(route.connection)
        if former is not None:
            if former.hop > route.hop:
                raise UndeclaredTransition(f"hop {route.hop} after {former.hop}")
            self._by_holder[former.holder].pop(route.connection, None)
        self._routes[route.connection] = route
        self._by_holder.setdefault(route.holder, {})[route.connection] = None

    def _remove(self, connection: ConnectionId) -> None:
        route = self._routes.pop(connection)
        self._states.pop(connection, None)
        led = self._by_holder[route.holder]
        led.pop(connection, None)
        if not led:
            del self._by_holder[route.holder]

    def _pin(self, route: Route) -> Route:
        pinned = Route(
            route.connection, route.migration, route.kind, route.hop, route.home, route.holder,
            route.place, route.local, route.remote, route.origin, route.upstream, pinned=True,
        )  # fmt: skip
        self._routes[route.connection] = pinned
        return pinned

    def _notice(self, notice: Notice) -> None:
        self._noticed.add(notice.connection)
        move = Move(notice.connection, notice.hop, notice.holder, notice.place)
        self._notices.add(notice.home, Hop(notice.connection, notice.hop), move)

    def _collect(self, routes: Iterable[Route]) -> None:
        """Remove these redirects (once)."""
        gone = []
        for route in routes:
            if self._state(route.connection) is Routing.ROUTED:
                self._step(route.connection, "ended")
                gone.append(route)
        if gone:
            self._context.out.append(actions.Collect(tuple(gone)))

    def _finish(self, routes: list[Route]) -> None:
        """These connections have ended: collect, and pass it on to who may lead them here."""
        settled: list[tuple[ConnectionId, int]] = []
        for route in routes:
            if self._state(route.connection) is not Routing.ROUTED:
                continue
            targets = {route.home} | ({route.upstream} if route.upstream is not None else set())
            for host in targets - {self._context.host, route.holder}:
                # Fenced by the hop at which that host would be leading packets to us.
                self._endings.add(
                    host, Hop(route.connection, route.hop - 1), Hop(route.connection, route.hop - 1)
                )
            notice = Hop(route.connection, route.hop)
            if self._notices.settle(route.home, notice) is not None:
                self._noticed.discard(route.connection)
                settled.append((route.connection, route.hop))
        self._collect(routes)
        if settled:
            self._context.out.append(actions.ForgetNotices(tuple(settled)))

    def _end(self, connection: ConnectionId) -> None:
        holding = self._holdings[connection]
        targets = {holding.home, holding.exporter} - {self._context.host}
        hop = Hop(connection, holding.hop)
        self._ending[connection] = (holding.hop, set(targets))
        for host in targets:
            self._endings.add(host, hop, hop)
        if not targets:
            self._forget_holding(hop)

    def _stop_ending(self, connection: ConnectionId) -> None:
        hop, targets = self._ending.pop(connection, (0, set()))
        for host in targets:
            self._endings.settle(host, Hop(connection, hop))

    def _ended_at(self, hop: Hop, host: HostId) -> None:
        ended, targets = self._ending.get(hop.connection, (0, set()))
        if ended != hop.hop:
            return
        targets.discard(host)
        if not targets:
            self._forget_holding(hop)

    def _forget_holding(self, hop: Hop) -> None:
        self._ending.pop(hop.connection, None)
        holding = self._holdings.get(hop.connection)
        if holding is not None and holding.hop == hop.hop:
            del self._holdings[hop.connection]
            self._context.out.append(actions.ForgetHoldings(((hop.connection, hop.hop),)))

    def _audit_later(self) -> None:
        if self._routes and ("audit",) not in self._context.timers:
            self._context.timers.set(("audit",), self._context.now + self._context.settings.audit_interval_s)

    def _audit(self) -> None:
        """Ask each holder about some of the routes that lead to it, in turn."""
        for host, led in self._by_holder.items():
            for _turn in range(min(_PAGES_PER_TURN, -(-len(led) // HOPS_MAX))):
                page = []
                for connection in list(_first(led, HOPS_MAX)):
                    del led[connection]
                    led[connection] = None  # to the end of the queue
                    if self._state(connection) is Routing.ROUTED:
                        page.append(Hop(connection, self._routes[connection].hop))
                if page:
                    self._context.datagram(host, messages.Audit(tuple(page)))
        self._audit_later()
