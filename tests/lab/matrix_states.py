# SPDX-License-Identifier: MIT
"""All states with a connection, or without, moved in one batch by real daemons, and what is said of them."""

from __future__ import annotations

import errno
import os
import socket
import struct
import traceback
from pathlib import Path
from uuid import UUID

import pytest

from sockmi.client import Imported, ImportRequest
from tests.lab.matrix_lab import (
    CONNECTED,
    EVERYWHERE,
    NEXT,
    TCP,
    Bench,
    Case,
    Keeper,
    Later,
    copy_of,
    exchange,
    moved,
    receive,
    same,
    state,
)
from tests.lab.scenario import ask, status, until

WAYS = ("active", "passive")


def replaced(it: Bench, case: Case, imported: Imported, target: int) -> socket.socket:
    """What the import says of a connection is true; the copy, in the place of the caller's descriptor."""
    assert imported.fd == target and imported.socket is None
    copy = copy_of(imported)
    family = "v6" if case.kind == "v6" else "v4"
    there = it.address(family, "b" if it.mode in ("nat", "iptables") else "a")
    known = it.address(family)
    assert imported.local and imported.origin and imported.remote
    assert (str(imported.local.address), str(imported.origin.address)) == (there, known)
    assert imported.origin.port == case.port
    mapped = "::ffff:" if case.kind == "mapped" else ""
    assert copy.getsockname()[:2] == (mapped + there, imported.local.port)
    if state(copy) not in ("SYN-SENT", "CLOSED"):
        assert copy.getpeername()[:2] == (mapped + case.remote[0], case.remote[1])
    assert copy.family == (socket.AF_INET if case.kind == "v4" else socket.AF_INET6)
    assert imported.record.mode == it.mode
    return copy


def move_all_states(it: Bench, directory: Path, way: str, kind: str) -> None:
    """All states with a connection, empty and with queues, in one batch.

    Passive ones are listed at b before an application asks; for active ones it waits already.
    """
    engine = status(it.host("b"))["engine"]
    with it.watched(directory):
        cases = [it.make(kind, wanted, queued) for wanted in CONNECTED for queued in (False, True)]
        targets = [it.target() for _unused in cases]
        requests = [it.request(case, target) for case, target in zip(cases, targets, strict=True)]
        if way == "active":
            taking = Later(it.take, requests)
            until(lambda: waiting(it) == len(cases))
            records = it.export_actively([case.ours for case in cases], context=b"session")
            moved(records)
            imported = taking.result()
        else:
            with Keeper([case.fd for case in cases]) as owner:
                pairs = [(owner.pid, case.fd) for case in cases]
                for case in cases:
                    case.ours.close()
                done = it.export_passively(pairs)
                moved(done)
                assert [record["state"] for record in done] == [case.state for case in cases]
                imported = it.take(requests)
        failures: list[str] = []
        copies: list[socket.socket] = []
        for case, one, target in zip(cases, imported, targets, strict=True):
            copy = replaced(it, case, one, target)
            copies.append(copy)
            found, expected = state(copy), {case.state}
            if case.deaf and case.state == "CLOSING" and case.to_peer and engine == "repair":
                # What is yet unsent can be given to a copy only before it hears the peer's FIN:
                # it takes the way over CLOSE-WAIT. To the peer that is the same.
                expected = {"LAST-ACK"}
            if found not in expected and (case.deaf or found not in NEXT.get(case.state, ())):
                failures.append(f"{case.name}: the copy is {found}")
            assert one.context == (b"session" if way == "active" else b"")
        it.undeafen(cases)
        for case, copy in zip(cases, copies, strict=True):
            try:
                it.finish(case, copy)
            except (AssertionError, OSError):
                failures.append(f"{case.name}: {traceback.format_exc(limit=-3)}")
            copy.close()
        assert not failures, "\n".join(failures)


def move_without_a_connection(it: Bench, directory: Path, way: str, kind: str) -> None:
    """Unconnected, bound and listening sockets, on a wildcard and on an address, with their options."""
    with it.watched(directory):
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


def move_a_listener_with_its_queue(it: Bench, directory: Path, way: str, kind: str) -> None:
    """Connections that nobody has accepted follow their listener, tagged with it, byte-exact."""
    port, there = it.port(), "v6" if kind == "v6" else "v4"
    with it.watched(directory):
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


def waiting(it: Bench, kind: str = "connected") -> int:
    """How many requests wait at b."""
    [answer] = ask(it.host("b"), "status")
    return int(answer["import_lists"][kind]["waiting"])
