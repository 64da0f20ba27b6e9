# SPDX-License-Identifier: MIT
"""The first process inside an instance: loads the module, runs the command, looks for leaks, powers off.

Reads ``plan.json`` of the run's folder, writes ``out/result.json``. The kernel may be sick when the command
is done, so every step after it is tried on its own, and says in the result what it could not do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
SETTLE = 6  # seconds: kmemleak does not report what is younger than 5 s


def loaded(module: str) -> bool:
    """Whether ``module`` is in the kernel."""
    return Path("/sys/module", module, "refcnt").exists()


def run(plan: dict[str, Any], console: int) -> int:
    """Run the planned command on ``console``; its exit code as a shell would tell it."""
    child = subprocess.Popen(
        plan["command"], cwd=plan["cwd"], env=plan["env"], stdin=subprocess.DEVNULL, stdout=console,
        stderr=console, start_new_session=True,
    )  # fmt: skip
    while True:
        pid, status = os.wait()  # as the first process we are everyone's last parent
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def end_all() -> None:
    """End every process but this one, and wait for them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            return


def leaks(module: str) -> list[str]:
    """What kmemleak finds that ``module`` allocated: its name in the backtrace, or, once it is unloaded, an
    address there that belongs to nothing."""
    for _turn in range(2):  # what the first scan sees may only have been in a register
        KMEMLEAK.write_text("scan")
    objects = re.split(r"(?=^unreferenced object)", KMEMLEAK.read_text(), flags=re.MULTILINE)
    ours = re.compile(rf"\[{re.escape(module)}\]|^\s*\[<[0-9a-f]+>\] 0x[0-9a-f]+$", re.MULTILINE)
    return [text for text in objects if text.startswith("unreferenced") and ours.search(text)]


def after(plan: dict[str, Any], result: dict[str, Any]) -> None:
    """What is looked at when the command is done."""
    module = plan["module_name"]
    end_all()
    for name in [line.split()[0] for line in subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=False
    ).stdout.splitlines()]:  # fmt: skip
        subprocess.run(["ip", "netns", "del", name], check=False)
    look = plan["leaks"] and KMEMLEAK.exists()
    if look:
        time.sleep(SETTLE)
        result["leaks"] = leaks(module)
    if loaded(module) and plan["unload"]:
        gone = subprocess.run(["rmmod", module], capture_output=True, text=True, timeout=60, check=False)
        if gone.returncode:
            result["not_unloaded"] = gone.stderr.strip()
        elif look:
            told = {text.split("\n", 1)[0] for text in result["leaks"]}
            result["leaks"] += [text for text in leaks(module) if text.split("\n", 1)[0] not in told]


def main() -> None:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    result: dict[str, Any] = {"leaks": []}
    result_file = folder / "out/result.json"
    Path("/proc/sys/kernel/hostname").write_text("uml")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    for name, value in plan["sysctl"].items():
        Path("/proc/sys", name).write_text(value)
    console = os.open("/dev/tty1", os.O_WRONLY | os.O_NOCTTY)
    subprocess.run(["stty", "-opost"], stdin=console, check=False)
    for file in ("/dev/kmsg",):
        Path(file).write_text("sockmi-harness: inside\n")
    KMEMLEAK.exists() and KMEMLEAK.write_text("scan=off")
    try:
        if plan["insmod"]:
            done = subprocess.run(plan["insmod"], capture_output=True, text=True, check=False)
            if done.returncode:
                result["insmod"] = done.stderr.strip() or f"insmod ended with {done.returncode}"
        if "insmod" not in result:
            KMEMLEAK.exists() and plan["leaks"] and KMEMLEAK.write_text("clear")
            result["code"] = run(plan, console)
            result_file.write_text(json.dumps(result))
            after(plan, result)
    finally:
        result["done"] = True
        result_file.write_text(json.dumps(result))
        os.sync()
        Path("/dev/kmsg").write_text("sockmi-harness: done\n")
        Path("/proc/sysrq-trigger").write_text("o")
        time.sleep(60)


main()
