# SPDX-License-Identifier: MIT
"""A peer's port comes again while the importer still has the last connection from it in TIME-WAIT.

It happens where nothing leads from the exporter to the importer any more: an address has moved, the
redirect was taken away by hand, or the exporter has lost its journal.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import Bench, Case, bench, copy_of, moved
from tests.lab.scenario import drain, until

TIMESTAMPS = "net.ipv4.tcp_timestamps"


def connect(it: Bench, kind: str, port: int, peer_port: int) -> Case:
    """A connection of a's with both ports given."""
    with it.listener("a", kind, port) as listener:
        peer = it.sock("peer", kind)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        peer.bind((it.address(kind, "peer"), peer_port))
        peer.connect((it.address(kind), port))
        ours, _unused = listener.accept()
    case = Case("ESTABLISHED", kind, "ESTABLISHED", ours, port, peer, remote=peer.getsockname()[:2])
    it.cases.append(case)
    return case


def in_time_wait(it: Bench, host: str, case: Case) -> bool:
    """Whether a host waits for late packets of such a connection."""
    ports = ["sport", "=", str(case.port), "dport", "=", str(case.remote[1])]
    return bool(it.host(host).run(["ss", "-Htn", "state", "time-wait", *ports]).stdout)


@pytest.mark.parametrize(("kind", "timestamps"), [("v4", "1"), ("v6", "0")])
def test_its_port_comes_again(lab: Lab, tmp_path: Path, kind: str, timestamps: str) -> None:
    """The peer has left the old connection for good, so the new one may move: at once, not in a minute."""
    options = {"redirect": {"devices": ["eth0"], "modes": ["forward"]}}
    lab.host("peer").run(["sysctl", "-qw", f"{TIMESTAMPS}={timestamps}"])
    try:
        with cluster(lab, "ab", **options) as daemons, bench(lab, "forward", daemons.daemons) as it:
            with it.watched(tmp_path):
                case = it.pair(kind)
                moved(it.export_actively([case.ours]))
                [taken] = it.take([it.request(case)])
                copy = copy_of(taken)
                it.finish(case, copy)
                copy.close()
            port, peer_port = case.port, case.remote[1]
            until(lambda: in_time_wait(it, "b", case))
            case.close()
        with cluster(lab, "ab", **options) as daemons, bench(lab, "forward", daemons.daemons) as it:
            with it.watched(tmp_path):
                case = connect(it, kind, port, peer_port)
                assert in_time_wait(it, "b", case)
                records = drain(lab.host("a"), "b", local_port=port)
                moved(records)
                assert not in_time_wait(it, "b", case)
                [copy] = it.take([it.request(case)])
                it.finish(case, copy_of(copy))
            it.clear()
    finally:
        lab.host("peer").run(["sysctl", "-qw", f"{TIMESTAMPS}=1"])
