# SPDX-License-Identifier: MIT
"""A drain: every socket that a filter selects, moved at a rate, with progress.

What waits in the import lists goes too, after what processes have.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import uuid4

from sockmi import api
from sockmi.addresses import FourTuple
from sockmi.engine.base import Kind
from sockmi.engine.duplicate import duplicate
from sockmi.engine.listing import Holder
from sockmi.engine.owners import Holders, Scan, find_holders
from sockmi.exporting import Selected
from sockmi.exporting.descriptors import PASSED_ON
from sockmi.frozen import frozen
from sockmi.importing.copies import Copy
from sockmi.parts import Parts
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found, kind_of
from sockmi.shell import now_text, whole_record

_log = logging.getLogger(__name__)

_TIMEOUT_S = 60.0
_PROGRESS_INTERVAL_S = 0.2
_RATE_TICK_S = 0.1
_BATCH_MAX = 512  # what is under way takes some 4 KB each, on both hosts, which the heap keeps
_PLAN_MAX = 32768
_BATCH_NEXT = 192  # when so few are left of one, the next begins
_ADMINISTRATOR = 0
_ONLY_RING = Refusal(
    Code.OWNER_IO_URING,
    "Only an io_uring holds it by now, whose operations go on while its process is stopped; "
    "run the application without io_uring.",
)


@frozen
class _Lost:
    """A socket that no process has (exporting.descriptors.Findable)."""

    inode: int
    kind: Kind
    tuple: FourTuple | None

    @classmethod
    def of(cls, row: Found) -> _Lost:
        one = row.socket
        return cls(one.inode, kind_of(one), _tuple(row))


def _tuple(row: Found) -> FourTuple | None:
    one = row.socket
    return FourTuple(one.local, one.remote) if one.remote else None


class Drain:
    """Sockets go in batches: all at once, or as many each tick as the rate allows.

    A descriptor that is gone when its turn comes does not mean that the socket is: it may have been passed
    on. At the end the holders of such sockets are looked for once more; what neither a process nor the
    kernel has then has been closed.
    """

    def __init__(
        self,
        daemon: Parts,
        request: api.DrainRequest,
        target: tuple[bytes | None, IPv4Address | IPv6Address | None],
        report: Callable[[dict[str, Any]], None],
        fail: Callable[[Exception], None],
        *,
        logins: Collection[FourTuple] = (),
    ) -> None:
        """``report`` gets each line of the answer; ``fail`` what ends the drain instead.

        ``logins``: connections that stay, as who asks for the drain is logged in by them.
        """
        self._daemon = daemon
        self._request = request
        self._target = target
        self._report = report
        self._fail = fail
        self._logins = logins
        self._spared = 0
        self._started = time.monotonic()
        self._scan = Scan.now()  # before who holds the sockets was looked for
        self._left: list[list[Found] | Copy] = []
        self._missing: list[Found] = []
        self._looked_for: set[int] = set()
        self._looking = False
        self._tagged: set[str] = set()  # of those from import lists; what follows a listener has a tag too
        self._counts = dict.fromkeys(api.Outcome, 0)
        self._selected = 0
        self._closed = 0
        self._under_way = 0
        self._starved_since: float | None = None
        self._news: list[dict[str, Any]] = []
        self._allowance = 0.0
        self._descriptors, _unused = resource.getrlimit(resource.RLIMIT_NOFILE)  # half of them for one drain
        self._cancelled = False
        self._finished = False

    def start(self, found: list[Found], late: list[Copy]) -> None:
        """One socket may have many descriptors: it is moved once.

        ``late``: what is still on its way to an application; it is refused.
        """
        by_inode: dict[int, list[Found]] = {}
        for one in found:
            by_inode.setdefault(one.socket.inode, []).append(one)
        own = [inode for inode, rows in by_inode.items() if _tuple(rows[0]) in self._logins]
        self._spared = len(own)
        for inode in own:
            del by_inode[inode]
        listed = self._daemon.importing.onward.select(self._request.filter)
        self._left = [*by_inode.values(), *listed, *late]
        self._selected = len(self._left)
        self._progress()
        self._next()

    def cancel(self) -> None:
        """Start nothing more; what is under way goes on."""
        self._cancelled = True
        self._left.clear()
        self._missing.clear()

    def _next(self) -> None:
        if self._finished:
            return
        try:
            self._take_some()
            if self._left:
                self._daemon.loop.call_later(_RATE_TICK_S, self._next)
            self._check()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.cancel()
        self._finished = True
        self._fail(error)

    def _take_some(self) -> None:
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
        some, self._left = self._left[:take], self._left[take:]
        if some:
            self._send(some)

    def _remember(self, some: list[list[Found] | Copy]) -> None:
        """Who holds them; of all sockets at once that would be as much again as the list of them."""
        seen = [rows[0].socket for rows in some if not isinstance(rows, Copy)]
        holders = {one.inode: one.holders for one in seen if one.inode not in self._looked_for}
        self._daemon.shell.engine.owners.remember(
            self._scan,
            {inode: _by_process(held) for inode, held in holders.items()},
            {one.pid for held in holders.values() for one in held if one.has_ring},
        )

    def _send(self, some: list[list[Found] | Copy]) -> None:
        self._remember(some)
        selection: list[Selected] = []
        refused: list[tuple[Found, Refusal]] = []
        for index, rows in enumerate(some):
            if isinstance(rows, Copy):
                selection.append(self._waiting(rows))
                continue
            taken = _take(rows)
            if isinstance(taken, Selected):
                selection.append(taken)
            elif taken.code is Code.NO_DESCRIPTORS and self._may_wait(bool(selection)):
                self._left[:0] = some[index:]
                break
            elif taken.code is Code.NO_SUCH_SOCKET and rows[0].socket.inode not in self._looked_for:
                self._missing.append(rows[0])
            else:
                refused.append((rows[0], taken))
        self._refuse(refused)
        if not selection:
            return
        self._starved_since = None
        self._under_way += len(selection)
        self._daemon.exporting.admission.export(
            selection,
            target=self._target,
            timeout_s=self._request.timeout_s or _TIMEOUT_S,
            dry_run=self._request.dry_run,
            done=lambda records: self._check(),
            progress=self._over,
        )

    def _waiting(self, copy: Copy) -> Selected:
        """What no process has."""
        migration_id = uuid4()
        if copy.candidate.listener:
            self._tagged.add(str(migration_id))
        return Selected(-1, None, None, migration_id=migration_id, user_id=_ADMINISTRATOR, copy=copy)

    def _may_wait(self, others: bool) -> bool:
        """Whether descriptors will be free again; a plan is for all sockets together."""
        if self._request.dry_run:
            return False
        now = time.monotonic()
        if others or self._under_way or self._starved_since is None:
            self._starved_since = now
        return now - self._starved_since < (self._request.timeout_s or _TIMEOUT_S)

    def _refuse(self, refused: Sequence[tuple[Found, Refusal]]) -> None:
        records = [(self._record(row), refusal) for row, refusal in refused]
        if not records:
            return
        self._under_way += len(records)
        for record in self._daemon.exporting.exports.turn_away(records):
            self._ended(record)

    def _record(self, row: Found) -> dict[str, Any]:
        listed = row.socket
        return {
            "migration_id": str(uuid4()),
            "direction": "export",
            "kind": kind_of(listed),
            "state": listed.state,
            "local": str(listed.local),
            "remote": str(listed.remote) if listed.remote else None,
            "from": self._daemon.host_name,
            "user_id": _ADMINISTRATOR,
            "pid": row.holder.pid,
            "fd": row.holder.fd,
            "started_at": now_text(),
            "step": "selected",
        }

    def _over(self, record: dict[str, Any]) -> None:
        """It has moved, or has not; or it had ended, or its owner has closed it before that."""
        gone = (record.get("refusal") or {}).get("code") in (Code.NO_SUCH_SOCKET, Code.ENDED)
        if gone and self._was_selected(record):
            self._under_way -= 1
            self._closed += 1
        else:
            self._ended(record)

    def _ended(self, record: dict[str, Any]) -> None:
        if self._was_selected(record):
            self._under_way -= 1
        else:
            self._selected += 1
        self._counts[api.Outcome(record["outcome"])] += 1
        self._news.append(record)

    def _was_selected(self, record: dict[str, Any]) -> bool:
        """It, and not the listener that it follows."""
        return record.get("listener") is None or record["migration_id"] in self._tagged

    # -- what is not where it was

    def _look(self) -> None:
        """Who holds them now? In a thread: it looks through /proc."""
        missing, self._missing = self._missing, []
        self._looking = True
        inodes = {row.socket.inode for row in missing}
        self._looked_for |= inodes
        self._daemon.loop.run_in_executor(None, find_holders, inodes).add_done_callback(
            lambda future: self._looked(missing, future)
        )

    def _looked(self, missing: list[Found], future: Any) -> None:
        self._looking = False
        if self._finished or self._cancelled:
            return
        try:
            holders: Holders = future.result()[0]
        except Exception as error:
            self._give_up(error)
            return
        lost = [row for row in missing if row.socket.inode not in holders]
        alive = self._daemon.exporting.descriptors.passed_on([_Lost.of(row) for row in lost])
        passed_on = [row for row, lives in zip(lost, alive, strict=True) if lives]
        self._closed += len(lost) - len(passed_on)
        refused = [(row, PASSED_ON) for row in passed_on]
        for row in missing:
            now = _held_by(row, holders)
            if now:
                self._left.append(now)
            elif row.socket.inode in holders:
                refused.append((row, _ONLY_RING))
        self._refuse(refused)
        self._next()

    def _check(self) -> None:
        if self._left or self._under_way or self._looking or self._finished:
            return
        if self._missing:
            self._look()
            return
        self._finished = True
        self._say(more=False)

    # -- telling

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
                    closed=self._closed,
                    spared=self._spared,
                    remaining=len(self._left) + len(self._missing) + self._under_way,
                    elapsed_s=elapsed_s,
                    rate_per_s=moved / elapsed_s if elapsed_s else 0.0,
                ).model_dump(),
                "migrations": [whole_record(record) for record in news],
            }
        )


def _take(rows: list[Found]) -> Selected | Refusal:
    """A descriptor of ours for a socket, from whichever of its holders lets us have it."""
    refusals = []
    for row in rows:
        pid, fd = row.holder.pid, row.holder.fd
        try:
            descriptor = duplicate(pid, fd, row.socket.inode)
            received = row.socket.quiet.received if row.socket.quiet else None
            return Selected(descriptor, pid, fd, user_id=_ADMINISTRATOR, received=received)
        except Refusal as refusal:
            refusals.append(refusal)
            if refusal.code is Code.NO_DESCRIPTORS:
                return refusal
    return next((one for one in refusals if one.code is not Code.NO_SUCH_SOCKET), refusals[0])


def _by_process(holders: Sequence[Holder]) -> dict[int, list[int]]:
    """The descriptors of each process."""
    found: dict[int, list[int]] = {}
    for one in holders:
        found.setdefault(one.pid, []).append(one.fd)
    return found


def _held_by(row: Found, holders: Holders) -> list[Found]:
    """The rows of a socket that others hold by now."""
    held = holders.get(row.socket.inode, {})
    return [
        replace(row, holder=Holder(pid, fd, row.holder.name))
        for pid, descriptors in held.items()
        for fd in descriptors
        if fd >= 0
    ]
