# SPDX-License-Identifier: MIT
"""Copies that no application has: each waits as an image in the spool, its tuple held."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from uuid import UUID

from sockmi.engine.base import Restored
from sockmi.image import Section, State, section
from sockmi.image.sections import Sequence, Window
from sockmi.importing.copies import Copy
from sockmi.importing.images import unreadable
from sockmi.importing.listed_record import drop_listed
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.protocol.events import ConnectionsEnded
from sockmi.redirect.segment import Expected
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, now_text, why
from sockmi.spool import SpoolError

_log = logging.getLogger(__name__)

AGAIN_S = 0.25
"""After so long a listed socket is tried again whose place was not free."""

_TAKEN = Refusal(
    Code.CHANGED,
    "It does not wait in the import list any more: an application has it, or it has ended; see sockmi list.",
)
_RESET = Refusal(Code.STATE, "Its peer reset it while it waited for an application.")


class Listed:
    """``put`` stands beside its inverse, ``wake``; ``end`` is for those that come to nothing."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        stock: Stock,
        offer: Callable[[UUID], None],
    ) -> None:
        """``offer``: somebody may be waiting for just this one."""
        self._shell = shell
        self._redirecting = redirecting
        self._offer = offer
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._room = stock.room

    def put(self, copy: Copy) -> None:
        """No application has it: it waits as an image, its tuple held."""
        migration = copy.candidate.migration_id
        self.put_away(copy)
        self._lists.unreserve(migration)
        self._lists.put(copy.candidate)
        copy.listed_at = copy.listed_at or time.monotonic()
        if copy.holding is not None:
            self._redirecting.expect(copy.holding)
        self._rest(copy)

    def _rest(self, copy: Copy) -> None:
        """Its peer is listened to, and so is who may want it."""
        migration = copy.candidate.migration_id
        if copy.tuple is not None:
            self._shell.held.rest(copy.tuple, copy.expected, functools.partial(self._peer_reset, copy))
        # Not now, as we may be in the middle of handing over.
        self._shell.loop.call_later(0, self._offer, migration)

    def has(self, copy: Copy) -> bool:
        """Whether it is there, and no application has it."""
        return self._copies.has(copy) and self._lists.is_listed(copy.candidate.migration_id)

    def lend(self, copy: Copy) -> Refusal | None:
        """It is being moved on, so no application gets it; or why it is not."""
        migration = copy.candidate.migration_id
        if not self._copies.has(copy) or not self._lists.is_free(migration):
            return _TAKEN
        self._lists.lend(migration)
        if copy.tuple is not None:
            self._shell.held.want([copy.tuple])
        return None

    def give_back(self, copy: Copy) -> None:
        """The inverse of ``lend``; it changes nothing of what is not lent."""
        migration = copy.candidate.migration_id
        if self._lists.is_lent(migration):
            self._lists.give_back(migration)
            self._rest(copy)

    def put_away(self, copy: Copy) -> None:
        """Keep no more of it than its image in the spool and its hold."""
        self._shell.engine.discard([copy.fd] if copy.fd >= 0 else [])
        copy.fd = -1
        if copy.image and copy.tuple is not None:
            copy.expected = _expected(copy.image, copy.facts.state)
        copy.image = b""
        copy.client = None

    def wake(self, copy: Copy) -> bool:
        """Restore a listed socket from its image and take it off the list; if not, try again soon."""
        migration = copy.candidate.migration_id
        outcome: Restored | Refusal
        try:
            copy.image = self._images.read(copy)
            self._copies.place_anew(copy)
            (outcome,) = self._shell.engine.restore([copy.image], [copy.placement])
        except (KeyError, SpoolError, OSError) as error:
            outcome = Refusal(Code.IMAGE, unreadable(error))
        if isinstance(outcome, Restored):
            copy.fd = outcome.fd
            self._lists.remove(migration)
            if copy.tuple is not None:
                self._shell.held.want([copy.tuple])
            return True
        if not copy.complained:
            _log.warning("%s cannot be restored now: %s", copy.tuple or migration, outcome)
            copy.complained = True
        copy.image = b""
        self._lists.unclaim(migration)
        self._shell.loop.call_later(AGAIN_S, self._offer, migration)
        return False

    # -- ends

    def _peer_reset(self, copy: Copy) -> None:
        """Its peer has ended it; not now, as its packets are just being looked at."""
        self._shell.loop.call_later(0, self.end, copy, _RESET)

    def end(self, copy: Copy, refusal: Refusal) -> None:
        """It is no more, and whoever leads its packets here is told; late ones are dropped for a while."""
        migration = copy.candidate.migration_id
        if not self.has(copy) or self._lists.is_lent(migration):  # then its peer is heard again later
            return
        shell = self._shell
        _log.warning("%s, which waited for an application, has ended: %s", copy.tuple or migration, refusal)
        self._lists.remove(migration)
        self._lists.unreserve(migration)
        self._copies.forget(copy)
        if copy.tuple:
            shell.held.forget([copy.tuple])
            shell.holds.hold([copy.tuple], shell.config.timing.linger_s)
            shell.holds.settle([copy.tuple])
        change = Change()
        drop_listed(change, copy)
        news = {"step": "ended", "outcome": "failed", "refusal": why(refusal), "ended_at": now_text()}
        change.audit.append((migration, "import", news))
        shell.note(change)
        self._images.drop(copy)
        self._redirecting.listener_found((Record.LISTED, copy.migration))
        self._copies.count("failed", 1)
        self._room.update()
        if copy.holding is not None and copy.holding.durable:
            shell.dispatch(ConnectionsEnded((copy.holding.connection,)))


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
