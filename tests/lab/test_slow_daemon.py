# SPDX-License-Identifier: MIT
"""A daemon slower than its client has patience: the client still learns what has become of the socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from tests.lab.client_callers import CALLERS, ROOT
from tests.lab.crash_lab import cluster
from tests.lab.scenario import ask, status
from tests.lab.test_handing import PORT, echoed, goes_on

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

TIMEOUT_S = 0.5
LATE_S = TIMEOUT_S + 2.0 + 0.4  # longer than any client waits
START_S = 3.0  # of the client, which may have to be compiled; it asks for 10 s
PATIENCE_S = 30.0
Exporting = Callable[[int, int], str]


def run(*words: str) -> str:
    """What a Python program prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "daemon")])},
        text=True, capture_output=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.stdout


# Not in this process: a daemon that sleeps while it has stopped an owner keeps that one stopped, and for a
# moment the client has a duplicate.
LIBRARY = """
import errno, os, sys
from tests.lab.client_callers import CALLERS
try:
    CALLERS[sys.argv[1]]().export(int(sys.argv[3]), int(sys.argv[2]), to="b", timeout_s=float(sys.argv[4]))
except OSError as error:
    print(error.code or errno.errorcode[error.errno])
else:
    print("moved")
"""


def by_library(name: str) -> Exporting:
    """Through a form of the API: "moved", the refusal's code, or the errno without one."""
    return lambda pid, fd: run("-c", LIBRARY, name, str(pid), str(fd), str(TIMEOUT_S)).strip()


def by_command(pid: int, fd: int) -> str:
    """Through `sockmi`."""
    options = ["--pid", str(pid), "--fd", str(fd), "--to", "b", "--timeout", str(TIMEOUT_S), "--json"]
    answer = json.loads(run("-m", "sockmi.cli.main", "export", *options))
    if isinstance(answer, dict):
        return str(answer["error"]["errno"])
    [record] = answer
    return str(record["refusal"]["code"]) if record["refusal"] else str(record["outcome"])


EXPORTING = {name: by_library(name) for name in CALLERS} | {"sockmi": by_command}


@pytest.mark.parametrize("how", EXPORTING)
@pytest.mark.parametrize("committed", [True, False], ids=["committed", "undone"])
def test_who_gives_up_learns_the_truth(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, how: str, committed: bool
) -> None:
    """The daemon sleeps before, or just after, it has decided."""
    points = {"a": "commit.journalled:1:STOP" if committed else "commit.led-away:1:STOP"}
    monkeypatch.setenv("SOCKMI_CONTROL", str(lab.host("a").control_socket))
    with (
        ThreadPoolExecutor() as pool,
        cluster(lab, "ab", points, timing={"freeze_deadline_s": 0.5}) as daemons,
        echoed(lab) as peer,
    ):
        [answer] = ask(lab.host("a"), "list", filter={"local_port": PORT, "kinds": ["connected"]})
        [row] = answer["sockets"]
        exporting = pool.submit(EXPORTING[how], row["pid"], row["fd"])
        daemons.stopped("a")
        Event().wait(LATE_S)
        assert not exporting.done(), "nothing can be known of it yet"
        daemons.signal("a", signal.SIGCONT)
        assert exporting.result(PATIENCE_S) == ("moved" if committed else "freeze-deadline")
        if committed:
            [got] = import_socket(ImportRequest(["connected"]), 5.0, control=lab.host("b").control_socket)
            assert got.socket is not None
            with got.socket:
                got.socket.sendall(b"here")
                assert peer.recv(9) == b"here"
        else:
            goes_on(peer)


@pytest.mark.parametrize("how", EXPORTING)
def test_what_was_not_begun_never_begins(lab: Lab, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The daemon reads the request when its client has gone, and asks in another connection."""
    monkeypatch.setenv("SOCKMI_CONTROL", str(lab.host("a").control_socket))
    with ThreadPoolExecutor() as pool, cluster(lab, "ab") as daemons, echoed(lab) as peer:
        [answer] = ask(lab.host("a"), "list", filter={"local_port": PORT, "kinds": ["connected"]})
        [row] = answer["sockets"]
        daemons.signal("a", signal.SIGSTOP)
        exporting = pool.submit(EXPORTING[how], row["pid"], row["fd"])
        Event().wait(LATE_S + START_S)
        assert not exporting.done()
        daemons.signal("a", signal.SIGCONT)
        assert exporting.result(PATIENCE_S) in ("ETIMEDOUT", "timeout")
        assert not status(lab.host("a"))["migrations_under_way"]
        assert "moved" not in status(lab.host("a"))["outcomes"]
        goes_on(peer)
