# SPDX-License-Identifier: MIT
"""The control socket's requests, each carried out by the part that it concerns (docs/control.md)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sockmi import api
from sockmi.config import ConfigError
from sockmi.control import Client
from sockmi.doctor import examine, examine_slowly
from sockmi.draining import Drain
from sockmi.engine.base import Kind
from sockmi.engine.duplicate import duplicate
from sockmi.engine.listing import Holder
from sockmi.engine.owners import obstacle_of
from sockmi.exporting import Selected
from sockmi.history import History
from sockmi.parts import Parts
from sockmi.permission import Caller
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found, check_filter, kind_of, select
from sockmi.shell import close_all, inbound, outbound, whole_record

T = TypeVar("T")

_ROWS_PER_LINE = 200
_EXPORT_TIMEOUT_S = 30.0
_FINAL = frozenset({"moved", "failed"})  # outcomes after COMMIT: there is nothing to begin again


class Operations:
    """Handles the requests of the control socket."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon
        self._drains: dict[Client, Drain] = {}
        self._exports: dict[Client, bytes] = {}
        self._handlers: dict[str, Callable[[Client, Any, list[int]], None]] = {
            "export": self._export,
            "import": self._import,
            "taken": self._taken,
            "list": self._list,
            "status": self._status,
            "info": self._info,
            "history": self._history,
            "drain": self._drain,
            "groups": self._groups,
            "reload": self._reload,
            "doctor": self._doctor,
        }

    def request(self, client: Client, request: Any, descriptors: list[int]) -> None:
        """See control.Handler."""
        try:
            if request.op in api.ADMINISTRATOR_OPS and not client.administrator:
                raise Refusal(Code.NO_PRIVILEGE, f"{request.op} is for administrators; run it as root.")
            self._handlers[request.op](client, request, descriptors)
        finally:
            close_all(descriptors)  # but for those that a handler has taken out

    def gone(self, client: Client) -> None:
        """See control.Handler."""
        self._daemon.importing.handover.gone(client)
        if (drain := self._drains.pop(client, None)) is not None:
            drain.cancel()
        if (batch := self._exports.pop(client, None)) is not None:
            self._daemon.exporting.admission.cancel(batch)

    # -- export

    def _export(self, client: Client, request: api.ExportRequest, descriptors: list[int]) -> None:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        settled = self._settled(client, request)
        if all(isinstance(one, api.MigrationRecord) for one in settled):
            done_before = [one for one in settled if isinstance(one, api.MigrationRecord)]
            _respond_records(client, request.id, api.ExportResponse, done_before)
            return
        target = self._daemon.members.target(request.to)
        selection = self._select(client, request, descriptors, settled)

        def done(records: list[dict[str, Any]]) -> None:
            self._exports.pop(client, None)
            # In the order of the request; what follows a listener is in the history, tagged with it.
            going = iter(records)
            with client.answering(request):
                asked = [
                    self._asked(item, next(going) if isinstance(one, Selected) else one)
                    for item, one in zip(request.sockets, selection, strict=True)
                ]
                _respond_records(client, request.id, api.ExportResponse, asked)

        batch = self._daemon.exporting.admission.export(
            [one for one in selection if isinstance(one, Selected)],
            target=target,
            timeout_s=request.timeout_s or _EXPORT_TIMEOUT_S,
            dry_run=request.dry_run,
            done=done,
        )
        if batch in self._daemon.exporting.batches:
            self._exports[client] = batch

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
                if item.descriptor:
                    descriptor = next(remaining)
                elif client.administrator and before is None:
                    assert item.pid is not None and item.fd is not None
                    try:
                        descriptor = _taken_from(item.pid, item.fd)
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
                    )
                )
            for one, item in zip(selection, request.sockets, strict=True):
                if item.context:
                    content = _read_memfd(next(remaining))
                    if isinstance(one, Selected):
                        one.context = content
        except BaseException:
            close_all(taken)
            raise
        kept = {one.descriptor for one in selection if isinstance(one, Selected)}
        descriptors[:] = [one for one in descriptors if one not in kept]
        return selection

    # -- import

    def _import(self, client: Client, request: api.ImportRequest, descriptors: list[int]) -> None:
        self._daemon.importing.handover.wait(client, request)

    def _taken(self, client: Client, request: api.TakenRequest, descriptors: list[int]) -> None:
        self._daemon.importing.handover.taken(client, request)

    # -- reading

    def _list(self, client: Client, request: api.ListRequest, descriptors: list[int]) -> None:
        if request.table is api.Table.SOCKETS:
            self._find_sockets(
                client,
                request,
                lambda found: _respond_pages(client, request, "sockets", self._socket_pages(found)),
                only_uid=None if client.administrator else client.uid,
            )
        elif request.table is api.Table.IMPORTS:
            _respond_pages(client, request, "imports", _pages(self._import_rows()))
        else:
            _respond_pages(client, request, "redirects", _pages(self._redirect_rows()))

    def _find_sockets(
        self,
        client: Client,
        request: api.ListRequest | api.DrainRequest,
        found: Callable[[list[Found]], None],
        *,
        only_uid: int | None = None,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """Look for this host's sockets, in a thread: it looks through /proc."""
        check_filter(request.filter)

        def finish(future: asyncio.Future[list[Found]]) -> None:
            with client.answering(request):
                try:
                    found(future.result())
                except BaseException:
                    failed()
                    raise

        self._daemon.loop.run_in_executor(None, select, request.filter, only_uid).add_done_callback(finish)

    def _socket_pages(self, found: list[Found]) -> Iterator[list[api.SocketRow]]:
        owners: dict[int, Refusal | None] = {}
        for some in _pages(found):
            verdicts = self._verdicts([one.holder for one in some])
            yield [
                _row(one, verdict or _owners_verdict(one, owners))
                for one, verdict in zip(some, verdicts, strict=True)
            ]

    def _verdicts(self, holders: list[Holder]) -> list[Refusal | None]:
        """What stands against moving the sockets of these descriptors."""
        verdicts: list[Refusal | None] = [None] * len(holders)
        duplicates: dict[int, int] = {}
        try:
            for index, holder in enumerate(holders):
                try:
                    duplicates[index] = duplicate(holder.pid, holder.fd)
                except Refusal as refusal:
                    verdicts[index] = refusal
            for index, facts in zip(
                duplicates, self._daemon.shell.engine.inspect(list(duplicates.values())), strict=True
            ):
                verdicts[index] = facts.refusal
        finally:
            close_all(list(duplicates.values()))
        return verdicts

    def _import_rows(self) -> list[api.ImportRow]:
        rows = []
        stock = self._daemon.importing.stock
        for candidate in stock.lists.listed():
            copy = stock.copies[candidate.migration_id.bytes]
            rows.append(
                api.ImportRow(
                    migration_id=candidate.migration_id,
                    kind=candidate.kind,
                    state=copy.arrival.item.state,
                    local=str(copy.placement.local) if copy.placement.local else None,
                    remote=str(candidate.remote) if candidate.remote else None,
                    origin=str(candidate.local) if candidate.local else None,
                    from_=copy.record["from"],
                    listener=candidate.listener,
                    waiting_since=copy.since,
                    context_bytes=copy.facts.context_bytes,
                    image_bytes=copy.record["image_bytes"],
                )
            )
        return rows

    def _redirect_rows(self) -> list[api.RedirectRow]:
        rows = []
        for route in self._daemon.redirecting.routes.values():
            if (away := outbound(route)) and route.place.mode:
                rows.append(
                    api.RedirectRow(
                        migration_id=UUID(bytes=route.migration),
                        direction=api.Direction.EXPORT,
                        mode=route.place.mode,
                        local=str(away.tuple.local),
                        remote=str(away.tuple.remote),
                        other=str(away.importer),
                        hop=route.hop,
                        since=None,
                    )
                )
        for holding in self._daemon.redirecting.holdings.values():
            if (came := inbound(holding)) and holding.place.mode:
                rows.append(
                    api.RedirectRow(
                        migration_id=UUID(bytes=holding.migration),
                        direction=api.Direction.IMPORT,
                        mode=holding.place.mode,
                        local=str(came.tuple.local),
                        remote=str(came.tuple.remote),
                        other=str(came.origin),
                        hop=holding.hop,
                        since=None,
                    )
                )
        return rows

    def _status(self, client: Client, request: api.StatusRequest, descriptors: list[int]) -> None:
        daemon = self._daemon
        lists = daemon.importing.stock.lists
        counts = lists.counts()
        outcomes: dict[api.Outcome, int] = {}
        for metric in daemon.metrics.migrations.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    outcome = api.Outcome(sample.labels["outcome"])
                    outcomes[outcome] = outcomes.get(outcome, 0) + int(sample.value)
        client.respond(
            api.StatusResponse(
                id=request.id,
                version=daemon.version,
                host=daemon.host_name,
                host_id=daemon.identity.host_id.hex(),
                pid=os.getpid(),
                engine=daemon.shell.engine.name,
                modes=list(daemon.config.redirect.modes),
                uptime_s=time.monotonic() - daemon.started_at,
                stopping=daemon.stopping,
                groups=daemon.members.names(),
                import_lists={
                    kind: api.ListLength(
                        length=counts[kind] + lists.reserved(kind),
                        maximum=lists.maxima[kind],
                        waiting=lists.waiting_for(kind),
                    )
                    for kind in Kind
                },
                migrations_under_way=len(daemon.exporting.exports),
                redirects_out=len(daemon.redirecting.routes),
                redirects_in=len(daemon.redirecting.holdings),
                outcomes=outcomes,
            )
        )

    def _info(self, client: Client, request: api.InfoRequest, descriptors: list[int]) -> None:
        deadline = time.monotonic() + request.wait_s

        def answer() -> None:
            with client.answering(request):
                records = self._known(request.migration_ids)
                waiting = any(record.get("outcome") is None for record in records)
                if waiting and time.monotonic() < deadline and not client.closed:
                    self._daemon.loop.call_later(0.02, answer)
                    return
                found = [api.record_of(one) for one in records]
                _respond_records(client, request.id, api.InfoResponse, found)

        answer()

    def _known(self, ids: list[UUID]) -> list[dict[str, Any]]:
        exports = self._daemon.exporting.exports
        if not ids:
            return exports.records()
        records = []
        for migration in ids:
            if (export := exports.get(migration.bytes)) is not None:
                records.append(export.record)
                continue
            for direction in ("export", "import"):
                record = self._daemon.journal.migration(migration, direction)
                if record is not None and "started_at" in record:
                    records.append(record)
        return records

    def _history(self, client: Client, request: api.HistoryRequest, descriptors: list[int]) -> None:
        """Read beside the daemon, page by page as the client takes them."""
        journal, loop = self._daemon.journal, self._daemon.loop
        history = History(
            journal.path,
            since=request.since,
            until=request.until,
            outcomes=request.outcomes,
            direction=request.direction,
            batch_id=request.batch_id,
            host=request.host,
        )
        left = request.limit

        def fold() -> None:
            with client.answering(request):
                try:
                    if client.closed:
                        history.close()
                    elif journal.fold_some():
                        loop.call_soon(fold)
                    else:
                        read()
                except BaseException:
                    history.close()
                    raise

        def read() -> None:
            loop.run_in_executor(None, history.page, min(left, _ROWS_PER_LINE)).add_done_callback(send)

        def send(future: asyncio.Future[list[dict[str, Any]]]) -> None:
            nonlocal left
            more = False
            with client.answering(request):
                records = future.result()
                left -= len(records)
                more = len(records) == _ROWS_PER_LINE and left > 0 and not client.closed
                content = [whole_record(record) for record in records]
                client.respond({"id": request.id, "ok": True, "more": more, "fds": 0, "migrations": content})
            if more and not client.closed:
                client.when_read(read)
            else:
                history.close()

        fold()

    # -- acting

    def _drain(self, client: Client, request: api.DrainRequest, descriptors: list[int]) -> None:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        target = self._daemon.members.target(request.to)
        if client in self._drains:
            raise Refusal(Code.BAD_REQUEST, "This connection drains already; use another one.")

        def report(response: dict[str, Any]) -> None:
            client.respond(response)
            if not response["more"]:
                self._drains.pop(client, None)

        def fail(error: Exception) -> None:
            self._drains.pop(client, None)
            with client.answering(request):
                raise error

        def start(found: list[Found]) -> None:
            if not client.closed:
                drain.start(found)

        drain = Drain(self._daemon, request, target, report, fail)
        self._find_sockets(client, request, start, failed=lambda: self._drains.pop(client, None))
        self._drains[client] = drain

    def _groups(self, client: Client, request: api.GroupsRequest, descriptors: list[int]) -> None:
        changed = False
        if request.action is not api.GroupsAction.LIST:
            if not client.administrator:
                raise Refusal(
                    Code.NO_PRIVILEGE, "Joining and leaving are for administrators; run it as root."
                )
            changed = self._daemon.members.change(request)
        client.respond(api.GroupsResponse(id=request.id, groups=self._daemon.members.rows(), changed=changed))

    def _reload(self, client: Client, request: api.ReloadRequest, descriptors: list[int]) -> None:
        before = self._daemon.members.keyrings()
        try:
            changed, restart_needed = self._daemon.reload()
        except ConfigError as error:
            raise Refusal(Code.BAD_REQUEST, f"Not reloaded, the old settings stay: {error}") from None
        after = self._daemon.members.keyrings()
        changed += [f"groups.{name}.key_file" for name in after if after[name] != before[name]]
        client.respond(api.ReloadResponse(id=request.id, changed=changed, restart_needed=restart_needed))

    def _doctor(self, client: Client, request: api.DoctorRequest, descriptors: list[int]) -> None:
        def finish(future: asyncio.Future[list[api.Check]]) -> None:
            with client.answering(request):
                checks = [*examine(self._daemon), *future.result()]
                healthy = all(check.status is not api.CheckStatus.ERROR for check in checks)
                client.respond(api.DoctorResponse(id=request.id, healthy=healthy, checks=checks))

        # What takes its time, in a thread.
        modes, silent = self._daemon.config.redirect.modes, self._daemon.members.not_connected()
        self._daemon.loop.run_in_executor(None, examine_slowly, modes, silent).add_done_callback(finish)


def _taken_from(pid: int, fd: int) -> int:
    if pid == os.getpid():
        message = "That is this daemon's own descriptor; name one of the application's."
        raise Refusal(Code.OWNER_IS_DAEMON, message)
    return duplicate(pid, fd)


def _respond_records(
    client: Client,
    request_id: str | int | None,
    response: type[api.ExportResponse | api.InfoResponse | api.HistoryResponse],
    records: list[api.MigrationRecord],
) -> None:
    """As many lines as it takes: a line has its limit."""
    for start in range(0, max(1, len(records)), _ROWS_PER_LINE):
        more = start + _ROWS_PER_LINE < len(records)
        client.respond(response(id=request_id, more=more, migrations=records[start : start + _ROWS_PER_LINE]))


def _read_memfd(descriptor: int) -> bytes:
    """An application's context; it must be sealed, so that its size cannot change while it is read."""
    import fcntl

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


def _pages(rows: Sequence[T]) -> Iterator[list[T]]:
    return (list(rows[at : at + _ROWS_PER_LINE]) for at in range(0, len(rows), _ROWS_PER_LINE))


def _respond_pages(client: Client, request: api.ListRequest, table: str, pages: Iterator[list[Any]]) -> None:
    """One page a line, made and sent when the client has read the one before."""

    def send(rows: list[Any]) -> None:
        with client.answering(request):
            following = next(pages, None)
            response = api.ListResponse(id=request.id, more=following is not None)
            client.respond(response.model_copy(update={table: rows}))
            if following is not None:
                client.when_read(lambda: send(following))

    send(next(pages, []))


def _owners_verdict(found: Found, known: dict[int, Refusal | None]) -> Refusal | None:
    """What would keep the owners of a socket from being stopped; ``known``: of each process."""
    for holder in found.socket.holders:
        if holder.pid not in known:
            known[holder.pid] = obstacle_of(holder.pid, has_ring=holder.has_ring)
        if (refusal := known[holder.pid]) is not None:
            return refusal
    return None


def _row(found: Found, refusal: Refusal | None) -> api.SocketRow:
    listed, holder = found.socket, found.holder
    listening = listed.state == "LISTEN"
    return api.SocketRow(
        pid=holder.pid,
        fd=holder.fd,
        process=holder.name,
        unit=found.unit,
        user_id=listed.uid,
        inode=listed.inode,
        kind=kind_of(listed),
        state=listed.state,
        local=str(listed.local),
        remote=str(listed.remote) if listed.remote else None,
        receive_queue_bytes=0 if listening else listed.receive_queue,
        send_queue_bytes=0 if listening else listed.send_queue,
        movable=refusal is None,
        refusal=api.Why.of(refusal) if refusal else None,
    )
