# SPDX-License-Identifier: MIT
"""Gives a prepared chunk away, or takes back what cannot go.

Order matters: redirect, journal, last look, close. From the journal on there is only forward,
but for a socket that has changed or ended meanwhile: it stays here, and nobody has been told of it.
Takeover moves an address: so all that it leads away goes, or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from sockmi.crashpoints import reached
from sockmi.engine.base import Kind
from sockmi.exporting.decisions import Decisions
from sockmi.exporting.descriptors import Descriptors, close_ours
from sockmi.exporting.export import Export, copies, owned
from sockmi.exporting.exports import Exports
from sockmi.exporting.freezer import Freezer
from sockmi.exporting.listeners import Listeners
from sockmi.importing.onward import Onward
from sockmi.protocol.actions import Commit, LetGo
from sockmi.protocol.events import CommitDone
from sockmi.protocol.records import ChunkId, HostId, Route
from sockmi.protocol.together import stays_too
from sockmi.redirect.base import Mode
from sockmi.redirect.held import pack
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, by_mode, outbound, unwritable

_log = logging.getLogger(__name__)

_TOO_LATE = Refusal(
    Code.FREEZE_DEADLINE,
    "The freeze took longer than timing.freeze_deadline_s; the connection goes on here.",
)


class Committer:
    """See the module docstring; it owns what has been given away since CONFIRM was asked for."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        *,
        exports: Exports,
        freezer: Freezer,
        descriptors: Descriptors,
        listeners: Listeners,
        decisions: Decisions,
        onward: Onward,
    ) -> None:
        self._shell = shell
        self._onward = onward
        self._descriptors = descriptors
        self._redirecting = redirecting
        self._exports = exports
        self._freezer = freezer
        self._listeners = listeners
        self._decisions = decisions
        self._gone: dict[ChunkId, list[tuple[Route, Export]]] = {}
        self._leaving: dict[bytes, Route] = {}  # led away by a commit that is not over

    def leading(self) -> dict[bytes, Route]:
        """What is led away and has no route yet, by connection."""
        gone = (route for chunk in self._gone.values() for route, _unused in chunk)
        return self._leaving | {route.connection: route for route in gone if route.durable}

    def commit(self, action: Commit) -> None:
        """Redirect, compare, journal, close; what fails is undone and goes on where it was."""
        importer = action.decision.importer
        exports = [self._exports[route.migration] for route in action.routes]
        for export in exports:
            export.record["step"] = "prepared"
        results: list[Refusal | None] = [None] * len(exports)
        self._send_away(action.routes, exports, results)
        reached("commit.led-away")
        earliest = self._freezer.earliest_safe()
        for index, export in enumerate(exports):
            if results[index] is None and export.frozen_at < earliest:
                results[index] = _TOO_LATE
        queues = self._listeners.open_queues(importer, exports, results)
        _all_or_none(action.routes, results)
        self._take_back(action.routes, exports, results, _refused(results))
        going = [index for index, result in enumerate(results) if result is None]
        try:
            kept = [queue for index, queue in queues.items() if index in going]
            self._decisions.write(action, exports, going, kept)
        except Exception as error:  # a full disk must not cost a connection
            self._listeners.end_queues(queues)
            for index in going:
                results[index] = unwritable(error)
            self._take_back(action.routes, exports, results, going)
            going = []
        reached("commit.journalled")
        self._look_again(action.routes, exports, going, results)
        staying = [index for index in going if results[index] is not None]
        going = [index for index in going if results[index] is None]
        self._listeners.take_queues({index: queue for index, queue in queues.items() if index in going})
        reached("commit.accepted")
        refusals = self._release(
            [exports[index] for index in going],
            together=any(_is_joined(action.routes[index]) for index in going),
        )
        for position, index in enumerate(going):
            if exports[index].facts.kind is Kind.LISTENING and refusals[position] is not None:
                refusals[position] = self._listeners.insist(importer, index, exports[index], queues)
        self._listeners.end_half_open(
            exports[index] for index, refusal in zip(going, refusals, strict=True) if refusal is None
        )
        reached("commit.released")
        for index, refusal in zip(going, refusals, strict=True):
            results[index] = refusal
        changed = [*staying, *(index for index in going if results[index] is not None)]
        if changed:
            going = [index for index in going if results[index] is None]
            self._decisions.undo(action, exports, going, changed)
            self._take_back(action.routes, exports, results, changed)
            self._descriptors.name_passed_on(exports, results)
        gone = [(action.routes[index], exports[index]) for index in going]
        self._ship_held(importer, gone)
        if gone:
            self._gone[action.decision.chunk] = gone
        self._leaving = {}
        reached("commit.done")
        self._shell.dispatch(CommitDone(action.decision.chunk, tuple(results)))
        for index, queue in queues.items():
            self._listeners.begin_to_follow(queue, exports[index], moved=index in going)

    def _release(self, exports: Sequence[Export], *, together: bool) -> list[Refusal | None]:
        """What waited in an import list is there no more; close each of the others without a packet.

        Of what goes only ``together`` nothing can stay when some is closed: nobody asks for its owners then.
        """
        live = owned(exports)
        waiting = {one.selected.copy: one.migration for one in exports if one.selected.copy}
        unwritten = self._onward.release(waiting) if waiting else None
        if unwritten is not None and together:
            return [unwritten] * len(exports)
        closed = iter(
            self._shell.engine.release(
                [one.selected.descriptor for one in live],
                [one.image for one in live],
                owned=not together,
                together=together,
            )
        )
        return [unwritten if export.selected.copy else next(closed) for export in exports]

    def let_go(self, action: LetGo) -> None:
        """They are the importer's, which knows it by now: their redirects are kept, their owners run.

        What had been imported here and left again is held here no more. Its translation needs no removing:
        the redirect that leads it away has replaced it.
        """
        gone = self._gone.pop(action.chunk)
        for route, _unused in gone:
            self._redirecting.drop_holding(route.connection)
        self._redirecting.add_routes(route for route, _unused in gone if route.durable)
        exports = [export for _unused, export in gone]
        # Before its owners run: their epoll forgets it with them.
        close_ours(exports)
        self._freezer.resume_soon(exports)
        self._onward.settle(copies(exports))

    def _ship_held(self, importer: HostId, gone: Iterable[tuple[Route, Export]]) -> None:
        """What the peer has sent meanwhile goes to the copy, on the stream and so before CONFIRM."""
        migrations = {export.facts.tuple: route.migration for route, export in gone if export.facts.tuple}
        kept = self._shell.held.take(list(migrations))
        if kept:
            self._shell.send_held(importer, pack({migrations[one]: packets for one, packets in kept.items()}))

    def _look_again(
        self,
        routes: Sequence[Route],
        exports: Sequence[Export],
        going: Sequence[int],
        results: list[Refusal | None],
    ) -> None:
        """What its owners have closed meanwhile ends here.

        Of what goes only together nothing is closed if one has changed.
        """
        live = [index for index in going if not exports[index].selected.copy]
        abandoned = self._descriptors.abandoned([exports[index] for index in live])
        for index, closed in zip(live, abandoned, strict=True):
            results[index] = closed
        _all_or_none(routes, results)
        joined = [index for index in live if results[index] is None and _is_joined(routes[index])]
        if not joined:
            return
        outcomes = self._shell.engine.compare(
            [exports[index].selected.descriptor for index in joined],
            [exports[index].image for index in joined],
        )
        for index, outcome in zip(joined, outcomes, strict=True):
            results[index] = outcome
        _all_or_none(routes, results)

    # -- redirects

    def _send_away(
        self, routes: Sequence[Route], exports: Sequence[Export], results: list[Refusal | None]
    ) -> None:
        pairs = [(route.place.mode, index) for index, route in enumerate(routes) if outbound(route)]
        for mode, indices in by_mode(pairs).items():
            connections = [one for index in indices if (one := outbound(routes[index]))]
            try:
                self._shell.redirects[mode].send_away(connections)
                self._leaving |= {routes[index].connection: routes[index] for index in indices}
            except Exception as error:
                refusal = Refusal(Code.REDIRECT, f"The {mode} redirect could not be set up: {error}.")
                for index in indices:
                    results[index] = refusal
        self._listeners.hold_new(routes, exports, results)

    def _take_back(
        self,
        routes: Sequence[Route],
        exports: Sequence[Export],
        results: Sequence[Refusal | None],
        failed: Sequence[int],
    ) -> None:
        """The inverse of ``_send_away``, and of the freeze, for some of them: those that have ``failed``."""
        if not failed:
            return
        for index in failed:
            self._leaving.pop(routes[index].connection, None)
        self._listeners.let_new_come(routes[index] for index in failed)
        pairs = [(routes[index].place.mode, index) for index in failed]
        for mode, indices in by_mode(pairs).items():
            tuples = [one.tuple for index in indices if (one := outbound(routes[index]))]
            live = owned(exports[index] for index in indices)
            holdings = [held for one in live if (held := self._redirecting.holding_of(one.facts))]
            try:
                # What had been imported needs its own translation again: nothing passes before.
                self._freezer.hold_again([exports[index] for index in indices])
                self._shell.redirects[mode].take_back(tuples)
                self._redirecting.admit(holdings)
            except Exception:
                # What could not be led away (all or nothing) is not led away: it just goes on here.
                if any(why_not.code is not Code.REDIRECT for index in indices if (why_not := results[index])):
                    raise
                _log.exception("the redirect %s is broken; restart this daemon to renew its rules", mode)
        self._freezer.undo([exports[index] for index in failed])


def _is_joined(route: Route) -> bool:
    return route.place.mode is Mode.TAKEOVER


def _all_or_none(routes: Sequence[Route], results: list[Refusal | None]) -> None:
    """Refuse all that takeover leads away if one of it is refused."""
    joined = [index for index, route in enumerate(routes) if _is_joined(route)]
    first = next((refusal for index in joined if (refusal := results[index]) is not None), None)
    if first is None:
        return
    for index in joined:
        results[index] = results[index] or stays_too(first)


def _refused(results: Sequence[Refusal | None]) -> list[int]:
    return [index for index, refusal in enumerate(results) if refusal is not None]
