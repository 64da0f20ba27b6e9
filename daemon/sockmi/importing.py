# SPDX-License-Identifier: MIT
"""The importer's half of the shell: places, prepares, activates and hands over copies.

A copy is dormant (in repair, its tuple held) until its application has the descriptor and says so.
Until then its image is in the spool, so that whatever dies, the copy can be made again.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any
from uuid import UUID

from sockmi import api, durable
from sockmi.addresses import Endpoint, FourTuple
from sockmi.config import ImportConfig
from sockmi.control import Client
from sockmi.crashpoints import reached
from sockmi.early_holds import EarlyHolds
from sockmi.engine.base import Fidelity, Kind, Placement, Restored
from sockmi.engine.cookie import cookie_of
from sockmi.image import Family, ImageError, Section, State, Summary, peek, section
from sockmi.image import Kind as ImageKind
from sockmi.image.native import examine
from sockmi.image.sections import Sequence, Window
from sockmi.import_lists import Candidate, Criteria, ImportLists, Waiting
from sockmi.journal import Change, Record, plain
from sockmi.placing import Placing
from sockmi.protocol.actions import Activate, Discard, Prepare, Reserve, Unreserve
from sockmi.protocol.context import Capacity
from sockmi.protocol.events import ActivateDone, ConnectionsEnded, PrepareDone, ReserveDone
from sockmi.protocol.records import (
    Arrival,
    ChunkId,
    Counts,
    Holding,
    MigrationId,
    Place,
    PreparedChunk,
)
from sockmi.redirect.held import unpack
from sockmi.redirect.segment import Expected
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, inbound, living, now_text, whole_record, why
from sockmi.spool import SpoolError

_log = logging.getLogger(__name__)

# An application that has been sent its descriptor and does not answer loses it again.
_TAKE_TIMEOUT_S = 5.0
# The daemon goes on when the application runs: both may have the same processor.
_SETTLE_AFTER_S = 0.001
# A listed socket whose place is not free yet is tried again; so is one that nobody accepts, ever less often.
_WAKE_AGAIN_S = 0.25
_DELIVER_AGAIN_MAX_S = 2.0


_UNDONE = Refusal(Code.CHANGED, "Its exporter has undone the move; ask again.")
_RESET = Refusal(Code.STATE, "Its peer reset it while it waited for an application.")
_TOO_OLD = Refusal(Code.TIMEOUT, "No application took it within imports.listed_max_s; it was ended.")
_LOST = Refusal(Code.IMAGE, "The importer's spool had lost its image; see the importer's log.")


@dataclass(eq=False, slots=True)
class Copy:
    """One socket that is prepared, listed or being handed over here."""

    arrival: Arrival
    chunk: str
    candidate: Candidate
    placement: Placement
    facts: Summary
    record: dict[str, Any]
    since: datetime
    fd: int = -1
    image: bytes = b""
    holding: Holding | None = None
    complained: bool = False  # that it cannot be restored
    expected: Expected | None = None  # what its peer's packets are judged by while it is listed
    listed_at: float = 0.0  # time.monotonic(); 0: it is not listed
    warned: bool = False  # that it has been listed for long
    client: Client | None = None  # it is on its way to
    again: asyncio.TimerHandle | None = None  # when its delivery is tried again
    again_s: float = 0.0  # after so long
    handed: durable.Handed | None = None  # as the journal has it
    tuple: FourTuple | None = field(init=False)
    """The connection as it lives here."""

    def __post_init__(self) -> None:
        local, remote = self.placement.local, self.candidate.remote
        connected = self.candidate.kind is Kind.CONNECTED and local is not None and remote is not None
        self.tuple = FourTuple(local, remote) if connected else None  # type: ignore[arg-type]


@dataclass(slots=True)
class Wish:
    """What a client waits for, and until when (time.monotonic(); None: for ever)."""

    request: api.ImportRequest
    until_s: float | None
    timer: Any = None


@dataclass(slots=True)
class Handing:
    """Dormant descriptors on their way to one client.

    They leave as soon as they are prepared, so that the application has them when the exporter has
    decided: before that (``decided``) its ``taken`` is not answered. ``undone``: those that were
    not committed.
    """

    wish: Wish
    copies: list[Copy]
    done: Callable[[], None]
    decided: bool
    timer: Any = None
    taken: api.TakenRequest | None = None
    undone: set[UUID] = field(default_factory=set)

    def cancel(self) -> None:
        """The time limit of what is waited for."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Importing:
    """See the module docstring."""

    def __init__(
        self,
        shell: Shell,
        placing: Placing,
        capacity: Capacity,
        redirecting: Redirecting,
    ) -> None:
        self._shell = shell
        self._placing = placing
        self._capacity = capacity
        self._redirecting = redirecting
        self._early = EarlyHolds(shell, redirecting)
        self.lists = ImportLists({})
        for kind in Kind:
            shell.metrics.import_list.labels(kind=kind).set_function(functools.partial(self._length, kind))
        shell.metrics.waiting.set_function(self.lists.waiting)
        self.copies: dict[MigrationId, Copy] = {}
        self._handings: dict[Client, Handing] = {}
        self._wishes: dict[Client, Wish] = {}
        self._spooled: dict[str, set[MigrationId]] = {}
        self.set_maxima(shell.config.imports)

    # -- reserve

    def reserve(self, action: Reserve) -> None:
        """Choose the place of each copy, and keep it."""
        places: list[Place | Refusal] = []
        for item, former in zip(action.items, action.former, strict=True):
            try:
                places.append(self._placing.choose(item, action.modes, former))
            except Refusal as refusal:
                places.append(refusal)
            except Exception as error:  # no more descriptors, say: the others go on
                _log.exception("a place for %s", item)
                self._placing.forget(item.migration)
                places.append(
                    Refusal(Code.INTERNAL, f"The importer failed ({error}); its log has the details.")
                )
        self._shell.dispatch(ReserveDone(action.batch, action.exporter, action.page, tuple(places)))
        self._shell.loop.call_later(0, self._shell.spool.provide)  # when RESERVED is on its way
        self._early.promise(
            {
                item.migration: stranger
                for item, former in zip(action.items, action.former, strict=True)
                if former is None and (stranger := self._placing.stranger(item.migration))
            }
        )

    def unreserve(self, action: Unreserve) -> None:
        """The inverse of ``reserve``."""
        self._early.drop(action.migrations)
        for migration in action.migrations:
            self._placing.forget(migration)

    # -- prepare and discard

    def prepare(self, action: Prepare) -> None:
        """Validate, hold, restore dormant, spool, journal; whatever goes wrong is undone and answered."""
        results: list[Fidelity | Refusal] = []
        copies: list[Copy | None] = []
        for arrival, image in zip(action.arrivals, action.images, strict=True):
            try:
                made = self._examine(action.chunk, action.exporter, arrival, image)
            except Exception as error:
                _log.exception("examining %s", arrival.item)
                self.lists.unreserve(UUID(bytes=arrival.item.migration))
                made = Refusal(Code.INTERNAL, f"The importer failed ({error}); its log has the details.")
            copies.append(made if isinstance(made, Copy) else None)
            results.append(made if isinstance(made, Refusal) else Fidelity())
        try:
            self._prepare(action, copies, results)
        except Exception as error:
            _log.exception("preparing %s", action.chunk)
            refusal = Refusal(Code.INTERNAL, f"The importer failed ({error}); its log has the details.")
            dropped = [copy for copy in copies if copy is not None]
            results = [
                result if copy is None else refusal for result, copy in zip(results, copies, strict=True)
            ]
            copies = [None] * len(copies)
            self._drop(dropped)
            for copy in dropped:
                self._unspool(copy)
        for arrival, kept in zip(action.arrivals, copies, strict=True):
            if kept is None:
                self._early.drop([arrival.item.migration])
                self._placing.forget(arrival.item.migration)
                continue
            self.copies[arrival.item.migration] = kept
            self.lists.claim(kept.candidate)
        self.update_capacity()
        self._shell.dispatch(PrepareDone(action.chunk, tuple(results)))
        # When PREPARED is on its way.
        refusals = [result for result in results if isinstance(result, Refusal)]
        self._shell.loop.call_later(
            0,
            self._prepared,
            [copy for copy in copies if copy is not None],
            refusals,
            sum(map(len, action.images)),
        )

    def _prepared(self, copies: list[Copy], refusals: list[Refusal], shipped_bytes: int) -> None:
        self._hand_early(copies)
        metrics = self._shell.metrics
        metrics.image_bytes.labels(direction="import").inc(shipped_bytes)
        for code, count in Counter(refusal.code for refusal in refusals).items():
            metrics.refusals.labels(code=code).inc(count)
        self._count("refused", len(refusals))

    def _count(self, outcome: str, count: int) -> None:
        if count:
            self._shell.metrics.migrations.labels(
                direction="import", outcome=outcome, engine=self._shell.engine.name
            ).inc(count)

    def _prepare(self, action: Prepare, copies: list[Copy | None], results: list[Fidelity | Refusal]) -> None:
        shell = self._shell
        chosen = [(index, copy) for index, copy in enumerate(copies) if copy is not None]
        held = self._early.take(copy.arrival.item.migration for _unused, copy in chosen)
        tuples = [copy.tuple for _unused, copy in chosen if copy.tuple and copy.tuple not in held]
        if tuples:
            shell.held.want(tuples)
            shell.holds.hold(tuples, None)
        self._redirecting.miss_listeners(_listeners_of(copy for _unused, copy in chosen))
        reached("prepare.held")
        self._redirecting.suspend(copy.arrival.item.connection for _unused, copy in chosen)
        restored = shell.engine.restore(
            [copy.image for _unused, copy in chosen], [copy.placement for _unused, copy in chosen]
        )
        reached("prepare.restored")
        ready, failed = [], []
        for (index, copy), outcome in zip(chosen, restored, strict=True):
            if isinstance(outcome, Restored):
                copy.fd = outcome.fd
                results[index] = outcome.fidelity
                ready.append((index, copy))
            else:
                results[index] = outcome
                failed.append((index, copy))
        if failed:
            self._drop([copy for _unused, copy in failed])
        for index, _unused in failed:
            copies[index] = None
        self._promise(action, [index for index, _unused in ready], [copy for _unused, copy in ready])

    def _examine(self, chunk: ChunkId, exporter: bytes, arrival: Arrival, image: bytes) -> Copy | Refusal:
        item = arrival.item
        try:
            facts = examine(image, self._shell.config.image_bytes_max)
        except ImageError as error:
            return Refusal(Code.IMAGE, f"The image is not valid: {error}.")
        announced = (item.migration, item.kind, item.local, item.remote, item.hop)
        if announced != (facts.migration_id, _kind(facts), facts.local, facts.remote, facts.hop):
            return Refusal(Code.IMAGE, "The image is of another socket than the one that was announced.")
        if not self.lists.reserve(UUID(bytes=item.migration), item.kind):
            return Refusal(
                Code.LIST_FULL, f"The list of {item.kind} sockets is full; raise imports.max_{item.kind}."
            )
        copy = self._copy(_chunk_name(chunk), exporter, arrival, image, facts)
        refusal = self._nobody(copy)
        if refusal is not None:
            self.lists.unreserve(copy.candidate.migration_id)
        return refusal or copy

    def _nobody(self, copy: Copy) -> Refusal | None:
        """Why it would stay in the list, if nothing may and connections can be delivered; else None."""
        limits = self._shell.config.imports
        if limits.queue_without_waiting or not limits.deliver or copy.tuple is None:
            return None
        if self.lists.waits_for(copy.candidate):
            return None
        return self._shell.engine.deliver(copy.image, copy.placement, copy.candidate.uid, only_ask=True)

    def _copy(self, chunk: str, exporter: bytes, arrival: Arrival, image: bytes, facts: Summary) -> Copy:
        item, place = arrival.item, arrival.place
        migration = UUID(bytes=item.migration)
        listener = UUID(bytes=item.listener) if item.listener else None
        record: dict[str, Any] = {
            "migration_id": str(migration),
            "direction": "import",
            "engine": self._shell.engine.name,
            "kind": plain(item.kind),
            "state": item.state,
            "local": str(item.origin) if item.origin else None,
            "remote": str(item.remote) if item.remote else None,
            "from": self._shell.name_of(exporter),
            "to": self._shell.host_name,
            "listener": str(listener) if listener else None,
            "started_at": now_text(),
            "step": "prepared",
            "receive_queue_bytes": facts.receive_bytes,
            "sent_bytes": facts.sent_bytes,
            "unsent_bytes": facts.unsent_bytes,
            "image_bytes": len(image),
            "context_bytes": facts.context_bytes,
            "mode": plain(place.mode) if place.mode else None,
            "hop": item.hop,
        }
        return Copy(
            arrival,
            chunk,
            Candidate(migration, item.kind, item.origin, item.remote, facts.owner_uid, listener),
            self._placing.placement(item, place),
            facts,
            record,
            datetime.now(UTC),
            image=image,
        )

    def _promise(self, action: Prepare, positions: list[int], ready: list[Copy]) -> None:
        """From here on the chunk can be restored whatever happens to this daemon."""
        if not ready:
            return
        name = _chunk_name(action.chunk)
        self._shell.spool.write(name, {copy.candidate.migration_id: copy.image for copy in ready})
        self._spooled[name] = {copy.arrival.item.migration for copy in ready}
        reached("prepare.spooled")
        change = Change(audit=[(copy.candidate.migration_id, "import", copy.record) for copy in ready])
        durable.keep(
            change, [PreparedChunk(action.chunk, action.exporter, action.arrivals, tuple(positions))]
        )
        self._shell.journal.write(change)
        reached("prepare.journalled")

    def discard(self, action: Discard) -> None:
        """The inverse of ``prepare``."""
        copies = [copy for migration in action.migrations if (copy := self.copies.pop(migration, None))]
        change = Change()
        for copy in copies:
            copy.record.update(outcome="aborted", ended_at=now_text())
            change.audit.append((copy.candidate.migration_id, "import", copy.record))
        self._drop(copies)
        reached("discard.dropped")
        if not self._spooled.get(_chunk_name(action.chunk), set()) - set(action.migrations):
            change.drop.append((Record.PREPARED, str(action.chunk)))
        journalled = True
        try:
            if change.audit or change.drop:
                self._shell.journal.write(change)
        except Exception:
            _log.exception("the journal cannot be written; the next start settles %s again", action.chunk)
            journalled = False
        reached("discard.journalled")
        for copy in copies:
            if journalled:  # else not: what the journal has prepared is in the spool
                self._unspool(copy)
            self._undo_handing(copy)
            self._shell.moves.append(copy.record)
        self._count("aborted", len(copies))
        for migration in action.migrations:
            self._placing.forget(migration)
        self.update_capacity()

    def _drop(self, copies: Iterable[Copy]) -> None:
        """Close dormant copies without a packet, lift their holds, give up their places.

        What had left this host before is led away again first: without a redirect, a hold and a socket
        the kernel would answer the peer with a RST.
        """
        copies = list(copies)
        self._redirecting.lead_again(copy.arrival.item.connection for copy in copies)
        reached("drop.led-again")
        self._shell.engine.discard([copy.fd for copy in copies if copy.fd >= 0])
        tuples = [copy.tuple for copy in copies if copy.tuple]
        if tuples:
            self._shell.holds.unhold(tuples)
            self._shell.held.forget(tuples)
        for copy in copies:
            copy.fd = -1
            self.lists.unreserve(copy.candidate.migration_id)
            self._redirecting.listener_found((Record.LISTED, copy.arrival.item.migration))

    def _unspool(self, copy: Copy) -> None:
        left = self._spooled.get(copy.chunk)
        if left is not None:
            left.discard(copy.arrival.item.migration)
            if not left:
                del self._spooled[copy.chunk]
                self._shell.spool.remove(copy.chunk)

    # -- activate

    def activate(self, action: Activate) -> None:
        """They are ours: to their applications, or into the import lists."""
        shell = self._shell
        self._redirecting.suspend(action.returning)
        reached("activate.suspended")
        for connection in action.returning:
            self._redirecting.drop_route(connection)
        change = Change(drop=[(Record.PREPARED, str(action.chunk))])
        change.drop.extend((Record.ROUTE, connection.hex()) for connection in action.returning)
        holdings = [holding for holding in action.holdings if holding.migration in self.copies]
        copies = [self.copies[holding.migration] for holding in holdings]
        for copy, holding in zip(copies, holdings, strict=True):
            copy.holding = holding
            copy.record["step"] = "committed"
        early = {copy.client: self._handings[copy.client] for copy in copies if copy.client}
        by_client = self._by_client(copy for copy in copies if copy.client is None)
        going = {copy for theirs in by_client.values() for copy in theirs}
        for copy in copies:
            if copy.client is None and copy not in going:
                self._list(copy)
        pending = len(early) + len(by_client)
        results = tuple(None if one.migration in self.copies else _LOST for one in action.holdings)
        answer = ActivateDone(action.chunk, results)

        def handed() -> None:
            nonlocal pending
            pending -= 1
            if pending == 0:
                shell.dispatch(answer)

        # The applications look at what they get while we write; nothing comes to life before that is done.
        for client, theirs in by_client.items():
            self._hand(client, theirs, handed)
        for handing in early.values():
            handing.decided, handing.done = True, handed
        durable.keep(change, [holding for holding in holdings if holding.durable])
        for copy in copies:
            self._keep_listed(change, copy)
            change.audit.append((copy.candidate.migration_id, "import", {"step": "committed"}))
        self._redirecting.add_holdings(holdings)
        try:
            shell.journal.write(change)
        except BaseException:
            # The daemon ends; an application whose word is read before that must not be given life.
            for client in (*early, *by_client):
                if client in self._handings:
                    self._handings[client].decided = False
            raise
        reached("activate.journalled")
        self._count("failed", results.count(_LOST))
        if not early and not by_client:
            self.update_capacity()
            shell.dispatch(answer)
        for client, handing in early.items():
            if handing.taken is not None:
                self._take(client, handing, handing.taken)

    def _by_client(self, copies: Iterable[Copy]) -> dict[Client, list[Copy]]:
        """Those that an application waits for."""
        found: dict[Client, list[Copy]] = {}
        for copy in copies:
            waiting = self.lists.claimed(copy.candidate.migration_id)
            if waiting is not None and isinstance(waiting.client, Client) and waiting.client in self._wishes:
                found.setdefault(waiting.client, []).append(copy)
        return found

    def _hand_early(self, copies: list[Copy]) -> None:
        """Send what is prepared, so that no time is lost with that once it is decided."""
        undecided = [
            copy for copy in copies
            if copy.holding is None and self.copies.get(copy.arrival.item.migration) is copy
        ]  # fmt: skip
        for client, theirs in self._by_client(undecided).items():
            self._hand(client, theirs, _nothing, decided=False)

    def _undo_handing(self, copy: Copy) -> None:
        """A copy is discarded that a client has, dormant (and now dead)."""
        if copy.client is None:
            return
        handing = self._handings[copy.client]
        handing.copies.remove(copy)
        handing.undone.add(copy.candidate.migration_id)
        if not handing.copies and handing.taken is not None:
            self._wait_again(copy.client, handing, handing.taken)

    def _wait_again(self, client: Client, handing: Handing, taken: api.TakenRequest) -> None:
        """All that a client had been handed is undone: it waits as before."""
        del self._handings[client]
        handing.cancel()
        client.respond(api.TakenResponse(id=taken.id, live=[], waiting=True))
        self._wait(client, handing.wish)

    def _list(self, copy: Copy) -> None:
        """No application has it: it waits as an image, its tuple held."""
        migration = copy.candidate.migration_id
        self._put_away(copy)
        self.lists.unreserve(migration)
        self.lists.put(copy.candidate)
        copy.listed_at = copy.listed_at or time.monotonic()
        if copy.tuple is not None:
            self._shell.held.rest(copy.tuple, copy.expected, functools.partial(self._peer_reset, copy))
        # Somebody else may be waiting for just this; not now, as we may be in the middle of handing over.
        self._shell.loop.call_later(0, self._offer, migration)

    def _put_away(self, copy: Copy) -> None:
        """Keep no more of it than its image in the spool and its hold."""
        self._shell.engine.discard([copy.fd] if copy.fd >= 0 else [])
        copy.fd = -1
        if copy.image and copy.tuple is not None:
            copy.expected = _expected(copy.image, copy.facts.state)
        copy.image = b""
        copy.client = None

    # -- ends of what is listed

    def _peer_reset(self, copy: Copy) -> None:
        """Its peer has ended it; not now, as its packets are just being looked at."""
        self._shell.loop.call_later(0, self._end_listed, copy, _RESET)

    def _end_listed(self, copy: Copy, refusal: Refusal) -> None:
        """It is no more, and whoever leads its packets here is told; late ones are dropped for a while."""
        migration = copy.candidate.migration_id
        if self.copies.get(migration.bytes) is not copy or not self.lists.is_listed(migration):
            return
        shell = self._shell
        _log.warning("%s, which waited for an application, has ended: %s", copy.tuple or migration, refusal)
        self.lists.remove(migration)
        self.lists.unreserve(migration)
        del self.copies[migration.bytes]
        self._placing.forget(migration.bytes)
        if copy.tuple:
            shell.held.forget([copy.tuple])
            shell.holds.hold([copy.tuple], shell.config.timing.linger_s)
            shell.holds.settle([copy.tuple])
        change = Change(drop=[(Record.LISTED, migration.hex)])
        news = {"step": "ended", "outcome": "failed", "refusal": why(refusal), "ended_at": now_text()}
        change.audit.append((migration, "import", news))
        shell.note(change)
        self._unspool(copy)
        self._redirecting.listener_found((Record.LISTED, migration.bytes))
        shell.metrics.migrations.labels(direction="import", outcome="failed", engine=shell.engine.name).inc()
        self.update_capacity()
        if copy.holding is not None and copy.holding.durable:
            shell.dispatch(ConnectionsEnded((copy.holding.connection,)))

    def look_at_ages(self) -> None:
        """Warn of what has waited for long, and end what has waited for too long, if that is wanted."""
        limits, now = self._shell.config.imports, time.monotonic()
        oldest = dict.fromkeys(Kind, 0.0)
        for candidate in list(self.lists.listed()):
            copy = self.copies[candidate.migration_id.bytes]
            age_s = now - copy.listed_at
            oldest[candidate.kind] = max(oldest[candidate.kind], age_s)
            if limits.listed_max_s and age_s >= limits.listed_max_s:
                self._give_up(copy)
            elif limits.listed_warn_s and age_s >= limits.listed_warn_s and not copy.warned:
                copy.warned = True
                _log.warning(
                    "%s has waited for an application for %.0f s; import it (`sockmi import`), or "
                    "set imports.listed_max_s",
                    copy.tuple or copy.candidate.local or candidate.migration_id,
                    age_s,
                )
        metrics, counts = self._shell.metrics, self.lists.counts()
        for kind in Kind:
            metrics.oldest.labels(kind=kind).set(oldest[kind])
            metrics.import_list.labels(kind=kind).set(counts[kind])
        metrics.waiting.set(self.lists.waiting())

    def _give_up(self, copy: Copy) -> None:
        """Nobody wants it: its peer is told by a RST, from a copy that lives for that moment only."""
        migration = copy.candidate.migration_id
        if copy.tuple is None:
            self._end_listed(copy, _TOO_OLD)
            return
        if self.lists.claimed(migration) is not None or not self._wake(copy):
            return
        if self._bring_to_life([copy]):
            return  # it is listed again
        with socket.socket(fileno=os.dup(copy.fd)) as lived:
            lived.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(copy.fd)
        copy.fd = -1
        self.lists.put(copy.candidate)
        self._end_listed(copy, _TOO_OLD)

    def _offer(self, migration: UUID) -> None:
        """Give a listed socket to an application that waits."""
        if not self.lists.is_listed(migration):
            return
        copy = self.copies[migration.bytes]
        waiting = self.lists.claim(copy.candidate)
        if waiting is None:
            self._deliver(copy)
        elif isinstance(waiting.client, Client) and self._wake(copy):
            self._hand(waiting.client, [copy], _nothing)

    def _deliver(self, copy: Copy) -> None:
        """To the program that listens for it; as long as there is none it stays listed, and is tried again.

        The hold is lifted when it is delivered, since before there is no socket that could answer. What it
        sends before that comes to nothing, and is sent again.
        """
        shell, migration = self._shell, copy.candidate.migration_id
        if not shell.config.imports.deliver or copy.tuple is None or self.lists.claimed(migration):
            return
        if copy.again is not None:
            copy.again.cancel()
        refusal: Refusal | None
        try:
            image = shell.spool.read(copy.chunk)[migration]
            copy.placement = self._placing.placement(copy.arrival.item, copy.arrival.place)
            refusal = shell.engine.deliver(image, copy.placement, copy.candidate.uid)
        except (KeyError, SpoolError, OSError) as error:
            refusal = Refusal(Code.IMAGE, f"Its image cannot be read from the spool ({error}).")
        if refusal is not None:
            if not copy.complained:
                _log.warning("%s is not delivered yet: %s", copy.tuple, refusal)
                copy.complained = True
            copy.again_s = min(max(2 * copy.again_s, _WAKE_AGAIN_S), _DELIVER_AGAIN_MAX_S)
            copy.again = shell.loop.call_later(copy.again_s, self._offer, migration)
            return
        self.lists.remove(migration)
        shell.held.want([copy.tuple])
        if copy.holding is not None:
            self._redirecting.admit([copy.holding])
        shell.held.deliver(shell.held.take([copy.tuple]))
        _log.info("%s is delivered to the program that listens for it", copy.tuple)
        self._settle([copy], _nothing)

    # -- applications

    def wait(self, client: Client, request: api.ImportRequest) -> None:
        """An application wants sockets: give what is listed, else let it wait."""
        if client in self._wishes or client in self._handings:
            raise Refusal(Code.BAD_REQUEST, "This connection has an import under way; use another one.")
        until_s = time.monotonic() + request.timeout_ms / 1000 if request.timeout_ms >= 0 else None
        self._wait(client, Wish(request, until_s))

    def _wait(self, client: Client, wish: Wish) -> None:
        request = wish.request
        waitings = [
            Waiting(client, index, _criteria(one), client.uid) for index, one in enumerate(request.requests)
        ]
        # No more than one answer can carry: what is claimed is handed over now.
        taken = (one for waiting in waitings if (one := self.lists.take(waiting)))
        found = list(itertools.islice(taken, api.DESCRIPTORS_MAX // 2))
        self.lists.wait(waitings)
        self._wishes[client] = wish
        if found:
            copies = []
            for candidate in found:
                copy = self.copies[candidate.migration_id.bytes]
                if self._wake(copy):
                    copies.append(copy)
                else:
                    self.lists.unreserve(candidate.migration_id)
            if copies:
                self._hand(client, copies, _nothing)
                return
        if wish.until_s is not None:
            left_s = wish.until_s - time.monotonic()
            if left_s <= 0:
                self._answer_nothing(client)
                return
            wish.timer = self._shell.loop.call_later(left_s, self._answer_nothing, client)
        self.update_capacity()

    def _answer_nothing(self, client: Client) -> None:
        wish = self._wishes.pop(client)
        self.lists.cancel(client)
        self.update_capacity()
        client.respond(api.ImportResponse(id=wish.request.id, imported=[]))

    def _wake(self, copy: Copy) -> bool:
        """Restore a listed socket from its image and take it off the list; if not, try again soon."""
        migration = copy.candidate.migration_id
        outcome: Restored | Refusal
        try:
            copy.image = self._shell.spool.read(copy.chunk)[migration]
            # Its address may have come or gone since: another connection had it, say.
            copy.placement = self._placing.placement(copy.arrival.item, copy.arrival.place)
            (outcome,) = self._shell.engine.restore([copy.image], [copy.placement])
        except (KeyError, SpoolError, OSError) as error:
            outcome = Refusal(Code.IMAGE, f"Its image cannot be read from the spool ({error}).")
        if isinstance(outcome, Restored):
            copy.fd = outcome.fd
            self.lists.remove(migration)
            if copy.tuple is not None:
                self._shell.held.want([copy.tuple])
            return True
        if not copy.complained:
            _log.warning("%s cannot be restored now: %s", copy.tuple or migration, outcome)
            copy.complained = True
        copy.image = b""
        self.lists.unclaim(migration)
        self._shell.loop.call_later(_WAKE_AGAIN_S, self._offer, migration)
        return False

    def _hand(
        self, client: Client, copies: list[Copy], done: Callable[[], None], *, decided: bool = True
    ) -> None:
        """Send dormant descriptors; the client's ``taken``, and the decision, bring them to life."""
        wish = self._wishes.pop(client)
        if wish.timer is not None:
            wish.timer.cancel()
        items, contexts = [], []
        failure: OSError | None = None
        for copy in copies:
            copy.client = client
            waiting = self.lists.claimed(copy.candidate.migration_id)
            context = section(copy.image, Section.CONTEXT) if copy.facts.context_bytes else b""
            try:
                if client.uid:  # it is the importer's now, not ours
                    os.fchown(copy.fd, client.uid, -1)
                if context:
                    contexts.append(_memfd(context))
            except OSError as error:
                failure = error
            items.append(
                {
                    "request": waiting.index if waiting else 0,
                    "family": "inet6" if copy.facts.family is Family.INET6 else "inet",
                    "local": str(copy.placement.local) if copy.placement.local else None,
                    "remote": str(copy.candidate.remote) if copy.candidate.remote else None,
                    "origin": str(copy.candidate.local) if copy.candidate.local else None,
                    "context": bool(context),
                    "record": whole_record(copy.record),
                }
            )
        self.lists.cancel(client)
        handing = Handing(wish, copies, done, decided)
        handing.timer = self._shell.loop.call_later(_TAKE_TIMEOUT_S, self._taken_too_late, client)
        self._handings[client] = handing
        descriptors = [copy.fd for copy in copies] + contexts
        answer = {
            "id": wish.request.id,
            "ok": True,
            "more": False,
            "fds": len(descriptors),
            "imported": items,
        }
        if failure is None:
            client.respond(answer, descriptors)
        else:  # as if it had gone: they are listed, once it is decided
            _log.warning("import of pid %d: %s; disconnected, it may ask again", client.pid, failure)
            client.close()
        reached("hand.sent")
        for context_fd in contexts:
            os.close(context_fd)
        self.update_capacity()

    def taken(self, client: Client, request: api.TakenRequest) -> None:
        """The application has its descriptors: bring them to life."""
        handing = self._handings.get(client)
        if handing is None or handing.taken is not None:
            raise Refusal(
                Code.TIMEOUT, f"Nothing is on its way to you; answer an import within {_TAKE_TIMEOUT_S:g} s."
            )
        reached("taken.received")
        handing.cancel()
        handing.taken = request
        if not handing.copies:
            self._wait_again(client, handing, request)
        elif handing.decided:
            self._take(client, handing, request)
        elif handing.wish.until_s is not None:
            left_s = max(0.0, handing.wish.until_s - time.monotonic())
            handing.timer = self._shell.loop.call_later(left_s, self._undecided_too_long, client)

    def _undecided_too_long(self, client: Client) -> None:
        """The application does not wait longer, whatever the exporter will say."""
        handing = self._handings.pop(client)
        for copy in handing.copies:
            self._put_away(copy)
        if handing.taken is not None:
            client.respond(api.TakenResponse(id=handing.taken.id, live=[]))

    def _take(self, client: Client, handing: Handing, request: api.TakenRequest) -> None:
        """The decision is there, and so is the application's word."""
        del self._handings[client]
        handing.cancel()
        wanted = set(request.migrations)
        taken = [copy for copy in handing.copies if copy.candidate.migration_id in wanted]
        for copy in handing.copies:
            if copy.candidate.migration_id not in wanted:
                self._list(copy)
        try:
            failed = self._bring_to_life(taken)
        except Exception as error:
            _log.exception("bringing %d sockets to life", len(taken))
            refusal = Refusal(Code.INTERNAL, f"The importer failed ({error}); its log has the details.")
            # What lives has moved: the image of it is the past.
            dead = [copy for copy in taken if copy.fd < 0 or not self._lives(copy)]
            failed = {copy.candidate.migration_id: refusal for copy in dead}
            for copy in dead:
                if copy.fd >= 0:
                    self._fall_back(copy)
        failed |= dict.fromkeys(handing.undone & wanted, _UNDONE)
        live = [copy for copy in taken if copy.candidate.migration_id not in failed]
        client.respond(
            {
                "id": request.id,
                "ok": True,
                "more": False,
                "fds": 0,
                "live": [copy.candidate.migration_id for copy in live],
                "failed": [
                    {"migration_id": one, "refusal": api.Why.of(refusal).model_dump()}
                    for one, refusal in failed.items()
                ],
                "waiting": False,
            }
        )
        self._shell.held.deliver(self._shell.held.take([copy.tuple for copy in live if copy.tuple]))
        reached("taken.answered")
        # They are the client's, whatever happens to us: this can wait until it has had the processor.
        self._shell.loop.call_later(_SETTLE_AFTER_S, self._settle, live, handing.done)

    def _bring_to_life(self, copies: list[Copy]) -> dict[UUID, Refusal]:
        shell = self._shell
        self._note_handed(copies)
        failed: dict[UUID, Refusal] = {}

        def without_refused(outcomes: Iterable[Refusal | None]) -> list[Copy]:
            going = []
            for copy, refusal in zip(copies, outcomes, strict=True):
                if refusal is None:
                    going.append(copy)
                else:
                    failed[copy.candidate.migration_id] = refusal
                    self._fall_back(copy)
            return going

        images = [copy.image for copy in copies]
        copies = without_refused(shell.engine.renew([copy.fd for copy in copies], images))
        self._redirecting.admit(copy.holding for copy in copies if copy.holding)
        reached("taken.admitted")
        without_refused(shell.engine.activate([one.fd for one in copies], [one.image for one in copies]))
        reached("taken.activated")
        return failed

    def _lives(self, copy: Copy) -> bool:
        return self._shell.engine.lives(copy.fd, copy.candidate.kind)

    def _note_handed(self, copies: Iterable[Copy]) -> None:
        """Which sockets come to life: of those that are not connected a restart could not tell otherwise."""
        change = Change()
        for copy in copies:
            if copy.handed != _handed(copy):
                self._keep_listed(change, copy)
        if change.keep:
            self._shell.journal.write(change)

    @staticmethod
    def _keep_listed(change: Change, copy: Copy) -> None:
        copy.handed = _handed(copy)
        change.keep.append((Record.LISTED, copy.candidate.migration_id.hex, _listed(copy)))

    def _settle(self, copies: list[Copy], done: Callable[[], None]) -> None:
        """They live with their applications: nothing of them is kept here but the holdings."""
        change = Change()
        news = {"step": "active", "outcome": "moved", "ended_at": now_text()}
        for copy in copies:
            migration = copy.candidate.migration_id
            if copy.fd >= 0:
                os.close(copy.fd)
            copy.fd = -1
            copy.image = b""
            del self.copies[migration.bytes]
            self._placing.forget(migration.bytes)
            self.lists.unreserve(migration)
            self._redirecting.listener_found((Record.LISTED, migration.bytes))
            self._unspool(copy)
            change.drop.append((Record.LISTED, migration.hex))
            change.audit.append((migration, "import", news))
            copy.record.update(news)
            self._shell.moves.append(copy.record)
        reached("taken.unspooled")
        if change.drop:
            self._count("moved", len(copies))
            self._shell.note(change)
        reached("taken.journalled")
        if tuples := [copy.tuple for copy in copies if copy.tuple]:
            self._shell.holds.settle(tuples)
        self.update_capacity()
        done()

    def held_arrived(self, content: bytes) -> None:
        """Packets that the exporter's hold has kept for copies here; ValueError if malformed."""
        for migration, packets in unpack(content).items():
            copy = self.copies.get(migration)
            if copy is not None and copy.tuple is not None:
                self._shell.held.add(copy.tuple, packets)

    def _fall_back(self, copy: Copy) -> None:
        """A copy that would not come to life is held again and listed: its image is still good."""
        if copy.tuple:
            self._shell.held.want([copy.tuple])
            self._shell.holds.hold([copy.tuple], None)
        if copy.holding and copy.holding.place.mode and (one := inbound(copy.holding)):
            self._shell.redirects[copy.holding.place.mode].evict([one])
        self._list(copy)

    def _taken_too_late(self, client: Client) -> None:
        """The client sits on descriptors that are not live; they are given to the next one."""
        client.close()

    def gone(self, client: Client) -> None:
        """A client has disconnected: what was on its way to it is listed, once it is decided."""
        self.lists.cancel(client)
        if (wish := self._wishes.pop(client, None)) is not None and wish.timer is not None:
            wish.timer.cancel()
        if (handing := self._handings.pop(client, None)) is not None:
            handing.cancel()
            for copy in handing.copies:
                (self._list if handing.decided else self._put_away)(copy)
            handing.done()
        self.update_capacity()

    # -- after a restart

    def resume(
        self,
        prepared: Iterable[PreparedChunk],
        came_to_life: Callable[[FourTuple], bool],
        unconnected_lives: Callable[[durable.Handed, int], bool],
    ) -> None:
        """Make the copies of an earlier run known again, from the journal and the spool.

        ``came_to_life``, ``unconnected_lives``: whether what was being handed over lives; if not,
        nothing is left.
        """
        shell = self._shell
        for chunk in prepared:
            name = _chunk_name(chunk.chunk)
            images = self._images(name)
            for position in chunk.prepared:
                arrival = chunk.arrivals[position]
                if (image := images.get(UUID(bytes=arrival.item.migration))) is not None:
                    copy = self._remember(name, chunk.exporter, arrival, image)
                    # Perhaps on its way to an application, but the journal had not heard of that.
                    if copy.tuple is not None and came_to_life(copy.tuple):
                        _log.error("%s is here, though its move is undecided", copy.tuple)
        change = Change()
        for content in shell.journal.records(Record.LISTED).values():
            name, exporter, arrival, handed = _read_listed(content)
            migration = UUID(bytes=arrival.item.migration)
            holding = self._redirecting.holdings.get(arrival.item.connection)
            lives = living(holding) if holding else None
            image = self._images(name).get(migration)
            known = holding is not None or arrival.item.kind is Kind.BOUND
            if lives:
                alive = came_to_life(lives)
            else:
                alive = handed is not None and unconnected_lives(handed, _local_port(image))
            if image is None or not known or alive:
                # It was handed over; only the last line of the journal is missing.
                change.drop.append((Record.LISTED, migration.hex))
                news = {"step": "active", "outcome": "moved", "ended_at": now_text()}
                change.audit.append((migration, "import", news))
                continue
            copy = self._remember(name, exporter, arrival, image)
            copy.holding = holding
            self._list(copy)
        if change.drop:
            shell.journal.write(change)
        for name in shell.spool.chunks():
            if name not in self._spooled:
                shell.spool.remove(name)
        self.update_capacity()

    def _images(self, name: str) -> dict[UUID, bytes]:
        try:
            return self._shell.spool.read(name)
        except KeyError:
            return {}
        except (SpoolError, OSError) as error:
            _log.error("the images of a chunk are lost: %s", error)
            return {}

    def _remember(self, name: str, exporter: bytes, arrival: Arrival, image: bytes) -> Copy:
        copy = self._copy(name, exporter, arrival, image, peek(image))
        copy.record.update(self._shell.journal.migration(copy.candidate.migration_id, "import") or {})
        self._spooled.setdefault(name, set()).add(arrival.item.migration)
        self.copies[arrival.item.migration] = copy
        self.lists.reserve(copy.candidate.migration_id, copy.candidate.kind)
        self._placing.keep(arrival.item, copy.tuple)
        if copy.tuple:
            self._shell.held.want([copy.tuple])
            self._shell.holds.hold([copy.tuple], None)
        self._redirecting.miss_listeners(_listeners_of([copy]))
        return copy

    def set_maxima(self, limits: ImportConfig) -> None:
        """The lists' maxima; what is listed already stays."""
        if limits.deliver and self._shell.engine.name != "kernel":
            _log.warning("imports.deliver needs the kernel module; load it (modprobe sockmi), and restart")
        self.lists.maxima = {
            Kind.BOUND: limits.max_bound,
            Kind.LISTENING: limits.max_listening,
            Kind.CONNECTED: limits.max_connected,
        }
        self.update_capacity()

    def _length(self, kind: Kind) -> int:
        return self.lists.counts()[kind]

    def update_capacity(self) -> None:
        """Tell the core what there is room for."""
        rooms = {kind: self.lists.room(kind) for kind in Kind}
        waiting = {kind: self.lists.waiting_for(kind) for kind in Kind}
        limits = self._shell.config.imports
        if not limits.queue_without_waiting:
            anyone = {Kind.CONNECTED} if limits.deliver else set()
            rooms = {
                kind: rooms[kind] if kind in anyone else min(rooms[kind], waiting[kind]) for kind in Kind
            }
        order = (Kind.BOUND, Kind.LISTENING, Kind.CONNECTED)
        self._capacity.rooms = Counts(*(rooms[kind] for kind in order))
        self._capacity.waiting = Counts(*(waiting[kind] for kind in order))
        maximum = max(1, sum(self.lists.maxima.values()))
        # More may wait than the maxima allow, since they were lowered.
        self._capacity.load = min(1000, 1000 * sum(self.lists.counts().values()) // maximum)


def _listeners_of(copies: Iterable[Copy]) -> dict[tuple[Record, bytes], Endpoint]:
    return {
        (Record.LISTED, copy.arrival.item.migration): copy.placement.local
        for copy in copies
        if copy.candidate.kind is Kind.LISTENING and copy.placement.local is not None
    }


def _expected(image: bytes, state: State) -> Expected | None:
    """What a connection would receive next; None if the image does not say."""
    numbers, windows = section(image, Section.SEQUENCE), section(image, Section.WINDOW)
    if len(numbers) != Sequence.size():
        return None
    sequence = Sequence.unpack(numbers)
    if state is State.SYN_SENT:
        return Expected(sequence.rcv_nxt, 0, awaits=sequence.snd_nxt)
    if len(windows) != Window.size():
        return None
    window = Window.unpack(windows)
    return Expected(sequence.rcv_nxt, (window.rcv_wup + window.rcv_wnd - sequence.rcv_nxt) % (1 << 32))


def _nothing() -> None:
    """For a handing that nobody else waits for."""


def _criteria(wanted: api.ImportCriteria) -> Criteria:
    return _same_criteria(
        tuple(wanted.states),
        tuple(wanted.preferred),
        wanted.local_address,
        wanted.local_port,
        wanted.remote_address,
        wanted.remote_port,
        wanted.listener,
    )


@functools.lru_cache(maxsize=1024)
def _same_criteria(  # noqa: PLR0917 - all of Criteria, in order
    states: tuple[Kind, ...],
    preferred: tuple[Kind, ...],
    local_address: str | None,
    local_port: int | None,
    remote_address: str | None,
    remote_port: int | None,
    listener: UUID | None,
) -> Criteria:
    """Applications ask for the same again and again."""
    return Criteria(
        frozenset(states),
        frozenset(preferred),
        ip_address(local_address) if local_address else None,
        local_port,
        ip_address(remote_address) if remote_address else None,
        remote_port,
        listener,
    )


def _kind(facts: Summary) -> Kind:
    """The import list that an image belongs to; unconnected sockets count as bound."""
    return Kind.BOUND if facts.kind is ImageKind.UNCONNECTED else Kind[facts.kind.name]


def _chunk_name(chunk: ChunkId) -> str:
    return f"{chunk.batch.hex()}-{chunk.number}"


def _memfd(content: bytes) -> int:
    """A sealed memory file, so that the receiver can trust its size."""
    import fcntl

    descriptor = os.memfd_create("sockmi-context", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _listed(copy: Copy) -> list[Any]:
    exporter = copy.holding.exporter.hex() if copy.holding else ""
    handed = [durable.write_handed(copy.handed)] if copy.handed else []
    return [copy.chunk, exporter, durable.write_arrival(copy.arrival), *handed]


def _read_listed(content: list[Any]) -> tuple[str, bytes, Arrival, durable.Handed | None]:
    name, exporter, arrival, *handed = content
    known = durable.read_handed(handed[0]) if handed else None
    return name, bytes.fromhex(exporter), durable.read_arrival(arrival), known


def _local_port(image: bytes | None) -> int:
    local = peek(image).local if image is not None else None
    return local.port if local is not None else 0


def _handed(copy: Copy) -> durable.Handed | None:
    """None: no application has it, or its connection tells which it is."""
    if copy.client is None or copy.tuple is not None:
        return None
    return durable.Handed(copy.candidate.kind, os.fstat(copy.fd).st_ino, cookie_of(copy.fd))
