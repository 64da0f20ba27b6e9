# SPDX-License-Identifier: MIT
"""Holds of connections that have a place here, set before their exporter freezes them.

A hold costs a transaction of nftables; set when a place is promised, it costs the freeze nothing.
Until the copy is prepared nothing of such a connection concerns this host, so nothing is lost by it.
But a router between the peer and the exporter must not drop its packets yet, and neither must a host to
which the connection returns, as it still leads them away: these hold in PREPARE.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sockmi.addresses import FourTuple
from sockmi.placing import Placing
from sockmi.protocol.records import MigrationId
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell

_log = logging.getLogger(__name__)


class EarlyHolds:
    """See the module docstring. Each method stands beside its inverse: ``promise`` and ``drop``."""

    def __init__(self, shell: Shell, redirecting: Redirecting, placing: Placing) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._placing = placing
        self._promised: set[MigrationId] = set()
        self._held: dict[MigrationId, FourTuple] = {}

    def promise(self, migrations: Iterable[MigrationId]) -> None:
        """Hold the strangers among these soon: not now, as RESERVED is to be sent first."""
        if places := tuple(migrations):
            self._promised.update(places)
            self._shell.loop.call_later(0, self._hold, places)

    def _hold(self, migrations: Iterable[MigrationId]) -> None:
        promised = [one for one in migrations if one in self._promised]
        self._promised.difference_update(promised)
        due = {one: found for one in promised if (found := self._placing.stranger(one))}
        due = {one: found for one, found in due.items() if self._redirecting.route_of(found) is None}
        if not due:
            return
        tuples = list(due.values())
        self._shell.held.want(tuples)
        try:
            self._shell.holds.hold(tuples, None)
        except Exception:
            _log.exception("places could not be held early; they will be when their images come")
            self._shell.held.forget(tuples)
            return
        self._held |= due

    def hold_again(self) -> list[FourTuple]:
        """All of them, whatever the kernel has of that: nobody else will, as they are held already."""
        if tuples := list(self._held.values()):
            self._shell.holds.hold(tuples, None)
        return tuples

    def take(self, migrations: Iterable[MigrationId]) -> set[FourTuple]:
        """Those that are held already; they are the caller's from now on."""
        held = set()
        for migration in migrations:
            self._promised.discard(migration)
            if (found := self._held.pop(migration, None)) is not None:
                held.add(found)
        return held

    def drop(self, migrations: Iterable[MigrationId]) -> None:
        """They will not come."""
        if tuples := list(self.take(migrations)):
            self._shell.held.forget(tuples)
            try:
                self._shell.holds.unhold(tuples)
            except Exception:  # nothing of them passes here; a restart lifts what nobody needs
                _log.exception("the early holds of %d connections stay", len(tuples))
