# SPDX-License-Identifier: MIT
"""Calls that block, and the control connection that they use."""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar
from uuid import UUID, uuid4

from sockmi.client.errors import Unanswered, silent
from sockmi.client.exports import Export, export_on, outcomes
from sockmi.client.imports import Imported, ImportRequest, import_on
from sockmi.client.link import Link
from sockmi.client.records import MigrationRecord, concluded

_POLL_MS_MAX = 1 << 30

T = TypeVar("T")


class _BlockingLink(Link):
    """Blocks where others suspend, so its coroutines need no event loop: see `_finish`."""

    @staticmethod
    async def pause(seconds: float) -> None:
        time.sleep(seconds)

    async def _ready(self, writing: bool) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLOUT if writing else select.POLLIN)
        while True:
            left_s = self._left_s()
            if poll.poll(None if left_s is None else math.ceil(min(left_s * 1000, _POLL_MS_MAX))):
                return
            if left_s == 0:
                raise silent()


async def _append(results: list[T], call: Coroutine[Any, Any, T]) -> None:
    results.append(await call)


def _finish(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that blocks and never suspends."""
    results: list[T] = []
    running = _append(results, call)
    try:
        running.send(None)
    except StopIteration:
        return results.pop()
    running.close()
    raise RuntimeError(f"{call!r} suspended: it belongs on an event loop")


class Control:
    """A connection to the daemon, for one thread; a context manager.

    ``call`` is for all that has no function of its own: list, status, history, drain ...
    Closing the connection cancels what is under way on it.
    """

    def __init__(self, control: str | os.PathLike[str] | None = None, timeout_s: float | None = None) -> None:
        """Connect, within ``timeout_s``. Raises SockMiError (ENOENT, ECONNREFUSED, EACCES ...)."""
        self._link = _finish(_BlockingLink.open(control, timeout_s))
        self._link.allow(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._link.close()

    def call(self, op: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Send a request; yield the response's lines. Raises SockMiError for an error response."""
        _finish(self._link.send({"op": op, **fields}))
        more = True
        while more:
            answer = _finish(self._link.answer())
            more = bool(answer.get("more"))
            yield answer

    def run(self, exchange: Callable[[Link], Coroutine[Any, Any, T]]) -> T:
        """The result of a coroutine on this connection, such as `imports.importing`."""
        return _finish(exchange(self._link))


def learn_outcomes(
    ids: Sequence[UUID], control: str | os.PathLike[str] | None, unanswered: Unanswered
) -> list[dict[str, Any]]:
    """As `exports.outcomes`."""
    return _finish(outcomes(_BlockingLink, ids, control, unanswered))


def import_socket(
    requests: ImportRequest | Sequence[ImportRequest],
    timeout_s: float | None = None,
    *,
    control: str | os.PathLike[str] | None = None,
) -> list[Imported]:
    """Wait until at least one request can be satisfied, and import as many as can be.

    ``timeout_s``: None for ever, 0 not at all; then the list is empty. Raises SockMiError;
    then nothing was imported and descriptors to be replaced are as they were.
    """
    return _finish(import_on(_BlockingLink, requests, timeout_s, control))


def export_sockets(
    exports: Sequence[Export],
    to: str | None = None,
    *,
    timeout_s: float | None = None,
    dry_run: bool = False,
    control: str | os.PathLike[str] | None = None,
) -> list[MigrationRecord]:
    """Move sockets in one batch; a record for each, in order, also of those refused.

    ``to``: address, name or id of the importing host; None: any. ``timeout_s``: what has found no
    importer by then is refused. If the daemon goes away in the middle its successor is asked for the outcome;
    so is one that has not answered 2 s after ``timeout_s``, and what is not committed then is undone.
    SockMiError with ECONNRESET may mean that the outcome is not known; it says so.
    """
    return _finish(
        export_on(_BlockingLink, exports, to, timeout_s=timeout_s, dry_run=dry_run, control=control)
    )


def export_socket(
    sock: socket.socket | int | UUID,
    *,
    pid: int | None = None,
    to: str | None = None,
    context: bytes | bytearray | memoryview = b"",
    timeout_s: float | None = None,
    dry_run: bool = False,
    migration_id: UUID | None = None,
    control: str | os.PathLike[str] | None = None,
) -> MigrationRecord:
    """Move one socket: ``sock`` of this process, or descriptor ``sock`` of process ``pid``.

    Or on, if ``sock`` is a UUID: what waits in an import list of this host under this migration id.
    Raises MigrationError if it has not moved, SockMiError if the daemon could not be asked.
    After it moved, ``sock`` is a dead descriptor, still to be closed.
    """
    export = Export(sock, pid, context, migration_id or uuid4())
    [record] = export_sockets([export], to, timeout_s=timeout_s, dry_run=dry_run, control=control)
    return concluded(record)
