# SPDX-License-Identifier: MIT
"""The requests `info` and `history`: records of migrations, under way and past."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID

from sockmi import api
from sockmi.control import Client
from sockmi.history import History
from sockmi.operations.answers import ROWS_PER_LINE, respond_records
from sockmi.parts import Parts
from sockmi.shell import whole_record

_LOOK_AGAIN_S = 0.02
_AT_ONCE = 64  # a look-up takes some tens of microseconds


class Records:
    """Reads the records of migrations for clients."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon

    def info(self, client: Client, request: api.InfoRequest, descriptors: list[int]) -> None:
        """Look up a few at a time, and again only those that are under way: there is other work."""
        deadline = time.monotonic() + request.wait_s
        known: dict[UUID, list[dict[str, Any]]] = {}

        def answer() -> None:
            records = [one for records in known.values() for one in records]
            if not request.migration_ids:
                records = self._daemon.exporting.exports.records()
                if any(one.get("outcome") is None for one in records) and again([]):
                    return
            respond_records(client, request.id, api.InfoResponse, [api.record_of(one) for one in records])

        def again(ids: list[UUID]) -> bool:
            if time.monotonic() >= deadline or client.closed:
                return False
            self._daemon.loop.call_later(_LOOK_AGAIN_S, look, ids, [])
            return True

        def look(ids: list[UUID], under_way: list[UUID]) -> None:
            with client.answering(request):
                for one in ids[:_AT_ONCE]:
                    known[one] = self._known(one)
                    if any(record.get("outcome") is None for record in known[one]):
                        under_way.append(one)
                if len(ids) > _AT_ONCE and not client.closed:
                    self._daemon.loop.call_soon(look, ids[_AT_ONCE:], under_way)
                elif not (under_way and again(under_way)):
                    answer()

        look(list(request.migration_ids), [])

    def _known(self, migration: UUID) -> list[dict[str, Any]]:
        if (export := self._daemon.exporting.exports.get(migration.bytes)) is not None:
            return [export.record]
        found = (self._daemon.journal.migration(migration, direction) for direction in ("export", "import"))
        return [record for record in found if record is not None and "started_at" in record]

    def history(self, client: Client, request: api.HistoryRequest, descriptors: list[int]) -> None:
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
            loop.run_in_executor(None, history.page, min(left, ROWS_PER_LINE)).add_done_callback(send)

        def send(future: asyncio.Future[list[dict[str, Any]]]) -> None:
            nonlocal left
            more = False
            with client.answering(request):
                records = future.result()
                left -= len(records)
                more = len(records) == ROWS_PER_LINE and left > 0 and not client.closed
                content = [whole_record(record) for record in records]
                client.respond({"id": request.id, "ok": True, "more": more, "fds": 0, "migrations": content})
            if more and not client.closed:
                client.when_read(read)
            else:
                history.close()

        fold()
