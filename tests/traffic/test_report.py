# SPDX-License-Identifier: MIT
"""The report: every connection and move is in it, right, and it needs nothing from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lab.host import PROJECT
from lab.report import Move, load, page, table

BEGIN = 1_700_000_000.0
VOID = {"meta"}


def write_timeline(
    path: Path, name: str, local: str, *, gap_at: float = 1.5, gap_s: float = 0.25, error: str = ""
) -> None:
    """Three seconds with a byte a millisecond, and one gap."""
    lines: list[dict[str, Any]] = [
        {"kind": "duplex", "name": name, "started_at": BEGIN, "started_ns": 0},
        {"local": local, "remote": "10.77.1.11:5001"},
    ]
    for number in range(3000):
        if not gap_at < number / 1000 < gap_at + gap_s:
            lines.append({"t": number * 1_000_000, "sent": number // 2, "received": number})
    lines.append(
        {"end": 3_000_000_000, "ok": not error, "error": error, "longest_gap_us": 1, "longest_gap_at": 0}
    )
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def record(remote: str, at: float, source: str, target: str, **more: Any) -> dict[str, Any]:
    """A migration record as the daemon gives it."""
    return {
        "migration_id": "7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01",
        "kind": "connected",
        "state": "ESTABLISHED",
        "local": "10.77.1.11:5001",
        "remote": remote,
        "from": source,
        "to": target,
        "started_at": at,
        "outcome": "moved",
        "blackout_us": 812,
        "fidelity": {"carried": ["send-queue"], "approximated": [], "reset": ["<rtt>"]},
    } | more


class Checker(HTMLParser):
    """Are all elements closed, and does nothing point outside?"""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _unused in attrs} & {"src", "href", "srcset", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two clients: one that is well, and one that failed."""
    write_timeline(tmp_path / "one", "one <b>", "10.77.1.10:40001")
    write_timeline(tmp_path / "two", "two", "[fd77:1::10]:40002", error="Corruption: byte 5 & more")
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """The first moved twice, the second was refused."""
    why = {"code": "ulp", "message": "It uses kernel TLS.", "errno": "ENOTSUP"}
    return [
        record("10.77.1.10:40001", BEGIN + 2.5, "b", "c"),
        record("10.77.1.10:40001", BEGIN + 1.5, "a", "b"),
        record("[fd77:1::10]:40002", BEGIN + 1, "a", "b", outcome="refused", refusal=why, blackout_us=None),
        record("10.9.9.9:1", BEGIN + 1, "a", "b"),
    ]


def test_figures(files: list[Path], records: list[dict[str, Any]]) -> None:
    one, two = load(files, records)
    assert one.path == "a → b → c"
    assert two.path == "did not move"
    assert [move.target for move in one.moves] == ["b", "c"]
    assert (one.sent, one.received) == (1499, 2999)
    assert one.blackout_us(one.moves[0]) == pytest.approx(250_000, abs=2)
    assert one.blackout_us(one.moves[1]) == pytest.approx(1000, abs=2)
    assert one.elsewhere_us == pytest.approx(1000, abs=2)
    assert two.elsewhere_us == pytest.approx(250_000, abs=2) or two.blackout_us(two.moves[0]) > 0


def test_table(files: list[Path], records: list[dict[str, Any]]) -> None:
    lines = table(load(files, records)).splitlines()
    assert "250.00 ms" in lines[2]
    assert "0.81 ms" in lines[2]
    assert "1.00 ms" in lines[3]
    assert "refused" in lines[4]
    assert "kernel TLS" in lines[4]
    assert lines[5] == "two: Corruption: byte 5 & more"


def test_page(files: list[Path], records: list[dict[str, Any]]) -> None:
    checker = Checker()
    text = page(load(files, records))
    checker.feed(text)
    assert checker.open == []
    for expected in ("one <b>", "a → b  250.00 ms", "noticed nothing", "Corruption: byte 5 & more", "<rtt>"):
        assert expected in checker.text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 200_000


def test_page_of_nothing() -> None:
    checker = Checker()
    checker.feed(page([]))
    assert checker.open == []


def test_rfc_3339_times() -> None:
    move = Move.from_record(record("1.1.1.1:1", BEGIN, "a", "b") | {"started_at": "2023-11-14T22:13:20.5Z"})
    assert move.at == BEGIN + 0.5


@pytest.mark.parametrize("bad", [{}, {"from": "a"}, {"from": "a", "to": "b", "started_at": "noon"}])
def test_bad_record(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no migration record"):
        Move.from_record(bad)


def test_program(files: list[Path], records: list[dict[str, Any]], tmp_path: Path) -> None:
    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lab.report", *map(str, words)]
        return subprocess.run(command, cwd=PROJECT, text=True, capture_output=True, timeout=60, check=False)

    (tmp_path / "records").write_text(json.dumps(records))
    result = run("--records", tmp_path / "records", "--html", tmp_path / "page.html", *files)
    assert result.returncode == 1  # the second client failed
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert run("--records", tmp_path / "records", files[0]).returncode == 0
    for wrong in (tmp_path / "none", files[0]):
        result = run("--records", wrong, files[0])
        assert result.returncode == 2
        assert "report: " in result.stderr
        assert "Traceback" not in result.stderr
