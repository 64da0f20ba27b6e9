# SPDX-License-Identifier: MIT
"""A drain with the deadlines that are the default, while every core is busy: what is not in time stays.

Each byte of a peer is answered by whoever has its connection, with the name of its host.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.capture import Capture
from lab.host import Host
from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from sockmi.config import TimingConfig
from tests.lab.answering import answering
from tests.lab.crash_lab import BUSY
from tests.lab.scenario import daemons, drain
from tests.laws import clean, law

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(180)]

CONNECTIONS = 300
PORT = 7600
BUSY_RUNS = 2
RUNS_MAX = 20


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Each has more to do than it can."""
    count = 2 * len(os.sched_getaffinity(0))
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _turn in range(count)]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


class Importer:
    """Takes what is listed on b, and answers there."""

    def __init__(self, host: Host) -> None:
        self._control = host.control_socket
        self.copies: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> None:
        """All that is there."""
        while arrived := import_socket([ImportRequest()] * 32, 0, control=self._control):
            self.copies += [one.socket for one in arrived if one.socket]

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            for sock in select.select(list(self.copies), [], [], 0)[0]:
                if sock.recv(1):
                    sock.send(b"b")
                else:
                    self.copies.remove(sock)
                    sock.close()

    def stop(self) -> None:
        """Answer no more; a connection that has not ended by then would."""
        self._stop.set()
        self._thread.join(20)


def answered(peers: list[socket.socket], moved: set[str]) -> None:
    """Each connection lives on one host, the one that the records say: it gives one answer."""
    for peer in peers:
        peer.sendall(b"?")
    with law():
        for peer in peers:
            address, port = peer.getsockname()[:2]
            assert peer.recv(9) == (b"b" if f"{address}:{port}" in moved else b"a"), (address, port)


def test_a_drain_on_busy_cores(lab: Lab, tmp_path: Path) -> None:
    a, b, peer = (lab.host(name) for name in ("a", "b", "peer"))
    timing = {"freeze_deadline_s": TimingConfig().freeze_deadline_s}
    moved: set[str] = set()
    left: list[int] = []
    with (
        daemons(lab, "ab", redirect={"devices": ["eth0"], "modes": ["forward"]}, timing=timing),
        Capture(peer, f"tcp port {PORT}", tmp_path / "peer.pcap") as capture,
        answering(a, PORT),
    ):
        peers = [peer.socket() for _turn in range(CONNECTIONS)]
        for one in peers:
            one.settimeout(30)
            one.connect((str(a.address4), PORT))
        importer = Importer(b)
        answered(peers, moved)
        with contextlib.ExitStack() as load:
            load.enter_context(busy_cores())
            while len(moved) < CONNECTIONS:
                records = drain(a, "b", local_port=PORT)
                assert {one["remote"] for one in records}.isdisjoint(moved)
                assert len(records) + len(moved) == CONNECTIONS
                stayed = [one for one in records if one["outcome"] != "moved"]
                assert {one["refusal"]["code"] for one in stayed} <= BUSY, Counter(map(str, stayed))
                moved |= {one["remote"] for one in records if one["outcome"] == "moved"}
                left.append(len(stayed))
                importer.take()
                answered(peers, moved)
                assert len(left) < RUNS_MAX or not stayed, f"they do not move: {left}"
                if len(left) == BUSY_RUNS:  # what is left moves when the host is calm
                    load.close()
        print(f"of {CONNECTIONS} have stayed, run by run: {left}")
        for one in peers:
            one.close()
        importer.stop()
    clean(capture.check())
