# SPDX-License-Identifier: MIT
"""Tests that run inside other kernels, told about as if they had run here.

``tests/kmod/inside`` has ordinary tests that need the module. Each is collected once per kernel (``--kernel
NAME``, or the defaults); those of one kernel (and, in UML, of one file) share an instance, a plugin there
writes their reports to a file, and here they are repeated one by one. A kernel's complaint fails the test
that ran when it came; a kernel that died fails that test, and the rest of the file goes on in a fresh one.

Markers: ``kernels("uml-*", "6.1")`` (patterns) limits a test to some kernels, ``complains("pattern")`` says
which complaint of the kernel a test provokes, ``no_module`` on a file's ``pytestmark`` means that the tests
load the module themselves from $SOCKMI_KO, ``alone`` that the file wants a guest of its own,
``processors(2)`` that a test is about what several processors do at the same time: those share a guest that
has so many, and whose kernel may be preempted anywhere. (User-Mode Linux has one processor.)
``releases("older")`` names modules of other releases (guests/releases.py) that a file wants: the path of each
is in $SOCKMI_KO_ and its name in capitals.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from guests import releases
from guests.console import reports
from guests.errors import HarnessError
from guests.guest import Guest, Plan
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from guests.uml.kernel import UML_6_1, UML_6_1_DEBUG
from guests.uml.run import Inside, run_inside
from guests.wire import GuestGoneError

FOLDER = PROJECT / "tests/kmod/inside"
PLANTED = PROJECT / "tests/kmod/planted"
"""The harness's own cases, collected when they are named; their module is the throw-away one."""
UML_KERNELS = {kernel.name: kernel for kernel in (UML_6_1_DEBUG, UML_6_1)}
KERNELS = [*UML_KERNELS, *DEBIAN_KERNELS]
DEFAULT = ["6.1"]
HERE = os.environ.get("SOCKMI_INSIDE", "")
"""The kernel's name when this runs inside one."""
MARK = "sockmi-test:"
PER_TEST = 60  # seconds, on top of START, that a batch may take for each of its tests
START = 240
HANDED = ("SOCKMI_FUZZ_", "SOCKMI_CYCLES")
"""Beginnings of the environment variables that tests inside see as well."""
PREEMPTIBLE = "preempt=full"
"""For the command line of Debian's kernels, which otherwise change tasks only where they ask for it."""
OWN_INSTANCE = ("no_module", "parameters", "alone")
"""Markers by which the tests of a file do not share a guest with those of others."""


def add_options(parser: pytest.Parser) -> None:
    """The command-line options."""
    parser.addoption(
        "--kernel", action="append", default=[], metavar="NAME",
        help=f"kernels for the tests of the module, of {', '.join(KERNELS)} or 'all' [{', '.join(DEFAULT)}]",
    )  # fmt: skip


def chosen(config: pytest.Config) -> list[str]:
    """The kernels asked for."""
    if HERE:
        return [HERE]
    asked = config.getoption("--kernel") or DEFAULT
    names = KERNELS if "all" in asked else asked
    if unknown := set(names) - set(KERNELS):
        raise pytest.UsageError(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    return list(names)


def is_inside(path: Path) -> bool:
    """Whether the tests of a file run inside."""
    return FOLDER in path.parents or PLANTED in path.parents


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Collect an inside test once for each kernel that it is meant for."""
    names = chosen(metafunc.config)
    for mark in metafunc.definition.iter_markers("kernels"):
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in mark.args)]
    metafunc.parametrize("kernel", names, indirect=True, scope="session")


class Repeater:
    """On this machine: runs batches inside, repeats their reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._reports: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Batches of one kernel and file stay together, in the order of the files."""
        items.sort(key=lambda item: str(_batch(item)) if is_inside(item.path) else "")
        for item in items:
            if is_inside(item.path):  # its time is kept inside; here the first of a batch waits for all
                item.add_marker(pytest.mark.timeout(0), append=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Repeat the reports of an inside test; the first of its batch runs them all."""
        if not is_inside(item.path) or _batch(item)[0] not in KERNELS:
            return None  # the latter is for none of the kernels, and is skipped
        if item.nodeid not in self._reports:
            self._run([other for other in item.session.items if _batch(other) == _batch(item)])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports.pop(item.nodeid):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, items: Sequence[pytest.Item]) -> None:
        left = list(items)
        while left:
            batch = Batch(left, self._config)
            try:
                batch.run()
            except HarnessError as error:
                batch.trouble(f"the harness failed: {error}")
            done = batch.done()
            self._reports |= done
            left = [item for item in left if item.nodeid not in done]


