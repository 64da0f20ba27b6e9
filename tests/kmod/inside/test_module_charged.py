# SPDX-License-Identifier: MIT
"""What the module keeps for somebody is charged to their memory cgroup, and bounded by it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod import nat_client
from tests.kmod.inside.test_module_core import pair, read_exactly, wait_for
from tests.kmod.module_client import ANY_UID, Device, ListName, Request, frozen

MIB = 1 << 20
FLOWS = 10_000
FLOW_BYTES = 200  # at least, of the helper's own memory
EVENTS, REQUESTS = 512, 64  # so many about import requests can wait; of one call
EVENT_BYTES = 128  # at least
NOISE = 1 * MIB  # what else the kernel allocates meanwhile


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Where cgroups are."""
    mounted = Path("/sys/fs/cgroup")
    if (mounted / "cgroup.controllers").exists():
        folder = None
    else:
        folder = mounted = Path(tempfile.mkdtemp())
        subprocess.run(["mount", "-t", "cgroup2", "none", mounted], check=True)
    assert "memory" in (mounted / "cgroup.controllers").read_text().split()
    (mounted / "cgroup.subtree_control").write_text("+memory")
    yield mounted
    if folder:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def group(root: Path) -> Iterator[Path]:
    made = root / f"charged-{os.getpid()}"
    made.mkdir()
    yield made
    wait_for(lambda: not (made / "cgroup.procs").read_text())
    made.rmdir()


def inside(group: Path, action: Callable[[], None]) -> int:
    """Exit status of a process in ``group``: 0, 1 with what happened, or the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def grown(group: Path, action: Callable[[], object]) -> int:
    """By how many bytes the group has grown."""
    before = int((group / "memory.current").read_text())
    action()
    return int((group / "memory.current").read_text()) - before


def test_buffers_images_and_flows_are_charged(group: Path) -> None:
    ours, peer = pair()
    peer.sendall(bytes(64 << 10))
    wait_for(lambda: len(ours.recv(64 << 10, 2)) == 64 << 10)  # MSG_PEEK
    with Device() as device, frozen(device, ours) as (freeze, image):
        device.abort(freeze)

    def use() -> None:
        made: list[Device] = []
        assert grown(group, lambda: made.append(Device(slots=4, slot_bytes=4 * MIB))) >= 16 * MIB
        assert (
            grown(group, lambda: [made[0].list_add(image, flags=ANY_UID) for _turn in range(64)]) >= 4 * MIB
        )
        ends = [
            FourTuple(Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("192.0.2.2"), 1024 + n))
            for n in range(FLOWS)
        ]
        nat = nat_client.Nat()
        try:
            flows = [nat_client.held(one, nat_client.Flag.MUTE) for one in ends]
            assert grown(group, lambda: nat.add(*flows)) >= FLOWS * FLOW_BYTES
        finally:
            nat.flush()
            nat.close()
        made[0].close()

    assert inside(group, use) == 0
    assert read_exactly(ours, 64 << 10) == bytes(64 << 10)


def unreclaimable() -> int:
    """The kernel's own memory by slab and kmalloc(), bytes, whoever it is charged to."""
    [line] = [one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("SUnreclaim:")]
    return int(line.split()[1]) << 10


def slab(group: Path) -> int:
    """Bytes of the group's that the kernel cannot take back."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(dict(lines)["slab_unreclaimable"])


def test_events_are_charged(group: Path) -> None:
    def use() -> None:
        with Device(slots=0) as device:
            device.serve()
            sockets = [socket.socket() for _turn in range(REQUESTS)]

            def ask() -> None:
                asked = [Request(fd=one.fileno(), list=ListName.CONNECTED) for one in sockets]
                assert device.take(*asked, timeout_ms=1)[0] == 0

            ask()  # what else that takes, it takes now
            for _event in range(REQUESTS // 16):
                device.events()
            before = slab(group)
            for _turn in range(EVENTS // REQUESTS):
                ask()
            wait_for(lambda: slab(group) - before >= EVENTS * EVENT_BYTES)
            for _event in range(EVENTS // 16):
                device.events()
            wait_for(lambda: slab(group) - before < EVENTS * EVENT_BYTES // 2)

    assert inside(group, use) == 0


@pytest.mark.kernels("6.1", "6.12", "7.2")  # kmemleak of the debug kernel has something for each allocation
def test_hash_tables_are_all_that_is_not_charged(group: Path) -> None:
    """As docs/man/sockmi.7 has it: so many bytes for each flow, twice as these rewrite."""
    count, at_rest = 50_000, 2 * 27
    to = Endpoint(IPv4Address("192.0.2.3"), 4000)

    def use() -> None:
        flows = [
            nat_client.redirect(
                FourTuple(
                    Endpoint(IPv4Address("192.0.2.1"), 80),
                    Endpoint(IPv4Address("198.51.100.0") + n // 25_000, 1024 + n % 25_000),
                ),
                to,
            )
            for n in range(count)
        ]
        nat = nat_client.Nat()
        try:
            before = unreclaimable()
            charged = grown(group, lambda: nat.add(*flows))
            time.sleep(0.5)  # the last resizing, and the old tables' grace period
            uncharged = unreclaimable() - before - charged
            assert charged >= count * FLOW_BYTES
            assert uncharged <= count * at_rest + NOISE
        finally:
            nat.flush()
            nat.close()

    assert inside(group, use) == 0


@pytest.mark.complains("Out of memory|out of memory|oom")
def test_nobody_gets_more_than_their_group_has(group: Path) -> None:
    """The kernel ends who asks, as for any other memory; what the module had taken comes back."""
    (group / "memory.max").write_text(str(24 * MIB))
    with contextlib.suppress(OSError):  # a kernel without swap has no limit of it
        (group / "memory.swap.max").write_text("0")
    status = inside(group, lambda: Device(slots=8, slot_bytes=8 * MIB).close())
    assert status in (1, -signal.SIGKILL)
    happened = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    assert int(happened["max"]) > 0
    (group / "memory.max").write_text("max")
    wait_for(lambda: int((group / "memory.current").read_text()) < 24 * MIB)
    assert inside(group, lambda: Device(slots=8, slot_bytes=8 * MIB).close()) == 0
