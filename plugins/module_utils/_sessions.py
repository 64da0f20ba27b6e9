# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sockets that carry this Ansible session; private to this collection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def own_inodes() -> set[int]:
    """Inodes of all sockets of this process and its ancestors, up to the server of the login (sshd)."""
    inodes = set()
    pid = os.getpid()
    while pid > 1:
        inodes |= _inodes_of(pid)
        pid = _parent_of(pid)
    return inodes


def carries_login(row: dict[str, Any]) -> bool:
    """Whether ``row`` of the socket list is the SSH connection of the environment (also of an async task)."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return False
    remote, remote_port, local, local_port = words
    return row.get("local") == _endpoint(local, local_port) and row.get("remote") == _endpoint(
        remote, remote_port
    )


def _endpoint(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _inodes_of(pid: int) -> set[int]:
    found = set()
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return found
    for descriptor in descriptors:
        try:
            link = os.readlink(descriptor)  # noqa: PTH115 - Path.readlink is not in Python 3.8
        except OSError:
            continue
        if link.startswith("socket:["):
            found.add(int(link[8:-1]))
    return found


def _parent_of(pid: int) -> int:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
        return int(after_name.split()[1])
    except (OSError, IndexError, ValueError):
        return 0