def _batch(item: pytest.Item) -> tuple[str, Path, int]:
    """What shares an instance.

    UML boots in a second, and looks for lost memory when a file is done; a guest takes half a minute until
    its first test, so it runs them all, but for files that load the module otherwise, and tests that want
    more processors.
    """
    callspec = getattr(item, "callspec", None)
    kernel = str(callspec.params.get("kernel", "")) if callspec else ""
    own = kernel in UML_KERNELS or any(item.get_closest_marker(name) for name in OWN_INSTANCE)
    processors = 1 if kernel in UML_KERNELS else max([1, *_processors(item)])
    return (kernel, item.path if own else FOLDER, processors)


class Batch:
    """Tests of one file that run in one instance of one kernel."""

    def __init__(self, items: Sequence[pytest.Item], config: pytest.Config) -> None:
        self._kernel, _unused, self._processors = _batch(items[0])
        self._items = {item.nodeid: item for item in items}
        self._config = config
        self._told: list[pytest.TestReport] = []
        self._log = ""
        self._troubles: list[str] = []
        self._started = time.monotonic()
        self._source = PLANTED if any(PLANTED in item.path.parents for item in items) else PROJECT / "kmod"
        self._load = not any(item.get_closest_marker("no_module") for item in items)
        self._releases = dict.fromkeys(name for item in items for name in _releases(item))

    @property
    def limit_s(self) -> float:
        """For all of them; a test with a time limit of its own may take it."""
        return START + sum(
            # Behind the marker of ours is the test's own, if it has one.
            max([PER_TEST, *(mark.args[0] for mark in item.iter_markers("timeout"))])
            for item in self._items.values()
        )

    def _command(self) -> list[str]:
        names = [re.sub(r"^.*?(?=tests/)", "", nodeid) for nodeid in self._items]
        words = [f"{PROJECT}/.venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
        return [*words, f"--rootdir={PROJECT}", "--override-ini=addopts=--import-mode=importlib", *names]

    def run(self) -> None:
        """Run them, and note what came of it."""
        if self._kernel in UML_KERNELS:
            self._run_uml()
        else:
            self._run_guest()

    def _run_uml(self) -> None:
        parameters = [word for item in self._items.values() for word in _parameters(item)]
        kernel = UML_KERNELS[self._kernel]
        others = {_named(name): str(releases.module(name, kernel)) for name in self._releases}
        outcome = run_inside(
            Inside(
                self._command(), kernel=kernel, module=self._source, insmod=self._load,
                limit=self.limit_s, cwd=PROJECT,
                allowed=self._allowed(), collect=("reports",), parameters=list(dict.fromkeys(parameters)),
                environment=_handed() | others,
            )
        )  # fmt: skip
        self._take(outcome.files.get("reports", b""), outcome.log.read_text(errors="replace"))
        if outcome.leaks:
            first = outcome.leaks[0]
            self._troubles.append(
                f"the module lost {len(outcome.leaks)} pieces of memory; the first:\n{first}"
            )
        self._troubles += outcome.troubles
        if outcome.code not in (0, 1) and not outcome.troubles:
            self._troubles.append(
                f"pytest ended with {outcome.code}:\n{outcome.output[-3000:].decode(errors='replace')}"
            )

    def _run_guest(self) -> None:
        debian = DEBIAN_KERNELS[self._kernel]
        module = debian.module(self._source)
        others = {name: releases.module(name, debian) for name in self._releases}
        several = self._processors > 1
        boot = ["ignore_loglevel", *([PREEMPTIBLE] if several else [])]
        plan = Plan(debian, memory=1024, processors=self._processors, boot=boot)
        with Guest(plan).wait() as guest:
            guest.put(f"/run/{module.name}", module.read_bytes())
            if self._load:
                parameters = [word for item in self._items.values() for word in _parameters(item)]
                guest.run(["insmod", f"/run/{module.name}", *dict.fromkeys(parameters)])
            where = {
                "SOCKMI_INSIDE": self._kernel, "SOCKMI_OUT": "/run/out", "SOCKMI_KO": f"/run/{module.name}",
                "PATH": f"{PROJECT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            }  # fmt: skip
            for name, other in others.items():
                where[_named(name)] = f"/run/{name}/{other.name}"
                guest.put(where[_named(name)], other.read_bytes())
            where |= _handed()
            guest.run(["mkdir", "-p", "/run/out"])
            told = b""
            try:
                done = guest.run(self._command(), cwd=PROJECT, env=where, check=False, limit=self.limit_s)
                if done.code not in (0, 1):
                    self._troubles.append(
                        f"pytest ended with {done.code}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
                    )
                told = guest.get("/run/out/reports")
                loaded = guest.run(
                    ["sh", "-c", f"test ! -e /sys/module/{module.stem} || rmmod {module.stem}"], check=False
                )
                if loaded.code:
                    self._troubles.append(
                        f"the module could not be unloaded afterwards: {loaded.stderr.strip()}"
                    )
            except (GuestGoneError, TimeoutError) as gone:
                self._troubles.append(str(gone))
            self._take(told, guest.log())

    def _allowed(self) -> list[str]:
        return [pattern for item in self._items.values() for pattern in _complains(item)]

    def trouble(self, text: str) -> None:
        """Something went wrong that is no test's result."""
        self._troubles.append(text)

    def _take(self, told: bytes, log: str) -> None:
        self._log = log
        for line in told.splitlines():
            data = json.loads(line)
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            if isinstance(report.longrepr, list):  # where a test was skipped, and why: JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            self._told.append(report)

    def done(self) -> dict[str, list[pytest.TestReport]]:
        """The reports of the tests that ran, by node id: never none, so that all end some day."""
        found: dict[str, list[pytest.TestReport]] = {}
        for report in self._told:
            if report.nodeid in self._items:
                found.setdefault(report.nodeid, []).append(report)
        complete = {
            nodeid: told for nodeid, told in found.items() if any(one.when == "teardown" for one in told)
        }
        for nodeid, text in self._complaints():
            self._fail(complete, nodeid, text)
        if self._troubles:
            # The last test that began ran when the kernel went away, or was the last to put things right.
            begun = re.findall(rf"{MARK} (\S.*?)\r?$", self._log, flags=re.MULTILINE)
            blamed = begun[-1] if begun and begun[-1] in self._items else next(iter(self._items))
            for text in self._troubles:
                self._fail(complete, blamed, text)
        elif len(complete) < len(self._items):
            missing = next(nodeid for nodeid in self._items if nodeid not in complete)
            self._fail(complete, missing, "the test did not run inside, and nothing says why")
        return complete

    def _complaints(self) -> Iterator[tuple[str, str]]:
        """What the kernel said of bugs, with the test in whose time it did."""
        parts = re.split(rf"^.*{MARK} (\S.*)$", self._log.replace("\r", ""), flags=re.MULTILINE)
        first, *_unused = self._items
        for nodeid, text in itertools.chain([(first, parts[0])], zip(parts[1::2], parts[2::2], strict=True)):
            owner = nodeid if nodeid in self._items else first
            for report in reports(text, _complains(self._items[owner])):
                yield owner, f"the kernel complained: {report.title}\n{report.text}"

    def _fail(self, complete: dict[str, list[pytest.TestReport]], nodeid: str, text: str) -> None:
        told = complete.setdefault(nodeid, [])
        item = self._items[nodeid]
        if not told:
            took = time.monotonic() - self._started
            told.append(pytest.TestReport(nodeid, item.location, {}, "failed", text, "call", duration=took))
            return
        call = next((one for one in told if one.when == "call"), told[-1])
        if call.failed:
            call.sections.append(("kernel", text))
        else:
            call.outcome = "failed"
            call.longrepr = text


def _handed() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(HANDED)}


def _named(release: str) -> str:
    return f"SOCKMI_KO_{release.upper()}"


def _complains(item: pytest.Item) -> list[str]:
    return [str(pattern) for mark in item.iter_markers("complains") for pattern in mark.args]


def _processors(item: pytest.Item) -> list[int]:
    return [int(mark.args[0]) for mark in item.iter_markers("processors")]


def _releases(item: pytest.Item) -> list[str]:
    return [str(name) for mark in item.iter_markers("releases") for name in mark.args]


def _parameters(item: pytest.Item) -> list[str]:
    return [str(word) for mark in item.iter_markers("parameters") for word in mark.args]


class Teller:
    """Inside: says in the kernel log which test begins, and writes all reports to a file."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = Path(os.environ["SOCKMI_OUT"], "reports")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Before each test."""
        Path("/dev/kmsg").write_text(f"<4>{MARK} {nodeid}\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After each phase of a test; on the disk at once, for the kernel may die in the next one."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._file.open("a") as out:
            out.write(json.dumps(data) + "\n")
            out.flush()
            os.fsync(out.fileno())
