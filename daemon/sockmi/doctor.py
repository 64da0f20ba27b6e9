# SPDX-License-Identifier: MIT
"""``sockmi doctor``: each thing that would make a migration fail here, and its mend."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sockmi.api import Check, CheckStatus
from sockmi.parts import Parts
from sockmi.redirect.base import Mode

_CAPABILITIES = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW", 19: "CAP_SYS_PTRACE"}
_SPACE_BYTES_MIN = 64 << 20
_DESCRIPTORS_MIN = 4096


def examine(daemon: Parts) -> list[Check]:
    """All checks, in the order in which they should be mended."""
    return [
        _capabilities(),
        _nftables(daemon),
        _ptrace_scope(),
        _descriptors(),
        _space(daemon.config.state_dir),
        _journal(daemon),
        _members(daemon),
        *_forwarding(daemon),
        _import_lists(daemon),
    ]


def _ok(name: str, message: str) -> Check:
    return Check(name=name, status=CheckStatus.OK, message=message)


def _bad(name: str, message: str, mend: str, *, warning: bool = False) -> Check:
    status = CheckStatus.WARNING if warning else CheckStatus.ERROR
    return Check(name=name, status=status, message=message, mend=mend)


def _capabilities() -> Check:
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    missing = [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        return _bad(
            "capabilities",
            f"The daemon lacks {', '.join(missing)}.",
            "Run it as root, or add them to its unit.",
        )
    return _ok("capabilities", "The daemon has the capabilities that it needs.")


def _nftables(daemon: Parts) -> Check:
    try:
        held = len(daemon.tables.held())
    except OSError as error:
        return _bad(
            "nftables", f"The tables cannot be read: {error}.", "Restart the daemon; it makes them again."
        )
    return _ok("nftables", f"The tables are in place; {held} connections are held now.")


def _ptrace_scope() -> Check:
    path = Path("/proc/sys/kernel/yama/ptrace_scope")
    scope = path.read_text().strip() if path.exists() else "0"
    if scope == "3":
        return _bad(
            "ptrace",
            "kernel.yama.ptrace_scope is 3: owners cannot be stopped, so no socket can be exported.",
            "Set it to 2 or less; it takes a reboot to leave 3.",
        )
    return _ok("ptrace", "Owners of sockets can be stopped.")


def _descriptors() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _DESCRIPTORS_MIN:
        return _bad(
            "descriptors",
            f"At most {hard} descriptors are allowed.",
            "Raise LimitNOFILE in the unit.",
            warning=True,
        )
    return _ok("descriptors", f"{soft} descriptors are allowed.")


def _space(directory: Path) -> Check:
    free = shutil.disk_usage(directory).free
    if free < _SPACE_BYTES_MIN or not os.access(directory, os.W_OK):
        return _bad(
            "space",
            f"{directory} has {free >> 20} MiB left; images and the journal go there.",
            "Make room there.",
        )
    return _ok("space", f"{directory} has {free >> 20} MiB left.")


def _journal(daemon: Parts) -> Check:
    try:
        daemon.journal.fold()
    except Exception as error:
        return _bad(
            "journal", f"The journal cannot be written: {error}.", "See the file system of state_dir."
        )
    return _ok("journal", "The journal can be written.")


def _members(daemon: Parts) -> Check:
    count = daemon.members.count()
    if count == 0:
        return _bad(
            "group",
            "No other daemon has been heard.",
            "Check that the others run, have the same group key, address and port, and that no firewall "
            "drops UDP to the group's port; without multicast list them under groups.members.",
        )
    return _ok("group", f"{count} other hosts are heard.")


def _sysctl(name: str) -> str | None:
    path = Path("/proc/sys", name)
    return path.read_text().split()[0] if path.exists() else None


def _forwarding(daemon: Parts) -> list[Check]:
    if Mode.NAT not in daemon.config.redirect.modes:
        return []
    closed = [
        name for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding") if _sysctl(name) == "0"
    ]
    if closed:
        names = " and ".join(name.replace("/", ".") for name in closed)
        return [
            _bad(
                "forwarding",
                f"{names} is 0: redirects in mode nat cannot lead packets on.",
                f"Set {names} to 1, or leave nat out of redirect.modes.",
                warning=True,
            )
        ]
    return [_ok("forwarding", "Packets can be led on to hosts of other segments.")]


def _import_lists(daemon: Parts) -> Check:
    full = [kind for kind in daemon.importing.lists.maxima if daemon.importing.lists.room(kind) == 0]
    if full:
        return _bad(
            "import lists",
            f"The list of {', '.join(full)} sockets is full: this host declines what is offered.",
            "Let applications import them, or raise imports.max_* and reload.",
            warning=True,
        )
    return _ok("import lists", "There is room in the import lists.")
