# SPDX-License-Identifier: MIT
"""Who is just connecting to a listener that moves: whose handshake has begun is connected, and follows it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.client import ImportRequest
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import EVERYWHERE, Bench, bench, copy_of, exchange, moved, nft
from tests.lab.scenario import ask, until

REDIRECT = {"devices": ["eth0"], "modes": ["forward"]}


@contextlib.contextmanager
def scene(lab: Lab, freeze_deadline_s: float = 5.0) -> Iterator[Bench]:
    timing = {"freeze_deadline_s": freeze_deadline_s, "linger_s": 1.0}
    with (
        cluster(lab, "ab", redirect=REDIRECT, timing=timing) as daemons,
        bench(lab, "forward", daemons.daemons) as it,
    ):
        yield it
        it.clear("ab")


@contextlib.contextmanager
def unacknowledged(lab: Lab, port: int) -> Iterator[None]:
    """What the peer sends to that port is lost, but for its SYNs."""
    table = "inet lost"
    hook, rule = "type filter hook output priority 0", f"tcp dport {port} tcp flags & syn == 0 drop"
    nft(lab.host("peer"), f"table {table} {{\nchain output {{\n{hook}\n{rule}\n}}\n}}\n")
    try:
        yield
    finally:
        nft(lab.host("peer"), f"delete table {table}\n")


def half_open(lab: Lab, port: int) -> bool:
    return f":{port} " in lab.host("a").run(["ss", "-Htn", "state", "syn-recv"]).stdout


def came(it: Bench, count: int, name: str = "b") -> list[dict[str, object]]:
    """The rows of the import lists, when there are so many."""

    def rows() -> list[dict[str, object]]:
        return [row for answer in ask(it.host(name), "list", table="imports") for row in answer["imports"]]

    until(lambda: len(rows()) >= count)
    return rows()


@pytest.mark.parametrize("kind", ["v4", "v6"])
def test_a_handshake_that_has_begun_is_waited_for(lab: Lab, tmp_path: Path, kind: str) -> None:
    """The client's connect() has returned, but the listener does not know it yet."""
    with scene(lab) as it, it.watched(tmp_path):
        port = it.port()
        with it.listener("a", kind, port) as listener, it.sock("peer", kind) as client:
            with ThreadPoolExecutor(1) as beside:
                with unacknowledged(lab, port):
                    client.connect((it.address(kind), port))
                    client.sendall(b"first words")
                    assert half_open(lab, port)
                    moving = beside.submit(it.export_actively, [listener])
                    time.sleep(0.1)
                    assert half_open(lab, port)
                moved(moving.result())
            assert sorted(str(row["kind"]) for row in came(it, 2)) == ["connected", "listening"]
            [child, there] = it.take([ImportRequest(["connected"]), ImportRequest(["listening"])])
            copy = copy_of(child)
            assert copy.recv(100) == b"first words"
            exchange(copy, client, 10_000)
            copy.close()
            copy_of(there).close()


def test_one_that_never_ends_stops_nothing(lab: Lab, tmp_path: Path) -> None:
    with scene(lab, 0.5) as it, it.watched(tmp_path):
        port = it.port()
        with it.listener("a", "v4", port) as listener, it.sock("peer", "v4") as client:
            with unacknowledged(lab, port):
                client.connect((it.address("v4"), port))
                begun = time.monotonic()
                moved(it.export_actively([listener]))
                assert time.monotonic() - begun < 5
                [there] = it.take([ImportRequest(["listening"])])
            copy_of(there).close()


def test_while_many_connect(lab: Lab, tmp_path: Path) -> None:
    """Each whose connect() returns is served at the other host; nobody is reset."""
    with scene(lab) as it, it.watched(tmp_path):
        port = it.port()
        stop, clients = threading.Event(), []

        def connect() -> None:
            while not stop.wait(0.005) and len(clients) < 200:  # they have descriptors
                client = it.sock("peer", "v4")
                client.settimeout(0.3)
                try:
                    client.connect((it.address("v4"), port))
                except TimeoutError:
                    client.close()
                else:
                    clients.append(client)

        with it.listener("a", "v4", port, EVERYWHERE, 4096) as listener, ThreadPoolExecutor(4) as pool:
            storm = [pool.submit(connect) for _turn in range(4)]
            try:
                until(lambda: len(clients) > 20)
                moved(it.export_actively([listener]))
            finally:
                stop.set()
            for each in storm:
                each.result()
        until(lambda: len(came(it, 2)) == len(clients) + 1)
        with contextlib.ExitStack() as stack:
            for one in it.take([ImportRequest(["connected"])] * len(clients)):
                stack.enter_context(copy_of(one)).sendall(b"served")
            for client in clients:
                with client:
                    client.settimeout(10)
                    assert client.recv(6) == b"served"
            [there] = it.take([ImportRequest(["listening"])])
            copy_of(there).close()
