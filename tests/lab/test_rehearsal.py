# SPDX-License-Identifier: MIT
"""Before few connections move, each host goes through an imaginary move: nobody notices, nothing is left."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lab.host import Host
from lab.labs import Lab
from tests.lab.matrix_lab import Bench, bench, copy_of, moved
from tests.lab.scenario import ask, daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

IMAGINARY = "127.83.77."
MODES = ("forward", "nat")


@contextmanager
def watched(host: Host) -> Iterator[list[str]]:
    """What is put into the kernel's sets and maps of a host, from some time on: it grows meanwhile."""
    seen: list[str] = []
    process = host.popen(["nft", "monitor", "elements"], stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(target=lambda: seen.extend(process.stdout or ()))
    reader.start()
    try:
        yield seen
    finally:
        process.kill()
        process.wait()
        reader.join()


def loopback_packets(host: Host) -> str:
    """The counters of lo."""
    return host.run(["cat", "/proc/net/dev"]).stdout.partition("lo:")[2].partition("\n")[0]


def spooled(host: Host) -> list[str]:
    """Files of the spool that are not empty."""
    return [path.name for path in (host.state_dir / "spool").iterdir() if path.stat().st_size]


def move(it: Bench) -> None:
    """One connection from a to b."""
    case = it.pair("v4")
    moved(it.export_passively([(os.getpid(), case.fd)]))
    [came] = it.take([it.request(case)])
    it.finish(case, copy_of(came))
    copy_of(came).close()


@pytest.mark.parametrize("mode", MODES)
def test_nobody_notices(lab: Lab, mode: str) -> None:
    """It takes place, but no packet of it is sent, and no other trace of it is to be found."""
    redirect = {"devices": ["eth0"], "modes": [mode]}
    hosts = [lab.host(name) for name in "ab"]
    with daemons(lab, "ab", redirect=redirect) as running, bench(lab, mode, running) as it:
        counters = [loopback_packets(host) for host in hosts]
        with ExitStack() as stack:
            seen = [stack.enter_context(watched(host)) for host in hosts]

            def seen_by_all() -> bool:
                """Who has nothing to wait for in a move rehearses none: not every move has one."""
                move(it)
                return all(any(IMAGINARY in line for line in lines) for lines in seen)

            until(seen_by_all)
        assert [loopback_packets(host) for host in hosts] == counters
        for name in "ab":
            assert "no move is rehearsed any more" not in running[name].log()
        for host in hosts:
            assert IMAGINARY not in host.run(["nft", "list", "ruleset"]).stdout
            assert IMAGINARY not in host.run(["ss", "-Htan"]).stdout
            assert not spooled(host)
            [answer] = ask(host, "history")
            assert answer["migrations"] and not any(IMAGINARY in one["local"] for one in answer["migrations"])
            [answer] = ask(host, "status")
            assert answer["outcomes"].keys() == {"moved"}


def test_none_is_needed(lab: Lab) -> None:
    """Where it fails, moves go on without: here 127.83.77.1 is no address."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with daemons(lab, "ab", redirect=redirect) as running, bench(lab, "forward", running) as it:
        addresses = ["ip", "address"], ["127.0.0.1/8", "dev", "lo"]
        for name in "ab":
            lab.host(name).run([*addresses[0], "del", *addresses[1]])
        try:
            move(it)
            move(it)
        finally:
            for name in "ab":
                lab.host(name).run([*addresses[0], "add", *addresses[1]])
        for name in "ab":
            until(lambda name=name: running[name].log().count("no move is rehearsed any more") == 1)
