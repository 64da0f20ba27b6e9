# SPDX-License-Identifier: MIT
"""A drain: every socket that a filter selects, moved at a rate, with progress."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import uuid4

from sockmi import api
from sockmi.engine.duplicate import duplicate
from sockmi.exporting import Selected
from sockmi.journal import Change
from sockmi.parts import Parts
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found, kind_of
from sockmi.shell import now_text, whole_record, why

_TIMEOUT_S = 60.0
_PROGRESS_INTERVAL_S = 0.2
_RATE_TICK_S = 0.1
_BATCH_MAX = 1024
_PLAN_MAX = 32768
_BATCH_NEXT = 256  # when so few are left of one, the next begins


class Drain:
    """Sockets go in batches: all at once, or as many each tick as the rate allows."""

    def __init__(
        self,
        daemon: Parts,
        request: api.DrainRequest,
        target: tuple[bytes | None, IPv4Address | IPv6Address | None],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._daemon = daemon
        self._request = request
        self._target = target
        self._report = report
        self._started = time.monotonic()
        self._left: list[Found] = []
        self._counts = dict.fromkeys(api.Outcome, 0)
        self._selected = 0
        self._under_way = 0
        self._news: list[dict[str, Any]] = []
        self._allowance = 0.0
        self._descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # half of them for one drain
        self._cancelled = False
        self._finished = False

    def start(self, found: list[Found]) -> None:
        """One socket may have many descriptors: it is moved once."""
        self._left = list({one.socket.inode: one for one in found}.values())
        self._selected = len(self._left)
        self._progress()
        self._next()

    def cancel(self) -> None:
        """Start nothing more; what is under way goes on."""
        self._cancelled = True
        self._left.clear()

    def _next(self) -> None:
        room = max(1, self._descriptors // 2 - self._under_way)
        if self._request.dry_run:
            take = _PLAN_MAX  # at once: nothing of the room that one batch finds is kept for the next
        elif self._request.rate_per_s is None:
            # Batches that run beside each other only lengthen each other's freezes.
            take = min(_BATCH_MAX, room) if self._under_way < min(_BATCH_NEXT, self._descriptors // 4) else 0
        else:
            self._allowance = min(self._allowance + self._request.rate_per_s * _RATE_TICK_S, _BATCH_MAX)
            take = min(int(self._allowance), room)
            self._allowance -= min(take, len(self._left))
        rows, self._left = self._left[:take], self._left[take:]
        if rows:
            self._send(rows)
        if self._left:
            self._daemon.loop.call_later(_RATE_TICK_S, self._next)
        self._check()

    def _send(self, rows: list[Found]) -> None:
        selection: list[Selected] = []
        for number, row in enumerate(rows):
            try:
                descriptor = duplicate(row.holder.pid, row.holder.fd)
            except Refusal as refusal:
                if refusal.code is Code.NO_DESCRIPTORS and (selection or self._under_way):
                    self._left[:0] = rows[number:]  # those that are under way give theirs back
                    break
                if refusal.code is Code.NO_SUCH_SOCKET:
                    # It has been closed since it was listed: nothing is left to move.
                    self._selected -= 1
                else:
                    self._refused(row, refusal)
                continue
            selection.append(Selected(descriptor, row.holder.pid, row.holder.fd))
        if not selection:
            return
        self._under_way += len(selection)
        self._daemon.exporting.export(
            selection,
            target=self._target,
            timeout_s=self._request.timeout_s or _TIMEOUT_S,
            dry_run=self._request.dry_run,
            done=lambda records: self._check(),
            progress=self._ended,
        )

    def _refused(self, row: Found, refusal: Refusal) -> None:
        """It could not even be taken: a record of its own, in the history too."""
        one, now, migration_id = row.socket, now_text(), uuid4()
        record: dict[str, Any] = {
            "migration_id": str(migration_id),
            "direction": "export",
            "kind": kind_of(one),
            "state": one.state,
            "local": str(one.local),
            "remote": str(one.remote) if one.remote else None,
            "from": self._daemon.host_name,
            "pid": row.holder.pid,
            "fd": row.holder.fd,
            "started_at": now,
            "ended_at": now,
            "outcome": api.Outcome.REFUSED,
            "refusal": why(refusal),
        }
        self._daemon.shell.note(Change(audit=[(migration_id, "export", record)]))
        self._under_way += 1
        self._ended(record)

    def _ended(self, record: dict[str, Any]) -> None:
        if record.get("listener") is None:
            self._under_way -= 1
        else:
            self._selected += 1
        self._counts[api.Outcome(record["outcome"])] += 1
        self._news.append(record)

    def _check(self) -> None:
        if self._left or self._under_way or self._finished:
            return
        self._finished = True
        self._say(more=False)

    def _progress(self) -> None:
        if not self._finished and not self._cancelled:
            self._say(more=True)
            self._daemon.loop.call_later(_PROGRESS_INTERVAL_S, self._progress)

    def _say(self, *, more: bool) -> None:
        elapsed_s = time.monotonic() - self._started
        news, self._news = self._news[:500], self._news[500:]
        if self._news and not more:
            self._daemon.loop.call_soon(lambda: self._say(more=False))
            more = True
        moved = self._counts[api.Outcome.MOVED]
        self._report(
            {
                "id": self._request.id,
                "ok": True,
                "more": more,
                "fds": 0,
                "progress": api.Progress(
                    selected=self._selected,
                    moved=moved,
                    refused=self._counts[api.Outcome.REFUSED],
                    aborted=self._counts[api.Outcome.ABORTED],
                    failed=self._counts[api.Outcome.FAILED],
                    planned=self._counts[api.Outcome.PLANNED],
                    remaining=len(self._left) + self._under_way,
                    elapsed_s=elapsed_s,
                    rate_per_s=moved / elapsed_s if elapsed_s else 0.0,
                ).model_dump(),
                "migrations": [whole_record(record) for record in news],
            }
        )
