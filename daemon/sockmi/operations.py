# SPDX-License-Identifier: MIT
"""The control socket's requests, each carried out by the part that it concerns (docs/control.md)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from sockmi import api
from sockmi.config import ConfigError
from sockmi.control import Client
from sockmi.doctor import examine
from sockmi.draining import Drain
from sockmi.engine.base import Kind
from sockmi.engine.duplicate import duplicate
from sockmi.engine.listing import Holder
from sockmi.exporting import Selected
from sockmi.parts import Parts
from sockmi.permission import Caller
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found, check_filter, kind_of, select
from sockmi.shell import close_all, inbound, outbound

_log = logging.getLogger(__name__)

_ROWS_PER_LINE = 200
_HISTORY_PAGE = 100  # records looked at in one turn of the loop: some milliseconds
_EXPORT_TIMEOUT_S = 30.0


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
        except BaseException:
            close_all(descriptors)
            raise

    def gone(self, client: Client) -> None:
        """See control.Handler."""
        self._daemon.importing.gone(client)
        if (drain := self._drains.pop(client, None)) is not None:
            drain.cancel()
        if (batch := self._exports.pop(client, None)) is not None:
            self._daemon.exporting.cancel(batch)

    # -- export

    def _export(self, client: Client, request: api.ExportRequest, descriptors: list[int]) -> None:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        done_before = self._already_done(request)
        if done_before is not None:
            close_all(descriptors)
            _respond_records(client, request.id, api.ExportResponse, done_before)
            return
        target = self._daemon.members.target(request.to)
        selection = self._select(client, request, descriptors)

        def done(records: list[dict[str, Any]]) -> None:
            self._exports.pop(client, None)
            # In the order of the request; what follows a listener is in the history, tagged with it.
            going = iter(records)
            asked = [
                api.record_of(next(going)) if isinstance(one, Selected) else self._refused(item, one)
                for item, one in zip(request.sockets, selection, strict=True)
            ]
            _respond_records(client, request.id, api.ExportResponse, asked)

        batch = self._daemon.exporting.export(
            [one for one in selection if isinstance(one, Selected)],
            target=target,
            timeout_s=request.timeout_s or _EXPORT_TIMEOUT_S,
            dry_run=request.dry_run,
            done=done,
        )
        if self._daemon.exporting.is_open(batch):
            self._exports[client] = batch

    def _already_done(self, request: api.ExportRequest) -> list[api.MigrationRecord] | None:
        """Asked again under the same migration ids: the records, if all of them have moved."""
        ids = [item.migration_id for item in request.sockets]
        if None in ids:
            return None
        records = [
            self._daemon.journal.migration(migration, "export") for migration in ids if migration is not None
        ]
        if all(record is not None and record.get("outcome") == "moved" for record in records):
            return [api.record_of(record) for record in records if record is not None]
        return None

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
        self, client: Client, request: api.ExportRequest, descriptors: list[int]
    ) -> list[Selected | Refusal]:
        """Pair items with their descriptors; the daemon takes only what an administrator names.

        A socket that cannot be taken is refused alone.
        """
        caller = None if client.administrator else Caller(client.pid, client.uid)
        remaining = iter(list(descriptors))
        selection: list[Selected | Refusal] = []
        taken: list[int] = []
        try:
            for item in request.sockets:
                if item.descriptor:
                    descriptor = next(remaining)
                elif client.administrator:
                    assert item.pid is not None and item.fd is not None
                    try:
                        descriptor = _taken_from(item.pid, item.fd)
                    except Refusal as refusal:
                        selection.append(refusal)
                        continue
                    taken.append(descriptor)
                else:
                    raise Refusal(
                        Code.NO_PRIVILEGE,
                        "Only administrators may name a socket by pid and fd alone; pass its descriptor.",
                    )
                selection.append(
                    Selected(descriptor, item.pid or client.pid, item.fd, caller, None, item.migration_id)
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
        close_all([one for one in descriptors if one not in kept])
        return selection

    # -- import

    def _import(self, client: Client, request: api.ImportRequest, descriptors: list[int]) -> None:
        self._daemon.importing.wait(client, request)

    def _taken(self, client: Client, request: api.TakenRequest, descriptors: list[int]) -> None:
        self._daemon.importing.taken(client, request)

    # -- reading

    def _list(self, client: Client, request: api.ListRequest, descriptors: list[int]) -> None:
        if request.table is api.Table.SOCKETS:
            self.find_sockets(
                request.filter,
                lambda found: _respond_rows(client, request.id, "sockets", self._socket_rows(found)),
                only_uid=None if client.administrator else client.uid,
            )
        elif request.table is api.Table.IMPORTS:
            _respond_rows(client, request.id, "imports", self._import_rows())
        else:
            _respond_rows(client, request.id, "redirects", self._redirect_rows())

    def find_sockets(
        self,
        wanted: api.SocketFilter,
        found: Callable[[list[Found]], None],
        *,
        only_uid: int | None = None,
    ) -> None:
        """Look for this host's sockets, in a thread: it looks through /proc."""
        check_filter(wanted)
        future = self._daemon.loop.run_in_executor(None, select, wanted, only_uid)
        future.add_done_callback(lambda one: found(one.result()))

    def _socket_rows(self, found: list[Found]) -> list[api.SocketRow]:
        rows: list[api.SocketRow] = []
        for start in range(0, len(found), _ROWS_PER_LINE):
            some = found[start : start + _ROWS_PER_LINE]
            verdicts = self._verdicts([one.holder for one in some])
            rows += [_row(one, verdict) for one, verdict in zip(some, verdicts, strict=True)]
        return rows

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
        for candidate in self._daemon.importing.lists.listed():
            copy = self._daemon.importing.copies[candidate.migration_id.bytes]
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
        lists = daemon.importing.lists
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
            records = self._known(request.migration_ids)
            waiting = any(record.get("outcome") is None for record in records)
            if waiting and time.monotonic() < deadline and not client.closed:
                self._daemon.loop.call_later(0.02, answer)
                return
            _respond_records(client, request.id, api.InfoResponse, [api.record_of(one) for one in records])

        answer()

    def _known(self, ids: list[UUID]) -> list[dict[str, Any]]:
        exports = self._daemon.exporting.exports
        if not ids:
            return [export.record for export in exports.values()]
        records = []
        for migration in ids:
            if (export := exports.get(migration.bytes)) is not None:
                records.append(export.record)
                continue
            for direction in ("export", "import"):
                if (record := self._daemon.journal.migration(migration, direction)) is not None:
                    records.append(record)
        return records

    def _history(self, client: Client, request: api.HistoryRequest, descriptors: list[int]) -> None:
        chosen: list[api.MigrationRecord] = []

        def look(before: int | None) -> None:
            """One page each turn of the loop: a long history must not keep the daemon from its work."""
            if client.closed:
                return
            try:
                page = self._daemon.journal.history_page(before, _HISTORY_PAGE)
                for _, content in page:
                    record = api.record_of(content)
                    if len(chosen) < request.limit and _in_history(request, record):
                        chosen.append(record)
            except Exception as error:
                _log.exception("reading the history")
                message = f"The journal cannot be read ({error}); see the daemon's log."
                client.refuse(request.id, Refusal(Code.INTERNAL, message))
                return
            if len(page) < _HISTORY_PAGE or len(chosen) == request.limit:
                _respond_records(client, request.id, api.HistoryResponse, chosen)
            else:
                self._daemon.loop.call_soon(look, page[-1][0])

        look(None)

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

        drain = Drain(self._daemon, request, target, report)
        self._drains[client] = drain
        self.find_sockets(request.filter, drain.start)

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
        checks = examine(self._daemon)
        healthy = all(check.status is not api.CheckStatus.ERROR for check in checks)
        client.respond(api.DoctorResponse(id=request.id, healthy=healthy, checks=checks))


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


def _respond_rows(client: Client, request_id: str | int | None, table: str, rows: list[Any]) -> None:
    for start in range(0, max(1, len(rows)), _ROWS_PER_LINE):
        more = start + _ROWS_PER_LINE < len(rows)
        response = api.ListResponse(id=request_id, more=more)
        client.respond(response.model_copy(update={table: rows[start : start + _ROWS_PER_LINE]}))


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


def _in_history(request: api.HistoryRequest, record: api.MigrationRecord) -> bool:
    started: datetime = record.started_at
    return (
        (request.since is None or started >= request.since)
        and (request.until is None or started < request.until)
        and (request.outcomes is None or record.outcome in request.outcomes)
        and request.direction in (None, record.direction)
        and request.batch_id in (None, record.batch_id)
        and request.host in (None, record.from_, record.to)
    )
