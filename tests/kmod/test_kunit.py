# SPDX-License-Identifier: MIT
"""The module's KUnit tests (kmod/kunit): it is built with them, and they run when it is loaded.

KTAP is read by the parser that comes with the kernel's source (tools/testing/kunit).
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from guests.inside_pytest import UML_KERNELS
from guests.kernels import SPARSE
from guests.packages import need
from guests.paths import PROJECT
from guests.uml.kernel import UmlKernel
from guests.uml.run import Inside, run_inside

KMOD = PROJECT / "kmod"
PLANTED = Path(__file__).parent / "planted"
WITH_TESTS = ("SOCKMI_KUNIT=1",)

pytestmark = [pytest.mark.kernels("uml-*"), pytest.mark.timeout(900)]


@pytest.fixture
def uml(kernel: str) -> UmlKernel:
    return UML_KERNELS[kernel]


def parser(uml: UmlKernel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel's own, unchanged."""
    monkeypatch.syspath_prepend(str(uml.unpacked() / "tools/testing/kunit"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module("kunit_parser")


def ran(uml: UmlKernel, monkeypatch: pytest.MonkeyPatch, source: Path, suites: int) -> Any:
    """What came of the KUnit tests of a module, of which there are so many ``suites``."""
    outcome = run_inside(Inside(["true"], kernel=uml, module=source, words=WITH_TESTS, limit=300))
    assert outcome.good, outcome.tell()
    log = outcome.log.read_text(errors="replace").replace("\r", "")
    said = log.partition("sockmi-harness: inside\n")[2]
    lines = [re.sub(r"^\[[ \d.]+\] ", "", line) for line in said.splitlines()]
    # In this kernel a module's tests have no head; how many suites there shall be is ours to say.
    return parser(uml, monkeypatch).parse_run_tests(["KTAP version 1", f"1..{suites}", *lines])


def failures(test: Any) -> list[str]:
    """Paths of the cases that did not pass, or say that something is wrong."""
    below = [f"{test.name}/{name}" for one in test.subtests for name in failures(one)]
    passed = test.ok_status() and not test.counts.errors and not test.counts.skipped
    return below or ([] if passed else [test.name])


def test_no_warning(uml: UmlKernel) -> None:
    """Nor one of sparse's."""
    need(("sparse",))
    uml.module(strict=True, words=(*WITH_TESTS, *SPARSE))


def test_all_pass(uml: UmlKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(file.stem for file in (KMOD / "kunit").glob("*.c"))
    result = ran(uml, monkeypatch, KMOD, len(files))
    assert not failures(result), failures(result)
    assert sorted(suite.name for suite in result.subtests) == [f"sockmi_{name}" for name in files]
    assert all(len(suite.subtests) > 0 for suite in result.subtests)
    assert result.counts.passed == result.counts.total() > len(files)
    print(f"{result.counts.passed} cases in {len(files)} suites")


def test_a_failure_is_seen(uml: UmlKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ran(uml, monkeypatch, PLANTED / "kunit", 1)
    assert failures(result) == ["main/planted/is_odd_or_planted/param-1"]
    assert (result.counts.passed, result.counts.failed) == (2, 1)


def test_what_did_not_run_is_seen(uml: UmlKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite less than there should be, or none at all."""
    assert failures(ran(uml, monkeypatch, PLANTED, 1)) == ["main/"]
    failed = failures(ran(uml, monkeypatch, PLANTED / "kunit", 2))
    assert failed == ["main/planted/is_odd_or_planted/param-1", "main/"]
