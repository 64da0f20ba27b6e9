# SPDX-License-Identifier: MIT
"""One socket on its way out of this host, from selection to the outcome of its migration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sockmi.addresses import FourTuple
from sockmi.engine.base import Kind, SocketFacts
from sockmi.engine.listing import received_bytes
from sockmi.image import Section, peek, section
from sockmi.image.sections import Counters
from sockmi.importing.copies import Copy
from sockmi.permission import Caller
from sockmi.protocol.records import MigrationId

_IMAGE_OVERHEAD_BYTES = 2048


@dataclass(slots=True)
class Selected:
    """One socket that somebody wants moved; the shell owns ``descriptor`` (a duplicate; -1: none at present).

    ``caller``: None for those who may move any socket; others only what is theirs. ``user_id``: who asked.
    ``received``: how many bytes had come when it was quiet; it is not moved if its owner has read more since.
    ``copy``: it waits in an import list of this host, and no process has it.
    """

    descriptor: int
    pid: int | None
    fd: int | None
    caller: Caller | None = None
    context: bytes | None = None
    migration_id: UUID | None = None
    user_id: int | None = None
    received: int | None = None
    copy: Copy | None = None


@dataclass(slots=True)
class Export:
    """One migration under way.

    ``holders``: the processes that have the socket. ``listener``: in whose queue it waited. ``frozen_at``:
    time.monotonic(), 0 until then. ``stopped``: its owners are. ``half_open``: handshakes with it that
    are not completed, and the kernel's cookies of these. ``queued``: of a dry run, how many connections
    wait in the queue of a listener.
    """

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
    queued: int = 0

    @property
    def socket(self) -> int | MigrationId:
        """What tells its socket from others."""
        return self.selected.copy.migration if self.selected.copy else self.facts.inode

    @property
    def size_bytes(self) -> int:
        """About how long the image will be, as the socket was when it was selected."""
        if self.selected.copy:
            return self.selected.copy.facts.total_bytes
        return self._size_with(self.facts.receive_queue_bytes + self.facts.send_queue_bytes)

    def size_now_bytes(self, queued_bytes: int) -> int:
        """The same, when so much is queued at it."""
        if self.facts.kind is not Kind.CONNECTED or self.selected.copy:
            return self.size_bytes
        return self._size_with(queued_bytes)

    def _size_with(self, queued_bytes: int) -> int:
        return queued_bytes + len(self.selected.context or b"") + _IMAGE_OVERHEAD_BYTES

    def woke(self, image: bytes) -> bool:
        """Whether its owner has read something since it was quiet: a request, which it may be answering."""
        if self.selected.received is None:
            return False
        counters = section(image, Section.COUNTERS)
        if len(counters) == Counters.size():  # the module has locked the socket, which is not asked then
            received = Counters.unpack(counters).bytes_received
        else:
            received = received_bytes(self.selected.descriptor)
        return received - peek(image).receive_bytes != self.selected.received


def owned(exports: Iterable[Export]) -> list[Export]:
    """Those that a process has."""
    return [one for one in exports if one.selected.copy is None]


def copies(exports: Iterable[Export]) -> list[Copy]:
    """The others: those that wait in the import lists."""
    return [one.selected.copy for one in exports if one.selected.copy is not None]
