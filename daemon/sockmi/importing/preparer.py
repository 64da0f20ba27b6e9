# SPDX-License-Identifier: MIT
"""Copies are made of the images of a chunk, dormant, and promised to the exporter; or done away with."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from uuid import UUID

from sockmi import durable
from sockmi.crashpoints import reached
from sockmi.early_holds import EarlyHolds
from sockmi.engine.base import Fidelity, Kind, Restored
from sockmi.image import ImageError, Summary
from sockmi.image import Kind as ImageKind
from sockmi.image.native import examine
from sockmi.importing.copies import Copy, importer_failed, listeners_of
from sockmi.importing.delivery import Delivery
from sockmi.importing.handover import Handover
from sockmi.importing.images import chunk_name
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.placing import Placing
from sockmi.protocol.actions import Discard, Prepare
from sockmi.protocol.events import PrepareDone
from sockmi.protocol.records import Arrival, ChunkId, HostId, PreparedChunk
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, now_text

_log = logging.getLogger(__name__)


class Preparer:
    """``prepare`` stands beside its inverse, ``discard``: until ACTIVATE all is undone without a packet."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        placing: Placing,
        *,
        stock: Stock,
        early: EarlyHolds,
        delivery: Delivery,
        handover: Handover,
    ) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._placing = placing
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._room = stock.room
        self._early = early
        self._delivery = delivery
        self._handover = handover

    def prepare(self, action: Prepare) -> None:
        """Validate, hold, restore dormant, spool, journal; whatever goes wrong is undone and answered."""
        results: list[Fidelity | Refusal] = []
        copies: list[Copy | None] = []
        for arrival, image in zip(action.arrivals, action.images, strict=True):
            try:
                made = self._examine(action.chunk, action.exporter, arrival, image)
            except Exception as error:
                _log.exception("examining %s", arrival.item)
                self._lists.unreserve(UUID(bytes=arrival.item.migration))
                made = importer_failed(error)
            copies.append(made if isinstance(made, Copy) else None)
            results.append(made if isinstance(made, Refusal) else Fidelity())
        try:
            self._prepare(action, copies, results)
        except Exception as error:
            _log.exception("preparing %s", action.chunk)
            refusal = importer_failed(error)
            dropped = [copy for copy in copies if copy is not None]
            results = [
                result if copy is None else refusal for result, copy in zip(results, copies, strict=True)
            ]
            copies = [None] * len(copies)
            self._drop(dropped)
            for copy in dropped:
                self._images.drop(copy)
        for arrival, kept in zip(action.arrivals, copies, strict=True):
            if kept is None:
                self._early.drop([arrival.item.migration])
                self._placing.forget(arrival.item.migration)
                continue
            self._copies.add(kept)
            self._lists.claim(kept.candidate)
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
        self._handover.hand_early(copies)
        self._room.update()
        metrics = self._shell.metrics
        metrics.image_bytes.labels(direction="import").inc(shipped_bytes)
        for code, count in Counter(refusal.code for refusal in refusals).items():
            metrics.refusals.labels(code=code).inc(count)
        self._copies.count("refused", len(refusals))

    def _examine(self, chunk: ChunkId, exporter: HostId, arrival: Arrival, image: bytes) -> Copy | Refusal:
        item = arrival.item
        try:
            facts = examine(image, self._shell.config.image_bytes_max)
        except ImageError as error:
            return Refusal(Code.IMAGE, f"The image is not valid: {error}.")
        announced = (item.migration, item.kind, item.local, item.remote, item.hop)
        if announced != (facts.migration_id, _kind(facts), facts.local, facts.remote, facts.hop):
            return Refusal(Code.IMAGE, "The image is of another socket than the one that was announced.")
        if not self._lists.reserve(UUID(bytes=item.migration), item.kind):
            return Refusal(
                Code.LIST_FULL, f"The list of {item.kind} sockets is full; raise imports.max_{item.kind}."
            )
        copy = self._copies.make(chunk_name(chunk), exporter, arrival, image, facts)
        refusal = self._delivery.obstacle(copy)
        if refusal is not None:
            self._lists.unreserve(copy.candidate.migration_id)
        return refusal or copy

    def _prepare(self, action: Prepare, copies: list[Copy | None], results: list[Fidelity | Refusal]) -> None:
        chosen = [(index, copy) for index, copy in enumerate(copies) if copy is not None]
        self._hold([copy for _unused, copy in chosen])
        reached("prepare.held")
        self._redirecting.suspend((copy.arrival.item.connection for _unused, copy in chosen), decided=False)
        restored = self._shell.engine.restore(
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

    def _hold(self, copies: Sequence[Copy]) -> None:
        """What is not held since its place was promised."""
        held = self._early.take(copy.migration for copy in copies)
        tuples = [copy.tuple for copy in copies if copy.tuple and copy.tuple not in held]
        if tuples:
            self._shell.held.want(tuples)
            self._shell.holds.hold(tuples, None)
        self._redirecting.miss_listeners(listeners_of(copies))

    def _promise(self, action: Prepare, positions: list[int], ready: list[Copy]) -> None:
        """From here on the chunk can be restored whatever happens to this daemon."""
        if not ready:
            return
        self._images.write(chunk_name(action.chunk), ready)
        reached("prepare.spooled")
        change = Change(audit=[(copy.candidate.migration_id, "import", copy.record) for copy in ready])
        durable.keep(
            change, [PreparedChunk(action.chunk, action.exporter, action.arrivals, tuple(positions))]
        )
        self._shell.journal.write(change)
        reached("prepare.journalled")

    # -- the inverse

    def discard(self, action: Discard) -> None:
        """The inverse of ``prepare``."""
        copies = [copy for migration in action.migrations if (copy := self._copies.pop(migration))]
        change = Change()
        for copy in copies:
            copy.record.update(outcome="aborted", ended_at=now_text())
            change.audit.append((copy.candidate.migration_id, "import", copy.record))
        self._drop(copies)
        reached("discard.dropped")
        if not self._images.needed(chunk_name(action.chunk)) - set(action.migrations):
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
                self._images.drop(copy)
            self._handover.undo(copy)
            self._shell.moves.append(copy.record)
        self._copies.count("aborted", len(copies))
        for migration in action.migrations:
            self._placing.forget(migration)
        self._room.update()

    def _drop(self, copies: Collection[Copy]) -> None:
        """Close dormant copies without a packet, lift their holds, give up their places.

        What had left this host before is led away again first: without a redirect, a hold and a socket
        the kernel would answer the peer with a RST.
        """
        self._redirecting.lead_again(copy.arrival.item.connection for copy in copies)
        reached("drop.led-again")
        self._shell.engine.discard([copy.fd for copy in copies if copy.fd >= 0])
        tuples = [copy.tuple for copy in copies if copy.tuple]
        if tuples:
            self._shell.holds.unhold(tuples)
            self._shell.held.forget(tuples)
        for copy in copies:
            copy.fd = -1
            self._lists.unreserve(copy.candidate.migration_id)
            self._redirecting.listener_found((Record.LISTED, copy.migration))


def _kind(facts: Summary) -> Kind:
    """The import list that an image belongs to; unconnected sockets count as bound."""
    return Kind.BOUND if facts.kind is ImageKind.UNCONNECTED else Kind[facts.kind.name]
