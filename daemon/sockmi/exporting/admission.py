# SPDX-License-Identifier: MIT
"""What is asked to be moved: looked at, refused if something is against it, else put to the core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID, uuid4

from sockmi.engine.base import SocketFacts
from sockmi.exporting.batches import Batch, Batches
from sockmi.exporting.descriptors import close_ours
from sockmi.exporting.export import Export, Selected, owned
from sockmi.exporting.exports import Exports
from sockmi.exporting.items import item_of
from sockmi.holders import Found
from sockmi.importing.onward import Onward
from sockmi.looking import Look, unseen
from sockmi.protocol.events import CancelExport, StartExport
from sockmi.protocol.records import BatchId, HostId, Item
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, unwritable

_log = logging.getLogger(__name__)

FindHolders = Callable[[set[int], Found], None]


class Admission:
    """``export`` stands beside its inverse, ``cancel``."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        exports: Exports,
        batches: Batches,
        *,
        look: Look,
        find_holders: FindHolders,
        onward: Onward,
    ) -> None:
        """``look`` looks at sockets; ``find_holders`` finds their processes, and what is against stopping
        them. Both answer later.
        """
        self._shell = shell
        self._onward = onward
        self._redirecting = redirecting
        self._exports = exports
        self._batches = batches
        self._look = look
        self._find_holders = find_holders

    def export(
        self,
        selection: Sequence[Selected],
        *,
        target: tuple[HostId | None, IPv4Address | IPv6Address | None],
        timeout_s: float,
        dry_run: bool,
        done: Callable[[list[dict[str, Any]]], None],
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> BatchId:
        """Move sockets; ``done`` gets one record for each, in order, and ``progress`` each as it ends.

        A descriptor whose socket is already migrating, or cannot move, is refused. The descriptors
        are this method's. Returns the batch id, for ``cancel``.
        """
        batch_id = uuid4().bytes
        batch = Batch(done, progress, looking=True)
        self._batches.open(batch_id, batch)

        def looked(seen: list[SocketFacts] | Exception) -> None:
            batch.looking = False
            facts = self._facts(selection, seen)
            host, address = target
            importer = self._shell.addresses_of(host) if host else (address,) if address else ()
            if importer:
                facts = self._shell.peers.judge_importer(facts, importer)
            going = self._admit(batch_id, batch, selection, facts, dry_run=dry_run)
            if not going:
                self._exports.tell()
                self._batches.close(batch_id)
                return
            self._put(batch_id, batch, going, target=target, timeout_s=timeout_s, dry_run=dry_run)

        descriptors = [one.descriptor for one in selection if one.copy is None]
        self._look(descriptors, looked)
        return batch_id

    def _facts(self, selection: Sequence[Selected], seen: list[SocketFacts] | Exception) -> list[SocketFacts]:
        if isinstance(seen, Exception):
            _log.error("looking at %d sockets", len(selection), exc_info=seen)
            refusal = Refusal(Code.INTERNAL, f"It cannot be looked at ({seen}); try again.")
            seen = [unseen(refusal) for one in selection if one.copy is None]
        facts = iter(seen)
        return [self._onward.facts(one.copy) if one.copy else next(facts) for one in selection]

    def _admit(
        self,
        batch_id: BatchId,
        batch: Batch,
        selection: Sequence[Selected],
        facts: Sequence[SocketFacts],
        *,
        dry_run: bool,
    ) -> list[Export]:
        """Those against which there is nothing; the others have ended."""
        going: list[Export] = []
        begun: list[dict[str, Any]] = []
        for one, fact in zip(selection, facts, strict=True):
            export = self._exports.register(one, fact, batch_id)
            batch.records.append(export.record)
            if self._exports.is_registered(export):
                begun.append(export.record)
            refusal = fact.refusal or batch.called_off or self._obstacle(export)
            if refusal is not None:
                self._exports.end(export, batch, "refused", refusal)
            else:
                if dry_run:
                    export.queued = fact.waiting
                self._exports.claim(export)
                going.append(export)
        _tag(going)
        close_ours(going)  # until the freeze the socket is its owner's alone, who may close it
        try:
            self._exports.journal_start(begun)
        except Exception as error:  # a full disk
            _log.exception("journalling the start of %d migrations", len(begun))
            for export in going:
                self._exports.end(export, batch, "refused", unwritable(error))
            going = []
        return going

    def _put(
        self,
        batch_id: BatchId,
        batch: Batch,
        going: Sequence[Export],
        *,
        target: tuple[HostId | None, IPv4Address | IPv6Address | None],
        timeout_s: float,
        dry_run: bool,
    ) -> None:
        """To the core, when it is known who has them."""
        batch.waiting = list(going)

        def found(holders: dict[int, list[int]], verdicts: dict[int, Refusal]) -> None:
            if not batch.waiting:
                return  # cancelled meanwhile
            batch.waiting = []
            for export in going:
                export.holders = holders.get(export.facts.inode, [])
            items = self._items(batch, going, verdicts)
            if not items:
                self._batches.close(batch_id)
                return
            modes = self._shell.config.redirect.modes
            self._shell.dispatch(
                StartExport(batch_id, tuple(items), modes, timeout_s, *target, dry_run=dry_run)
            )

        self._find_holders({export.facts.inode for export in owned(going)}, found)

    def _obstacle(self, export: Export) -> Refusal | None:
        """What stands against a migration besides the socket itself."""
        if self._exports.is_claimed(export) or not self._exports.is_registered(export):
            return Refusal(
                Code.ALREADY_MIGRATING,
                "This socket, or this migration id, is being migrated; wait for it (sockmi info), or name "
                "it once.",
            )
        size_bytes, most = export.size_bytes, self._shell.config.image_bytes_max
        if size_bytes > most:
            return Refusal(
                Code.TOO_LARGE,
                f"Its queues and context make an image of about {size_bytes} bytes, and image_bytes_max is "
                f"{most}; raise it on both hosts, or try again when less is queued.",
            )
        return None

    def _items(self, batch: Batch, going: Sequence[Export], verdicts: dict[int, Refusal]) -> list[Item]:
        """Those that may go, now that their holders are known; the others have ended."""
        items, ended = [], []
        for export in going:
            caller = export.selected.caller
            refusal = (caller.obstacle(export.holders) if caller else None) or verdicts.get(
                export.facts.inode
            )
            try:
                item = None if refusal else item_of(export, self._shell, self._redirecting)
            except Exception as error:
                _log.exception("looking at %s", export.facts.tuple or export.facts.local)
                message = f"The daemon failed ({error}); its log has the details."
                refusal, item = Refusal(Code.INTERNAL, message), None
            if item is None:
                self._exports.end(export, batch, "refused", refusal)
                ended.append(export.record)
            else:
                export.record["step"] = "requested"
                items.append(item)
        if ended:
            self._exports.note_start(ended)
        return items

    def cancel(self, batch_id: BatchId) -> None:
        """Undo what of the batch is not yet committed."""
        batch = self._batches.get(batch_id)
        if batch is None:
            return
        refusal = Refusal(Code.TIMEOUT, "Whoever asked for this migration has gone; ask again.")
        if not self._refuse_waiting(batch_id, batch, refusal):
            self._shell.dispatch(CancelExport(batch_id))

    def stop(self) -> None:
        """Refuse what the core has not heard of yet; the rest it undoes itself."""
        refusal = Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        for batch_id, batch in self._batches.all():
            self._refuse_waiting(batch_id, batch, refusal)

    def _refuse_waiting(self, batch_id: BatchId, batch: Batch, refusal: Refusal) -> bool:
        """End a batch that the core has not heard of yet; False if it has."""
        if batch.looking:
            batch.called_off = refusal
            return True
        waiting, batch.waiting = batch.waiting, []
        for export in waiting:
            self._exports.end(export, batch, "refused", refusal)
        if waiting:
            self._exports.note_start([export.record for export in waiting])
            self._batches.close(batch_id)
        return bool(waiting)


def _tag(going: Sequence[Export]) -> None:
    """What waited in the queue of a listener, and now in the import list, follows it: it may move with it."""
    listeners = {copy.migration: one.migration for one in going if (copy := one.selected.copy)}
    for export in going:
        if (copy := export.selected.copy) and (listener := copy.arrival.item.listener):
            export.listener = listeners.get(listener, listener)
            export.record["listener"] = str(UUID(bytes=export.listener))
