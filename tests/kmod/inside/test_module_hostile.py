# SPDX-License-Identifier: MIT
"""Hostile callers: the kernel may refuse, and must not be hurt."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import select
import signal
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from sockmi import image as images
from sockmi.addresses import Endpoint
from sockmi.engine.kernel import KernelEngine, ModuleMissing
from sockmi.engine.repair import RepairEngine
from tests.kmod import nat_client
from tests.kmod.inside.test_module_core import (
    CLOSE_WAIT,
    ESTABLISHED,
    FAMILIES,
    held,
    join_all,
    new_socket,
    pair,
    read_exactly,
    state_of,
    wait_for,
)
from tests.kmod.inside.test_module_exact import inject
from tests.kmod.module_client import (
    ACTIVATE,
    MAGIC,
    NO_SLOT,
    ORDINALS,
    PUBLISH,
    RESET_PATH,
    TRANSPARENT,
    Decision,
    Device,
    End,
    EventType,
    Freeze,
    ListName,
    Refusal,
    Refused,
    Request,
    Restore,
    Slots,
    frozen,
    number,
)

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SEED = int(os.environ.get("SOCKMI_FUZZ_SEED", "20261128"))
SECONDS = float(os.environ.get("SOCKMI_FUZZ_SECONDS", "4"))
EXPECTED = (
    errno.EBADMSG,
    errno.EOPNOTSUPP,
    errno.EADDRNOTAVAIL,
    errno.EADDRINUSE,
    errno.ENOMEM,
    errno.EAFNOSUPPORT,
    errno.EDQUOT,
    errno.EISCONN,
)
ABSURD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def sealed(image: bytearray) -> bytes:
    """With the checksum that makes the module look further."""
    crc = zlib.crc32(bytes(image[32:]), zlib.crc32(bytes(image[:28])))
    image[28:32] = struct.pack("<I", crc)
    return bytes(image)


def mutated(image: bytes, rng: random.Random) -> bytes:
    """A few fields replaced; most are in the fixed sections, whose values reach the kernel's arithmetic."""
    new = bytearray(image)
    for _turn in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(32, len(new) - 8) & ~3
        kind = rng.randrange(4)
        if kind == 0:
            new[at : at + 4] = struct.pack("<I", rng.choice(ABSURD))
        elif kind == 1:
            new[at + rng.randrange(4)] = rng.randrange(256)
        elif kind == 2:
            value = struct.unpack_from("<I", new, at)[0]
            new[at : at + 4] = struct.pack(
                "<I", (value + rng.choice((-1, 1, 1 << 16, -(1 << 16)))) & 0xFFFFFFFF
            )
        else:
            new[at : at + 8] = struct.pack("<Q", rng.getrandbits(64))
    return sealed(new)


