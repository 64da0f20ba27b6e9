# SPDX-License-Identifier: MIT
"""What the clients saw while their connections moved: a table for the terminal, a page for people.

Input: the clients' timelines, and migration records as the command line and the Ansible modules print them
(docs/control.md). The page is one file: no script, no request to anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.traffic import timeline
from lab.traffic.timeline import Track

SPAN_BEFORE_S = 0.05
SPAN_AFTER_S = 0.5
"""How far around a move a gap may lie and still be its blackout."""


@dataclass(frozen=True, slots=True)
class Move:
    """One migration of one connection. ``freeze_us`` as the exporter measured it; None: unknown."""

    at: float
    source: str
    target: str
    kind: str
    state: str
    local: str
    remote: str
    freeze_us: int | None
    fidelity: Mapping[str, Sequence[str]]
    outcome: str = "moved"
    why: str = ""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Move:
        """A record; ValueError says what is missing."""
        try:
            why = record.get("refusal") or {}
            return cls(
                _seconds(record["started_at"]),
                str(record["from"]),
                str(record.get("to") or "?"),
                str(record.get("kind") or ""),
                str(record.get("state") or ""),
                str(record.get("local") or ""),
                str(record.get("remote") or ""),
                record.get("blackout_us"),
                record.get("fidelity") or {},
                str(record.get("outcome") or "moved"),
                str(why.get("message", "")),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no migration record ({error!r}): {str(record)[:120]}") from None


def _seconds(moment: Any) -> float:
    """Unix seconds, from a number or an RFC 3339 time."""
    return float(moment) if isinstance(moment, int | float) else datetime.fromisoformat(moment).timestamp()


@dataclass(slots=True)
class Story:
    """One client and the moves of its connection, in order of time."""

    track: Track
    moves: list[Move] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes that the client sent."""
        return self.track.points[-1][1] if self.track.points else 0

    @property
    def received(self) -> int:
        """Bytes that the client received."""
        return self.track.points[-1][2] if self.track.points else 0

    def blackout_us(self, move: Move) -> int:
        """The longest gap that the client saw around a move; 0 if there is none to see."""
        return self.track.gap_us(move.at - SPAN_BEFORE_S, move.at + SPAN_AFTER_S)

    @property
    def elsewhere_us(self) -> int:
        """The longest gap that touches no move: what this client is used to."""
        spans = [(move.at - SPAN_BEFORE_S, move.at + SPAN_AFTER_S) for move in self.moves]
        free = [b - a for a, b in self.track.gaps() if not any(b >= x and a <= y for x, y in spans)]
        return round(max(free, default=0.0) * 1e6)

    @property
    def path(self) -> str:
        """The hosts that the connection has been on."""
        moved = [move for move in self.moves if move.outcome == "moved"]
        return " → ".join([moved[0].source, *(move.target for move in moved)]) if moved else "did not move"


def stories(tracks: Iterable[Track], moves: Iterable[Move]) -> list[Story]:
    """Each client with the moves whose ``remote`` is its end of the connection."""
    told = [Story(track) for track in tracks]
    by_end = {story.track.local: story for story in told if story.track.local}
    for move in sorted(moves, key=lambda move: move.at):
        if move.remote in by_end:
            by_end[move.remote].moves.append(move)
    return told


# ---------------------------------------------------------------- the terminal


TITLES = ("from", "to", "state", "elsewhere", "freeze", "fidelity")


