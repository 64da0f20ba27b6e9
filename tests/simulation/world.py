# SPDX-License-Identifier: MIT
"""Many hosts in one process: real cores, modelled shells, kernels and network.

What survives what: a host's kernel (sockets of applications, redirects, holds until they time
out), its journal and its spool survive a crash of its daemon; the core, the shell's queue and
its dormant copies do not. After every event ``check`` looks for broken laws; see there.
Everything is drawn from one seeded ``random.Random``, so a seed is a run.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Kind
from sockmi.protocol import actions, events, messages
from sockmi.protocol.codec import decode, encode
from sockmi.protocol.context import Capacity, Settings
from sockmi.protocol.core import Core
from sockmi.protocol.messages import STREAM_ONLY, Channel
from sockmi.protocol.records import (
    ChunkId,
    Counts,
    Decision,
    Holding,
    Item,
    Notice,
    Place,
    PreparedChunk,
    Route,
)
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

SETTINGS = Settings(
    request_interval_s=0.1, lease_s=1.0, stream_timeout_s=0.4, reserve_timeout_s=0.4,
    freeze_deadline_s=0.3, retry_s=0.05, retry_max_s=0.8, audit_interval_s=1.0, chunk_items=2,
    page_items=2, pages_in_flight=2,
)  # fmt: skip
MODES = (Mode.FORWARD, Mode.NAT, Mode.TAKEOVER)
PEER = Endpoint(IPv4Address("198.51.100.9"), 999)


class LawBroken(AssertionError):
    """The simulator found what must never be."""


@dataclass(frozen=True)
class Chaos:
    """How bad the world is; probabilities per event, times in seconds."""

    loss: float = 0.0
    repeat: float = 0.0
    forge: float = 0.0
    delay_s: float = 0.02
    crash: float = 0.0  # per step of any shell
    stream_break: float = 0.0  # per stream message
    partition: float = 0.0  # per act of the operator
    refuse: float = 0.0  # each thing that a shell may refuse
    end: float = 0.0  # per act of the operator
    skew: float = 0.0
    stop: float = 0.0  # per act of the operator
    unwritable: float = 0.0  # per message that is answered, on a stream
    codec: bool = False  # every message through its bytes
    grace_s: float = 0.0  # how long offers are collected
    takeover: float = 0.0  # per batch: its connections go only with all others of their address


@dataclass(slots=True)
class Socket:
    """A socket that an application owns, or a dormant copy."""

    hop: int
    version: int  # how far the application has come: a stale copy shows
    place: Place


@dataclass(slots=True)
class Journal:
    """What is on the host's disk."""

    decisions: dict[ChunkId, Decision] = field(default_factory=dict)
    routes: dict[bytes, Route] = field(default_factory=dict)
    notices: dict[tuple[bytes, int], Notice] = field(default_factory=dict)
    prepared: dict[ChunkId, PreparedChunk] = field(default_factory=dict)
    holdings: dict[bytes, Holding] = field(default_factory=dict)
    spool: dict[tuple[ChunkId, bytes], bytes] = field(default_factory=dict)  # (chunk, migration) -> image
    arrived: dict[bytes, tuple[ChunkId, bytes]] = field(default_factory=dict)  # holding not yet live


