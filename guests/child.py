# SPDX-License-Identifier: MIT
"""What every long-lived child of the harness is bound by."""

from __future__ import annotations

CPU_LIMIT = 4 * 3600  # seconds: the last resort


def bound(cpu: int | None = None) -> list[str]:
    """Words to put before a command: it is killed when the thread that started it ends, bounded in CPU time,
    behind everything else of this machine, and pinned to ``cpu`` if one is given."""
    words = ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", f"--cpu={CPU_LIMIT}", "nice", "-n", "19"]
    return words if cpu is None else [*words, "taskset", "-c", str(cpu)]
