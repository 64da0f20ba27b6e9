# SPDX-License-Identifier: MIT
"""The matrix (tests/lab/test_matrix.py) where the module is loaded: state x family x active and passive.

Whole daemons with the kernel engine; one pair of them for all tests, and all states in one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lab.labs import Lab
from tests.lab import test_matrix as suite
from tests.lab.matrix_lab import Bench, bench
from tests.lab.scenario import daemons, status

it = suite.it
test_a_listener_with_its_queue = suite.test_a_listener_with_its_queue
test_connections = suite.test_connections
test_without_a_connection = suite.test_without_a_connection

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Bench]:
    """Daemons that found the module; the redirect is one that each of the kernels has."""
    redirect = {"devices": ["eth0"], "modes": ["nat"]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, "nat", both) as made,
    ):
        assert [status(lab.host(name))["engine"] for name in "ab"] == ["kernel", "kernel"]
        # The first move of all imports modules, which takes an emulated processor seconds.
        for _turn in range(3):
            with contextlib.suppress(AssertionError):
                made.warm()
                break
        yield made
