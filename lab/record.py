# SPDX-License-Identifier: MIT
"""What is written down about labs, so that the next start can clean up after a dead one.

``/run/sockmi-lab/LAB/lab.json`` is written before the first namespace of a lab is made and
removed after the last one is gone. It names the owner by pid and start time. A lab is dead if
its owner is dead, unless it was made to outlive its owner (``python3 -m lab up``) and is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.plan import LabError

ROOT = Path("/run/sockmi-lab")


@dataclass(frozen=True, slots=True)
class Record:
    """One lab. ``owner_start_ticks``: field 22 of ``/proc/PID/stat``, which with the pid is unique."""

    name: str
    owner_pid: int
    owner_start_ticks: int
    persistent: bool
    complete: bool = False

    @property
    def alive(self) -> bool:
        """True if the lab is somebody's."""
        if self.persistent and self.complete:
            return True
        return start_ticks(self.owner_pid) == self.owner_start_ticks

    @property
    def directory(self) -> Path:
        """Where this lab keeps its files."""
        return ROOT / self.name


def start_ticks(pid: int) -> int:
    """When the process began, in clock ticks since boot; 0 if there is no such process or it is a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if after_name[0] in "ZX" else int(after_name[19])


def own_record(name: str, *, persistent: bool) -> Record:
    """A record of a lab that this process is about to make."""
    return Record(name, os.getpid(), start_ticks(os.getpid()), persistent)


def write(record: Record) -> None:
    """Write the record, whole or not at all."""
    record.directory.mkdir(parents=True, exist_ok=True)
    new = record.directory / ".lab.json"
    new.write_text(json.dumps(asdict(record)))
    new.replace(record.directory / "lab.json")


def read(name: str) -> Record | None:
    """The record of a lab; None if there is none. An unreadable one counts as dead."""
    try:
        return Record(**json.loads((ROOT / name / "lab.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return _dead(name)


def read_all() -> list[Record]:
    """The records of all labs of this machine, dead ones included.

    Records are written and removed under the lock: for who holds it, a directory without one
    is what somebody who was killed has left.
    """
    names = [path.name for path in sorted(ROOT.iterdir()) if path.is_dir()] if ROOT.is_dir() else []
    return [read(name) or _dead(name) for name in names]


def _dead(name: str) -> Record:
    return Record(name, 0, -1, persistent=False)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Only one process makes or removes labs at a time; the kernel drops the lock of one that dies."""
    try:
        ROOT.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(ROOT / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise LabError(f"cannot write to {ROOT}; a lab needs root: run it with sudo") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
