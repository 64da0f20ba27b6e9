# SPDX-License-Identifier: MIT
"""The importer's side: from OFFER to ACTIVE, for all exporters.

What is offered or reserved is kept under a lease, which simply expires. What is PREPARED
stays, over restarts too, until the exporter's decision is known: QUERY is repeated for it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from sockmi.engine.base import Kind
from sockmi.protocol import actions, events, messages
from sockmi.protocol.context import Context
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import (
    Arrival,
    BatchId,
    ChunkId,
    ConnectionId,
    Counts,
    Holding,
    HostId,
    Item,
    MigrationId,
    Place,
)
from sockmi.protocol.routing import Routes
from sockmi.protocol.tables import IMPORT, LEASE, Import, Lease, UndeclaredTransition, step
from sockmi.refusal import Code, Refusal

_ANSWERS_KEPT = 4096  # ACTIVE answers that are remembered in full, for repeated CONFIRMs

_EXPECTED_ATTEMPTS = 1  # until the first QUERY a decision is to be expected at any moment


@dataclass(slots=True)
class _Page:
    number: int
    items: tuple[Item, ...]
    refused: dict[int, Refusal]


@dataclass(slots=True)
class _Lease:
    exporter: HostId
    batch: BatchId
    state: Lease = Lease.OFFERED
    rooms: list[int] = field(default_factory=lambda: [0, 0, 0])
    reserved: dict[MigrationId, Arrival] = field(default_factory=dict)
    pages: dict[int, _Page] = field(default_factory=dict)  # by ticket
    seen: set[int] = field(default_factory=set)  # RESERVE pages, by the exporter's number


@dataclass(slots=True)
class _Chunk:
    id: ChunkId
    exporter: HostId
    state: Import
    arrivals: tuple[Arrival, ...]
    prepared: tuple[int, ...] = ()
    answer: messages.Prepared | None = None
    committed: tuple[int, ...] = ()
    holdings: tuple[Holding, ...] = ()  # of what is committed
    reply: Channel = Channel.STREAM
    attempt: int = 0


class ImporterCore:
    """See the module docstring; events and messages come by the methods named after them."""

    def __init__(self, context: Context, routes: Routes) -> None:
        self._context = context
        self._routes = routes
        self._leases: dict[tuple[HostId, BatchId], _Lease] = {}
        self._chunks: dict[ChunkId, _Chunk] = {}
        self._kept = [0, 0, 0]  # offered, reserved or being prepared, per list
        self._ticket = 0
        self._reserved: dict[MigrationId, _Lease] = {}  # reserved, or being reserved, by whom
        self._arriving: dict[ConnectionId, ChunkId] = {}  # in a chunk that is not yet decided
        self._answers: OrderedDict[ChunkId, tuple[HostId, messages.Active]] = OrderedDict()

    # --- the shell -------------------------------------------------------------------------

    def started(self, event: events.Started) -> None:
        """Ask what became of what was prepared before the restart."""
        for record in event.prepared:
            chunk = _Chunk(record.chunk, record.exporter, Import.PREPARED, record.arrivals, record.prepared)
            self._chunks[chunk.id] = chunk
            for arrival in chunk.arrivals:
                self._arriving[arrival.item.connection] = chunk.id
            self._query(chunk)

    def stop(self) -> None:
        """Give up all leases; what is prepared stays in doubt."""
        for lease in list(self._leases.values()):
            self._drop(lease, "RELEASE")

    @property
    def busy(self) -> bool:
        """Whether the shell is still to answer something."""
        return any(chunk.state is not Import.PREPARED for chunk in self._chunks.values())

    @property
    def idle(self) -> bool:
        """Whether nothing at all is left to do."""
        return not self._chunks and not self._leases

    @property
    def calm(self) -> bool:
        """Whether nothing is reserved or frozen."""
        return not self.frozen and not any(lease.reserved or lease.pages for lease in self._leases.values())

    @property
    def frozen(self) -> bool:
        """Whether a chunk comes, or has just come: what is long in doubt may stay so."""
        return self.busy or any(chunk.attempt <= _EXPECTED_ATTEMPTS for chunk in self._chunks.values())

    def holds(self, connection: ConnectionId) -> bool:
        """Whether a copy is here in a chunk that is not yet decided."""
        return connection in self._arriving

    def activates(self, connection: ConnectionId) -> bool:
        """Whether the shell is bringing it to life now."""
        chunk = self._arriving.get(connection)
        return chunk is not None and self._chunks[chunk].state is Import.ACTIVATING

    def reserve_done(self, event: events.ReserveDone) -> None:
        """Answer the page."""
        lease = self._leases.get((event.exporter, event.batch))
        page = lease.pages.pop(event.page, None) if lease is not None else None
        if lease is None or page is None:  # the lease went meanwhile
            return
        places: list[Place | Refusal] = []
        answers = iter(event.places)
        for position, item in enumerate(page.items):
            refusal = page.refused.get(position)
            if refusal is not None:
                places.append(refusal)
                continue
            place = next(answers, None)
            if place is None:
                raise UndeclaredTransition("ReserveDone has fewer places than its Reserve had items")
            if isinstance(place, Refusal):
                self._reserved.pop(item.migration, None)
                self._keep(item, -1)
            else:
                lease.reserved[item.migration] = Arrival(item, place)
            places.append(place)
        self._context.stream(event.exporter, messages.Reserved(event.batch, page.number, tuple(places)))

    def prepared(self, event: events.PrepareDone) -> None:
        """PREPARED; or discard it, if the exporter gave up meanwhile."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.arrivals):
            raise UndeclaredTransition(f"PrepareDone does not fit chunk {event.chunk}")
        for arrival in chunk.arrivals:
            self._keep(arrival.item, -1)
        chunk.prepared = tuple(
            position for position, result in enumerate(event.results) if not isinstance(result, Refusal)
        )
        chunk.state = step(IMPORT, chunk.state, "prepared" if chunk.prepared else "none prepared")
        chunk.answer = messages.Prepared(chunk.id, event.results)
        if chunk.state is Import.DISCARDED:
            self._discard(chunk, chunk.prepared)
            self._forget(chunk)
            if chunk.prepared:
                return  # given up by the exporter: it waits for nothing
        else:
            self._later(chunk)
        self._context.stream(chunk.exporter, chunk.answer)

    def activated(self, event: events.ActivateDone) -> None:
        """ACTIVE; the shell has journalled it."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.committed):
            raise UndeclaredTransition(f"ActivateDone does not fit chunk {event.chunk}")
        chunk.state = step(IMPORT, chunk.state, "activated")
        refused: list[tuple[int, Code]] = []
        for position, holding, refusal in zip(chunk.committed, chunk.holdings, event.results, strict=True):
            self._routes.arrived(holding, alive=refusal is None)
            if refusal is not None:
                refused.append((position, refusal.code))
        self._forget(chunk)
        listed = tuple(chunk.committed[index] for index in event.listed)
        answer = messages.Active(chunk.id, tuple(refused), listed)
        self._answers[chunk.id] = (chunk.exporter, answer)
        if len(self._answers) > _ANSWERS_KEPT:
            self._answers.popitem(last=False)
        self._context.out.append(actions.Send(chunk.exporter, answer, chunk.reply))

    def stream_lost(self, event: events.StreamLost) -> None:
        """What that host had reserved will not come; what it had shipped is in doubt."""
        for lease in list(self._leases.values()):
            if lease.exporter == event.host and lease.state is Lease.RESERVED:
                self._drop(lease, "RELEASE")
        for chunk in self._chunks.values():
            if chunk.exporter == event.host and chunk.state is Import.PREPARED:
                chunk.attempt = 0
                self._later(chunk)

    def send_failed(self, event: events.SendFailed, reason: Refusal) -> None:
        """Say no instead. What is prepared learns by QUERY that it was undone; places go with their lease."""
        match event.message:
            case messages.Reserved(batch, page, places) if _any_good(places):
                self._context.stream(event.to, messages.Reserved(batch, page, (reason,) * len(places)))
            case messages.Prepared(chunk_id, results) if _any_good(results):
                answer = messages.Prepared(chunk_id, (reason,) * len(results))
                if (chunk := self._chunks.get(chunk_id)) is not None:
                    chunk.answer = answer
                self._context.stream(event.to, answer)

    def timer(self, key: tuple[object, ...]) -> bool:
        """A deadline of this role; False if ``key`` is none."""
        match key:
            case ("lease", bytes() as exporter, bytes() as batch):
                self._drop(self._leases[exporter, batch], "expired")
            case ("query", ChunkId() as chunk_id):
                self._query(self._chunks[chunk_id])
            case _:
                return False
        return True

    # --- messages --------------------------------------------------------------------------

    def on_request(self, source: HostId, message: messages.Request, _unused: Channel) -> None:
        """OFFER what there is room for; silence means no."""
        context, capacity = self._context, self._context.capacity
        explicit = message.target is not None or message.target_address is not None
        if context.stopping or (
            explicit and message.target != context.host and message.target_address not in capacity.addresses
        ):
            return
        if message.counts.connected and not set(message.modes) & set(capacity.modes):
            return  # what a single one needs is looked at by RESERVE
        lease = self._leases.get((source, message.batch))
        if lease is not None:
            self._unroom(lease)
        rooms = Counts(
            *(
                max(0, min(want, room - kept))
                for want, room, kept in zip(message.counts, capacity.rooms, self._kept, strict=True)
            )
        )
        if lease is None:
            if not rooms.total:
                return
            lease = self._leases[source, message.batch] = _Lease(source, message.batch)
        lease.state = step(LEASE, lease.state, "REQUEST")
        for index in range(3):
            lease.rooms[index] = rooms[index]
            self._kept[index] += rooms[index]
        self._refresh(lease)
        if rooms.total:
            context.datagram(
                source,
                messages.Offer(
                    message.batch,
                    rooms,
                    capacity.waiting,
                    capacity.load,
                    capacity.weight,
                    capacity.modes,
                    int(context.settings.lease_s * 1000),
                ),
            )

    def on_release(self, source: HostId, message: messages.Release, _unused: Channel) -> None:
        """Another host was chosen, or the batch is over."""
        lease = self._leases.get((source, message.batch))
        if lease is not None and self._context.host not in message.chosen:
            self._drop(lease, "RELEASE")

    def on_reserve(self, source: HostId, message: messages.Reserve, _unused: Channel) -> None:
        """Let the shell choose places for what can be taken; refuse the rest by name."""
        lease = self._leases.get((source, message.batch))
        if lease is None:  # a listener's children, or the lease has expired: as far as there is room
            lease = self._leases[source, message.batch] = _Lease(source, message.batch)
        if message.page in lease.seen:
            self._context.ignore(source, message, "this page has been reserved")
            return
        lease.seen.add(message.page)
        lease.state = step(LEASE, lease.state, "RESERVE")
        refused: dict[int, Refusal] = {}
        wanted: list[Item] = []
        again: list[MigrationId] = []
        for position, item in enumerate(message.items):
            refusal = self._acceptable(item) or self._too_large(item)
            other = self._reserved.get(item.migration)
            if refusal is None and other is lease and item.migration in lease.reserved:
                del lease.reserved[item.migration], self._reserved[item.migration]
                again.append(item.migration)
                self._keep(item, -1)
            elif refusal is None and other is not None:
                refusal = Refusal(
                    Code.ALREADY_MIGRATING,
                    "the importer still keeps a place for it from another attempt; wait some seconds, "
                    "then export it again",
                )
            if refusal is None and not self._room(lease, item):
                refusal = Refusal(
                    Code.LIST_FULL,
                    f"the importer's {item.kind} list is full; import from it or raise its maximum",
                )
            if refusal is None:
                wanted.append(item)
                self._reserved[item.migration] = lease
            else:
                refused[position] = refusal
        self._refresh(lease)
        if again:
            self._context.out.append(actions.Unreserve(tuple(again)))
        self._ticket += 1
        lease.pages[self._ticket] = _Page(message.page, message.items, refused)
        if wanted:
            known = self._routes.routes
            former = tuple(
                known[item.connection].local if item.connection in known else None for item in wanted
            )
            self._context.out.append(
                actions.Reserve(message.batch, source, self._ticket, tuple(wanted), message.modes, former)
            )
        else:
            self.reserve_done(events.ReserveDone(message.batch, source, self._ticket, ()))

    def on_ship(self, source: HostId, message: messages.Ship, _unused: Channel) -> None:
        """Prepare a chunk of reserved items."""
        context, chunk = self._context, self._chunks.get(message.chunk)
        if not len(message.images) == len(message.places) == len(message.migrations):
            context.ignore(source, message, "it needs an image and a place for each migration")
            return
        if chunk is not None or message.chunk in self._answers:
            if chunk is not None and chunk.exporter == source and chunk.answer is not None:
                context.stream(source, chunk.answer)
            else:
                context.ignore(source, message, "the chunk is already here")
            return
        lease = self._leases.get((source, message.chunk.batch))
        known = lease.reserved if lease is not None else {}
        reserved = len(set(message.migrations)) == len(message.migrations) and all(
            migration in known
            and known[migration].place == place
            and self._acceptable(known[migration].item) is None  # it may have come another way
            for migration, place in zip(message.migrations, message.places, strict=True)
        )
        if context.stopping or lease is None or not reserved:
            refusal = (
                Refusal(Code.SHUTTING_DOWN, "the importing daemon is stopping; export it again")
                if context.stopping
                else Refusal(Code.TIMEOUT, "the importer's reservation has expired; export it again")
            )
            context.stream(source, messages.Prepared(message.chunk, (refusal,) * len(message.migrations)))
            return
        arrivals = tuple(lease.reserved.pop(migration) for migration in message.migrations)
        for migration in message.migrations:
            del self._reserved[migration]
        self._refresh(lease)
        chunk = _Chunk(message.chunk, source, Import.PREPARING, arrivals)
        self._chunks[chunk.id] = chunk
        for arrival in arrivals:
            self._arriving[arrival.item.connection] = chunk.id
        context.out.append(actions.Prepare(chunk.id, source, arrivals, message.images))

    def on_confirm(self, source: HostId, message: messages.Confirm, channel: Channel) -> None:
        """The decision is COMMIT: carry it out, once."""
        context, chunk = self._context, self._chunks.get(message.chunk)
        if chunk is None:
            # Prepared chunks are only forgotten by ABORT or ACTIVE, and an exporter that
            # confirms has never aborted: so this is a repetition.
            exporter, answer = self._answers.get(message.chunk, (source, messages.Active(message.chunk)))
            if exporter == source:
                context.out.append(actions.Send(source, answer, channel))
            else:
                context.ignore(source, message, "another host is the exporter")
            return
        if chunk.exporter != source:
            context.ignore(source, message, "another host is the exporter")
            return
        if chunk.state is Import.ACTIVATING:
            chunk.reply = channel
            return
        committed = tuple(sorted(set(message.committed)))
        if chunk.state is not Import.PREPARED or not committed or set(committed) - set(chunk.prepared):
            context.ignore(source, message, "it does not fit what was prepared")
            return
        chunk.state = step(IMPORT, chunk.state, "CONFIRM")
        context.timers.cancel(("query", chunk.id))
        chunk.committed, chunk.reply = committed, channel
        self._discard(chunk, tuple(one for one in chunk.prepared if one not in set(committed)))
        chunk.holdings = tuple(self._holding(chunk, position) for position in committed)
        returning = self._routes.returning(chunk.holdings)
        context.out.append(actions.Activate(chunk.id, chunk.holdings, returning))

    def on_abort(self, source: HostId, message: messages.Abort, _unused: Channel) -> None:
        """The decision is ABORT: no trace is left."""
        chunk = self._chunks.get(message.chunk)
        if chunk is None:
            return
        if chunk.exporter != source or chunk.state not in (Import.PREPARING, Import.PREPARED):
            self._context.ignore(source, message, "it is not this host's to abort, or already decided")
            return
        chunk.state = step(IMPORT, chunk.state, "ABORT")
        if chunk.state is Import.DISCARDED:
            self._context.timers.cancel(("query", chunk.id))
            self._discard(chunk, chunk.prepared)
            self._forget(chunk)

    def on_undecided(self, source: HostId, message: messages.Undecided, _unused: Channel) -> None:
        """The next QUERY is already set."""

    # --- leases ----------------------------------------------------------------------------

    def _acceptable(self, item: Item) -> Refusal | None:
        if self._context.stopping:
            return Refusal(Code.SHUTTING_DOWN, "the importing daemon is stopping; export it again")
        known = self._routes.known_hop(item.connection)
        if item.connection in self._arriving or (known is not None and known >= item.hop):
            return Refusal(
                Code.ALREADY_MIGRATING,
                f"the importer already knows this connection (hop {known}); wait until that move is over",
            )
        return None

    def _too_large(self, item: Item) -> Refusal | None:
        size, most = item.needs.image_bytes_max, self._context.capacity.image_bytes_max
        if size <= most:
            return None
        return Refusal(
            Code.TOO_LARGE,
            f"its image may take {size} bytes, and the importer's image_bytes_max is {most}; raise it there, "
            "or try again when less is queued",
        )

    def _keep(self, item: Item, by: int) -> None:
        self._kept[_index(item)] += by

    def _room(self, lease: _Lease, item: Item) -> bool:
        """Take one place of the lease, or a free one."""
        index = _index(item)
        if lease.rooms[index] > 0:
            lease.rooms[index] -= 1
            return True  # counted when it was offered
        if self._context.capacity.rooms[index] - self._kept[index] > 0:
            self._kept[index] += 1
            return True
        return False

    def _unroom(self, lease: _Lease) -> None:
        for index in range(3):
            self._kept[index] -= lease.rooms[index]
            lease.rooms[index] = 0

    def _refresh(self, lease: _Lease) -> None:
        when = self._context.now + self._context.settings.lease_s
        self._context.timers.set(("lease", lease.exporter, lease.batch), when)

    def _drop(self, lease: _Lease, trigger: str) -> None:
        lease.state = step(LEASE, lease.state, trigger)
        del self._leases[lease.exporter, lease.batch]
        self._context.timers.cancel(("lease", lease.exporter, lease.batch))
        self._unroom(lease)
        gone = list(lease.reserved)
        for arrival in lease.reserved.values():
            self._keep(arrival.item, -1)
        for page in lease.pages.values():  # the shell is still at it; it hears in order
            for position, item in enumerate(page.items):
                if position not in page.refused:
                    self._keep(item, -1)
                    gone.append(item.migration)
        for migration in gone:
            del self._reserved[migration]
        if gone:
            self._context.out.append(actions.Unreserve(tuple(gone)))

    # --- chunks ----------------------------------------------------------------------------

    def _holding(self, chunk: _Chunk, position: int) -> Holding:
        arrival = chunk.arrivals[position]
        item = arrival.item
        return Holding(
            item.connection,
            item.migration,
            item.kind,
            item.hop,
            item.home,
            chunk.exporter,
            arrival.place,
            item.local,
            item.remote,
            item.origin,
        )

    def _query(self, chunk: _Chunk) -> None:
        """QUERY now and again, more and more seldom, until the decision is known."""
        self._context.datagram(chunk.exporter, messages.Query(chunk.id))
        self._later(chunk)

    def _later(self, chunk: _Chunk) -> None:
        self._context.timers.set(
            ("query", chunk.id), self._context.now + self._context.backoff(chunk.attempt)
        )
        chunk.attempt += 1

    def _discard(self, chunk: _Chunk, positions: tuple[int, ...]) -> None:
        if positions:
            gone = tuple(chunk.arrivals[position].item.migration for position in positions)
            self._context.out.append(actions.Discard(chunk.id, gone))

    def _forget(self, chunk: _Chunk) -> None:
        del self._chunks[chunk.id]
        self._context.timers.cancel(("query", chunk.id))
        for arrival in chunk.arrivals:
            self._arriving.pop(arrival.item.connection, None)


def _any_good(answers: tuple[object, ...]) -> bool:
    return not all(isinstance(answer, Refusal) for answer in answers)


def _index(item: Item) -> int:
    return _INDEX[item.kind]


_INDEX = {kind: Counts._fields.index(kind.value) for kind in Kind}
