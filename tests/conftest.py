# SPDX-License-Identifier: MIT
"""What all tests share: the C libraries are as new as their sources, and examples can be repeated.

Property tests try the same examples in each run; ``SOCKMI_RANDOM=1 pytest ...`` tries others.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests import collection
from tests.laws import pytest_exception_interact  # noqa: F401 - pytest calls it

PROJECT = Path(__file__).resolve().parents[1]

# Started in the background of a script, we ignore SIGINT, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same", derandomize=True)
if not os.environ.get("SOCKMI_RANDOM"):
    settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def built_libraries() -> None:
    """Build them if they are not; two test runs at the same time take turns."""
    if "SOCKMI_INSIDE" in os.environ:  # a guest, which has no compiler: the checkout brings them
        return
    lock = Path(tempfile.gettempdir()) / "sockmi-build.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        subprocess.run(["make", "--quiet", "-C", str(PROJECT / "daemon/libsockmi")], check=True, timeout=300)


@pytest.fixture(params=["newest", "oldest"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that uses it runs twice: with the newest ansible-core, and with the oldest that is allowed."""
    if request.param == "oldest":
        assert collection.OLDEST.is_dir(), "there is no oldest ansible-core; run `scripts/setup tests`"
        monkeypatch.setattr(collection, "programs", collection.OLDEST)
