# SPDX-License-Identifier: MIT
"""A drain in which one connection has more queued than the network carries within the freeze's deadline.

It stays, and is told by name; all others move, those that were frozen with it too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.capture import Capture
from lab.host import Host
from lab.labs import Lab
from tests.lab.answering import answering
from tests.lab.scenario import daemons, drain
from tests.laws import clean

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(120)]

PORT = 7610
OTHERS = 40
QUEUED_BYTES = 2_000_000
RATE = "8mbit"  # 2 s for that many bytes
DEADLINE_S = 0.6


@contextmanager
def slow_network(host: Host) -> Iterator[None]:
    shape = ["root", "tbf", "rate", RATE, "burst", "32k", "latency", "400ms"]
    host.run(["tc", "qdisc", "add", "dev", "eth0", *shape])
    try:
        yield
    finally:
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"])


def asked(peer: socket.socket) -> bytes:
    peer.sendall(b"?")
    return peer.recv(1)


def test_it_alone_stays(lab: Lab, tmp_path: Path) -> None:
    a, peer = lab.host("a"), lab.host("peer")
    with (
        daemons(
            lab, "ab", redirect={"devices": ["eth0"], "modes": ["forward"]},
            timing={"freeze_deadline_s": DEADLINE_S},
        ),
        Capture(peer, f"tcp port {PORT}", tmp_path / "peer.pcap") as capture,
        answering(a, PORT, QUEUED_BYTES),
    ):  # fmt: skip
        peers = [peer.socket() for _turn in range(OTHERS + 1)]
        for one in peers:
            one.settimeout(30)
            one.connect((str(a.address4), PORT))
        slow, *others = peers
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        assert {asked(one) for one in others} == {b"a"}
        slow.sendall(b"!")
        assert slow.recv(1, socket.MSG_PEEK) == b"\0"
        with slow_network(a):
            records = drain(a, "b", local_port=PORT)
        address, port = slow.getsockname()[:2]
        found = {one["remote"]: one for one in records}
        assert len(found) == OTHERS + 1
        refused = found.pop(f"{address}:{port}")
        assert refused["outcome"] != "moved"
        assert refused["refusal"]["code"] == "freeze-deadline", refused
        assert {one["outcome"] for one in found.values()} == {"moved"}, [
            one for one in found.values() if one["outcome"] != "moved"
        ]
        left = QUEUED_BYTES
        while left:
            data = slow.recv(1 << 16)
            assert data and not any(data)
            left -= len(data)
        assert asked(slow) == b"a"
        for one in peers:
            one.close()
    clean(capture.check())
