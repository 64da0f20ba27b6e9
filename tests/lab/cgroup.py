# SPDX-License-Identifier: MIT
"""A cgroup that looks like one of systemd's, on a machine that need not run systemd."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def unit(kind: str = "smt-{}.service") -> Iterator[Path]:
    """Its directory: who is written to ``cgroup.procs`` is in it until the end. Skips if none can be made.

    ``kind``: its name, with the process id of the test in place of ``{}``.
    """
    group = _made(kind.format(os.getpid()))
    try:
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Whoever is left in it is put out; who has just ended keeps it for a moment."""
    end = time.monotonic() + 10
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (group.parent / "cgroup.procs").write_text(pid)
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _made(name: str) -> Path:
    for root in ("", "unified", "systemd", "pids"):
        path = Path("/sys/fs/cgroup", root, name)
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / "cgroup.procs").exists():
            return path
        path.rmdir()
    pytest.skip("no cgroup can be made here, so no process can be put into a unit")