def use(sock: socket.socket, rng: random.Random) -> None:
    """What an application does, without blocking."""
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        sock.recv(10000)
    with contextlib.suppress(OSError):
        sock.send(b"z" * rng.randrange(1, 50000))
    with contextlib.suppress(OSError):
        sock.shutdown(rng.randrange(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_images_do_no_harm(family: str) -> None:
    rng = random.Random(f"{SEED} {family}")  # noqa: S311
    ours, peer = pair(family)
    peer.sendall(b"x" * 3000)
    wait_for(lambda: len(ours.recv(3000, socket.MSG_PEEK)) == 3000)
    ours.send(b"y" * 100)
    restored = refused = 0
    with Device() as device:
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        peer.close()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or refused <= 50 or restored <= 5:
            assert time.monotonic() < end + 60, (
                f"{restored} accepted, {refused} refused: too little for a test"
            )
            copy = new_socket(family)
            flags = rng.choice((0, ACTIVATE, ACTIVATE | RESET_PATH, ACTIVATE | TRANSPARENT))
            try:
                made = device.restore(copy, mutated(image, rng), flags)
                restored += 1
            except Refused as error:
                assert error.errno in EXPECTED, error
                refused += 1
            else:
                if not flags & ACTIVATE:
                    device.decide(rng.choice(("activate", "discard")), made.id)
            if not rng.randrange(4):
                use(copy, rng)
            copy.close()


def other_states(device: Device) -> dict[str, bytes]:
    """Images by name; their originals are closed, and so are the peers."""
    made: dict[str, bytes] = {}

    def add(name: str, sock: socket.socket) -> None:
        with held(sock) if state_of(sock) in (ESTABLISHED, CLOSE_WAIT) else contextlib.nullcontext():
            with frozen(device, sock) as (freeze, image):
                device.commit(freeze)
            sock.close()
        made[name] = image

    ours, peer = pair()
    peer.sendall(b"x" * 3000)
    peer.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(ours) == CLOSE_WAIT)
    add("close-wait", ours)
    ours, peer = pair()
    peer.sendall(b"x" * 100)
    with frozen(device, peer) as (freeze, image):
        device.abort(freeze)
    inject(images.decode(image), 500, b"e" * 3000)
    wait_for(lambda: b"e" * 3000 in preview(device, ours))
    add("out-of-order", ours)
    ours, peer = pair()
    peer.sendall(b"ab")
    peer.send(b"!", socket.MSG_OOB)
    wait_for(lambda: len(ours.recv(3, socket.MSG_PEEK)) == 2)
    add("urgent", ours)
    server = new_socket("ipv4")
    server.bind(("127.0.0.1", 0))
    server.listen()
    add("listening", server)
    server = new_socket("ipv4")
    server.bind(("127.0.0.1", 0))
    server.listen()
    caller = new_socket("ipv4")
    caller.setblocking(False)
    port = server.getsockname()[1]
    with nat_client.opened() as nat:
        nat.add(nat_client.Flow(Endpoint(IPv4Address("127.0.0.1"), port), None, nat_client.Flag.HOLD))
        with contextlib.suppress(BlockingIOError):
            caller.connect(("127.0.0.1", port))
        add("syn-sent", caller)
    return made


def preview(device: Device, sock: socket.socket) -> bytes:
    """The image of a socket that goes on."""
    with frozen(device, sock) as (freeze, image):
        device.abort(freeze)
        return image


def own_end(sock: socket.socket) -> End:
    """An IPv4 socket's local one."""
    host, port = sock.getsockname()
    address = bytes(10) + b"\xff\xff" + socket.inet_aton(host)
    return End(address=(ctypes.c_uint8 * 16)(*address), port=port)


def test_mutated_images_of_other_states_do_no_harm() -> None:
    """Through RESTORE, the import lists and DELIVER."""
    rng = random.Random(f"{SEED} states")  # noqa: S311
    outcomes: Counter[tuple[str, bool]] = Counter()
    with Device() as device, new_socket("ipv4") as server:
        states = other_states(device)
        server.bind(("127.0.0.1", 0))
        server.listen(4)
        server.setblocking(False)
        end = time.monotonic() + 2 * SECONDS
        while time.monotonic() < end or sum(outcomes.values()) < 100:
            name, image = rng.choice(list(states.items()))
            given = mutated(image, rng) if rng.randrange(8) else image
            with new_socket("ipv4") as copy:
                way = rng.choice(("restore", "import", "deliver"))
                try:
                    if way == "restore":
                        device.restore(copy, given, ACTIVATE | TRANSPARENT)
                    elif way == "deliver":
                        device.deliver(given, local=own_end(server))
                        server.accept()[0].close()
                    else:
                        entry = device.list_add(given)
                        lists = ListName.LISTENING if name == "listening" else ListName.CONNECTED
                        if device.take(Request(fd=copy.fileno(), list=lists))[0] == 0:
                            device.decide("remove", entry.id)
                    outcomes[way, True] += 1
                except (Refused, BlockingIOError):
                    outcomes[way, False] += 1
                if not rng.randrange(4):
                    use(copy, rng)
    for way in ("restore", "import"):
        assert outcomes[way, True], outcomes
        assert outcomes[way, False], outcomes


def test_any_ioctl_with_any_argument_is_survived() -> None:
    rng = random.Random(SEED)  # noqa: S311
    device = Device()
    numbers = [number(name) for name in ORDINALS if name not in ("import",)]
    end = time.monotonic() + SECONDS
    calls = 0
    while time.monotonic() < end:
        for _turn in range(200):
            size = rng.choice((0, 4, 8, 16, 24, 64, 100, 136, 256))
            ordinal = rng.choice((rng.choice(numbers) & 0xFF, rng.randrange(0x64)))
            if ordinal == 0x36:
                continue
            argument = bytearray(
                b"".join(
                    struct.pack("=I", rng.choice((*ABSURD, rng.getrandbits(32), *range(8))))
                    for _turn in range(70)
                )
            )
            code = rng.choice((3, 3, 3, 1)) << 30 | size << 16 | MAGIC << 8 | ordinal
            with contextlib.suppress(OSError):
                fcntl.ioctl(device.fd, code, argument)
            calls += 1
    device.close()
    assert calls > 1000


def test_newer_and_older_callers() -> None:
    """A longer struct is taken if the rest is zero; a shorter one counts as zero beyond its end."""
    with Device(slots=0) as device:
        for rest, expected in ((bytes(8), 0), (b"\0\0\0\0\1\0\0\0", errno.E2BIG)):
            argument = bytearray(bytes(Decision(id=77)) + rest)
            code = 3 << 30 | len(argument) << 16 | MAGIC << 8 | 0x14
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(device.fd, code, argument)
            assert caught.value.errno == (expected or errno.ENOENT)
        argument = bytearray(struct.pack("=Q", 77))
        with pytest.raises(OSError) as caught:
            fcntl.ioctl(device.fd, 3 << 30 | 8 << 16 | MAGIC << 8 | 0x14, argument)
        assert caught.value.errno == errno.ENOENT


def test_bad_pointers_are_said() -> None:
    ours, _peer = pair()
    with Device() as device:
        sock = new_socket("ipv4")
        with pytest.raises(Refused) as caught:
            device.call("restore", Restore(fd=sock.fileno(), slot=NO_SLOT, image=8, bytes=4096))
        assert caught.value.errno == errno.EFAULT
        with pytest.raises(Refused) as caught:
            device.call("restore", Restore(fd=sock.fileno(), slot=NO_SLOT, image=8, bytes=1 << 40))
        assert caught.value.errno == errno.EBADMSG
        claim = device.claim(ours)
        with pytest.raises(Refused) as caught:
            device.call("freeze", Freeze(id=claim.id, slot=99))
        assert caught.value.errno == errno.ENXIO


def test_slots_are_bounded() -> None:
    device = Device(slots=0)
    for count, size, expected in (
        (0, 4096, errno.EINVAL),
        (65, 4096, errno.EINVAL),
        (1, 0, errno.EINVAL),
        (1, (64 << 20) + 1, errno.EINVAL),
        (64, 64 << 20, errno.EDQUOT),
    ):
        with pytest.raises(Refused) as caught:
            device.call("slots", Slots(kind=1, count=count, bytes=size))
        assert caught.value.errno == expected, (count, size)
    device.call("slots", Slots(kind=1, count=1, bytes=100))
    with pytest.raises(Refused) as caught:
        device.call("slots", Slots(kind=1, count=1, bytes=100))
    assert caught.value.errno == errno.EBUSY
    for offset, length in (
        (0, 4096),
        (1 << 40, 8192),
        ((1 << 40) + 4096, 4096),
        (2 << 40, 4096),
        (3 << 40, 4096),
    ):
        with pytest.raises((OSError, ValueError)):
            mmap.mmap(device.fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
    device.close()


def test_a_signal_with_a_handler_does_not_interrupt_the_making_of_slots() -> None:
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_unused: came.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        while len(came) < 50:
            Device(slots=1, slot_bytes=16 << 20).close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.processors(2)
def test_an_import_slot_is_copied_once() -> None:
    """A writer that changes the slot while it is read gets at most a refusal."""
    ours, peer = pair()
    with Device() as device:
        made = device.call("slots", Slots(kind=2, count=1, bytes=65536))
        memory = mmap.mmap(device.fd, made.bytes, offset=made.offset)
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        memory[: len(image)] = image
        stop = threading.Event()

        def scribble() -> None:
            rng = random.Random(SEED)  # noqa: S311
            while not stop.is_set():
                at = rng.randrange(len(image))
                memory[at] = rng.randrange(256)
                memory[at] = image[at]

        thread = threading.Thread(target=scribble, daemon=True)
        thread.start()
        copy = new_socket("ipv4")
        for _turn in range(300):
            try:
                device.call("restore", Restore(fd=copy.fileno(), slot=0, bytes=len(image), flags=ACTIVATE))
                break
            except Refused as error:
                assert error.refusal == Refusal.IMAGE
        stop.set()
        thread.join()
        memory[: len(image)] = image
        if copy.getsockname()[1] == 0:
            device.call("restore", Restore(fd=copy.fileno(), slot=0, bytes=len(image), flags=ACTIVATE))
        peer.sendall(b"fine")
        assert read_exactly(copy, 4) == b"fine"
        memory.close()


def attempt(device: Device, name: str, freeze: Freeze, outcomes: list[int]) -> None:
    """Decide, and note the errno, or 0."""
    try:
        device.call(name, Decision(id=freeze.id, epoch=freeze.epoch))
        outcomes.append(0)
    except Refused as error:
        outcomes.append(error.errno or 0)


@pytest.mark.processors(2)
def test_two_threads_decide_at_once() -> None:
    """Commit, abort, release and the deadline race; exactly one of them decides."""
    for turn in range(60):
        ours, peer = pair()
        with Device() as device:
            claim = device.claim(ours)
            freeze = device.freeze(claim, deadline_ms=1 + turn % 5)
            outcomes: list[int] = []
            threads = [
                threading.Thread(target=attempt, args=(device, name, freeze, outcomes))
                for name in ("commit", "abort", "commit")
            ]
            for thread in threads:
                thread.start()
            join_all(*threads)
            assert outcomes.count(0) <= 1
            assert len(outcomes) == len(threads)
            assert set(outcomes) <= {0, errno.EBUSY, errno.ETIMEDOUT}
            device.decide("release", claim.id)
        if ours.getsockname()[1]:
            peer.sendall(b"x")
            assert read_exactly(ours, 1) == b"x"
        ours.close()
        peer.close()


def killed(child: int) -> bool:
    """Has it been killed and is gone?"""
    pid, status = os.waitpid(child, os.WNOHANG)
    return pid == child and os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_a_killed_daemon_thaws_all_that_it_held() -> None:
    """At once, not at the deadline."""
    pairs = [pair() for _turn in range(20)]
    ready, frozen_all = os.pipe()
    child = os.fork()
    if child == 0:
        device = Device(slot_bytes=65536)
        for ours, _peer in pairs:
            device.freeze(device.claim(ours), deadline_ms=5000)
        os.write(frozen_all, b"x")
        signal.pause()
    os.close(frozen_all)
    assert os.read(ready, 1) == b"x"
    started = time.monotonic()
    os.kill(child, signal.SIGKILL)
    for ours, peer in pairs:
        peer.sendall(b"x")
        assert read_exactly(ours, 1) == b"x"
    assert time.monotonic() - started < 2
    wait_for(lambda: killed(child))
    os.close(ready)


@pytest.mark.parametrize("decision", ["abort", "commit"])
def test_an_owner_is_killed_while_its_socket_is_frozen(decision: str) -> None:
    """It ends when that is decided: after an abort the peer sees its FIN, after a commit nothing."""
    ours, peer = pair()
    ready, reading = os.pipe()
    child = os.fork()
    if child == 0:
        peer.close()
        os.write(reading, b"x")
        ours.recv(1)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    with Device() as device:
        claim = device.claim(ours.fileno(), pid=child)
        ours.close()
        time.sleep(0.2)  # it is in recv() by now
        freeze = device.freeze(claim, deadline_ms=5000)
        os.kill(child, signal.SIGKILL)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended though its socket is frozen"
        getattr(device, decision)(freeze)
        device.release(claim)
        wait_for(lambda: killed(child))
    os.close(ready)
    os.close(reading)
    if decision == "abort":
        peer.settimeout(5)
        assert peer.recv(1) == b""
    else:
        peer.settimeout(0.5)
        with pytest.raises(TimeoutError):
            peer.recv(1)


def test_requests_of_import_are_checked() -> None:
    with Device(slots=0) as device:
        sock = new_socket("ipv4")
        for request in (
            Request(fd=sock.fileno(), list=0),
            Request(fd=sock.fileno(), list=4),
            Request(fd=sock.fileno(), list=1, local_prefix=129),
            Request(fd=sock.fileno(), list=1, flags=1),
            Request(fd=-1, list=1),
        ):
            with pytest.raises(Refused) as caught:
                device.take(request)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(Refused) as caught:
            device.take(Request(fd=device.fd, list=1))
        assert caught.value.errno == errno.ENOTSOCK


def started_as_user(work: Callable[[], int]) -> int:
    """A process of nobody's, in user and network namespaces of his own, that ends as ``work`` returns."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgid(65534)
            os.setuid(65534)
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET):
                os._exit(98)
            code = work()
        finally:
            os._exit(code)
    return child


def test_users_leave_memory_to_the_host_s_daemon() -> None:
    parameters = Path("/sys/module/sockmi/parameters")
    limits = {parameters / "memory_max_mb": "8", parameters / "memory_users_max_mb": "4"}
    before = {path: path.read_text() for path in limits}
    for path, value in limits.items():
        path.write_text(value)
    ready, done = os.pipe(), os.pipe()

    def take() -> int:
        code = 96
        kept = [Device(slots=1, slot_bytes=1 << 20) for _turn in range(4)]
        try:
            kept.append(Device(slots=1, slot_bytes=1 << 20))
        except Refused as refused:
            code = refused.errno or 97
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        return code

    child = started_as_user(take)
    try:
        assert select.select([ready[0]], [], [], 10)[0]
        mine = [Device(slots=1, slot_bytes=1 << 20) for _turn in range(4)]
        with pytest.raises(Refused) as caught:
            Device(slots=1, slot_bytes=1 << 20)
        assert caught.value.errno == errno.EDQUOT
        for device in mine:
            device.close()
    finally:
        for path, value in before.items():
            path.write_text(value)
        os.write(done[1], b"x")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for descriptor in (*ready, *done):
            os.close(descriptor)
    assert status == errno.EDQUOT


@pytest.mark.parametrize("allowed", [False, True])
def test_users_keep_no_socket_locked(allowed: bool) -> None:
    """They could keep RTNL with that: a setsockopt() of IP_ADD_MEMBERSHIP waits for the socket and has it."""
    parameter = Path("/sys/module/sockmi/parameters/users_may_hold")
    with socket.socket() as sock, Device() as device, frozen(device, sock) as (_freeze, image):
        pass
    assert parameter.read_text() == "0\n"
    parameter.write_text("1" if allowed else "0")
    child = started_as_user(lambda: _held_by_a_user(image))
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0b1111 if allowed else 0b1000)
    finally:
        parameter.write_text("0")


def _held_by_a_user(image: bytes) -> int:
    """Which he may: FREEZE; RESTORE, dormant; the daemon the engine; RESTORE, activated at once."""
    done = 0
    with Device() as device, socket.socket() as sock:
        try:
            with frozen(device, sock):
                done |= 1
        except Refused as refused:
            assert refused.errno == errno.EPERM
    for flags, bit in ((0, 2), (ACTIVATE, 8)):
        with Device() as device, socket.socket() as sock:
            try:
                device.restore(sock, image, flags)
                done |= bit
            except Refused as refused:
                assert refused.errno == errno.EPERM
    try:
        KernelEngine(RepairEngine(inject_mark=1)).close()
        done |= 4
    except ModuleMissing as missing:
        assert "users_may_hold" in str(missing)
    return done


def test_events_take_of_the_module_s_memory() -> None:
    limit = Path("/sys/module/sockmi/parameters/memory_max_mb")
    before = limit.read_text()
    with Device(slots=0) as device, socket.socket() as copy:
        device.serve()
        request = Request(fd=copy.fileno(), list=ListName.CONNECTED)
        limit.write_text("0")
        try:
            device.take(request, timeout_ms=1)
        finally:
            limit.write_text(before)
        device.take(request, timeout_ms=1)
        (event,) = device.events()
        assert (event.type, event.lost) == (EventType.WAITING, 1)


def test_the_module_s_memory_is_bounded() -> None:
    ours, _peer = pair()
    with Device() as device:
        with frozen(device, ours) as (freeze, image):
            device.abort(freeze)
        limit = Path("/sys/module/sockmi/parameters/memory_max_mb")
        before = limit.read_text()
        limit.write_text("0")
        try:
            with pytest.raises(Refused) as caught:
                device.list_add(image, flags=PUBLISH)
            assert caught.value.errno == errno.EDQUOT
        finally:
            limit.write_text(before)
        images.decode(image)
