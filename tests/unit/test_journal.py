# SPDX-License-Identifier: MIT
"""The journal outlives its daemon, writes all or nothing, and forgets only what has an outcome."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from sockmi.journal import Change, Journal, JournalError, Record


def audit(outcome: str | None = None, **news: object) -> tuple[UUID, str, dict[str, object]]:
    return (uuid4(), "export", {"pid": 7, **({"outcome": outcome} if outcome else {}), **news})


def test_what_was_written_comes_back_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.db"
    journal = Journal(path)
    migration, _unused, _unused = first = audit(local="192.0.2.1:80")
    journal.write(Change(keep=[(Record.ROUTE, "r1", {"hop": 1}), (Record.ROUTE, "r2", [2])], audit=[first]))
    journal.write(Change(keep=[(Record.ROUTE, "r2", [3])], drop=[(Record.ROUTE, "r1"), (Record.ROUTE, "r9")]))
    journal.write(Change(audit=[(migration, "export", {"outcome": "moved", "blackout_us": 900})]))
    journal.set_state("host", "x")
    journal.close()
    again = Journal(path)
    assert again.state("host") == "x"
    assert again.state("nothing") is None
    assert again.records(Record.ROUTE) == {"r2": [3]}
    assert again.records(Record.HOLDING) == {}
    moved = {"pid": 7, "local": "192.0.2.1:80", "outcome": "moved", "blackout_us": 900}
    assert again.migration(migration, "export") == moved
    assert again.migration(migration, "import") is None
    assert list(again.history()) == [moved]
    assert list(again.history(is_open=True)) == []
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failing_write_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(ValueError, match="serialize"):
        journal.write(Change(keep=[(Record.ROUTE, "a", 1), (Record.ROUTE, "b", object())]))
    assert journal.records(Record.ROUTE) == {}


def test_prune_keeps_what_is_open_and_the_latest(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.write(Change(audit=[audit() for _turn in range(5)]))
    journal.write(Change(audit=[audit("moved", n=n) for n in range(20)]))
    assert journal.prune(keep=3) == 17
    assert [one["n"] for one in journal.history()] == [19, 18, 17]
    assert len(list(journal.history(is_open=True))) == 5


def test_prune_goes_bit_by_bit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    journal.write(Change(audit=[audit("moved", n=n) for n in range(20)]))
    assert [journal.prune(3, 10) for _turn in range(3)] == [10, 7, 0]
    assert [one["n"] for one in journal.history()] == [19, 18, 17]


def whole(**news: object) -> dict[str, object]:
    return {"started_at": "2026-11-23T12:00:00.000Z", **news}


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    ("first", "then", "stays"),
    [
        ({"outcome": "moved"}, whole(pid=9), {"outcome": "moved"}),
        ({"outcome": "moved"}, {"outcome": "refused"}, {"outcome": "moved"}),
        ({"outcome": "moved"}, whole(outcome="refused"), {"outcome": "moved"}),
        ({"outcome": "moved"}, {"outcome": "failed"}, {"outcome": "moved"}),
        ({"outcome": "moved"}, {"outcome": "moved", "hop": 2}, {"outcome": "moved", "hop": 2}),
        ({"outcome": "failed"}, {"outcome": "aborted"}, {"outcome": "failed"}),
        ({"outcome": "failed"}, whole(pid=9), {"outcome": "failed"}),
        ({"outcome": "failed"}, {"outcome": "moved"}, {"outcome": "moved"}),
        # What was refused is tried again: nothing of the first time is left in the record.
        ({"outcome": "refused", "refusal": {"code": "x"}}, whole(pid=9), whole(pid=9)),
        ({"outcome": "refused", "refusal": {"code": "x"}}, whole(outcome="moved"), whole(outcome="moved")),
        ({"step": "frozen"}, {"outcome": "aborted"}, {"step": "frozen", "outcome": "aborted"}),
    ],
)
def test_an_outcome_is_not_overwritten_by_a_lesser_one(
    tmp_path: Path, first: dict[str, object], then: dict[str, object], stays: dict[str, object], folded: bool
) -> None:
    journal = Journal(tmp_path / "journal.db")
    migration = uuid4()
    journal.write(Change(audit=[(migration, "export", first)]))
    if folded:
        journal.fold()
    journal.write(Change(audit=[(migration, "export", then)]))
    assert journal.migration(migration, "export") == stays
    assert len(list(journal.history(is_open=True))) == ("outcome" not in stays)


def test_what_was_written_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    program = (
        "import os,signal;from pathlib import Path;from sockmi.journal import *;"
        f"j=Journal(Path({str(path)!r}));"
        "[j.write(Change(keep=[(Record.DECISION,str(n),n)])) for n in range(9)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], check=False, timeout=30, env=environment)
    assert run.returncode == -signal.SIGKILL
    assert len(Journal(path).records(Record.DECISION)) == 9


def test_damaged_and_newer_journals_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not a database" * 100)
    with pytest.raises(JournalError, match=r"damaged\.db"):
        Journal(damaged)
    path = tmp_path / "newer.db"
    journal = Journal(path)
    journal._database.execute("PRAGMA user_version=99")
    journal.close()
    with pytest.raises(JournalError, match="newer release"):
        Journal(path)


@pytest.mark.parametrize("folded", [False, True])
def test_what_has_moved_stays_moved(tmp_path: Path, folded: bool) -> None:
    """A second try under the same id, which finds nothing left to move, does not change the record."""
    journal = Journal(tmp_path / "journal.db")
    migration, _unused, _unused = first = audit("moved", to="b")
    journal.write(Change(audit=[first]))
    if folded:
        journal.fold()
    journal.write(Change(audit=[(migration, "export", {"pid": 9, "outcome": "refused", "to": None})]))
    assert journal.migration(migration, "export") == {"pid": 7, "outcome": "moved", "to": "b"}
    refused, _unused, _unused = second = audit("refused")
    journal.write(Change(audit=[second, (refused, "export", {"outcome": "moved"})]))
    assert journal.migration(refused, "export") == {"pid": 7, "outcome": "moved"}


def test_what_an_earlier_release_has_appended_is_folded(tmp_path: Path) -> None:
    """Schema 1 had a table for it."""
    path = tmp_path / "journal.db"
    Journal(path).close()
    (tmp_path / "journal.db-events").unlink()
    migration = uuid4()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("CREATE TABLE event (sequence INTEGER PRIMARY KEY, content TEXT NOT NULL)")
        database.execute("PRAGMA user_version=1")
        for content in (
            {"at": 1.0, "keep": [["route", "r1", 1], ["route", "r2", 2]], "drop": [], "audit": []},
            {
                "at": 2.0,
                "keep": [],
                "drop": [["route", "r1"]],
                "audit": [[migration.hex, "export", {"pid": 7}]],
            },
        ):
            database.execute("INSERT INTO event (content) VALUES (?)", (json.dumps(content),))
    journal = Journal(path)
    assert journal.records(Record.ROUTE) == {"r2": 2}
    assert journal.migration(migration, "export") == {"pid": 7}
    journal.close()
    assert Journal(path).records(Record.ROUTE) == {"r2": 2}


def test_what_was_appended_to_another_journal_is_not_taken_in(tmp_path: Path) -> None:
    """Somebody has moved the database away, but not what stands beside it."""
    path = tmp_path / "journal.db"
    journal = Journal(path)
    journal.write(Change(keep=[(Record.ROUTE, "r1", 1)]))
    journal.close()
    path.rename(tmp_path / "away")
    assert Journal(path).records(Record.ROUTE) == {}


def test_appended_changes_that_are_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path).close()
    (tmp_path / "journal.db-events").write_bytes(b"something else altogether")
    with pytest.raises(
        JournalError, match=r"journal\.db-events: not a file of appended records; .* move it away"
    ):
        Journal(path)


def test_the_file_of_changes_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    for n in range(40):
        journal.write(Change(keep=[(Record.ROUTE, "r", [n, "x" * 100_000])]))
        journal.fold()
    assert (tmp_path / "journal.db-events").stat().st_size < 2 << 20
    journal.write(Change(keep=[(Record.ROUTE, "r", 7)]))
    journal.close()
    assert Journal(path).records(Record.ROUTE) == {"r": 7}
