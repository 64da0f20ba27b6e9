# SPDX-License-Identifier: MIT
"""The suite of socket options (tests/lab/test_engine_options.py), with the kernel engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import engine_lab as el
from tests.lab import test_engine_options as suite

lab = suite.lab
test_a_port_that_is_chosen_later = suite.test_a_port_that_is_chosen_later
test_a_priority_of_its_own = suite.test_a_priority_of_its_own
test_a_saved_syn_is_lost_and_told = suite.test_a_saved_syn_is_lost_and_told
test_all_options_together = suite.test_all_options_together
test_buffers_stay_tunable = suite.test_buffers_stay_tunable
test_each_option_alone = suite.test_each_option_alone
test_every_option_that_this_kernel_has = suite.test_every_option_that_this_kernel_has
test_hosts_with_other_defaults = suite.test_hosts_with_other_defaults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine() -> Iterator[el.Pair]:
    """One for both hosts."""
    pair = el.make_pair("kernel")
    yield pair
    pair.exporter.close()  # type: ignore[attr-defined]
