# SPDX-License-Identifier: MIT
"""The connection by which an operator is logged in: to drain it away would leave him without a shell."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sockmi.addresses import Endpoint, FourTuple, parse_address

_DEEP = 64


def logins(pid: int) -> frozenset[FourTuple]:
    """What sshd says of it (SSH_CONNECTION, ssh(1)) to a process and those that it descends from.

    Each is asked, as sudo(8) keeps that from those that it starts. For root: others' environments are secret.
    """
    found = set()
    for _turn in range(_DEEP):
        if pid <= 1:
            break
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _unused, value = entry.partition(b"=")
                if name == b"SSH_CONNECTION" and (one := _connection(value.decode(errors="replace"))):
                    found.add(one)
        pid = _parent(pid)
    return frozenset(found)


def _connection(text: str) -> FourTuple | None:
    with contextlib.suppress(ValueError):
        remote, remote_port, local, local_port = text.split()
        # A link-local address has its device behind it; the socket's name has not.
        ends = [(local, local_port), (remote, remote_port)]
        return FourTuple(*(Endpoint(parse_address(one.partition("%")[0]), int(port)) for one, port in ends))
    return None


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
