# SPDX-License-Identifier: MIT
"""Guests that outlive the command that started them: a process of its own keeps them, and ends with them.

``DIR/guests.json`` describes them for an inventory: name, kernel, suite, addresses on the segment, the port
and key for ssh, and the socket of QEMU's monitor (see guests.monitor).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from guests.dkms import built
from guests.errors import HarnessError
from guests.guest import Guest, Plan, private_key
from guests.kernels import DEBIAN_KERNELS, dkms_packages
from guests.paths import room
from guests.segment import Segment
from guests.work import say

KINDS = {
    "": "a whole system",
    "quick": "the quick init instead of systemd",
    "module": "with the kernel module loaded",
    "dkms": "with DKMS and the kernel's headers, and the module built, but not installed",
}

UNPRIVILEGED = """
set -eu
useradd --create-home --shell /bin/bash "$1"
install -d -m 700 -o "$1" -g "$1" "/home/$1/.ssh"
install -m 600 -o "$1" -g "$1" /root/.ssh/authorized_keys "/home/$1/.ssh/authorized_keys"
echo "$1 ALL=(ALL:ALL) NOPASSWD: ALL" >"/etc/sudoers.d/$1"
chmod 440 "/etc/sudoers.d/$1"
echo "PermitRootLogin no" >/etc/ssh/sshd_config.d/0-root.conf # the first counts
echo "127.0.1.1 $(uname -n)" >>/etc/hosts # sudo asks for it
systemctl restart ssh.service
"""
"""Has ssh come by an unprivileged user, who may become root by sudo, and by nobody else."""


@dataclass(frozen=True)
class Wanted:
    """One guest that ``up`` shall start."""

    name: str
    number: int
    kernel: str
    suite: str
    kind: str = ""  # one of KINDS
    user: str = "root"  # by whom ssh comes


@dataclass(frozen=True)
class Stay:
    """How long guests stay at most: so many hours, and while the process ``owner`` lives, if one is given."""

    hours: float
    owner: int = 0

    def over(self) -> Callable[[], bool]:
        """A function that says when it is over. Time runs from now. Raises HarnessError if it is already."""
        until, owned = time.monotonic() + self.hours * 3600, _started(self.owner)
        if self.owner and not owned:
            raise HarnessError(f"there is no process {self.owner} that the guests could end with")
        return lambda: time.monotonic() > until or _started(self.owner) != owned


def up(folder: Path, wanted: Sequence[Wanted], basis: Plan, stay: Stay) -> None:
    """Start guests like ``basis`` on one segment; returns when all answer ssh.

    Raises HarnessError if one does not.
    """
    stay.over()
    room(folder)
    if _kept(folder):
        raise HarnessError(f"{folder} has guests already: end them with `python3 -m guests down {folder}`")
    state = folder / "guests.json"
    state.unlink(missing_ok=True)
    log = folder / "keeper.log"
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        _detach(log)
        code = 1
        try:
            _keep(folder, wanted, replace(basis, checkout=False, ssh=True), writer, stay)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        told.read()  # ends when the keeper says so, or dies
    if not state.exists():
        raise HarnessError(f"the guests did not start: {log.read_text().strip()}")


def down(folder: Path) -> None:
    """End them; nothing happens if there are none."""
    keeper = _kept(folder)
    if keeper:
        with contextlib.suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while _kept(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _kept(folder):
            raise HarnessError(
                f"the keeper {keeper} of {folder} does not end; kill -9 it, which ends its guests too"
            )
    for name in ("guests.json", "keeper.pid"):
        (folder / name).unlink(missing_ok=True)


def machines(folder: Path) -> list[dict[str, Any]]:
    """What ``guests.json`` says of the guests of ``folder``; raises HarnessError if there are none."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / "guests.json").read_text())
    except FileNotFoundError:
        raise HarnessError(
            f"{folder} has no guests: start some with `python3 -m guests up {folder}`"
        ) from None
    return found


def _kept(folder: Path) -> int:
    """The keeper's process, or 0."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        number, started = (folder / "keeper.pid").read_text().split()
        if _started(int(number)) == started:
            return int(number)
    return 0


def _started(process: int) -> str:
    """When a process started, which tells it from a later one of the same number."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":
            return fields[19]
    return ""


def _detach(log: Path) -> None:
    os.setsid()
    os.chdir("/")
    with log.open("wb") as out, Path("/dev/null").open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)


def _keep(folder: Path, wanted: Sequence[Wanted], basis: Plan, ready: int, stay: Stay) -> None:
    def stop(*_unused: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    (folder / "keeper.pid").write_text(f"{os.getpid()} {_started(os.getpid())}")
    segment = Segment()
    over = stay.over()
    with contextlib.ExitStack() as stack:
        guests = []
        for one in wanted:
            kernel = DEBIAN_KERNELS[one.kernel]
            plan = replace(basis, kernel=kernel, suite=one.suite, name=one.name)
            plan = replace(plan, number=one.number, segments=[segment])
            plan = replace(plan, systemd=basis.systemd and one.kind != "quick")
            if one.kind == "dkms":
                plan = replace(plan, packages=[*basis.packages, *dkms_packages(kernel)])
            guests.append(stack.enter_context(Guest(plan)))
        for guest, one in zip(guests, wanted, strict=True):
            guest.wait()
            if one.kind == "module":
                guest.load(guest.plan.kernel.module())
            if one.user != "root":
                guest.run(["sh", "-c", UNPRIVILEGED, "sh", one.user])
            if one.kind == "dkms" and guest.emulated:
                guest.run(["tar", "-C", "/", "-x"], data=built(guest.plan.kernel).read_bytes())
        described = [
            asdict(one) | {
                "ipv4": segment.ipv4(one.number), "ipv6": segment.ipv6(one.number), "ssh_host": "127.0.0.1",
                "ssh_port": guest.ssh_port, "ssh_user": one.user, "ssh_key": str(private_key()),
                "console": str(guest.console), "monitor": str(guest.monitor), "emulated": guest.emulated,
            }
            for one, guest in zip(wanted, guests, strict=True)
        ]  # fmt: skip
        fresh = folder / "guests.json.new"
        fresh.write_text(json.dumps(described, indent=2))
        fresh.rename(folder / "guests.json")
        os.close(ready)
        while not over():
            time.sleep(1)
            for guest in guests:
                if not guest.alive:
                    say(f"{guest.plan.name} ended; its console: {guest.console}")
                    return
