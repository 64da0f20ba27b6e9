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


def setup_list(name: str) -> set[str]:
    """A list of packages of scripts/setup."""
    text = (PROJECT / "scripts/setup").read_text()
    found = re.search(rf"^{name}=\((.*?)\)$", re.sub(r"#.*", "", text), re.DOTALL | re.MULTILINE)
    assert found
    return set(found[1].split())


def test_a_controller_gets_no_servers() -> None:
    """`make setup` is for whoever installs SockMi elsewhere; tests and demo install what they need."""
    servers = {"redis-server", "nginx-light", "openssh-server", "iperf3", "qemu-system-x86"}
    assert servers <= setup_list("tests")
    assert not setup_list("packages") & (servers | setup_list("tests") | setup_list("demo"))
    for target, choice in {"setup": "", "demo": "demo", "test": "tests", "molecule": "tests"}.items():
        words = ["make", "--no-print-directory", "-n", target]  # this may be a make's child
        said = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
        assert said.split("\n")[0] == f"scripts/setup {choice}".strip()


def test_setup_installs_what_the_guests_need() -> None:
    """The harness installs what is missing when it comes to it, but `make setup-tests` promises to have."""
    installed = setup_list("packages") | setup_list("tests")
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
        kept = {item.get_closest_marker("timeout").args for item in session.items}
        told.append((Batch(session.items, session.config).limit_s, kept))

told = []
pytest.main(["--collect-only", "-q", *sys.argv[1:], "--kernel", "uml-6.1-debug"], plugins=[Told()])
limit_s, kept = told[0]
print(limit_s, kept == {(0,)})
"""


@pytest.mark.parametrize(
    "name, least_s",
    [("test_module_cycles.py::test_loaded_and_unloaded", 3000), ("test_module_lossy.py", 400)],
)
def test_a_test_inside_may_take_its_own_time(name: str, least_s: float) -> None:
    """Though its limit is not kept on this side, where the first of a batch waits for all."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, f"tests/kmod/inside/{name}"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    limit_s, unlimited_here = done.stdout.split()[-2:]
    assert float(limit_s) > least_s
    assert unlimited_here == "True"
