# SPDX-License-Identifier: MIT
"""Nonsense through every opening of the module, for a bounded time; each seed can be had again.

``SOCKMI_FUZZ_SEED`` (any text) and ``SOCKMI_FUZZ_SECONDS`` on the host choose another seed and more time; a
failure tells its seed in the test's name. Seeds that have found something are kept in KEPT, and always tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import select
import socket
import time
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import new_socket, pair, read_exactly
from tests.kmod.module_client import (
    NO_SLOT,
    ORDINALS,
    Decision,
    Device,
    End,
    Import,
    ListName,
    ListNext,
    Refused,
    Request,
    Slots,
    frozen,
    number,
)

KEPT = ["20261128"]
SEEDS = list(dict.fromkeys([*KEPT, os.environ.get("SOCKMI_FUZZ_SEED", KEPT[0])]))
SECONDS = float(os.environ.get("SOCKMI_FUZZ_SECONDS", "3"))
SYSCTLS = Path("/proc/sys/sockmi")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (*[ctypes.c_void_p, ctypes.c_size_t], *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
FAILED = ctypes.c_void_p(-1).value


def until(seconds: float) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_of_calls_with_live_ids(seed: str) -> None:
    """Unlike random bytes these get past the first check: real ids, descriptors, slots and images."""
    rng = random.Random(f"calls {seed}")  # noqa: S311
    names = [name for name in ORDINALS if name not in ("import", "hello", "serve")]
    calls = succeeded = 0
    end = until(SECONDS)
    while time.monotonic() < end:
        with Device(slots=rng.choice((1, 2, 4)), slot_bytes=rng.choice((4096, 1 << 16, 1 << 20))) as device:
            ours, peer = pair(rng.choice(("ipv4", "ipv6")))
            spare = new_socket("ipv4")
            peer.send(b"x" * rng.randrange(1, 3000))
            memory = ctypes.create_string_buffer(1 << 16)
            for _turn in range(60):
                name = rng.choice(names)
                struct = ORDINALS[name][1]
                argument = struct()
                for field, kind in struct._fields_:
                    if field == "refusal" or not isinstance(getattr(argument, field), int):
                        continue
                    value = rng.choice((0, 0, 1, 2, 3, rng.getrandbits(32)))
                    if field == "fd":
                        value = rng.choice((ours.fileno(), spare.fileno(), peer.fileno(), device.fd))
                    elif field in ("pid", "flags", "reserved"):
                        value = rng.choice((0, 0, 0, 1, 4))
                    elif field == "image":
                        value = ctypes.addressof(memory)
                    elif field == "bytes":
                        value = rng.choice((0, 64, len(memory), 1 << 40))
                    elif field == "slot":
                        value = rng.choice((0, 1, NO_SLOT))
                    elif field.endswith("_ms"):
                        value = rng.choice((0, 1, 20))
                    elif field == "id":
                        value = rng.randrange(6)
                    setattr(argument, field, kind(value).value)
                calls += 1
                with contextlib.suppress(Refused):
                    device.call(name, argument)
                    succeeded += 1
                if device.memory and not rng.randrange(4):
                    memory[: min(4096, len(memory))] = device.memory[:4096]
            with contextlib.suppress(OSError):
                os.set_blocking(device.fd, False)
                os.read(device.fd, rng.randrange(4096))
        for sock in (ours, peer, spare):
            sock.close()
    assert calls > 100
    assert succeeded > calls // 100, "nothing of it got past the first check"


def _end(rng: random.Random) -> End:
    address = bytes(10) + b"\xff\xff" + socket.inet_aton(rng.choice(("0.0.0.0", "127.0.0.1", "10.0.0.1")))  # noqa: S104
    return End(address=(ctypes.c_uint8 * 16)(*address), port=rng.choice((0, 0, 1, 65535)))


@pytest.mark.parametrize("seed", SEEDS)
def test_import_requests(seed: str) -> None:
    """The one call of the unprivileged: criteria, sockets, sizes and pointers of any kind."""
    rng = random.Random(f"import {seed}")  # noqa: S311
    calls = imported = 0
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    end = until(SECONDS)
    with Device() as device:
        ours, _peer = pair()
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        while time.monotonic() < end or calls < 200:
            with contextlib.suppress(Refused):
                device.list_add(image)
            sockets = [new_socket(rng.choice(("ipv4", "ipv4", "ipv6"))) for _turn in range(3)]
            fds = [*(sock.fileno() for sock in sockets), sockets[0].fileno(), device.fd, -1, 1 << 20]
            requests = (Request * 4)()
            for request in requests:
                request.fd, request.list = fds[0], 3
                if rng.randrange(2):
                    continue  # as it should be
                request.fd = rng.choice(fds)
                request.list = rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 1 << 31))
                request.states = rng.choice((0, 0, 0, 2, rng.getrandbits(32)))
                request.local_prefix, request.remote_prefix = (
                    rng.choice((0, 0, 0, 1, 96, 127, 128, 129, 65535)) for _turn in range(2)
                )
                request.flags, request.reserved = (rng.choice((0, 0, 0, 0, 0, 1)) for _turn in range(2))
                request.local, request.remote = _end(rng), _end(rng)
                request.context, request.context_room = rng.choice(((0, 0), (8, 4096), (address, 64)))
            where = rng.choice((ctypes.addressof(requests),) * 8 + (0, 8, 1 << 47, (1 << 64) - 64))
            calls += 1
            with contextlib.suppress(Refused):
                device.call(
                    "import",
                    Import(
                        requests=where,
                        count=rng.choice((0, 1, 1, 1, 2, 4, 65, 1 << 31)),
                        request_bytes=rng.choice((ctypes.sizeof(Request),) * 6 + (0, 63, 64, 4097)),
                        timeout_ms=rng.choice((0, 0, 1, 5)),
                        flags=rng.choice((0, 0, 0, 0, 1)),
                    ),
                )
                imported += device.result
            for sock in sockets:
                sock.close()
        for name in ListName:
            while (left := device.list_info(name)).entries + left.reserved:
                device.decide("remove", device.call("list_next", ListNext(list=name)).id)
    assert imported > 0, "nothing of it got a socket"


@pytest.mark.parametrize("seed", SEEDS)
def test_mappings(seed: str) -> None:
    """Any length, offset, protection; grown, cut in two, kept beyond the device's end, handed to a child."""
    rng = random.Random(f"mmap {seed}")  # noqa: S311
    page = mmap.PAGESIZE
    mapped = tried = 0
    end = until(SECONDS)
    while time.monotonic() < end:
        device = Device(slots=0)
        kinds = {}
        for kind in (1, 2):
            with contextlib.suppress(Refused):
                count, size = rng.randrange(1, 5), rng.choice((100, page, 3 * page, 1 << 16))
                kinds[kind] = device.call("slots", Slots(kind=kind, count=count, bytes=size))
        left = []
        for _turn in range(20):
            base = rng.choice((0, 1 << 40, 2 << 40, *[made.offset for made in kinds.values()]))
            offset = base + rng.choice((0, 0, 0, page, -page, 5 * page, 1 << 30))
            length = page * rng.choice((1, 1, 2, 3, 16, 1 << 10, 1 << 20))
            protection = rng.choice((0, 1, 1, 2, 3, 3, 4, 7))
            flags = rng.choice((mmap.MAP_SHARED, mmap.MAP_SHARED, mmap.MAP_PRIVATE))
            tried += 1
            at = _libc.mmap(None, length, protection, flags, device.fd, offset)
            if at == FAILED:
                continue
            mapped += 1
            if protection & 1:
                ctypes.string_at(at, min(length, 2 * page))
            if protection & 2:
                ctypes.memset(at, rng.randrange(256), page)
            # An export slot stays what it is: for reading.
            made = kinds.get(1)
            if made and offset == made.offset and flags == mmap.MAP_SHARED:
                assert not protection & 2
                assert _libc.mprotect(at, page, 3) == -1
            parts = [(at, page), (at + page, length - page)]
            if not rng.randrange(3) and length > page:
                _libc.munmap(at + page, page)
                parts[1] = (at + 2 * page, length - 2 * page)
            if not rng.randrange(3):
                size = page * rng.choice((1, 2, 64))
                moved = _libc.mremap(at, page, size, 1)
                if moved != FAILED:
                    parts[0] = (moved, size)
            left += [part for part in parts if part[1]]
        if not rng.randrange(10):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
        device.close()  # before what is mapped of it
        for at, length in left:
            _libc.munmap(at, length)
    assert tried > 100
    assert mapped > tried // 20, "hardly anything could be mapped: this test shows little"


