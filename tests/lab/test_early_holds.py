# SPDX-License-Identifier: MIT
"""An importer holds what has a place there before it is frozen, and lets go of what does not come."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lab.host import Host
from lab.labs import Lab
from tests.lab.crash_lab import cluster, elements, proved, service
from tests.lab.scenario import ask, until

PAUSED = "freeze.stopped:1:STOP"  # its owners are stopped, and that is all


def held(host: Host) -> int:
    """How many connections are held there."""
    return sum(one.name == "hold" for one in elements(host))


@pytest.mark.parametrize("flushed", [False, True], ids=["", "flushed"])
def test_held_before_the_freeze(lab: Lab, tmp_path: Path, *, flushed: bool) -> None:
    """The image of a connection is not there, and its packets are already held, again if somebody flushes."""
    with (
        cluster(lab, "ab", {"a": PAUSED}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        serving.clients()
        daemons.drain("a", "b", serving.port)
        daemons.stopped("a")
        until(lambda: held(lab.host("b")) == len(serving.peers))
        if flushed:
            lab.host("b").run(["nft", "flush", "ruleset"])
            until(lambda: held(lab.host("b")) == len(serving.peers))
        daemons.signal("a", signal.SIGCONT)
        proved(daemons, serving, "b")


def test_what_does_not_come_is_let_go(lab: Lab, tmp_path: Path) -> None:
    """A dry run, and an exporter that dies before it has frozen anything, leave no hold behind."""
    with (
        cluster(lab, "ab", {"a": PAUSED}, timing={"lease_s": 1.0}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        serving.clients()
        wanted = {"local_port": serving.port, "kinds": ["connected"]}
        planned = ask(lab.host("a"), "drain", filter=wanted, to="b", dry_run=True)[-1]["migrations"]
        assert {one["outcome"] for one in planned} == {"planned"}
        until(lambda: held(lab.host("b")) == 0)
        daemons.drain("a", "b", serving.port)
        daemons.stopped("a")
        until(lambda: held(lab.host("b")) > 0)
        daemons.kill("a")
        until(lambda: held(lab.host("b")) == 0)
        daemons.restart_dead()
        proved(daemons, serving, "a")


def test_a_connection_that_returns_is_led_on_until_it_is_frozen(lab: Lab, tmp_path: Path) -> None:
    """Its former host leads its packets to where it lives: a hold there would stop them too early."""
    with (
        cluster(lab, "ab", {"b": PAUSED}) as daemons,
        service(daemons, "lines", "ab", tmp_path) as serving,
    ):
        serving.clients()
        daemons.drain("a", "b", serving.port).ended()
        until(lambda: held(lab.host("a")) == 0)
        daemons.drain("b", "a", serving.port)
        daemons.stopped("b")
        assert held(lab.host("a")) == 0
        daemons.signal("b", signal.SIGCONT)
        proved(daemons, serving, "a")
