# SPDX-License-Identifier: MIT
"""The lab: hosts made out of network namespaces, real traffic, captures and reports."""

from __future__ import annotations

from lab.host import Host
from lab.labs import Lab, sweep
from lab.plan import DAEMON_HOSTS, HOSTS, LabError

__all__ = ["DAEMON_HOSTS", "HOSTS", "Host", "Lab", "LabError", "sweep"]
