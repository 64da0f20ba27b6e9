# SPDX-License-Identifier: MIT
"""``make demo`` as it is, with shorter stays: every client is content, and the table and the page say so."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from lab.demo import CLIENTS
from lab.host import PROJECT
from lab.record import read

#: name, ok, peer > server; or nothing; then from, to, state and the figures.
ROW = re.compile(r"^(?:(\w+) (\S+) +(\S+) > (\S+))? +([abc]) +([abc]) +([A-Z-]+) ", re.MULTILINE)


@pytest.mark.timeout(200)
def test_the_demo(lab_name: Callable[[], str], tmp_path: Path) -> None:
    name, page = lab_name(), tmp_path / "demo.html"
    words = [PROJECT / "scripts/demo", "--lab", name, "--stay-s", "0.5", "--page", page]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    assert read(name) is None, "the lab is gone"

    rows = [match.groups() for match in ROW.finditer(result.stdout)]
    assert [row[0] for row in rows] == [one for client in CLIENTS for one in (client, None)], result.stdout
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first[1] == "ok"
        assert [first[4:], second[4:]] == [("a", "b", "ESTABLISHED"), ("b", "c", "ESTABLISHED")]

    text = page.read_text()
    assert "http" not in text, "it needs nothing from outside"
    sections = re.findall(r"<section>.*?</section>", text, re.DOTALL)
    assert [re.search(r"<h2>(.*?)</h2>", one)[1] for one in sections] == list(CLIENTS)  # type: ignore[index]
    for section, row in zip(sections, rows[::2], strict=True):
        plain = unescape(re.sub(r"<[^>]*>", " ", section))
        assert "noticed nothing" in plain and "a → b → c" in plain
        assert row[2] in plain and row[3] in plain, "the connection of the table"
        assert "<polyline" in section or "<path" in section, "a picture"
    moves = str(2 * len(CLIENTS))
    assert f"<li><b>{len(CLIENTS)}</b>connections</li><li><b>{moves}</b>moves between hosts</li>" in text
