# SPDX-License-Identifier: MIT
"""Asyncio forms of `sockmi.client`: the same calls, awaited.

    async for arrived in sockmi.imports(["connected"], local_port=80):
        reader, writer = await asyncio.open_connection(sock=arrived.socket)

Imported sockets are non-blocking, as asyncio wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Generator, Sequence
from typing import Any, Self
from uuid import UUID, uuid4

from sockmi.client import (
    _GRACE_S,
    _RECONNECT_PAUSE_S,
    _RECONNECT_S,
    Export,
    Imported,
    ImportRequest,
    Lines,
    MigrationRecord,
    Receive,
    Send,
    SockMiError,
    _Broken,
    _silent,
    answered,
    asking,
    concluded,
    connection_error,
    control_path,
    encode,
    exporting,
    importing,
    milliseconds,
    unknown_outcome,
)
from sockmi.engine.base import Kind

_LATE_CANCEL_S = 5.0  # how long a cancelled import waits for sockets that it has already taken
_RESTART_PAUSE_S = 0.5


class _Connection:
    """A connection to the daemon on the running event loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = Lines()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, control: str | os.PathLike[str] | None) -> Self:
        path = control_path(control)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    connection.connect(path)
                    return cls(connection)
                except BlockingIOError:  # its backlog is full
                    await asyncio.sleep(_RECONNECT_PAUSE_S)
        except OSError as error:
            connection.close()
            raise connection_error(path, error) from None
        except BaseException:
            connection.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connection.close()
        self._lines.close()

    async def run(self, exchange: Generator[Send | Receive, Any, Any], timeout_s: float | None = None) -> Any:
        deadline = None if timeout_s is None else self._loop.time() + timeout_s + _GRACE_S
        with contextlib.closing(exchange):
            try:
                step = next(exchange)
                while True:
                    try:
                        result = None
                        if isinstance(step, Send):
                            await self._send(step, deadline)
                        elif step.firm:
                            result = await self._receive_firmly()
                        else:
                            result = await self._receive(deadline)
                    except SockMiError as error:
                        step = exchange.throw(error)
                    else:
                        step = exchange.send(result)
            except StopIteration as end:
                return end.value

    async def _send(self, send: Send, deadline: float | None) -> None:
        line, rights = encode(send)
        try:
            sent = 0
            while sent < len(line):
                try:
                    sent += self._connection.sendmsg(
                        [line[sent:]], [] if sent else rights, socket.MSG_NOSIGNAL
                    )
                except BlockingIOError:
                    await self._ready(self._loop.add_writer, self._loop.remove_writer, deadline)
        except ConnectionError:
            raise _Broken from None
        except SockMiError:
            raise
        except OSError as error:
            raise SockMiError(error.errno or errno.EIO, f"sending to the SockMi daemon: {error}") from None

    async def _receive(self, deadline: float | None) -> tuple[dict[str, Any], list[int]]:
        while (message := self._lines.next()) is None:
            try:
                self._lines.receive(self._connection)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader, deadline)
        return message

    async def _receive_firmly(self) -> tuple[dict[str, Any], list[int]]:
        """As ``_receive``; a cancellation only sets a deadline, for what is taken must not be lost."""
        deadline = None
        while True:
            try:
                return await self._receive(deadline)
            except asyncio.CancelledError:
                deadline = deadline or self._loop.time() + _LATE_CANCEL_S

    async def _ready(
        self, add: Callable[..., None], remove: Callable[[int], bool], deadline: float | None
    ) -> None:
        fd = self._connection.fileno()
        ready = self._loop.create_future()
        add(fd, _resolve, ready)
        try:
            async with asyncio.timeout_at(deadline):
                await ready
        except TimeoutError:
            raise _silent() from None
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

    Cancelling cancels the import, until a socket has been taken: then it comes too late, and
    the call returns the socket.
    """
    given = [requests] if isinstance(requests, ImportRequest) else list(requests)
    async with await _Connection.open(control) as connection:
        return await _import(connection, given, timeout_s)


async def _import(
    connection: _Connection, requests: Sequence[ImportRequest], timeout_s: float | None
) -> list[Imported]:
    arrived: list[Imported] = await connection.run(importing(requests, milliseconds(timeout_s)), timeout_s)
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
    """
    request = ImportRequest(
        states, preferred, local_address, local_port, remote_address, remote_port, listener
    )
    begun = False
    while True:
        try:
            async with await _Connection.open(control) as connection:
                begun = True
                while True:
                    for arrived in await _import(connection, [request], None):
                        yield arrived
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
    try:
        async with await _Connection.open(control) as connection:
            result: list[MigrationRecord] = await connection.run(
                exporting(exports, to, timeout_s, dry_run), timeout_s
            )
            return result
    except _Broken:
        return await _learn(exports, control)


async def _learn(exports: Sequence[Export], control: str | os.PathLike[str] | None) -> list[MigrationRecord]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _RECONNECT_S
    while (left := deadline - loop.time()) > 0:
        try:
            async with await _Connection.open(control) as connection:
                known = await connection.run(asking([one.migration_id for one in exports], left), left)
        except SockMiError as error:
            if error.code or error.errno not in (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT):
                raise
        else:
            if (records := answered(exports, known)) is not None:
                return records
        await asyncio.sleep(_RECONNECT_PAUSE_S)
    raise unknown_outcome()


async def export_socket(
    sock: socket.socket | int,
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
