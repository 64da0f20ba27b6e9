# SPDX-License-Identifier: MIT
"""Places for sockets that are announced: chosen and kept, or given up."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sockmi.early_holds import EarlyHolds
from sockmi.importing.copies import importer_failed
from sockmi.placing import Placing
from sockmi.protocol.actions import Reserve, Unreserve
from sockmi.protocol.events import ReserveDone
from sockmi.protocol.records import Item, Place
from sockmi.redirect.base import Mode
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

_ALL_BY_TAKEOVER = Refusal(
    Code.NO_REDIRECT,
    "Takeover has led its address away from the importer, and is what brings it back, with all connections "
    "that have it; allow takeover (redirect.modes) on both hosts.",
)


class Reservations:
    """``reserve`` stands beside its inverse, ``unreserve``; the places themselves are `Placing`'s."""

    def __init__(self, shell: Shell, redirecting: Redirecting, placing: Placing, early: EarlyHolds) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._placing = placing
        self._early = early

    def reserve(self, action: Reserve) -> None:
        """Choose the place of each copy, and keep it."""
        places: list[Place | Refusal] = []
        with self._placing.asked_at_once(action.items, action.modes):
            for item, former in zip(action.items, action.former, strict=True):
                try:
                    modes = self._modes(item, action.modes)
                    places.append(self._placing.choose(item, modes, former))
                except Refusal as refusal:
                    places.append(refusal)
                except Exception as error:  # no more descriptors, say: the others go on
                    _log.exception("a place for %s", item)
                    self._placing.forget(item.migration)
                    places.append(importer_failed(error))
        self._shell.dispatch(ReserveDone(action.batch, action.exporter, action.page, tuple(places)))
        self._shell.loop.call_later(0, self._shell.spool.provide)  # when RESERVED is on its way
        self._early.promise(
            item.migration for item, former in zip(action.items, action.former, strict=True) if former is None
        )

    def _modes(self, item: Item, modes: Sequence[Mode]) -> Sequence[Mode]:
        if not self._redirecting.left_by_takeover(item.connection):
            return modes
        if Mode.TAKEOVER not in modes:
            raise _ALL_BY_TAKEOVER
        return [Mode.TAKEOVER]

    def unreserve(self, action: Unreserve) -> None:
        """They will not come."""
        self._early.drop(action.migrations)
        for migration in action.migrations:
            self._placing.forget(migration)
