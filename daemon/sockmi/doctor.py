# SPDX-License-Identifier: MIT
"""``sockmi doctor``: each thing that would make a migration fail here, and its mend."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sockmi.addresses import Endpoint
from sockmi.api import Check, CheckStatus
from sockmi.engine.listing import unlistable
from sockmi.parts import Parts
from sockmi.redirect.base import Mode

# Bits of linux/capability.h, and what fails without each.
_CAPABILITIES = {
    0: ("CAP_CHOWN", "imported sockets do not get the user of their application"),
    2: ("CAP_DAC_READ_SEARCH", "owners of other users are not found"),
    10: ("CAP_NET_BIND_SERVICE", "ports below 1024 cannot be imported"),
    12: ("CAP_NET_ADMIN", "nothing can be moved"),
    13: ("CAP_NET_RAW", "held packets and ICMP errors cannot be delivered"),
    19: ("CAP_SYS_PTRACE", "sockets of other processes cannot be taken"),
    21: ("CAP_SYS_ADMIN", "every socket is refused: sockets in BPF maps cannot be told"),
}
_PROC = Path("/proc")
_IPTABLES_MEND = "Mend that, or leave iptables out of redirect.modes."
_CONNECT_TIMEOUT_S = 1.5
_CONNECTS_MAX = 16  # at the same time
_SPACE_BYTES_MIN = 64 << 20
_DESCRIPTORS_MIN = 4096


def examine(daemon: Parts) -> list[Check]:
    """All checks that are quick, in the order in which they should be mended."""
    return [
        _capabilities(),
        _engine(daemon),
        _nftables(daemon),
        *([] if daemon.shell.engine.name == "kernel" else [_ptrace_scope()]),
        _socket_lists(),
        _descriptors(),
        _space(daemon.config.state_dir),
        _journal(daemon),
        _members(daemon),
        _keys(daemon),
        *_forwarding(daemon),
        _reverse_path(),
        _import_lists(daemon),
    ]


def examine_slowly(
    modes: Sequence[Mode], silent: Mapping[str, Sequence[Endpoint]], unled: Callable[[], list[str]]
) -> list[Check]:
    """The others, which may take seconds; in any thread. ``silent``: members without an open stream.

    ``unled``: devices for which the redirects have nothing.
    """
    return [_devices(unled), *_iptables(modes), _streams(silent)]


def _ok(name: str, message: str) -> Check:
    return Check(name=name, status=CheckStatus.OK, message=message)


def _bad(name: str, message: str, mend: str, *, warning: bool = False) -> Check:
    status = CheckStatus.WARNING if warning else CheckStatus.ERROR
    return Check(name=name, status=status, message=message, mend=mend)


def _capabilities() -> Check:
    status = (_PROC / "self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    missing = [
        f"{name} ({without})" for bit, (name, without) in _CAPABILITIES.items() if not effective >> bit & 1
    ]
    if missing:
        return _bad(
            "capabilities",
            f"The daemon lacks {', '.join(missing)}.",
            "Run it as root, or add them to its unit.",
        )
    return _ok("capabilities", "The daemon has the capabilities that it needs.")


def _engine(daemon: Parts) -> Check:
    engine = daemon.shell.engine
    if engine.name == "kernel":
        return _ok("engine", f"kernel, by the module with device interface {engine.version}.")
    if Path("/dev/sockmi").exists() and daemon.why_engine:
        return _bad(
            "engine",
            f"repair, though a module is loaded: {daemon.why_engine}.",
            "Mend that and restart the daemon, or set engine: repair.",
            warning=True,
        )
    return _ok("engine", f"repair{f', as {daemon.why_engine}' if daemon.why_engine else ''}.")


def _nftables(daemon: Parts) -> Check:
    try:
        held = len(daemon.tables.held())
    except OSError as error:
        return _bad(
            "nftables", f"The tables cannot be read: {error}.", "Restart the daemon; it makes them again."
        )
    if not daemon.tables.guard.is_up:
        return _bad(
            "nftables",
            "Nothing drops RSTs while somebody else has flushed the ruleset.",
            "Do not flush it while connections have moved; Linux 5.12 and later can guard them.",
            warning=True,
        )
    return _ok("nftables", f"The tables are in place; {held} connections are held now.")


def _ptrace_scope() -> Check:
    path = _PROC / "sys/kernel/yama/ptrace_scope"
    scope = path.read_text().strip() if path.exists() else "0"
    if scope == "3":
        return _bad(
            "ptrace",
            "kernel.yama.ptrace_scope is 3: owners cannot be stopped, so no socket can be exported.",
            "Set it to 2 or less; it takes a reboot to leave 3.",
        )
    return _ok("ptrace", "Owners of sockets can be stopped.")


def _socket_lists() -> Check:
    if why := unlistable():
        return _bad(
            "socket lists",
            f"Sockets cannot be found or examined: {why}.",
            "Load the modules: modprobe -a tcp_diag inet_diag.",
        )
    return _ok("socket lists", "The kernel lists TCP sockets (tcp_diag).")


def _descriptors() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _DESCRIPTORS_MIN:
        return _bad(
            "descriptors",
            f"At most {soft} descriptors are allowed (hard limit {hard}), one for each socket of a batch.",
            "Raise LimitNOFILE in the unit.",
            warning=True,
        )
    return _ok("descriptors", f"{soft} descriptors are allowed.")


def _space(directory: Path) -> Check:
    place = os.statvfs(directory)
    free = place.f_bavail * place.f_frsize
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


def _keys(daemon: Parts) -> Check:
    strangers = daemon.members.refused_lately("unknown_key")
    if strangers:
        where = ", ".join(f"{address} (group {group})" for group, address in strangers)
        return _bad(
            "group key",
            f"Datagrams of another key are heard, from {where}: that daemon is not of this group.",
            "Give both the same key file, then reload (docs/security.md has how keys are changed).",
            warning=True,
        )
    copies = daemon.members.refused_lately("own_id_elsewhere")
    if copies:
        where = ", ".join(f"{address} (group {group})" for group, address in copies)
        return _bad(
            "group key",
            f"Another host has this host's id: {where}.",
            "Remove identity.pem from the state_dir of one of the two, and restart its daemon.",
        )
    return _ok("group key", "Nobody with another key is heard.")


def _sysctl(name: str) -> str | None:
    path = _PROC / "sys" / name
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


def _reverse_path() -> Check:
    """The kernel takes the stricter of `all` and the interface, and either's src_valid_mark."""
    marked_all = _sysctl("net/ipv4/conf/all/src_valid_mark") == "1"
    strict_all = _sysctl("net/ipv4/conf/all/rp_filter") or "0"
    strict = []
    for path in sorted((_PROC / "sys/net/ipv4/conf").iterdir()):
        name = path.name
        if name in ("all", "default", "lo"):
            continue
        filtering = max(strict_all, _sysctl(f"net/ipv4/conf/{name}/rp_filter") or "0")
        if filtering == "1" and not (marked_all or _sysctl(f"net/ipv4/conf/{name}/src_valid_mark") == "1"):
            strict.append(name)
    if strict:
        return _bad(
            "reverse path",
            f"rp_filter is 1 (strict) without src_valid_mark on {', '.join(strict)}: packets of moved "
            "connections may be dropped.",
            "Set net.ipv4.conf.all.src_valid_mark to 1, or rp_filter to 2.",
            warning=True,
        )
    return _ok("reverse path", "Packets of moved connections pass the reverse path filter.")


