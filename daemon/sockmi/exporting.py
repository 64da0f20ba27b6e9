# SPDX-License-Identifier: MIT
"""The exporter's half of the shell: selects, freezes, commits and thaws real sockets.

Order matters in ``freeze`` (owners stop before packets are held, both before anything is read) and
in ``commit`` (redirect, last comparison, journal, close); each step stands beside its inverse.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID, uuid4

from sockmi import durable
from sockmi.addresses import FourTuple
from sockmi.crashpoints import reached
from sockmi.engine.base import Captured, Kind, SocketFacts
from sockmi.engine.listing import half_open
from sockmi.image import Section, peek, queue_bytes, section
from sockmi.image.native import stamp, with_section
from sockmi.image.sections import Counters
from sockmi.image.sections import Place as ImagePlace
from sockmi.journal import Change, Record, plain
from sockmi.permission import Caller
from sockmi.protocol.actions import Commit, Freeze, Outcome, Report, Result, Thaw
from sockmi.protocol.events import CancelExport, ChildrenFound, CommitDone, FreezeDone, StartExport
from sockmi.protocol.records import (
    IMAGE_BYTES_MAX,
    BatchId,
    ChunkId,
    Decision,
    HostId,
    Item,
    MigrationId,
    Place,
    Route,
)
from sockmi.queues import Queue, Queues, queue_length
from sockmi.redirect.base import Mode
from sockmi.redirect.held import pack
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, audit, by_mode, close_all, microseconds_since, now_text, outbound, why

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_MAX_S = 0.5
# The kernel's hold outlasts the freeze by this much; a commit that comes later than half of it is undone.
_HOLD_MARGIN_S = 1.0
_AWAKE = Refusal(Code.CHANGED, "A request has come since it was quiet; it stays, try again when it is idle.")
_REACHABILITY_TTL_S = 2.0
# A handshake that nobody completes is given up after about a minute (net.ipv4.tcp_synack_retries).
_HALF_OPEN_S = 70.0
_IMAGE_OVERHEAD_BYTES = 2048
# What the end of a migration adds to its record.
_NEWS = (
    "outcome", "refusal", "step", "to", "mode", "ended_at", "blackout_us", "fidelity",
    "receive_queue_bytes", "sent_bytes", "unsent_bytes", "image_bytes",
)  # fmt: skip
_LATE_MAX = 16  # how often a listener that is being closed is looked at for what came late
_GROWTH_BYTES = 1 << 20  # what queues may take between selection and freeze


FindHolders = Callable[[set[int], Callable[[dict[int, list[int]], dict[int, Refusal]], None]], None]


@dataclass(slots=True)
class Selected:
    """One socket that somebody wants moved; the shell owns ``descriptor`` (a duplicate).

    ``caller``: None for those who may move any socket; others only what is theirs. ``user_id``: who asked.
    ``received``: how many bytes had come when it was quiet; it is not moved if its owner has read more since.
    """

    descriptor: int
    pid: int | None
    fd: int | None
    caller: Caller | None = None
    context: bytes | None = None
    migration_id: UUID | None = None
    user_id: int | None = None
    received: int | None = None


@dataclass(slots=True)
class Export:
    """One migration under way, from selection to its outcome."""

    selected: Selected
    migration: MigrationId
    facts: SocketFacts
    record: dict[str, Any]
    holders: list[int] = field(default_factory=list)
    listener: MigrationId | None = None
    image: bytes = b""
    frozen_at: float = 0.0
    stopped: bool = False
    half_open: dict[FourTuple, int] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """Migrations that were asked for together; ``done`` gets all their records once."""

    done: Callable[[list[dict[str, Any]]], None]
    progress: Callable[[dict[str, Any]], None] | None
    records: list[dict[str, Any]] = field(default_factory=list)
    open_batches: int = 1
    waiting: list[Export] = field(default_factory=list)


class Exporting:
    """See the module docstring."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        find_holders: FindHolders,
        destroy: Callable[[FourTuple, int], bool],
    ) -> None:
        """``find_holders`` finds the processes of sockets, and what is against stopping them; later.

        ``destroy`` ends a socket of this kernel, whoever has it; False if this kernel cannot.
        """
        self._destroy = destroy
        self._shell = shell
        self._redirecting = redirecting
        self._holding_of = redirecting.holding_of
        self._find_holders = find_holders
        self.exports: dict[MigrationId, Export] = {}
        self._batches: dict[BatchId, Batch] = {}
        self.queues = Queues(shell, self._follow)
        self._following: dict[BatchId, Queue] = {}
        self._by_inode: dict[int, Export] = {}
        self._to_resume: list[Export] = []
        self._outcomes: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._shipped_bytes = 0
        self._reachability: dict[tuple[Mode, IPv4Address | IPv6Address], tuple[float, str | None]] = {}

    # -- selection

    def export(
        self,
        selection: Sequence[Selected],
        *,
        target: tuple[HostId | None, IPv4Address | IPv6Address | None],
        timeout_s: float,
        dry_run: bool,
        done: Callable[[list[dict[str, Any]]], None],
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> BatchId:
        """Move sockets; ``done`` gets one record for each, in order, and ``progress`` each as it ends.

        A descriptor whose socket is already migrating, or cannot move, is refused at once. The descriptors
        are this method's, also if it raises. Returns the batch id, for ``cancel``.
        """
        batch_id = uuid4().bytes
        batch = Batch(done, progress)
        going: list[Export] = []
        begun: list[dict[str, Any]] = []
        try:
            facts = self._shell.engine.inspect([one.descriptor for one in selection])
        except BaseException:
            close_all([one.descriptor for one in selection])
            raise
        for one, fact in zip(selection, facts, strict=True):
            export = self._register(one, fact, batch_id)
            batch.records.append(export.record)
            if self.exports[export.migration] is export:  # else the journal has it of the one under way
                begun.append(export.record)
            refusal = fact.refusal
            if refusal is None:
                refusal = self._obstacle(export)
            if refusal is not None:
                self._end(export, batch, "refused", refusal)
            else:
                self._by_inode[fact.inode] = export
                going.append(export)
        try:
            self._journal_start(begun)
        except Exception as error:  # a full disk
            _log.exception("journalling the start of %d migrations", len(begun))
            for export in going:
                self._end(export, batch, "refused", _unwritable(error))
            going = []
        if not going:
            self._account()
            done(batch.records)
            return batch_id
        self._batches[batch_id] = batch
        batch.waiting = going

        def found(holders: dict[int, list[int]], verdicts: dict[int, Refusal]) -> None:
            if not batch.waiting:
                return  # cancelled meanwhile
            batch.waiting = []
            items = []
            for export in going:
                inode, caller = export.facts.inode, export.selected.caller
                export.holders = holders.get(inode, [])
                refusal = (caller.obstacle(export.holders) if caller else None) or verdicts.get(inode)
                try:
                    item = None if refusal else self._item(export, planned=dry_run)
                except Exception as error:
                    _log.exception("looking at %s", export.facts.tuple or export.facts.local)
                    message = f"The daemon failed ({error}); its log has the details."
                    refusal, item = Refusal(Code.INTERNAL, message), None
                if item is None:
                    self._end(export, batch, "refused", refusal)
                else:
                    export.record["step"] = "requested"
                    items.append(item)
            if ended := [export.record for export in going if export.record.get("outcome")]:
                self._shell.note(_started(ended))
                self._account()
            if not items:
                self.batch_done(batch_id)
                return
            modes = self._shell.config.redirect.modes
            self._shell.dispatch(
                StartExport(batch_id, tuple(items), modes, timeout_s, *target, dry_run=dry_run)
            )

        self._find_holders({export.facts.inode for export in going}, found)
        return batch_id

    def turn_away(self, refused: Sequence[tuple[dict[str, Any], Refusal]]) -> list[dict[str, Any]]:
        """Records of sockets that are refused before they could be looked at: completed, and journalled."""
        records = [record for record, _unused in refused]
        for record, refusal in refused:
            record.update(outcome="refused", ended_at=now_text(), refusal=why(refusal))
            self._count(record)
        self._shell.note(_started(records))
        self._account()
        return records

    def _obstacle(self, export: Export) -> Refusal | None:
        """What stands against a migration besides the socket itself."""
        facts, known = export.facts, self.exports.get(export.migration)
        if facts.inode in self._by_inode or known is not export:
            return Refusal(
                Code.ALREADY_MIGRATING,
                "This socket, or this migration id, is being migrated; wait for it (sockmi info), or name "
                "it once.",
            )
        size, most = _size(export), self._shell.config.image_bytes_max
        if size > most:
            return Refusal(
                Code.TOO_LARGE,
                f"Its queues and context make an image of about {size} bytes, and image_bytes_max is {most}; "
                "raise it on both hosts, or try again when less is queued.",
            )
        return None

    def cancel(self, batch_id: BatchId) -> None:
        """Undo what of the batch is not yet committed."""
        batch = self._batches.get(batch_id)
        if batch is None:
            return
        refusal = Refusal(Code.TIMEOUT, "Whoever asked for this migration has gone; ask again.")
        waiting, batch.waiting = batch.waiting, []
        for export in waiting:
            self._end(export, batch, "refused", refusal)
        if waiting:
            self._shell.note(_started([export.record for export in waiting]))
            self._account()
            self.batch_done(batch_id)
        else:
            self._shell.dispatch(CancelExport(batch_id))

    def is_open(self, batch_id: BatchId) -> bool:
        """Whether some migration of the batch has no outcome yet."""
        return batch_id in self._batches

    def _register(self, selected: Selected, facts: SocketFacts, batch_id: BatchId) -> Export:
        migration_id = selected.migration_id or uuid4()
        record: dict[str, Any] = {
            "migration_id": str(migration_id),
            "batch_id": str(UUID(bytes=batch_id)),
            "direction": "export",
            "engine": self._shell.engine.name,
            "kind": plain(facts.kind),
            "state": facts.state,
            "local": str(facts.local) if facts.local else None,
            "remote": str(facts.remote) if facts.remote else None,
            "from": self._shell.host_name,
            "to": None,
            "user_id": selected.user_id,
            "pid": selected.pid,
            "fd": selected.fd,
            "started_at": now_text(),
            "step": "selected",
            "context_bytes": len(selected.context or b""),
        }
        export = Export(selected, migration_id.bytes, facts, record)
        if migration_id.bytes not in self.exports:
            self.exports[migration_id.bytes] = export
        return export

    def _item(self, export: Export, *, planned: bool = False) -> Item:
        facts = export.facts
        asked = planned and facts.kind is Kind.LISTENING
        migration = export.migration
        holding = self._holding_of(facts)
        bound = facts.local is not None and (facts.local.port or not facts.local.address.is_unspecified)
        local = facts.local if bound else None
        export.record["hop"] = holding.hop + 1 if holding else 1
        return Item(
            migration=migration,
            connection=holding.connection if holding else migration,
            kind=facts.kind,
            state=facts.state,
            local=local,
            remote=facts.remote,
            origin=(holding.origin if holding else None) or local,
            hop=export.record["hop"],
            home=holding.home if holding else self._shell.host_id,
            needs=replace(facts.needs, image_bytes_max=self._largest(export)),
            size_bytes=_size(export),
            listener=export.listener,
            queued=queue_length(export.selected.descriptor) if asked else 0,
            handle=export,
        )

    def _largest(self, export: Export) -> int:
        """How long the image may become until it is shipped, in bytes; no more than this host ships."""
        size = _size(export)
        return max(size, min(size + _GROWTH_BYTES, self._shell.config.image_bytes_max))

    def _journal_start(self, records: list[dict[str, Any]]) -> None:
        if records:
            self._shell.journal.write(_started(records))

    # -- freeze and thaw

    def freeze(self, action: Freeze) -> None:
        """Stop the owners, hold the packets, capture; whatever goes wrong is undone and answered."""
        self._resume_released()
        exports = [self.exports[item.migration] for item in action.items]
        try:
            results = self._freeze(action, exports)
        except Exception as error:
            _log.exception("freezing %s", action.chunk)
            self._undo(exports)
            refusal = Refusal(
                Code.INTERNAL, f"The freeze failed ({error}); the daemon's log has the details."
            )
            results = [refusal] * len(exports)
        self._shell.dispatch(FreezeDone(action.chunk, tuple(results)))

    def _freeze(self, action: Freeze, exports: list[Export]) -> list[bytes | Refusal]:
        shell = self._shell
        results: list[bytes | Refusal] = [b""] * len(exports)
        for index, place in enumerate(action.places):
            if obstacle := self._unreachable(place):
                results[index] = Refusal(Code.NO_REDIRECT, obstacle)
            elif too_much := self._too_much(_size_now(exports[index]), 0):
                results[index] = too_much
        for mode, indices in by_mode(
            (place.mode, index) for index, place in enumerate(action.places)
        ).items():
            leaving = [connection for index in indices if (connection := exports[index].facts.tuple)]
            if obstacle := shell.redirects[mode].obstacle(leaving):
                refusal = Refusal(Code.REDIRECT, f"The {mode} redirect cannot be set up: {obstacle}.")
                results = [refusal if index in indices else result for index, result in enumerate(results)]
        frozen_at = time.monotonic()
        for export, result in zip(exports, results, strict=True):
            if isinstance(result, bytes):
                export.frozen_at = frozen_at
                export.record["step"] = "frozen"
        # A busy host takes its time to have a thread stop; the other half is for the rest of the freeze.
        self._stop(exports, results, min(action.deadline_s / 2, _STOP_TIMEOUT_MAX_S))
        reached("freeze.stopped")
        frozen = [index for index, result in enumerate(results) if isinstance(result, bytes)]
        self._hold([exports[index] for index in frozen], action.deadline_s + _HOLD_MARGIN_S)
        reached("freeze.held")
        captured = shell.engine.capture(
            [exports[index].selected.descriptor for index in frozen], action.deadline_s + _HOLD_MARGIN_S
        )
        reached("freeze.captured")
        shipped = 0
        for index, one in zip(frozen, captured, strict=True):
            if isinstance(one, Captured) and _woke(exports[index], one.image):
                outcome: bytes | Refusal = _AWAKE
            elif isinstance(one, Captured):
                image = self._finish_image(exports[index], action.items[index], one)
                outcome = self._too_much(len(image), shipped) or image
            else:
                outcome = one
            results[index] = outcome
            if isinstance(outcome, Refusal):
                self._undo([exports[index]])
            else:
                shipped += len(outcome)
        return results

    def _too_much(self, size: int, before: int) -> Refusal | None:
        """Why an image cannot be shipped after ``before`` bytes of its chunk: queues grow."""
        most = self._shell.config.image_bytes_max
        if size > most:
            return Refusal(
                Code.TOO_LARGE,
                f"Its queues have grown: the image has {size} bytes, and image_bytes_max is {most}; "
                "try again when less is queued.",
            )
        if before + size > IMAGE_BYTES_MAX:
            return Refusal(Code.CHANGED, "So much is queued that it did not fit into its chunk; try again.")
        return None

    def _unreachable(self, place: Place) -> str | None:
        """Why packets cannot be led to a place; the routing tables are asked now and then, not each time."""
        if place.mode is None or place.endpoint is None:
            return None
        key, now = (place.mode, place.endpoint.address), time.monotonic()
        known = self._reachability.get(key)
        if known is None or known[0] < now:
            obstacle = self._shell.redirects[place.mode].reachable(place.endpoint.address)
            known = self._reachability[key] = (time.monotonic() + _REACHABILITY_TTL_S, obstacle)
        return known[1]

    def _stop(self, exports: list[Export], results: list[bytes | Refusal], timeout_s: float) -> None:
        going = [index for index, result in enumerate(results) if isinstance(result, bytes)]
        pids = sorted({pid for index in going for pid in exports[index].holders})
        inodes = [exports[index].facts.inode for index in going]
        for index, refusal in zip(going, self._shell.engine.stop(inodes, pids, timeout_s), strict=True):
            if refusal is None:
                exports[index].stopped = True
            else:
                results[index] = refusal

    def _hold(self, exports: list[Export], timeout_s: float) -> None:
        tuples = [export.facts.tuple for export in exports if export.facts.tuple]
        if tuples:
            self._shell.held.want(tuples)
            self._shell.holds.hold(tuples, timeout_s)
        listeners = [
            export.facts.local
            for export in exports
            if export.facts.kind is Kind.LISTENING and export.facts.local
        ]
        if listeners:
            self._shell.holds.hold_listeners(listeners, timeout_s)

    def _finish_image(self, export: Export, item: Item, captured: Captured) -> bytes:
        stamped = bytearray(captured.image)
        stamp(
            stamped,
            migration_id=item.migration,
            home_id=item.home,
            listener_id=item.listener,
            origin=ImagePlace.of(item.origin) if item.origin else None,
            hop=item.hop,
        )
        image = bytes(stamped)
        if export.selected.context:
            image = with_section(image, Section.CONTEXT, export.selected.context)
        export.image = image
        export.record["image_bytes"] = len(image)
        export.record["fidelity"] = {
            "carried": captured.fidelity.carried,
            "approximated": captured.fidelity.approximated,
            "reset": captured.fidelity.reset,
        }
        if item.kind is Kind.LISTENING:
            # The copy hears who connects to the importer, or to an address that takeover brings there.
            export.record["fidelity"]["approximated"] = [*captured.fidelity.approximated, "new-connections"]
        return image

    def thaw(self, action: Thaw) -> None:
        """The inverse of ``freeze``."""
        self._undo([self.exports[migration] for migration in action.migrations])

    def _undo(self, exports: list[Export]) -> None:
        """Lift the holds first: a resumed owner's packets must not be dropped."""
        try:
            self._unhold(exports)
        except Exception:  # then the kernel lifts them, when their time is over
            _log.exception("holds could not be lifted; they end by themselves")
        reached("thaw.unheld")
        self._resume(exports)

    def _unhold(self, exports: list[Export]) -> None:
        tuples = [export.facts.tuple for export in exports if export.facts.tuple]
        if tuples:
            self._shell.holds.unhold(tuples)
            self._shell.held.deliver(self._shell.held.take(tuples))
        listeners = [
            export.facts.local
            for export in exports
            if export.facts.kind is Kind.LISTENING and export.facts.local
        ]
        if listeners:
            self._shell.holds.unhold_listeners(listeners)
            self._shell.holds.unhold([one for export in exports for one in export.half_open])

    def _resume_released(self) -> None:
        exports, self._to_resume = self._to_resume, []
        self._resume(exports)

    def _resume(self, exports: list[Export]) -> None:
        stopped = [export for export in exports if export.stopped]
        self._shell.engine.resume([export.facts.inode for export in stopped])
        for export in stopped:
            export.stopped = False

    # -- commit

    def commit(self, action: Commit) -> None:
        """Redirect, compare, journal, close; what fails is undone and goes on where it was."""
        shell = self._shell
        exports = [self.exports[route.migration] for route in action.routes]
        for export in exports:
            export.record["step"] = "prepared"
        results: list[Refusal | None] = [None] * len(exports)
        self._send_away(action.routes, exports, results)
        reached("commit.led-away")
        limit = time.monotonic() - shell.config.timing.freeze_deadline_s - _HOLD_MARGIN_S / 2
        for index, export in enumerate(exports):
            if results[index] is None and export.frozen_at < limit:
                results[index] = Refusal(
                    Code.FREEZE_DEADLINE,
                    "The freeze took longer than timing.freeze_deadline_s; the connection goes on here.",
                )
        queues = self._open_queues(action, exports, results)
        self._take_back(action.routes, exports, results, undone=set())
        going = [index for index, result in enumerate(results) if result is None]
        try:
            self._journal_commit(action, exports, going, queues=list(queues.values()))
        except Exception as error:  # a full disk must not cost a connection
            for index in list(queues):
                self.queues.end(queues.pop(index))
            for index in going:
                results[index] = _unwritable(error)
            self._take_back(action.routes, exports, results, undone=set(range(len(exports))) - set(going))
            going = []
        reached("commit.journalled")
        for queue in queues.values():
            self.queues.take(queue)
        reached("commit.accepted")
        refusals = shell.engine.release(
            [exports[index].selected.descriptor for index in going],
            [exports[index].image for index in going],
        )
        for position, index in enumerate(going):
            if exports[index].facts.kind is Kind.LISTENING and refusals[position] is not None:
                refusals[position] = self._insist(action, index, exports[index], queues)
        self._end_half_open(
            [exports[index] for index, one in zip(going, refusals, strict=True) if one is None]
        )
        reached("commit.released")
        changed = [index for index, refusal in zip(going, refusals, strict=True) if refusal is not None]
        if changed:
            before = set(range(len(exports))) - set(changed)
            for index, outcome in zip(going, refusals, strict=True):
                results[index] = outcome
            going = [index for index in going if index not in changed]
            self._journal_commit(action, exports, going, undone=[exports[index] for index in changed])
            self._take_back(action.routes, exports, results, undone=before)
        self._drop_holdings(action.routes, going)
        self._redirecting.add_routes(action.routes[index] for index in going if action.routes[index].durable)
        # The importer need not wait until the owners run again; the next freeze does.
        self._to_resume += [exports[index] for index in going]
        shell.loop.call_later(0, self._resume_released)
        self._ship_held(action.decision.importer, [(action.routes[index], exports[index]) for index in going])
        reached("commit.done")
        shell.dispatch(CommitDone(action.decision.chunk, tuple(results)))
        for index, queue in queues.items():
            self._begin_to_follow(queue, exports[index], moved=index in going)

    def _end_half_open(self, exports: list[Export]) -> None:
        """Without a listener the kernel just forgets these handshakes; where it cannot, they stay held."""
        for export in (one for one in exports if one.half_open):
            try:
                done = [one for one, cookie in export.half_open.items() if self._destroy(one, cookie)]
                self._shell.holds.unhold(done)
            except OSError:
                _log.exception("handshakes that a listener leaves behind stay held for %g s", _HALF_OPEN_S)

    def _ship_held(self, importer: HostId, pairs: list[tuple[Route, Export]]) -> None:
        """What the peer has sent meanwhile goes to the copy, on the stream and so before CONFIRM."""
        migrations = {export.facts.tuple: route.migration for route, export in pairs if export.facts.tuple}
        kept = self._shell.held.take(list(migrations))
        if kept:
            self._shell.send_held(importer, pack({migrations[one]: packets for one, packets in kept.items()}))

    def _send_away(
        self, routes: Sequence[Route], exports: list[Export], results: list[Refusal | None]
    ) -> None:
        pairs = [(route.place.mode, index) for index, route in enumerate(routes) if outbound(route)]
        for mode, indices in by_mode(pairs).items():
            connections = [one for index in indices if (one := outbound(routes[index]))]
            try:
                self._shell.redirects[mode].send_away(connections)
            except Exception as error:
                refusal = Refusal(Code.REDIRECT, f"The {mode} redirect could not be set up: {error}.")
                for index in indices:
                    results[index] = refusal
        self._miss_listeners(routes, exports, results)

    def _miss_listeners(
        self, routes: Sequence[Route], exports: list[Export], results: list[Refusal | None]
    ) -> None:
        """Who connects to a listener that has left is not refused, nor who is just about to.

        A handshake that is half done when its listener closes cannot be carried, and the kernel would answer
        its end by a RST. No new one has begun since the freeze.
        """
        listeners = [index for index, route in enumerate(routes) if route.kind is Kind.LISTENING]
        if not listeners:
            return
        try:
            self._redirecting.miss_routes(routes[index] for index in listeners)
            for index in listeners:
                local = routes[index].local
                exports[index].half_open = half_open([local]) if local else {}
                self._shell.holds.hold(list(exports[index].half_open), _HALF_OPEN_S)
        except OSError as error:
            refusal = Refusal(Code.REDIRECT, f"New connections to it could not be held: {error}.")
            for index in listeners:
                results[index] = refusal

    def _take_back(
        self,
        routes: Sequence[Route],
        exports: list[Export],
        results: list[Refusal | None],
        *,
        undone: set[int],
    ) -> None:
        """The inverse of ``_send_away``, and thaw, for every refused one that is not yet ``undone``."""
        failed = [i for i, result in enumerate(results) if result is not None and i not in undone]
        if not failed:
            return
        listeners = [route.local for i in failed if (route := routes[i]).kind is Kind.LISTENING]
        if listeners:
            self._redirecting.look_for_listeners(local for local in listeners if local is not None)
        pairs = [(routes[index].place.mode, index) for index in failed]
        for mode, indices in by_mode(pairs).items():
            tuples = [one.tuple for index in indices if (one := outbound(routes[index]))]
            holdings = [held for index in indices if (held := self._holding_of(exports[index].facts))]
            try:
                # What had been imported needs its own translation again: nothing passes before.
                self._hold([exports[index] for index in indices], _HOLD_MARGIN_S)
                self._shell.redirects[mode].take_back(tuples)
                self._redirecting.admit(holdings)
            except Exception:
                # What could not be led away (all or nothing) is not led away: it just goes on here.
                if any(why_not.code is not Code.REDIRECT for index in indices if (why_not := results[index])):
                    raise
                _log.exception("the redirect %s is broken; restart this daemon to renew its rules", mode)
        self._undo([exports[index] for index in failed])

    def _journal_commit(
        self,
        action: Commit,
        exports: list[Export],
        going: list[int],
        *,
        undone: Sequence[Export] = (),
        queues: Sequence[Queue] = (),
    ) -> None:
        """The point of no return: one transaction."""
        if not going and not undone:
            return
        positions = {migration: n for n, migration in enumerate(action.decision.migrations)}
        committed = tuple(sorted(positions[action.routes[index].migration] for index in going))
        decision = Decision(
            action.decision.chunk, action.decision.importer, action.decision.migrations, committed
        )
        chosen = {action.routes[index].connection for index in going}
        change = Change()
        dropped = [route for route in action.routes if route.connection not in chosen]
        if undone:
            durable.drop(change, dropped)
            durable.drop(change, [one for one in action.notices if one.connection not in chosen])
        if going:
            durable.keep(change, [decision])
            durable.keep(change, [r for index in going if (r := action.routes[index]).durable])
            durable.keep(change, [one for one in action.notices if one.connection in chosen])
            originals = [self._original(exports[index].facts, action.routes[index]) for index in going]
            change.keep.append((Record.ORIGINALS, str(action.decision.chunk), originals))
            change.drop.extend((Record.HOLDING, connection.hex()) for connection in chosen)
        else:
            durable.drop(change, [decision])
            change.drop.append((Record.ORIGINALS, str(action.decision.chunk)))
        for export in undone:
            holding = self._holding_of(export.facts)
            durable.keep(change, [holding] if holding else [])
        importer = self._shell.name_of(action.decision.importer)
        for index in going:
            route = action.routes[index]
            mode = plain(route.place.mode) if route.place.mode else None
            news = {"step": "committed", "to": importer, "mode": mode, "hop": route.hop}
            audit(change, route.migration, "export", **news)
        for queue in queues:
            self.queues.keep(change, queue)
        self._shell.journal.write(change)

    def _original(self, facts: SocketFacts, route: Route) -> list[Any]:
        """What a restart must know of a socket that is about to be closed (recovery.py)."""
        holding = self._holding_of(facts)
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
                holding,
            )
        )

    def _drop_holdings(self, routes: Sequence[Route], going: list[int]) -> None:
        """What had been imported here and left again is held here no more.

        Its translation needs no removing: the redirect that leads it away has replaced it.
        """
        for index in going:
            self._redirecting.drop_holding(routes[index].connection)

    # -- listeners' queues

    def _open_queues(
        self, action: Commit, exports: list[Export], results: list[Refusal | None]
    ) -> dict[int, Queue]:
        """Keepers for the listeners that have a queue, by index; nothing is taken yet."""
        queues: dict[int, Queue] = {}
        for index, export in enumerate(exports):
            if (
                results[index] is None
                and export.facts.kind is Kind.LISTENING
                and queue_length(export.selected.descriptor)
            ):
                try:
                    queues[index] = self._open_queue(action, export)
                except OSError as error:
                    results[index] = Refusal(
                        Code.INTERNAL, f"Its queue cannot be kept ({error}); close something, and try again."
                    )
        return queues

    def _open_queue(self, action: Commit, export: Export) -> Queue:
        return self.queues.open(export.selected.descriptor, export.migration, action.decision.importer)

    def _insist(self, action: Commit, index: int, export: Export, queues: dict[int, Queue]) -> Refusal | None:
        """Close a listener in whose queue something came late; what is taken out of it cannot go back."""
        descriptor, refusal = export.selected.descriptor, None
        for _turn in range(_LATE_MAX):
            queue = queues.get(index)
            if queue is None:
                try:
                    queue = queues[index] = self._open_queue(action, export)
                except OSError as error:
                    return Refusal(Code.INTERNAL, f"Its queue cannot be kept ({error}); try again.")
                change = Change()
                self.queues.keep(change, queue)
                self._shell.journal.write(change)
            self.queues.take(queue)
            (refusal,) = self._shell.engine.release([descriptor], [export.image])
            if refusal is None or not queue.kept:
                return refusal
        _log.error("%s: its queue was taken, and it still does not close: %s", export.facts.local, refusal)
        return None

    def _begin_to_follow(self, queue: Queue, listener: Export, *, moved: bool) -> None:
        if not moved:
            self.queues.end(queue)
            return
        self.queues.listener_gone(queue)
        queue.parent = self._batches.get(UUID(listener.record["batch_id"]).bytes)
        self.queues.follow(queue)

    def _follow(self, queue: Queue, descriptors: list[int]) -> None:
        """What waited in the queue of a listener follows it."""
        shell = self._shell
        parent, queue.parent = queue.parent, None
        batch_id = uuid4().bytes
        items = []
        for descriptor, facts in zip(descriptors, shell.engine.inspect(descriptors), strict=True):
            child = self._register(Selected(descriptor, None, None), facts, batch_id)
            child.listener = queue.listener
            child.record["listener"] = str(UUID(bytes=queue.listener))
            self._by_inode[facts.inode] = child
            items.append(self._item(child))
            if parent:
                parent.records.append(child.record)
        self._journal_start([item.handle.record for item in items if isinstance(item.handle, Export)])
        if parent:
            parent.open_batches += 1
            self._batches[batch_id] = parent
        self._following[batch_id] = queue
        modes = shell.config.redirect.modes
        timeout_s = shell.config.timing.negotiation_timeout_s
        shell.dispatch(ChildrenFound(batch_id, queue.importer, tuple(items), modes, timeout_s))

    # -- outcomes

    def report(self, action: Report) -> None:
        """The core's news of migrations."""
        change = Change()
        batch = self._batches.get(action.batch)
        for result in action.results:
            export = self.exports.get(result.migration)
            if export is None:
                self._report_after_restart(change, result)
            elif result.outcome is Outcome.COMMITTED:
                export.record["step"] = "committed"
            else:
                self._finish(change, export, result, batch)
        if change.audit:
            self._shell.note(change)
        self._account()

    def _finish(self, change: Change, export: Export, result: Result, batch: Batch | None) -> None:
        record = export.record
        if result.importer is not None:
            record["to"] = self._shell.name_of(result.importer)
        if result.place is not None:
            record["mode"] = plain(result.place.mode) if result.place.mode else None
        if result.fidelity is not None:
            _merge_fidelity(record, result.fidelity)
        if export.image:
            received, sent, unsent = queue_bytes(export.image)
            record.update(receive_queue_bytes=received, sent_bytes=sent, unsent_bytes=unsent)
            self._shipped_bytes += len(export.image)
        if result.outcome is Outcome.ACTIVE:
            record["step"] = "active"
            record["blackout_us"] = microseconds_since(export.frozen_at)
            self._shell.metrics.freeze.observe(record["blackout_us"] / 1e6)
            self._end(export, batch, "moved", None)
        elif result.outcome is Outcome.PLANNED:
            self._end(export, batch, "planned", None)
        elif result.outcome is Outcome.LOST:
            self._end(export, batch, "failed", result.refusal)
        else:
            self._end(export, batch, "aborted" if export.frozen_at else "refused", result.refusal)
        news = {name: record[name] for name in _NEWS if name in record}
        change.audit.append((UUID(bytes=result.migration), "export", news))

    def _report_after_restart(self, change: Change, result: Result) -> None:
        """A migration that an earlier run of this daemon had committed."""
        if result.outcome is Outcome.ACTIVE:
            audit(change, result.migration, "export", step="active", outcome="moved", ended_at=now_text())
            self._outcomes["moved"] += 1
        elif result.outcome is Outcome.LOST:
            refusal = why(result.refusal) if result.refusal else None
            audit(change, result.migration, "export", outcome="failed", refusal=refusal, ended_at=now_text())
            self._outcomes["failed"] += 1

    def _end(self, export: Export, batch: Batch | None, outcome: str, refusal: Refusal | None) -> None:
        record = export.record
        record["outcome"] = outcome
        record["ended_at"] = now_text()
        if refusal is not None:
            record["refusal"] = why(refusal)
        self._count(record)
        migration = export.migration
        if self.exports.get(migration) is export:
            del self.exports[migration]
            if self._by_inode.get(export.facts.inode) is export:  # else another one's is under way
                del self._by_inode[export.facts.inode]
        os.close(export.selected.descriptor)
        export.image = b""
        if batch is not None and batch.progress is not None:
            _tell(batch.progress, record)

    def _count(self, record: dict[str, Any]) -> None:
        """For the metrics and the log, which are written when there is time."""
        self._outcomes[record["outcome"]] += 1
        if refusal := record.get("refusal"):
            self._refusals[refusal["code"]] += 1
        self._shell.moves.append(record)

    def _account(self) -> None:
        """What has ended since the last time goes into the metrics, all at once."""
        metrics = self._shell.metrics
        for outcome, count in self._outcomes.items():
            metrics.migrations.labels(
                direction="export", outcome=outcome, engine=self._shell.engine.name
            ).inc(count)
        for code, count in self._refusals.items():
            metrics.refusals.labels(code=code).inc(count)
        if self._shipped_bytes:
            metrics.image_bytes.labels(direction="export").inc(self._shipped_bytes)
        self._outcomes.clear()
        self._refusals.clear()
        self._shipped_bytes = 0

    def batch_done(self, batch_id: BatchId) -> None:
        """Every migration of the batch has its outcome."""
        if (queue := self._following.pop(batch_id, None)) is not None:
            self.queues.batch_done(queue)
        batch = self._batches.pop(batch_id, None)
        if batch is None:
            return
        batch.open_batches -= 1
        if batch.open_batches == 0:
            _tell(batch.done, batch.records)

    def forget_decision(self, chunk: ChunkId) -> None:
        """The importer is ACTIVE: nothing of the decision is needed any more."""
        reached("decision.forgetting")
        change = Change(drop=[(Record.DECISION, str(chunk)), (Record.ORIGINALS, str(chunk))])
        self._shell.note(change)
        reached("decision.forgotten")


