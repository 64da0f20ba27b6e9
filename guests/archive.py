# SPDX-License-Identifier: MIT
"""Debian packages of any suite, fetched by apt with folders of its own: this machine's are not touched."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from guests.errors import HarnessError
from guests.paths import CACHE, room
from guests.work import alone, say

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = os.environ.get("SOCKMI_DEBIAN_MIRROR", "http://deb.debian.org/debian")
SECURITY = os.environ.get("SOCKMI_DEBIAN_SECURITY", "http://deb.debian.org/debian-security")
LISTS_LIFE = 7 * 86400  # seconds: kernels are pinned by what was built from them, not by the newest list


def sources(suite: str) -> str:
    """The lines of a sources.list for ``suite``."""
    lines = [f"deb [signed-by={KEYRING}] {MIRROR} {suite} main"]
    if suite != "sid":
        lines.append(f"deb [signed-by={KEYRING}] {MIRROR} {suite}-updates main")
        lines.append(f"deb [signed-by={KEYRING}] {SECURITY} {suite}-security main")
    return "".join(f"{line}\n" for line in lines)


class Archive:
    """One suite's packages."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.folder = room(CACHE / "archive" / suite)

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        own = {
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": room(self.folder / "state"),
            "Dir::State::lists": room(self.folder / "state/lists/partial").parent,
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": room(self.folder / "cache/archives/partial").parent.parent,
            # Snapshots of a mirror, and sid's in particular, may be older than their own date of expiry.
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Retries": "3",
            # Without this, lists that could not be fetched are no more than a warning.
            "APT::Update::Error-Mode": "any",
            "APT::Sandbox::User": "root",
            "APT::Get::List-Cleanup": "false",
        }
        options = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
        words = [command[0], *options, *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=1800, check=False)
        if done.returncode:
            raise HarnessError(
                f"{' '.join(command)} ({self.suite}, {MIRROR}) failed; the kernels come from Debian's "
                f"archive: make it reachable, or name a mirror in SOCKMI_DEBIAN_MIRROR: "
                f"{done.stderr.strip()[-800:]}"
            )
        return done.stdout

    def refresh(self) -> None:
        """Fetch the package lists, unless that was done within the week."""
        with alone(f"archive-{self.suite}"):
            stamp = self.folder / "refreshed"
            (self.folder / "sources.list").write_text(sources(self.suite))
            (self.folder / "status").touch()
            if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_LIFE:
                return
            say(f"fetching the package lists of {self.suite}")
            try:
                self._apt("apt-get", "update", "-qq")
            except HarnessError as error:
                if not stamp.exists():
                    raise
                say(f"going on with the lists of last time: {error}")
            stamp.touch()

    def record(self, package: str) -> dict[str, str]:
        """The fields of the newest ``package``. Raises HarnessError if the suite has none."""
        return _record(self.suite, package)

    def read(self, package: str) -> dict[str, str]:
        """Like record(), but asks apt each time."""
        self.refresh()
        text = self._apt("apt-cache", "show", "--no-all-versions", package)
        fields = re.findall(r"^([A-Za-z0-9-]+): (.*)$", text, flags=re.MULTILINE)
        if not fields:
            raise HarnessError(f"{self.suite} has no package {package}; look for its new name with apt-cache")
        return dict(fields)

    def depends(self, package: str) -> list[str]:
        """Names of the packages that ``package`` depends on, first alternatives only."""
        field = self.record(package).get("Depends", "")
        return [re.split(r"[ (|:]", part.strip(), maxsplit=1)[0] for part in field.split(",") if part.strip()]

    def closure(self, package: str, pattern: str) -> list[str]:
        """``package`` and what it needs, however indirectly, among the names that match ``pattern``."""
        found: list[str] = []
        wanted = [package]
        while wanted:
            name = wanted.pop()
            if name not in found:
                found.append(name)
                wanted += [other for other in self.depends(name) if re.search(pattern, other)]
        return found

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """The ``.deb`` files of ``packages``, from the cache where they were fetched before."""
        self.refresh()
        held = room(self.folder / "debs")
        files = []
        for package in packages:
            record = self.record(package)
            file = held / f"{package}_{record['Version'].replace(':', '%3a')}_{record['Architecture']}.deb"
            with alone(f"archive-{self.suite}"):
                if not file.exists():
                    say(f"fetching {package} {record['Version']} of {self.suite}")
                    self._apt("apt-get", "download", "-qq", f"{package}={record['Version']}", cwd=held)
            if not file.exists():
                raise HarnessError(f"apt fetched {package} into {held}, but not as {file.name}")
            files.append(file)
        return files

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Put the contents of ``packages`` below ``into``; no maintainer script runs."""
        room(into)
        for file in self.fetch(packages):
            subprocess.run(["dpkg-deb", "-x", file, into], check=True, timeout=1800)


@functools.cache
def _record(suite: str, package: str) -> dict[str, str]:
    return Archive(suite).read(package)
