# SPDX-License-Identifier: MIT
"""The exporter's chunks: from the freeze to the importer's ACTIVE, in two phases.

Before COMMIT every failure thaws; after COMMIT there is only forward. Of where its items go, and
what becomes of those that did not move, a chunk knows nothing: that is for `Batches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from sockmi.engine.base import Fidelity
from sockmi.protocol import actions, events, messages
from sockmi.protocol.actions import Outcome, Result
from sockmi.protocol.context import Context
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import (
    BatchId,
    ChunkId,
    Decision,
    HostId,
    Item,
    MigrationId,
    Notice,
    Place,
    Route,
)
from sockmi.protocol.routing import Routes
from sockmi.protocol.tables import EXPORT, Export, UndeclaredTransition, step
from sockmi.protocol.together import Address, leaving, stays, take_chunk
from sockmi.refusal import Code, Refusal

# Why a freeze fails that may succeed in a moment: the host is busy, or a packet came at the wrong time.
_PASSING = frozenset({Code.OWNER_UNSTOPPABLE, Code.CHANGED})


class Batches(Protocol):
    """What chunks tell those who made them. A batch may have ended before its chunk is settled."""

    def report(self, identifier: BatchId, results: list[Result]) -> None:
        """These have their outcome."""

    def refuse(
        self, identifier: BatchId, migrations: Iterable[MigrationId], reason: Refusal, importer: HostId
    ) -> None:
        """These do not move."""

    def take_back(self, identifier: BatchId, items: Iterable[Item], reason: Refusal) -> None:
        """These may try another importer."""

    def freeze_again(
        self,
        identifier: BatchId,
        failed: Iterable[tuple[Item, Refusal]],
        others: Iterable[tuple[Item, Refusal]],
    ) -> None:
        """These could not be frozen now, or not long enough; the others could, but go only with them."""

    def shipped(self, chunk: ChunkId, host: HostId) -> None:
        """The next chunk may be frozen."""

    def left(self, chunk: ChunkId, host: HostId) -> None:
        """The chunk no longer occupies the pipeline."""

    def in_time(self, chunk: ChunkId, host: HostId) -> None:
        """The importer has answered."""

    def overdue(
        self,
        chunk: ChunkId,
        host: HostId,
        migrations: Iterable[MigrationId],
        frozen_at: float,
        reason: Refusal,
    ) -> None:
        """The importer was not prepared in time, of what was to be frozen at ``frozen_at``."""

    def settled(self, chunk: ChunkId) -> None:
        """The chunk is done with."""


@dataclass(slots=True)
class Chunk:
    """Items that are frozen at the same time."""

    id: ChunkId
    host: HostId
    state: Export
    begun: float
    migrations: tuple[MigrationId, ...]
    items: tuple[Item, ...] = ()  # empty after a restart
    places: tuple[Place, ...] = ()
    reason: Refusal | None = None  # why it is being given up
    retry: bool = False  # given up, but its items may try another importer
    tried: bool = False  # given up, and that counts as a try of its items
    fidelity: dict[int, Fidelity] = field(default_factory=dict)
    prepared: tuple[int, ...] = ()
    routes: tuple[Route, ...] = ()  # of what is prepared
    committed: tuple[int, ...] = ()
    attempt: int = 0

    def staying(self, results: Iterable[tuple[int, object]]) -> dict[Address, Refusal]:
        """The addresses that cannot leave, as something is against one of their connections."""
        return {
            address: result
            for position, result in results
            if isinstance(result, Refusal)
            and (address := leaving(self.items[position], self.places[position])) is not None
        }


class Chunks:
    """See the module docstring; events and messages come by the methods named after them."""

    def __init__(self, context: Context, routes: Routes, batches: Batches) -> None:
        self._context = context
        self._routes = routes
        self._batches = batches
        self._chunks: dict[ChunkId, Chunk] = {}

    # --- the batches -----------------------------------------------------------------------

    def freeze(
        self,
        identifier: ChunkId,
        host: HostId,
        ready: deque[tuple[Item, Place]],
        alone: Set[MigrationId] = frozenset(),
    ) -> None:
        """Take a chunk's items from ``ready``, and freeze them; who is in ``alone`` has one of its own."""
        settings = self._context.settings
        taken = take_chunk(ready, settings.chunk_items, settings.chunk_bytes, alone)
        chunk = Chunk(
            identifier,
            host,
            Export.FREEZING,
            self._context.now,
            tuple(item.migration for item, _unused in taken),
            tuple(item for item, _unused in taken),
            tuple(place for _unused, place in taken),
        )
        self._chunks[chunk.id] = chunk
        deadline_s = settings.freeze_deadline_s
        self._context.timers.set(("freeze", chunk.id), self._context.now + deadline_s)
        self._context.out.append(actions.Freeze(chunk.id, chunk.items, chunk.places, deadline_s))

    def freezing(self, identifiers: Iterable[ChunkId]) -> bool:
        """Whether one of these is being frozen."""
        chunks = (self._chunks.get(one) for one in identifiers)  # one may just have been undone
        return any(chunk is not None and chunk.state is Export.FREEZING for chunk in chunks)

    def abort(
        self, identifier: ChunkId, reason: Refusal, retry: bool, streaming: bool, tried: bool = False
    ) -> None:
        """Undo an uncommitted chunk; one that is being committed, or is settled, is left alone.

        ``retry``: its items may try another importer. ``tried``: and have one try less. ``streaming``: the
        stream is still there.
        """
        chunk = self._chunks.get(identifier)
        if chunk is None or chunk.state in (Export.COMMITTING, Export.CONFIRMING, Export.UNFREEZING):
            return
        chunk.reason, chunk.retry, chunk.tried = reason, retry, tried
        shipped = chunk.state is Export.SHIPPED
        chunk.state = step(EXPORT, chunk.state, "abort")
        self._context.timers.cancel(("freeze", chunk.id))
        if shipped:
            channel = Channel.STREAM if streaming else Channel.DATAGRAM
            self._context.out.append(actions.Send(chunk.host, messages.Abort(chunk.id), channel))
            self._undone(chunk, kept=True)

    # --- the shell -------------------------------------------------------------------------

    def started(self, event: events.Started) -> None:
        """Go on confirming what was committed before the restart."""
        for decision in event.decisions:
            chunk = Chunk(
                decision.chunk,
                decision.importer,
                Export.CONFIRMING,
                self._context.now,
                decision.migrations,
                committed=decision.committed,
            )
            self._chunks[chunk.id] = chunk
            self._confirm(chunk, Channel.DATAGRAM)

    @property
    def busy(self) -> bool:
        """Whether the shell is still to answer something."""
        return any(
            chunk.state in (Export.FREEZING, Export.UNFREEZING, Export.COMMITTING)
            for chunk in self._chunks.values()
        )

    @property
    def idle(self) -> bool:
        """Whether there is none."""
        return not self._chunks

    @property
    def calm(self) -> bool:
        """Whether nothing is frozen, or about to be: what is decided may be repeated for ever."""
        return all(chunk.state is Export.CONFIRMING for chunk in self._chunks.values())

    @property
    def awaited(self) -> set[HostId]:
        """Hosts that have still to say ACTIVE."""
        return {chunk.host for chunk in self._chunks.values() if chunk.state is Export.CONFIRMING}

    def frozen(self, event: events.FreezeDone) -> None:
        """Ship what could be frozen, or thaw it if the chunk was given up meanwhile."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.items):
            raise UndeclaredTransition(f"FreezeDone does not fit chunk {event.chunk}")
        images: list[bytes] = []
        kept: list[int] = []
        refused: list[Result] = []
        passing: list[tuple[Item, Refusal]] = []
        left_behind: list[tuple[Item, Refusal]] = []
        freezing = chunk.state is Export.FREEZING
        staying = chunk.staying(enumerate(event.results)) if freezing else {}
        for position, result in enumerate(event.results):
            item = chunk.items[position]
            if not isinstance(result, Refusal):
                if (why := stays(leaving(item, chunk.places[position]), staying)) is not None:
                    left_behind.append((item, why))
                else:
                    kept.append(position)
                    images.append(result)
            elif result.code in _PASSING and freezing:
                passing.append((item, result))
            else:
                refused.append(Result(item.migration, Outcome.REFUSED, refusal=result))
        chunk.items = tuple(chunk.items[position] for position in kept)
        chunk.places = tuple(chunk.places[position] for position in kept)
        chunk.migrations = tuple(chunk.migrations[position] for position in kept)
        chunk.state = step(EXPORT, chunk.state, "frozen" if kept else "none frozen")
        self._batches.report(chunk.id.batch, refused)
        if left_behind:
            self._thaw(chunk.id, [item.migration for item, _unused in left_behind])
        self._batches.freeze_again(chunk.id.batch, passing, left_behind)
        if chunk.state is Export.SHIPPED:
            self._context.stream(
                chunk.host, messages.Ship(chunk.id, chunk.migrations, chunk.places, tuple(images))
            )
            self._batches.shipped(chunk.id, chunk.host)
        else:
            self._undone(chunk, kept=bool(kept))

    def committed(self, event: events.CommitDone) -> None:
        """CONFIRM what is committed; from here only forward."""
        chunk = self._chunks.get(event.chunk)
        if chunk is None or len(event.results) != len(chunk.prepared):
            raise UndeclaredTransition(f"CommitDone does not fit chunk {event.chunk}")
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
        if committed:
            self._confirm(chunk, Channel.STREAM)
            self._context.out.append(actions.LetGo(chunk.id))
        self._batches.report(chunk.id.batch, results)
        self._batches.report(chunk.id.batch, refused)
        if not committed:
            self._drop(chunk)
            self._context.stream(chunk.host, messages.Abort(chunk.id))
        self._batches.left(chunk.id, chunk.host)

    def forget(self, host: HostId) -> None:
        """``host`` will never come back: its copies are lost to us."""
        for chunk in [
            one for one in self._chunks.values() if one.host == host and one.state is Export.CONFIRMING
        ]:
            self._settle(chunk, "importer forgotten", lost=chunk.committed)

    def timer(self, key: tuple[object, ...]) -> bool:
        """A deadline of a chunk; False if ``key`` is none."""
        match key:
            case ("freeze", ChunkId() as identifier):
                chunk = self._chunks[identifier]
                self._batches.overdue(
                    identifier,
                    chunk.host,
                    chunk.migrations,
                    chunk.begun,
                    Refusal(
                        Code.FREEZE_DEADLINE,
                        f"the importer was not prepared within {self._context.settings.freeze_deadline_s} s "
                        "of the freeze; the connection goes on here, export it again",
                    ),
                )
            case ("confirm", ChunkId() as identifier):
                self._confirm(self._chunks[identifier], Channel.DATAGRAM)
            case _:
                return False
        return True

    # --- messages --------------------------------------------------------------------------

    def on_prepared(self, source: HostId, message: messages.Prepared, _unused: Channel) -> None:
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
        self._batches.in_time(chunk.id, source)
        prepared: list[int] = []
        refused: list[Result] = []
        staying = chunk.staying(enumerate(message.results))
        for position, result in enumerate(message.results):
            why = result if isinstance(result, Refusal) else None
            why = why or stays(leaving(chunk.items[position], chunk.places[position]), staying)
            if why is not None:
                refused.append(Result(chunk.migrations[position], Outcome.REFUSED, source, refusal=why))
            elif isinstance(result, Fidelity):
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
            self._batches.report(chunk.id.batch, refused)
        else:
            self._batches.report(chunk.id.batch, refused)
            self._drop(chunk)
            if any(isinstance(result, Fidelity) for result in message.results):
                self._context.stream(source, messages.Abort(chunk.id))  # of what it has prepared
            self._batches.left(chunk.id, chunk.host)

    def on_active(self, source: HostId, message: messages.Active, _unused: Channel) -> None:
        """The importer carried it out: the decision may be forgotten."""
        chunk = self._chunks.get(message.chunk)
        if chunk is None:
            return  # a repetition
        if chunk.host != source or chunk.state is not Export.CONFIRMING:
            self._context.ignore(source, message, "the chunk does not wait for this")
            return
        committed = set(chunk.committed)
        codes = {position: code for position, code in message.refused if position in committed}
        self._settle(chunk, "ACTIVE", lost=tuple(codes), codes=codes, listed=frozenset(message.listed))

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

    def _undone(self, chunk: Chunk, kept: bool) -> None:
        """Nothing of the chunk moves: thaw what is frozen (``kept``) and say what comes of it."""
        self._drop(chunk)
        if kept:
            self._thaw(chunk.id, chunk.migrations)
            reason = chunk.reason or Refusal(Code.INTERNAL, "the chunk was undone; export it again")
            if chunk.tried:
                self._batches.freeze_again(chunk.id.batch, [(item, reason) for item in chunk.items], [])
            elif chunk.retry:
                self._batches.take_back(chunk.id.batch, chunk.items, reason)
            else:
                self._batches.refuse(chunk.id.batch, chunk.migrations, reason, chunk.host)
        self._batches.left(chunk.id, chunk.host)

    def _drop(self, chunk: Chunk) -> None:
        del self._chunks[chunk.id]
        self._context.timers.cancel(("freeze", chunk.id))

    def _confirm(self, chunk: Chunk, channel: Channel) -> None:
        """CONFIRM now and again, more and more seldom, until ACTIVE."""
        self._context.out.append(
            actions.Send(chunk.host, messages.Confirm(chunk.id, chunk.committed), channel)
        )
        self._context.timers.set(
            ("confirm", chunk.id), self._context.now + self._context.backoff(chunk.attempt)
        )
        chunk.attempt += 1

    def _settle(
        self,
        chunk: Chunk,
        trigger: str,
        lost: tuple[int, ...],
        codes: dict[int, Code] | None = None,
        listed: frozenset[int] = frozenset(),
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
                waits = position in listed
                results.append(
                    Result(migration, Outcome.ACTIVE, chunk.host, place, fidelity=fidelity, listed=waits)
                )
                continue
            code = (codes or {}).get(position, Code.PEER_LOST)
            refusal = Refusal(
                code, "the importer could not bring the committed connection to life; see its journal"
            )
            results.append(Result(migration, Outcome.LOST, chunk.host, place, refusal, fidelity))
        self._batches.report(chunk.id.batch, results)
        self._batches.settled(chunk.id)
