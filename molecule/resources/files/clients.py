# SPDX-License-Identifier: MIT
"""The clients of a scenario: ``start COUNT ADDRESS PORT``, ``advance SECONDS``, ``stop``; prints JSON.

Each is a process with one connection, both directions at once, every byte checked (lab.traffic). ``advance``
waits until each has sent and received more, and fails with the names of those that have not. ``stop`` ends
them in an orderly way and fails if any saw anything but the bytes that were due.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("/run/clients")
PACE = 2_000  # bytes a second, each way: an emulated machine has other things to do
MORE = 2 * PACE  # bytes
SILENCE = "120"  # seconds: an emulated machine on a busy one


def start(count: int, address: str, port: str) -> dict[str, object]:
    """Start them; back when each has its connection."""
    for name in names():  # of a scenario that did not come to its end
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((FOLDER / f"{name}.pid").read_text()), signal.SIGKILL)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for number in range(1, count + 1):
        name = f"client{number}"
        words = [sys.executable, "-m", "lab.traffic", "duplex", address, port, "--name", name]
        words += ["--seed", str(number), "--pace", str(PACE), "--silence-s", SILENCE]
        words += ["--timeline", str(FOLDER / f"{name}.timeline")]
        with (FOLDER / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        (FOLDER / f"{name}.pid").write_text(str(process.pid))
    return advance(180)


def names() -> list[str]:
    """Of all clients that were started."""
    return sorted(path.stem for path in FOLDER.glob("*.pid"))


def seen(name: str) -> dict[str, object]:
    """What a client has written down: its endpoint, bytes each way, how it ended."""
    told: dict[str, object] = {"sent": 0, "received": 0}
    with contextlib.suppress(FileNotFoundError):
        for line in (FOLDER / f"{name}.timeline").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may not be whole
                told |= json.loads(line)
    return {key: told[key] for key in ("local", "sent", "received", "ok", "error") if key in told}


def grown(before: dict[str, object], now: dict[str, object]) -> int:
    """By how many bytes, in the direction that has grown less."""
    return min(int(str(now[way])) - int(str(before[way])) for way in ("sent", "received"))


def advance(seconds: float) -> dict[str, object]:
    """Wait until each has sent and received more than it had."""
    before = {name: seen(name) for name in names()}
    deadline = time.monotonic() + seconds
    while True:
        now = {name: seen(name) for name in before}
        late = [name for name in before if grown(before[name], now[name]) < MORE]
        ended = [name for name in late if "error" in now[name]]
        if not late:
            return now
        if ended or time.monotonic() > deadline:
            print(json.dumps({name: now[name] for name in late}), file=sys.stderr)
            why = "ended" if ended else f"no progress in {seconds:.0f} s"
            sys.exit(f"{why}: {', '.join(ended or late)}")
        time.sleep(0.2)


def stop() -> dict[str, object]:
    """End them and say how it went."""
    running = {name: int((FOLDER / f"{name}.pid").read_text()) for name in names()}
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 90
    results = {}
    for name, process in running.items():
        while Path(f"/proc/{process}/stat").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.1)
        said = (FOLDER / f"{name}.out").read_text().strip().splitlines()
        try:
            results[name] = json.loads(said[-1])
        except (IndexError, ValueError):
            results[name] = {"error": f"did not end: {said}"}
        (FOLDER / f"{name}.pid").unlink()
    bad = {name: result["error"] for name, result in results.items() if result["error"]}
    if bad or not results:
        print(json.dumps(results), file=sys.stderr)
        sys.exit(f"not byte-exact: {bad}" if bad else "there are no clients")
    return results


def main() -> None:
    """The command."""
    match sys.argv[1:]:
        case ["start", count, address, port]:
            print(json.dumps(start(int(count), address, port)))
        case ["advance", seconds]:
            print(json.dumps(advance(float(seconds))))
        case ["stop"]:
            print(json.dumps(stop()))
        case _:
            sys.exit(__doc__)


main()
