# SPDX-License-Identifier: MIT
"""Asyncio forms of `sockmi.client`: the same calls, awaited.

    async for arrived in sockmi.imports(["connected"], local_port=80):
        reader, writer = await asyncio.open_connection(sock=arrived.socket)

Imported sockets are non-blocking, as asyncio wants them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from uuid import UUID, uuid4

from sockmi.client.errors import SockMiError, silent
from sockmi.client.exports import Export, export_on
from sockmi.client.imports import Imported, ImportRequest, import_on, importing
from sockmi.client.link import Link
from sockmi.client.records import MigrationRecord, concluded
from sockmi.engine.base import Kind

_RESTART_PAUSE_S = 0.5


class _LoopLink(Link):
    """A link on the running event loop."""

    @staticmethod
    async def pause(seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _ready(self, writing: bool) -> None:
        loop, fd = asyncio.get_running_loop(), self._connection.fileno()
        add, remove = (
            (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        )
        ready = loop.create_future()
        add(fd, _resolve, ready)
        try:
            async with asyncio.timeout(self._left_s()):
                await ready
        except TimeoutError:
            raise silent() from None
        finally:
            remove(fd)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def import_socket(
    requests: ImportRequest | Sequence[ImportRequest],
    timeout_s: float | None = None,
    *,
    control: str | os.PathLike[str] | None = None,
) -> list[Imported]:
    """As `sockmi.client.import_socket`.

    Cancelling cancels the import, unless a socket has just come to life: then it comes too late, and
    the call returns the socket.
    """
    return _unblocked(await import_on(_LoopLink, requests, timeout_s, control))


def _is_cancelled() -> bool:
    """Whether this task still is to end; a timeout that is over takes its cancellation back."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _unblocked(arrived: list[Imported]) -> list[Imported]:
    for one in arrived:
        os.set_blocking(one.fd, False)
        if one.socket is not None:
            one.socket.setblocking(False)
    return arrived


async def imports(
    states: Collection[Kind | str] = tuple(Kind),
    *,
    preferred: Collection[Kind | str] = (),
    local_address: str | None = None,
    local_port: int | None = None,
    remote_address: str | None = None,
    remote_port: int | None = None,
    listener: UUID | None = None,
    reconnect: bool = True,
    control: str | os.PathLike[str] | None = None,
) -> AsyncIterator[Imported]:
    """Every socket that comes and matches, one after the other, for ever.

    ``reconnect``: wait for a daemon that restarts (one that is not there at first is an error).
    A cancellation that comes too late for a socket is raised when the next one is asked for.
    """
    request = ImportRequest(
        states, preferred, local_address, local_port, remote_address, remote_port, listener
    )
    begun = False
    while True:
        try:
            async with await _LoopLink.open(control) as link:
                begun = True
                while link.interrupted is None:
                    for arrived in _unblocked(await importing(link, [request], None)):
                        yield arrived
            if _is_cancelled():
                raise asyncio.CancelledError
            continue
        except SockMiError as error:
            gone = error.errno in (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT, errno.ESHUTDOWN)
            if not (reconnect and begun and gone):
                raise
        await asyncio.sleep(_RESTART_PAUSE_S)


async def export_sockets(
    exports: Sequence[Export],
    to: str | None = None,
    *,
    timeout_s: float | None = None,
    dry_run: bool = False,
    control: str | os.PathLike[str] | None = None,
) -> list[MigrationRecord]:
    """As `sockmi.client.export_sockets`. Cancelling undoes what is not yet committed."""
    return await export_on(_LoopLink, exports, to, timeout_s=timeout_s, dry_run=dry_run, control=control)


async def export_socket(
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
    """As `sockmi.client.export_socket`. Take the socket out of its transport before."""
    export = Export(sock, pid, context, migration_id or uuid4())
    [record] = await export_sockets([export], to, timeout_s=timeout_s, dry_run=dry_run, control=control)
    return concluded(record)