class Host:
    """One host: kernel and journal last, core and shell come and go."""

    def __init__(self, world: World, number: int, rate: float) -> None:
        self.world, self.number = world, number
        self.id = bytes([number + 1]) * 16
        self.address = IPv4Address(0x0A000001 + number)
        self.rate, self.offset = rate, world.random.uniform(0, 100)
        # kernel
        self.live: dict[bytes, Socket] = {}
        self.away: dict[bytes, Route] = {}  # redirects; they mute this host for the connection
        self.linger: dict[bytes, float] = {}  # late packets dropped silently until
        self.frozen: dict[bytes, float] = {}  # hold of the exporter, until
        self.guarded: dict[bytes, ChunkId] = {}  # hold of the importer, for ever
        self.journal = Journal()
        # daemon
        self.epoch = 0
        self.core: Core | None = None
        self.dormant: dict[tuple[ChunkId, bytes], Socket] = {}
        self.reserved: dict[bytes, Place] = {}
        self.images: dict[bytes, bytes] = {}  # of what is frozen, by migration
        self.queue: list[actions.Action] = []
        self.running = False
        self.quiet = False
        self.wake: float | None = None
        self.eager_sends = world.random.random() < 0.5
        self.ports = 1000

    def now(self) -> float:
        """This host's own clock."""
        return self.offset + self.world.time * self.rate

    def may_send(self, connection: bytes) -> bool:
        """Whether this host's socket of the connection can act now."""
        return (
            connection in self.live
            and connection not in self.away
            and connection not in self.guarded
            and self.frozen.get(connection, 0.0) <= self.world.time
        )

    # --- daemon ----------------------------------------------------------------------------

    def start(self) -> None:
        """Reconcile kernel and journal, as the real shell has to, and begin."""
        journal = self.journal
        self.epoch += 1
        self.quiet = False
        self.frozen.clear()
        for connection in [one for one in self.away if one not in journal.routes]:
            del self.away[connection]  # a commit that was not journalled: take back
        for connection, route in journal.routes.items():
            self.away[connection] = route
            self.live.pop(connection, None)  # a commit that was journalled: close
        prepared = {
            arrival.item.connection: chunk.chunk
            for chunk in journal.prepared.values()
            for arrival in chunk.arrivals
            if (chunk.chunk, arrival.item.migration) in journal.spool
        }
        self.guarded = {
            one: chunk for one, chunk in self.guarded.items() if one in prepared or one in journal.arrived
        }
        for (chunk, migration), image in journal.spool.items():
            self.dormant[chunk, migration] = self.restore(image, Place())
        for connection in list(journal.arrived):
            self.enliven(connection)
        capacity = Capacity(rooms=Counts(8, 8, 8), modes=MODES, addresses=frozenset({self.address}))
        capacity.members = frozenset(other.id for other in self.world.hosts) - {self.id}
        grace_s = self.world.chaos.grace_s
        self.core = Core(self.id, replace(SETTINGS, offer_grace_s=grace_s), capacity)
        self.do(
            events.Started(
                tuple(journal.decisions.values()),
                tuple(journal.routes.values()),
                tuple(journal.notices.values()),
                tuple(journal.prepared.values()),
                tuple(journal.holdings.values()),
            )
        )
        ended = tuple(one for one in journal.holdings if one not in self.live)
        if ended and self.core is not None:
            self.do(events.ConnectionsEnded(ended))

    def crash(self) -> None:
        """kill -9 of the daemon."""
        self.epoch += 1
        self.core = None
        self.dormant.clear()
        self.reserved.clear()
        self.images.clear()
        self.queue.clear()
        self.running = False
        self.wake = None
        self.world.streams_of(self)
        epoch = self.epoch
        self.world.later(
            self.world.random.uniform(0.05, 1.0), lambda: self.start() if self.epoch == epoch else None
        )

    def do(self, event: events.Event) -> None:
        """Give the core an event."""
        if self.core is not None:
            self.act(self.core.handle(event, self.now()))

    def ring(self) -> None:
        """The core's deadline has come."""
        self.wake = None
        if self.core is not None:
            self.act(self.core.handle_timer(self.now()))

    def act(self, todo: list[actions.Action]) -> None:
        """Queue what the core wants; arm its timer."""
        for action in todo:
            if self.eager_sends and isinstance(action, actions.Send):
                self.send(action)
            else:
                self.queue.append(action)
        if self.queue and not self.running:
            self.running = True
            self.next_step(None)
        self.arm()

    def arm(self) -> None:
        """Wake up at the core's next deadline."""
        deadline = self.core.next_deadline() if self.core is not None else None
        if deadline is None:
            return
        when = max(self.world.time, (deadline - self.offset) / self.rate + 1e-6)
        if self.wake is None or when < self.wake:
            self.wake = when
            epoch = self.epoch

            def ring() -> None:
                if self.epoch == epoch and self.wake == when:
                    self.ring()

            self.world.at(when, ring)

    def next_step(self, steps: Iterator[None] | None) -> None:
        """Schedule the next step of the shell."""
        epoch = self.epoch
        delay = self.world.random.random() * self.world.chaos.delay_s * 0.3

        def go() -> None:
            if self.epoch == epoch:
                self.run(steps)

        self.world.later(delay, go)

    def run(self, steps: Iterator[None] | None) -> None:
        """One step; a crash may come after each."""
        if steps is None:
            if not self.queue:
                self.running = False
                return
            steps = getattr(self, "on_" + type(self.queue[0]).__name__.lower())(self.queue.pop(0))
        done = next(steps, self) is self
        self.world.stepped(self)
        if self.core is not None:
            self.next_step(None if done else steps)

    # --- actions, each a sequence of steps -------------------------------------------------

    def refuses(self) -> bool:
        """Chance says no."""
        return self.world.random.random() < self.world.chaos.refuse

    def send(self, action: actions.Send) -> None:
        """Hand a message to the network, if it can be written."""
        odds = self.world.chaos.unwritable if type(action.message) in STREAM_ONLY else 0.0
        if odds and self.world.random.random() < odds and action.to is not None:
            failed, epoch = events.SendFailed(action.to, action.message, "chance"), self.epoch
            self.world.later(0, lambda: self.do(failed) if self.epoch == epoch else None)
            return
        for host in self.world.hosts if action.to is None else [self.world.by_id[action.to]]:
            if host is not self:
                self.world.send(self, host, action.message, action.channel)

    def on_send(self, action: actions.Send) -> Iterator[None]:
        self.send(action)
        yield from ()

    def on_openstream(self, action: actions.OpenStream) -> Iterator[None]:
        self.world.open_stream(self, self.world.by_id[action.host])
        yield from ()

    def on_report(self, action: actions.Report) -> Iterator[None]:
        self.world.reported(self, action)
        yield from ()

    def on_batchdone(self, action: actions.BatchDone) -> Iterator[None]:
        self.world.open_batches.discard(action.batch)
        yield from ()

    def on_ignored(self, _unused: actions.Ignored) -> Iterator[None]:
        yield from ()

    def on_quiet(self, _unused: actions.Quiet) -> Iterator[None]:
        self.quiet = True
        self.crash()
        yield from ()

    def on_freeze(self, action: actions.Freeze) -> Iterator[None]:
        if action.chunk.batch in self.world.dry:
            raise LawBroken("a dry run freezes")
        hold_s = (action.deadline_s * 2 + 0.2) / self.rate
        self.world.joined[action.chunk] = joined(action)
        results: list[bytes | Refusal] = []
        for item in action.items:
            socket = self.live.get(item.connection)
            if socket is None or socket.hop != item.hop - 1 or self.refuses():
                busy = socket is not None and item.migration[-1] & 1  # may pass
                results.append(Refusal(Code.OWNER_UNSTOPPABLE if busy else Code.NO_SUCH_SOCKET, "no"))
                continue
            self.frozen[item.connection] = self.world.time + hold_s
            image = item.connection + socket.version.to_bytes(8, "big")
            self.images[item.migration] = image
            results.append(image)
        yield
        self.do(events.FreezeDone(action.chunk, tuple(results)))

    def on_thaw(self, action: actions.Thaw) -> Iterator[None]:
        for migration in action.migrations:
            image = self.images.pop(migration, None)
            if image is None:
                raise LawBroken(f"thaw of {migration.hex()[:4]}, which is not frozen")
            self.frozen.pop(image[:16], None)
        yield

    def on_commit(self, action: actions.Commit) -> Iterator[None]:
        results: list[Refusal | None] = []
        self.world.leaves_whole(action)
        for route in action.routes:
            self.away[route.connection] = route
        yield
        committed = []
        for position, route in zip(action.decision.committed, action.routes, strict=True):
            image, socket = self.images.pop(route.migration), self.live.get(route.connection)
            held = self.frozen.get(route.connection, 0.0) > self.world.time
            if (
                socket is None
                or not held
                or int.from_bytes(image[16:], "big") != socket.version
                or self.refuses()
            ):
                del self.away[route.connection]
                self.frozen.pop(route.connection, None)
                results.append(Refusal(Code.CHANGED, "changed"))
            else:
                committed.append(position)
                results.append(None)
        yield
        if any(results) and any(route.place.mode is Mode.TAKEOVER for route in action.routes):
            for route in action.routes:
                self.away.pop(route.connection, None)
                self.frozen.pop(route.connection, None)
            results, committed = [Refusal(Code.CHANGED, "all or none")] * len(action.routes), []
        moved = {
            route.connection: route for route, no in zip(action.routes, results, strict=True) if no is None
        }
        if moved:
            self.journal_commit(replace(action.decision, committed=tuple(committed)), moved, action.notices)
        yield
        for connection in moved:
            self.live.pop(connection, None)
            self.frozen.pop(connection, None)
        yield
        self.do(events.CommitDone(action.decision.chunk, tuple(results)))

    def on_letgo(self, _unused: actions.LetGo) -> Iterator[None]:
        yield from ()

    def journal_commit(
        self, decision: Decision, moved: dict[bytes, Route], notices: tuple[Notice, ...]
    ) -> None:
        """The decision itself: one transaction."""
        self.journal.decisions[decision.chunk] = decision
        self.world.decided[decision.chunk] = decision
        for connection, route in moved.items():
            self.journal.routes[connection] = route
            self.journal.holdings.pop(connection, None)
        for notice in notices:
            if notice.connection in moved:
                self.journal.notices[notice.connection, notice.hop] = notice

    def on_forgetdecision(self, action: actions.ForgetDecision) -> Iterator[None]:
        del self.journal.decisions[action.chunk]
        yield

    def on_reserve(self, action: actions.Reserve) -> Iterator[None]:
        if action.batch in self.world.dry:
            raise LawBroken("a dry run reserves a place")
        places: list[Place | Refusal] = []
        for item, former in zip(action.items, action.former, strict=True):
            if self.refuses():
                places.append(Refusal(self.world.random.choice([Code.PORT_TAKEN, Code.WINDOW_SCALE]), "no"))
                continue
            self.ports += 1
            joined = item.kind is Kind.CONNECTED and action.batch[1] < 256 * self.world.chaos.takeover
            mode = Mode.TAKEOVER if joined else Mode.NAT
            place = Place(former or Endpoint(self.address, self.ports), mode)
            self.reserved[item.migration] = place
            places.append(place)
        yield
        self.do(events.ReserveDone(action.batch, action.exporter, action.page, tuple(places)))

    def on_unreserve(self, action: actions.Unreserve) -> Iterator[None]:
        for migration in action.migrations:
            self.reserved.pop(migration, None)
        yield

    def restore(self, image: bytes, place: Place) -> Socket:
        """A dormant copy."""
        return Socket(0, int.from_bytes(image[16:], "big"), place)

    def on_prepare(self, action: actions.Prepare) -> Iterator[None]:
        results: list[Fidelity | Refusal] = []
        good: list[int] = []
        for position, arrival in enumerate(action.arrivals):
            connection, migration = arrival.item.connection, arrival.item.migration
            if self.reserved.pop(migration, None) != arrival.place:
                raise LawBroken("prepared without its reservation")
            if self.refuses():
                results.append(Refusal(Code.RESTORE, "no"))
                continue
            if connection in self.guarded or (connection in self.live and connection not in self.away):
                raise LawBroken("a second copy on one host")
            self.guarded[connection] = action.chunk
            self.dormant[action.chunk, migration] = self.restore(action.images[position], arrival.place)
            results.append(Fidelity())
            good.append(position)
        yield
        if good:
            record = PreparedChunk(action.chunk, action.exporter, action.arrivals, tuple(good))
            self.journal_prepared(record, action.images)
        yield
        self.do(events.PrepareDone(action.chunk, tuple(results)))

    def journal_prepared(self, record: PreparedChunk, images: tuple[bytes, ...]) -> None:
        """Spool and journal."""
        for position in record.prepared:
            self.journal.spool[record.chunk, record.arrivals[position].item.migration] = images[position]
        self.journal.prepared[record.chunk] = record

    def on_discard(self, action: actions.Discard) -> Iterator[None]:
        for migration in action.migrations:
            key = (action.chunk, migration)
            image = self.journal.spool.pop(key, None)  # None: a crash came between this and Activate
            if image is not None:
                del self.dormant[key]
                self.guarded.pop(image[:16], None)
        if not any(chunk == action.chunk for chunk, _unused in self.journal.spool):
            del self.journal.prepared[action.chunk]
        yield

    def on_activate(self, action: actions.Activate) -> Iterator[None]:
        for connection in action.returning:
            self.away.pop(connection, None)
        yield
        journal = self.journal
        for holding in action.holdings:
            journal.holdings[holding.connection] = holding
            journal.arrived[holding.connection] = (action.chunk, holding.migration)
        for connection in action.returning:
            journal.routes.pop(connection, None)
        del journal.prepared[action.chunk]
        yield
        results: list[Refusal | None] = []
        for holding in action.holdings:
            self.linger.pop(holding.connection, None)
            if self.refuses() and self.refuses():
                key = journal.arrived.pop(holding.connection)
                del journal.spool[key], self.dormant[key]
                del journal.holdings[holding.connection]
                self.guarded.pop(holding.connection, None)
                self.world.ended.add(holding.connection)  # the engine failed: said, not hidden
                self.linger[holding.connection] = self.world.time + 1000
                results.append(Refusal(Code.RESTORE, "no"))
            else:
                self.enliven(holding.connection)
                results.append(None)
        yield
        self.do(events.ActivateDone(action.chunk, tuple(results)))

    def enliven(self, connection: bytes) -> None:
        """A dormant copy comes to life."""
        holding = self.journal.holdings[connection]
        key = self.journal.arrived.pop(connection)
        image = self.journal.spool.pop(key)
        self.dormant.pop(key, None)
        self.live[connection] = Socket(holding.hop, int.from_bytes(image[16:], "big"), holding.place)
        self.guarded.pop(connection, None)

    def on_reroute(self, action: actions.Reroute) -> Iterator[None]:
        results: list[tuple[bytes, int, Refusal | None]] = []
        for route in action.routes:
            refusal = Refusal(Code.NO_REDIRECT, "no") if self.refuses() else None
            if refusal is None and route.connection in self.away:
                self.away[route.connection] = self.journal.routes[route.connection] = route
            results.append((route.connection, route.hop, refusal))
        yield
        self.do(events.RerouteDone(tuple(results)))

    def on_saveroutes(self, action: actions.SaveRoutes) -> Iterator[None]:
        for route in action.routes:
            if route.connection in self.journal.routes:
                self.journal.routes[route.connection] = route
        yield

    def on_collect(self, action: actions.Collect) -> Iterator[None]:
        for route in action.routes:
            known = self.away.get(route.connection)
            if known is not None and known.hop == route.hop:
                del self.away[route.connection]
                self.linger[route.connection] = self.world.time + 1000
                self.journal.routes.pop(route.connection, None)
        yield
        self.do(events.CollectDone(tuple((route.connection, route.hop) for route in action.routes)))

    def on_forgetnotices(self, action: actions.ForgetNotices) -> Iterator[None]:
        for notice in action.notices:
            self.journal.notices.pop(notice, None)
        yield

    def on_forgetholdings(self, action: actions.ForgetHoldings) -> Iterator[None]:
        for connection, hop in action.holdings:
            if connection in self.journal.holdings and self.journal.holdings[connection].hop == hop:
                del self.journal.holdings[connection]
        yield


