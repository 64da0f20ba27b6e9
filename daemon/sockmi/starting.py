# SPDX-License-Identifier: MIT
"""Why a daemon cannot start, and the lock that keeps a second one from the same state."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_ENDING_S = 1.0
_AGAIN_S = 0.01


class StartError(Exception):
    """The daemon cannot start; the text says what, where and what to do."""


def lock_state(state_dir: Path) -> int:
    """Keep other daemons from this state: they would settle what we have under way.

    Makes the directory if it is missing. The lock goes with the process, or when the descriptor is closed;
    of one that was killed its process `sockmi-stop` has it for a moment more.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state_dir / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + _ENDING_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(_AGAIN_S)
                continue
            os.close(descriptor)
            raise StartError(
                f"{path}: another daemon uses this state; stop it, or choose another state_dir"
            ) from None
        return descriptor
