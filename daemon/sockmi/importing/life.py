# SPDX-License-Identifier: MIT
"""Copies come to life, and this daemon lets go of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from uuid import UUID

from sockmi.crashpoints import reached
from sockmi.engine.closing import close_all
from sockmi.importing.copies import Copy
from sockmi.importing.listed import Listed
from sockmi.importing.listed_record import drop_listed, handed_now, keep_listed
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.redirecting import Redirecting
from sockmi.refusal import Refusal
from sockmi.shell import Shell, inbound, now_text


class Life:
    """``begin`` stands beside its inverse, ``fall_back``; what lives is settled."""

    def __init__(self, shell: Shell, redirecting: Redirecting, stock: Stock, listed: Listed) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._listed = listed
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._room = stock.room

    def renew(self, copies: list[Copy]) -> dict[UUID, Refusal]:
        """Those that have been dormant for too long are listed again: their images are as good as before."""
        engine, lapsed = self._shell.engine, {}
        outcomes = engine.renew([copy.fd for copy in copies], [copy.image for copy in copies])
        for copy, refusal in zip(copies, outcomes, strict=True):
            if refusal is not None:
                lapsed[copy.candidate.migration_id] = refusal
                self._listed.put(copy)
        return lapsed

    def begin(self, copies: list[Copy]) -> dict[UUID, Refusal]:
        """Dormant copies come to life: holds are lifted, then they act. Those that fail are listed again."""
        self._note_handed(copies)
        failed: dict[UUID, Refusal] = {}
        self._redirecting.admit(copy.holding for copy in copies if copy.holding)
        reached("taken.admitted")
        engine = self._shell.engine
        outcomes = engine.activate([copy.fd for copy in copies], [copy.image for copy in copies])
        for copy, refusal in zip(copies, outcomes, strict=True):
            if refusal is not None:
                failed[copy.candidate.migration_id] = refusal
                self.fall_back(copy)
        reached("taken.activated")
        return failed

    def fall_back(self, copy: Copy) -> None:
        """A copy that would not come to life is held again and listed: its image is still good."""
        if copy.tuple:
            self._shell.held.want([copy.tuple])
            self._shell.holds.hold([copy.tuple], None)
        if copy.holding and copy.holding.place.mode and (one := inbound(copy.holding)):
            self._shell.redirects[copy.holding.place.mode].evict([one])
        self._listed.put(copy)

    def hold_dormant(self) -> list[Copy]:
        """All connections that do not live yet are held, whatever the kernel has of that."""
        dormant = [
            copy
            for copy in self._copies
            if copy.tuple and not (copy.fd >= 0 and copy.holding and self.has_begun(copy))
        ]
        if tuples := [copy.tuple for copy in dormant if copy.tuple]:
            self._shell.holds.hold(tuples, None)
        return dormant

    def has_begun(self, copy: Copy) -> bool:
        """Whether it is out of repair."""
        return self._shell.engine.lives(copy.fd, copy.candidate.kind)

    def _note_handed(self, copies: Iterable[Copy]) -> None:
        """Which sockets come to life: of those that are not connected a restart could not tell otherwise."""
        change = Change()
        for copy in copies:
            if copy.handed != handed_now(copy):
                keep_listed(change, copy)
        if change.keep:
            self._shell.journal.write(change)

    def settle(self, copies: Collection[Copy]) -> None:
        """They live with their applications: nothing of them is kept here but the holdings."""
        change = Change()
        news = {"step": "active", "outcome": "moved", "ended_at": now_text()}
        close_all([copy.fd for copy in copies if copy.fd >= 0])
        for copy in copies:
            copy.fd = -1
            copy.image = b""
            self._copies.forget(copy)
            self._lists.unreserve(copy.candidate.migration_id)
            self._redirecting.listener_found((Record.LISTED, copy.migration))
            self._images.drop(copy)
            drop_listed(change, copy)
            change.audit.append((copy.candidate.migration_id, "import", news))
            copy.record.update(news)
            self._shell.moves.append(copy.record)
        reached("taken.unspooled")
        if change.drop:
            self._copies.count("moved", len(copies))
            self._shell.note(change)
        reached("taken.journalled")
        if tuples := [copy.tuple for copy in copies if copy.tuple]:
            self._shell.holds.settle(tuples)
        self._room.update()
