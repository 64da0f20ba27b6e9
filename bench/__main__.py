# SPDX-License-Identifier: MIT
"""``python -m bench``: measure, print a table, write JSON. A target that is missed is no failure."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from bench import blackout, bulk, footprint, through
from bench.report import Report
from bench.site import Site, site

PARTS: dict[str, tuple[str, Callable[..., None]]] = {
    "a": ("blackout of one connection", blackout.run),
    "b": ("many connections", bulk.run),
    "c": ("traffic through a redirect", through.run),
    "d": ("the daemon at rest", footprint.run),
}


def main() -> int:
    """0 if everything could be measured, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and sizes: below a minute")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="; ".join(f"{k}: {v[0]}" for k, v in PARTS.items())
    )
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    report, failed = Report(), False
    started = time.monotonic()
    with site() as where:
        for part in options.parts or PARTS:
            failed |= not _measure(part, where, report, quick=options.quick)
    report.print_targets()
    print(f"\n{time.monotonic() - started:.0f} s")
    path = options.json or Path(".build/bench/bench.json")
    report.write(path, quick=options.quick)
    print(f"figures: {path}")
    return 1 if failed else 0


def _measure(part: str, where: Site, report: Report, *, quick: bool) -> bool:
    title, run = PARTS[part]
    print(f"\n({part}) {title}", flush=True)
    try:
        run(where, report, quick=quick)
    except Exception as error:  # the other parts still can be measured
        traceback.print_exc()  # a daemon's log may be the note of the error
        report.problem(f"({part}) ended early: {str(error).splitlines()[0]}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
