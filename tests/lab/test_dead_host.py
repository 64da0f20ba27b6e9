# SPDX-License-Identifier: MIT
"""A host that never comes back: the others do their chores all the same, and can be told to forget it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from uuid import UUID

import pytest

from lab.host import Host
from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import bench, copy_of, moved
from tests.lab.scenario import status, until
from tests.lab.terminal import run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MOVES = 20
SECONDS_LATER_S = 5.0


def folded(host: Host) -> int:
    """How many exports SQLite has of the moves of a host."""
    path = host.state_dir / "journal.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
        query = "SELECT COUNT(*) FROM migration WHERE direction = 'export'"
        return int(journal.execute(query).fetchone()[0])


def test_a_dead_home(lab: Lab) -> None:
    """What has ended is told to it for ever; that keeps nothing from the journal and the log."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        cluster(lab, "abc", redirect=redirect) as three,
        bench(lab, "forward", three.daemons) as it,
    ):
        b = it.host("b")
        a_id, c_id = (str(UUID(status(it.host(name))["host_id"])) for name in "ac")
        first = it.pair("v4")
        assert first.peer
        moved(it.export_actively([first.ours]))
        [came] = it.take([it.request(first, it.target())])
        copy = copy_of(came)
        three.daemons["a"].stop()
        first.peer.close()
        assert copy.recv(1) == b""
        copy.close()
        until(lambda: a_id in run("groups", host=b).out)

        cases = [it.pair("v4", host="b") for _turn in range(MOVES)]
        moved(it.export_actively([case.ours for case in cases], to="c", source="b"))
        until(lambda: folded(b) == MOVES, SECONDS_LATER_S)
        until(lambda: three.daemons["b"].log_file.read_text().count("to c: moved") == MOVES, SECONDS_LATER_S)
        assert status(b)["redirects_in"] == 1

        heard = run("groups", "forget", c_id, host=b)
        assert heard.status == 1 and "is heard" in heard.err
        wrong = run("groups", "forget", "a", host=b)
        assert wrong.status == 2 and "no id of a host" in wrong.err
        forgotten = run("groups", "forget", a_id, host=b)
        assert forgotten.status == 0 and a_id not in forgotten.out
        until(lambda: status(b)["redirects_in"] == 0)
        again = run("groups", "forget", a_id, host=b)
        assert again.status == 0 and "nothing to do" in again.err
        it.clear("c")
