# SPDX-License-Identifier: MIT
"""All states with a connection, moved in one batch by real daemons, and what is said of them."""

from __future__ import annotations

import socket
import traceback
from pathlib import Path

from sockmi.client import Imported
from tests.lab.matrix_lab import CONNECTED, NEXT, Bench, Case, Keeper, Later, copy_of, moved, state
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


def waiting(it: Bench, kind: str = "connected") -> int:
    """How many requests wait at b."""
    [answer] = ask(it.host("b"), "status")
    return int(answer["import_lists"][kind]["waiting"])
