# SPDX-License-Identifier: MIT
"""Queues of listeners that move: connections that no application has accepted, until they have followed.

They are accepted only when the listener's COMMIT is journalled, and not by the daemon: by a keeper
(engine/keeper.py). From then on there is only forward: the listener is closed, if need be by the next
daemon, and its queue follows it, again and again until the importer has taken all that has not ended.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sockmi.crashpoints import reached
from sockmi.durable import Original
from sockmi.engine.base import Kind
from sockmi.engine.closing import close_all
from sockmi.engine.keeper import Keeper
from sockmi.journal import Change, Record
from sockmi.protocol.records import HostId, MigrationId
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

_AGAIN_S = 0.5
_AGAIN_MAX_S = 15.0
_STOP_TIMEOUT_S = 0.5
_HOLD_S = 2.0
_TCP_INFO_BYTES, _TCPI_UNACKED = 104, 24  # of a listener: the length of its queue
_ENDED = frozenset({"CLOSED", "TIME-WAIT"})


@dataclass(eq=False, slots=True)
class Queue:
    """What a keeper has taken, or will take, out of one listener's queue.

    ``parent``: who waits for the outcome of the first attempt; the exporter's own.
    """

    listener: MigrationId
    importer: HostId
    keeper: Keeper
    kept: int = 0
    attempt: int = 0
    parent: Any = None

    @property
    def name(self) -> str:
        """Under which the journal has it."""
        return f"{self.listener.hex()}/{self.keeper.pid}"


class Queues:
    """See the module docstring."""

    def __init__(self, shell: Shell, follow: Callable[[Queue, list[int]], None]) -> None:
        """``follow`` exports connections to a queue's importer; `batch_done` comes when that has ended."""
        self._shell = shell
        self._follow = follow
        self._left_behind: dict[MigrationId, list[Queue]] = {}

    # -- while the listener commits

    def open(self, descriptor: int, listener: MigrationId, importer: HostId) -> Queue:
        """A keeper for a listener; OSError if there can be none. It has taken nothing yet."""
        return Queue(listener, importer, Keeper.start(descriptor))

    def keep(self, change: Change, queue: Queue) -> None:
        """Add a queue to a transaction; it must be written before anything is taken."""
        content = [queue.keeper.pid, queue.keeper.start_time, queue.listener.hex(), queue.importer.hex()]
        change.keep.append((Record.QUEUE, queue.name, content))

    def take(self, queue: Queue) -> None:
        """Take all that waits; its owner is stopped."""
        try:
            queue.kept = queue.keeper.take()
        except OSError as error:
            descriptors = self._waiting(queue)
            queue.kept = len(descriptors)
            close_all(descriptors)
            _log.error("taking a listener's queue: %s; %d connections are kept", error, queue.kept)

    def listener_gone(self, queue: Queue) -> None:
        """The listener is closed, and its queue need no longer be looked at."""
        queue.keeper.let_listener_go()

    def end(self, queue: Queue) -> None:
        """Nothing is kept, or nothing that has not ended."""
        queue.keeper.end()
        reached("queue.ended")
        self._shell.note(Change(drop=[(Record.QUEUE, queue.name)]))

    # -- until all have followed

    def follow(self, queue: Queue) -> None:
        """Export what has not ended; if there is nothing left, the keeper has done its work."""
        descriptors = self._waiting(queue)
        if descriptors:
            self._follow(queue, descriptors)
        else:
            self.end(queue)

    def batch_done(self, queue: Queue) -> None:
        """What has not moved is tried again, more and more seldom."""
        descriptors = self._waiting(queue)
        close_all(descriptors)
        if not descriptors:
            self.end(queue)
            return
        if len(descriptors) < queue.kept:
            queue.attempt = 0
        queue.kept = len(descriptors)
        delay_s = min(_AGAIN_S * (1 << min(queue.attempt, 10)), _AGAIN_MAX_S)
        queue.attempt += 1
        self._shell.loop.call_later(delay_s, self.follow, queue)

    def _waiting(self, queue: Queue) -> list[int]:
        """Duplicates of the connections that it keeps."""
        descriptors = queue.keeper.sockets()
        waiting, ended = [], []
        for descriptor, facts in zip(descriptors, self._shell.engine.inspect(descriptors), strict=True):
            if facts.kind is Kind.CONNECTED and facts.state not in _ENDED:
                waiting.append(descriptor)
            else:
                ended.append(descriptor)
        close_all(ended)
        return waiting

    # -- after a restart

    def remember(self) -> None:
        """What an earlier daemon has left; one whose keeper has gone is lost, and so are its connections."""
        for name, content in self._shell.journal.records(Record.QUEUE).items():
            queue = _read(content)
            if queue.keeper.alive:
                descriptors = self._waiting(queue)
                queue.kept = len(descriptors)
                close_all(descriptors)
                self._left_behind.setdefault(queue.listener, []).append(queue)
            else:
                self._shell.note(Change(drop=[(Record.QUEUE, name)]))

    def close_listener(self, original: Original, descriptor: int) -> bool:
        """Close a listener that the daemon before had begun to take the queue of; False if it had not."""
        queues = self._left_behind.get(original.migration, [])
        if not any(queue.kept for queue in queues):
            return False
        shell = self._shell
        if original.local is not None:
            shell.holds.hold_listeners([original.local], _HOLD_S)
        (refusal,) = shell.engine.stop([original.inode], [], _STOP_TIMEOUT_S)
        if refusal is not None:
            _log.warning("closing a listener whose owner runs: %s", refusal)
        queue = self.open(descriptor, original.migration, queues[0].importer)
        change = Change()
        self.keep(change, queue)
        shell.journal.write(change)
        reached("queue.closing")
        self.take(queue)
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            listener.shutdown(socket.SHUT_RDWR)
        self.listener_gone(queue)
        queues.append(queue)
        shell.engine.resume([original.inode])
        return True

    def resume(self) -> None:
        """Go on with what an earlier daemon has left."""
        for queues in self._left_behind.values():
            for queue in queues:
                self.batch_done(queue)
        self._left_behind.clear()


def queue_length(listener: int) -> int:
    """How many connections wait to be accepted."""
    with socket.socket(fileno=os.dup(listener)) as each:
        information = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    (length,) = struct.unpack_from("=I", information, _TCPI_UNACKED)
    return int(length)


def _read(content: list[Any]) -> Queue:
    pid, start_time, listener, importer = content
    return Queue(bytes.fromhex(listener), bytes.fromhex(importer), Keeper(pid, start_time))
