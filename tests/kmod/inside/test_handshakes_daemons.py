# SPDX-License-Identifier: MIT
"""Who is just connecting to a listener that moves, and daemons with the kernel engine: as with the other."""

from __future__ import annotations

import pytest

from tests.lab.test_listener_handshakes import (  # noqa: F401 - these are the tests
    test_a_handshake_that_has_begun_is_waited_for,
    test_one_that_never_ends_stops_nothing,
    test_while_many_connect,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.kernels("uml-6.1-debug")]
