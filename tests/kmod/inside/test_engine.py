# SPDX-License-Identifier: MIT
"""The engines' contract (tests/lab) where the module is loaded: the kernel engine, and each with the other.

One suite for all: its tests are imported, and only the engines are others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import engine_lab as el
from tests.lab import test_engine_contract, test_engine_states

for suite in (test_engine_contract, test_engine_states):
    globals().update({name: value for name, value in vars(suite).items() if not name.startswith("_")})

test_freeze_and_abort_under_load = pytest.mark.slow(test_engine_contract.test_freeze_and_abort_under_load)


@pytest.fixture(
    scope="module",
    params=[
        "kernel",
        # Too long for make test: 270 more tests with real traffic, where a processor is emulated.
        pytest.param("kernel-repair", marks=pytest.mark.slow),
        pytest.param("repair-kernel", marks=pytest.mark.slow),
    ],
)
def engine(request: pytest.FixtureRequest) -> Iterator[el.Pair]:
    """Of the exporter and of the importer."""
    pair = el.make_pair(*str(request.param).split("-"))
    yield pair
    for one in {id(each): each for each in (pair.exporter, pair.importer)}.values():
        if hasattr(one, "close"):
            one.close()
