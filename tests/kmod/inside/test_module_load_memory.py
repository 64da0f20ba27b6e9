# SPDX-License-Identifier: MIT
"""Each allocation of the module's load, and of a network namespace's beginning, fails once: nothing is left.

The kernel's own allocations for either are among them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import new_socket
from tests.kmod.inside.test_module_memory import EXPECTED, Injector
from tests.kmod.inside.test_module_races import LIBC, insmod, rmmod
from tests.kmod.module_client import Device, ListName, Request

pytestmark = [
    pytest.mark.no_module,
    pytest.mark.kernels("uml-6.1-debug"),
    pytest.mark.complains("kmemleak: Cannot allocate a scan area"),
    pytest.mark.timeout(900),
]

LOADED = Path("/sys/module/sockmi")
SYSCTL = Path("/proc/sys/sockmi")
CLONE_NEWNET = 0x40000000
NEVER = 1_000_000  # more fault points than any call has
NAMESPACE_LAST = 1500  # all: devices come behind the module's part
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
        assert error in (0, *EXPECTED), os.strerror(error)
        assert LOADED.exists() == SYSCTL.exists() == (not error)
        if not error:
            works()
            assert rmmod() == 0

    assert each_failing(insmod, unload, LOAD_LAST) > 20
    assert insmod() == 0
    unload(0)


def test_a_network_namespace_begins() -> None:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def unshare() -> int:
        return ctypes.get_errno() if LIBC.unshare(CLONE_NEWNET) else 0

    def back(error: int) -> None:
        if not error:  # the kernel's own parts have other errors too, without the module as well
            works()
        assert LIBC.setns(home, CLONE_NEWNET) == 0

    assert insmod() == 0
    try:
        assert each_failing(unshare, back, NAMESPACE_LAST) > 20
        works()
    finally:
        os.close(home)
    assert rmmod() == 0
