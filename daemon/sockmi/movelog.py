# SPDX-License-Identifier: MIT
"""The log lines of migrations that have ended: written when there is time, not in a freeze."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from pydantic_core import from_json, to_json

_log = logging.getLogger("sockmi.moves")

_LINES_PER_TURN = 200
_WAITING_MAX = 10_000


_SAID = (
    "direction", "local", "remote", "from", "to", "outcome", "refusal", "migration_id", "step", "ended_at",
)  # fmt: skip


class MoveLog:
    """Records wait here until nothing is frozen; so many at most, then the oldest are written at once.

    What a line says of each waits as JSON: ten thousand whole records of a drain are 20 MB.
    """

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def append(self, record: dict[str, Any]) -> None:
        """A migration that has ended."""
        if _log.isEnabledFor(logging.INFO) or record["outcome"] == "failed":
            self._waiting.append(to_json({name: record[name] for name in _SAID if name in record}))

    def write(self, *, calm: bool) -> bool:
        """Write some lines: of all that wait if ``calm``, else of what is too much. True: call it again."""
        surplus = len(self._waiting) - (0 if calm else _WAITING_MAX)
        for _turn in range(min(surplus, _LINES_PER_TURN)):
            _write(from_json(self._waiting.popleft(), cache_strings="keys"))
        return surplus > _LINES_PER_TURN


def _write(record: dict[str, Any]) -> None:
    outcome, refusal = record["outcome"], record.get("refusal")
    local, remote = record.get("local") or "an unbound socket", record.get("remote")
    connection = f"{local} - {remote}" if remote else local
    way = (
        f"from {record['from']}" if record["direction"] == "import" else f"to {record.get('to') or 'nobody'}"
    )
    why = f": {refusal['code']}: {refusal['message']}" if refusal else ""
    _log.log(
        logging.ERROR if outcome == "failed" else logging.INFO,
        "%s of %s %s: %s%s",
        record["direction"],
        connection,
        way,
        outcome,
        why,
        extra={
            "migration_id": record["migration_id"],
            "connection": connection,
            "step": record.get("step", "selected"),
            "ended_at": record.get("ended_at"),
        },
    )
