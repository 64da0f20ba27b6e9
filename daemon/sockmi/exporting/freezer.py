# SPDX-License-Identifier: MIT
"""Freezes the sockets of a chunk, or lets them go on as if nothing had happened.

Order matters: owners stop before packets are held, both before anything is read; and the other way
round, holds are lifted first, as a resumed owner's packets must not be dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from sockmi.addresses import Endpoint, FourTuple
from sockmi.crashpoints import reached
from sockmi.engine.base import Captured, Kind
from sockmi.engine.listing import half_open
from sockmi.engine.preflight import queued_at_most
from sockmi.exporting.descriptors import Descriptors, close_ours
from sockmi.exporting.export import Export, copies, owned
from sockmi.exporting.exports import Exports
from sockmi.exporting.reachability import Reachability
from sockmi.image import Section
from sockmi.image.native import stamp, with_section
from sockmi.image.sections import Place as ImagePlace
from sockmi.importing.onward import Onward
from sockmi.protocol.actions import Freeze, Thaw
from sockmi.protocol.events import FreezeDone
from sockmi.protocol.records import IMAGE_BYTES_MAX, Item
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, by_mode

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_MAX_S = 0.5
# The kernel's hold outlasts the freeze by this much; a commit that comes later than half of it is undone.
_HOLD_MARGIN_S = 1.0
_FROZEN_STEPS = frozenset({"frozen", "prepared"})
_HANDSHAKE_LOOKS_S = 0.01
_AWAKE = Refusal(Code.CHANGED, "A request has come since it was quiet; it stays, try again when it is idle.")


class Freezer:
    """Owns the holds of exports, and which of their owners are stopped.

    What waits in an import list (`Onward`) has no owner, and is held already: it is only lent.
    """

    def __init__(
        self,
        shell: Shell,
        exports: Exports,
        descriptors: Descriptors,
        onward: Onward,
        reachability: Reachability,
    ) -> None:
        self._shell = shell
        self._exports = exports
        self._descriptors = descriptors
        self._onward = onward
        self._reachability = reachability
        self._to_resume: list[Export] = []

    def freeze(self, action: Freeze) -> None:
        """Stop the owners, hold the packets, capture; whatever goes wrong is undone and answered.

        Who is just connecting to a listener gets half of the time to end the handshake: it cannot be carried,
        but the connection that comes of it can. Whoever comes later is held, and tries again.
        """
        self._resume_released()
        exports = [self._exports[item.migration] for item in action.items]
        listeners = _listening_at(owned(exports))
        if listeners and self._hold_new(listeners, action.deadline_s + _HOLD_MARGIN_S):
            self._when_connected(action, exports, listeners, time.monotonic() + action.deadline_s / 2)
        else:
            self._freeze_now(action, exports)

    def _when_connected(
        self, action: Freeze, exports: list[Export], listeners: list[Endpoint], until: float
    ) -> None:
        """Freeze as soon as no handshake with a listener is half done, or it is ``until``."""
        if time.monotonic() < until and _connecting(listeners):
            self._shell.loop.call_later(
                _HANDSHAKE_LOOKS_S, self._when_connected, action, exports, listeners, until
            )
        else:
            self._freeze_now(action, exports)

    def _freeze_now(self, action: Freeze, exports: list[Export]) -> None:
        try:
            results = self._freeze(action, exports)
        except Exception as error:
            _log.exception("freezing %s", action.chunk)
            self.undo(exports)
            refusal = Refusal(
                Code.INTERNAL, f"The freeze failed ({error}); the daemon's log has the details."
            )
            results = [refusal] * len(exports)
        refused = [one for one, result in zip(exports, results, strict=True) if isinstance(result, Refusal)]
        if listeners := _listening_at(owned(refused)):
            self._let_new_come(listeners)
        # A socket that nobody has but us ends here, as it would have when its owner closed it.
        self._let_go(refused)
        self._descriptors.name_passed_on(exports, results)
        self._shell.dispatch(FreezeDone(action.chunk, tuple(results)))

    def thaw(self, action: Thaw) -> None:
        """The inverse of ``freeze``."""
        self.undo([self._exports[migration] for migration in action.migrations])

    def undo(self, exports: Sequence[Export]) -> None:
        """Lift the holds, let the owners run."""
        try:
            self._unhold(exports)
        except Exception:  # then the kernel lifts them, when their time is over
            _log.exception("holds could not be lifted; they end by themselves")
        reached("thaw.unheld")
        self._resume(exports)
        self._let_go(exports)

    def _let_go(self, exports: Sequence[Export]) -> None:
        close_ours(exports)
        self._onward.give_back(copies(exports))

    def _freeze(self, action: Freeze, exports: list[Export]) -> list[bytes | Refusal]:
        results = self._look(action, exports)
        frozen_at = time.monotonic()
        for export, result in zip(exports, results, strict=True):
            if isinstance(result, bytes):
                export.frozen_at = frozen_at
                export.record["step"] = "frozen"
        # A busy host takes its time to have a thread stop; the other half is for the rest of the freeze.
        self._stop(exports, results, min(action.deadline_s / 2, _STOP_TIMEOUT_MAX_S))
        self._refuse_foreign(exports, results)
        reached("freeze.stopped")
        frozen = [index for index, result in enumerate(results) if isinstance(result, bytes)]
        self._hold([exports[index] for index in frozen], action.deadline_s + _HOLD_MARGIN_S)
        reached("freeze.held")
        captured = self._capture([exports[index] for index in frozen], action.deadline_s + _HOLD_MARGIN_S)
        shipped = 0
        for index, one in zip(frozen, captured, strict=True):
            outcome: bytes | Refusal
            if isinstance(one, Captured):
                image = _finish_image(exports[index], action.items[index], one)
                outcome = self._too_much(len(image), shipped) or image
            else:
                outcome = one
            results[index] = outcome
            if isinstance(outcome, Refusal):
                self.undo([exports[index]])
            else:
                shipped += len(outcome)
        return results

    def _capture(self, exports: Sequence[Export], thaw_after_s: float) -> list[Captured | Refusal]:
        live = owned(exports)
        captured = self._shell.engine.capture([one.selected.descriptor for one in live], thaw_after_s)
        reached("freeze.captured")
        abandoned = self._descriptors.abandoned(live)
        found = {
            export.migration: closed
            or (_AWAKE if isinstance(one, Captured) and export.woke(one.image) else one)
            for export, one, closed in zip(live, captured, abandoned, strict=True)
        }
        images = self._onward.capture(copies(exports))
        return [
            images[copy] if (copy := export.selected.copy) else found[export.migration] for export in exports
        ]

    # -- before anything is stopped

    def _take(self, exports: Sequence[Export]) -> list[Refusal | None]:
        """Descriptors of what somebody has; the others out of the import lists."""
        taken = iter(self._descriptors.take(owned(exports)))
        return [
            self._onward.lend(copy) if (copy := export.selected.copy) else next(taken) for export in exports
        ]

    def _look(self, action: Freeze, exports: list[Export]) -> list[bytes | Refusal]:
        """What has come against it since it was asked for; empty bytes: nothing."""
        results: list[bytes | Refusal] = [refusal or b"" for refusal in self._take(exports)]
        self._refuse_foreign(exports, results)
        apart = self._shell.peers.obstacles(
            [(export.facts.tuple, place) for export, place in zip(exports, action.places, strict=True)]
        )
        queued = queued_at_most([export.selected.descriptor for export in exports])
        for index, place in enumerate(action.places):
            if isinstance(results[index], Refusal):
                continue
            if obstacle := apart[index] or self._reachability.obstacle(place):
                results[index] = Refusal(Code.NO_REDIRECT, obstacle)
            elif too_much := self._grown(exports[index], queued[index]):
                results[index] = too_much
        for mode, indices in by_mode(
            (place.mode, index) for index, place in enumerate(action.places)
        ).items():
            leaving = [connection for index in indices if (connection := exports[index].facts.tuple)]
            if obstacle := self._shell.redirects[mode].obstacle(leaving):
                refusal = Refusal(Code.REDIRECT, f"The {mode} redirect cannot be set up: {obstacle}.")
                results = [refusal if index in indices else result for index, result in enumerate(results)]
        return results

    def _grown(self, export: Export, at_most: int) -> Refusal | None:
        """Why its image will be too large by now; what is queued at it is asked without its lock."""
        if export.facts.tuple is not None and self._too_much(export.size_now_bytes(at_most), 0):
            found = self._descriptors.find(export.facts.tuple)
            at_most = found.queued if found is not None else 0  # it has ended: the capture will say so
        return self._too_much(export.size_now_bytes(at_most), 0)

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

    # -- owners

    def _refuse_foreign(self, exports: list[Export], results: list[bytes | Refusal]) -> None:
        """What somebody else has got hold of meanwhile is not its caller's to move; its owners run again."""
        for index, export in enumerate(exports):
            caller = export.selected.caller
            if caller is None or isinstance(results[index], Refusal):
                continue
            refusal = caller.obstacle(self._shell.engine.owners.holders(export.facts.inode))
            if refusal is not None:
                results[index] = refusal
                self._resume([export])

    def _stop(self, exports: list[Export], results: list[bytes | Refusal], timeout_s: float) -> None:
        going = [
            index
            for index, result in enumerate(results)
            if isinstance(result, bytes) and not exports[index].selected.copy
        ]
        pids = sorted({pid for index in going for pid in exports[index].holders})
        inodes = [exports[index].facts.inode for index in going]
        for index, refusal in zip(going, self._shell.engine.stop(inodes, pids, timeout_s), strict=True):
            if refusal is None:
                exports[index].stopped = True
            else:
                results[index] = refusal

    def _resume(self, exports: Sequence[Export]) -> None:
        stopped = [export for export in exports if export.stopped]
        self._shell.engine.resume([export.facts.inode for export in stopped])
        for export in stopped:
            export.stopped = False

    def resume_soon(self, exports: Sequence[Export]) -> None:
        """Their sockets are closed; the importer need not wait until the owners run, the next freeze does."""
        self._to_resume += exports
        self._shell.loop.call_later(0, self._resume_released)

    def _resume_released(self) -> None:
        exports, self._to_resume = self._to_resume, []
        self._resume(exports)

    # -- packets

    def _hold(self, exports: Sequence[Export], timeout_s: float) -> None:
        exports = owned(exports)  # the others are held since they came
        tuples = [export.facts.tuple for export in exports if export.facts.tuple]
        if tuples:
            self._shell.held.want(tuples)
            self._shell.holds.hold(tuples, timeout_s)
        if listeners := _listening_at(exports):
            self._shell.holds.hold_listeners(listeners, timeout_s)

    def _unhold(self, exports: Sequence[Export]) -> None:
        exports = owned(exports)
        connections = {one.facts.tuple: one.selected.descriptor for one in exports if one.facts.tuple}
        if connections:
            self._shell.holds.unhold(list(connections))
            self._shell.held.deliver(self._shell.held.take(list(connections)), connections)
        if listeners := _listening_at(exports):
            self._shell.holds.unhold_listeners(listeners)
            self._shell.holds.unhold([one for export in exports for one in export.half_open])

    def _hold_new(self, listeners: list[Endpoint], timeout_s: float) -> bool:
        try:
            self._shell.holds.hold_listeners(listeners, timeout_s)
        except OSError:  # the freeze will find the same, and say so
            _log.exception("new connections to %s cannot be held", listeners)
            return False
        return True

    def _let_new_come(self, listeners: list[Endpoint]) -> None:
        """The inverse of ``_hold_new``."""
        try:
            self._shell.holds.unhold_listeners(listeners)
        except OSError:
            _log.exception("new connections to %s are held until that ends by itself", listeners)

    def hold_again(self, exports: Sequence[Export]) -> None:
        """While redirects are taken back; ``undo`` lifts it."""
        self._hold(exports, _HOLD_MARGIN_S)
        self._onward.hold_again(copies(exports))

    def hold_frozen(self) -> list[FourTuple]:
        """What is frozen is held, for as long as a freeze may last, whatever the kernel has of that."""
        # What has thawed, to be tried again, runs.
        frozen = [
            one for one in self._exports.under_way() if one.stopped and one.record["step"] in _FROZEN_STEPS
        ]
        self._hold(frozen, self._shell.config.timing.freeze_deadline_s + _HOLD_MARGIN_S)
        return [one.facts.tuple for one in owned(frozen) if one.facts.tuple]

    def earliest_safe(self) -> float:
        """What was frozen before this (time.monotonic()) is not committed: its hold may end meanwhile."""
        return time.monotonic() - self._shell.config.timing.freeze_deadline_s - _HOLD_MARGIN_S / 2


def _connecting(listeners: list[Endpoint]) -> bool:
    try:
        return bool(half_open(listeners))
    except OSError:
        _log.exception("who is connecting to %s cannot be listed", listeners)
        return False


def _listening_at(exports: Sequence[Export]) -> list[Endpoint]:
    return [one.facts.local for one in exports if one.facts.kind is Kind.LISTENING and one.facts.local]


def _finish_image(export: Export, item: Item, captured: Captured) -> bytes:
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
