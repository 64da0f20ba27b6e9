# SPDX-License-Identifier: MIT
"""Packs lab.traffic, which needs the standard library alone, into the archive FILE for a PYTHONPATH."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

TRAFFIC = Path(__file__).resolve().parents[3] / "lab/traffic"

with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("lab/__init__.py", "")  # the real one is of labs, and wants more than that
    for path in sorted(TRAFFIC.glob("*.py")):
        archive.write(path, f"lab/traffic/{path.name}")
