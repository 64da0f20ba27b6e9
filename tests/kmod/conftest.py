# SPDX-License-Identifier: MIT
"""Kernels and guests for the tests of the module; guests/inside_pytest.py tells what runs where."""

from __future__ import annotations

import fnmatch
import itertools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from guests import inside_pytest
from guests.guest import Guest, Plan
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from guests.segment import Segment

MARKERS = (
    "kernels(*patterns): the kernels that a test is meant for, as shell patterns",
    "complains(*patterns): complaints of the kernel that the test provokes, as regular expressions",
    "no_module: the file's tests load the module themselves, from $SOCKMI_KO",
    "parameters(*words): the module's, for all tests of the file",
    "alone: the file's tests share no guest with others",
    "processors(number): the test runs in a guest with so many, and a kernel that may be preempted anywhere",
    "releases(*names): modules of other releases that the file's tests load from $SOCKMI_KO_NAME",
    "slow: left to make test-kmod",
)

_segments = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--kernel."""
    inside_pytest.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Repeat reports here, or write them inside."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    plugin = inside_pytest.Teller(config) if inside_pytest.HERE else inside_pytest.Repeater(config)
    config.pluginmanager.register(plugin, "sockmi-inside")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each kernel."""
    if "kernel" not in metafunc.fixturenames:
        return
    if inside_pytest.is_inside(metafunc.definition.path):
        inside_pytest.parametrize(metafunc)
    else:
        # Guests are of Debian's kernels; who wants another says so.
        marks = list(metafunc.definition.iter_markers("kernels"))
        patterns = [str(pattern) for mark in marks for pattern in mark.args] or DEBIAN_KERNELS
        names = [
            name
            for name in inside_pytest.chosen(metafunc.config)
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        ]
        metafunc.parametrize("kernel", names, indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def built_libraries() -> None:
    """Built here as for all tests, but not inside, where there is no compiler: the checkout brings them."""
    if not inside_pytest.HERE:
        command = ["make", "--quiet", "-C", str(PROJECT / "daemon/libsockmi")]
        subprocess.run(command, check=True, timeout=300)


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of the kernel that the test is for."""
    return str(request.param)


@pytest.fixture
def guests(kernel: str) -> Iterator[Callable[..., list[Guest]]]:
    """``guests(3)``: that many guests on a segment of their own, booted, without the module.

    Keywords are those of guests.guest.Plan. What their kernels complain of fails the test, but for patterns
    in ``allowed``.
    """
    made: list[Guest] = []

    def start(count: int, **plan: object) -> list[Guest]:
        segment = Segment(next(_segments) % 250)
        basis = Plan(DEBIAN_KERNELS[kernel], segments=[segment])
        fresh = []
        for number in range(1, count + 1):
            one = Guest(replace(basis, name=f"vm{len(made) + 1}", number=number, **plan))  # type: ignore[arg-type]
            made.append(one)
            fresh.append(one)
        for one in fresh:
            one.wait()
        return fresh

    try:
        yield start
        complaints = [(one, report) for one in made for report in one.complaints()]
    finally:
        for one in made:
            one.close()
    if complaints:
        pytest.fail(
            "\n\n".join(f"{one.plan.name}, {one.console}:\n{report.text}" for one, report in complaints)
        )


@pytest.fixture
def guest(guests: Callable[..., list[Guest]]) -> Guest:
    """One guest."""
    return guests(1)[0]
