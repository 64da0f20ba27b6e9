# SPDX-License-Identifier: MIT
"""After a restart: the copies of an earlier run are known again, from the journal and the spool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from uuid import UUID

from sockmi.addresses import FourTuple
from sockmi.durable import Handed
from sockmi.engine.base import Kind
from sockmi.image import peek
from sockmi.importing.copies import Copy, listeners_of
from sockmi.importing.images import chunk_name
from sockmi.importing.listed import Listed
from sockmi.importing.listed_record import read_listed
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.placing import Placing
from sockmi.protocol.records import Arrival, HostId, PreparedChunk
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell, living, now_text

_log = logging.getLogger(__name__)


class Resumption:
    """See the module docstring."""

    def __init__(
        self, shell: Shell, redirecting: Redirecting, placing: Placing, stock: Stock, listed: Listed
    ) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._placing = placing
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._room = stock.room
        self._listed = listed

    def resume(
        self,
        prepared: Iterable[PreparedChunk],
        came_to_life: Callable[[FourTuple], bool],
        unconnected_lives: Callable[[Handed, int], bool],
    ) -> None:
        """Make them known again, those that are undecided (``prepared``) and those that are listed.

        ``came_to_life``, ``unconnected_lives``: whether what was being handed over lives; if not,
        nothing is left.
        """
        for chunk in prepared:
            self._resume_prepared(chunk, came_to_life)
        self._resume_listed(came_to_life, unconnected_lives)
        self._images.drop_others()
        self._room.update()

    def _resume_prepared(self, chunk: PreparedChunk, came_to_life: Callable[[FourTuple], bool]) -> None:
        name = chunk_name(chunk.chunk)
        images = self._images.read_all(name)
        for position in chunk.prepared:
            arrival = chunk.arrivals[position]
            if (image := images.get(UUID(bytes=arrival.item.migration))) is not None:
                copy = self._remember(name, chunk.exporter, arrival, image)
                # Perhaps on its way to an application, but the journal had not heard of that.
                if copy.tuple is not None and came_to_life(copy.tuple):
                    _log.error("%s is here, though its move is undecided", copy.tuple)

    def _resume_listed(
        self, came_to_life: Callable[[FourTuple], bool], unconnected_lives: Callable[[Handed, int], bool]
    ) -> None:
        change = Change()
        for content in self._shell.journal.records(Record.LISTED).values():
            name, exporter, arrival, handed = read_listed(content)
            migration = UUID(bytes=arrival.item.migration)
            holding = self._redirecting.holdings.get(arrival.item.connection)
            lives = living(holding) if holding else None
            image = self._images.read_all(name).get(migration)
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
            self._listed.put(copy)
        if change.drop:
            self._shell.journal.write(change)

    def _remember(self, name: str, exporter: HostId, arrival: Arrival, image: bytes) -> Copy:
        copy = self._copies.make(name, exporter, arrival, image, peek(image))
        copy.record.update(self._shell.journal.migration(copy.candidate.migration_id, "import") or {})
        copy.tag()
        self._images.remember(copy)
        self._copies.add(copy)
        self._lists.reserve(copy.candidate.migration_id, copy.candidate.kind)
        self._placing.keep(arrival.item, copy.tuple)
        if copy.tuple:
            self._shell.held.want([copy.tuple])
            self._shell.holds.hold([copy.tuple], None)
        self._redirecting.miss_listeners(listeners_of([copy]))
        return copy


def _local_port(image: bytes | None) -> int:
    local = peek(image).local if image is not None else None
    return local.port if local is not None else 0
