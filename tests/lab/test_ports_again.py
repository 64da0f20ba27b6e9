# SPDX-License-Identifier: MIT
"""A peer connects again from the port of a connection that has moved and ended, to where it always has.

Proxies with many connections do that, clients with a fixed port, and BGP.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import EVERYWHERE, Bench, Case, bench, copy_of, exchange, moved
from tests.lab.scenario import status, until

AS_INSTALLED = {"linger_s": 120.0, "look_again_s": 10.0, "freeze_deadline_s": 5.0}
#: Its first SYN may find what is left of the old connection, and is repeated after a second.
AT_ONCE_S = 2.5


def end(case: Case, copy: socket.socket, how: str) -> None:
    """So that the peer has nothing left of it."""
    assert case.peer is not None
    if how == "reset":
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    copy.close()
    if how == "reset":
        with pytest.raises(ConnectionResetError):
            case.peer.recv(1)
    else:
        assert case.peer.recv(1) == b""
    case.peer.close()


def again(it: Bench, case: Case, listener: socket.socket) -> float:
    """The same ports once more; how long it took."""
    peer = it.sock("peer", case.kind)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    peer.bind((it.address(case.kind, "peer"), case.remote[1]))
    began = time.monotonic()
    peer.connect((it.address(case.kind), case.port))
    took = time.monotonic() - began
    case.ours, _unused = listener.accept()
    case.peer = peer
    exchange(case.ours, peer, 200_000)
    return took


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("mode", ["forward", "nat"])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_its_port_comes_again(lab: Lab, tmp_path: Path, how: str, mode: str, kind: str) -> None:
    """At once, as if nothing had moved; and that connection may move and end as well."""
    options = {"redirect": {"devices": ["eth0"], "modes": [mode]}, "timing": AS_INSTALLED}
    with cluster(lab, "ab", **options) as daemons, bench(lab, mode, daemons.daemons) as it:
        case = it.pair(kind)
        with it.listener("a", kind, case.port) as listener:
            for _turn in range(2):
                moved(it.export_actively([case.ours]))
                [taken] = it.take([it.request(case)])
                copy = copy_of(taken)
                exchange(copy, case.peer, 200_000)
                end(case, copy, how)
                assert again(it, case, listener) < AT_ONCE_S
        case.close()
        it.clear()


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("mode", ["forward", "nat"])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_the_importers_own_service_is_not_meant(
    lab: Lab, tmp_path: Path, how: str, mode: str, kind: str
) -> None:
    """It listens at the same port of all addresses, and the old connection's packets still come to it."""
    options = {"redirect": {"devices": ["eth0"], "modes": [mode]}, "timing": AS_INSTALLED}
    with cluster(lab, "ab", **options) as daemons, bench(lab, mode, daemons.daemons) as it:
        case = it.pair(kind)
        everywhere = EVERYWHERE if kind == "v4" else "::"
        with it.listener("a", kind, case.port) as listener, it.listener("b", kind, case.port, everywhere):
            for _turn in range(2):
                moved(it.export_actively([case.ours]))
                [taken] = it.take([it.request(case)])
                copy = copy_of(taken)
                exchange(copy, case.peer, 200_000)
                end(case, copy, how)
                assert again(it, case, listener) < AT_ONCE_S
        case.close()
        it.clear()


def test_an_end_by_reset_is_noticed(lab: Lab) -> None:
    """Of what its owner aborts the kernel does not say who the peer was; its redirect goes all the same."""
    options = {"redirect": {"devices": ["eth0"], "modes": ["forward"]}, "timing": AS_INSTALLED}
    with cluster(lab, "ab", **options) as daemons, bench(lab, "forward", daemons.daemons) as it:
        case, stays = it.pair("v4"), it.pair("v4")
        moved(it.export_actively([case.ours, stays.ours]))
        copy, other = map(copy_of, it.take([it.request(case), it.request(stays)]))
        end(case, copy, "reset")
        until(lambda: status(lab.host("b"))["redirects_in"] == 1)
        until(lambda: status(lab.host("a"))["redirects_out"] == 1)
        assert stays.peer is not None
        exchange(other, stays.peer, 200_000)
        other.close()
        it.clear()
