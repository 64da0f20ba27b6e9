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


class Records:
    """Reads the records of migrations for clients."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon

    def info(self, client: Client, request: api.InfoRequest, descriptors: list[int]) -> None:
        deadline = time.monotonic() + request.wait_s

        def answer() -> None:
            with client.answering(request):
                records = self._known(request.migration_ids)
                waiting = any(record.get("outcome") is None for record in records)
                if waiting and time.monotonic() < deadline and not client.closed:
                    self._daemon.loop.call_later(_LOOK_AGAIN_S, answer)
                    return
                found = [api.record_of(one) for one in records]
                respond_records(client, request.id, api.InfoResponse, found)

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
