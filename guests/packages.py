# SPDX-License-Identifier: MIT
"""Packages that the harness itself needs on this machine, installed when they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from guests.errors import HarnessError
from guests.work import alone, say


def installed(package: str) -> bool:
    """Whether dpkg has ``package``, whole."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"


def need(packages: Iterable[str]) -> None:
    """Install those of ``packages`` that are missing. Raises HarnessError if apt cannot."""
    missing = [package for package in packages if not installed(package)]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise HarnessError(
            f"missing packages: {' '.join(missing)}; install them, or run this as root on Debian"
        )
    with alone("apt"):
        say(f"installing {' '.join(missing)}")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise HarnessError(f"{' '.join(command)} failed: {done.stderr.strip()[-800:]}")
