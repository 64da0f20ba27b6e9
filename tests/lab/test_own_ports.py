# SPDX-License-Identifier: MIT
"""New connections of a host whose clients have moved away: they do not get ports that lead nowhere."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from lab.labs import Lab
from sockmi.redirect import own_ports
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import Bench, Case, bench, copy_of, moved
from tests.lab.redirect_lab import Host, run
from tests.lab.scenario import until

RANGE = "net.ipv4.ip_local_port_range"
RESERVED = "net.ipv4.ip_local_reserved_ports"
OPERATORS = "40007,40009-40010,50000"
FIRST, COUNT, MOVED = 40000, 100, 40


def sysctl(lab: Lab, name: str, value: str | None = None) -> str:
    """Of host a; set first if ``value`` is given."""
    if value is not None:
        lab.host("a").run(["sysctl", "-qw", f"{name}={value}"])
    return lab.host("a").run(["sysctl", "-n", name]).stdout.strip()


@pytest.fixture
def few_ports(lab: Lab) -> Iterator[None]:
    """Host a has few, and some of them it does not use."""
    before = sysctl(lab, RANGE)
    sysctl(lab, RANGE, f"{FIRST} {FIRST + COUNT - 1}")
    sysctl(lab, RESERVED, OPERATORS)
    yield
    sysctl(lab, RANGE, before)
    sysctl(lab, RESERVED, "")


def connect(it: Bench, kind: str, listener: socket.socket) -> Case:
    """A client at a."""
    ours = it.sock("a", kind)
    ours.settimeout(5)
    ours.connect(listener.getsockname()[:2])
    peer, remote = listener.accept()
    case = Case("ESTABLISHED", kind, "ESTABLISHED", ours, remote[1], peer, remote=listener.getsockname()[:2])
    it.cases.append(case)
    return case


@pytest.mark.parametrize(("mode", "kind"), [("forward", "v4"), ("nat", "v6")])
def test_new_clients_are_answered(lab: Lab, few_ports: None, mode: str, kind: str) -> None:
    """Also by a daemon's heir; and when all has ended, the ports are as the administrator wants them."""
    options = {"redirect": {"devices": ["eth0"], "modes": [mode]}, "timing": {"freeze_deadline_s": 5.0}}
    with cluster(lab, "ab", **options) as daemons, bench(lab, mode, daemons.daemons) as it:
        with it.listener("peer", kind, it.port()) as listener:
            cases = [connect(it, kind, listener) for _turn in range(MOVED)]
            theirs = {case.port for case in cases}
            moved(it.export_actively([case.ours for case in cases]))
            copies = [copy_of(one) for one in it.take([it.request(case) for case in cases])]
            wanted = theirs | own_ports.parse(OPERATORS)
            until(lambda: own_ports.parse(sysctl(lab, RESERVED)) == wanted)
            new = [connect(it, kind, listener) for _turn in range(COUNT - MOVED - 3)]
            assert not theirs & {case.port for case in new}
            daemons.kill("a")
            sysctl(lab, RESERVED, "50001," + OPERATORS)  # by somebody who knows nothing of ours
            daemons.restart_dead()
            daemons.ready()
            until(lambda: own_ports.parse(sysctl(lab, RESERVED)) == wanted | {50001})
            for one in copies:  # and leave no TIME-WAIT
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()
        it.clear()
        until(lambda: sysctl(lab, RESERVED) == f"{OPERATORS}-50001", 30)


@contextlib.contextmanager
def alone() -> Iterator[Host]:
    """Inside a host that has nothing."""
    host = Host("x", f"smt-{os.getpid()}-own-x")
    run("ip", "netns", "add", host.namespace)
    try:
        run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        with host.inside():
            yield host
    finally:
        host.close()
        run("ip", "netns", "del", host.namespace)


def test_tables_may_be_gone_while_a_device_comes() -> None:
    """Its thread asks the kernel for what it has made; who makes the tables again waits for it."""
    with alone() as host:
        tables = host.tables
        tables.setup()
        host.nft("flush", "ruleset")
        making, restoring, done = threading.Event(), threading.Event(), threading.Event()

        def device_comes() -> None:
            with tables._making:
                making.set()
                restoring.wait(10)
                tables.is_led("lo")
            done.set()

        def restore() -> bool:
            restoring.set()
            assert done.wait(5), "they wait for each other"
            tables.rebuild()
            return True

        tables.restore = restore
        other = threading.Thread(target=device_comes, daemon=True)
        other.start()
        making.wait(10)
        tables.reserve_ports({40001})
        other.join(10)
        assert own_ports.reserved() == {40001}
        tables.teardown()
        assert own_ports.reserved() == set()


def test_each_more_costs_what_the_first_did() -> None:
    """The set in which they are noted is no list that the kernel goes through."""
    with alone() as host:
        host.tables.setup()
        noted = host.tables._reserved

        def add(ports: range) -> float:
            began = time.thread_time()
            with host.tables.transaction() as batch:
                batch.add(noted, ((port.to_bytes(2, "big"), b"") for port in ports))
            return time.thread_time() - began

        empty = min(add(range(first, first + 500)) for first in (1000, 1500, 2000))
        add(range(10_000, 50_000))
        assert min(add(range(first, first + 500)) for first in (3000, 3500, 4000)) < 8 * empty
        host.tables.teardown()


def test_many_are_written_in_parts() -> None:
    """A page holds some 700 of them."""
    with alone() as host:
        every_other = set(range(20001, 50000, 2))
        own_ports.reserve(every_other)
        assert own_ports.reserved() == every_other
        own_ports.reserve({80, 443, 8000, 8001, 8002})
        assert own_ports.reserved() == {80, 443, 8000, 8001, 8002}
        first, last = 32768, 60999
        host.sysctl("net/ipv4/ip_local_port_range", f"{first} {last}")
        chosen = own_ports.chosen(range(1, 65536), {60000})
        assert len(chosen) == (last - first + 1) // 2 and 60000 in chosen and min(chosen) == first
        # What was reserved without us is not released with ours.
        host.tables.setup()
        host.tables.reserve_ports({40001, 40002, 80})
        assert own_ports.reserved() == {80, 443, 8000, 8001, 8002, 40001, 40002}
        host.restart().reserve_ports({40002})
        assert own_ports.reserved() == {80, 443, 8000, 8001, 8002, 40002}
        host.tables.teardown()
        assert own_ports.reserved() == {80, 443, 8000, 8001, 8002}
        own_ports.reserve(())
        assert own_ports.reserved() == set()
        host.tables.teardown()
