# SPDX-License-Identifier: MIT
"""Makes a later release of SockMi of this checkout's sources, in the folder FOLDER, and its wheelhouse in it.

There has been one release so far, so the next one differs in nothing but its number, which is VERSION.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
NEEDED = ("daemon", "kmod", "docs", "completions", "scripts")
NUMBERED = {"daemon/pyproject.toml": "version", "daemon/sockmi/version.py": "VERSION"}


def main(folder: Path, version: str) -> None:
    """Make it."""
    shutil.rmtree(folder, ignore_errors=True)
    skipped = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "*.so", "*.o", "*.ko", ".*")
    for name in NEEDED:
        shutil.copytree(PROJECT / name, folder / name, ignore=skipped)
    for name, word in NUMBERED.items():
        file = folder / name
        text, count = re.subn(
            rf'^{word} = "[^"]+"', f'{word} = "{version}"', file.read_text(), flags=re.MULTILINE
        )
        if count != 1:
            sys.exit(f"{name} has {count} lines {word} = ..., not one")
        file.write_text(text)
    subprocess.run([sys.executable, folder / "scripts/wheelhouse", folder / "wheelhouse"], check=True)


main(Path(sys.argv[1]), sys.argv[2])
