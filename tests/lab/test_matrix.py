# SPDX-License-Identifier: MIT
"""The matrix: every state, moved a -> b by real daemons, actively and passively, over each redirect."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from lab.capture import Trouble
from lab.labs import Lab
from sockmi.client import Imported, ImportRequest, import_socket
from tests.lab.matrix_lab import (
    EVERYWHERE,
    KINDS,
    TCP,
    Bench,
    Case,
    Keeper,
    Later,
    bench,
    copy_of,
    moved,
    receive,
    same,
    unread,
)  # fmt: skip
from tests.lab.matrix_states import (
    WAYS,
    move_a_listener_with_its_queue,
    move_all_states,
    move_without_a_connection,
    waiting,
)
from tests.lab.scenario import daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module", params=["forward", "nat"])
def running(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Daemons of one redirect mode for many tests; patient, as the machine may be slow."""
    redirect = {"devices": ["eth0"], "modes": [request.param]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, request.param, both) as made,
    ):
        yield made


@pytest.fixture
def it(running: Bench) -> Iterator[Bench]:
    """The bench, which is cleared afterwards."""
    yield running
    running.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_connections(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """Every state; the other redirects: test_matrix_modes.py."""
    move_all_states(it, tmp_path, way, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_without_a_connection(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """The other redirects: test_matrix_modes.py."""
    move_without_a_connection(it, tmp_path, way, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_listener_with_its_queue(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """The other redirects: test_matrix_modes.py."""
    move_a_listener_with_its_queue(it, tmp_path, way, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_zero_windows_both_ways(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """Both receivers are full, both senders have megabytes more: all of it arrives, after the move.

    A full receiver drops what is in between, and this engine cannot carry what it holds out of order.
    """
    with it.watched(tmp_path, allow=[Trouble.SACK_RENEGED]):
        case = it.pair(kind)
        assert case.peer
        sent = {}
        for sock in (case.ours, case.peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 3 << 20)
            sock.setblocking(False)
            sent[sock] = os.urandom(12 << 20)
        counts = {sock: fill(sock, data) for sock, data in sent.items()}
        assert min(counts.values()) > 1 << 20, counts
        if way == "active":
            moved(it.export_actively([case.ours]))
        else:
            moved(it.export_passively([(os.getpid(), case.fd)]))
        [came] = it.take([it.request(case, it.target())])
        record = came.record
        assert record.unsent_bytes + record.sent_bytes > 0 and record.receive_queue_bytes > 100_000
        copy = copy_of(came)
        case.peer.settimeout(20)
        to_copy, to_peer = sent[case.peer][: counts[case.peer]], sent[case.ours][: counts[case.ours]]
        reading = Later(receive, case.peer, len(to_peer))
        same(receive(copy, len(to_copy)), to_copy, "to the copy")
        same(reading.result(60), to_peer, "to the peer")
        it.finish(case, copy)
        copy.close()


def fill(sock: socket.socket, data: bytes) -> int:
    """Send until nothing more is taken for a while; how much."""
    total = 0
    idle = 0
    while total < len(data) and idle < 5:
        try:
            total += sock.send(data[total : total + (1 << 18)])
            idle = 0
        except BlockingIOError:
            idle += 1
            time.sleep(0.05)
    return total


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("way", WAYS)
def test_sequence_wrap(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """2^32 lies inside the receive queue, the sent data or the unsent data."""
    # A connection made by hand has no SYN in the capture; both its ends are ours all the same.
    with it.watched(tmp_path):
        cases = [repair_pair(it, kind, 2**32 - before) for before in (1, 1000, 20_000, 50_000)]
        for case in cases:
            assert case.peer
            case.to_us, case.to_peer = os.urandom(30_000), os.urandom(55_000)
            case.peer.sendall(case.to_us)
            until(lambda case=case: unread(case.ours) == len(case.to_us))  # type: ignore[misc]
            it.deafen([case.port])
            case.deaf = True
            case.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 131072)  # some hosts begin with less
            case.ours.setblocking(False)
            assert case.ours.send(case.to_peer) == len(case.to_peer)
        if way == "active":
            moved(it.export_actively([case.ours for case in cases]))
        else:
            with Keeper([case.fd for case in cases]) as owner:
                pairs = [(owner.pid, case.fd) for case in cases]
                for case in cases:
                    case.ours.close()
                moved(it.export_passively(pairs))
        imported = it.take([it.request(case, it.target()) for case in cases])
        it.undeafen(cases)
        for case, one in zip(cases, imported, strict=True):
            copy = copy_of(one)
            it.finish(case, copy)
            copy.close()


def repair_pair(it: Bench, kind: str, sequence: int) -> Case:
    """A connection made by TCP_REPAIR, so that both ends' sequence numbers can be chosen."""
    port = it.port()
    made = []
    for host, other in (("a", "peer"), ("peer", "a")):
        sock = it.sock(host, kind)
        sock.setsockopt(TCP, 19, 1)  # TCP_REPAIR
        sock.bind((it.address(kind, host), port))
        for queue in (2, 1):
            sock.setsockopt(TCP, 20, queue)  # TCP_REPAIR_QUEUE
            sock.setsockopt(TCP, 21, struct.pack("I", sequence))  # TCP_QUEUE_SEQ
        sock.setsockopt(TCP, socket.TCP_MAXSEG, 1460)
        sock.connect((it.address(kind, other), port))
        options = struct.pack("8I", 2, 1460, 3, 7 | 7 << 16, 4, 0, 8, 0)
        sock.setsockopt(TCP, 22, options)  # TCP_REPAIR_OPTIONS
        sock.setsockopt(TCP, 29, struct.pack("5I", sequence, 60000, 60000, 60000, sequence))
        made.append(sock)
    for sock in made:
        sock.setsockopt(TCP, 19, -1)
    case = Case("wrap", kind, "ESTABLISHED", made[0], port, made[1], remote=made[1].getsockname()[:2])
    it.cases.append(case)
    return case


@pytest.mark.parametrize("context_bytes", [0, 1, 1 << 20])
def test_application_context(it: Bench, tmp_path: Path, context_bytes: int) -> None:
    """It arrives as it was; once through the list (spooled), once to an application that waits."""
    context = os.urandom(context_bytes)
    with it.watched(tmp_path):
        for listed in (True, False):
            case = it.pair("v4")
            request = it.request(case, it.target())
            taking = None if listed else Later(it.take, [request])
            if taking:
                until(lambda: waiting(it) == 1)
            [record] = it.export_actively([case.ours], context=context)
            assert (record.outcome, record.context_bytes) == ("moved", context_bytes)
            [came] = taking.result() if taking else it.take([request])
            assert came.context == context
            assert came.record.context_bytes == context_bytes
            copy = copy_of(came)
            it.finish(case, copy)
            copy.close()


def test_criteria(it: Bench) -> None:
    """Which of the listed sockets a request gets: by mask, preference, addresses, ports, and age."""
    first, second = it.pair("v4"), it.pair("v6")
    listener = it.listener("a", "v4", it.port(), EVERYWHERE)
    for sock in (first.ours, second.ours, listener):
        [record] = it.export_actively([sock])
        moved([record])

    def none(**wanted: object) -> None:
        states = wanted.pop("states", ["connected"])
        request = ImportRequest(states, **wanted)  # type: ignore[arg-type]
        assert not it_imports(it, request), wanted

    none(local_port=first.port + 1000)
    none(local_address=it.host("b").address(4))
    none(remote_address=it.host("a").address(4))
    none(remote_port=1)
    none(local_address=it.host("a").address(6), local_port=first.port)
    none(states=["bound"])
    none(states=["listening"], local_address=it.host("a").address(6))
    none(states=["connected"], listener=UUID(int=1))
    # Without preference the longest waiting; a preferred kind before that; a wildcard matches any address.
    everything = ["bound", "listening", "connected"]
    [one] = it_imports(it, ImportRequest(everything, ["listening"], it.host("b").address(4)))
    assert one.kind == "listening"
    [two] = it_imports(it, ImportRequest(everything))
    assert two.origin and two.origin.port == first.port
    [three] = it_imports(it, ImportRequest(["connected"], remote_address=it.host("peer").address(6)))
    assert three.origin and three.origin.port == second.port
    for case, came in ((first, two), (second, three)):
        it.finish(case, copy_of(came))
    copy_of(one).close()
    listener.close()


def it_imports(it: Bench, *requests: ImportRequest) -> list[Imported]:
    """An import at b that does not wait."""
    return import_socket(requests, 0, control=it.host("b").control_socket)
