# SPDX-License-Identifier: MIT
"""An export: sockets, their duplicates, and the records of what became of them."""

# Values that are `frozen` are dataclasses, which pylint does not know.
# pylint: disable=invalid-field-call
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import field
from typing import Any
from uuid import UUID, uuid4

from sockmi.client.descriptors import check_protocol, close_quietly, fileno, seal_context
from sockmi.client.errors import BrokenLink, SockMiError, Unanswered, strange
from sockmi.client.lines import DESCRIPTORS_MAX
from sockmi.client.link import RECONNECT_PAUSE_S, Link
from sockmi.client.records import MigrationRecord
from sockmi.engine.duplicate import pidfd_getfd
from sockmi.frozen import frozen

_RECONNECT_S = 10.0  # how long to ask for an outcome, of a daemon that restarts or is slow


@frozen
class Export:
    """One socket to export: a socket or descriptor, of this process or of ``pid``.

    A UUID: what waits in an import list of this host under this migration id; it has its context already.
    """

    socket: socket.socket | int | UUID
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
    """An export on a link of its own; a daemon that goes away, or is too slow, is asked for the outcome."""
    try:
        async with await links.open(control) as link:
            link.allow(timeout_s)
            await ask(link, exports, to, timeout_s=timeout_s, dry_run=dry_run)
            records = [MigrationRecord.from_json(one) for one in await migrations(link)]
    except Unanswered as unanswered:
        if dry_run and not isinstance(unanswered, BrokenLink):
            raise
        ids = [one.migration_id for one in exports]
        rows = await outcomes(links, ids, control, unanswered)
        return [MigrationRecord.from_json(one) for one in rows]
    if [one.migration_id for one in records] != [one.migration_id for one in exports]:
        raise strange("its records are not those of the sockets")
    return records


async def ask(
    link: Link, exports: Sequence[Export], to: str | None, *, timeout_s: float | None, dry_run: bool
) -> None:
    """All in one request: at most `DESCRIPTORS_MAX` with their contexts."""
    with contextlib.ExitStack() as duplicates:
        sockets, contexts, items = [], [], []
        for export in exports:
            if isinstance(export.socket, UUID):
                items.append(_listed(export.socket, export))
                continue
            sockets.append(_duplicate(export.socket, export.pid))
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
        if not items or len(fds) > DESCRIPTORS_MAX:
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


async def migrations(link: Link) -> list[dict[str, Any]]:
    """The records of a response, as they are written there."""
    records: list[dict[str, Any]] = []
    more = True
    while more:
        answer = await link.answer()
        records += answer.get("migrations", ())
        more = bool(answer.get("more"))
    return records


async def outcomes(
    links: type[Link],
    ids: Sequence[UUID],
    control: str | os.PathLike[str] | None,
    unanswered: Unanswered,
) -> list[dict[str, Any]]:
    """The records of migrations whose export got no answer; its link is closed, so no more is begun.

    Raises SockMiError: the errno of ``unanswered`` if they never began; ECONNRESET if it cannot be learnt.
    """
    names = [str(one) for one in ids]
    deadline = time.monotonic() + _RECONNECT_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            async with await links.open(control, left) as link:
                await link.send({"op": "info", "migration_ids": names, "wait_s": left})
                known = {one["migration_id"]: one for one in await migrations(link)}
        except SockMiError as error:
            if error.code or not (
                isinstance(error, Unanswered) or error.errno in (errno.ECONNREFUSED, errno.ENOENT)
            ):
                raise
        else:
            if all(one.get("outcome") for one in known.values()):
                return _known(names, known, unanswered)
        await links.pause(RECONNECT_PAUSE_S)
    how = "went away and does not come back" if isinstance(unanswered, BrokenLink) else "does not answer"
    raise SockMiError(
        errno.ECONNRESET,
        f"The SockMi daemon {how}; whether the socket has moved is not known. "
        "Ask `sockmi history` when it answers again.",
    )


def _known(
    names: Sequence[str], known: dict[str, dict[str, Any]], unanswered: Unanswered
) -> list[dict[str, Any]]:
    if missing := len(set(names) - set(known)):
        count = f"{missing} of {len(names)} exports; their sockets are as they were."
        if isinstance(unanswered, BrokenLink):
            raise SockMiError(errno.ECONNRESET, f"The SockMi daemon went away before it began {count}")
        raise SockMiError(errno.ETIMEDOUT, f"The SockMi daemon has not begun in time {count}")
    return [known[one] for one in names]


def _listed(listed: UUID, export: Export) -> dict[str, Any]:
    if export.pid is not None or len(export.context):
        raise SockMiError(
            errno.EINVAL, "What waits in an import list has no process, and keeps its context: give neither."
        )
    return {"listed": str(listed), "migration_id": str(export.migration_id)}


def _duplicate(sock: socket.socket | int, pid: int | None) -> int:
    """A descriptor of ours for the socket: the kernel asks whether we might trace its process."""
    fd = fileno(sock)
    what = f"Descriptor {fd}" + (f" of process {pid}" if pid else "")
    if pid is not None and pid <= 0:
        raise SockMiError(errno.EINVAL, f"pid is {pid}: give a process's id, or None for this process")
    try:
        if pid in (None, os.getpid()):
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        else:
            copy = pidfd_getfd(pid or 0, fd)
    except OSError as error:
        hint = ": you may not trace that process" if error.errno == errno.EPERM else f": {error.strerror}"
        raise SockMiError(error.errno or errno.EIO, what + hint) from None
    try:
        check_protocol(copy, what, socket.IPPROTO_MPTCP)  # the daemon refuses that, in its words
    except SockMiError:
        os.close(copy)
        raise
    return copy
