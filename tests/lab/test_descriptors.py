# SPDX-License-Identifier: MIT
"""A drain of more sockets than the daemon may have descriptors: none is left behind in silence."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.daemons import Daemon
from lab.labs import Lab
from tests.lab.scenario import daemons, until, wait_for_members
from tests.lab.terminal import Scene, run

SOCKETS = 400
DESCRIPTORS = 256


def restart_under(daemon: Daemon, *prefix: str) -> None:
    """Start it again under another program."""
    daemon.stop()
    command = [*prefix, sys.executable, "-m", "sockmi.service", "--config", str(daemon.config_file)]
    with daemon.log_file.open("ab") as log:
        daemon.process = daemon.host.popen(command, stdout=log, stderr=log)
    until(daemon.answers)


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    """Servers and clients of one test."""
    one = Scene(lab)
    yield one
    one.close()


def _limits(daemon: Daemon) -> tuple[int, int]:
    text = Path(f"/proc/{daemon.pid}/limits").read_text()
    found = re.search(r"Max open files\s+(\d+)\s+(\d+)", text)
    assert found
    return int(found[1]), int(found[2])


def test_the_soft_limit_is_raised(lab: Lab) -> None:
    """Login shells, containers and init scripts start daemons with 1024; only the unit says more."""
    with daemons(lab, "ab") as running:
        restart_under(running["a"], "prlimit", "--nofile=1024:4096")
        assert _limits(running["a"]) == (4096, 4096)


def test_a_drain_waits_for_descriptors(lab: Lab, scene: Scene) -> None:
    """More sockets than descriptors: they go by turns, and all go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert max(soft, hard) > 2 * SOCKETS, "this machine allows too few descriptors for the clients"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with daemons(lab, "ab") as running:
        scene.server("a", 5300)
        clients = [scene.client("a", 5300) for _turn in range(SOCKETS)]
        restart_under(running["a"], "prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")
        wait_for_members(lab, "ab")
        done = run("drain", "--port", 5300, "--kind", "connected", "--to", "b", "--json", host=lab.host("a"))
        told = done.json["progress"]
        assert (told["selected"], told["moved"]) == (SOCKETS, SOCKETS), told
        assert done.status == 0
        importer = scene.program("b", "import", "--port", 5300, "--count", SOCKETS, "--exec", "cat")
        for client in clients:
            assert client.say("over there") == "over there"
        importer.kill()
