# SPDX-License-Identifier: MIT
"""The request `export`: sockets that a client names, or passes."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from sockmi import api
from sockmi.control import Client
from sockmi.engine.closing import close_all
from sockmi.engine.duplicate import duplicate
from sockmi.exporting import Selected
from sockmi.operations.answers import respond_records
from sockmi.parts import Parts
from sockmi.permission import Caller
from sockmi.refusal import Code, Refusal

_TIMEOUT_S = 30.0
_CONTEXTS_BYTES_MAX = 256 << 20  # of one user other than root, in all exports that are under way
_CONTEXTS = (
    f"The contexts of your exports that are under way have {_CONTEXTS_BYTES_MAX >> 20} MiB together; "
    "wait until some have ended."
)
_FINAL = frozenset({"moved", "failed"})  # outcomes after COMMIT: there is nothing to begin again


class Exports:
    """What clients have asked to export, and what has not been answered yet."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon
        self._batches: dict[Client, bytes] = {}
        self._contexts: Counter[int] = Counter()  # bytes, by user

    def gone(self, client: Client) -> None:
        """The client has hung up: what it asked for ends before the freeze."""
        if (batch := self._batches.pop(client, None)) is not None:
            self._daemon.exporting.admission.cancel(batch)

    def export(self, client: Client, request: api.ExportRequest, descriptors: list[int]) -> None:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        settled = self._settled(client, request)
        if all(isinstance(one, api.MigrationRecord) for one in settled):
            done_before = [one for one in settled if isinstance(one, api.MigrationRecord)]
            respond_records(client, request.id, api.ExportResponse, done_before)
            return
        target = self._daemon.members.target(request.to)
        selection = self._select(client, request, descriptors, settled)
        contexts = sum(len(one.context or b"") for one in selection if isinstance(one, Selected))
        self._contexts[client.uid] += contexts

        def done(records: list[dict[str, Any]]) -> None:
            self._batches.pop(client, None)
            self._contexts[client.uid] -= contexts
            # In the order of the request; what follows a listener is in the history, tagged with it.
            going = iter(records)
            with client.answering(request):
                asked = [
                    self._asked(item, next(going) if isinstance(one, Selected) else one)
                    for item, one in zip(request.sockets, selection, strict=True)
                ]
                respond_records(client, request.id, api.ExportResponse, asked)

        try:
            batch = self._daemon.exporting.admission.export(
                [one for one in selection if isinstance(one, Selected)],
                target=target,
                timeout_s=request.timeout_s or _TIMEOUT_S,
                dry_run=request.dry_run,
                done=done,
            )
        except BaseException:
            self._contexts[client.uid] -= contexts
            raise
        if batch in self._daemon.exporting.batches:
            self._batches[client] = batch

    def _settled(
        self, client: Client, request: api.ExportRequest
    ) -> list[api.MigrationRecord | Refusal | None]:
        """Of sockets that are asked for again (the same migration id): what is not begun again, and why."""
        return [
            self._settled_before(client, item.migration_id) if item.migration_id else None
            for item in request.sockets
        ]

    def _settled_before(self, client: Client, migration: UUID) -> api.MigrationRecord | Refusal | None:
        record = self._daemon.journal.migration(migration, "export")
        if record is None or "started_at" not in record:
            return None
        if not client.administrator and record.get("user_id") != client.uid:
            return Refusal(
                Code.NO_PRIVILEGE, f"The migration id {migration} is another user's; choose a new UUID."
            )
        return api.record_of(record) if record.get("outcome") in _FINAL else None

    def _asked(
        self, item: api.ExportItem, one: dict[str, Any] | api.MigrationRecord | Refusal
    ) -> api.MigrationRecord:
        """The record of a socket that was asked for."""
        if isinstance(one, Refusal):
            return self._refused(item, one)
        return one if isinstance(one, api.MigrationRecord) else api.record_of(one)

    def _refused(self, item: api.ExportItem, refusal: Refusal) -> api.MigrationRecord:
        """The record of a socket that is not there (any more)."""
        return api.MigrationRecord(
            migration_id=item.migration_id or uuid4(),
            kind=None,
            state=None,
            from_=self._daemon.host_name,
            pid=item.pid,
            fd=item.fd,
            started_at=datetime.now(UTC),
            outcome=api.Outcome.REFUSED,
            refusal=api.Why.of(refusal),
        )

    def _listed(self, client: Client, item: api.ExportItem, listed: UUID) -> Selected | Refusal:
        """A socket that waits in an import list, for whoever may import it."""
        copy = self._daemon.importing.onward.find(listed.bytes)
        if copy is None or not (client.administrator or client.uid == copy.candidate.uid):
            return Refusal(
                Code.NO_SUCH_SOCKET,
                f"Nothing waits in an import list as {listed} that you may have; see sockmi list imports.",
            )
        return Selected(-1, None, None, migration_id=item.migration_id, user_id=client.uid, copy=copy)

    def _select(
        self,
        client: Client,
        request: api.ExportRequest,
        descriptors: list[int],
        settled: list[api.MigrationRecord | Refusal | None],
    ) -> list[Selected | Refusal | api.MigrationRecord]:
        """Pair items with their descriptors; the daemon takes only what an administrator names.

        A socket that cannot be taken is refused alone. What is selected is taken out of ``descriptors``.
        """
        caller = None if client.administrator else Caller(client.pid, client.uid)
        remaining = iter(list(descriptors))
        selection: list[Selected | Refusal | api.MigrationRecord] = []
        taken: list[int] = []
        try:
            for item, before in zip(request.sockets, settled, strict=True):
                if item.listed is not None:
                    found = before if before is not None else self._listed(client, item, item.listed)
                    selection.append(found)
                    continue
                if item.descriptor:
                    descriptor = next(remaining)
                elif client.administrator and before is None:
                    assert item.pid is not None and item.fd is not None
                    try:
                        descriptor = _taken_from(item.pid, item.fd, item.inode)
                    except Refusal as refusal:
                        selection.append(refusal)
                        continue
                    taken.append(descriptor)
                elif not client.administrator:
                    raise Refusal(
                        Code.NO_PRIVILEGE,
                        "Only administrators may name a socket by pid and fd alone; pass its descriptor.",
                    )
                if before is not None:
                    selection.append(before)
                    continue
                selection.append(
                    Selected(
                        descriptor,
                        item.pid or client.pid,
                        item.fd,
                        caller,
                        migration_id=item.migration_id,
                        user_id=client.uid,
                        received=item.received_bytes,
                    )
                )
            held = 0 if client.administrator else self._contexts[client.uid]
            for one, item in zip(selection, request.sockets, strict=True):
                if item.context:
                    content = _read_memfd(next(remaining))
                    held += len(content)
                    if held > _CONTEXTS_BYTES_MAX and not client.administrator:
                        raise Refusal(Code.TOO_LARGE, _CONTEXTS)
                    if isinstance(one, Selected):
                        one.context = content
        except BaseException:
            close_all(taken)
            raise
        kept = {one.descriptor for one in selection if isinstance(one, Selected) and one.copy is None}
        descriptors[:] = [one for one in descriptors if one not in kept]
        return selection


def _taken_from(pid: int, fd: int, inode: int | None) -> int:
    if pid == os.getpid():
        message = "That is this daemon's own descriptor; name one of the application's."
        raise Refusal(Code.OWNER_IS_DAEMON, message)
    return duplicate(pid, fd, inode)


def _read_memfd(descriptor: int) -> bytes:
    """An application's context; it must be sealed, so that its size cannot change while it is read."""
    size = os.fstat(descriptor).st_size
    if size > api.CONTEXT_BYTES_MAX:
        raise Refusal(
            Code.TOO_LARGE, f"The context has {size} bytes; at most {api.CONTEXT_BYTES_MAX} travel."
        )
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK or not seals & fcntl.F_SEAL_GROW:
        raise Refusal(
            Code.BAD_REQUEST, "The context must come as a memfd sealed against growing and shrinking."
        )
    return os.pread(descriptor, size, 0)
