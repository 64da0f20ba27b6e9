# SPDX-License-Identifier: MIT
"""(c) Traffic of a moved connection through its redirect, with none, few and many others installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Any

from bench.bulk import drain
from bench.report import Report, percentile
from bench.site import ECHO_PORT, SINK_PORT, Program, Site
from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Mode, Outbound
from sockmi.redirect.forward import Forward
from sockmi.redirect.nat import Nat
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables

_PER_TRANSACTION = 2000
_PORTS_PER_ADDRESS = 50_000
_WARM_S = 0.1
_CPUS = sorted(os.sched_getaffinity(0))
_UNITS = {"rr": ("requests/s", 1.0), "bulk": ("MB/s", 1e-6)}


def run(site: Site, report: Report, *, quick: bool) -> None:
    """Each mode: the same client programs directly to b, and through a's redirect, in turn."""
    sizes = [1, 1000] if quick else [1, 1000, 100_000]
    rounds, seconds = (3, 0.1) if quick else (12, 0.25)
    for mode in (Mode.FORWARD, Mode.NAT):
        with site.daemons(redirect={"devices": ["eth0"], "modes": [mode.value]}), site.programs() as start:
            start(site.a, "server", "-l", ECHO_PORT, SINK_PORT)
            start(site.b, "server", "-l", "-t1", "-n4", ECHO_PORT, SINK_PORT, cpu=_CPUS[-1])
            site.wait_for_importers(site.b)
            direct = _clients(start, site, site.b.address(4))
            moved = _clients(start, site, site.a.address(4))
            for port in (ECHO_PORT, SINK_PORT):
                site.sockets(site.a, port)
                if any(record["outcome"] != "moved" for record in drain(site, port)):
                    raise RuntimeError(f"{mode}: a connection did not move")
            installed = 1
            for size in sizes:
                site.a.python(_install, site, mode, installed, size)
                installed = max(installed, size)
                for name in _UNITS:
                    pairs = [
                        (_rate(direct, name, seconds), _rate(moved, name, seconds)) for _turn in range(rounds)
                    ]
                    _tell(report, f"{mode}, {size:,} others, {name}", _UNITS[name][0], pairs)


def _clients(start: Any, site: Site, address: str) -> dict[str, Program]:
    return {
        name: start(site.peer, "peer", name, address, port, cpu=_CPUS[0])
        for name, port in (("rr", ECHO_PORT), ("bulk", SINK_PORT))
    }


def _tell(report: Report, label: str, unit: str, pairs: list[tuple[float, float]]) -> None:
    # What else runs on the machine takes away from both of a round.
    direct, moved = (percentile(values, 50) for values in zip(*pairs, strict=True))
    report.add("c", f"{label}, direct, p50", direct, unit)
    report.add("c", f"{label}, redirected, p50", moved, unit)
    ratio = percentile([through / straight for straight, through in pairs], 50)
    report.add("c", f"{label}: redirected / direct", ratio, "x")
    report.aim("c", f"{label}: redirected / direct", ratio, 0.9, "x", at_least=True)


def _rate(clients: dict[str, Program], name: str, seconds: float) -> float:
    """After a start that does not count: windows open again."""
    for duration in (_WARM_S, seconds):
        clients[name].tell(f"{duration}")
        count, elapsed_ns = map(int, clients[name].line().split())
    return count / (elapsed_ns / 1e9) * _UNITS[name][1]


def _install(site: Site, mode: Mode, have: int, want: int) -> None:
    """Redirects of connections that nobody uses, straight into a's tables; runs on a."""
    tables = Tables(Settings(devices=("eth0",)))
    redirect = Forward(tables) if mode is Mode.FORWARD else Nat(tables)
    try:
        for first in range(have, want, _PER_TRANSACTION):
            redirect.send_away(_others(site, range(first, min(want, first + _PER_TRANSACTION))))
    finally:
        tables.close()


def _others(site: Site, numbers: Sequence[int]) -> list[Outbound]:
    local, importer = Endpoint(site.a.address4, 9), Endpoint(site.b.address4, 9)
    first = int(IPv4Address("198.18.0.0"))
    return [
        Outbound(
            FourTuple(
                local, Endpoint(IPv4Address(first + n // _PORTS_PER_ADDRESS), 1024 + n % _PORTS_PER_ADDRESS)
            ),
            importer,
        )
        for n in numbers
    ]
