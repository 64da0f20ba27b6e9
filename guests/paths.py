# SPDX-License-Identifier: MIT
"""Where the harness keeps what it makes: all below ``.build/``, which git ignores."""

from __future__ import annotations

import hashlib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
CACHE = PROJECT / ".build/kernels"
LOGS = PROJECT / ".build/logs"


def digest(*parts: str | bytes) -> str:
    """Twelve hexadecimal digits that name what was made from ``parts``."""
    made = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        made.update(b"%d:" % len(encoded) + encoded)
    return made.hexdigest()[:12]


def room(folder: Path) -> Path:
    """``folder``, made if it was not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
