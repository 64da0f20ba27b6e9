# SPDX-License-Identifier: MIT
"""What a listener leaves behind when it moves: who is just connecting to it, and what waits in its queue.

A handshake that is half done when its listener closes cannot be carried, and the kernel would answer its
end by a RST: it is held. What no application has accepted is kept, and follows (queues.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from uuid import UUID, uuid4

from sockmi.addresses import FourTuple
from sockmi.engine.base import Kind
from sockmi.engine.listing import half_open
from sockmi.exporting.batches import Batches
from sockmi.exporting.descriptors import close_ours
from sockmi.exporting.export import Export, Selected
from sockmi.exporting.exports import Exports
from sockmi.exporting.items import item_of
from sockmi.journal import Change
from sockmi.protocol.events import ChildrenFound
from sockmi.protocol.records import BatchId, HostId, Route
from sockmi.queues import Queue, Queues, queue_length
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

# A handshake that nobody completes is given up after about a minute (net.ipv4.tcp_synack_retries).
_HALF_OPEN_S = 70.0
_LATE_MAX = 16  # how often a listener that is being closed is looked at for what came late


class Listeners:
    """Owns the queues that follow, and which batch of the core is which of them."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        exports: Exports,
        batches: Batches,
        destroy: Callable[[FourTuple, int], bool],
    ) -> None:
        """``destroy`` ends a socket of this kernel, whoever has it; False if this kernel cannot."""
        self._shell = shell
        self._redirecting = redirecting
        self._exports = exports
        self._batches = batches
        self._destroy = destroy
        self.queues = Queues(shell, self._follow)
        self._following: dict[BatchId, Queue] = {}

    # -- who connects

    def hold_new(
        self, routes: Sequence[Route], exports: Sequence[Export], results: list[Refusal | None]
    ) -> None:
        """Who connects to a listener that leaves is not refused, nor who is just about to.

        No new handshake has begun since the freeze.
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

    def let_new_come(self, routes: Iterable[Route]) -> None:
        """The inverse of ``hold_new``; half open handshakes are the freezer's to let go."""
        listeners = [route.local for route in routes if route.kind is Kind.LISTENING]
        if listeners:
            self._redirecting.look_for_listeners(local for local in listeners if local is not None)

    def end_half_open(self, exports: Iterable[Export]) -> None:
        """Without a listener the kernel just forgets these handshakes; where it cannot, they stay held."""
        for export in (one for one in exports if one.half_open):
            try:
                done = [one for one, cookie in export.half_open.items() if self._destroy(one, cookie)]
                self._shell.holds.unhold(done)
            except OSError:
                _log.exception("handshakes that a listener leaves behind stay held for %g s", _HALF_OPEN_S)

    # -- what waits in the queue

    def open_queues(
        self, importer: HostId, exports: Sequence[Export], results: list[Refusal | None]
    ) -> dict[int, Queue]:
        """Keepers for the listeners that have a queue, by index; nothing is taken yet."""
        queues: dict[int, Queue] = {}
        for index, export in enumerate(exports):
            if (
                results[index] is None
                and export.facts.kind is Kind.LISTENING
                and not export.selected.copy
                and queue_length(export.selected.descriptor)
            ):
                try:
                    queues[index] = self._open_queue(importer, export)
                except OSError as error:
                    results[index] = Refusal(
                        Code.INTERNAL, f"Its queue cannot be kept ({error}); close something, and try again."
                    )
        return queues

    def end_queues(self, queues: dict[int, Queue]) -> None:
        """The inverse of ``open_queues``."""
        for index in list(queues):
            self.queues.end(queues.pop(index))

    def _open_queue(self, importer: HostId, export: Export) -> Queue:
        return self.queues.open(export.selected.descriptor, export.migration, importer)

    def take_queues(self, queues: Mapping[int, Queue]) -> None:
        """From here there is only forward: the journal has it."""
        for queue in queues.values():
            self.queues.take(queue)

    def insist(
        self, importer: HostId, index: int, export: Export, queues: dict[int, Queue]
    ) -> Refusal | None:
        """Close a listener in whose queue something came late; what is taken out of it cannot go back."""
        descriptor, refusal = export.selected.descriptor, None
        for _turn in range(_LATE_MAX):
            queue = queues.get(index)
            if queue is None:
                try:
                    queue = queues[index] = self._open_queue(importer, export)
                except OSError as error:
                    return Refusal(Code.INTERNAL, f"Its queue cannot be kept ({error}); try again.")
                change = Change()
                self.queues.keep(change, queue)
                self._shell.journal.write(change)
            self.queues.take(queue)
            (refusal,) = self._shell.engine.release([descriptor], [export.image], owned=not queue.kept)
            if refusal is None or not queue.kept:
                return refusal
        _log.error("%s: its queue was taken, and it still does not close: %s", export.facts.local, refusal)
        return None

    # -- it follows

    def begin_to_follow(self, queue: Queue, listener: Export, *, moved: bool) -> None:
        """The listener is closed; or it is not, and nothing of its queue was taken."""
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
        children, items = [], []
        for descriptor, facts in zip(descriptors, shell.engine.inspect(descriptors), strict=True):
            child = self._exports.register(Selected(descriptor, None, None), facts, batch_id)
            child.listener = queue.listener
            child.record["listener"] = str(UUID(bytes=queue.listener))
            self._exports.claim(child)
            close_ours([child])  # the keeper has it
            items.append(item_of(child, shell, self._redirecting))
            children.append(child.record)
        if parent:
            parent.records += children
        self._exports.journal_start(children)
        if parent:
            self._batches.open(batch_id, parent)
        self._following[batch_id] = queue
        modes = shell.config.redirect.modes
        timeout_s = shell.config.timing.negotiation_timeout_s
        shell.dispatch(ChildrenFound(batch_id, queue.importer, tuple(items), modes, timeout_s))

    def batch_done(self, batch_id: BatchId) -> None:
        """What has followed, or has not: if it was a queue."""
        if (queue := self._following.pop(batch_id, None)) is not None:
            self.queues.batch_done(queue)
