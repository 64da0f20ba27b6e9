"""kill -9 of a daemon at any step, then a restart: every connection is live on exactly one host."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.crashpoints import EXPORTER, IMPORTER
from tests.lab.crash_lab import (
    CLIENTS,
    Cluster,
    Drain,
    cluster,
    finish,
    flowing,
    journals_agree,
    nothing_left,
    service,
    settled,
    tracers,
)
from tests.lab.scenario import Service, until

pytestmark = pytest.mark.timeout(240)

# Reached only when something else goes wrong: they have tests of their own.
UNDOING = {"thaw.unheld", "discard.dropped", "discard.journalled"}
#: Before these, the exporter has not decided, or can and does undo it.
UNDECIDED = {"freeze.stopped", "freeze.held", "freeze.captured", "commit.led-away", "commit.journalled"}


def pause(seconds: float = 0.2) -> None:
    """Let traffic flow: that much of it is part of the test."""
    threading.Event().wait(seconds)


def clients(serving: Service, count: int = 2) -> None:
    """Start clients and wait until they are connected."""
    for number in range(count):
        serving.client(*CLIENTS[serving.kind], "--silence-s", "60", "--name", f"{serving.kind}{number}")
    serving.connected(count)
    flowing(serving)


def proved(serving: Service, hosts: str, home: str = "a") -> dict[str, str]:
    """All that has to be true after a crash; where the connections were."""
    where = settled(serving, hosts)
    journals_agree(serving, hosts, home, where)
    assert not tracers(list(serving.processes.values()))
    finish(serving)
    nothing_left(serving.lab, hosts)
    return where


@pytest.mark.parametrize("mode", ["forward", "nat"])
@pytest.mark.parametrize("point", [one for one in EXPORTER if one not in UNDOING])
def test_exporter_dies(lab: Lab, tmp_path: Path, point: str, mode: str) -> None:
    """Two connections under two-way load; the exporter is killed at one step and comes back."""
    with (
        cluster(lab, "ab", {"a": point}, redirect={"modes": [mode]}) as daemons,
        service(lab, "duplex", "ab", tmp_path) as serving,
    ):
        clients(serving)
        drain = Drain(lab, "a", "b", serving.port)
        daemons.died("a")
        assert drain.ended() is None
        daemons.restart_dead()
        where = proved(serving, "ab")
        assert set(where.values()) == ({"a"} if point in UNDECIDED else {"b"})


@pytest.mark.parametrize("mode", ["forward", "nat"])
@pytest.mark.parametrize("point", [one for one in IMPORTER if one not in UNDOING])
def test_importer_dies(lab: Lab, tmp_path: Path, point: str, mode: str) -> None:
    """The same for the importer."""
    with (
        cluster(lab, "ab", {"b": point}, redirect={"modes": [mode]}) as daemons,
        service(lab, "lines", "ab", tmp_path) as serving,
    ):
        clients(serving)
        drain = Drain(lab, "a", "b", serving.port)
        daemons.died("b")
        daemons.restart_dead()
        records = drain.ended()
        assert records is not None
        where = proved(serving, "ab")
        # What was not yet promised is tried again, if the importer is back in time.
        assert {one["outcome"] for one in records} == ({"moved"} if "b" in where.values() else {"aborted"})
        assert "b" in where.values() or point.startswith("prepare")
