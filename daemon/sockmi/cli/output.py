# SPDX-License-Identifier: MIT
"""Tables for people, JSON for programs, a progress bar for those who wait."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, TextIO


def print_json(content: Any) -> None:
    """One JSON document on standard output."""
    json.dump(content, sys.stdout, indent=2)
    print()


def print_json_line(content: Any, file: TextIO) -> None:
    """One JSON document on one line, at once: for what comes one by one."""
    print(json.dumps(content), file=file, flush=True)


def nobody_reads(file: TextIO) -> None:
    """What is printed there from now on is lost; the interpreter does not complain of it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, file.fileno())
    os.close(nothing)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as they need be; numbers to the right. Empty cells show as ``-``."""
    texts = [["-" if cell is None or cell == "" else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[n]) for line in [list(columns), *texts]) for n in range(len(columns))]
    right = [
        bool(rows) and all(isinstance(row[n], int | float | None) for row in rows)
        for n in range(len(columns))
    ]

    def show(cells: Sequence[str]) -> None:
        padded = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(cells, widths, right, strict=True)
        ]
        print("  ".join(padded).rstrip())

    show([column.upper() for column in columns])
    for line in texts:
        show(line)


class ProgressBar:
    """One line on standard error that is drawn again; nothing if that is not a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._drawn = False

    def show(self, progress: dict[str, Any]) -> None:
        """Draw the state of a drain."""
        if not self._shown:
            return
        self._drawn = True
        total = max(1, progress["selected"])
        done = progress["selected"] - progress["remaining"]
        failed = progress["refused"] + progress["aborted"] + progress["failed"]
        counts = f"moved {progress['moved'] + progress['planned']}  not moved {failed}"
        words = f" {done}/{total}  {counts}  {progress['rate_per_s']:.0f}/s"
        room = max(10, shutil.get_terminal_size().columns - len(words) - 3)
        filled = min(room, room * done // total)
        sys.stderr.write(f"\r[{'#' * filled}{'.' * (room - filled)}]{words}")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line."""
        if self._drawn:
            sys.stderr.write("\n")


_COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kind": itemgetter("kind"),
    "state": itemgetter("state"),
    "local": itemgetter("local"),
    "remote": itemgetter("remote"),
    "from": itemgetter("from"),
    "to": itemgetter("to"),
    "outcome": lambda record: record["outcome"] or record["step"],
    "freeze ms": lambda record: milliseconds(record["blackout_us"]),
    "mode": itemgetter("mode"),
    "engine": itemgetter("engine"),
    "hop": itemgetter("hop"),
}
_HISTORY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ended": lambda record: local_time(record["ended_at"]),
    "direction": itemgetter("direction"),
}


def show_records(records: Sequence[dict[str, Any]], *, ended: bool = False) -> None:
    """Migration records, a line each, and why those that did not move did not; ``ended``: also when."""
    columns = (_HISTORY | _COLUMNS) if ended else _COLUMNS
    print_table(tuple(columns), [[show(record) for show in columns.values()] for record in records])
    for record in records:
        if record.get("refusal"):
            why = record["refusal"]
            ends = " -> ".join(end for end in (record.get("local"), record.get("remote")) if end)
            print(f"{ends or 'no socket'}: {why['code']}: {why['message']}")

    waiting = Counter(record.get("to") for record in records if record.get("listed"))
    for host, count in waiting.items() if not ended else ():
        print(f"{count} wait in an import list of {host} for an application: see `sockmi list imports` there")


def local_time(text: str | None) -> str | None:
    """A record's time to the second, in the time zone of whoever reads it."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else None


def milliseconds(microseconds: int | None) -> float | None:
    """Rounded to microseconds; None stays None."""
    return None if microseconds is None else round(microseconds / 1000, 3)
