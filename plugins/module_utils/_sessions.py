# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sockets that carry this Ansible session; private to this collection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def own_inodes() -> set[int]:
    """Inodes of all sockets of this process, its ancestors (up to sshd) and its login session.

    An async task has lost its ancestors, and with sudo the environment that names the connection, but
    not its session.
    """
    inodes = set()
    for pid in _ancestors() | _session():
        inodes |= _inodes_of(pid)
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


def _ancestors() -> set[int]:
    found = set()
    pid = os.getpid()
    while pid > 1:
        found.add(pid)
        pid = _parent_of(pid)
    return found


def _session() -> set[int]:
    """The processes of this one's login session (systemd-logind: the scope session-N.scope)."""
    found = set()
    try:
        groups = Path("/proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in groups:
        path = line.split(":", 2)[-1]
        name = path.rpartition("/")[2]
        if not (name.startswith("session-") and name.endswith(".scope")):
            continue
        for root in ("", "/unified", "/systemd"):  # cgroup v2; with v1 beside it; v1
            try:
                members = Path(f"/sys/fs/cgroup{root}{path}/cgroup.procs").read_text()
            except OSError:
                continue
            found.update(int(pid) for pid in members.split())
    return found


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
