# SPDX-License-Identifier: MIT
"""(b) Many connections: moved and verified per second, beside a bare program; how long each was frozen.

The application at the exporter does not read: what the peer has sent stays queued, moves with the
connection, and is echoed by the application at the importer. So the echo of all bytes shows that it has
moved whole. "Empty" ones have eight bytes queued for that.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bench.report import Report, percentile
from bench.site import BARE_PORT, CONTROL_TIMEOUT_S, ECHO_PORT, SINK_PORT, Site, ask
from lab.daemons import Daemons
from sockmi.client import Control
from sockmi.config import Config

EMPTY_BYTES = 8
FULL_BYTES = 65536
THREADS = 4
_TICKS = os.sysconf("SC_CLK_TCK")


def run(site: Site, report: Report, *, quick: bool) -> None:
    """Sizes, empty and full; then chunk sizes and pipeline depths at 1,000."""
    sizes = [1, 100, 1000] if quick else [1, 100, 1000, 10_000]
    rates: dict[tuple[int, int], float] = {}
    for content in (EMPTY_BYTES, FULL_BYTES):
        for count in sizes:
            repeat = 1 if quick or count > 1000 else 3
            label = f"{count:,} connections, {'empty' if content == EMPTY_BYTES else '64 KiB queued'}"
            results = [measure(site, count, content) for _turn in range(repeat)]
            best = max(results, key=lambda one: one["rate_per_s"])
            rates[count, content] = best["rate_per_s"]
            _tell(report, label, best)
            bare = max(measure_bare(site, count, content) for _turn in range(repeat))
            report.add("b", f"{label}: bare program, moved and verified", bare, "1/s")
            report.add("b", f"{label}: cost, daemons / bare", bare / rates[count, content], "x")
    for chunk, depth in [(64, 2)] if quick else [(16, 1), (32, 2), (64, 1), (64, 2), (126, 1)]:
        result = measure(site, 1000, EMPTY_BYTES, chunk_size=chunk, pipeline_depth=depth)
        _tell(report, f"1,000, empty, chunk_size {chunk}, pipeline_depth {depth}", result)
    for count in sizes:
        if count >= 1000:
            report.aim(
                "b", f"{count:,} empty connections", rates[count, EMPTY_BYTES], 15_000, "1/s", at_least=True
            )
    costs = [1 / rates[count, EMPTY_BYTES] for count in sizes if count >= 100]
    report.aim(
        "b", f"cost per connection, 100 to {sizes[-1]:,}: worst / best", max(costs) / min(costs), 1.3, "x"
    )


def _tell(report: Report, label: str, result: dict[str, Any]) -> None:
    report.add("b", f"{label}: moved and verified", result["rate_per_s"], "1/s")
    report.add("b", f"{label}: freeze, p50", percentile(result["freezes_ms"], 50), "ms")
    report.add("b", f"{label}: freeze, p99", percentile(result["freezes_ms"], 99), "ms")
    cpu = result["cpu_us"]
    report.add("b", f"{label}: processor, a + b", sum(cpu), "us each", f"{cpu[0]:.0f} + {cpu[1]:.0f}")


def measure(site: Site, count: int, content: int, **settings: Any) -> dict[str, Any]:
    """One drain of ``count`` connections with ``content`` bytes queued, on fresh daemons."""
    with site.daemons(**settings) as daemons, site.programs() as start:
        batch = min(253, settings.get("chunk_size", 32))
        start(site.a, "server", "-l", "-p", ECHO_PORT, SINK_PORT)
        start(site.b, "server", f"-t{THREADS}", f"-n{batch}", ECHO_PORT, SINK_PORT)
        site.wait_for_importers(site.b, count=THREADS * batch)
        peer = start(site.peer, "peer", "many", site.a.address(4), ECHO_PORT, count, content)
        site.sockets(site.a, ECHO_PORT, count)  # the kernel acknowledges before the application accepts
        before = cpu_s(daemons)
        begun = time.monotonic_ns()
        records = drain(site, ECHO_PORT)
        stuck = [record for record in records if record["outcome"] != "moved"]
        if stuck or len(records) != count:
            why = stuck[0]["refusal"] if stuck else "they were not found"
            raise RuntimeError(f"{len(records) - len(stuck)} of {count} connections moved: {why}")
        try:
            done = [int(line) for line in peer.lines(count)]
        except TimeoutError as error:
            [status] = ask(site.b, "status")
            lists, at_b = status["import_lists"]["connected"], len(site.sockets(site.b, ECHO_PORT))
            raise TimeoutError(
                f"not all of {count} connections are echoed, though all moved: {at_b} with b's application, "
                f"{lists['length']} listed there, {lists['waiting']} imports waiting"
            ) from error
        after = cpu_s(daemons)
        return {
            "rate_per_s": count / ((max(done) - begun) / 1e9),
            "freezes_ms": [record["blackout_us"] / 1e3 for record in records],
            "cpu_us": [(after[name] - before[name]) / count * 1e6 for name in "ab"],
        }


def measure_bare(site: Site, count: int, content: int) -> float:
    """Connections per second by the system calls alone, in chunks of the daemons' size."""
    with site.daemons(), site.programs() as start:  # the daemons have made the tables, and rest
        mover = start(None, "bare_bulk", *site.bare_words(count, Config.model_fields["chunk_size"].default))
        peer = start(site.peer, "peer", "many", site.a.address(4), BARE_PORT, count, content)
        mover.tell("")
        begun = int(mover.line())
        return count / ((max(map(int, peer.lines(count))) - begun) / 1e9)


def drain(site: Site, port: int) -> list[dict[str, Any]]:
    """Move all connections of a port from a to b; their records."""
    wanted = {"local_port": port, "kinds": ["connected"]}
    with Control(site.a.control_socket, timeout_s=CONTROL_TIMEOUT_S) as control:
        answers = control.call("drain", filter=wanted, to="b")
        return [record for answer in answers for record in answer["migrations"]]


def cpu_s(daemons: Daemons) -> dict[str, float]:
    """Processor time that each daemon has used: less than the clock it feels what else the machine does."""
    found = {}
    for name in "ab":
        fields = Path(f"/proc/{daemons[name].pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / _TICKS
    return found
