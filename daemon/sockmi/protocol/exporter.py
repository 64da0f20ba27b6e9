# SPDX-License-Identifier: MIT
"""The exporter's side: from REQUEST to the importer's ACTIVE, for all batches of this host.

A **batch** asks for importers until each item has one; the part that goes to one importer is a
**leg**; a leg reserves its items page by page and moves them chunk by chunk. Before COMMIT
every retry is bounded and every failure thaws; after COMMIT there is only forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from sockmi.engine.base import Fidelity, Kind, Needs
from sockmi.policy import Candidate
from sockmi.protocol import actions, events, messages
from sockmi.protocol.actions import Outcome, Result
from sockmi.protocol.context import Context
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import (
    BatchId,
    ChunkId,
    ConnectionId,
    Counts,
    Decision,
    HostId,
    Item,
    MigrationId,
    Notice,
    Place,
    Route,
)
from sockmi.protocol.routing import Routes
from sockmi.protocol.tables import EXPORT, LEG, Export, Leg, UndeclaredTransition, step
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

_ELSEWHERE = frozenset({Code.LIST_FULL, Code.PORT_TAKEN, Code.TUPLE_TAKEN, Code.SHUTTING_DOWN})
_CHOSEN_MAX = 60  # hosts that a RELEASE datagram can name; with more, the leases just expire


@dataclass(slots=True)
class _Leg:
    host: HostId
    state: Leg = Leg.OPENING
    unreserved: deque[Item] = field(default_factory=deque)
    pages: dict[int, tuple[Item, ...]] = field(default_factory=dict)
    ready: deque[tuple[Item, Place]] = field(default_factory=deque)
    moving: set[ChunkId] = field(default_factory=set)


@dataclass(slots=True)
class _Batch:
    id: BatchId
    modes: tuple[Mode, ...]
    deadline: float
    timeout_s: float
    target: HostId | None
    target_address: IPv4Address | IPv6Address | None = None
    left: int = 0  # items without an outcome
    pending: dict[MigrationId, Item] = field(default_factory=dict)  # without an importer
    reasons: dict[MigrationId, Refusal] = field(default_factory=dict)  # why they were sent back
    offers: dict[HostId, messages.Offer] = field(default_factory=dict)
    legs: dict[HostId, _Leg] = field(default_factory=dict)
    failures: dict[HostId, int] = field(default_factory=dict)
    next_page: int = 0  # numbers are never used again in a batch: they fence
    next_chunk: int = 0
    expired: Refusal | None = None
    follows: bool = False  # a listener's children: straight to the target, without REQUEST


@dataclass(slots=True)
class _Chunk:
    id: ChunkId
    host: HostId
    state: Export
    migrations: tuple[MigrationId, ...]
    items: tuple[Item, ...] = ()  # empty after a restart
    places: tuple[Place, ...] = ()
    reason: Refusal | None = None  # why it is being given up
    retry: bool = False  # given up, but its items may try another importer
    fidelity: dict[int, Fidelity] = field(default_factory=dict)
    prepared: tuple[int, ...] = ()
    routes: tuple[Route, ...] = ()  # of what is prepared
    committed: tuple[int, ...] = ()
    attempt: int = 0


class ExporterCore:
    """See the module docstring; events and messages come by the methods named after them."""

    def __init__(self, context: Context, routes: Routes) -> None:
        self._context = context
        self._routes = routes
        self._batches: dict[BatchId, _Batch] = {}
        self._chunks: dict[ChunkId, _Chunk] = {}
        self._moving: set[ConnectionId] = set()
        self._connections: dict[tuple[BatchId, MigrationId], ConnectionId] = {}

    # --- the shell -------------------------------------------------------------------------

    def started(self, event: events.Started) -> None:
        """Go on confirming what was committed before the restart."""
        for decision in event.decisions:
            chunk = _Chunk(
                decision.chunk,
                decision.importer,
                Export.CONFIRMING,
                decision.migrations,
                committed=decision.committed,
            )
            self._chunks[chunk.id] = chunk
            self._confirm(chunk, Channel.DATAGRAM)

    def start_export(self, event: events.StartExport) -> None:
        """Begin a batch."""
        batch = _Batch(
            event.batch,
            event.modes,
            self._context.now + event.timeout_s,
            event.timeout_s,
            event.target,
            event.target_address,
            left=len(event.items),
        )
        self._begin(batch, event.items)
        if batch.target == self._context.host or (
            batch.target_address is not None and batch.target_address in self._context.capacity.addresses
        ):
            self._refuse_pending(
                batch,
                Refusal(Code.NO_SUCH_HOST, "the target is this host itself; name another host of the group"),
            )
        elif batch.pending:
            self._request(batch)
        self._finish(batch)

    def children_found(self, event: events.ChildrenFound) -> None:
        """Begin a batch that goes where the listener went."""
        batch = _Batch(
            event.batch,
            event.modes,
            self._context.now + event.timeout_s,
            event.timeout_s,
            event.host,
            left=len(event.items),
            follows=True,
        )
        self._begin(batch, event.items)
        if batch.pending:
            self._to_leg(batch, event.host, list(batch.pending.values()))
        self._finish(batch)

    def cancel_export(self, event: events.CancelExport) -> None:
        """Undo what of the batch is not committed."""
        batch = self._batches.get(event.batch)
        if batch is not None:
            self._give_up(
                batch, Refusal(Code.TIMEOUT, "the export was cancelled or took too long; export it again")
            )

    def stop(self) -> None:
        """Undo all that is not committed."""
        for batch in list(self._batches.values()):
            self._give_up(
                batch,
                Refusal(Code.SHUTTING_DOWN, "the exporting daemon is stopping; export it again when it runs"),
            )

    @property
    def busy(self) -> bool:
        """Whether the shell is still to answer something."""
        return any(
            chunk.state in (Export.FREEZING, Export.UNFREEZING, Export.COMMITTING)
            for chunk in self._chunks.values()
        )

    @property
    def idle(self) -> bool:
        """Whether nothing at all is left to do."""
        return not self._chunks and not self._batches

    def frozen(self, event: events.FreezeDone) -> None:
        """Ship what could be frozen, or thaw it if the chunk was given up meanwhile."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.items):
            raise UndeclaredTransition(f"FreezeDone does not fit chunk {event.chunk}")
        images: list[bytes] = []
        kept: list[int] = []
        refused: list[Result] = []
        for position, result in enumerate(event.results):
            if isinstance(result, Refusal):
                refused.append(Result(chunk.migrations[position], Outcome.REFUSED, refusal=result))
            else:
                kept.append(position)
                images.append(result)
        chunk.items = tuple(chunk.items[position] for position in kept)
        chunk.places = tuple(chunk.places[position] for position in kept)
        chunk.migrations = tuple(chunk.migrations[position] for position in kept)
        chunk.state = step(EXPORT, chunk.state, "frozen" if kept else "none frozen")
        batch = self._batches[chunk.id.batch]
        self._report(batch, refused)
        if chunk.state is Export.SHIPPED:
            self._context.stream(
                chunk.host, messages.Ship(chunk.id, chunk.migrations, chunk.places, tuple(images))
            )
            self._advance(batch, chunk.host)
        else:
            self._undone(chunk, kept=bool(kept))

    def committed(self, event: events.CommitDone) -> None:
        """CONFIRM what is committed; from here only forward."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.prepared):
            raise UndeclaredTransition(f"CommitDone does not fit chunk {event.chunk}")
        batch = self._batches[chunk.id.batch]
        committed: list[int] = []
        results: list[Result] = []
        refused: list[Result] = []
        for position, route, refusal in zip(chunk.prepared, chunk.routes, event.results, strict=True):
            migration = chunk.migrations[position]
            if refusal is None:
                committed.append(position)
                place, fidelity = chunk.places[position], chunk.fidelity[position]
                results.append(
                    Result(migration, Outcome.COMMITTED, chunk.host, place=place, fidelity=fidelity)
                )
                self._routes.departed(route)
            else:
                refused.append(Result(migration, Outcome.REFUSED, refusal=refusal))
        chunk.state = step(EXPORT, chunk.state, "committed" if committed else "none committed")
        chunk.committed = tuple(committed)
        self._report(batch, results)
        self._report(batch, refused)
        if committed:
            self._confirm(chunk, Channel.STREAM)
        else:
            self._drop(chunk)
            self._context.stream(chunk.host, messages.Abort(chunk.id))
        self._leave(batch, chunk)

    def stream_opened(self, event: events.StreamOpened) -> None:
        """Go on with the legs to that host."""
        for batch in list(self._batches.values()):
            leg = batch.legs.get(event.host)
            if leg is not None and leg.state is Leg.OPENING:
                leg.state = step(LEG, leg.state, "stream opened")
                self._context.timers.cancel(("leg", batch.id, leg.host))
                self._advance(batch, leg.host)
                self._finish(batch)

    def stream_lost(self, event: events.StreamLost) -> None:
        """Undo what that host has not yet prepared and we have not yet committed."""
        why = f" ({event.reason})" if event.reason else ""
        for batch in list(self._batches.values()):
            self._lose(
                batch,
                event.host,
                Refusal(Code.PEER_LOST, f"the stream to the importer broke{why}; export it again"),
                streaming=False,
            )

    def forget(self, host: HostId) -> None:
        """``host`` will never come back: its copies are lost to us."""
        for chunk in [
            one for one in self._chunks.values() if one.host == host and one.state is Export.CONFIRMING
        ]:
            self._settle(chunk, "importer forgotten", lost=chunk.committed)

    def timer(self, key: tuple[object, ...]) -> bool:
        """A deadline of this role; False if ``key`` is none."""
        match key:
            case ("request", bytes() as batch_id):
                self._request(self._batches[batch_id])
            case ("choose", bytes() as batch_id):
                self._assign(self._batches[batch_id])
                self._finish(self._batches[batch_id])
            case ("batch", bytes() as batch_id):
                self._expire(self._batches[batch_id])
            case ("leg", bytes() as batch_id, bytes() as host):
                self._lose(
                    self._batches[batch_id],
                    host,
                    Refusal(Code.PEER_LOST, "the importer did not answer in time; export it again"),
                )
            case ("freeze", ChunkId() as chunk_id):
                chunk = self._chunks[chunk_id]
                self._lose(
                    self._batches[chunk_id.batch],
                    chunk.host,
                    Refusal(
                        Code.FREEZE_DEADLINE,
                        f"the importer was not prepared within {self._context.settings.freeze_deadline_s} s "
                        "of the freeze; the connection goes on here, export it again",
                    ),
                )
            case ("confirm", ChunkId() as chunk_id):
                self._confirm(self._chunks[chunk_id], Channel.DATAGRAM)
            case _:
                return False
        return True

    # --- messages --------------------------------------------------------------------------

    def on_offer(self, source: HostId, message: messages.Offer, _: Channel) -> None:
        """Keep it, and choose unless there is a grace window."""
        context, batch = self._context, self._batches.get(message.batch)
        if batch is None or not batch.pending or batch.follows:
            return  # others were faster: not worth a word
        if batch.target is not None and source != batch.target:
            context.ignore(source, message, "another host is the target")
            return
        needs_redirect = any(item.kind is Kind.CONNECTED for item in batch.pending.values())
        if needs_redirect and not set(batch.modes) & set(message.modes):
            context.ignore(source, message, "no redirect that both hosts can")
            return
        if batch.failures.get(source, 0) >= context.settings.leg_failures_max:
            context.ignore(source, message, "it failed too often in this batch")
            return
        batch.offers[source] = message
        if context.settings.offer_grace_s <= 0:
            self._assign(batch)
        elif ("choose", batch.id) not in context.timers:
            context.timers.set(("choose", batch.id), context.now + context.settings.offer_grace_s)

    def on_reserved(self, source: HostId, message: messages.Reserved, _: Channel) -> None:
        """The items of a page become ready to be frozen, or are refused."""
        batch = self._batches.get(message.batch)
        leg = batch.legs.get(source) if batch is not None else None
        items = leg.pages.get(message.page) if leg is not None else None
        if batch is None or leg is None or items is None or len(items) != len(message.places):
            self._context.ignore(source, message, "no such page is being reserved")
            return
        del leg.pages[message.page]
        refused: list[Result] = []
        back: dict[Refusal, list[Item]] = {}
        for item, place in zip(items, message.places, strict=True):
            if isinstance(place, Refusal):
                if place.code in _ELSEWHERE and batch.target is None:
                    back.setdefault(place, []).append(item)
                    continue
                refused.append(Result(item.migration, Outcome.REFUSED, source, refusal=place))
            elif item.kind is Kind.CONNECTED and (place.mode not in batch.modes or place.endpoint is None):
                refusal = Refusal(
                    Code.NO_REDIRECT, f"the importer chose {place.mode}, which this host cannot; see doctor"
                )
                refused.append(Result(item.migration, Outcome.REFUSED, source, refusal=refusal))
            else:
                leg.ready.append((item, place))
        self._report(batch, refused)
        if back:
            batch.failures[source] = batch.failures.get(source, 0) + 1
            for refusal, returned in back.items():
                self._return(batch, returned, refusal)
        self._advance(batch, source)
        self._finish(batch)

    def on_prepared(self, source: HostId, message: messages.Prepared, _: Channel) -> None:
        """Commit what the importer has prepared, thaw what it refused."""
        chunk = self._chunks.get(message.chunk)
        if chunk is None:
            self._context.stream(source, messages.Abort(message.chunk))
            return
        if (
            chunk.host != source
            or chunk.state is not Export.SHIPPED
            or len(message.results) != len(chunk.items)
        ):
            self._context.ignore(source, message, "the chunk does not wait for this")
            return
        self._context.timers.cancel(("freeze", chunk.id))
        batch = self._batches[chunk.id.batch]
        prepared: list[int] = []
        refused: list[Result] = []
        for position, result in enumerate(message.results):
            if isinstance(result, Refusal):
                refused.append(Result(chunk.migrations[position], Outcome.REFUSED, source, refusal=result))
            else:
                chunk.fidelity[position] = result
                prepared.append(position)
        chunk.prepared = tuple(prepared)
        chunk.state = step(EXPORT, chunk.state, "PREPARED" if prepared else "none prepared")
        if refused:
            self._thaw(chunk.id, [result.migration for result in refused])
        if prepared:
            chunk.routes = tuple(
                self._route(chunk.items[position], source, chunk.places[position]) for position in prepared
            )
            notices = tuple(
                Notice(route.connection, route.hop, route.home, route.holder, route.place)
                for route in chunk.routes
                if route.durable and route.home != self._context.host
            )
            decision = Decision(chunk.id, source, chunk.migrations, chunk.prepared)
            self._context.out.append(actions.Commit(decision, chunk.routes, notices))
            self._report(batch, refused)
        else:
            self._report(batch, refused)
            self._drop(chunk)
            self._leave(batch, chunk)

    def on_active(self, source: HostId, message: messages.Active, _: Channel) -> None:
        """The importer carried it out: the decision may be forgotten."""
        chunk = self._chunks.get(message.chunk)
        if chunk is None:
            return  # a repetition
        if chunk.host != source or chunk.state is not Export.CONFIRMING:
            self._context.ignore(source, message, "the chunk does not wait for this")
            return
        committed = set(chunk.committed)
        codes = {position: code for position, code in message.refused if position in committed}
        self._settle(chunk, "ACTIVE", lost=tuple(codes), codes=codes)

    def on_query(self, source: HostId, message: messages.Query, channel: Channel) -> None:
        """Presumed abort: what is neither decided nor being decided was aborted."""
        chunk = self._chunks.get(message.chunk)
        answer: messages.Message
        if chunk is None:
            answer = messages.Abort(message.chunk)
        elif chunk.host != source:
            self._context.ignore(source, message, "the chunk went to another host")
            return
        elif chunk.state is Export.CONFIRMING:
            answer = messages.Confirm(chunk.id, chunk.committed)
        else:
            answer = messages.Undecided(chunk.id)
        self._context.out.append(actions.Send(source, answer, channel))

    # --- batches ---------------------------------------------------------------------------

    def _begin(self, batch: _Batch, items: Sequence[Item]) -> None:
        if batch.id in self._batches:
            raise UndeclaredTransition(f"batch {batch.id.hex()} is already under way")
        self._batches[batch.id] = batch
        refused: list[Result] = []
        for item in items:
            refusal = self._acceptable(item)
            if refusal is None:
                batch.pending[item.migration] = item
                self._moving.add(item.connection)
                self._connections[batch.id, item.migration] = item.connection
            else:
                refused.append(Result(item.migration, Outcome.REFUSED, refusal=refusal))
        self._report(batch, refused)
        self._context.timers.set(("batch", batch.id), batch.deadline)

    def _acceptable(self, item: Item) -> Refusal | None:
        if self._context.stopping:
            return Refusal(
                Code.SHUTTING_DOWN, "the exporting daemon is stopping; export it again when it runs"
            )
        if item.connection in self._moving:
            return Refusal(Code.ALREADY_MIGRATING, "this connection is already being exported; wait for it")
        expected = self._routes.next_hop(item.connection)
        if item.kind is not Kind.BOUND and item.hop != expected:
            return Refusal(
                Code.ALREADY_MIGRATING,
                f"hop {item.hop} of this connection cannot start here "
                + ("(it has left this host)" if expected is None else f"(the next one is {expected})")
                + "; list the sockets again and export the one that is there",
            )
        return None

    def _request(self, batch: _Batch) -> None:
        """REQUEST what has no importer yet, again and again until the deadline."""
        if not batch.pending or batch.follows:
            return
        bound = listening = connected = size = scale = image_max = 0
        timestamp_us = False
        for item in batch.pending.values():
            if item.kind is Kind.CONNECTED:
                connected += 1
            elif item.kind is Kind.LISTENING:
                listening += 1
            else:
                bound += 1
            size += item.size_bytes
            scale = max(scale, item.needs.window_scale)
            image_max = max(image_max, item.needs.image_bytes_max)
            timestamp_us = timestamp_us or item.needs.timestamp_us
        request = messages.Request(
            batch.id,
            Counts(bound, listening, connected),
            Needs(scale, timestamp_us, image_max),
            size,
            batch.modes,
            batch.target,
            batch.target_address,
        )
        self._context.datagram(batch.target, request)
        interval = self._context.settings.request_interval_s
        self._context.timers.set(("request", batch.id), self._context.now + interval)

    def _assign(self, batch: _Batch) -> None:
        """Divide the pending items among the offers, by policy."""
        context = self._context
        if not batch.pending or not batch.offers:
            return
        candidates = [
            Candidate(host, offer.rooms, offer.waiting, offer.load, offer.weight)
            for host, offer in batch.offers.items()
        ]
        batch.offers.clear()
        context.timers.cancel(("choose", batch.id))
        lists: dict[Kind, list[Item]] = {kind: [] for kind in Kind}
        for item in batch.pending.values():
            lists[item.kind].append(item)
        wanted = Counts(len(lists[Kind.BOUND]), len(lists[Kind.LISTENING]), len(lists[Kind.CONNECTED]))
        for share in context.policy.assign(wanted, candidates):
            taken: list[Item] = []
            for kind, waiting in lists.items():
                count = share.counts.of(kind)
                taken += waiting[:count]
                del waiting[:count]
            self._to_leg(batch, share.host, taken)
        if not batch.pending:
            context.timers.cancel(("request", batch.id))
            chosen = tuple(leg.host for leg in batch.legs.values())
            if len(chosen) <= _CHOSEN_MAX and batch.target is None:
                context.datagram(None, messages.Release(batch.id, chosen))

    def _to_leg(self, batch: _Batch, host: HostId, items: list[Item]) -> None:
        if not items:
            return
        for item in items:
            del batch.pending[item.migration]
        leg = batch.legs.get(host)
        if leg is None:
            leg = batch.legs[host] = _Leg(host)
            self._context.out.append(actions.OpenStream(host))
            self._await(batch, leg, self._context.settings.stream_timeout_s)
        leg.unreserved.extend(items)
        self._advance(batch, host)

    def _await(self, batch: _Batch, leg: _Leg, timeout_s: float) -> None:
        self._context.timers.set(("leg", batch.id, leg.host), self._context.now + timeout_s)

    def _advance(self, batch: _Batch, host: HostId) -> None:
        """Reserve, freeze, or close the leg: whatever it can do now."""
        leg = batch.legs.get(host)
        if leg is None or leg.state is not Leg.OPEN:
            return
        context, settings = self._context, self._context.settings
        while leg.unreserved and len(leg.pages) < settings.pages_in_flight:
            count = min(settings.page_items, len(leg.unreserved))
            page = tuple(leg.unreserved.popleft() for _ in range(count))
            leg.pages[batch.next_page] = page
            context.stream(host, messages.Reserve(batch.id, batch.next_page, page, batch.modes))
            batch.next_page += 1
        if leg.pages:
            self._await(batch, leg, settings.reserve_timeout_s)
        else:
            context.timers.cancel(("leg", batch.id, host))
        freezing = any(self._chunks[one].state is Export.FREEZING for one in leg.moving)
        while leg.ready and not freezing and len(leg.moving) < settings.pipeline_depth:
            self._freeze(batch, leg)
            freezing = True  # the next one when this one is shipped: its freeze would only wait
        if not (leg.unreserved or leg.pages or leg.ready or leg.moving):
            self._close(batch, leg, "nothing left")
            context.stream(host, messages.Release(batch.id))

    def _freeze(self, batch: _Batch, leg: _Leg) -> None:
        settings = self._context.settings
        items: list[Item] = []
        places: list[Place] = []
        size = 0
        while leg.ready and len(items) < settings.chunk_items:
            item, place = leg.ready[0]
            size += item.size_bytes
            if items and size > settings.chunk_bytes:
                break
            leg.ready.popleft()
            items.append(item)
            places.append(place)
        chunk = _Chunk(
            ChunkId(batch.id, batch.next_chunk),
            leg.host,
            Export.FREEZING,
            tuple(item.migration for item in items),
            tuple(items),
            tuple(places),
        )
        batch.next_chunk += 1
        self._chunks[chunk.id] = chunk
        leg.moving.add(chunk.id)
        deadline_s = settings.freeze_deadline_s
        self._context.timers.set(("freeze", chunk.id), self._context.now + deadline_s)
        self._context.out.append(actions.Freeze(chunk.id, chunk.items, chunk.places, deadline_s))

    def _close(self, batch: _Batch, leg: _Leg, trigger: str) -> None:
        leg.state = step(LEG, leg.state, trigger)
        self._context.timers.cancel(("leg", batch.id, leg.host))
        del batch.legs[leg.host]

    def _lose(self, batch: _Batch, host: HostId, reason: Refusal, streaming: bool = True) -> None:
        """The importer is lost to this batch: thaw, and let the items try another one.

        ``streaming``: the stream is still there, so the host can be told in order.
        """
        leg = batch.legs.get(host)
        if leg is None:
            return
        batch.failures[host] = batch.failures.get(host, 0) + 1
        batch.offers.pop(host, None)
        was_open = leg.state is Leg.OPEN
        self._close(batch, leg, "lost")
        back = list(leg.unreserved) + [item for page in leg.pages.values() for item in page]
        back += [item for item, _ in leg.ready]
        for chunk_id in sorted(leg.moving):
            self._abort(self._chunks[chunk_id], reason, retry=True, streaming=streaming)
        if was_open and streaming:  # else the importer sees it too, or its lease expires
            self._context.stream(host, messages.Release(batch.id))
        self._return(batch, back, reason)
        self._finish(batch)

    def _return(self, batch: _Batch, items: Iterable[Item], reason: Refusal) -> None:
        """Items without an importer: ask again if there is time, else refuse."""
        items = list(items)
        if not items:
            return
        target, most = batch.target, self._context.settings.leg_failures_max
        failed = target is not None and batch.failures.get(target, 0) >= most
        if batch.expired is not None or failed or self._context.now >= batch.deadline:
            self._report(batch, [Result(one.migration, Outcome.REFUSED, refusal=reason) for one in items])
            return
        for item in items:
            batch.pending[item.migration] = item
            batch.reasons[item.migration] = reason
        if batch.follows and target is not None:
            self._to_leg(batch, target, items)
        elif ("request", batch.id) not in self._context.timers:
            self._request(batch)

    def _expire(self, batch: _Batch) -> None:
        """Nobody took the rest in time; what is on its way goes on."""
        batch.expired = Refusal(
            Code.NO_OFFER,
            f"no host of the group offered to take it within {batch.timeout_s} s; check that daemons with "
            "this group's key run on the other hosts, have room, and can be redirected to (sockmi doctor)",
        )
        self._refuse_pending(batch, batch.expired)
        self._finish(batch)

    def _give_up(self, batch: _Batch, reason: Refusal) -> None:
        batch.expired = reason
        self._refuse_pending(batch, reason)
        for leg in list(batch.legs.values()):
            back = list(leg.unreserved) + [item for page in leg.pages.values() for item in page]
            back += [item for item, _ in leg.ready]
            if leg.state is Leg.OPEN:
                self._context.stream(leg.host, messages.Release(batch.id))
            self._close(batch, leg, "lost")
            for chunk_id in sorted(leg.moving):
                self._abort(self._chunks[chunk_id], reason, retry=False, streaming=True)
            self._report(batch, [Result(one.migration, Outcome.REFUSED, refusal=reason) for one in back])
        self._finish(batch)

    def _refuse_pending(self, batch: _Batch, reason: Refusal) -> None:
        if not batch.pending:
            return
        for name in ("request", "choose"):
            self._context.timers.cancel((name, batch.id))
        refused = [
            Result(migration, Outcome.REFUSED, refusal=batch.reasons.get(migration, reason))
            for migration in batch.pending
        ]
        batch.pending.clear()
        batch.offers.clear()
        if not batch.legs:
            self._context.datagram(batch.target, messages.Release(batch.id))
        self._report(batch, refused)

    def _finish(self, batch: _Batch) -> None:
        """Forget the batch when everything has its outcome."""
        if batch.left or batch.legs or batch.id not in self._batches:
            return
        del self._batches[batch.id]
        for name in ("request", "choose", "batch"):
            self._context.timers.cancel((name, batch.id))
        self._context.out.append(actions.BatchDone(batch.id))

    def _report(self, batch: _Batch | None, results: list[Result], batch_id: BatchId = b"") -> None:
        if not results:
            return
        if batch is not None:
            batch_id = batch.id
            batch.left -= sum(result.outcome is not Outcome.COMMITTED for result in results)
        self._context.out.append(actions.Report(batch_id, tuple(results)))
        if results[0].outcome is Outcome.COMMITTED:
            return
        for result in results:
            connection = self._connections.pop((batch_id, result.migration), None)
            if connection is not None:
                self._moving.discard(connection)

    # --- chunks ----------------------------------------------------------------------------

    def _route(self, item: Item, holder: HostId, place: Place) -> Route:
        return Route(
            item.connection,
            item.migration,
            item.kind,
            item.hop,
            item.home,
            holder,
            place,
            item.local,
            item.remote,
            item.origin,
            self._routes.upstream(item.connection),
        )

    def _thaw(self, chunk: ChunkId, migrations: Sequence[MigrationId]) -> None:
        self._context.out.append(actions.Thaw(chunk, tuple(migrations)))

    def _abort(self, chunk: _Chunk, reason: Refusal, retry: bool, streaming: bool) -> None:
        """Undo an uncommitted chunk; one that is being committed goes on."""
        if chunk.state in (Export.COMMITTING, Export.CONFIRMING, Export.UNFREEZING):
            return
        chunk.reason, chunk.retry = reason, retry
        shipped = chunk.state is Export.SHIPPED
        chunk.state = step(EXPORT, chunk.state, "abort")
        self._context.timers.cancel(("freeze", chunk.id))
        if shipped:
            channel = Channel.STREAM if streaming else Channel.DATAGRAM
            self._context.out.append(actions.Send(chunk.host, messages.Abort(chunk.id), channel))
            self._undone(chunk, kept=True)

    def _undone(self, chunk: _Chunk, kept: bool) -> None:
        """Nothing of the chunk moves: thaw what is frozen (``kept``) and say what comes of it."""
        batch = self._batches[chunk.id.batch]
        self._drop(chunk)
        if kept:
            self._thaw(chunk.id, chunk.migrations)
            reason = chunk.reason or Refusal(Code.INTERNAL, "the chunk was undone; export it again")
            if chunk.retry:
                self._return(batch, chunk.items, reason)
            else:
                self._report(
                    batch,
                    [Result(one, Outcome.REFUSED, chunk.host, refusal=reason) for one in chunk.migrations],
                )
        self._leave(batch, chunk)

    def _drop(self, chunk: _Chunk) -> None:
        del self._chunks[chunk.id]
        self._context.timers.cancel(("freeze", chunk.id))

    def _leave(self, batch: _Batch, chunk: _Chunk) -> None:
        """The chunk no longer occupies the pipeline."""
        leg = batch.legs.get(chunk.host)
        if leg is not None:
            leg.moving.discard(chunk.id)
        self._advance(batch, chunk.host)
        self._finish(batch)

    def _confirm(self, chunk: _Chunk, channel: Channel) -> None:
        """CONFIRM now and again, more and more seldom, until ACTIVE."""
        self._context.out.append(
            actions.Send(chunk.host, messages.Confirm(chunk.id, chunk.committed), channel)
        )
        self._context.timers.set(
            ("confirm", chunk.id), self._context.now + self._context.backoff(chunk.attempt)
        )
        chunk.attempt += 1

    def _settle(
        self, chunk: _Chunk, trigger: str, lost: tuple[int, ...], codes: dict[int, Code] | None = None
    ) -> None:
        """The importer is done with the chunk, or will never be."""
        chunk.state = step(EXPORT, chunk.state, trigger)
        self._context.timers.cancel(("confirm", chunk.id))
        del self._chunks[chunk.id]
        self._context.out.append(actions.ForgetDecision(chunk.id))
        results = []
        for position in chunk.committed:
            place = chunk.places[position] if chunk.places else None
            migration, fidelity = chunk.migrations[position], chunk.fidelity.get(position)
            if position not in lost:
                results.append(Result(migration, Outcome.ACTIVE, chunk.host, place=place, fidelity=fidelity))
                continue
            code = (codes or {}).get(position, Code.PEER_LOST)
            refusal = Refusal(
                code, "the importer could not bring the committed connection to life; see its journal"
            )
            results.append(Result(migration, Outcome.LOST, chunk.host, place, refusal, fidelity))
        batch = self._batches.get(chunk.id.batch)
        self._report(batch, results, chunk.id.batch)
        if batch is not None:
            self._finish(batch)
