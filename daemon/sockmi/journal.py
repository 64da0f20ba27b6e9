# SPDX-License-Identifier: MIT
"""The journal: what became of every migration, and what must be resumed after a restart.

A write appends one change for a whole chunk to a file (appendlog.py); it reaches the page cache before
the call returns, so it survives the daemon. The kernel writes it to the disk in the background: a host
that loses power has lost its sockets anyway, and the audit trail may then lack its last half minute.
``fold`` turns what was appended into indexed rows of SQLite (WAL mode), when there is time for it: those
cost ten times as much, and appending stands in the freeze. How far it has come is in the same transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic_core import from_json, to_json

from sockmi.appendlog import AppendLog, Mark

_SCHEMA_VERSION = 2  # 1 had what was appended in a table, `event`
_MARK = "folded"  # in `state`: GENERATION:OFFSET of the appended changes
_FOLD_ROWS = 128  # at once: what a drain of thousands has appended need not all be in memory
_FOLD_BYTES = 1 << 19  # nor may it keep the daemon from all else
_CACHE_KIB = 256  # SQLite's own 2 MB would fill with rows that are written once; the kernel has them too
_SCHEMA = """
CREATE TABLE record (               -- what must be resumed after a restart
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    content TEXT NOT NULL,          -- JSON
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE migration (            -- the audit trail
    sequence INTEGER PRIMARY KEY,   -- order of first writing
    migration_id BLOB NOT NULL,
    direction TEXT NOT NULL,        -- export | import
    open INTEGER NOT NULL,          -- 1: no outcome yet
    updated_at REAL NOT NULL,       -- unix time, s
    content TEXT NOT NULL           -- JSON: a migration record (docs/control.md)
);
CREATE UNIQUE INDEX migration_by_id ON migration (migration_id, direction);
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

# News that begin a migration replace what was there; others add to it. See ``_supersede``.
_UPSERT = """
INSERT INTO migration (migration_id, direction, open, updated_at, content) VALUES (?,?,?,?,?)
ON CONFLICT (migration_id, direction) DO UPDATE SET
    open=iif(excluded.content ->> '$.started_at' IS NULL, min(open, excluded.open), excluded.open),
    updated_at=excluded.updated_at,
    content=iif(excluded.content ->> '$.started_at' IS NULL,
        json_patch(content, excluded.content), excluded.content)
WHERE coalesce(content ->> '$.outcome', '') NOT IN ('moved', 'failed')
    OR (content ->> '$.outcome' = 'failed' AND excluded.content ->> '$.outcome' IN ('moved', 'failed'))
    OR excluded.content ->> '$.outcome' = 'moved'
"""
plain = str.__str__
"""A string that is no enum member: to write one of those as JSON takes ten times as long."""

_RANKS = {"moved": 2, "failed": 1}  # what cannot be taken back; the others are tried again


class Record(StrEnum):
    """What must be resumed; the content of each is written and read by `sockmi.durable`."""

    DECISION = "decision"
    ROUTE = "route"
    NOTICE = "notice"
    PREPARED = "prepared"
    HOLDING = "holding"
    ORIGINALS = "originals"  # the sockets that a decision closes
    LISTED = "listed"  # ours, but no application has it yet
    QUEUE = "queue"  # connections of a listener that has moved, in a keeper's hands


class JournalError(Exception):
    """The journal cannot be used; the text says why and what to do."""


@dataclass(slots=True)
class Change:
    """One transaction: records to keep, records to drop, news for the audit trail.

    ``audit``: (migration id, direction, fields of its migration record that are new or differ). With
    ``started_at`` they are a whole record, which takes the place of an earlier one of the same id; but
    ``moved`` is never overwritten, nor ``failed`` but by ``moved``.
    """

    keep: list[tuple[Record, str, Any]] = field(default_factory=list)
    drop: list[tuple[Record, str]] = field(default_factory=list)
    audit: list[tuple[UUID, str, dict[str, Any]]] = field(default_factory=list)


class Journal:
    """All calls are synchronous and short; use it from one thread."""

    def __init__(self, path: Path) -> None:
        """Open or create; raise JournalError if the file is damaged or from a newer release."""
        self.path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        events = path.with_name(f"{path.name}-events")
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                events.unlink(missing_ok=True)  # of another database, which was moved away
                self._database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={_SCHEMA_VERSION};COMMIT")
            if version <= _SCHEMA_VERSION:
                for table in ("record", "migration", "state"):
                    self._database.execute(f"SELECT 1 FROM {table} LIMIT 1")  # noqa: S608
            if version == 1:
                self._upgrade()
        except sqlite3.Error as error:
            raise JournalError(
                f"{path}: {error}; if it is damaged, move it away while no migrated connection depends on it"
            ) from error
        if version > _SCHEMA_VERSION:
            raise JournalError(f"{path}: written by a newer release (schema {version}); upgrade this daemon")
        path.chmod(0o600)
        try:
            self._events = AppendLog(events, self._mark())
        except (OSError, ValueError) as error:
            raise JournalError(
                f"{events}: {error}; if it is damaged, move it away while no migrated connection needs it"
            ) from error

    def close(self) -> None:
        """Checkpoint and close."""
        self._database.close()
        self._events.close()

    def write(self, change: Change) -> None:
        """Append one transaction; when the call returns it survives the daemon. OSError: a full disk, say."""
        content = {
            "at": time.time(),
            "keep": [(plain(kind), name, content) for kind, name, content in change.keep],
            "drop": [(plain(kind), name) for kind, name in change.drop],
            "audit": [(migration.hex, direction, news) for migration, direction, news in change.audit],
        }
        self._events.append(to_json(content))

    def fold(self) -> int:
        """Turn all that was appended into indexed rows; returns how many changes were appended."""
        folded = 0
        while rows := self.fold_some():
            folded += rows
        return folded

    def fold_some(self) -> int:
        """As ``fold``, but no more than takes some ten milliseconds; 0: none are left."""
        records: dict[tuple[str, str], Any] = {}
        audit: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
        rows = size = 0
        mark = self._events.mark
        for content, mark in self._events.waiting():  # noqa: B007 - used when it has ended
            _merge(_read(content), records, audit)
            rows, size = rows + 1, size + len(content)
            if rows >= _FOLD_ROWS or size >= _FOLD_BYTES:
                break
        if rows:
            with self._transaction():
                self._apply(records, audit)
                self.set_state(_MARK, f"{mark.generation}:{mark.offset}")
            self._events.take(mark)
        return rows

    def records(self, kind: Record) -> dict[str, Any]:
        """Everything of one kind, by name."""
        return dict(self.each(kind))

    def each(self, kind: Record) -> Iterator[tuple[str, Any]]:
        """The same, name and content, one after the other."""
        self.fold()
        rows = self._database.execute("SELECT name, content FROM record WHERE kind=?", (kind,))
        for name, content in rows:
            yield name, _read(content)

    def migration(self, migration_id: UUID, direction: str) -> dict[str, Any] | None:
        """One migration record, or None."""
        self.fold()
        row = self._database.execute(
            "SELECT content FROM migration WHERE migration_id=? AND direction=?",
            (migration_id.bytes, direction),
        ).fetchone()
        return _read(row[0]) if row else None

    def history(self, *, is_open: bool = False) -> Iterator[dict[str, Any]]:
        """Migration records that have an outcome (or not yet), newest first."""
        self.fold()
        rows = self._database.execute(
            "SELECT content FROM migration WHERE open=? ORDER BY sequence DESC", (is_open,)
        )
        for (content,) in rows:
            yield _read(content)

    def prune(self, keep: int, most: int = -1) -> int:
        """Of all but the latest ``keep`` migrations forget what has an outcome; returns how many went.

        ``most``: no more than so many of the oldest; call again. What is open is not forgotten.
        """
        self.fold()
        cursor = self._database.execute(
            "DELETE FROM migration WHERE sequence IN (SELECT sequence FROM migration WHERE open=0 "
            "AND sequence <= (SELECT max(sequence) FROM migration) - ? ORDER BY sequence LIMIT ?)",
            (keep, most),
        )
        return cursor.rowcount

    def state(self, name: str) -> str | None:
        """A value that outlives the daemon, or None."""
        row = self._database.execute("SELECT value FROM state WHERE name=?", (name,)).fetchone()
        return row[0] if row else None

    def set_state(self, name: str, value: str) -> None:
        """Keep a value across restarts."""
        self._database.execute("INSERT OR REPLACE INTO state VALUES (?,?)", (name, value))

    def _mark(self) -> Mark:
        """How far the appended changes are folded; before the first of them: nothing of any generation."""
        generation, _unused, offset = (self.state(_MARK) or "0:0").partition(":")
        return Mark(int(generation), int(offset))

    def _upgrade(self) -> None:
        """From schema 1: fold what is in its table."""
        records: dict[tuple[str, str], Any] = {}
        audit: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
        for (content,) in self._database.execute("SELECT content FROM event ORDER BY sequence"):
            _merge(_read(content), records, audit)
        with self._transaction():
            self._apply(records, audit)
            self._database.execute("DROP TABLE event")
            self._database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")

    def _apply(
        self,
        records: dict[tuple[str, str], Any],
        audit: dict[tuple[str, str], tuple[float, dict[str, Any]]],
    ) -> None:
        """What appended changes come to; applying it twice gives the same as once."""
        self._database.executemany(
            "INSERT OR REPLACE INTO record VALUES (?,?,?)",
            [(*place, to_json(one).decode()) for place, one in records.items() if one is not None],
        )
        self._database.executemany(
            "DELETE FROM record WHERE kind=? AND name=?",
            [place for place, one in records.items() if one is None],
        )
        self._database.executemany(
            _UPSERT,
            [
                (bytes.fromhex(migration), direction, news.get("outcome") is None, at, to_json(news).decode())
                for (migration, direction), (at, news) in audit.items()
            ],
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _read(content: str | bytes) -> Any:
    """Ids and times come once: pydantic would keep 16,384 such strings for good, in case they come again."""
    return from_json(content, cache_strings="keys")


def _merge(
    content: dict[str, Any],
    records: dict[tuple[str, str], Any],
    audit: dict[tuple[str, str], tuple[float, dict[str, Any]]],
) -> None:
    """Add an appended change to what came before it: the last word counts. A dropped record is None."""
    for kind, name, record in content["keep"]:
        records[kind, name] = record
    for kind, name in content["drop"]:
        records[kind, name] = None
    for migration, direction, news in content["audit"]:
        _unused, before = audit.get((migration, direction), (0.0, {}))
        audit[migration, direction] = (content["at"], _supersede(before, news))


def _supersede(before: dict[str, Any], news: dict[str, Any]) -> dict[str, Any]:
    """As _UPSERT has it: what is final stays, whole records replace, others add."""
    if _RANKS.get(news.get("outcome", ""), 0) < _RANKS.get(before.get("outcome", ""), 0):
        return before
    return news if "started_at" in news else before | news
