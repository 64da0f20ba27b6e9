# SPDX-License-Identifier: MIT
"""Programs that the daemon runs: when they may begin, and that none keeps it waiting."""

from __future__ import annotations

import threading
import time

import pytest

from sockmi import processes
from sockmi.redirect.iptables import unusable
from sockmi.redirect.tables import _nft


def test_what_a_program_says() -> None:
    done = processes.run(["sh", "-c", "cat; echo no >&2; exit 3"], "text")
    assert (done.returncode, done.stdout, done.stderr) == (3, "text", "no\n")
    with pytest.raises(FileNotFoundError):
        processes.run(["/nonexistent/program"])


def test_a_program_that_does_not_end() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"the program sleep has not ended within 0\.1 s"):
        processes.run(["sleep", "20"], timeout_s=0.1)
    assert time.monotonic() - began < 10


def test_none_begins_while_a_clients_descriptors_come() -> None:
    """It would have them, and the kernel would have it wait for who serves their file system."""
    done = []
    with processes.no_new_process:
        threads = [
            threading.Thread(target=lambda: done.append(_nft(["--version"], "").returncode)),
            threading.Thread(target=lambda: done.append(unusable("/nonexistent/iptables"))),
        ]
        for one in threads:
            one.start()
        time.sleep(0.3)
        assert not done
    for one in threads:
        one.join(10)
    assert len(done) == 2
