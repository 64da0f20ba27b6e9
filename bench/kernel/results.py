# SPDX-License-Identifier: MIT
"""What the parts have measured, as figures beside their targets."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.report import Report

PHASES = ("freeze", "dump", "release", "restore")


def tell(report: Report, part: str, told: Any) -> None:
    """Add one part's figures and targets."""
    {"engines": _engines, "goodput": _goodput, "tail": _tail, "nat": _nat}[part](report, told)


def _engines(report: Report, told: dict[str, dict[str, list[list[int]]]]) -> None:
    """``told``: queue, engine -> nanoseconds of each phase of each move."""
    for queue, engines in told.items():
        cost: dict[str, dict[str, float]] = {}
        for engine, moves in engines.items():
            phases = {phase: median(move[i] for move in moves) / 1000 for i, phase in enumerate(PHASES)}
            cost[engine] = {
                "freeze to dump": median(move[0] + move[1] for move in moves) / 1000,
                "dump, owner not stopped": phases["dump"] or phases["freeze"],
                "restore": phases["restore"],
                "whole move": median(sum(move) for move in moves) / 1000,
            }
            for name, value in cost[engine].items():
                report.add("engines", f"{queue} queued, {engine}: {name}, median", value, "us")
        for name, limit in (
            ("freeze to dump", 8.0),
            ("dump, owner not stopped", 0.0),
            ("restore", 0.0),
            ("whole move", 2.0),
        ):
            ratio = cost["repair"][name] / cost["kernel"][name]
            report.add("engines", f"{queue} queued, repair / kernel: {name}", ratio, "x")
            if limit:
                report.aim(
                    "engines", f"{queue} queued, repair / kernel: {name}", ratio, limit, "x", at_least=True
                )


def _goodput(report: Report, told: dict[str, dict[str, list[float]]]) -> None:
    """``told``: engine -> shares of the goodput before, in the first second after each move; ms of both."""
    for engine, rows in told.items():
        share = 100 * median(rows["shares"])
        report.add("goodput", f"the move itself, {engine}, median", median(rows["moves"]), "ms")
        report.add("goodput", f"the RTT before, {engine}, median", median(rows["rtts"]), "ms")
        report.add("goodput", f"first second after a move at 50 ms RTT, {engine}", share, "% of before")
    report.aim(
        "goodput",
        "first second after a move, kernel",
        100 * median(told["kernel"]["shares"]),
        95,
        "%",
        at_least=True,
    )


def _tail(report: Report, told: dict[str, list[float]]) -> None:
    """``told``: unmoved, kernel, repair -> seconds until a lost tail has arrived."""
    still = median(told["unmoved"])
    for name, times in told.items():
        report.add("tail", f"a lost tail arrives after, {name}, median", 1000 * median(times), "ms")
    for engine in ("kernel", "repair"):
        ratio = median(told[engine]) / still
        report.add("tail", f"moved by {engine} / unmoved", ratio, "x")
        if engine == "kernel":
            report.aim("tail", "a lost tail after a move / unmoved", ratio, 1.2, "x")


def _nat(report: Report, told: dict[str, dict[str, list[float]]]) -> None:
    """``told``: helper or nftables -> entries -> packets per second of each round."""
    rates = {way: {count: median(each) for count, each in rounds.items()} for way, rounds in told.items()}
    for way, counts in rates.items():
        for count, rate in counts.items():
            report.add("nat", f"{way}, {count} entries", rate, "packets/s")
    few, many = sorted(rates["NAT helper"], key=int)
    share = 100 * rates["NAT helper"][many] / rates["NAT helper"][few]
    report.add("nat", f"NAT helper with {many} entries", share, f"% of with {few}")
    report.aim("nat", f"NAT helper, {many} entries beside {few}", share, 95, "%", at_least=True)
    for count in (few, many):
        ratio = rates["NAT helper"][count] / rates["nftables map"][count]
        report.add("nat", f"NAT helper / nftables map, {count} entries", ratio, "x")
