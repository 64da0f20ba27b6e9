# SPDX-License-Identifier: MIT
"""What waits in the import list ends when its peer resets it or it has waited too long, and only then."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from lab.capture import Capture, Trouble
from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from sockmi.journal import Record
from tests.lab.crash_lab import Cluster, cluster, elements, journal_of, spooled
from tests.lab.matrix_lab import Bench, Case, bench, copy_of, moved
from tests.lab.mode_lab import forget_other_tests
from tests.lab.scenario import ask, status, until

MODES = ["forward", "nat"]
ABORT = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: on, 0 s


@contextlib.contextmanager
def scene(lab: Lab, mode: str, **imports: float) -> Iterator[tuple[Cluster, Bench]]:
    forget_other_tests(lab, "ab")
    redirect = {"devices": ["eth0"], "modes": [mode]}
    options = {
        "redirect": redirect,
        "timing": {"freeze_deadline_s": 5.0, "linger_s": 1.0},
        "imports": imports,
    }
    with cluster(lab, "ab", **options) as daemons, bench(lab, mode, daemons.daemons) as it:
        try:
            yield daemons, it
        finally:
            it.clear()


def listed(it: Bench) -> int:
    return int(status(it.host("b"))["import_lists"]["connected"]["length"])


def send(it: Bench, kind: str = "v4") -> Case:
    """A connection of a's that waits in b's list."""
    case = it.pair(kind)
    before = listed(it)
    moved(it.export_actively([case.ours]))
    until(lambda: listed(it) == before + 1)
    return case


def leftovers(it: Bench) -> list[str]:
    """Of both hosts: slots, spool, redirects, holds, records."""
    found = []
    for name in "ab":
        host = it.host(name)
        now = status(host)
        counts = now["redirects_in"], now["redirects_out"], now["import_lists"]["connected"]["length"]
        found += [f"{name}: {counts}"] if any(counts) else []
        found += [f"{name}: {one}" for one in [*spooled(host), *elements(host)]]
        with journal_of(host) as journal:
            found += [f"{name}: {kind} {records}" for kind in Record if (records := journal.records(kind))]
    return found


def nothing_left(it: Bench) -> None:
    """Soon."""
    try:
        until(lambda: not leftovers(it))
    except AssertionError:
        raise AssertionError("\n".join(leftovers(it))) from None


def last(it: Bench) -> tuple[str, str]:
    """Outcome and code of b's latest import."""
    [answer] = ask(it.host("b"), "history", direction="import", limit=1)
    [record] = answer["migrations"]
    return record["outcome"], (record["refusal"] or {}).get("code", "")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("data", [b"", b"unread" * 5000], ids=["idle", "after-data"])
@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
def test_its_peer_resets_it(lab: Lab, mode: str, kind: str, data: bytes, restarted: bool) -> None:
    with scene(lab, mode) as (daemons, it):
        case = send(it, kind)
        assert case.peer
        if data:
            case.peer.setblocking(False)
            case.peer.send(data[:4000])
        if restarted:
            daemons.daemons["b"].restart()
            daemons.ready()
        Event().wait(0.3)
        assert listed(it) == 1
        case.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        case.peer.close()
        if restarted and data:  # what came before the restart is lost, and with it what the RST follows
            return
        nothing_left(it)
        assert last(it) == ("failed", "state")


@pytest.mark.parametrize("mode", MODES)
def test_a_guessed_rst_is_not_the_end(lab: Lab, tmp_path: Path, mode: str) -> None:
    """One that is in the window, but not in sequence; nor is a FIN. The application gets it all."""
    with scene(lab, mode) as (_unused, it):
        case = send(it)
        assert case.peer
        local = it.host("a").address4
        lines = [
            "import socket, struct, sys",
            "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)",
            "s.bind((sys.argv[1], 0))",
            "def total(b):",
            "    n = sum(struct.unpack('!%dH' % (len(b) // 2), b)); n = (n >> 16) + (n & 65535)",
            "    return ~((n >> 16) + n) & 65535",
            "for seq in map(int, sys.argv[5:]):",
            "    ports = int(sys.argv[2]), int(sys.argv[4])",
            "    tcp = struct.pack('!HHIIBBHHH', *ports, seq % 2**32, 0, 80, 4, 0, 0, 0)",
            "    ends = socket.inet_aton(sys.argv[1]) + socket.inet_aton(sys.argv[3])",
            "    check = total(ends + struct.pack('!HH', 6, len(tcp)) + tcp)",
            "    s.sendto(tcp[:16] + struct.pack('!H', check) + tcp[18:], (sys.argv[3], 0))",
        ]
        numbers = [str(n << 29) for n in range(8)]
        peer = case.peer.getsockname()
        it.host("peer").run(
            ["python3", "-c", "\n".join(lines), peer[0], str(peer[1]), local, str(case.port), *numbers]
        )
        case.to_us = b"the last words"
        case.peer.sendall(case.to_us)
        Event().wait(0.5)
        assert listed(it) == 1
        [came] = it.take([it.request(case, it.target())])
        copy = copy_of(came)
        it.finish(case, copy)
        copy.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["v4", "v6"])
def test_nobody_takes_it(lab: Lab, tmp_path: Path, mode: str, kind: str) -> None:
    """With listed_max_s its peer gets one RST, under the name that it knows, and nothing is left."""
    with scene(lab, mode, listed_max_s=2.0) as (_unused, it):
        with Capture(it.host("peer"), "tcp", tmp_path / "peer.pcap") as capture:
            case = send(it, kind)
            assert case.peer
            nothing_left(it)
            with pytest.raises(ConnectionResetError):
                case.peer.recv(1)
        assert last(it) == ("failed", "timeout")
        found = capture.check().findings
        assert [one.trouble for one in found] == [Trouble.RST], found


def test_an_application_is_in_time(lab: Lab, tmp_path: Path) -> None:
    """What is taken is not ended later; and a listener and a bound socket that nobody takes leave nothing."""
    with scene(lab, "forward", listed_max_s=2.0) as pair, pair[1].watched(tmp_path):
        it = pair[1]
        case = send(it)
        listener = it.listener("a", "v4", it.port(), "0.0.0.0")  # noqa: S104
        bound = it.sock("a", "v4")
        bound.bind(("0.0.0.0", it.port()))  # noqa: S104
        moved(it.export_actively([listener, bound]))
        [came] = it.take([it.request(case, it.target())])
        copy = copy_of(came)
        until(lambda: all(not one["length"] for one in status(it.host("b"))["import_lists"].values()))
        Event().wait(2.5)
        it.finish(case, copy)
        for each in (copy, listener, bound):
            each.close()
        it.host("b").run(["ss", "--kill", "--tcp", "state", "time-wait"])
        until(lambda: status(it.host("a"))["redirects_out"] == 0)


def test_it_is_warned_of(lab: Lab) -> None:
    """Once; the metric tells how long it has waited."""
    with scene(lab, "forward", listed_warn_s=1.0) as (daemons, it):
        case = send(it)
        text = "has waited for an application"
        until(lambda: text in daemons.daemons["b"].log())
        Event().wait(2.5)
        log = daemons.daemons["b"].log()
        assert log.count(text) == 1 and f":{case.port}" in log and "listed_max_s" in log
        assert listed(it) == 1
        [came] = import_socket([ImportRequest(["connected"])], 10, control=it.host("b").control_socket)
        os.close(copy_of(came).detach())
