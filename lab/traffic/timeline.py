# SPDX-License-Identifier: MIT
"""What a client saw, over time: JSON lines, and the longest gap.

First line: ``{"kind", "name", "started_at" (unix s), "started_ns" (monotonic)}``; then
``{"local", "remote"}`` when connected; then ``{"t" (monotonic ns), "sent", "received"}``,
bytes so far; last ``{"end" (monotonic ns), "ok", "error", "longest_gap_us", "longest_gap_at"
(monotonic ns of its begin), ...}``. A file without the last line is of a client that died.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

SAMPLE_NS = 2_000_000
"""Progress is written no more often than this, but the two ends of a long gap always are."""

FLUSH_NS = 200_000_000


class Timeline:
    """Written by one client; not shared between threads."""

    def __init__(self, path: Path | None, kind: str, name: str) -> None:
        self.longest_gap_us = 0
        self._longest_gap_at = self._last_ns = self._written_ns = self._flushed_ns = 0
        self._last: dict[str, int] = {}
        self._received = 0
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
        self._write(
            {"kind": kind, "name": name, "started_at": time.time(), "started_ns": time.monotonic_ns()}
        )

    def connected(self, local: str, remote: str) -> None:
        """The connection is there; gaps count from now."""
        self._write({"local": local, "remote": remote})
        self._last_ns = time.monotonic_ns()

    def progress(self, sent: int, received: int) -> None:
        """So many bytes in all, each way. A gap is the time between two growths of ``received``."""
        now_ns = time.monotonic_ns()
        point = {"t": now_ns, "sent": sent, "received": received}
        gap_us = (now_ns - self._last_ns) // 1000 if self._last_ns else 0
        grown = received > self._received
        long = grown and gap_us * 1000 > SAMPLE_NS
        unwritten = self._last.get("t", 0) > self._written_ns
        if unwritten and (long or now_ns - self._last["t"] > SAMPLE_NS):
            self._write(self._last)
        if grown:
            if gap_us > self.longest_gap_us:
                self.longest_gap_us, self._longest_gap_at = gap_us, self._last_ns
            self._received, self._last_ns = received, now_ns
        self._last = point
        if long or now_ns - self._written_ns >= SAMPLE_NS:
            self._write(point)
            self._written_ns = now_ns

    def finish(self, error: str = "", **more: Any) -> None:
        """The connection is over, as it should be if ``error`` is empty."""
        now_ns = time.monotonic_ns()
        if self._last and self._last["t"] > self._written_ns:
            self._write(self._last)
        end = {"longest_gap_us": self.longest_gap_us, "longest_gap_at": self._longest_gap_at}
        self._write({"end": now_ns, "ok": not error, "error": error} | end | more)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            now_ns = time.monotonic_ns()
            if now_ns - self._flushed_ns > FLUSH_NS:
                self._file.flush()
                self._flushed_ns = now_ns


@dataclass(slots=True)
class Track:
    """A timeline read back. Times are unix seconds; ``points`` are (time, sent, received) bytes."""

    kind: str
    name: str
    started_at: float
    local: str = ""
    remote: str = ""
    points: list[tuple[float, int, int]] = field(default_factory=list)
    ended_at: float | None = None
    ok: bool = False
    error: str = "the client did not end"
    longest_gap_us: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def gap_us(self, begin: float, end: float) -> int:
        """The longest time without a received byte that touches the span from ``begin`` to ``end``."""
        touching = [b - a for a, b in self.gaps() if b >= begin and a <= end]
        return round(max(touching, default=0.0) * 1e6)

    def gaps(self) -> list[tuple[float, float]]:
        """Begin and end of every time without a received byte."""
        growths: list[float] = []
        highest = -1
        for when, _unused, received in self.points:
            if received > highest:
                growths.append(when)
                highest = received
        return list(pairwise(growths))


def read(path: Path) -> Track:
    """The timeline in ``path``; ValueError with file and line if it is none.

    An unfinished last line, of a client that was killed, is skipped.
    """
    lines = path.read_text().splitlines()
    track: Track | None = None
    offset = 0.0
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            if track is None:
                offset = line["started_at"] - line["started_ns"] / 1e9
                track = Track(line["kind"], line["name"], line["started_at"])
            elif "t" in line:
                track.points.append((offset + line["t"] / 1e9, line["sent"], line["received"]))
            elif "end" in line:
                track.ended_at = offset + line.pop("end") / 1e9
                track.ok, track.error = line.pop("ok"), line.pop("error")
                track.longest_gap_us = line.pop("longest_gap_us")
                track.local, track.remote = line.pop("local", track.local), line.pop("remote", track.remote)
                track.more = line
            else:
                track.local, track.remote = line["local"], line["remote"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and track is not None:
                break
            raise ValueError(f"{path}:{number}: not a line of a timeline ({error!r})") from None
    if track is None:
        raise ValueError(f"{path}: empty; the client never started")
    return track
