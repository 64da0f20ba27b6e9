# SPDX-License-Identifier: MIT
"""An owner that ends its connection while that is frozen: the end is not lost, and nothing moves.

The daemon's descriptor is the last one then, and the end goes out when it is closed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab.capture import Capture
from lab.labs import Lab
from tests.lab.crash_lab import cluster, elements
from tests.lab.scenario import ask, status, until
from tests.lab.test_owners import task_state
from tests.lab.test_passed_on import go_on, program, says

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT = 7790
#: Where the daemon pauses meanwhile: the image is made; all is prepared; the decision is written.
POINTS = ("freeze.captured", "commit.led-away", "commit.journalled")

OWNER = f"""
import os, socket, sys
listener = socket.create_server((sys.argv[1], {PORT}), family=socket.AF_INET)
print("ready", flush=True)
mine = listener.accept()[0]
listener.close()
if sys.argv[2] == "one of two":
    other = mine.dup()
print("accepted", flush=True)
sys.stdin.readline()
mine.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def end(process: subprocess.Popen[str], how: str) -> None:
    """The owner closes its connection, or is killed."""
    if how == "killed":
        process.kill()
        until(lambda: task_state(process.pid) == "Z")
    else:
        go_on(process)
        assert says(process) == "closed"


def ended_while_frozen(lab: Lab, directory: Path, how: str, point: str, **overrides: Any) -> None:
    """The owner ends it when the daemon is at ``point``; ``how``: "closed", "killed" or "one of two"."""
    host, peer = lab.host("a"), lab.host("peer")
    timing = {"freeze_deadline_s": 5.0}
    with (
        cluster(lab, "ab", {"a": f"{point}:1:STOP"}, timing=timing, **overrides) as running,
        Capture(peer, f"tcp port {PORT}", directory / "peer.pcap") as capture,
        program(host, OWNER, host.address(4), how) as process,
        peer.socket() as client,
        ThreadPoolExecutor(1) as thread,
    ):
        assert says(process) == "ready"
        client.settimeout(20)
        client.connect((host.address(4), PORT))
        assert says(process) == "accepted"
        wanted = {"local_port": PORT, "kinds": ["connected"]}
        row = ask(host, "list", filter=wanted)[0]["sockets"][0]
        one = {"pid": row["pid"], "fd": row["fd"]}
        moving = thread.submit(ask, host, "export", sockets=[one], to="b", timeout_s=30)
        running.stopped("a")
        end(process, how)
        running.signal("a", signal.SIGCONT)
        [record] = moving.result(60)[-1]["migrations"]
        if how == "one of two":
            assert record["outcome"] == "moved", record
            assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
            return
        assert (record["outcome"], record["refusal"]["code"]) == ("aborted", "no-such-socket"), record
        assert client.recv(1) == b""
        until(lambda: not [one for name in "ab" for one in elements(lab.host(name)) if one.name == "hold"])
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 0
    verdict = capture.check()
    assert verdict.clean, str(verdict)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_is_stopped(lab: Lab, tmp_path: Path, point: str) -> None:
    """With this engine its owner cannot close it, but be killed."""
    ended_while_frozen(lab, tmp_path, "killed", point)
