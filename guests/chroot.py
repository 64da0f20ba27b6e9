# SPDX-License-Identifier: MIT
"""Small Debian systems of a given suite: to build modules in, and to make root images from."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from guests.archive import sources
from guests.errors import HarnessError
from guests.packages import need
from guests.paths import CACHE, LOGS, digest, room
from guests.work import alone, run, say


def host_suite() -> str:
    """This machine's Debian suite, or an empty string."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def debootstrap(
    suite: str, packages: Sequence[str], target: Path, log: Path, variant: str = "minbase"
) -> None:
    """Install ``suite`` with ``packages`` into the new folder ``target``."""
    if os.geteuid() != 0:
        raise HarnessError("making a Debian system needs root: run this with sudo")
    need(("mmdebstrap", "debian-archive-keyring"))
    lines = room(CACHE / "archive" / suite) / "mmdebstrap.list"
    lines.write_text(sources(suite))
    command: list[str | Path] = [
        "mmdebstrap", "--mode=root", f"--variant={variant}", "--format=directory",
        "--aptopt=Acquire::Check-Valid-Until \"false\"", "--aptopt=APT::Install-Recommends \"false\"",
        "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--skip=check/empty", f"--include={','.join(packages)}", suite, target, lines,
    ]  # fmt: skip
    run(command, log=log, limit=3600)


class Chroot:
    """A system that commands run in, cached by its suite and packages."""

    def __init__(self, suite: str, packages: Sequence[str]) -> None:
        self.suite = suite
        self.packages = tuple(packages)
        self.folder = CACHE / f"chroot-{suite}-{digest(*self.packages)}"

    def make(self) -> None:
        """Install it, once; takes one to three minutes."""
        with alone(self.folder.name):
            if self.folder.exists():
                return
            say(f"installing a {self.suite} system to build in")
            fresh = Path(f"{self.folder}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            debootstrap(self.suite, self.packages, fresh, LOGS / f"{self.folder.name}.log")
            room(fresh / "build")
            fresh.rename(self.folder)

    def command(self, build: Path, command: Sequence[str | Path]) -> list[str | Path]:
        """``command`` inside, the folder ``build`` there being /build; the mounts end with the command."""
        script = (
            'mount --bind "$1" "$0/build" && mount -t proc proc "$0/proc" && shift && '
            'exec chroot "$0" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root "$@"'
        )
        words: list[str | Path] = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            self.folder,
            build,
        ]
        return [*words, *command]
