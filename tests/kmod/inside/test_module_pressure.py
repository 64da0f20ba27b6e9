# SPDX-License-Identifier: MIT
"""Export and import while memory is short: TCP's own limit, and the machine's."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi import image as images
from tests.kmod.inside.test_module_core import held, new_socket, pair, read_exactly
from tests.kmod.module_client import Device, Refusal, Refused, Restore, frozen

TCP_MEM = Path("/proc/sys/net/ipv4/tcp_mem")
FREE_KIB = 24 << 10  # what the hog leaves
MOVES = 25
FOR_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.EDQUOT)


@contextlib.contextmanager
def tcp_memory(pages: int) -> Iterator[None]:
    """TCP is under pressure from one page on, and gets no more than ``pages``."""
    before = TCP_MEM.read_text()
    TCP_MEM.write_text(f"1 1 {pages}")
    try:
        yield
    finally:
        TCP_MEM.write_text(before)


def loaded_pair(size: int) -> tuple[socket.socket, socket.socket, bytes]:
    """A connection of whose stream ``size`` bytes or less wait at both ends and between; and the stream."""
    ours, peer = pair()
    data = random.Random(size).randbytes(size)  # noqa: S311
    ours.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < size:
            sent += ours.send(data[sent : sent + 65536])
    ours.setblocking(True)
    return ours, peer, data[:sent]


def test_tcp_without_memory_refuses_by_name_and_loses_nothing() -> None:
    ours, peer, data = loaded_pair(1_000_000)
    with Device(slot_bytes=8 << 20) as device:
        copy = new_socket("ipv4")
        with held(ours):
            with frozen(device, ours) as (freeze, image):
                device.commit(freeze)
            decoded = images.decode(image)
            with tcp_memory(1):
                try:
                    dormant = device.restore(copy, image, flags=0)
                except Refused as error:
                    assert error.refusal == Refusal.MEMORY
                    assert error.errno == errno.ENOMEM
                    dormant = None
            assert dormant is None or not (decoded.unsent_queue or decoded.sent_queue)
            if dormant is None:
                dormant = device.restore(copy, image, flags=0)
        device.decide("activate", dormant.id)
    copy.shutdown(socket.SHUT_WR)
    assert read_exactly(peer, len(data)) == data
    assert peer.recv(1) == b""


def hog() -> int:
    """A process that takes whatever is free beyond FREE_KIB, and goes on doing so; its pid."""
    child = os.fork()
    if child:
        return child
    Path("/proc/self/oom_score_adj").write_text("1000")
    kept = []
    while True:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = {name: int(rest.split()[0]) for name, _unused, rest in (line.partition(":") for line in lines)}
        if free["MemAvailable"] > FREE_KIB:
            block = mmap.mmap(-1, 4 << 20)
            block.write(b"x" * (4 << 20))
            kept.append(block)
        else:
            time.sleep(0.01)


def patiently(device: Device, sock: socket.socket, image: bytes, seconds: float) -> tuple[int, Restore]:
    """Restore it, however often that is refused for lack of memory; how often it was."""
    refused, end = 0, time.monotonic() + seconds
    while True:
        try:
            return refused, device.restore(sock, image, flags=0)
        except Refused as error:
            assert error.errno in FOR_MEMORY, error
            assert time.monotonic() < end, f"still refused after {seconds} s and {refused} times: {error}"
            refused += 1
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.complains(r"page allocation failure")
@pytest.mark.kernels("6.*", "7.*")  # UML's memory is a file of the host's
def test_moves_while_the_machine_has_no_memory() -> None:
    """Each freeze and each restore succeeds, or is refused for memory; no byte is lost either way."""
    moved = refused = 0
    child = hog()
    try:
        time.sleep(1)
        for _turn in range(MOVES):
            ours, peer, data = loaded_pair(2_000_000)
            copy = new_socket("ipv4")
            with contextlib.ExitStack() as stack:
                try:
                    device = stack.enter_context(Device(slot_bytes=4 << 20))
                    stack.enter_context(held(ours))
                    freeze, image = stack.enter_context(frozen(device, ours))
                except OSError as error:
                    assert error.errno in FOR_MEMORY, error
                    refused += 1
                    copy = ours  # goes on where it is
                else:
                    device.commit(freeze)
                    times, dormant = patiently(device, copy, image, 30)
                    refused += times
                    device.decide("activate", dormant.id)
                    moved += 1
            copy.shutdown(socket.SHUT_WR)
            assert read_exactly(peer, len(data)) == data
            assert peer.recv(1) == b""
            for sock in (ours, peer, copy):
                sock.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(f"{moved} moved, {refused} times refused")
    assert moved, "nothing moved at all"
