# SPDX-License-Identifier: MIT
"""An owner that keeps its sockets locked, and a daemon with the kernel engine: as with the other."""

from __future__ import annotations

import pytest

from tests.lab.test_locked import (  # noqa: F401 - these are the tests
    test_a_daemon_stops_and_starts_meanwhile,
    test_it_stays_and_nobody_waits,
    test_quiet_connections_are_found_all_the_same,
)

# The debug kernel has no userfaultfd.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.kernels("6.12")]
