# SPDX-License-Identifier: MIT
"""The importer hears nothing for long after COMMIT: what waited for the decision is as good as new."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from threading import Event

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import PATIENCE_S, TCP, Bench, Case, Held, Later, bench, copy_of, moved
from tests.lab.scenario import status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PARTITION_S = 20.0  # longer than any copy here can live by its timers
USER_TIMEOUT_MS = 8000
KEEPALIVE = {socket.TCP_KEEPIDLE: 4, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}  # s, s, times
SYN_RETRIES = 3  # after 15 s it is given up


def unheard(it: Bench, case: Case) -> None:
    """Data is on its way that the peer does not acknowledge."""
    it.deafen([case.port])
    case.deaf = True
    case.to_peer = os.urandom(5000)
    case.ours.sendall(case.to_peer)


def test_copies_outlive_a_partition(lab: Lab, tmp_path: Path) -> None:
    """With data that is not acknowledged, a short user timeout, a short keepalive, few retries of a SYN."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        cluster(lab, "ab", {"a": "commit.done:1:STOP"}, redirect=redirect) as daemons,
        bench(lab, "forward", daemons.daemons) as it,
        it.watched(tmp_path),
    ):
        data, impatient, idle = (it.pair("v4") for _turn in range(3))
        connecting = it.make("v4", "SYN-SENT", queued=False)
        cases = [data, impatient, idle, connecting]
        unheard(it, data)
        unheard(it, impatient)
        impatient.ours.setsockopt(TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        idle.ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            idle.ours.setsockopt(TCP, option, value)
        connecting.ours.setsockopt(TCP, socket.TCP_SYNCNT, SYN_RETRIES)
        patience_s = PARTITION_S + PATIENCE_S
        taking = Later(it.take, [it.request(case) for case in cases], timeout_s=patience_s)
        until(lambda: status(lab.host("b"))["import_lists"]["connected"]["waiting"] == len(cases))
        with Held(it, *cases) as held:
            moving = held.move(timeout_s=patience_s)
            daemons.stopped("a")
            Event().wait(PARTITION_S)
            it.undeafen(cases)
            daemons.signal("a", signal.SIGCONT)
            moved(moving.result(PATIENCE_S))
        for case, one in zip(cases, taking.result(PATIENCE_S), strict=True):
            with copy_of(one) as copy:
                it.finish(case, copy)
