# SPDX-License-Identifier: MIT
"""Connections of neighbours, as BGP's are: what looks at the TTL meets no redirect that lowers it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.client import import_socket
from tests.lab.matrix_lab import copy_of, exchange, moved
from tests.lab.mode_lab import scene

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_IP_MINTTL, _IPV6_MINHOPCOUNT = 21, 73
# By kind of socket: how an application says that it hears its neighbours only, and that it speaks to them.
_NEAR = {
    ("v4", "hears"): (socket.IPPROTO_IP, _IP_MINTTL, 64),
    ("v4", "speaks"): (socket.IPPROTO_IP, socket.IP_TTL, 1),
    ("mapped", "hears"): (socket.IPPROTO_IP, _IP_MINTTL, 64),
    ("v6", "hears"): (socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, 64),
    ("v6", "speaks"): (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1),
}


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_a_redirect_that_lowers_the_ttl_is_refused(lab: Lab, tmp_path: Path, mode: str) -> None:
    """It goes on here: the copy would hear nothing."""
    with scene(lab, mode, tmp_path) as it:
        for (kind, _unused), option in _NEAR.items():
            case = it.pair(kind)
            case.ours.setsockopt(*option)
            [record] = it.export_passively([(os.getpid(), case.fd)])
            assert (record["outcome"], record["refusal"]["code"]) == ("refused", "no-redirect"), record
            assert "allow takeover" in record["refusal"]["message"]
            assert case.peer is not None
            exchange(case.peer, case.ours, 1000)
            exchange(case.ours, case.peer, 1000)


def test_takeover_brings_them(lab: Lab, tmp_path: Path) -> None:
    """There the peer sends straight to the importer."""
    with scene(lab, "takeover", tmp_path) as it:
        cases = [it.pair("v4") for _direction in range(2)]
        for case, direction in zip(cases, ("hears", "speaks"), strict=True):
            assert case.peer is not None
            case.ours.setsockopt(*_NEAR["v4", direction])
            if direction == "speaks":
                case.peer.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        moved(it.export_passively([(os.getpid(), case.fd) for case in cases]))
        requests = [it.request(case) for case in cases]
        found = import_socket(requests, 10, control=it.host("b").control_socket)
        for one in found:
            case = cases[one.request]
            assert case.peer is not None
            with copy_of(one) as copy:
                exchange(case.peer, copy, 1000)
                exchange(copy, case.peer, 1000)


@pytest.mark.parametrize("minimum", [0, 1])
def test_others_move(lab: Lab, tmp_path: Path, minimum: int) -> None:
    """A minimum of 1 refuses nothing."""
    with scene(lab, "forward", tmp_path) as it:
        case = it.pair("v4")
        case.ours.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, minimum)
        moved(it.export_passively([(os.getpid(), case.fd)]))
