# SPDX-License-Identifier: MIT
"""What an earlier run of the daemon left behind, settled before this one opens for business.

The journal decides, and the kernel is made to agree. A decision is journalled before its originals
are closed, and nobody is told before they are. So an original that still lives was not given away:
its part of the decision is undone, and nothing is lost, as whatever its owner wrote meanwhile has
waited behind the redirect. One that waited in an import list lives if it is listed still. An original
that is gone has moved. So has one that is bound, or not even that: it
is taken away from its owner now. And so has, as soon as this daemon has closed
it, a listener whose queue was being taken: that cannot be undone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any
from uuid import UUID

from sockmi import durable
from sockmi.addresses import Endpoint, FourTuple
from sockmi.crashpoints import reached
from sockmi.diag import Found
from sockmi.durable import Handed, Original
from sockmi.engine.base import Kind
from sockmi.engine.closing import close_all
from sockmi.journal import Change, Record
from sockmi.protocol.records import Decision, Holding, Route
from sockmi.queues import Queues
from sockmi.redirect.base import Mode, Redirect
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, audit, inbound, living, now_text, outbound, why

_log = logging.getLogger(__name__)

_UNDONE = Refusal(
    Code.SHUTTING_DOWN,
    "The exporting daemon ended before the connection had moved; it goes on here, export it again.",
)


class Recovery:
    """See the module docstring; ``exports`` comes first, ``kernel`` when all records are read."""

    def __init__(
        self,
        shell: Shell,
        find: Callable[[FourTuple], Found | None],
        destroy: Callable[[FourTuple, int], bool],
        descriptors: Callable[[set[int]], dict[int, int]],
        queues: Queues,
    ) -> None:
        """``find``, ``destroy``: the socket of a connection. ``descriptors``: ours of sockets, by inode."""
        self._shell = shell
        self._find = find
        self._destroy = destroy
        self._descriptors = descriptors
        self._queues = queues
        self._listed = frozenset(shell.journal.records(Record.LISTED))

    # -- what was on its way out

    def exports(self) -> None:
        """Every export of the earlier run has moved, or goes on here, and the journal says so."""
        journal = self._shell.journal
        self._queues.remember()
        change = Change()
        decisions = {str(one.chunk): one for one in durable.decisions(journal)}
        undone: list[Original] = []
        for name, content in journal.records(Record.ORIGINALS).items():
            originals = [durable.read_original(one) for one in content]
            alive = [one for one in originals if self._lives(one)]
            if alive and name in decisions:
                decisions[name] = _without(decisions[name], alive)
                self._undo(change, name, decisions[name], alive)
                undone += alive
            change.drop.append((Record.ORIGINALS, name))
        committed = {one.migrations[position] for one in decisions.values() for position in one.committed}
        stayed = self._close_records(change, committed, {one.migration for one in undone})
        if change.keep or change.drop or change.audit:
            journal.write(change)
        self._end_repair([*stayed, *(one.tuple for one in undone if one.tuple)])

    def _lives(self, original: Original) -> bool:
        if original.listed is not None:
            return original.listed.hex() in self._listed
        if original.kind is Kind.CONNECTED and original.tuple is not None:
            found = self._find(original.tuple)
            return found is not None and found.cookie == original.cookie
        if original.kind is Kind.BOUND:
            self._deaden(original)
            return False
        if original.kind is not Kind.LISTENING:
            return False
        for descriptor in self._descriptors({original.inode}).values():
            (facts,) = self._shell.engine.inspect([descriptor])
            lives = facts.cookie == original.cookie and facts.kind is Kind.LISTENING
            lives = lives and not self._queues.close_listener(original, descriptor)
            if facts.cookie == original.cookie and not lives:
                self._shell.engine.deaden(descriptor)
            close_all([descriptor])
            return lives
        return False

    def _deaden(self, original: Original) -> None:
        """Nothing shows whether that was done before; it may be done twice."""
        for descriptor in self._descriptors({original.inode}).values():
            (facts,) = self._shell.engine.inspect([descriptor])
            if facts.cookie == original.cookie and (why_not := self._shell.engine.deaden(descriptor)):
                _log.error("%s has moved, but its owner here still has it: %s", original.local, why_not)
            close_all([descriptor])

    def _undo(self, change: Change, name: str, left: Decision, alive: Iterable[Original]) -> None:
        if left.committed:
            durable.keep(change, [left])
        else:
            change.drop.append((Record.DECISION, name))
        for one in alive:
            _log.warning("%s had been decided to move, but is still here: undone", one.tuple or one.local)
            change.drop.append((Record.ROUTE, one.connection.hex()))
            change.drop.append((Record.NOTICE, durable.notice_name(one.connection, one.hop)))
            durable.keep(change, [one.holding] if one.holding else [])

    def _close_records(
        self, change: Change, committed: Collection[bytes], undone: Collection[bytes]
    ) -> list[FourTuple]:
        """Outcomes for the audit trail; the connections that were under way and stayed here."""
        stayed: list[FourTuple] = []
        for record in self._shell.journal.history(is_open=True):
            migration = UUID(record["migration_id"]).bytes
            if record.get("direction") != "export" or migration in committed:
                continue
            if record.get("step") == "committed" and migration not in undone:
                # The importer had said that it lives, and so the decision was forgotten.
                audit(change, migration, "export", step="active", outcome="moved", ended_at=now_text())
                continue
            audit(
                change,
                migration,
                "export",
                step="selected",
                to=None,
                outcome="aborted",
                refusal=why(_UNDONE),
                ended_at=now_text(),
            )
            if (connection := _connection(record)) is not None:
                stayed.append(connection)
        return stayed

    def _end_repair(self, connections: Iterable[FourTuple]) -> None:
        """The state was being read, or the original being closed, when the daemon was killed.

        Usually that has been done by the process that keeps owners stopped, unless it was killed as well.
        """
        inodes = {found.inode for one in connections if (found := self._find(one)) and found.inode}
        inodes |= self._shell.engine.left_in_repair()
        for descriptor in self._descriptors(inodes).values() if inodes else ():
            if self._shell.engine.end_repair(descriptor):
                _log.warning("socket %d was left in repair: ended", os.fstat(descriptor).st_ino)
            close_all([descriptor])
        self._shell.engine.forget_left()

    # -- what was on its way in

    def came_to_life(self, connection: FourTuple, held: Collection[FourTuple]) -> bool:
        """Whether a copy that was being handed over lives; a dormant one is done away with, silently.

        Its application, or the socket on which it is sent there, may have it still. ``held``: the
        kernel's holds; the hold is lifted before a copy is led out of repair.
        """
        found = self._find(connection)
        if found is None:
            return False
        descriptors = self._descriptors({found.inode}) if found.inode else {}
        if not descriptors and (not found.inode or connection not in held):
            return True
        in_repair = [self._shell.engine.in_repair(descriptor) for descriptor in descriptors.values()]
        if descriptors and not any(in_repair):
            close_all(list(descriptors.values()))
            return True
        self._shell.holds.hold([connection], None)
        self._shell.engine.discard(list(descriptors.values()))
        if not descriptors and not self._destroy(connection, found.cookie):
            _log.warning("%s: a copy is on its way to an application; waiting for it to go", connection)
        return False

    def unconnected_lives(self, handed: Handed, port: int) -> bool:
        """The same for a socket that is not connected, which only its inode and its cookie tell from others.

        ``port``: the local one that the copy was made with, or 0. If its application has closed it
        meanwhile nobody can say whether it had lived: it did not.
        """
        for descriptor in self._descriptors({handed.inode}).values():
            (facts,) = self._shell.engine.inspect([descriptor])
            if facts.cookie != handed.cookie:
                close_all([descriptor])
                return False
            if port and facts.local is not None and not facts.local.port:
                # The module has taken it back, when the daemon ended that had made it by that engine.
                close_all([descriptor])
                continue
            if self._shell.engine.lives(descriptor, handed.kind):
                close_all([descriptor])
                return True
            self._shell.engine.discard([descriptor])
        return False

    # -- the kernel

    def kernel(
        self,
        routes: Mapping[bytes, Route],
        holdings: Mapping[bytes, Holding],
        *,
        returning: Collection[bytes],
        listed: Collection[bytes],
        held: Iterable[FourTuple],
        keep_held: Collection[FourTuple],
    ) -> None:
        """Redirects, translations and holds as the journal has them.

        ``returning``: connections that are prepared to come back; they are led nowhere until that is
        decided, but for what takeover has led away, whose address is not here. ``listed``: those that no
        application has. ``held``: the kernel's holds; those that are not to be kept are of freezes and
        copies that are no more.
        """
        redirects = self._shell.redirects
        away = [
            route
            for route in routes.values()
            if route.connection not in returning or route.place.mode is Mode.TAKEOVER
        ]
        here = [holding for holding in holdings.values() if holding.connection not in listed]
        # All that is wrong goes before anything comes: another mode may have had the same connection. What
        # then needs something of its own again is held until it has that, be it by the next run.
        wrong = {mode: _wrong(mode, redirect, away) for mode, redirect in redirects.items()}
        coming = {one.tuple for route in away if (one := outbound(route))} | {living(one) for one in here}
        between = [one for each in wrong.values() for one in each if one in coming and one not in keep_held]
        if between:
            self._shell.holds.hold(between, None)
        for mode, redirect in redirects.items():
            redirect.take_back(wrong[mode])
        reached("recovery.taken-back")
        for mode, redirect in redirects.items():
            self._restore(mode, redirect, away, here)
        stale = [*between, *(one for one in held if one not in keep_held)]
        if stale:
            self._shell.holds.unhold(stale)

    def _restore(
        self, mode: Mode, redirect: Redirect, away: Iterable[Route], here: Iterable[Holding]
    ) -> None:
        present = set(redirect.outbound())
        wanted = [one for route in away if route.place.mode is mode and (one := outbound(route))]
        redirect.send_away([one for one in wanted if one not in present])
        lives = dict.fromkeys(came for each in here if each.place.mode is mode and (came := inbound(each)))
        known = set(redirect.inbound())
        redirect.evict([each for each in known if each not in lives])
        redirect.admit([each for each in lives if each not in known and self._find(each.tuple) is not None])


def _wrong(mode: Mode, redirect: Redirect, away: Iterable[Route]) -> list[FourTuple]:
    """What is led away, though the journal does not say so."""
    wanted = {one.tuple for route in away if route.place.mode is mode and (one := outbound(route))}
    return [one.tuple for one in redirect.outbound() if one.tuple not in wanted]


def _without(decision: Decision, undone: Iterable[Original]) -> Decision:
    gone = {one.migration for one in undone}
    left = tuple(one for one in decision.committed if decision.migrations[one] not in gone)
    return Decision(decision.chunk, decision.importer, decision.migrations, left)


def _connection(record: dict[str, Any]) -> FourTuple | None:
    if not record.get("local") or not record.get("remote"):
        return None
    return FourTuple(Endpoint.parse(record["local"]), Endpoint.parse(record["remote"]))
