# SPDX-License-Identifier: MIT
"""What a descriptor is of, asked of the kernel alone.

fstat(2) asks the file's system, and who serves that (FUSE) may never answer.
"""

from __future__ import annotations

import fcntl
import os

_SOCKET = "socket:["


def link_of(descriptor: int, pid: int | str = "self") -> str:
    """What its link in /proc says; nothing if there is none, or it must not be read."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")  # noqa: PTH115 - it is fast
    except (OSError, ValueError):
        return ""


def inode_in(link: str) -> int | None:
    """The inode of the socket that ``link`` names; None if it is no socket's."""
    return int(link[len(_SOCKET) : -1]) if link.startswith(_SOCKET) else None


def can_wait(descriptor: int) -> bool:
    """Whether who serves it may keep us waiting: it is on a file system, and not in memory."""
    link = link_of(descriptor)
    if link and not link.startswith("/"):
        return False  # a socket, a pipe: the kernel's own
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)  # which only memory has; a name can be anyone's
    except OSError:
        return True
    return False
