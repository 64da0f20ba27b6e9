# SPDX-License-Identifier: MIT
"""An export: sockets, their duplicates, and the records of what became of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from sockmi.client.descriptors import check_protocol, close_quietly, fileno, seal_context
from sockmi.client.errors import BrokenLink, SockMiError, strange
from sockmi.client.lines import DESCRIPTORS_MAX
from sockmi.client.link import RECONNECT_PAUSE_S, Link
from sockmi.client.records import MigrationRecord
from sockmi.engine.duplicate import pidfd_getfd

_RECONNECT_S = 10.0  # how long to look for a daemon that restarts, to learn an outcome


@dataclass(frozen=True, slots=True)
class Export:
    """One socket to export: a socket or descriptor, of this process or of ``pid``."""

    socket: socket.socket | int
    pid: int | None = None
    context: bytes | bytearray | memoryview = b""
    migration_id: UUID = field(default_factory=uuid4)


async def export_on(
    links: type[Link],
    exports: Sequence[Export],
    to: str | None,
    *,
    timeout_s: float | None,
    dry_run: bool,
    control: str | os.PathLike[str] | None,
) -> list[MigrationRecord]:
    """An export on a link of its own; if the daemon goes away its successor is asked for the outcome."""
    try:
        async with await links.open(control) as link:
            link.allow(timeout_s)
            return await _exporting(link, exports, to, timeout_s, dry_run)
    except BrokenLink:
        return await _learn(links, exports, control)


async def _exporting(
    link: Link, exports: Sequence[Export], to: str | None, timeout_s: float | None, dry_run: bool
) -> list[MigrationRecord]:
    """All in one request: at most `DESCRIPTORS_MAX` with their contexts."""
    with contextlib.ExitStack() as duplicates:
        sockets, contexts, items = [], [], []
        for export in exports:
            sockets.append(duplicate(export))
            duplicates.callback(close_quietly, sockets[-1])
            if len(export.context):
                contexts.append(seal_context(export.context))
                duplicates.callback(close_quietly, contexts[-1])
            items.append(
                {
                    "pid": export.pid or os.getpid(),
                    "fd": fileno(export.socket),
                    "descriptor": True,
                    "context": bool(len(export.context)),
                    "migration_id": str(export.migration_id),
                }
            )
        fds = [*sockets, *contexts]
        if not 1 <= len(fds) <= DESCRIPTORS_MAX:
            raise SockMiError(
                errno.EINVAL, f"{len(fds)} descriptors: 1 to {DESCRIPTORS_MAX} fit in one export"
            )
        await link.send(
            {
                "op": "export",
                "fds": len(fds),
                "sockets": items,
                "to": to,
                "timeout_s": timeout_s,
                "dry_run": dry_run,
            },
            fds,
        )
        # Here the duplicates are closed: the daemon must not find us among the sockets' owners.
    records = await _records(link)
    if [one.migration_id for one in records] != [one.migration_id for one in exports]:
        raise strange("its records are not those of the sockets")
    return records


async def migrations(link: Link) -> list[dict[str, Any]]:
    """The records of a response, as they are written there."""
    records: list[dict[str, Any]] = []
    more = True
    while more:
        answer = await link.answer()
        records += answer.get("migrations", ())
        more = bool(answer.get("more"))
    return records


async def _records(link: Link) -> list[MigrationRecord]:
    return [MigrationRecord.from_json(one) for one in await migrations(link)]


async def _learn(
    links: type[Link], exports: Sequence[Export], control: str | os.PathLike[str] | None
) -> list[MigrationRecord]:
    ids = [str(one.migration_id) for one in exports]
    deadline = time.monotonic() + _RECONNECT_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            async with await links.open(control, left) as link:
                await link.send({"op": "info", "migration_ids": ids, "wait_s": left})
                known = await _records(link)
        except SockMiError as error:
            if error.code or error.errno not in (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT):
                raise
        else:
            if (records := _answered(exports, known)) is not None:
                return records
        await links.pause(RECONNECT_PAUSE_S)
    raise SockMiError(
        errno.ECONNRESET,
        "The SockMi daemon went away and does not come back; whether the socket has moved is not known. "
        "Ask `sockmi history` when it runs again.",
    )


def _answered(exports: Sequence[Export], known: Sequence[MigrationRecord]) -> list[MigrationRecord] | None:
    """The records of exports whose connection broke; None while some are under way.

    Raises SockMiError (ECONNRESET) if the daemon never began one of them.
    """
    by_id = {record.migration_id: record for record in known}
    if any(record.outcome is None for record in known):
        return None
    missing = [one.migration_id for one in exports if one.migration_id not in by_id]
    if missing:
        raise SockMiError(
            errno.ECONNRESET,
            f"The SockMi daemon went away before it began {len(missing)} of {len(exports)} exports; "
            "their sockets are as they were.",
        )
    return [by_id[one.migration_id] for one in exports]


def duplicate(export: Export) -> int:
    """A descriptor of ours for the socket: the kernel asks whether we might trace its process."""
    fd = fileno(export.socket)
    what = f"Descriptor {fd}" + (f" of process {export.pid}" if export.pid else "")
    if export.pid is not None and export.pid <= 0:
        raise SockMiError(errno.EINVAL, f"pid is {export.pid}: give a process's id, or None for this process")
    try:
        if export.pid in (None, os.getpid()):
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        else:
            copy = pidfd_getfd(export.pid or 0, fd)
    except OSError as error:
        hint = ": you may not trace that process" if error.errno == errno.EPERM else f": {error.strerror}"
        raise SockMiError(error.errno or errno.EIO, what + hint) from None
    try:
        check_protocol(copy, what)
    except SockMiError:
        os.close(copy)
        raise
    return copy
