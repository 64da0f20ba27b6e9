# SPDX-License-Identifier: MIT
"""Runs a command inside a User-Mode-Linux instance and judges the run: exit code, kernel log, leaks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guests.child import bound
from guests.console import Report, reports
from guests.errors import HarnessError
from guests.paths import CACHE, LOGS, PROJECT, room
from guests.uml.kernel import UML_6_1_DEBUG, UmlKernel

HERE = Path(__file__).parent
TIMED_OUT = 124
KEPT_LOGS = 40
SEARCH_PATH = f"{PROJECT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The processes of an instance would survive their kernel's sudden death; in a namespace that ends with it
# they do not. The kernel is not its first process: that one cannot end itself by a signal, as a panic does.
TOGETHER = ("unshare", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", '"$@"; exit $?', "sh")


@dataclass
class Inside:
    """A command to run inside, and under what conditions."""

    command: Sequence[str]
    kernel: UmlKernel = UML_6_1_DEBUG
    module: Path | None = PROJECT / "kmod"  # the module's source; None: no module
    words: Sequence[str] = ()  # for make, when it is built
    insmod: bool = True  # load it before the command; $SOCKMI_KO names it in any case
    parameters: Sequence[str] = ()  # of the module
    unload: bool = True  # afterwards; that it cannot be unloaded is an error
    leaks: bool = True  # look for memory that the module lost; costs 6 s
    limit: float = 120  # seconds for everything
    memory: int = 1024  # MiB
    boot: Sequence[str] = ()  # more words for the kernel's command line, such as time-travel=inf-cpu
    sysctl: Mapping[str, str] = field(default_factory=dict)  # net/ipv4/ip_forward: 1
    environment: Mapping[str, str] = field(default_factory=dict)
    allowed: Sequence[str] = ()  # patterns of kernel complaints that are expected
    cwd: Path = field(default_factory=Path.cwd)
    save: Path | None = None  # where to copy all that the command left in $SOCKMI_OUT
    collect: Sequence[str] = ()  # files of $SOCKMI_OUT whose contents the outcome shall have


@dataclass
class Outcome:
    """How it went. ``code`` is the command's, or 124 when the time was up."""

    code: int
    output: bytes
    log: Path  # the kernel's
    seconds: float
    complaints: list[Report]
    leaks: list[str]
    troubles: list[str]  # the module not loaded or not unloaded, the kernel gone, the time up
    files: dict[str, bytes]  # what was collected

    @property
    def good(self) -> bool:
        """Whether the command succeeded and the kernel is as it was."""
        return self.code == 0 and not self.complaints and not self.leaks and not self.troubles

    def tell(self) -> str:
        """What was bad, for a person."""
        parts = [*self.troubles]
        parts += [f"kernel: {report.title}\n{report.text}" for report in self.complaints]
        if self.leaks:
            parts.append(f"the module lost {len(self.leaks)} pieces of memory; the first:\n{self.leaks[0]}")
        if self.code:
            parts.append(f"the command ended with {self.code}")
        return "\n".join([*parts, f"kernel log: {self.log}"])


