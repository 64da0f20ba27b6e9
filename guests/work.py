# SPDX-License-Identifier: MIT
"""Long work of the harness: at the lowest priority, one job at a time over all processes, with a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from guests.errors import HarnessError
from guests.paths import CACHE, room

JOBS = min(2, len(os.sched_getaffinity(0)))


def say(text: str) -> None:
    """One line about what takes time, on standard error."""
    print(f"guests: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Holds the lock ``name``: who makes the same thing at the same time waits, and then finds it made."""
    with (room(CACHE / "locks") / name).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    limit: float = 7200,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run ``command`` under nice 19 for at most ``limit`` seconds, its output appended to ``log``.

    Raises HarnessError with the last lines of the log if it fails.
    """
    room(log.parent)
    words = ["nice", "-n", "19", *map(str, command)]
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(words)}\n".encode())
        output.flush()
        try:
            code = subprocess.run(
                words, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=cwd, env=env,
                timeout=limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise HarnessError(f"{words[3]} was not done after {limit:.0f} s; see {log}") from None
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise HarnessError(f"{' '.join(words[3:8])} ... failed ({code}); the end of {log}:\n{tail}")
