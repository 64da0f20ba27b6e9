# SPDX-License-Identifier: MIT
"""Tests here run inside a kernel that has the module loaded, once for each; see guests/inside_pytest.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lab.labs import Lab


@pytest.fixture(scope="session", autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Makes every test here one of a kernel's."""


@pytest.fixture(scope="module")
def lab(kernel: str) -> Iterator[Lab]:
    """Hosts for daemons."""
    with Lab(f"k{kernel.replace('.', '')[-6:]}") as made:
        yield made


@pytest.fixture(autouse=True)
def by_nat(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are the lab's, too: the User-Mode-Linux kernels have no nft fwd."""
    home = sys.modules[request.function.__module__]
    if hasattr(home, "REDIRECT"):
        monkeypatch.setattr(home, "REDIRECT", {"devices": ["eth0"], "modes": ["nat"]})
