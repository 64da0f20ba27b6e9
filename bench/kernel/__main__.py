# SPDX-License-Identifier: MIT
"""``python -m bench.kernel``: boot a guest, measure in it, print a table, write JSON.

All figures are ratios within one run of one guest: emulated processors have no other meaning. A target that
is missed is no failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from bench.kernel.results import tell
from bench.report import Report
from guests.guest import Guest, Plan
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT

LIBRARY = PROJECT / "daemon/libsockmi"
BUILT = PROJECT / ".build/bench/engines"
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror")
LIMIT_S = 1800
PARTS = ("engines", "goodput", "tail", "nat")


def build() -> None:
    """The program that compares the engines, for a guest of this machine's suite."""
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    words = [
        "gcc", *FLAGS, f"-I{LIBRARY / 'engine'}", f"-I{PROJECT / 'kmod'}", "-o", BUILT,
        PROJECT / "bench/kernel/engines.c", f"-L{LIBRARY / 'build'}", "-lsockmi-engine",
        f"-Wl,-rpath,{LIBRARY / 'build'}",
    ]  # fmt: skip
    subprocess.run(list(map(str, words)), check=True, timeout=60)


def main() -> int:
    """0 if everything could be measured, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kernel", choices=DEBIAN_KERNELS, default="6.1")
    parser.add_argument("--json", type=Path, metavar="FILE", default=PROJECT / ".build/bench/kernel.json")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} [all]")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    build()
    kernel = DEBIAN_KERNELS[options.kernel]
    report, failed = Report(), False
    started = time.monotonic()
    with Guest(Plan(kernel, memory=1024, processors=2)).wait() as guest:
        guest.load(kernel.module())
        guest.put("/run/engines", BUILT.read_bytes(), 0o755)
        for part in options.parts or PARTS:
            print(f"\n{part}", flush=True)
            words = [
                f"{PROJECT}/.venv/bin/python",
                "-m",
                "bench.kernel.inside",
                part,
                str(int(options.quick)),
            ]
            done = guest.run(words, cwd=PROJECT, limit=LIMIT_S, check=False)
            if done.code:
                report.problem(f"{part} ended early: {done.stderr.strip()[-1500:]}")
                failed = True
                continue
            tell(report, part, json.loads(done.stdout.splitlines()[-1]))
    report.print_targets()
    print(f"\nDebian's {kernel.release}, {time.monotonic() - started:.0f} s")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report.write(options.json, quick=options.quick)
    print(f"figures: {options.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
