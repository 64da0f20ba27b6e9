# SPDX-License-Identifier: MIT
"""Loading and unloading while programs use the device, on several processors at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.inside.test_module_core import pair
from tests.kmod.module_client import ANY_UID, Device, frozen
from tests.kmod.nat_client import held, opened

pytestmark = [pytest.mark.processors(2), pytest.mark.timeout(300)]

LIBC = ctypes.CDLL(None, use_errno=True)
LIMIT_S = 120
ENOUGH = 5
"""That often each of them happens, or the limit is reached, which fails."""
PAUSE_S = 0.02
"""Between two uses: on a single processor the device would be in use whenever somebody else has a turn."""
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


@pytest.fixture(autouse=True)
def other_hooks() -> Iterator[None]:
    """Netfilter hooks at the module's places, so that its are neither the first nor the last there.

    The first and the last have the kernel patch its code (static keys) under packets on the other
    processor, and QEMU's emulation, 7.2 and others, may still run what stood there for a moment: an
    "Oops: int3" in `__ip_local_out()`, or wherever a packet was.
    """
    hooks = ("prerouting", "output", "postrouting")
    chains = " ".join(f"chain {hook} {{ type filter hook {hook} priority 0; }};" for hook in hooks)
    subprocess.run(["nft", f"table inet others {{ {chains} }}"], check=True, timeout=30)
    yield
    subprocess.run(["nft", "delete table inet others"], check=True, timeout=30)


class Turns:
    """Counts of several processes in memory that they share, and the word that they are to stop.

    No signal is used for that: it would interrupt a freeze, which is not what the test is about.
    """

    def __init__(self) -> None:
        self._shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    @property
    def stop(self) -> bool:
        return self._shared[0] == 1

    @stop.setter
    def stop(self, value: bool) -> None:
        self._shared[0] = value

    def __getitem__(self, child: int) -> int:
        return self._shared[1 + child]

    def count(self, child: int) -> None:
        self._shared[1 + child] += 1


def again_and_again(use: Callable[[], None], turns: Turns, number: int) -> int:
    """A process that does it until it is told to stop, and counts how often it did."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        while not turns.stop:
            try:
                use()
                turns.count(number)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            time.sleep(PAUSE_S)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def test_the_module_comes_and_goes_under_its_users() -> None:
    """It goes only between two users; whoever opens the device has it, or is told that it is not there."""
    turns, uses = Turns(), (freeze_and_list, hold)
    children = [again_and_again(use, turns, number) for number, use in enumerate(uses)]
    gone = refused = 0
    try:
        end = time.monotonic() + LIMIT_S
        while min(gone, refused, turns[0], turns[1]) < ENOUGH and time.monotonic() < end:
            if code := rmmod():
                assert code in (errno.EWOULDBLOCK, errno.EBUSY)
                refused += 1
                time.sleep(0.001)  # who uses it gets the processor
                continue
            gone += 1
            assert insmod() == 0
            time.sleep(0.02)
    finally:
        turns.stop = True
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        with contextlib.suppress(OSError):
            insmod()  # the tests after this one need it
    assert codes == [0, 0]
    how_often = {"gone": gone, "refused": refused, "freezes": turns[0], "holds": turns[1]}
    assert min(how_often.values()) >= ENOUGH, how_often
