# SPDX-License-Identifier: MIT
"""(d) What the daemon costs while it does nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench import bulk
from bench.report import Report, percentile
from bench.site import ECHO_PORT, SINK_PORT, Site, ask, until
from lab.daemons import Daemon
from sockmi.redirect.routes_worker import IDLE_S

STARTS = 5


def run(site: Site, report: Report, *, quick: bool) -> None:
    """Start, memory at rest, memory with many redirects."""
    redirects = 1000 if quick else 10_000
    with site.daemons() as daemons:
        starts = [_start_s(daemons["b"]) for _turn in range(3 if quick else STARTS)]
        bare = [_python_s(site) for _turn in range(3 if quick else STARTS)]
        report.add("d", "start, exec to an answer on the control socket", percentile(starts, 50), "s")
        ratio = percentile(starts, 50) / percentile(bare, 50)
        report.add("d", "start, beside that of the bare interpreter", ratio, "x")
        site.acquainted()
        _rested(daemons["a"])
        rest = _memory_mb(daemons["a"])
        for name, value in rest.items():
            report.add("d", f"memory at rest, {name}", value, "MB")
        with site.programs() as start:
            start(site.a, "server", "-l", "-p", ECHO_PORT, SINK_PORT)
            start(site.b, "server", "-t4", "-n32", ECHO_PORT, SINK_PORT)
            site.wait_for_importers(site.b, count=4 * 32)
            peer = start(site.peer, "peer", "many", site.a.address(4), ECHO_PORT, redirects, 8)
            bulk.drain(site, ECHO_PORT)
            peer.lines(redirects)
            [status] = ask(site.a, "status")
            time.sleep(2)  # the journal is folded once a second
            for host in (site.a, site.b):
                _rested(daemons[host.name])
            full = {host.name: _memory_mb(daemons[host.name]) for host in (site.a, site.b)}
        for host, memory in full.items():
            for name, value in memory.items():
                what = status["redirects_out"] if host == "a" else redirects
                report.add("d", f"memory of {host} with {what:,} redirects, {name}", value, "MB")
    report.aim("d", "start", percentile(starts, 50), 1.0, "s")
    report.aim("d", "memory at rest, RSS", rest["RSS"], 60.0, "MB")
    report.aim("d", f"memory with {redirects:,} redirects, RSS", full["a"]["RSS"], 60.0, "MB")


def _start_s(daemon: Daemon) -> float:
    daemon.stop()
    begun = time.monotonic()
    daemon.start()
    [_unused] = ask(daemon.host, "status")
    return time.monotonic() - begun


def _python_s(site: Site) -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", ""], check=True, env=site.b.environment, timeout=30)
    return time.monotonic() - begun


def _rested(daemon: Daemon) -> None:
    """Wait until it has been idle for so long that the process that asks for routes has ended."""
    until(lambda: not any("routes_worker" in one for one in daemon.children().values()), "rest", IDLE_S + 20)


def _memory_mb(daemon: Daemon) -> dict[str, float]:
    """Resident and proportional set size of all its processes; sockmi-stop lives in the daemon's."""
    sizes = {"Rss": 0, "Pss": 0}
    for pid in (daemon.pid, *daemon.children()):
        if Path(f"/proc/{pid}/comm").read_text() == "sockmi-stop\n":
            continue
        for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = row.split()[:2]
            if name[:-1] in sizes:
                sizes[name[:-1]] += int(value)
    return {"RSS": sizes["Rss"] * 1024 / 1e6, "PSS": sizes["Pss"] * 1024 / 1e6}
