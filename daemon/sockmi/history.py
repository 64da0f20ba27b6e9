# SPDX-License-Identifier: MIT
"""Reading the audit trail beside the daemon: page by page, in any thread, on a connection of its own."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from pydantic_core import from_json

from sockmi.shell import time_text


class History:
    """The ended migrations of a journal that match all that is given, latest first.

    ``since`` and ``until`` are of ``started_at``; ``host`` is either side. What was appended to the
    journal and not yet folded is not seen. Used by one thread at a time; sqlite3.Error if it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        outcomes: Sequence[str] | None = None,
        direction: str | None = None,
        batch_id: UUID | None = None,
        host: str | None = None,
    ) -> None:
        conditions = [
            ("direction = ?", [direction] if direction else None),
            # Records have their times in UTC, in a form that sorts as text.
            ("content ->> '$.started_at' >= ?", [time_text(since)] if since else None),
            ("content ->> '$.started_at' < ?", [time_text(until)] if until else None),
            ("content ->> '$.batch_id' = ?", [str(batch_id)] if batch_id else None),
            ("? IN (content ->> '$.from', content ->> '$.to')", [host] if host else None),
            (
                f"content ->> '$.outcome' IN ({','.join('?' * len(outcomes or ()))})",
                list(outcomes) if outcomes is not None else None,
            ),
            ("content ->> '$.started_at' IS NOT NULL", []),  # else only the end of it is known
        ]
        chosen = [(text, values) for text, values in conditions if values is not None]
        where = "".join(f" AND {text}" for text, _unused in chosen)
        self._values = [value for _unused, values in chosen for value in values]
        self._query = (
            f"SELECT sequence, content FROM migration WHERE open = 0 AND sequence < ?{where} "  # noqa: S608
            "ORDER BY sequence DESC LIMIT ?"
        )
        self._before = (1 << 63) - 1
        self._database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def page(self, most: int) -> list[dict[str, Any]]:
        """The next ``most`` records, or fewer: then it was the last page."""
        rows = self._database.execute(self._query, (self._before, *self._values, most)).fetchall()
        if rows:
            self._before = rows[-1][0]
        return [from_json(content, cache_strings="keys") for _unused, content in rows]

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
