# SPDX-License-Identifier: MIT
"""`sockmi` where its standard descriptors are closed, or nobody reads them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.client_daemon import FakeDaemon, connection

SOCKMI = [sys.executable, "-m", "sockmi.cli.main"]
REFUSED = {"outcome": "refused", "refusal": {"code": "state", "message": "No.", "errno": "ENOTSUP"}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "control"))
    with FakeDaemon(tmp_path / "control") as fake:
        yield fake


@pytest.fixture
def here() -> Iterator[socket.socket]:
    made, peer = connection()
    with made, peer:
        yield made


def test_nobody_reads_that_it_did_not_move(daemon: FakeDaemon, here: socket.socket) -> None:
    """`sockmi export ... | true` with pipefail: the exit status is that of the export."""
    daemon.outcomes = REFUSED
    read, write = os.pipe()
    os.close(read)
    export = [*SOCKMI, "--json", "export", "--pid", str(os.getpid()), "--fd", str(here.fileno())]
    done = subprocess.run(export, stdout=write, stderr=subprocess.PIPE, timeout=60, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["reload", "list redirects"])
def test_closed_descriptors(daemon: FakeDaemon, command: str, closed: str) -> None:
    expected = 4 if command.startswith("list") else 0
    shell = f"exec {' '.join(SOCKMI)} {command} {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, timeout=60, text=True, check=False)
    assert (done.returncode, done.stderr) == (expected, "")


def test_a_connection_is_joined_to_no_input(daemon: FakeDaemon) -> None:
    """It has been taken when the input is looked at: what it sends comes out."""
    dormant = daemon.put()
    shell = f"exec {' '.join(SOCKMI)} import <&-"
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as importer:
        assert dormant.peer
        deadline = time.monotonic() + 20
        while not dormant.taken and time.monotonic() < deadline:
            time.sleep(0.01)
        dormant.peer.sendall(b"it lives")
        dormant.peer.shutdown(socket.SHUT_WR)
        out, err = importer.communicate(timeout=20)
    assert (importer.returncode, out) == (0, b"it lives"), err


def test_a_command_without_standard_descriptors(daemon: FakeDaemon) -> None:
    dormant = daemon.put()
    shell = f"exec {' '.join(SOCKMI)} import --exec cat <&- >&- 2>&-"
    with subprocess.Popen(["sh", "-c", shell]) as importer:
        assert dormant.peer
        dormant.peer.settimeout(20)
        dormant.peer.sendall(b"there and back")
        assert dormant.peer.recv(99) == b"there and back"
        dormant.peer.shutdown(socket.SHUT_WR)
        assert importer.wait(20) == 0


@pytest.mark.parametrize("arguments", [["import", "--exec", "cat"], ["import", "--json", "--exec", "cat"]])
@pytest.mark.parametrize("full", [False, True])
def test_nobody_reads_what_has_come(daemon: FakeDaemon, arguments: list[str], full: bool) -> None:
    """`sockmi import --exec ... | head -1`, or into a full disk: the connection is taken already."""
    dormant = daemon.put()
    read, write = os.pipe()
    os.close(read)
    if full:
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    with subprocess.Popen([*SOCKMI, *arguments], stdout=write, stderr=subprocess.PIPE) as importer:
        os.close(write)
        assert dormant.peer
        dormant.peer.settimeout(20)
        dormant.peer.sendall(b"there and back")
        assert dormant.peer.recv(99) == b"there and back"
        dormant.peer.shutdown(socket.SHUT_WR)
        _unused, err = importer.communicate(timeout=20)
    assert (importer.returncode, err) == (0, b"")


@pytest.mark.parametrize("arguments", [["key", "group.key"], ["--version"], ["import", "--help"]])
def test_what_is_printed_cannot_be_written(tmp_path: Path, arguments: list[str]) -> None:
    """Onto a full disk: a sentence and a status, no traceback."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*SOCKMI, *arguments],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            text=True,
            timeout=20,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "sockmi: standard output: No space left on device; the answer is lost, what was done stays"
    ]
