# SPDX-License-Identifier: MIT
"""A thousand moves that are frozen, shipped and undone, under traffic both ways, by four causes in turn.

Whatever stops them, the connections go on where they were: not a byte is lost or changed, and the wire shows
nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.labs import Lab
from tests.lab.matrix_lab import Bench, Keeper, Later, bench, verdict
from tests.lab.scenario import ask, daemons, status, until
from tests.lab.test_matrix_traffic import End, Stream
from tests.laws import law

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(180)]

CONNECTIONS = 32  # one chunk
IMAGES_BYTES = 8000  # theirs are longer, and what reserves their places is shorter
PIECE_BYTES = 1200
PAUSE_S = 0.03  # between two pieces of a connection


@pytest.fixture(scope="module")
def it(lab: Lab) -> Iterator[Bench]:
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 2.0}) as both,
        bench(lab, "forward", both) as made,
    ):
        made.warm()
        yield made


def talk(ends: Sequence[tuple[socket.socket, End]], stopped: Callable[[], bool]) -> list[tuple[int, int]]:
    """Pieces of random sizes both ways until told to stop or the other side has; then to the other's end."""
    sizes = random.Random(len(ends))  # noqa: S311
    open_ends = {sock.fileno(): (sock, end) for sock, end in ends}
    silent: set[int] = set()
    for sock, _unused in ends:
        sock.setblocking(False)
    while open_ends:
        for number in [one for one in open_ends if one not in silent]:
            sock, end = open_ends[number]
            if stopped():
                sock.shutdown(socket.SHUT_WR)
                silent.add(number)
                continue
            assert end.out
            with contextlib.suppress(BlockingIOError):
                end.sent += sock.send(end.out.at(end.sent, sizes.randrange(1, PIECE_BYTES)))
        for number in select.select(list(open_ends), [], [], PAUSE_S)[0]:
            sock, end = open_ends[number]
            data = sock.recv(1 << 16)
            if not data:
                if number not in silent:
                    sock.shutdown(socket.SHUT_WR)
                del open_ends[number]
                continue
            assert end.into
            assert data == end.into.whole(end.got, len(data)), f"other bytes came after {end.got}"
            end.got += len(data)
        time.sleep(PAUSE_S)
    return [(end.sent, end.got) for _unused, end in ends]


# -- what stops a move


@contextlib.contextmanager
def no_way_to_the_peer(it: Bench) -> Iterator[None]:
    """The importer refuses: its copies would have no route."""
    b = it.host("b")
    routes = [("-4", it.address("v4", "peer")), ("-6", it.address("v6", "peer"))]
    for version, address in routes:
        b.run(["ip", version, "route", "add", "unreachable", address])
    try:
        yield
    finally:
        for version, address in routes:
            b.run(["ip", version, "route", "del", "unreachable", address])


@contextlib.contextmanager
def no_spool(it: Bench) -> Iterator[None]:
    """The importer cannot write what it has promised."""
    spool = it.host("b").state_dir / "spool"
    aside = spool.rename(spool.with_name("spool-aside"))
    spool.write_text("in the way")
    for slot in aside.iterdir():  # which the daemon has open, to use it again
        slot.unlink()
    try:
        yield
    finally:
        spool.unlink()
        aside.rename(spool)


def too_late(it: Bench, move: Callable[[], Later]) -> list[dict[str, Any]]:
    """Images come when the deadline has passed."""
    with it.stalled(IMAGES_BYTES):
        return list(move().result())


def stream_lost(it: Bench, move: Callable[[], Later]) -> list[dict[str, Any]]:
    """The stream breaks while they are frozen."""
    with it.stalled(IMAGES_BYTES) as stall:
        moving = move()
        stall.wait()
        it.host("a").run(["ss", "-K", "( sport = 7781 or dport = 7781 )"])
        return list(moving.result())


def simply(_it: Bench, move: Callable[[], Later]) -> list[dict[str, Any]]:
    return list(move().result())


# -- a thousand of them


def test_a_thousand_aborts(it: Bench, tmp_path: Path) -> None:
    causes = [
        (no_way_to_the_peer, simply, "restore", 13),
        (no_spool, simply, "internal", 13),
        (contextlib.nullcontext, too_late, "freeze-deadline", 3),
        (contextlib.nullcontext, stream_lost, "peer-lost", 3),
    ]
    with it.watched(tmp_path):
        kinds = ("v4", "v6", "mapped", "v4")
        cases = [it.pair(kinds[index % 4]) for index in range(CONNECTIONS)]
        ours_out, peer_out = Stream("ours"), Stream("peer")
        ours = [(case.ours, End(ours_out, peer_out)) for case in cases]
        theirs = [(case.peer, End(peer_out, ours_out)) for case in cases if case.peer]
        listening, stopping = os.pipe()
        with Keeper(
            [listening, *(case.fd for case in cases)],
            lambda: talk(ours, lambda: bool(select.select([listening], [], [], 0)[0])),
        ) as keeper:
            pairs = [(keeper.pid, case.fd) for case in cases]
            for case in cases:
                case.ours.close()
            talking = Later(talk, theirs, lambda: False)
            aborts = 0
            for around, how, code, rounds in causes:
                seen = {end: end.got for _unused, end in theirs}
                with around(it):
                    for _round in range(rounds):
                        records = how(it, lambda: Later(it.export_passively, pairs, timeout_s=0.6))
                        found = Counter(verdict(record) for record in records)
                        assert {one[:2] for one in found} == {("aborted", code)}, found
                        aborts += len(records)
                until(lambda seen=seen: all(end.got > seen[end] for _unused, end in theirs))
            os.write(stopping, b"!")
            there = keeper.result()
            here = talking.result()
        os.close(listening)
        os.close(stopping)
        with law():
            assert [(got, sent) for sent, got in here] == there
        assert min(min(pair) for pair in there) > 10_000
    assert aborts >= 1000
    assert ask(it.host("b"), "list", table="imports")[-1]["imports"] == []
    outcomes = [status(it.host(name))["outcomes"] for name in "ab"]
    assert [one["moved"] for one in outcomes] == [1, 1], "only what warmed the stream"