def _started(records: Sequence[dict[str, Any]]) -> Change:
    return Change(audit=[(UUID(record["migration_id"]), "export", record) for record in records])


def _unwritable(error: Exception) -> Refusal:
    return Refusal(Code.INTERNAL, f"The journal cannot be written ({error}); see sockmi doctor.")


def _woke(export: Export, image: bytes) -> bool:
    """Whether its owner has read something since it was quiet: a request, which it may be answering."""
    if export.selected.received is None:
        return False
    counters = section(image, Section.COUNTERS)
    if len(counters) != Counters.size():
        return True
    return Counters.unpack(counters).bytes_received - peek(image).receive_bytes != export.selected.received


def _size(export: Export) -> int:
    """About how long the image will be, in bytes."""
    queued = export.facts.receive_queue_bytes + export.facts.send_queue_bytes
    return queued + len(export.selected.context or b"") + _IMAGE_OVERHEAD_BYTES


def _size_now(export: Export) -> int:
    """The same, of a connection that has been queueing since it was selected."""
    if export.facts.kind is not Kind.CONNECTED:
        return _size(export)
    queued = 0
    for queue in (termios.FIONREAD, termios.TIOCOUTQ):  # SIOCINQ and SIOCOUTQ, by their other names
        with contextlib.suppress(OSError):  # it has ended meanwhile: the capture will say so
            queued += int.from_bytes(fcntl.ioctl(export.selected.descriptor, queue, bytes(4)), sys.byteorder)
    return queued + len(export.selected.context or b"") + _IMAGE_OVERHEAD_BYTES


def _tell(hearer: Callable[[Any], None], news: Any) -> None:
    """What became of migrations is so, whether or not it can be told."""
    try:
        hearer(news)
    except Exception:
        _log.exception("the outcome of an export could not be told to whoever asked for it")


def _merge_fidelity(record: dict[str, Any], fidelity: Any) -> None:
    """What either engine had to approximate or reset is no longer carried."""
    mine = record.get("fidelity") or {"carried": [], "approximated": [], "reset": []}
    names = "carried", "approximated", "reset"
    merged = _merged(*(tuple(mine[name]) + tuple(getattr(fidelity, name)) for name in names))
    record["fidelity"] = {name: list(one) for name, one in zip(names, merged, strict=True)}


@functools.lru_cache(maxsize=256)
def _merged(
    carried: tuple[str, ...], approximated: tuple[str, ...], reset: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The worst that is said of each; connections of one kind have the same."""
    parts = {*carried} - {*approximated, *reset}, {*approximated} - {*reset}, {*reset}
    said, less, least = (tuple(sorted(one)) for one in parts)
    return said, less, least
