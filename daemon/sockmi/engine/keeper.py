# SPDX-License-Identifier: MIT
"""Keepers: processes that hold what waited in the queue of a listener that moves.

A connection that has been accepted cannot be put back, and it must not go with the daemon that
accepted it. So a process of its own does that (``keep.c``), and the daemon has duplicates. The next
daemon finds the keeper by its process id and its start time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sockmi.engine.duplicate import duplicate
from sockmi.native import library
from sockmi.processes import no_new_process
from sockmi.refusal import Refusal

_TAKE, _LISTENER_GONE = b"t", b"g"
_TIMEOUT_S = 2.0


@functools.cache
def _native() -> Any:
    lib = library()
    lib.sockmi_keeper_start.argtypes = [ctypes.c_int, ctypes.c_int]
    lib.sockmi_keeper_start.restype = ctypes.c_int
    return lib


def _start_time(pid: int) -> int:
    """Clock ticks after the boot; 0 if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[19])


@dataclass(eq=False, slots=True)
class Keeper:
    """A keeper of ours, or (without ``control``) of an earlier daemon."""

    pid: int
    start_time: int
    control: socket.socket | None = None

    @classmethod
    def start(cls, listener: int) -> Keeper:
        """One for a listener; it has taken nothing yet, and ends with us. OSError if that fails."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, no_new_process:
            pid = int(_native().sockmi_keeper_start(listener, theirs.fileno()))
        if pid < 0:
            ours.close()
            raise OSError(-pid, f"cannot start a keeper: {os.strerror(-pid)}")
        ours.settimeout(_TIMEOUT_S)
        return cls(pid, _start_time(pid), ours)

    def take(self) -> int:
        """Have it accept what waits in the listener's queue, whose owner is stopped; how much it keeps now.

        OSError if it does not answer.
        """
        assert self.control is not None
        self.control.send(_TAKE)
        answer = self.control.recv(4)
        if len(answer) != 4:
            raise OSError(f"the keeper of a listener's queue (pid {self.pid}) has gone")
        return int.from_bytes(answer, sys.byteorder)

    def let_listener_go(self) -> None:
        """The listener is closed."""
        assert self.control is not None
        self.control.send(_LISTENER_GONE)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.start_time != 0 and _start_time(self.pid) == self.start_time

    def sockets(self) -> list[int]:
        """Duplicates of all sockets that it holds; none if it has gone."""
        found: list[int] = []
        if self.alive:
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(Refusal, OSError):
                    if stat.S_ISSOCK(entry.stat().st_mode):
                        found.append(duplicate(self.pid, int(entry.name)))
        return found

    def end(self) -> None:
        """Nothing that it holds is needed any more."""
        if self.control is not None:
            self.control.close()
            self.control = None
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.alive:  # not somebody else under its number
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
