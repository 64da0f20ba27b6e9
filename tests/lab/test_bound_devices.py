# SPDX-License-Identifier: MIT
"""Connections that are bound to a device (SO_BINDTODEVICE), over crashes of both daemons.

The kernel shows such a socket only to who names its device (sockmi/diag.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.addresses import Endpoint, FourTuple
from sockmi.diag import SocketDiag
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import Bench, Case, Held, Later, bench, copy_of, exchange, moved
from tests.lab.mode_lab import SERVICE, give_service, take_service
from tests.lab.scenario import ask, daemons, status, until
from tests.lab.test_held import retransmissions

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def bound(it: Bench, kind: str) -> Case:
    """A connection of a's that is bound to its device."""
    case = it.pair(kind)
    case.ours.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return case


def tuple_of(case: Case) -> FourTuple:
    """As it is on a."""
    local, remote = case.ours.getsockname(), case.ours.getpeername()
    return FourTuple(Endpoint(ip_address(local[0]), local[1]), Endpoint(ip_address(remote[0]), remote[1]))


@pytest.mark.parametrize("kind", ["v4", "v6"])
def test_found_and_destroyed(lab: Lab, kind: str) -> None:
    it = Bench(lab, "forward", None)  # type: ignore[arg-type]
    plain, case = it.pair(kind), bound(it, kind)
    with lab.host("a").entered():
        diag = SocketDiag()
    for one in (plain, case):
        found = diag.find(tuple_of(one))
        assert found is not None and found.inode == os.fstat(one.fd).st_ino
    nobody = FourTuple(Endpoint(tuple_of(case).local.address, 1), tuple_of(case).remote)
    assert diag.find(nobody) is None
    several = [tuple_of(plain), nobody, tuple_of(case)]
    assert diag.find_all(several * 50) == [diag.find(one) for one in several] * 50, "more than one question"
    connection, found = tuple_of(case), diag.find(tuple_of(case))
    assert found
    assert diag.destroy(connection, found.cookie + 1), "another socket's cookie: nothing is done"
    assert diag.find(connection) == found
    assert diag.destroy(connection, found.cookie)
    assert diag.find(connection) is None and diag.find(tuple_of(plain)) is not None
    diag.close()
    plain.close()
    case.close()


def test_it_survives_both_daemons(lab: Lab, tmp_path: Path) -> None:
    """The exporter dies with COMMIT in its journal and the original alive; later the importer restarts."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        cluster(lab, "ab", {"a": "commit.journalled"}, redirect=redirect) as two,
        bench(lab, "forward", two.daemons) as it,
        it.watched(tmp_path),
    ):
        case = bound(it, "v4")
        assert case.peer
        with Held(it, case) as held:
            connection = held.begin()
            two.died("a")
            connection.close()
            two.start("a")
            two.ready()
            history = [one for answer in ask(it.host("a"), "history") for one in answer["migrations"]]
            assert [one["outcome"] for one in history] == ["aborted"], history
            held.back()
        exchange(case.ours, case.peer, 10_000)
        until(lambda: status(it.host("b"))["import_lists"]["connected"]["length"] == 0)

        moving = Later(it.export_actively, [case.ours])
        moved(moving.result())
        [came] = it.take([it.request(case, it.target())])
        copy = copy_of(came)
        assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
        exchange(copy, case.peer, 10_000)
        two.signal("b", signal.SIGKILL)
        two.died("b")
        two.start("b")
        two.ready()
        exchange(case.peer, copy, 10_000)
        assert status(it.host("a"))["redirects_out"] == 1
        case.peer.close()  # so that no TIME-WAIT is left on b
        assert copy.recv(1) == b""
        copy.close()
        until(lambda: status(it.host("a"))["redirects_out"] == status(it.host("b"))["redirects_in"] == 0)


@pytest.mark.parametrize("mode", ["forward", "nat", "takeover"])
@pytest.mark.parametrize("kind", ["v4", "v6"])
def test_what_was_held_is_delivered(lab: Lab, tmp_path: Path, mode: str, kind: str) -> None:
    """By its device: the peer, which repeats nothing for 20 s, need not."""
    with daemons(lab, "ab", redirect={"devices": ["eth0"], "modes": [mode]}) as both, patient(lab):
        with bench(lab, mode, both) as it, it.watched(tmp_path):
            if mode == "takeover":
                give_service(lab)
                it.service = SERVICE
            case = bound(it, kind)
            exchange(case.ours, case.peer, 100)  # so that the peer knows how long to wait
            moved(it.export_actively([case.ours]))
            until(lambda: status(it.host("b"))["import_lists"]["connected"]["length"] == 1)
            assert case.peer
            case.peer.sendall(b"while nobody had it")
            began = time.monotonic()
            [came] = it.take([it.request(case, it.target())])
            copy = copy_of(came)
            copy.settimeout(15)
            assert copy.recv(100) == b"while nobody had it"
            assert time.monotonic() - began < 15 and retransmissions(case.peer) == 0
            exchange(copy, case.peer, 10_000)
            case.peer.close()
            assert copy.recv(1) == b""
            copy.close()
            it.clear()
        take_service(lab)


@contextlib.contextmanager
def patient(lab: Lab) -> Iterator[None]:
    """The peer waits 20 s before it repeats something."""
    peer, ways = lab.host("peer"), []
    for version, network in ((4, "10.77.1.0/24"), (6, "fd77:1::/64")):
        [way] = [
            one
            for one in peer.run(["ip", f"-{version}", "route", "show", network]).stdout.splitlines()
            if one
        ]
        ways.append([f"-{version}", "route", "change", *way.split()])
    probe = peer.run(["sysctl", "-n", "net.ipv4.tcp_early_retrans"]).stdout.strip()
    try:
        for way in ways:
            peer.run(["ip", *way, "rto_min", "20s"])
        peer.run(["sysctl", "-qw", "net.ipv4.tcp_early_retrans=0"])
        yield
    finally:
        peer.run(["sysctl", "-qw", f"net.ipv4.tcp_early_retrans={probe}"])
        for way in ways:
            peer.run(["ip", *way])


def test_closing_states(lab: Lab, tmp_path: Path) -> None:
    """The copy is told of the FINs and ACKs that the original has had, though not by its device."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    states = ("FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "CLOSING", "LAST-ACK")
    with (
        daemons(lab, "ab", redirect=redirect) as both,
        bench(lab, "forward", both) as it,
        it.watched(tmp_path),
    ):
        cases = [it.make(kind, wanted, True) for kind in ("v4", "v6") for wanted in states]
        for case in cases:
            case.ours.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        moved(it.export_actively([case.ours for case in cases]))
        it.undeafen(cases)
        for case, came in zip(cases, it.take([it.request(case) for case in cases]), strict=True):
            copy = copy_of(came)
            assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
            it.finish(case, copy)
            copy.close()
        it.clear()