@contextlib.contextmanager
def _processor() -> Iterator[int]:
    """A CPU for one instance: a free one if there is one.

    An instance that is not pinned makes system calls 5-9 times slower.
    """
    choices = sorted(os.sched_getaffinity(0), reverse=True)
    with contextlib.ExitStack() as stack:
        for cpu in choices:
            held = stack.enter_context((room(CACHE / "locks") / f"cpu-{cpu}").open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield cpu
                return
        yield choices[os.getpid() % len(choices)]


def _log_file(name: str) -> Path:
    folder = room(LOGS / "uml")
    for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%m%d-%H%M%S')}-{os.getpid()}-{name}.log"


def run_inside(inside: Inside, *, stream: bool = False) -> Outcome:
    """Boot, run, judge. With ``stream`` the command's output also goes to standard output as it comes."""
    kernel = inside.kernel.build()
    with tempfile.TemporaryDirectory(prefix="sockmi-uml-") as made, _processor() as cpu:
        run = _Run(inside, Path(made), _log_file(re.sub(r"[^A-Za-z0-9]+", "-", Path(inside.command[0]).name)))
        run.prepare()
        run.boot(kernel / "linux", cpu, stream)
        return run.judge()


class _Run:
    """One instance, from its folder to the judgement on it."""

    def __init__(self, inside: Inside, folder: Path, log: Path) -> None:
        self._inside = inside
        self._folder = folder
        self._log = log
        self._started = time.monotonic()
        self._output = bytearray()
        self._in_time = True
        self._ended = 0

    def prepare(self) -> None:
        """Fill the folder: the module, what runs first inside, and its plan."""
        inside, folder = self._inside, self._folder
        room(folder / "out")
        for name in ("init", "inside.py"):
            shutil.copy(HERE / name, folder / name)
        environment = {
            "PATH": SEARCH_PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SOCKMI_INSIDE": inside.kernel.name, "SOCKMI_OUT": str(folder / "out"),
        }  # fmt: skip
        plan = {
            "command": list(inside.command),
            "cwd": str(inside.cwd),
            "env": environment | dict(inside.environment),
            "insmod": None,
            "module_name": "sockmi",
            "unload": inside.unload,
            "leaks": inside.leaks and inside.module is not None,
            "sysctl": dict(inside.sysctl),
        }
        if inside.module is not None:
            ko = inside.kernel.module(inside.module, folder, words=inside.words)
            environment["SOCKMI_KO"] = str(ko)
            plan["env"] = environment | dict(inside.environment)
            plan["module_name"] = ko.stem.replace("-", "_")
            plan["insmod"] = ["insmod", str(ko), *inside.parameters] if inside.insmod else None
        (folder / "plan.json").write_text(json.dumps(plan))

    def boot(self, program: Path, cpu: int, stream: bool) -> None:
        """Run the instance to its end, or to the end of its time."""
        inside, folder = self._inside, self._folder
        self._started = time.monotonic()
        out_read, out_write = os.pipe()
        with self._log.open("wb") as kernel_log:
            words = [
                *bound(cpu), *TOGETHER, str(program),
                f"uml_dir={folder}/", "umid=uml", f"mem={inside.memory}M",
                "con=null", f"con0=null,fd:{kernel_log.fileno()}", f"con1=null,fd:{out_write}",
                "rootfstype=hostfs", "rootflags=/", "ro", f"init={folder}/init", f"SOCKMI_RUN={folder}",
                "loglevel=8", "printk.time=1", "panic=-1", "oops=panic", "kmemleak=on", *inside.boot,
            ]  # fmt: skip
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=kernel_log, stderr=kernel_log,
                pass_fds=(kernel_log.fileno(), out_write), start_new_session=True, cwd="/",
                env={"TMPDIR": "/dev/shm", "PATH": SEARCH_PATH, "HOME": "/root"},  # noqa: S108
            )  # fmt: skip
        os.close(out_write)
        try:
            self._collect(process, out_read, stream)
        finally:
            os.close(out_read)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._ended = process.wait()

    def _collect(self, process: subprocess.Popen[bytes], pipe: int, stream: bool) -> None:
        os.set_blocking(pipe, False)
        while True:
            ended = process.poll() is not None
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(pipe, 65536):
                    self._output += chunk
                    if stream:
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.flush()
            self._in_time = time.monotonic() < self._started + self._inside.limit
            if ended or not self._in_time:
                return
            time.sleep(0.02)

    def judge(self) -> Outcome:
        """What came of it."""
        inside, out = self._inside, self._folder / "out"
        troubles = []
        result: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            result = json.loads((out / "result.json").read_text())
        text = self._log.read_text(errors="replace")
        done = bool(result.get("done"))
        if not done and not self._in_time:
            troubles.append(f"not done after {inside.limit:.0f} s")
        elif not done:
            troubles.append(
                f"the kernel went away before the run was done (its program ended with {self._ended})"
            )
            if "sockmi-harness: inside" not in text:
                tail = "\n".join(text.splitlines()[-25:])
                raise HarnessError(f"the instance never got to its init; the end of {self._log}:\n{tail}")
        if "insmod" in result:
            troubles.append(f"the module was not loaded: {result['insmod']}")
        if "not_unloaded" in result:
            troubles.append(f"the module could not be unloaded afterwards: {result['not_unloaded']}")
        if inside.save is not None:
            shutil.copytree(out, inside.save, dirs_exist_ok=True)
        return Outcome(
            code=result.get("code", 1 if self._in_time else TIMED_OUT),
            output=bytes(self._output),
            log=self._log,
            seconds=time.monotonic() - self._started,
            complaints=reports(text, inside.allowed),
            leaks=result.get("leaks", []),
            troubles=troubles,
            files={name: (out / name).read_bytes() for name in inside.collect if (out / name).exists()},
        )
