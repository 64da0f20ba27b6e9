# SPDX-License-Identifier: MIT
"""Tests here run inside a kernel that has the module loaded, once for each; see guests/inside_pytest.py."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Makes every test here one of a kernel's."""