def joined(action: actions.Freeze) -> dict[object, set[bytes]]:
    """By address, the migrations that takeover leads away with it."""
    found: dict[object, set[bytes]] = {}
    for item, place in zip(action.items, action.places, strict=True):
        if place.mode is Mode.TAKEOVER and item.local is not None:
            found.setdefault(item.local.address, set()).add(item.migration)
    return found


@dataclass(slots=True)
class Stream:
    """Between two hosts; ``generation`` fences what an older one still had under way."""

    generation: int = 0
    open: bool = False
    free_at: dict[int, float] = field(default_factory=dict)


class World:
    """All hosts, the network, the operator, and the laws."""

    def __init__(self, seed: int, hosts: int = 3, connections: int = 3, chaos: Chaos | None = None) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a repeatable run is the point
        self.chaos = chaos or Chaos()
        self.time = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.steps = 0
        self.crash_after: tuple[int, int] | None = None  # (step, host number)
        self.on_step: Callable[[Host], None] | None = None
        skew = self.chaos.skew
        self.hosts = [Host(self, one, 1 + self.random.uniform(-skew, skew)) for one in range(hosts)]
        self.by_id = {host.id: host for host in self.hosts}
        self.streams: dict[tuple[int, int], Stream] = {}
        self.cut: set[frozenset[int]] = set()
        self.sent: list[tuple[Host, Host, messages.Message, Channel]] = []
        self.decided: dict[ChunkId, Decision] = {}
        self.joined: dict[ChunkId, dict[object, set[bytes]]] = {}
        self.open_batches: set[bytes] = set()
        self.dry: set[bytes] = set()
        self.batch_hosts: dict[bytes, tuple[Host, int]] = {}
        self.ended: set[bytes] = set()
        self.version: dict[bytes, int] = {}
        self.home: dict[bytes, Host] = {}
        self.kind: dict[bytes, Kind] = {}
        self.hops: dict[bytes, int] = {}
        self.outcomes: dict[actions.Outcome, int] = dict.fromkeys(actions.Outcome, 0)
        for number in range(connections):
            connection = bytes([0x80 + number]) * 16
            home = self.random.choice(self.hosts)
            home.live[connection] = Socket(0, 0, Place())
            self.home[connection], self.version[connection] = home, 0
            self.kind[connection] = Kind.LISTENING if self.random.random() < 0.2 else Kind.CONNECTED
        for host in self.hosts:
            host.start()

    # --- time ------------------------------------------------------------------------------

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something then."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, what))

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        """Do something after a while."""
        self.at(self.time + delay_s, what)

    def run(self, until: float) -> None:
        """Let the world go on."""
        while self._heap and self._heap[0][0] <= until:
            when, _unused, what = heapq.heappop(self._heap)
            self.time = max(self.time, when)
            what()
            self.check()
        self.time = max(self.time, until)

    def stepped(self, host: Host) -> None:
        """A shell did one step: the moment for a crash."""
        self.steps += 1
        if self.on_step is not None:
            self.on_step(host)
        if self.crash_after is not None and self.steps == self.crash_after[0]:
            self.hosts[self.crash_after[1]].crash()
        elif self.random.random() < self.chaos.crash:
            self.random.choice(self.hosts).crash()

    # --- network ---------------------------------------------------------------------------

    def connected(self, one: Host, other: Host) -> bool:
        """Whether packets go between them."""
        return frozenset((one.number, other.number)) not in self.cut

    def delay(self) -> float:
        """Most are fast, some are very late."""
        delay = self.random.random() * self.chaos.delay_s
        return delay * 30 if self.chaos.loss and self.random.random() < 0.05 else delay

    def send(self, source: Host, to: Host, message: messages.Message, channel: Channel) -> None:
        """Carry a message, more or less."""
        if self.chaos.codec:
            message = decode(encode(message))
        if self.chaos.forge:
            self.sent.append((source, to, message, channel))
        if channel is Channel.STREAM:
            self.send_stream(source, to, message)
            return
        for _turn in range(1 + (self.random.random() < self.chaos.repeat)):
            if self.random.random() >= self.chaos.loss:
                self.deliver(source, to, message, channel, self.delay())

    def deliver(
        self, source: Host, to: Host, message: messages.Message, channel: Channel, delay: float
    ) -> None:
        """After ``delay``, unless there is a partition then."""

        def arrive() -> None:
            if self.connected(source, to):
                to.do(events.Received(source.id, message, channel))

        self.later(delay, arrive)

    def stream(self, one: Host, other: Host) -> Stream:
        """The stream between two hosts."""
        pair = (min(one.number, other.number), max(one.number, other.number))
        return self.streams.setdefault(pair, Stream())

    def open_stream(self, source: Host, to: Host) -> None:
        """Answer StreamOpened or StreamLost after a while."""
        epoch = source.epoch

        def answer() -> None:
            if source.epoch != epoch:
                return
            stream = self.stream(source, to)
            if self.connected(source, to) and to.core is not None:
                if not stream.open:
                    stream.open = True
                    stream.generation += 1
                    stream.free_at.clear()
                source.do(events.StreamOpened(to.id))
            else:
                source.do(events.StreamLost(to.id, "refused"))

        self.later(self.delay(), answer)

    def send_stream(self, source: Host, to: Host, message: messages.Message) -> None:
        """In order, until it breaks."""
        stream = self.stream(source, to)
        epoch = source.epoch
        if not stream.open:
            self.later(
                0, lambda: source.do(events.StreamLost(to.id, "none")) if source.epoch == epoch else None
            )
            return
        if self.random.random() < self.chaos.stream_break or not self.connected(source, to):
            self.break_stream(source, to)
            return
        when = max(
            stream.free_at.get(source.number, 0.0), self.time + self.random.random() * self.chaos.delay_s
        )
        stream.free_at[source.number] = when + 1e-9
        generation = stream.generation

        def arrive() -> None:
            if not stream.open or stream.generation != generation:
                return
            if self.connected(source, to):
                to.do(events.Received(source.id, message, Channel.STREAM))
            else:
                self.break_stream(source, to)

        self.at(when, arrive)

    def break_stream(self, one: Host, other: Host) -> None:
        """Each end learns of it in its own time; one of them perhaps never."""
        stream = self.stream(one, other)
        if not stream.open:
            return
        stream.open = False
        deaf = self.random.choice([one, other, None, None])
        for host, far in ((one, other), (other, one)):
            if host is not deaf and host.core is not None:
                epoch = host.epoch

                def learn(host: Host = host, far: Host = far, epoch: int = epoch) -> None:
                    if host.epoch == epoch and not self.stream(host, far).open:
                        host.do(events.StreamLost(far.id, "broken"))

                self.later(self.random.random() * 0.3, learn)

    def streams_of(self, host: Host) -> None:
        """All streams of a host that crashes break."""
        for other in self.hosts:
            if other is not host:
                self.break_stream(host, other)

    def forge(self) -> None:
        """Something that a member once said, again, to somebody else, or with wrong ids."""
        if not self.sent:
            return
        source, to, said, channel = self.random.choice(self.sent)
        message: Any = said
        dice = self.random.random()
        if dice < 0.2:
            to = self.random.choice([host for host in self.hosts if host is not source])
        elif dice < 0.4 and hasattr(message, "chunk"):
            batch = self.random.choice([message.chunk.batch, self.random.randbytes(16)])
            message = replace(message, chunk=ChunkId(batch, self.random.randrange(1000, 2000)))
        elif dice < 0.5 and hasattr(message, "batch"):
            message = replace(message, batch=self.random.randbytes(16))
        elif dice < 0.6 and hasattr(message, "hops"):
            message = replace(message, hops=(messages.Hop(self.random.randbytes(16), 1),))
        elif dice < 0.8 and hasattr(message, "chunk"):
            source = self.random.choice([host for host in self.hosts if host is not to])
            if source.id in self.parties(message.chunk):
                return  # that would be a member who lies, not a stale message
        self.deliver(source, to, message, channel, self.delay())

    def parties(self, chunk: ChunkId) -> set[bytes]:
        """Who may rightly speak about a chunk."""
        found = {host.id for host in self.hosts if host is self.batch_hosts.get(chunk.batch, (None, 0))[0]}
        found |= {
            to.id
            for _unused, to, message, _unused in self.sent
            if isinstance(message, messages.Ship) and message.chunk == chunk
        }
        return found

    # --- operator and applications ---------------------------------------------------------

    def export(
        self,
        host: Host,
        connections: list[bytes],
        target: Host | None = None,
        timeout_s: float = 1.0,
        dry_run: bool | None = False,
    ) -> None:
        """Ask a host to export some of its connections. ``dry_run`` None: seldom, by the batch's id."""
        if host.core is None:
            return
        items = []
        for connection in connections:
            holding = host.journal.holdings.get(connection)
            hop = host.live[connection].hop + 1
            local = Endpoint(host.address, 80) if holding is None else holding.place.endpoint
            home = host.id if holding is None else holding.home
            migration = connection if hop == 1 and self.random.random() < 0.5 else self.random.randbytes(16)
            listening = self.kind[connection] is Kind.LISTENING
            state, remote = ("LISTEN", None) if listening else ("ESTABLISHED", PEER)
            items.append(
                Item(
                    migration, connection, self.kind[connection], state, local, remote,
                    local if holding is None else holding.origin, hop, home,
                )
            )  # fmt: skip
        batch = self.random.randbytes(16)
        self.open_batches.add(batch)
        self.batch_hosts[batch] = (host, host.epoch)
        if dry_run or (dry_run is None and batch[0] < 5):
            self.dry.add(batch)
        modes = MODES
        follows = target is not None and target is not host and self.random.random() < 0.2
        if target is not None and follows and batch not in self.dry:
            host.do(events.ChildrenFound(batch, target.id, tuple(items), modes, timeout_s))
            return
        wanted: dict[str, Any] = {}
        if target is not None:
            wanted = (
                {"target": target.id} if self.random.random() < 0.5 else {"target_address": target.address}
            )
        dry = batch in self.dry
        if dry:
            queues = [one.migration[0] % 4 if one.kind is Kind.LISTENING else 0 for one in items]
            items = [replace(one, queued=queued) for one, queued in zip(items, queues, strict=True)]
        host.do(events.StartExport(batch, tuple(items), modes, timeout_s, **wanted, dry_run=dry))

    def leaves_whole(self, action: actions.Commit) -> None:
        """What takeover leads away is all that was frozen of its address."""
        going = {route.migration for route in action.routes}
        for address, frozen in self.joined[action.decision.chunk].items():
            if going & frozen and frozen - going:
                raise LawBroken(f"{address} is given up, and a connection that has it stays")

    def progress(self) -> None:
        """Applications send: whoever can."""
        for host in self.hosts:
            for connection, socket in host.live.items():
                if host.may_send(connection):
                    socket.version += 1
                    self.version[connection] += 1

    def operate(self) -> None:
        """One random act."""
        self.progress()
        pick = self.random
        host = pick.choice(self.hosts)
        here = [one for one in host.live if one not in host.away]
        if here and pick.random() < 0.5:
            some = pick.sample(here, pick.randint(1, len(here)))
            target = pick.choice(self.hosts) if pick.random() < 0.4 else None
            self.export(host, some, target, pick.uniform(0.2, 2.0), dry_run=None)
        if here and pick.random() < self.chaos.end:
            self.end(host, pick.choice(here))
        if pick.random() < self.chaos.partition:
            pair = frozenset(pick.sample(range(len(self.hosts)), 2))
            self.cut.symmetric_difference_update({pair})
        if pick.random() < self.chaos.stop:
            host.do(events.Stop(0.3))
        if pick.random() < 0.05:
            for batch, (owner, _unused) in list(self.batch_hosts.items())[-1:]:
                owner.do(events.CancelExport(batch))
        for _turn in range(3):
            if pick.random() < self.chaos.forge:
                self.forge()

    def end(self, host: Host, connection: bytes) -> None:
        """The application closes, the peer too."""
        if not host.may_send(connection):
            return
        del host.live[connection]
        self.ended.add(connection)
        host.do(events.ConnectionsEnded((connection,)))

    def reported(self, host: Host, report: actions.Report) -> None:
        """What the cores say of each migration."""
        for result in report.results:
            self.outcomes[result.outcome] += 1
            planned = result.outcome is actions.Outcome.PLANNED
            is_dry = report.batch in self.dry
            if planned > is_dry or (is_dry and not planned and result.outcome is not actions.Outcome.REFUSED):
                raise LawBroken(f"{'a dry' if is_dry else 'an earnest'} run ends {result.outcome}")

    # --- the laws --------------------------------------------------------------------------

    def check(self) -> None:
        """Raise LawBroken if any connection has two owners, is lost, or goes back a hop."""
        for connection in self.home:
            if connection in self.ended:
                continue
            senders = claims = 0
            hop = -1
            for host in self.hosts:
                journal = host.journal
                socket = host.live.get(connection)
                if socket is not None:
                    if host.may_send(connection):
                        senders += 1
                        if socket.version != self.version[connection]:
                            raise LawBroken(f"{host.number} runs a stale copy of {connection[0]:x}")
                    if connection not in journal.routes:
                        claims += 1
                        hop = socket.hop
                elif connection in journal.arrived:
                    claims += 1
                    hop = journal.holdings[connection].hop
                for chunk in journal.prepared.values():
                    # A prepared copy counts from COMMIT on: the exporter's journal must still say so.
                    for position in chunk.prepared:
                        item = chunk.arrivals[position].item
                        if item.connection == connection and (chunk.chunk, item.migration) in journal.spool:
                            decision = self.by_id[chunk.exporter].journal.decisions.get(chunk.chunk)
                            if decision is not None and position in decision.committed:
                                claims += 1
                                hop = item.hop
            if senders > 1:
                raise LawBroken(f"connection {connection[0]:x} has {senders} owners")
            if claims != 1:
                raise LawBroken(f"connection {connection[0]:x} can come to life in {claims} places")
            if hop < self.hops.get(connection, 0):
                raise LawBroken(
                    f"connection {connection[0]:x} went back from hop {self.hops[connection]} to {hop}"
                )
            self.hops[connection] = hop
            end, place = self.follow(connection)
            live = end.live.get(connection)
            if (
                live is not None
                and place is not None
                and connection not in end.guarded
                and live.place.endpoint != place.endpoint
            ):
                raise LawBroken(f"packets of {connection[0]:x} reach a wrong port on {end.number}")
            if (
                live is None
                and connection not in end.guarded
                and end.linger.get(connection, 0.0) <= self.time
            ):
                raise LawBroken(f"packets of {connection[0]:x} are answered with RST by {end.number}")

    def follow(self, connection: bytes) -> tuple[Host, Place | None]:
        """Where the peer's packets go, and the place they are sent to there."""
        host, place = self.home[connection], None
        for _turn in range(50):
            route = host.away.get(connection)
            if route is None or connection in host.guarded:  # a prepared copy's hold goes first
                return host, place
            host, place = self.by_id[route.holder], route.place
        raise LawBroken(f"the redirects of {connection[0]:x} go round in circles")

    def heal(self) -> None:
        """From now on the world is good."""
        self.chaos = replace(
            self.chaos, loss=0.0, repeat=0.0, forge=0.0, crash=0.0, stream_break=0.0, partition=0.0,
            refuse=0.0, end=0.0, stop=0.0,
        )  # fmt: skip
        self.cut.clear()

    def settle(self, limit_s: float = 60.0) -> None:
        """Every run ends: wait for it, and look that nothing is left."""
        limit = self.time + limit_s
        why = "never looked"
        while self.time < limit:
            self.run(self.time + 0.5)
            why = self.unsettled()
            if not why:
                return
        raise LawBroken(f"after {limit_s} s in a good world: {why}")

    def unsettled(self) -> str:
        """What is still under way or left over; empty if nothing is."""
        for host in self.hosts:
            name = f"host {host.number}"
            if host.core is None:
                return f"{name} is down"
            if host.running or not host.core.idle:
                return f"{name} is busy"
            journal = host.journal
            for what in ("decisions", "prepared", "spool", "arrived", "notices"):
                if getattr(journal, what):
                    return f"{name} has {what} left: {getattr(journal, what)}"
            for what in ("frozen", "guarded", "dormant", "reserved", "images"):
                if getattr(host, what):
                    return f"{name} has {what} left: {getattr(host, what)}"
            if set(host.away) != set(journal.routes):
                return f"{name}: kernel and journal differ"
            for connection in host.away:
                if connection in self.ended:
                    return f"{name} still leads the ended {connection[0]:x} away"
            for connection in journal.holdings:
                if connection in self.ended:
                    return f"{name} still holds the ended {connection[0]:x}"
        for batch in self.open_batches:
            host, epoch = self.batch_hosts[batch]
            if host.epoch == epoch:
                return f"batch {batch.hex()[:8]} has no end"
        for connection, home in self.home.items():
            if connection in self.ended:
                continue
            places = [host for host in self.hosts if connection in host.live]
            if len(places) != 1 or not places[0].may_send(connection):
                return f"{connection[0]:x} lives on {[host.number for host in places]}"
            end, _unused = self.follow(connection)
            if end is not places[0]:
                return f"packets of {connection[0]:x} go to {end.number}, it lives on {places[0].number}"
            holding = end.journal.holdings.get(connection)
            if end.live[connection].hop and (holding is None or holding.hop != end.live[connection].hop):
                return f"the journal of {end.number} does not name {connection[0]:x}"
            waypoints = [host for host in self.hosts if connection in host.away and host is not home]
            if any(not self.pinned(connection) for _unused in waypoints):
                return f"{connection[0]:x} still goes over {[host.number for host in waypoints]}"
        return ""

    def pinned(self, connection: bytes) -> bool:
        """Whether the home could not reach a later holder."""
        return any(
            route.pinned for host in self.hosts for one, route in host.away.items() if one == connection
        ) or any(
            host.journal.routes[connection].pinned for host in self.hosts if connection in host.journal.routes
        )


