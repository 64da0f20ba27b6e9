# SPDX-License-Identifier: MIT
"""How many more sockets may come to this host, as the core offers it and the metrics show it."""

from __future__ import annotations

import functools
import logging

from sockmi.config import ImportConfig
from sockmi.engine.base import Kind
from sockmi.import_lists import ImportLists
from sockmi.protocol.context import Capacity
from sockmi.protocol.records import Counts
from sockmi.shell import Shell

_log = logging.getLogger(__name__)


class Room:
    """Keeps what the core may offer in step with the import lists."""

    def __init__(self, shell: Shell, lists: ImportLists, capacity: Capacity) -> None:
        self._shell = shell
        self._lists = lists
        self._capacity = capacity
        for kind in Kind:
            shell.metrics.import_list.labels(kind=kind).set_function(functools.partial(self._length, kind))
        shell.metrics.waiting.set_function(lists.waiting)
        self.set_maxima(shell.config.imports)

    def _length(self, kind: Kind) -> int:
        return self._lists.counts()[kind]

    def set_maxima(self, limits: ImportConfig) -> None:
        """The lists' maxima; what is listed already stays."""
        if limits.deliver and self._shell.engine.name != "kernel":
            _log.warning("imports.deliver needs the kernel module; load it (modprobe sockmi), and restart")
        self._lists.maxima = {
            Kind.BOUND: limits.max_bound,
            Kind.LISTENING: limits.max_listening,
            Kind.CONNECTED: limits.max_connected,
        }
        self.update()

    def update(self) -> None:
        """The lists have changed, or who waits for them."""
        lists, limits = self._lists, self._shell.config.imports
        rooms = {kind: lists.room(kind) for kind in Kind}
        waiting = {kind: lists.waiting_for(kind) for kind in Kind}
        if not limits.queue_without_waiting:
            anyone = {Kind.CONNECTED} if limits.deliver else set()
            rooms = {
                kind: rooms[kind] if kind in anyone else min(rooms[kind], waiting[kind]) for kind in Kind
            }
        order = (Kind.BOUND, Kind.LISTENING, Kind.CONNECTED)
        self._capacity.rooms = Counts(*(rooms[kind] for kind in order))
        self._capacity.waiting = Counts(*(waiting[kind] for kind in order))
        maximum = max(1, sum(lists.maxima.values()))
        # More may wait than the maxima allow, since they were lowered.
        self._capacity.load = min(1000, 1000 * sum(lists.counts().values()) // maximum)
