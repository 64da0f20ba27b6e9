# SPDX-License-Identifier: MIT
"""Daemons of a lab that outlive the program which started them: ``python3 -m lab daemons``.

What runs is what answers on a host's control socket; its pid is the kernel's word (SO_PEERCRED).
All hosts share one key, so that daemons started later join the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lab import record
from lab.daemons import Daemon, daemon_config, key_file, write_secret
from lab.host import Host
from lab.labs import Lab
from lab.plan import DAEMON_HOSTS, LabError

_STOP_TIMEOUT_S = 15.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred


def chosen_hosts(lab: Lab, text: str) -> list[Host]:
    """The hosts of ``a,b,c``; raise LabError for one that can have no daemon."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in DAEMON_HOSTS:
            raise LabError(f"no daemon can run on {name!r}; choose among {', '.join(DAEMON_HOSTS)}")
    return [lab.host(name) for name in DAEMON_HOSTS if name in names]


def up(lab: Lab, hosts: Sequence[Host], *, check: bool = False) -> list[dict[str, Any]]:
    """Have the daemon run on each host with the lab's configuration; a row for each, ``changed`` if touched.

    Hosts that multicast does not reach (``d``) make all of the call name each other instead.
    ``check`` only says what would change.
    """
    with _locked(lab, must_exist=not check) as there:
        if not there:
            return [{"host": host.name, "pid": None, "changed": True} for host in hosts]
        key = _shared_key(lab)
        unicast = any(host.name == "d" for host in hosts)
        rows = []
        for host in hosts:
            daemon = Daemon(host, daemon_config(host, hosts if unicast else ()))
            changed = running(host) is None or _config(daemon) != daemon.config or _key(host) != key
            if changed and not check:
                _stop(host)
                write_secret(key_file(host), key)
                daemon.start(detached=True)
            rows.append({"host": host.name, "pid": running(host), "changed": changed})
        return rows


def down(lab: Lab, hosts: Sequence[Host], *, check: bool = False) -> list[dict[str, Any]]:
    """Stop the daemons (SIGTERM: they finish or undo what is under way); a row for each host."""
    with _locked(lab, must_exist=False) as there:
        rows = []
        for host in hosts:
            changed = there and running(host) is not None
            if changed and not check:
                _stop(host)
            rows.append({"host": host.name, "pid": running(host) if there else None, "changed": changed})
        return rows


def status(lab: Lab, hosts: Sequence[Host]) -> list[dict[str, Any]]:
    """A row for each host: ``pid`` of its daemon, None if none answers."""
    return [{"host": host.name, "pid": running(host), "changed": False} for host in hosts]


def running(host: Host) -> int | None:
    """Process id of the daemon that answers on the host's control socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(host.control_socket))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
    return int(_CREDENTIALS.unpack(credentials)[0]) or None


@contextlib.contextmanager
def _locked(lab: Lab, *, must_exist: bool) -> Iterator[bool]:
    """Nobody makes or removes labs, or starts daemons, at the same time; whether the lab is up."""
    with record.locked():
        found = record.read(lab.name)
        there = found is not None and found.alive and not lab.missing()
        if must_exist and not there:
            raise LabError(f"lab {lab.name} is not up; make it first: python3 -m lab up --lab {lab.name}")
        yield there


def _stop(host: Host) -> None:
    pid = running(host)
    if pid is None:
        return
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if running(host) != pid:  # it ended before the pidfd was open, which may be another's
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], _STOP_TIMEOUT_S)[0]:
                return
        raise LabError(f"the daemon on {host.name} (pid {pid}) does not end")
    finally:
        os.close(pidfd)


def _shared_key(lab: Lab) -> str:
    keys = [_key(lab.host(name)) for name in DAEMON_HOSTS]
    return next((key for key in keys if key), secrets.token_hex(32))


def _key(host: Host) -> str:
    with contextlib.suppress(OSError):
        return key_file(host).read_text().strip()
    return ""


def _config(daemon: Daemon) -> Any:
    with contextlib.suppress(OSError, yaml.YAMLError):
        return yaml.safe_load(daemon.config_file.read_text())
    return None
