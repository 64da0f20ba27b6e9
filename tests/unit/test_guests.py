# SPDX-License-Identifier: MIT
"""The guests' harness, as far as it goes without a guest: what it needs, and what it says without it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from guests import archive, work
from guests.errors import HarnessError

PROJECT = Path(__file__).resolve().parents[2]


def test_an_archive_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may pass, or be skipped, because there was no kernel to run it in."""
    for module in (archive, work):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(archive, "MIRROR", "http://127.0.0.1:9/debian")
    monkeypatch.setattr(archive, "SECURITY", "http://127.0.0.1:9/debian-security")
    with pytest.raises(HarnessError) as caught:
        archive.Archive("bookworm").fetch(["linux-image-cloud-amd64"])
    assert str(caught.value).startswith("apt-get")
    assert "update" in str(caught.value)
    assert "http://127.0.0.1:9/debian" in str(caught.value)
    assert "SOCKMI_DEBIAN_MIRROR" in str(caught.value)


def test_setup_installs_what_the_guests_need() -> None:
    """The harness installs what is missing when it comes to it, but `make setup` promises to have done so."""
    setup = re.search(
        r"^packages=\((.*?)^\)", (PROJECT / "scripts/setup").read_text(), re.DOTALL | re.MULTILINE
    )
    assert setup
    installed = set(re.sub(r"#.*", "", setup[1]).split())
    needed: set[str] = set()
    for file in (PROJECT / "guests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need":
                needed |= set(ast.literal_eval(node.args[0]))
    assert "qemu-system-x86" in needed
    assert needed - {"dpkg"} <= installed


COLLECT = """
import sys
import pytest
from guests.inside_pytest import Batch

class Told:
    def pytest_collection_finish(self, session):
        told.append(Batch("uml-6.1-debug", session.items, session.config).limit_s)

told = []
pytest.main(["--collect-only", "-q", *sys.argv[1:], "--kernel", "uml-6.1-debug"], plugins=[Told()])
print(told[0])
"""


def test_a_test_inside_may_take_its_own_time() -> None:
    """Though its limit is not kept on this side, where the first of a batch waits for all."""
    cycles = "tests/kmod/inside/test_module_cycles.py::test_loaded_and_unloaded"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, cycles],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert float(done.stdout.split()[-1]) > 1500
