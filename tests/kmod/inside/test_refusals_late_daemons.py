# SPDX-License-Identifier: MIT
"""What only later kernels make a daemon refuse: TCP-AO (6.7, in Debian since 7.2), microseconds (6.7)."""

from __future__ import annotations

import pytest

from tests.kmod.inside.test_refusals_daemons import it, running
from tests.lab.test_matrix_refusals import test_connections_signed_by_tcp_ao, test_timestamp_unit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.kernels("7.*")]

__all__ = ["it", "running", "test_connections_signed_by_tcp_ao", "test_timestamp_unit"]
