# SPDX-License-Identifier: MIT
"""Copies: sockets that are prepared, listed or being handed over here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sockmi.addresses import Endpoint, FourTuple
from sockmi.control import Client
from sockmi.durable import Handed
from sockmi.engine.base import Kind, Placement
from sockmi.image import Summary
from sockmi.import_lists import Candidate
from sockmi.journal import Record, plain
from sockmi.placing import Placing
from sockmi.protocol.records import Arrival, Holding, HostId, MigrationId
from sockmi.redirect.held import unpack
from sockmi.redirect.segment import Expected
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, now_text


@dataclass(eq=False, slots=True)
class Copy:
    """One socket that has come; ``chunk`` is the name of its chunk in the spool."""

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
    handed: Handed | None = None  # as the journal has it
    tuple: FourTuple | None = field(init=False)
    """The connection as it lives here."""

    def __post_init__(self) -> None:
        local, remote = self.placement.local, self.candidate.remote
        connected = self.candidate.kind is Kind.CONNECTED and local is not None and remote is not None
        self.tuple = FourTuple(local, remote) if connected else None  # type: ignore[arg-type]

    @property
    def migration(self) -> MigrationId:
        """As the protocol has it; ``candidate.migration_id`` is the same as a UUID."""
        return self.arrival.item.migration

    def tag(self) -> None:
        """The listener in whose queue it waited has another migration id by now: ``arrival`` has it."""
        listener = self.arrival.item.listener
        self.candidate = replace(self.candidate, listener=UUID(bytes=listener) if listener else None)
        self.record["listener"] = str(self.candidate.listener) if self.candidate.listener else None


class Copies:
    """Owns those of this host, by migration; ``add`` stands beside its inverses, ``pop`` and ``forget``."""

    def __init__(self, shell: Shell, placing: Placing) -> None:
        self._shell = shell
        self._placing = placing
        self._by_migration: dict[MigrationId, Copy] = {}

    def __len__(self) -> int:
        return len(self._by_migration)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self._by_migration.values())

    def __contains__(self, migration: MigrationId) -> bool:
        return migration in self._by_migration

    def __getitem__(self, migration: MigrationId) -> Copy:
        return self._by_migration[migration]

    def has(self, copy: Copy) -> bool:
        """Whether it is still here."""
        return self._by_migration.get(copy.migration) is copy

    def make(self, chunk: str, exporter: HostId, arrival: Arrival, image: bytes, facts: Summary) -> Copy:
        """A copy with its record; nothing is restored, and it is not yet among these."""
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

    def add(self, copy: Copy) -> None:
        """It has come."""
        self._by_migration[copy.migration] = copy

    def pop(self, migration: MigrationId) -> Copy | None:
        """Take it out; its place is kept. None: there is none."""
        return self._by_migration.pop(migration, None)

    def forget(self, copy: Copy) -> None:
        """Take it out and give up its place."""
        del self._by_migration[copy.migration]
        self._placing.forget(copy.migration)

    def place_anew(self, copy: Copy) -> None:
        """Its address may have come or gone since it was placed: another connection had it, say."""
        copy.placement = self._placing.placement(copy.arrival.item, copy.arrival.place)

    def held_arrived(self, content: bytes) -> None:
        """Packets that the exporter's hold has kept for copies here; ValueError if malformed."""
        for migration, packets in unpack(content).items():
            copy = self._by_migration.get(migration)
            if copy is not None and copy.tuple is not None:
                self._shell.held.add(copy.tuple, packets)

    def count(self, outcome: str, number: int) -> None:
        """So many have ended, for the metrics."""
        if number:
            self._shell.metrics.migrations.labels(
                direction="import", outcome=outcome, engine=self._shell.engine.name
            ).inc(number)


def listeners_of(copies: Iterable[Copy]) -> dict[tuple[Record, bytes], Endpoint]:
    """Where those of them that listen will do so, for `Redirecting.miss_listeners`."""
    return {
        (Record.LISTED, copy.migration): copy.placement.local
        for copy in copies
        if copy.candidate.kind is Kind.LISTENING and copy.placement.local is not None
    }


def importer_failed(error: Exception) -> Refusal:
    """For what nobody expected; it is in the log."""
    return Refusal(Code.INTERNAL, f"The importer failed ({error}); its log has the details.")
