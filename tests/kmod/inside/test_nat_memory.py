# SPDX-License-Identifier: MIT
"""Each allocation and each copy of the NAT helper's calls fails once: an error, nothing half done or lost.

A copy that fails on the way back (EFAULT) tells too late: the change has been made.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import BatchError, Flag, Flow, Nat, held, redirect
from tests.kmod.nat_lab import triangle

pytestmark = pytest.mark.kernels("uml-6.1-debug")

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
DEBUG = Path("/sys/kernel/debug")
HOME = Endpoint(IPv4Address("192.0.2.1"), 80)
AWAY = Endpoint(IPv4Address("192.0.2.2"), 4000)
MOST = 200  # allocations that one call may make


def ends(number: int) -> FourTuple:
    return FourTuple(HOME, Endpoint(IPv4Address("10.0.0.1"), 1000 + number))


@pytest.fixture(autouse=True)
def injection() -> Iterator[None]:
    """Allocations that may wait fail too."""
    files = [DEBUG / kind / "ignore-gfp-wait" for kind in ("failslab", "fail_page_alloc")]
    before = [file.read_text() for file in files]
    for file in files:
        file.write_text("N")
    yield
    for file, text in zip(files, before, strict=True):
        file.write_text(text)


def failing(number: int, call: Callable[[], None]) -> tuple[bool, int]:
    """Run ``call`` with its allocation of this number failing: whether one has failed, and the errno or 0."""
    file = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
    code = 0
    try:
        os.pwrite(file, str(number).encode(), 0)
        try:
            call()
        except BatchError as error:
            code = error.errno or 0
        try:
            reached = int(os.pread(file, 20, 0).split(b"\0")[0]) == 0
        except OSError:  # the failure was left for this copy
            reached = False
        os.pwrite(file, b"0", 0)
    finally:
        os.close(file)
    return reached, code


@contextlib.contextmanager
def fresh_namespace() -> Iterator[None]:
    """No whole lab: one for each allocation takes a busy machine minutes."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        assert LIBC.unshare(CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert LIBC.setns(home, CLONE_NEWNET) == 0
    finally:
        os.close(home)


def test_the_first_flow_of_a_namespace() -> None:
    """Tables and hooks are made with it."""
    failed = 0
    for number in range(1, MOST):
        with fresh_namespace():
            nat = Nat()
            flow = redirect(ends(1), AWAY)
            reached, code = failing(number, lambda nat=nat, flow=flow: nat.add(flow))
            found = nat.list()
            assert code in (0, errno.ENOMEM, errno.EFAULT)
            assert found == ([] if code == errno.ENOMEM else [flow]) or (code, found) == (errno.EFAULT, [])
            nat.set(held(ends(1)), redirect(ends(2), AWAY))
            assert nat.total() == 2
            assert nat.flush() == 2
            nat.close()
        if not reached:
            break
        failed += code == errno.ENOMEM
    else:
        pytest.fail("the call did not end its allocations")
    assert failed >= 4


def test_replacing() -> None:
    with triangle(4) as of:
        nat = of.nat(of.lab.a)
        old = held(ends(1), Flag.HOLD | Flag.MUTE)
        nat.add(old)
        failed = 0
        for number in range(1, MOST):
            flow = Flow(HOME, ends(1).remote, Flag.REDIRECT, Endpoint(AWAY.address, 4000 + number))
            reached, code = failing(number, lambda flow=flow: nat.replace(flow))
            found = nat.list()
            assert code in (0, errno.ENOMEM, errno.EFAULT)
            assert found == [old if code == errno.ENOMEM else flow] or (
                code == errno.EFAULT and found == [old]
            )
            old = found[0]
            if not reached:
                break
            failed += code == errno.ENOMEM
        else:
            pytest.fail("the call did not end its allocations")
        assert failed >= 2
