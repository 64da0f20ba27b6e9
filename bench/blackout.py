# SPDX-License-Identifier: MIT
"""(a) What the client of one connection feels of a move, beside the bare system calls."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Sequence

from bench.report import Report, percentile
from bench.site import BARE_PORT, ECHO_PORT, SINK_PORT, Program, Site, ask

INTERVAL_US = 200
PAUSE_S = 0.06
_FLOOR_MAX = 0.75


def run(site: Site, report: Report, *, quick: bool) -> None:
    """Rounds of daemon and bare program in turn, so that both see the same noise."""
    rounds, moves = (2, 10) if quick else (4, 40)
    ours: list[float] = []
    bare: list[float] = []
    still: list[float] = []
    asked: list[float] = []
    told: list[float] = []
    with site.daemons():
        for _turn in range(rounds):
            bare += _bare(site, moves, told)
            ours += _daemons(site, moves, still, asked)
    for name, values in (
        ("no move: longest pause between two echoes", still),
        ("bare program: blackout at the client", bare),
        ("daemons: blackout at the client", ours),
        ("bare program: the move itself", told),
        ("daemons: the move, request to answer", asked),
    ):
        report.add("a", f"{name}, p50", percentile(values, 50), "ms", f"{len(values)} times")
        report.add("a", f"{name}, p99", percentile(values, 99), "ms")
    for percent in (50, 99):
        ratio = percentile(ours, percent) / percentile(bare, percent)
        report.add("a", f"blackout, daemons / bare, p{percent}", ratio, "x")
    ratio = percentile(ours, 50) / percentile(bare, 50)
    floor = percentile(still, 50) / percentile(bare, 50)
    if floor > _FLOOR_MAX:
        # Both would then be measured by what else the machine does, and the ratio flatters.
        report.problem(
            f"(a) without a move the client waits {floor:.2g} times as long as for a bare one: the machine "
            "is too busy to compare them; run it again when nothing else runs"
        )
        ratio = math.nan
    report.aim("a", "blackout of one connection, p50", percentile(ours, 50), 2.0, "ms")
    report.aim("a", "blackout, daemons / bare, p50", ratio, 3.0, "x")


def _bare(site: Site, moves: int, told: list[float]) -> list[float]:
    with site.programs() as start:
        mover = start(None, "bare", *site.bare_words(moves, round(PAUSE_S * 1e6)))
        client = start(site.peer, "peer", "flow", site.a.address(4), BARE_PORT, INTERVAL_US)
        windows = [tuple(map(int, line.split())) for line in mover.lines(moves)]
        told += [(end - begin) / 1e6 for begin, end in windows]
        return _gaps(client, [begin for begin, _unused in windows])


def _daemons(site: Site, moves: int, still: list[float], asked: list[float]) -> list[float]:
    hosts = [site.a, site.b]
    begins: list[int] = []
    idle: list[int] = []
    with site.programs() as start:
        start(site.a, "server", "-l", "-t1", "-n1", ECHO_PORT, SINK_PORT)
        start(site.b, "server", "-t1", "-n1", ECHO_PORT, SINK_PORT)
        site.wait_for_importers(*hosts)
        client = start(site.peer, "peer", "flow", site.a.address(4), ECHO_PORT, INTERVAL_US)
        for index in range(moves):
            source, target = hosts[index & 1], hosts[~index & 1]
            site.wait_for_importers(target)
            [row] = site.sockets(source, ECHO_PORT)
            time.sleep(PAUSE_S)
            idle.append(time.monotonic_ns())
            time.sleep(PAUSE_S)
            begins.append(time.monotonic_ns())
            [answer] = ask(source, "export", sockets=[{"pid": row["pid"], "fd": row["fd"]}], to=target.name)
            asked.append((time.monotonic_ns() - begins[-1]) / 1e6)
            [record] = answer["migrations"]
            if record["outcome"] != "moved":
                raise RuntimeError(f"a connection did not move: {record['refusal']}")
            time.sleep(PAUSE_S)
        echoes = _echoes(client)
        still += _longest(echoes, idle)
        return _longest(echoes, begins)


def _echoes(client: Program) -> list[int]:
    return [int(line) for line in client.finish().split()]


def _gaps(client: Program, begins: Sequence[int]) -> list[float]:
    time.sleep(PAUSE_S)
    return _longest(_echoes(client), begins)


def _longest(echoes: Sequence[int], begins: Sequence[int]) -> list[float]:
    """For each begin: the longest time (ms) without an echo until ``PAUSE_S`` later."""
    found = []
    for begin in begins:
        first = max(0, bisect_left(echoes, begin) - 1)
        last = bisect_left(echoes, begin + round(PAUSE_S * 1e9))
        gaps = [echoes[i + 1] - echoes[i] for i in range(first, min(last, len(echoes) - 1))]
        # A client that hears nothing more at all: the whole time.
        found.append(max(gaps, default=round(PAUSE_S * 1e9)) / 1e6)
    return found