def _devices(unled: Callable[[], list[str]]) -> Check:
    mend = "Restart the daemon, if it does not make them within a minute; its log has why it cannot."
    try:
        if names := unled():
            return _bad("devices", f"There are no redirects for {', '.join(names)}.", mend)
    except OSError as error:
        return _bad("devices", f"The devices of the redirects are not as configured: {error}.", mend)
    return _ok("devices", "Every device by which peers may come has its redirects.")


def _iptables(modes: Sequence[Mode]) -> list[Check]:
    if Mode.IPTABLES not in modes:
        return []
    # And pyroute2 with it: only for who uses that mode.
    from sockmi.redirect.iptables import unloaded, unusable

    if why := unusable() or unloaded():
        return [_bad("iptables", f"Redirects in mode iptables cannot be set up: {why}.", _IPTABLES_MEND)]
    return [_ok("iptables", "iptables is the legacy one; python-iptables and its modules are there.")]


def _streams(silent: Mapping[str, Sequence[Endpoint]]) -> Check:
    """Members that are heard (UDP), but may not be reached (TCP): a firewall knows the one port only."""
    with ThreadPoolExecutor(_CONNECTS_MAX) as pool:
        tried = dict(zip(silent, pool.map(_unreachable, silent.values()), strict=True))
    deaf = [f"{name} ({why})" for name, why in tried.items() if why]
    if deaf:
        return _bad(
            "streams",
            f"The stream port does not answer of {', '.join(deaf)}.",
            "Let TCP to stream.port pass between the hosts; look whether stream.address there is right.",
        )
    return _ok("streams", "Every host that is heard can be connected to.")


def _unreachable(endpoints: Sequence[Endpoint]) -> str | None:
    why = "it names none"
    for endpoint in endpoints:
        try:
            where = (str(endpoint.address), endpoint.port)
            socket.create_connection(where, timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            why = f"{endpoint}: {error}"
        else:
            return None
    return why


def _import_lists(daemon: Parts) -> Check:
    lists = daemon.importing.stock.lists
    full = [kind for kind in lists.maxima if lists.room(kind) == 0]
    if full:
        return _bad(
            "import lists",
            f"The list of {', '.join(full)} sockets is full: this host declines what is offered.",
            "Let applications import them, or raise imports.max_* and reload.",
            warning=True,
        )
    left = {kind: count for kind, count in lists.counts().items() if count and not lists.waiting_for(kind)}
    if left:
        what = ", ".join(f"{count} {kind}" for kind, count in left.items())
        return _bad(
            "import lists",
            f"For {what} sockets no application waits.",
            "Start the application that imports them; sockmi list imports shows which they are.",
            warning=True,
        )
    return _ok("import lists", "There is room in the import lists.")
