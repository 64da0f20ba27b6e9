# SPDX-License-Identifier: MIT
"""Decisions in the journal: the point of no return of a chunk, and what is taken out of it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sockmi import durable
from sockmi.crashpoints import reached
from sockmi.exporting.export import Export
from sockmi.exporting.items import holding_of
from sockmi.journal import Change, Record, plain
from sockmi.protocol.actions import Commit, ForgetDecision
from sockmi.protocol.records import Decision, Route
from sockmi.queues import Queue, Queues
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell, audit


class Decisions:
    """``write`` stands beside its inverse for single migrations, ``undo``; in the end all is forgotten."""

    def __init__(self, shell: Shell, redirecting: Redirecting, queues: Queues) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._queues = queues

    def write(
        self, action: Commit, exports: Sequence[Export], going: Sequence[int], queues: Iterable[Queue]
    ) -> None:
        """The point of no return: one transaction. ``going``: which of the exports, by index."""
        if not going:
            return
        change = Change()
        self._keep(change, action, exports, going)
        self._tell(change, action, going)
        for queue in queues:
            self._queues.keep(change, queue)
        self._shell.journal.write(change)

    def undo(
        self, action: Commit, exports: Sequence[Export], going: Sequence[int], changed: Iterable[int]
    ) -> None:
        """``changed`` go on here after all, and only ``going`` are left of what had been decided."""
        change = Change()
        chosen = {action.routes[index].connection for index in going}
        durable.drop(change, [route for route in action.routes if route.connection not in chosen])
        durable.drop(change, [one for one in action.notices if one.connection not in chosen])
        if going:
            self._keep(change, action, exports, going)
        else:
            durable.drop(change, [_decision(action, going)])
            change.drop.append((Record.ORIGINALS, str(action.decision.chunk)))
        for index in changed:
            holding = holding_of(exports[index], self._redirecting)
            durable.keep(change, [holding] if holding else [])
        self._tell(change, action, going)
        self._shell.journal.write(change)

    def forget(self, action: ForgetDecision) -> None:
        """The importer is ACTIVE: nothing of the decision is needed any more."""
        reached("decision.forgetting")
        chunk = str(action.chunk)
        self._shell.note(Change(drop=[(Record.DECISION, chunk), (Record.ORIGINALS, chunk)]))
        reached("decision.forgotten")

    def _keep(self, change: Change, action: Commit, exports: Sequence[Export], going: Sequence[int]) -> None:
        chosen = {action.routes[index].connection for index in going}
        durable.keep(change, [_decision(action, going)])
        durable.keep(change, [route for index in going if (route := action.routes[index]).durable])
        durable.keep(change, [one for one in action.notices if one.connection in chosen])
        originals = [self._original(exports[index], action.routes[index]) for index in going]
        change.keep.append((Record.ORIGINALS, str(action.decision.chunk), originals))
        change.drop.extend((Record.HOLDING, connection.hex()) for connection in chosen)

    def _tell(self, change: Change, action: Commit, going: Sequence[int]) -> None:
        importer = self._shell.name_of(action.decision.importer)
        for index in going:
            route = action.routes[index]
            mode = plain(route.place.mode) if route.place.mode else None
            news = {"step": "committed", "to": importer, "mode": mode, "hop": route.hop}
            audit(change, route.migration, "export", **news)

    def _original(self, export: Export, route: Route) -> list[Any]:
        """What a restart must know of a socket that is about to be closed (recovery.py)."""
        facts, copy = export.facts, export.selected.copy
        return durable.write_original(
            durable.Original(
                route.migration,
                route.connection,
                route.hop,
                facts.kind,
                facts.inode,
                facts.cookie,
                facts.local,
                facts.remote,
                holding_of(export, self._redirecting),
                copy.migration if copy else None,
            )
        )


def _decision(action: Commit, going: Iterable[int]) -> Decision:
    """The core's decision, of those that go."""
    decided = action.decision
    positions = {migration: position for position, migration in enumerate(decided.migrations)}
    committed = tuple(sorted(positions[action.routes[index].migration] for index in going))
    return Decision(decided.chunk, decided.importer, decided.migrations, committed)
