# SPDX-License-Identifier: MIT
"""The importer is away between COMMIT and the copy's life: what the former owner meets meanwhile."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import Keeper, Later, bench, copy_of, moved

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_epoll_is_silent_when_the_owner_has_closed(lab: Lab, tmp_path: Path) -> None:
    """Also as long as the importer is away: nobody else keeps the original open."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        cluster(lab, "ab", {"b": "activate.suspended:1:STOP"}, redirect=redirect) as two,
        bench(lab, "forward", two.daemons) as it,
        it.watched(tmp_path),
    ):
        case = it.pair("v4")

        def owner() -> tuple[int, int]:
            epoll = select.epoll()
            epoll.register(case.fd, select.EPOLLIN)
            woken = len(epoll.poll(20))
            os.close(case.fd)
            return woken, len(epoll.poll(0.2))

        with Keeper([case.fd], owner) as keeper:
            pair = (keeper.pid, case.fd)
            case.ours.close()
            moving = Later(it.export_passively, [pair])
            two.stopped("b")
            assert keeper.result() == (1, 0)
        two.signal("b", signal.SIGCONT)
        moved(moving.result())
        [came] = it.take([it.request(case)])
        copy = copy_of(came)
        it.finish(case, copy)
        copy.close()
