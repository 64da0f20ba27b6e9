# SPDX-License-Identifier: MIT
"""Loading and unloading while programs use the device, on several processors at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.inside.test_module_core import pair
from tests.kmod.module_client import ANY_UID, Device, frozen
from tests.kmod.nat_client import held, opened

pytestmark = pytest.mark.processors(2)

LIBC = ctypes.CDLL(None, use_errno=True)
SECONDS = 5
FINIT_MODULE = 313  # x86-64
GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO)
"""What open() says of a device without its module."""


def insmod() -> int:
    """0 or errno."""
    with Path(os.environ["SOCKMI_KO"]).open("rb") as file:
        return ctypes.get_errno() if LIBC.syscall(FINIT_MODULE, file.fileno(), b"", 0) else 0


def rmmod() -> int:
    """0 or errno; does not wait for whoever uses it."""
    return ctypes.get_errno() if LIBC.delete_module(b"sockmi", os.O_NONBLOCK) else 0


def freeze_and_list() -> None:
    with Device(slots=1, slot_bytes=1 << 16) as device:
        ours, peer = pair()
        with frozen(device, ours) as (freeze, image):
            device.abort(freeze)
        device.list_add(image, flags=ANY_UID)
        ours.close()
        peer.close()


def hold() -> None:
    here = FourTuple(Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("192.0.2.2"), os.getpid()))
    with opened() as nat:
        nat.set(held(here, hold_ms=3))
        nat.set(held(here))


def again_and_again(use: Callable[[], None], turns: int) -> int:
    """A process that does it until it is told to stop, and writes how often it did to ``turns``."""
    child = os.fork()
    if child:
        return child
    code, done, stop = 1, 0, []
    signal.signal(signal.SIGTERM, lambda *_unused: stop.append(1))
    try:
        while not stop:
            try:
                use()
                done += 1
            except OSError as error:
                if error.errno not in GONE:
                    raise
        os.write(turns, done.to_bytes(8))
        code = 0
    finally:
        os._exit(code)


def test_the_module_comes_and_goes_under_its_users() -> None:
    """It goes only between two users; whoever opens the device has it, or is told that it is not there."""
    reader, writer = os.pipe()
    children = [again_and_again(use, writer) for use in (freeze_and_list, hold)]
    gone = refused = 0
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if code := rmmod():
                assert code in (errno.EWOULDBLOCK, errno.EBUSY)
                refused += 1
                continue
            gone += 1
            assert insmod() == 0
            time.sleep(0.02)
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with contextlib.suppress(OSError):
            insmod()  # the tests after this one need it
        os.close(writer)
    used = [int.from_bytes(os.read(reader, 8)) for _child in children]
    os.close(reader)
    assert codes == [0, 0]
    assert gone > 3 and refused > 3 and min(used) > 3
