# SPDX-License-Identifier: MIT
"""Which failures have no second try (scripts/test)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.matrix_lab import same
from tests.laws import FILE, LawBroken, broken, law

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
from tests.laws import law
from tests.lab.matrix_lab import same

def test_good():
    pass

def test_slow():
    assert False, "it took too long"

def test_bytes():
    same(b"one", b"two", "queue")

def test_while_another_failure_was_handled():
    try:
        with law():
            assert False
    finally:
        raise TimeoutError

@pytest.fixture
def capture():
    yield
    same(b"one", b"two", "at the end")

def test_end(capture):
    pass

def test_ended_by_a_failure(capture):
    assert False, "it took too long"
"""


def test_what_breaks_a_law_is_told(tmp_path: Path) -> None:
    """Also at the end of a fixture."""
    (tmp_path / "test_some.py").write_text(TESTS)
    names = tmp_path / "broken"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.laws", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--import-mode=importlib", "--rootdir", tmp_path, "-c", os.devnull, tmp_path],
        cwd=ROOT, env=os.environ | {FILE: str(names), "PYTHONPATH": f"{ROOT}:{ROOT}/daemon"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    told = sorted(line.rpartition("::")[2] for line in names.read_text().splitlines())
    assert told == ["test_bytes", "test_end", "test_while_another_failure_was_handled"], done.stdout


def test_any_way_it_comes() -> None:
    with pytest.raises(LawBroken) as caught:
        same(b"one", b"two", "queue")
    assert broken(caught.value) and broken(ExceptionGroup("several", [OSError(), caught.value]))
    with pytest.raises(LawBroken, match="two owners"), law():
        raise AssertionError("two owners")
    with pytest.raises(OSError), law():
        raise OSError
    assert not broken(AssertionError("it took too long")) and not broken(None)
