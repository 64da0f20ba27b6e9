"""What all tests share: the C libraries are as new as their sources."""

from __future__ import annotations

import fcntl
import subprocess
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def built_libraries() -> None:
    """Build them if they are not; two test runs at the same time take turns."""
    lock = Path(tempfile.gettempdir()) / "sockmi-build.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        subprocess.run(["make", "--quiet", "-C", str(PROJECT / "daemon/libsockmi")], check=True, timeout=300)