@pytest.mark.complains(r"sockmi\.export:")
@pytest.mark.parametrize("seed", SEEDS)
def test_sysctls(seed: str) -> None:
    rng = random.Random(f"sysctl {seed}")  # noqa: S311
    pieces = (
        "pid=", "fd=", "to=", "pid=1 ", "fd=0 ", f"pid={os.getpid()} ", "to=10.0.0.1", "to=::1",
        "to=fe80::1%lo", " ", "\t", "\n", "\0", "=", "-1", "0", "4294967296", "18446744073709551616", "0x1",
        "%s%n", "x" * 100, "\xff", "pid",
    )  # fmt: skip
    limits = {name: (SYSCTLS / name).read_text() for name in ("max_bound", "max_listening", "max_connected")}
    done = 0
    end = until(SECONDS)
    try:
        while time.monotonic() < end:
            text = "".join(rng.choice(pieces) for _turn in range(rng.randrange(1, 9))).encode("latin-1")
            fd = os.open(SYSCTLS / rng.choice(("export", "export", *limits)), os.O_RDWR)
            try:
                with contextlib.suppress(OSError):
                    os.pwrite(fd, text, rng.choice((0, 0, 0, 1, 100)))
                with contextlib.suppress(OSError):
                    told = os.pread(fd, rng.choice((0, 1, 7, 4096)), rng.choice((0, 0, 3, 1 << 40)))
                    assert b"\0" not in told
            finally:
                os.close(fd)
            done += 1
    finally:
        for name, text in limits.items():
            (SYSCTLS / name).write_text(text)
    assert done > 50
    assert (SYSCTLS / "max_connected").read_text() == limits["max_connected"]


