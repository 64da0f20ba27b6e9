# SPDX-License-Identifier: MIT
"""Each allocation of the module's load fails once: nothing is left, and it can be loaded again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import new_socket
from tests.kmod.inside.test_module_memory import EXPECTED, Injector
from tests.kmod.inside.test_module_races import insmod, rmmod
from tests.kmod.module_client import Device, ListName, Request

pytestmark = [
    pytest.mark.no_module,
    pytest.mark.kernels("uml-6.1-debug"),
    pytest.mark.complains("kmemleak: Cannot allocate a scan area"),
    pytest.mark.timeout(900),
]

LOADED = Path("/sys/module/sockmi")
SYSCTL = Path("/proc/sys/sockmi")
NEVER = 1_000_000  # more fault points than any call has
LOAD_LAST = 250  # of some 1,000; the loader's come before the module's own


@pytest.fixture(scope="module", autouse=True)
def all_allocations_fail() -> Iterator[None]:
    """Those that may wait too; and without a stack for each."""
    wanted = {"ignore-gfp-wait": "N", "verbose": "0"}
    files = {
        Path("/sys/kernel/debug") / kind / name: value
        for kind in ("failslab", "fail_page_alloc")
        for name, value in wanted.items()
    }
    before = {file: file.read_text() for file in files}
    for file, value in files.items():
        file.write_text(value)
    yield
    for file, value in before.items():
        file.write_text(value)


def points(call: Callable[[], int]) -> int:
    """How many fault points ``call`` has if none fails."""
    injector = Injector()
    try:
        injector.arm(NEVER)
        assert call() == 0
        left = int(os.pread(injector.fd, 16, 0).split(b"\0")[0])
        injector.disarm()
    finally:
        os.close(injector.fd)
    return NEVER - left


def each_failing(call: Callable[[], int], after: Callable[[int], None], last: int) -> int:
    """``call`` with each of its ``last`` fault points failing; ``after`` gets its errno. How many ENOMEM."""
    failures = 0
    first = max(points(call) - last, 1)
    after(0)
    injector = Injector()
    try:
        for nth in range(first, first + 2 * last):
            injector.arm(nth)
            try:
                error = call()
            finally:
                failed = injector.disarm()
            assert error in (0, *EXPECTED), os.strerror(error)
            after(error)
            failures += error == errno.ENOMEM
            if not failed:
                return failures
    finally:
        os.close(injector.fd)
    pytest.fail("the call did not end its allocations")


def works() -> None:
    """In the network namespace of who asks."""
    with Device() as device, new_socket("ipv4") as copy:
        assert device.take(Request(fd=copy.fileno(), list=ListName.CONNECTED))[0] == 0
    assert (SYSCTL / "export").read_text() == "none\n"


def test_loading() -> None:
    def unload(error: int) -> None:
        assert LOADED.exists() == SYSCTL.exists() == (not error)
        if not error:
            works()
            assert rmmod() == 0

    assert each_failing(insmod, unload, LOAD_LAST) > 20
    assert insmod() == 0
    unload(0)