def table(told: Sequence[Story]) -> str:
    """One line a move (or a client that did not move), in columns."""
    rows = [["client", "connection", *TITLES[:3], "sent", "received", "blackout", *TITLES[3:]]]
    for story in told:
        name = f"{story.track.name} {'ok' if story.track.ok else 'FAILED'}"
        ends = f"{story.track.local} > {story.track.remote}"
        amounts = [_bytes(story.sent), _bytes(story.received)]
        for move in story.moves:
            rows.append(
                [
                    *(name, ends, move.source, move.target, move.state, *amounts),
                    *(_blackout(story, move), _usual(story), _us(move.freeze_us), _fidelity(move)),
                ]
            )
            name, ends, amounts = "", "", ["", ""]
        if not story.moves:
            rows.append([name, ends, "-", "-", "", *amounts, "-", _usual(story), "-", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [f"{story.track.name}: {story.track.error}" for story in told if not story.track.ok]
    return "\n".join(lines)


def _blackout(story: Story, move: Move) -> str:
    if move.outcome != "moved":
        return move.outcome
    if story.track.kind == "idle":
        return "not visible"
    return _us(story.blackout_us(move) or None)


def _usual(story: Story) -> str:
    return "-" if story.track.kind == "idle" else _us(story.elsewhere_us or None)


def _fidelity(move: Move) -> str:
    if move.outcome != "moved":
        return move.why
    names = {kind: move.fidelity.get(kind) or [] for kind in ("carried", "approximated", "reset")}
    return ", ".join(f"{len(found)} {kind}" for kind, found in names.items() if found) or "-"


def _us(microseconds: int | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds / 1000:.2f} ms" if microseconds < 1_000_000 else f"{microseconds / 1e6:.2f} s"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


# ---------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d2430; --soft: #667085;
  --line: #e4e2dc; --down: #2563a8; --fill: #2563a81c; --up: #8a94a6; --good: #1a7f4b; --bad: #c22f2f;
  --h0: #b45309; --h1: #0f766e; --h2: #7c3aed; --h3: #be185d; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1a1f27; --ink: #e7eaf0;
  --soft: #98a2b3; --line: #2c333e; --down: #6db1ff; --fill: #6db1ff22; --up: #788397; --good: #4cc38a;
  --bad: #ff7b72; --h0: #f0a34e; --h1: #45c9bb; --h2: #b794ff; --h3: #ff7ab6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 2.6rem 1.4rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.7rem; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .2rem; }
.lead { color: var(--soft); margin: 0 0 1.8rem; max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 0 0 2rem; padding: 0; list-style: none; }
.facts li { flex: 1 1 9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem 1rem; color: var(--soft); font-size: .85rem; }
.facts b { display: block; color: var(--ink); font-size: 1.4rem; font-weight: 620; letter-spacing: -.01em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.1rem 1.3rem 1.2rem; margin: 0 0 1.2rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .9rem; margin-bottom: .5rem; }
h2 { font-size: 1.08rem; font-weight: 620; margin: 0; }
header code, header .note { color: var(--soft); font-size: .84rem; }
.verdict { margin-left: auto; font-size: .85rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.down { fill: none; stroke: var(--down); stroke-width: 2; stroke-linejoin: round; }
.area { fill: var(--fill); }
.up { fill: none; stroke: var(--up); stroke-width: 1.4; stroke-dasharray: 4 3; }
.move { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; opacity: .65; }
svg text.label { fill: var(--ink); font-weight: 600; }
svg text.host { fill: #fff; font-size: 10.5px; font-weight: 600; }
@media (prefers-color-scheme: dark) { svg text.host { fill: #12151a; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: .8rem; font-size: .86rem; }
th { text-align: left; font-weight: 500; color: var(--soft); }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.wide { white-space: normal; min-width: 14rem; }
tr:last-child td { border-bottom: 0; }
details { color: var(--soft); } summary { cursor: pointer; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; color: var(--soft); font-size: .84rem;
  margin: 0 0 1rem; }
.key i { display: inline-block; width: 1.5rem; border-top: 2px solid var(--down); vertical-align: middle;
  margin-right: .45rem; }
.key i.u { border-top: 2px dashed var(--up); } .key i.m { border-top: 2px dotted var(--ink); }
footer { color: var(--soft); font-size: .84rem; margin-top: 1.6rem; }
"""

WIDTH, HEIGHT, LEFT, TOP, BAR = 1000, 190, 62, 26, 16


def page(told: Sequence[Story], title: str = "Live connections, moved") -> str:
    """The whole page as HTML."""
    moves = [(story, move) for story in told for move in story.moves if move.outcome == "moved"]
    seen = sorted(
        story.blackout_us(move) for story, move in moves if story.track.kind not in ("idle", "lines")
    )
    failed = [story for story in told if not story.track.ok]
    facts = [
        (str(len(told)), "connections"),
        (str(len(moves)), "moves between hosts"),
        (
            _us(seen[len(seen) // 2]) if seen else "-",
            "median blackout: the gap around a move, seen by a streaming client",
        ),
        (_bytes(sum(story.sent + story.received for story in told)), "checked byte by byte"),
        (str(len(failed)), "clients that noticed anything"),
    ]
    hosts = sorted({name for _unused, move in moves for name in (move.source, move.target)})
    colours = {name: f"var(--h{index % 4})" for index, name in enumerate(hosts)}
    begin = min((story.track.started_at for story in told), default=0.0)
    end = max((point[0] for story in told for point in story.track.points), default=begin)
    end = max([end, *(story.track.ended_at or begin for story in told)])
    items = "".join(f"<li><b>{escape(value)}</b>{escape(name)}</li>" for value, name in facts)
    sections = "\n".join(_section(story, begin, max(end, begin + 1e-3), colours) for story in told)
    when = datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if told else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">Each picture is one client. Its connection was moved from host to host while it ran; the
client's own record shows what it felt of that.</p>
<ul class="facts">{items}</ul>
<p class="key"><span><i></i>bytes received</span><span><i class="u"></i>bytes sent</span>
<span><i class="m"></i>a move</span><span>bar below: the host that has the connection</span></p>
{sections}
<footer>Silence: the longest time around a move (50 ms before to 500 ms after its begin) in which the
client received no byte; the connection's own pauses are part of it. Elsewhere: the longest such time away
from all moves. Freeze: how long the connection could not act, as the exporting host measured it.
{escape(when)}</footer>
</body></html>
"""


def _section(story: Story, begin: float, end: float, colours: Mapping[str, str]) -> str:
    track = story.track
    verdict = '<span class="verdict good">noticed nothing</span>'
    if not track.ok:
        verdict = f'<span class="verdict bad">{escape(track.error)}</span>'
    return f"""<section><header><h2>{escape(track.name)}</h2><span class="note">{escape(story.path)}</span>
<code>{escape(track.local)} – {escape(track.remote)}</code>{verdict}</header>
{_picture(story, begin, end, colours)}
{_moves_table(story)}</section>"""


def _moves_table(story: Story) -> str:
    if not story.moves:
        return ""
    rows = []
    for move in story.moves:
        sent, received = _amounts_at(story.track, move.at)
        cells = [move.source, move.target, move.state, _bytes(received), _bytes(sent)]
        cells += [_blackout(story, move), _usual(story), _us(move.freeze_us)]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        names = "".join(
            f"<div><b>{kind}</b>: {escape(', '.join(move.fidelity[kind]))}</div>"
            for kind in ("carried", "approximated", "reset")
            if move.fidelity.get(kind)
        )
        summary = escape(_fidelity(move))
        detail = f"<details><summary>{summary}</summary>{names}</details>" if names else summary
        rows.append(f'<tr>{row}<td class="wide">{detail}</td></tr>')
    columns = (*TITLES[:3], "received", "sent", "blackout", *TITLES[3:])
    titles = "".join(f"<th>{name}</th>" for name in columns)
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(rows)}</table></div>'


def _amounts_at(track: Track, moment: float) -> tuple[int, int]:
    """Bytes (sent, received) until ``moment``."""
    before = [point for point in track.points if point[0] <= moment]
    return (before[-1][1], before[-1][2]) if before else (0, 0)


def _picture(story: Story, begin: float, end: float, colours: Mapping[str, str]) -> str:
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    highest = max(story.received, story.sent, 1)
    step = _step(highest / 3)
    top_value = step * -(-highest // step)

    def x(moment: float) -> float:
        return LEFT + WIDTH * min(max((moment - begin) / (end - begin), 0.0), 1.0)

    def y(count: float) -> float:
        return bottom - HEIGHT * count / top_value

    parts = [f'<svg viewBox="0 0 {right + 14} {bottom + BAR + 34}" role="img" aria-label="bytes over time">']
    for number in range(round(top_value / step) + 1):
        height = y(number * step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        label = _bytes(round(number * step)) if number else "0"
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    second = _step((end - begin) / 8)
    for number in range(int((end - begin) / second) + 1):
        parts.append(
            f'<text x="{x(begin + number * second):.1f}" y="{bottom + BAR + 24}" text-anchor="middle">'
            f"{number * second:g} s</text>"
        )
    received = _steps(_thin([(x(when), y(count)) for when, _unused, count in story.track.points]))
    sent = _steps(_thin([(x(when), y(count)) for when, count, _unused in story.track.points]))
    if received:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in received)
        area = f"{received[0][0]:.1f},{bottom} {path} {received[-1][0]:.1f},{bottom}"
        parts.append(f'<polygon class="area" points="{area}"/>')
        parts.append(f'<polyline class="up" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in sent)}"/>')
        parts.append(f'<polyline class="down" points="{path}"/>')
    parts += _marks(story, x, bottom, colours, end)
    return "".join(parts) + "</svg>"


def _marks(story: Story, x: Any, bottom: int, colours: Mapping[str, str], end: float) -> list[str]:
    """The moves, and the bar of the hosts that had the connection."""
    parts = []
    moved = [move for move in story.moves if move.outcome == "moved"]
    for move in moved:
        at = x(move.at)
        parts.append(f'<line class="move" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{bottom + BAR}"/>')
        label = f"{move.source} → {move.target}"
        blackout = _blackout(story, move)
        label += f"  {blackout}" if story.track.kind not in ("idle", "lines") else ""
        parts.append(
            f'<text class="label" x="{at:.1f}" y="{TOP - 13}" text-anchor="middle">{escape(label)}</text>'
        )
    first = story.track.points[0][0] if story.track.points else story.track.started_at
    last = story.track.ended_at or end
    edges = [first, *(move.at for move in moved), last]
    hosts = [moved[0].source, *(move.target for move in moved)] if moved else []
    for name, (left, right) in zip(hosts, pairwise(edges), strict=False):
        a, b = x(left), x(max(left, right))
        parts.append(
            f'<rect x="{a:.1f}" y="{bottom + 2}" width="{max(b - a, 1):.1f}" height="{BAR - 3}" rx="2" '
            f'fill="{colours[name]}"/>'
        )
        if b - a > 14:
            parts.append(
                f'<text class="host" x="{(a + b) / 2:.1f}" y="{bottom + BAR - 4}" text-anchor="middle">'
                f"{escape(name)}</text>"
            )
    return parts


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """No more points than pixels: first, lowest and last of each column stay."""
    kept: list[tuple[float, float]] = []
    for index, point in enumerate(points):
        ends_column = index + 1 == len(points) or int(points[index + 1][0]) != int(point[0])
        begins_column = not kept or int(kept[-1][0]) != int(point[0])
        if ends_column or begins_column:
            kept.append(point)
    return kept


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Between two points nothing came: a pause is drawn level, not as slow progress."""
    drawn = points[:1]
    for before, point in pairwise(points):
        if point[0] - before[0] > 1 and point[1] != before[1]:
            drawn.append((point[0], before[1]))
        drawn.append(point)
    return drawn


def _step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below ``rough``."""
    power = 1.0
    while power * 10 <= rough:
        power *= 10
    while power > rough:
        power /= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def load(timelines: Iterable[Path], records: Iterable[Mapping[str, Any]]) -> list[Story]:
    """Timeline files and records, joined; ValueError says which file is wrong."""
    return stories(
        [timeline.read(path) for path in timelines], [Move.from_record(record) for record in records]
    )


def main(words: list[str] | None = None) -> int:
    """``python3 -m lab.report --records FILE --html FILE TIMELINE ...``: table on standard output."""
    parser = argparse.ArgumentParser(
        prog="python3 -m lab.report", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("timelines", nargs="+", type=Path, metavar="TIMELINE")
    parser.add_argument("--records", type=Path, required=True, help="JSON: a list of migration records")
    parser.add_argument("--html", type=Path, help="write the page there")
    arguments = parser.parse_args(words)
    try:
        records = json.loads(arguments.records.read_text())
        if not isinstance(records, list):
            raise ValueError(f"{arguments.records}: expected a list of migration records")
        told = load(arguments.timelines, records)
        print(table(told))
        if arguments.html:
            arguments.html.write_text(page(told))
            print(f"page: {arguments.html}")
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0 if all(story.track.ok for story in told) else 1


if __name__ == "__main__":
    sys.exit(main())
