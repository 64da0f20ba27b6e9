# SPDX-License-Identifier: MIT
"""Copies that no application has leave again: what is frozen, given away or taken back is an image here.

There is no socket that could change, and no owner to be stopped: the tuple is held for as long as it is
listed. ``Record.LISTED`` is the original: the copy is here as long as the journal has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from sockmi import api
from sockmi.engine.base import Captured, Fidelity, Kind, SocketFacts
from sockmi.image import ImageError, stamp
from sockmi.importing.copies import Copy
from sockmi.importing.listed import Listed
from sockmi.importing.listed_record import drop_listed, keep_listed
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.protocol.records import Arrival, MigrationId
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.selection import fits_any_owner, fits_waiting
from sockmi.shell import Shell, now_text, unwritable

_LOST = Refusal(Code.IMAGE, "Its image cannot be read from the spool; see the daemon's log.")


class Onward:
    """``lend`` stands beside its inverse, ``give_back``; after ``release`` only ``settle`` is left."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        stock: Stock,
        listed: Listed,
        sent: Callable[[], Iterable[Copy]],
    ) -> None:
        """``sent``: what is on its way to applications."""
        self._shell = shell
        self._sent = sent
        self._redirecting = redirecting
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._room = stock.room
        self._listed = listed

    # -- which

    def select(self, wanted: api.SocketFilter) -> Iterator[Copy]:
        """Those listed that match; a process that would have to have them is none of them."""
        for copy in self._waiting():
            if fits_waiting(wanted, self.facts(copy), time.monotonic() - copy.listed_at):
                yield copy

    def arriving(self, wanted: api.SocketFilter) -> list[Copy]:
        """Those that would match, whoever gets them: listed, or on their way to an application."""
        ours = [*self._waiting(), *self._sent()]
        return [copy for copy in ours if fits_any_owner(wanted, self.facts(copy))]

    def _waiting(self) -> list[Copy]:
        return [self._copies[candidate.migration_id.bytes] for candidate in self._lists.listed()]

    def find(self, migration: bytes) -> Copy | None:
        """One of them, by its migration id."""
        if migration not in self._copies:
            return None
        copy = self._copies[migration]
        return copy if self._listed.has(copy) else None

    def facts(self, copy: Copy) -> SocketFacts:
        """What preflight would see; it has neither inode nor cookie."""
        item, summary = copy.arrival.item, copy.facts
        return SocketFacts(
            inode=0,
            cookie=0,
            kind=item.kind,
            state=item.state,
            family=summary.family,
            local=copy.placement.local,
            remote=copy.candidate.remote,
            receive_queue_bytes=summary.receive_bytes,
            send_queue_bytes=summary.sent_bytes + summary.unsent_bytes,
            needs=item.needs,
        )

    # -- frozen, or as before

    def lend(self, copy: Copy) -> Refusal | None:
        """No application gets it from now on; or why it is not here."""
        return self._listed.lend(copy)

    def give_back(self, copies: Iterable[Copy]) -> None:
        """They wait as before."""
        for copy in copies:
            self._listed.give_back(copy)

    def hold_again(self, copies: Iterable[Copy]) -> None:
        """They had been led away, which lifts a hold."""
        if tuples := [copy.tuple for copy in copies if copy.tuple is not None]:
            self._shell.holds.hold(tuples, None)

    def capture(self, copies: Collection[Copy]) -> dict[Copy, Captured | Refusal]:
        """Their images, as of sockets that live here."""
        captured: dict[Copy, Captured | Refusal] = {}
        for chunk in {copy.chunk for copy in copies}:
            images = self._images.read_all(chunk)  # once: it may have hundreds, and the freeze is to be short
            for copy in (one for one in copies if one.chunk == chunk):
                captured[copy] = _captured(copy, images.get(copy.candidate.migration_id))
        return captured

    # -- given away

    def release(self, copies: Mapping[Copy, MigrationId]) -> Refusal | None:
        """The journal has them no more: they are the importer's. None of them is if it cannot be written.

        ``copies``: by which migration each leaves.
        """
        change, news = Change(), {"step": "active", "outcome": "moved", "ended_at": now_text()}
        for copy in copies:
            drop_listed(change, copy)
            change.audit.append((copy.candidate.migration_id, "import", news))
        former = self._tag(change, copies)
        try:
            self._shell.journal.write(change)
        except Exception as error:  # a full disk must not cost a connection
            for copy, arrival in former.items():
                copy.arrival = arrival
            return unwritable(error)
        for copy in copies:
            copy.record.update(news)
        for copy in former:
            copy.tag()
            self._lists.put(copy.candidate)
        return None

    def _tag(self, change: Change, leaving: Mapping[Copy, MigrationId]) -> dict[Copy, Arrival]:
        """What waited in the queue of a listener that leaves is its own there too, whenever it follows.

        Returns what these were before.
        """
        former: dict[Copy, Arrival] = {}
        listening = (copy for copy in leaving if copy.candidate.kind is Kind.LISTENING)
        gone = {copy.migration: leaving[copy] for copy in listening}
        for copy in self._copies if gone else ():
            item = copy.arrival.item
            listener = gone.get(item.listener) if item.listener else None
            if listener is not None and copy not in leaving and self._listed.has(copy):
                former[copy] = copy.arrival
                copy.arrival = replace(copy.arrival, item=replace(item, listener=listener))
                keep_listed(change, copy)
        return former

    def settle(self, copies: Collection[Copy]) -> None:
        """Nothing of them is kept here; the redirects that lead them on are in place."""
        if not copies:
            return
        for copy in copies:
            self._lists.remove(copy.candidate.migration_id)
            self._copies.forget(copy)
            self._images.drop(copy)
            self._redirecting.listener_found((Record.LISTED, copy.migration))
            self._shell.moves.append(copy.record)
        if tuples := [copy.tuple for copy in copies if copy.tuple is not None]:
            self._shell.holds.settle(tuples)
        self._copies.count("moved", len(copies))
        self._room.update()


def _captured(copy: Copy, image: bytes | None) -> Captured | Refusal:
    try:
        return Captured(stamp(image, local=copy.placement.local), Fidelity()) if image else _LOST
    except ImageError as error:
        return Refusal(Code.IMAGE, f"Its image in the spool is damaged: {error}.")
