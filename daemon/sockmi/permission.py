# SPDX-License-Identifier: MIT
"""Whose sockets a caller may move: only those that he could take with ptrace(2) himself (docs/control.md)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sockmi.engine.owners import process_name
from sockmi.frozen import frozen
from sockmi.refusal import Code, Refusal


@frozen
class Caller:
    """A process that is not an administrator's, as the kernel named it (SO_PEERCRED)."""

    pid: int
    uid: int

    def obstacle(self, holders: Iterable[int]) -> Refusal | None:
        """Why the caller may not move a socket that these processes hold; None if he may.

        Each must be the caller, or have the caller's user as its real, effective and saved one. A
        process that has ended meanwhile holds nothing; one whose users cannot be read is not his.
        """
        for pid in holders:
            if pid != self.pid and not self._owns(pid):
                return Refusal(
                    Code.NO_PRIVILEGE,
                    f"Process {process_name(pid)} (pid {pid}) holds this socket too, and is not user "
                    f"{self.uid}'s; let it close its descriptor, or let an administrator (root) export it.",
                )
        return None

    def _owns(self, pid: int) -> bool:
        try:
            text = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False
        for line in text.splitlines():
            if line.startswith("Uid:"):
                # Real, effective, saved and file system user (proc_pid_status(5)).
                return {int(one) for one in line.split()[1:4]} == {self.uid}
        return False
