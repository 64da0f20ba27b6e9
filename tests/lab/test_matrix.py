# SPDX-License-Identifier: MIT
"""The matrix: every state, moved a -> b by real daemons, actively and passively, over each redirect."""

from __future__ import annotations

import errno
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
    exchange,
    moved,
    receive,
    same,
    state,
    unread,
)  # fmt: skip
from tests.lab.matrix_states import WAYS, move_all_states, waiting
from tests.lab.scenario import ask, daemons, until

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
    """Unconnected, bound and listening sockets, on a wildcard and on an address, with their options."""
    with it.watched(tmp_path):
        wildcard = EVERYWHERE if kind == "v4" else "::"
        made: dict[str, tuple[socket.socket, str, int]] = {}
        for name, address in (("wildcard", wildcard), ("specific", it.address(kind))):
            port = it.port()
            bound = it.sock("a", kind)
            bound.bind((address, port))
            made[f"bound {name}"] = bound, address, port
            port = it.port()
            made[f"listening {name}"] = it.listener("a", kind, port, address, backlog=17), address, port
        made["unconnected"] = it.sock("a", kind), wildcard, 0
        for sock, _unused, _unused in made.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(TCP, socket.TCP_KEEPIDLE, 77)
        targets = [it.target() for _unused in made]
        requests = [
            ImportRequest(
                [name.split()[0].replace("unconnected", "bound")], local_port=port or None, replace=target,
                # A socket on a wildcard matches any address of its family.
                local_address=it.address("v6" if kind == "v6" else "v4") if "specific" in name else None,
            )
            for (name, (_unused, _unused, port)), target in zip(made.items(), targets, strict=True)
        ]  # fmt: skip
        sockets = [sock for sock, _unused, _unused in made.values()]
        if way == "active":
            taking = Later(it.take, requests)
            until(lambda: waiting(it, "bound") + waiting(it, "listening") == len(made))
            records = it.export_actively(sockets)
            moved(records)
            imported = taking.result()
        else:
            pairs = [(os.getpid(), sock.fileno()) for sock in sockets]
            done = it.export_passively(pairs)
            moved(done)
            imported = it.take(requests)
        copies = {}
        for (name, (_unused, address, port)), one, target in zip(
            made.items(), imported, targets, strict=True
        ):
            assert one.fd == target, name
            copy = copies[name] = copy_of(one)
            assert copy.getsockname()[:2] == (address, port), name
            assert copy.getsockopt(TCP, socket.TCP_KEEPIDLE) == 77, name
            listening = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert listening == name.startswith("listening"), name
            if listening:  # tcpi_sacked of a listener is its backlog
                assert struct.unpack_from("I", copy.getsockopt(TCP, socket.TCP_INFO, 104), 28) == (17,), name
        for sock in sockets:
            dead(sock)
            sock.close()
        use(it, kind, copies, made["listening wildcard"][2])
        for copy in copies.values():
            copy.close()


def dead(sock: socket.socket) -> None:
    """What its owner has left of a socket that has moved is good for nothing."""
    with pytest.raises(OSError) as raised:
        sock.accept()
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(OSError) as raised:
        sock.listen()
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(OSError) as raised:
        sock.connect(("::1" if sock.family == socket.AF_INET6 else "127.0.0.1", 7))
    assert raised.value.errno == errno.EISCONN


def use(it: Bench, kind: str, copies: dict[str, socket.socket], port: int) -> None:
    """What has come is good for all that such a socket is good for."""
    there = "v6" if kind == "v6" else "v4"
    for name in ("unconnected", "bound wildcard"):
        with it.listener("peer", there, it.port()) as listener:
            copies[name].connect((it.address(kind, "peer"), listener.getsockname()[1]))
            peer, _unused = listener.accept()
            peer.settimeout(10)
            with peer:
                exchange(copies[name], peer, 10_000)
                exchange(peer, copies[name], 10_000)
    with it.sock("peer", there) as peer:
        peer.connect((it.address(there, "b"), port))
        ours, _unused = copies["listening wildcard"].accept()
        ours.settimeout(10)
        with ours:
            exchange(ours, peer, 10_000)
            exchange(peer, ours, 10_000)
    copies["bound specific"].listen(3)
    # Who connects to where a listener was waits: tests/lab/test_listener_away.py has what becomes of it.
    for name in ("listening wildcard", "listening specific"):
        with it.sock("peer", there) as peer:
            peer.settimeout(0.2)
            with pytest.raises(TimeoutError):
                peer.connect((it.address(there), copies[name].getsockname()[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_listener_with_its_queue(it: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """Connections that nobody has accepted follow their listener, tagged with it, byte-exact."""
    port, there = it.port(), "v6" if kind == "v6" else "v4"
    with it.watched(tmp_path):
        listener = it.listener("a", kind, port)
        peers = []
        for index in range(5):
            peer = it.sock("peer", there)
            peer.connect((it.address(there), port))
            peer.sendall(b"%d" % index * (1 + 20_000 * index))
            peers.append(peer)
        until(lambda: struct.unpack_from("I", listener.getsockopt(TCP, socket.TCP_INFO, 104), 24) == (5,))
        if way == "active":
            [active] = it.export_actively([listener])
            moved([active])
            migration = active.migration_id
        else:
            [passive] = it.export_passively([(os.getpid(), listener.fileno())])
            moved([passive])
            migration = UUID(passive["migration_id"])
        until(lambda: len(ask(it.host("b"), "list", table="imports")[-1]["imports"]) == 6)
        [came] = it.take([ImportRequest(["listening"], local_port=port, replace=it.target())])
        assert came.record.migration_id == migration
        children = it.take([ImportRequest(["connected"], listener=migration)] * 5)
        by_port = {peer.getsockname()[1]: (index, peer) for index, peer in enumerate(peers)}
        for child in children:
            assert child.record.listener == migration and child.remote and child.socket
            index, peer = by_port.pop(child.remote.port)
            ours = copy_of(child)
            same(receive(ours, 1 + 20_000 * index), b"%d" % index * (1 + 20_000 * index), f"child {index}")
            exchange(ours, peer, 50_000)
            exchange(peer, ours, 50_000)
            ours.shutdown(socket.SHUT_WR)
            assert peer.recv(1) == b""
            peer.close()
            assert ours.recv(1) == b""
            until(lambda ours=ours: state(ours) == "CLOSED")  # type: ignore[misc]
            ours.close()
        assert not by_port
        copy_of(came).close()
        listener.close()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_windows_both_ways(it: Bench, tmp_path: Path, kind: str) -> None:
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
        [record] = it.export_actively([case.ours])
        moved([record])
        assert record.unsent_bytes + record.sent_bytes > 0 and record.receive_queue_bytes > 100_000
        [came] = it.take([it.request(case, it.target())])
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
def test_sequence_wrap(it: Bench, tmp_path: Path, kind: str) -> None:
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
        with Keeper([case.fd for case in cases]) as owner:
            pairs = [(owner.pid, case.fd) for case in cases]
            for case in cases:
                case.ours.close()
            done = it.export_passively(pairs)
        moved(done)
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
