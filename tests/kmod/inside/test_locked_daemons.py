# SPDX-License-Identifier: MIT
"""An owner that keeps its sockets locked, and a daemon with the kernel engine: as with the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.labs import Lab
from tests.lab import test_locked
from tests.lab.test_locked import (  # noqa: F401 - these are the tests
    test_a_daemon_stops_and_starts_meanwhile,
    test_it_stays_and_nobody_waits,
    test_quiet_connections_are_found_all_the_same,
)

# The debug kernel has no userfaultfd.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.kernels("6.12")]


@pytest.fixture(scope="module")
def lab(kernel: str) -> Iterator[Lab]:
    with Lab(f"l{kernel.replace('.', '')[-6:]}") as made:
        yield made


@pytest.fixture(autouse=True)
def of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_locked, "REDIRECT", {"devices": ["eth0"], "modes": ["nat"]})
