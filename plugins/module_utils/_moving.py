# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sockets that are moved for a module, and how that is told; private to this collection."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

from ansible_collections.sockmi.appliance.plugins.module_utils._client import (
    ControlClient,
    ControlError,
)
from ansible_collections.sockmi.appliance.plugins.module_utils._sessions import (
    carries_login,
    own_inodes,
)

ANSWER_MARGIN_S = 15.0
RECONNECT_S = 10.0


class Mover:
    """A connection to the daemon, made when it is needed, and once more if the daemon goes away.

    ``timeout_s``: in which an importer must be found. ``trouble``: what broke the connection the last time.
    """

    def __init__(self, control: str | None, timeout_s: float, dry_run: bool) -> None:
        self.control = control
        self.timeout_s = timeout_s
        self.dry_run = dry_run
        self.trouble = ""
        self._client: ControlClient | None = None
        self._answered = False

    @property
    def client(self) -> ControlClient:
        """The connection; raises ControlError."""
        if self._client is None:
            self._client = self._connected()
        return self._client

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connected(self, wait_s: float = 0.0) -> ControlClient:
        return ControlClient.when_ready(self.control, self.timeout_s + ANSWER_MARGIN_S, wait_s)

    def listed(self, wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """A row for each socket that ``wanted`` selects but for this session's, and how many these are.

        Those that wait in the import lists are among them; those that have ended, or have moved and are not
        closed yet, are not.
        """
        ours = own_inodes()
        rows: dict[int, dict[str, Any]] = {}
        for row in [*self._sockets(wanted), *map(_waiting, self.client.imports(wanted))]:
            if (row.get("refusal") or {}).get("code") != "ended":
                rows.setdefault(row["inode"], row)  # one socket may have many descriptors
        others = [row for row in rows.values() if row["inode"] not in ours and not carries_login(row)]
        return others, len(rows) - len(others)

    def _sockets(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            found = self.client.sockets(wanted)
        except ControlError as error:
            if error.code or not self._answered:
                raise
            self.close()  # it was there before: it may have been restarted
            self._client = self._connected(RECONNECT_S)
            found = self._client.sockets(wanted)
        self._answered = True
        return found

    def move(self, sockets: list[dict[str, Any]], to: str | None) -> list[dict[str, Any] | None]:
        """Records in the order of ``sockets``; None: not begun, since the daemon went away.

        Then the next daemon is asked what became of them. Raises ControlError if there is none, or if the
        daemon refused the whole request.
        """
        for one in sockets:
            one.setdefault("migration_id", str(uuid.uuid4()))
        try:
            return list(self.client.export(sockets, to, self.timeout_s, self.dry_run))
        except ControlError as error:
            if error.code or self.dry_run:
                raise
            self.close()  # if it is only slow: what is not committed is undone
            self.trouble = error.message
            return self._outcomes([one["migration_id"] for one in sockets], error)

    def _outcomes(self, ids: list[str], error: ControlError) -> list[dict[str, Any] | None]:
        try:
            self._client = self._connected(RECONNECT_S)
            found = self._client.migrations(ids, self.timeout_s)
        except ControlError:
            raise error from None
        known = {one.get("migration_id"): one for one in found if one.get("direction") == "export"}
        return [known.get(one) for one in ids]


def named(row: dict[str, Any]) -> dict[str, Any]:
    """The socket of a row of the list, for an export: it, not what has its number by then."""
    if "listed" in row:
        return {"listed": row["listed"]}
    names = ("pid", "fd", "inode", "received_bytes")
    return {name: row[name] for name in names if row.get(name) is not None}


def _waiting(row: dict[str, Any]) -> dict[str, Any]:
    """What waits in an import list, as a row of sockets; of its own it has neither process nor inode."""
    listed = row["migration_id"]
    number = -uuid.UUID(listed).int % (1 << 62)  # no inode is as large
    return {**row, "listed": listed, "inode": (1 << 62) + number, "pid": None, "fd": None, "movable": True}


def code_of(record: dict[str, Any]) -> str:
    """Why it was not moved: a refusal code, or ""."""
    return (record.get("refusal") or {}).get("code") or ""


def reasons(records: Iterable[dict[str, Any]]) -> str:
    """Why some of ``records`` did not move: each code, how many, and a sentence."""
    found: dict[str, list[str]] = {}
    for one in records:
        if one.get("outcome") not in ("planned", "moved"):
            message = (one.get("refusal") or {}).get("message") or "See the daemon's log."
            found.setdefault(code_of(one) or one.get("outcome") or "still under way", []).append(message)
    return " ".join(f"{code} ({len(all_)}): {all_[0]}" for code, all_ in sorted(found.items()))


def diff(records: Iterable[dict[str, Any]], moving: Iterable[dict[str, Any]], target: str) -> dict[str, str]:
    """For ``--diff``: the host of each socket before and after.

    ``moving``: those of ``records`` that go; ``target``: where to, if their records do not say.
    """
    records = list(records)
    going = {id(one) for one in moving}

    def hosts(host_of: Callable[[dict[str, Any]], Any]) -> str:
        return "".join(
            f"{one.get('local')} - {one.get('remote') or one.get('kind')}: {host_of(one)}\n"
            for one in records
        )

    return {
        "before_header": "host of each socket",
        "after_header": "host of each socket",
        "before": hosts(lambda one: one.get("from")),
        "after": hosts(lambda one: (one.get("to") or target) if id(one) in going else one.get("from")),
    }