BAD = Chaos(
    loss=0.15, repeat=0.15, forge=0.3, crash=0.01, stream_break=0.02, partition=0.05, refuse=0.03,
    end=0.05, skew=0.2, stop=0.01,
)  # fmt: skip


def random_run(seed: int) -> World:
    """One whole random run: a bad world for a while, then a good one until all is settled."""
    draw = random.Random(~seed)  # noqa: S311
    chaos = replace(
        BAD,
        crash=draw.choice([0, 0.003, 0.02]), loss=draw.choice([0, 0.1, 0.3]), refuse=draw.choice([0, 0.05]),
        stream_break=draw.choice([0, 0.03]), partition=draw.choice([0, 0.1]), stop=draw.choice([0, 0.02]),
        forge=draw.choice([0, 0.4]), delay_s=draw.choice([0.005, 0.02, 0.1]), codec=draw.random() < 0.1,
        unwritable=0.1 if seed % 5 == 1 else 0.0, grace_s=0.05 if seed % 3 == 1 else 0.0,
        takeover=0.5 if seed % 4 < 2 else 0.0,
    )  # fmt: skip
    world = World(seed, hosts=draw.randint(2, 4), connections=draw.randint(1, 5), chaos=chaos)
    for _turn in range(draw.randint(5, 20)):
        world.operate()
        world.run(world.time + draw.random() * 0.4)
    world.heal()
    world.settle()
    return world


