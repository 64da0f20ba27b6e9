# SPDX-License-Identifier: MIT
"""Makes a later release of SockMi of this checkout's sources, in the folder FOLDER, and its wheelhouse in it.

There has been one release so far, so the next one differs in nothing but its number and its module's,
which are VERSION.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
NEEDED = ("daemon", "kmod", "docs", "completions", "scripts")
NUMBERED = {
    "daemon/pyproject.toml": 'version = "',
    "daemon/sockmi/version.py": 'VERSION = "',
    "kmod/dkms.conf": 'PACKAGE_VERSION="',
    "kmod/main.c": 'MODULE_VERSION("',
}
"""Files that name the release, and what stands before its number there."""


def main(folder: Path, version: str) -> None:
    """Make it."""
    shutil.rmtree(folder, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "*.so", "*.o", "*.ko", ".*")
    for name in NEEDED:
        shutil.copytree(PROJECT / name, folder / name, ignore=skipped)
    for name, before in NUMBERED.items():
        file = folder / name
        pattern = rf'^({re.escape(before)})[^"]+'
        text, count = re.subn(pattern, rf"\g<1>{version}", file.read_text(), flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"{name} has {count} lines that begin with {before}, not one")
        file.write_text(text)
    pythons = [f"--python={one}" for one in ("3.11", "3.13")]  # of Debian 12 and 13
    subprocess.run(
        [sys.executable, folder / "scripts/wheelhouse", folder / "wheelhouse", *pythons], check=True
    )


main(Path(sys.argv[1]), sys.argv[2])