@pytest.mark.parametrize("seed", SEEDS)
def test_files_that_are_passed_and_shared(seed: str) -> None:
    """The device's descriptor in other hands: dup, fork, SCM_RIGHTS, poll and reads at the same time."""
    rng = random.Random(f"files {seed}")  # noqa: S311
    end = until(SECONDS)
    turns = 0
    while turns < 3 or time.monotonic() < end:
        ours, peer = pair()
        device = Device()
        claim = device.claim(ours)
        left, right = socket.socketpair()
        socket.send_fds(left, [b"x"], [device.fd])
        child = os.fork()
        if child == 0:
            _unused, fds, _unused, _unused = socket.recv_fds(right, 1, 1)
            with contextlib.suppress(OSError):
                os.set_blocking(fds[0], False)
                decision = rng.choice(("commit", "abort", "release"))
                fcntl.ioctl(fds[0], number(decision), bytearray(bytes(Decision(id=claim.id, epoch=1))))
                select.select([fds[0]], [], [], 0.01)
                os.read(fds[0], 4096)
            os._exit(0)
        with contextlib.suppress(Refused):  # the child may have released the claim, or decide first
            device.abort(device.freeze(claim, deadline_ms=200))
        os.waitpid(child, 0)
        device.close()
        if ours.getsockname()[1]:  # not committed
            peer.send(b"y")
            assert read_exactly(ours, 1) == b"y"
        for one in (ours, peer, left, right):
            one.close()
        turns += 1
