# SPDX-License-Identifier: MIT
"""All exports that are under way, and how each of them ended: in its record, the journal and the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID, uuid4

from sockmi.engine.base import SocketFacts
from sockmi.exporting import fidelity
from sockmi.exporting.batches import Batch, Batches
from sockmi.exporting.descriptors import close_ours
from sockmi.exporting.export import Export, Selected
from sockmi.exporting.tally import Tally
from sockmi.image import queue_bytes
from sockmi.journal import Change, plain
from sockmi.protocol.actions import Outcome, Report, Result
from sockmi.protocol.records import BatchId, MigrationId
from sockmi.refusal import Refusal
from sockmi.shell import Shell, audit, microseconds_since, now_text, why

# What the end of a migration adds to its record.
_NEWS = (
    "outcome", "refusal", "step", "hop", "listed", "to", "mode", "ended_at", "blackout_us", "fidelity",
    "receive_queue_bytes", "sent_bytes", "unsent_bytes", "image_bytes",
)  # fmt: skip


class Exports:
    """Owns the exports, by migration and by socket; ``register`` stands beside its inverse, ``end``."""

    def __init__(self, shell: Shell, batches: Batches) -> None:
        self._shell = shell
        self._batches = batches
        self._by_migration: dict[MigrationId, Export] = {}
        self._by_socket: dict[int | MigrationId, Export] = {}
        self._tally = Tally(shell)

    def __len__(self) -> int:
        return len(self._by_migration)

    def __getitem__(self, migration: MigrationId) -> Export:
        return self._by_migration[migration]

    def get(self, migration: MigrationId) -> Export | None:
        """None: it has ended, or is an earlier daemon's."""
        return self._by_migration.get(migration)

    def under_way(self) -> list[Export]:
        """All of them."""
        return list(self._by_migration.values())

    def records(self) -> list[dict[str, Any]]:
        """Of all that is under way."""
        return [export.record for export in self._by_migration.values()]

    # -- from selection to the end

    def register(self, selected: Selected, facts: SocketFacts, batch_id: BatchId) -> Export:
        """A migration with a record; it is under way unless one with the same id is already."""
        migration_id = selected.migration_id or uuid4()
        record: dict[str, Any] = {
            "migration_id": str(migration_id),
            "batch_id": str(UUID(bytes=batch_id)),
            "direction": "export",
            "engine": self._shell.engine.name,
            "kind": plain(facts.kind),
            "state": facts.state,
            "local": str(facts.local) if facts.local else None,
            "remote": str(facts.remote) if facts.remote else None,
            "from": self._shell.host_name,
            "to": None,
            "user_id": selected.user_id,
            "pid": selected.pid,
            "fd": selected.fd,
            "started_at": now_text(),
            "step": "selected",
            "context_bytes": selected.copy.facts.context_bytes
            if selected.copy
            else len(selected.context or b""),
        }
        export = Export(selected, migration_id.bytes, facts, record)
        self._by_migration.setdefault(export.migration, export)
        return export

    def is_registered(self, export: Export) -> bool:
        """Whether the migration is this one; else the journal has its id for the one under way."""
        return self._by_migration.get(export.migration) is export

    def is_claimed(self, export: Export) -> bool:
        """Whether the socket itself is being migrated."""
        return export.socket in self._by_socket

    def claim(self, export: Export) -> None:
        """Nobody else may have the socket until this one ends."""
        self._by_socket[export.socket] = export

    def journal_start(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the first of these migrations to the journal; raises as that does."""
        if records:
            self._shell.journal.write(_started(records))

    def note_start(self, records: Sequence[dict[str, Any]]) -> None:
        """The same for those that have ended already: a full disk is no reason to fail."""
        self._shell.note(_started(records))
        self._tally.tell()

    def end(self, export: Export, batch: Batch | None, outcome: str, refusal: Refusal | None) -> None:
        """Complete its record, and let go of the socket."""
        record = export.record
        record["outcome"] = outcome
        record["ended_at"] = now_text()
        if refusal is not None:
            record["refusal"] = why(refusal)
        self._count(record)
        if self.is_registered(export):
            del self._by_migration[export.migration]
            if self._by_socket.get(export.socket) is export:  # else another one's is under way
                del self._by_socket[export.socket]
        close_ours([export])
        export.image = b""
        if batch is not None:
            batch.tell_progress(record)

    def turn_away(self, refused: Iterable[tuple[dict[str, Any], Refusal]]) -> list[dict[str, Any]]:
        """Records of sockets that are refused before they could be looked at: completed, and journalled."""
        records = []
        for record, refusal in refused:
            record.update(outcome="refused", ended_at=now_text(), refusal=why(refusal))
            self._count(record)
            records.append(record)
        self.note_start(records)
        return records

    def _count(self, record: dict[str, Any]) -> None:
        """For the metrics and the log, which are written when there is time."""
        refusal = record.get("refusal")
        self._tally.ended(record["outcome"], refusal["code"] if refusal else None)
        self._shell.moves.append(record)

    def tell(self) -> None:
        """What has ended since the last time goes into the metrics."""
        self._tally.tell()

    # -- the core's news

    def report(self, action: Report) -> None:
        """How migrations go on, or ended."""
        change = Change()
        batch = self._batches.get(action.batch)
        for result in action.results:
            export = self._by_migration.get(result.migration)
            if export is None:
                self._report_after_restart(change, result)
            elif result.outcome is Outcome.COMMITTED:
                export.record["step"] = "committed"
            else:
                self._finish(change, export, result, batch)
        if change.audit:
            self._shell.note(change)
        self._tally.tell()

    def _finish(self, change: Change, export: Export, result: Result, batch: Batch | None) -> None:
        record = export.record
        if result.importer is not None:
            record["to"] = self._shell.name_of(result.importer)
        if result.place is not None:
            record["mode"] = plain(result.place.mode) if result.place.mode else None
        if result.fidelity is not None:
            fidelity.merge(record, result.fidelity)
        if export.image:
            received, sent, unsent = queue_bytes(export.image)
            record.update(receive_queue_bytes=received, sent_bytes=sent, unsent_bytes=unsent)
            self._tally.shipped(len(export.image))
        if result.outcome is Outcome.ACTIVE:
            record["step"] = "active"
            record["listed"] = result.listed
            record["blackout_us"] = microseconds_since(export.frozen_at)
            self._shell.metrics.freeze.observe(record["blackout_us"] / 1e6)
            self.end(export, batch, "moved", None)
        elif result.outcome is Outcome.PLANNED:
            self.end(export, batch, "planned", None)
        elif result.outcome is Outcome.LOST:
            self.end(export, batch, "failed", result.refusal)
        else:
            self.end(export, batch, "aborted" if export.frozen_at else "refused", result.refusal)
        news = {name: record[name] for name in _NEWS if name in record}
        change.audit.append((UUID(bytes=result.migration), "export", news))

    def _report_after_restart(self, change: Change, result: Result) -> None:
        """A migration that an earlier run of this daemon had committed."""
        if result.outcome is Outcome.ACTIVE:
            news = {"step": "active", "outcome": "moved", "listed": result.listed, "ended_at": now_text()}
            audit(change, result.migration, "export", **news)
            self._tally.ended("moved")
        elif result.outcome is Outcome.LOST:
            refusal = why(result.refusal) if result.refusal else None
            audit(change, result.migration, "export", outcome="failed", refusal=refusal, ended_at=now_text())
            self._tally.ended("failed")


def _started(records: Sequence[dict[str, Any]]) -> Change:
    return Change(audit=[(UUID(record["migration_id"]), "export", record) for record in records])