def first_hop(world: World) -> None:
    """a -> b, then the connections end."""
    a, b, _unused = world.hosts
    world.export(a, sorted(a.live), b)
    world.run(1.0)
    for connection in sorted(b.live)[:1]:
        world.end(b, connection)


def two_hops(world: World) -> None:
    """a -> b -> c: the home leads straight to c."""
    a, b, c = world.hosts
    world.export(a, sorted(a.live), b)
    world.run(1.0)
    world.export(b, sorted(b.live), c)
    world.run(2.0)


def home_again(world: World) -> None:
    """a -> b -> a."""
    a, b, _unused = world.hosts
    world.export(a, sorted(a.live), b)
    world.run(1.0)
    world.export(b, sorted(b.live), a)
    world.run(2.0)


SCENARIOS: dict[str, Callable[[World], None]] = {
    "first hop": first_hop,
    "two hops": two_hops,
    "home again": home_again,
}


def scripted_run(scenario: str, crash_after: tuple[int, int] | None = None, seed: int = 1) -> World:
    """A calm run of three connections at host 0, with one crash (step, host number) if wanted."""
    world = World(seed, hosts=3, connections=3)
    for connection, home in world.home.items():
        world.hosts[0].live[connection] = home.live.pop(connection)
        world.home[connection] = world.hosts[0]
    world.crash_after = crash_after
    SCENARIOS[scenario](world)
    world.settle()
    return world
