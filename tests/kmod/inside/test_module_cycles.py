# SPDX-License-Identifier: MIT
"""A thousand times loaded, used and unloaded: nothing is left behind, and the last time is like the first."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod import nat_client
from tests.kmod.inside.test_module_core import move, pair, read_exactly
from tests.kmod.module_client import ANY_UID, Device, frozen

pytestmark = [
    pytest.mark.no_module,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.kernels("[67].*", "uml-6.1-debug"),
]

PATIENCE_S = 300.0  # for one insmod or rmmod: a user-mode kernel is a process among others
CYCLES = int(os.environ.get("SOCKMI_CYCLES", "1000"))
WARM = min(50, CYCLES // 4)  # cycles until the caches have what they keep
LEAK_MAX = 64  # bytes a cycle: noise of the kernel's own, divided by hundreds of cycles


def unreclaimable() -> int:
    """Bytes of kernel memory that are in use and cannot be taken back."""
    for cache in Path("/sys/kernel/slab").glob("*/shrink"):
        with contextlib.suppress(OSError):  # it has gone
            cache.write_text("1")  # nor does KASAN's quarantine keep anything then
    for switch in ("1", "2"):
        Path("/proc/sys/vm/drop_caches").write_text(switch)
    lines = Path("/proc/meminfo").read_text().splitlines()
    said = {
        name: int(rest.split()[0]) * 1024 for name, _unused, rest in (line.partition(":") for line in lines)
    }
    return said["SUnreclaim"] + said["VmallocUsed"] + said["Percpu"]


def use(turn: int) -> None:
    """Something of everything: a freeze that is aborted, a move, an entry of a list, a flow."""
    with Device(slots=1, slot_bytes=1 << 16) as device:
        ours, peer = pair()
        with frozen(device, ours) as (freeze, image):
            device.abort(freeze)
        device.list_add(image, flags=ANY_UID)
        if turn % 10 == 0:
            copy = move(device, ours, "ipv4")
            peer.sendall(b"x")
            assert read_exactly(copy, 1) == b"x"
            copy.close()
        for sock in (ours, peer):
            sock.close()
    here = FourTuple(Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("192.0.2.2"), 1024))
    with nat_client.opened() as nat:
        nat.add(nat_client.held(here))


def test_loaded_and_unloaded(record_property) -> None:
    module = os.environ["SOCKMI_KO"]
    before = 0
    started = time.monotonic()
    for turn in range(CYCLES):
        if turn == WARM:
            before = unreclaimable()
        subprocess.run(["insmod", module], check=True, timeout=PATIENCE_S)
        if turn % 5 == 0:
            use(turn)
        gc.collect(0)
        subprocess.run(["rmmod", "sockmi"], check=True, timeout=PATIENCE_S)
    assert not Path("/sys/module/sockmi").exists()
    lost = (unreclaimable() - before) / (CYCLES - WARM)
    took = time.monotonic() - started
    print(f"{CYCLES} cycles in {took:.0f} s, {lost:+.0f} bytes of kernel memory a cycle")
    record_property("cycles", f"{CYCLES} in {took:.0f} s, {lost:+.0f} bytes a cycle")
    assert lost < LEAK_MAX


def test_with_everything_open() -> None:
    """Refused while a device is open or a flow is left; a dead process's leavings do not count."""
    module = os.environ["SOCKMI_KO"]
    for _turn in range(10):
        subprocess.run(["insmod", module], check=True, timeout=PATIENCE_S)
        child = os.fork()
        if child == 0:
            device = Device()
            ours, _peer = pair()
            device.freeze(device.claim(ours), deadline_ms=5000)
            assert subprocess.run(["rmmod", "sockmi"], check=False, capture_output=True).returncode != 0
            os.kill(os.getpid(), 9)
        assert os.waitpid(child, 0)[1] == 9
        end = time.monotonic() + 10
        while subprocess.run(["rmmod", "sockmi"], check=False, capture_output=True).returncode:
            assert time.monotonic() < end, "a killed process keeps the module"
            time.sleep(0.05)
