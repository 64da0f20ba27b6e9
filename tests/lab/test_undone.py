# SPDX-License-Identifier: MIT
"""The move home of a connection is undone half-way: it goes on where it was, and the peer notices nothing."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import Cluster, cluster
from tests.lab.scenario import ask, drain, service, status, until

TIMEOUT_S = 1.0
TOO_LATE_S = 1.3  # for the freeze, and for another try
A_WHILE_S = 0.6  # in which the peer goes on, and repeats what was held
CLIENTS = {"lines": ("lines", "--interval-s", "0.002"), "duplex": ("duplex", "--pace", "1000000")}


@contextlib.contextmanager
def going_home(
    lab: Lab, directory: Path, mode: str, points: dict[str, str], kind: str = "lines"
) -> Iterator[Cluster]:
    """A connection of a's lives on b, and is being moved back; daemons get signals at ``points``.

    At the end b has given the move up, and the connection goes on there.
    """
    redirect = {"devices": ["eth0"], "modes": [mode]}
    with (
        ThreadPoolExecutor() as pool,
        cluster(lab, "ab", points, redirect=redirect, timing={"freeze_deadline_s": 0.5}) as daemons,
        service(lab, kind, "ab", directory) as serving,
    ):
        serving.client(*CLIENTS[kind], "--silence-s", "30")
        serving.connected(1)
        # A busy machine may need more than one try.
        until(lambda: drain(lab.host("a"), "b", local_port=serving.port)[0]["outcome"] == "moved")
        until(lambda: status(lab.host("a"))["import_lists"]["connected"]["waiting"] > 0)
        wanted = {"local_port": serving.port, "kinds": ["connected"]}
        moving: Future[list[dict[str, Any]]] = pool.submit(
            ask, lab.host("b"), "drain", filter=wanted, to="a", timeout_s=TIMEOUT_S
        )
        yield daemons
        survived = moving.exception(30) is None
        if survived:
            [record] = [one for answer in moving.result() for one in answer["migrations"]]
            assert (record["outcome"], record["refusal"]["code"]) == ("aborted", "freeze-deadline")
        flows = lab.host("b").run(["nft", "list", "map", "inet", "sockmi", "flow4"]).stdout
        assert f"{lab.host('peer').address4} . " in flows
        Event().wait(A_WHILE_S)
        if survived:
            serving.finish()
            return
        # Servers do not like it that their daemon dies.
        [client] = serving.clients
        client.terminate()
        output, _unused = client.communicate(timeout=30)
        assert client.returncode == 0, output


def goes_on(daemons: Cluster, host: str, after_s: float) -> None:
    """Wait for a daemon to stop; later it goes on."""
    daemons.stopped(host)
    Event().wait(after_s)
    daemons.signal(host, signal.SIGCONT)


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_the_home_drops_its_copy(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Its kernel must not answer for a moment that there is no such connection."""
    points = {"a": "prepare.journalled:1:STOP,drop.led-again:1:STOP"}
    with going_home(lab, tmp_path, mode, points) as daemons:
        goes_on(daemons, "a", TOO_LATE_S)
        goes_on(daemons, "a", A_WHILE_S)


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_the_commit_comes_too_late(lab: Lab, tmp_path: Path, mode: str) -> None:
    """It had been led away already: it is received on b again, under the name that the peer knows."""
    with going_home(lab, tmp_path, mode, {"b": "commit.led-away:1:STOP"}) as daemons:
        goes_on(daemons, "b", TOO_LATE_S)


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_the_exporter_dies_before_its_commit(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Its owner runs when the next daemon renews the translation: the peer never sees another name."""
    with going_home(lab, tmp_path, mode, {"b": "commit.led-away"}, "duplex") as daemons:
        daemons.died("b")
        with ThreadPoolExecutor() as pool:
            starting = pool.submit(daemons.start, "b", "recovery.taken-back:1:STOP")
            until(lambda: daemons.daemons["b"].process.poll() is None)  # type: ignore[union-attr]
            goes_on(daemons, "b", A_WHILE_S)
            starting.result()
        daemons.ready()
