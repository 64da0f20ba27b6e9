# SPDX-License-Identifier: MIT
"""Run inside by test_harness.py, which knows which of these must fail, and why."""

from __future__ import annotations

import os
import subprocess

import pytest

pytestmark = pytest.mark.no_module


@pytest.fixture(scope="session", autouse=True)
def on_each_kernel(kernel: str) -> None:
    """Makes every case one of a kernel's."""


def plant(bug: str) -> None:
    subprocess.run(["insmod", os.environ["SOCKMI_KO"], f"bug={bug}"], check=True)
    subprocess.run(["rmmod", "planted"], check=True)


def test_good() -> None:
    plant("none")


def test_false() -> None:
    assert os.getpid() < 0


def test_warns() -> None:
    plant("warning")


@pytest.mark.complains("WARNING: .*planted")
def test_warns_as_it_should() -> None:
    plant("warning")


def test_panics() -> None:
    plant("panic")


def test_good_after_the_panic() -> None:
    plant("none")


def test_skipped() -> None:
    pytest.skip("to see that it is told")


@pytest.mark.kernels("none-of-these")
def test_of_another_kernel() -> None:
    raise AssertionError("ran where it was not meant to")
