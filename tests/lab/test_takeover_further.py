# SPDX-License-Identifier: MIT
"""takeover, and then another redirect: the address is on one host, and goes with the last that needs it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import (
    BUSY,
    Cluster,
    Serving,
    cluster,
    flowing,
    journals_agree,
    nothing_left,
    service,
    settled,
)
from tests.lab.mode_lab import SERVICE, give_service, hardware_address, has_address, lives_at, take_service
from tests.lab.scenario import ask, drain, status, until
from tests.laws import law

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

REDIRECT = {"devices": ["eth0"], "modes": ["takeover", "forward"]}
A_WHILE_S = 1.0  # for whom it concerns to be told of it


@contextlib.contextmanager
def taken_over(lab: Lab, directory: Path) -> Iterator[tuple[Cluster, Serving]]:
    """Two connections to each address of a's that takeover has led to b; c takes them by forward only."""
    give_service(lab)
    try:
        with (
            cluster(lab, "abc", redirect=REDIRECT, modes_of={"c": ["forward"]}) as daemons,
            service(daemons, "lines", "abc", directory, at=SERVICE) as serving,
        ):
            serving.clients(2)
            serving.move("a", "b")
            # Until their application has them they are in no list.
            wanted = {"local_port": serving.port, "kinds": ["connected"]}
            until(lambda: sum(len(one["sockets"]) for one in ask(lab.host("b"), "list", filter=wanted)) == 4)
            yield daemons, serving
    finally:
        take_service(lab, "abc")


@law()
def live_at(serving: Serving, wanted: dict[str, str]) -> None:
    """The connections are there, and their addresses at b alone, where the peer sends to."""
    assert settled(serving, "abc") == wanted
    journals_agree(serving, "abc", "a", wanted)
    threading.Event().wait(A_WHILE_S)
    lab = serving.lab
    for address in SERVICE.values():
        assert [name for name in "abc" if has_address(lab.host(name), address)] == ["b"]
        assert lives_at(lab.host("peer"), address) == hardware_address(lab.host("b"))
    flowing(serving)


def test_all_go_on(lab: Lab, tmp_path: Path) -> None:
    """a -> b by takeover -> c by forward: b has the address, until they end."""
    with taken_over(lab, tmp_path) as (daemons, serving):
        serving.move("b", "c")
        live_at(serving, {peer.local: "c" for peer in serving.peers})
        serving.finish()
        nothing_left(daemons, serving)


def test_one_goes_on(lab: Lab, tmp_path: Path) -> None:
    """It needs the address of the others, which so cannot leave before it has ended."""
    with taken_over(lab, tmp_path) as (daemons, serving):
        b, first = lab.host("b"), serving.peers[0]
        wanted = {"local_port": serving.port, "remote_port": int(first.local.rpartition(":")[2])}
        while (record := drain(b, "c", **wanted)[0])["outcome"] != "moved":
            assert record["refusal"]["code"] in BUSY, record
        assert record["mode"] == "forward"
        where = {peer.local: "c" if peer is first else "b" for peer in serving.peers}
        live_at(serving, where)
        refused = drain(b, "a", local_port=serving.port, local_address=SERVICE[4])
        assert all("are led on from it" in one["refusal"]["message"] for one in refused), refused
        live_at(serving, where)
        serving.peers.remove(first)
        first.stop()
        first.finish()
        lab.host("c").run(["ss", "--kill", "--tcp", "state", "time-wait"])
        until(lambda: not status(b)["redirects_out"])
        live_at(serving, {peer.local: "b" for peer in serving.peers})
        serving.move("b", "a")
        assert set(settled(serving, "abc").values()) == {"a"}
        serving.finish()
        nothing_left(daemons, serving)
