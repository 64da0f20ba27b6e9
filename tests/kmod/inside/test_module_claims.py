# SPDX-License-Identifier: MIT
"""Who has a socket, for how long, and what becomes of one that is closed meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import device, join_all, new_socket, pair, read_exactly, wait_for
from tests.kmod.module_client import (
    ACTIVATE,
    COMMIT_OWNED,
    COMMIT_SETTLED,
    NO_SLOT,
    Decision,
    Device,
    Event,
    EventType,
    ExportState,
    Refusal,
    Refused,
    Restore,
    frozen,
)

__all__ = ["device"]

LIFETIME_MS = 100
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
USERFAULTFD_X86_64 = 323


def lingering(sock: socket.socket, seconds: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, seconds))


def fill(sock: socket.socket) -> int:
    """Bytes that it took until the peer's window was shut and its own buffer full."""
    sock.setblocking(False)
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += sock.send(b"q" * 65536)
    return taken


def claim_ended(device: Device) -> None:
    assert device.events()[0].type == EventType.CLAIM_ENDED


# ---- One at a time ----


def test_a_dormant_socket_cannot_be_claimed(device: Device) -> None:
    """Its FREEZE would wait for the lock that the dormant copy holds."""
    ours, peer = pair()
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    copy = new_socket("ipv4")
    dormant = device.restore(copy, image, 0)
    with pytest.raises(Refused) as caught:
        device.claim(copy)
    assert (caught.value.errno, caught.value.refusal) == (errno.EBUSY, Refusal.BUSY)
    device.decide("activate", dormant.id)
    device.release(device.claim(copy))
    peer.sendall(b"free")
    assert read_exactly(copy, 4) == b"free"


def test_nothing_is_restored_into_a_claimed_socket(device: Device) -> None:
    ours, _peer = pair()
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    copy = new_socket("ipv4")
    claim = device.claim(copy)
    with pytest.raises(Refused) as caught:
        device.restore(copy, image)
    assert (caught.value.errno, caught.value.refusal) == (errno.EBUSY, Refusal.BUSY)
    device.release(claim)
    device.restore(copy, image)


# ---- Closed while it is claimed ----


def test_a_lingering_socket_holds_up_nobody(device: Device) -> None:
    """Its last close is the claim's end: there, nobody waits for a peer that does not read."""
    stuck, deaf = pair()
    lingering(stuck, 100_000)
    sent = fill(stuck)
    device.claim(stuck, lifetime_ms=LIFETIME_MS)
    stuck.close()
    claim_ended(device)
    other, peer = pair()
    device.claim(other, lifetime_ms=LIFETIME_MS)
    other.close()
    claim_ended(device)
    peer.settimeout(3)
    assert peer.recv(1) == b""
    # What was queued goes on as after any close.
    assert len(read_exactly(deaf, sent)) == sent
    assert deaf.recv(1) == b""


def test_an_abortive_close_is_one_at_the_claim_s_end_too(device: Device) -> None:
    ours, peer = pair()
    lingering(ours, 0)
    device.claim(ours, lifetime_ms=LIFETIME_MS)
    ours.close()
    claim_ended(device)
    peer.settimeout(3)
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_a_commit_sees_that_the_owner_has_closed(device: Device) -> None:
    """The caller's descriptor is the last one: it stays frozen, and its end goes out afterwards."""
    owners, peer = pair()
    ours = owners.dup()
    with frozen(device, ours) as (freeze, _image):
        owners.close()
        with pytest.raises(Refused) as caught:
            device.commit(freeze, COMMIT_OWNED)
        assert caught.value.errno == errno.EBADF
        assert device.info(freeze).state == ExportState.FROZEN
        ours.close()
    peer.settimeout(3)
    assert peer.recv(1) == b""


def test_a_commit_counts_a_descriptor_on_its_way(device: Device) -> None:
    """Its owner has passed it on, and nobody has received it yet."""
    owners, _peer = pair()
    ours = owners.dup()
    near, far = socket.socketpair()
    with near, far, frozen(device, ours) as (freeze, _image):
        socket.send_fds(near, [b"x"], [owners.fileno()])
        owners.close()
        device.commit(freeze, COMMIT_OWNED)
        assert device.info(freeze).state == ExportState.COMMITTED
        [passed] = socket.recv_fds(far, 1, 1)[1]
        with socket.socket(fileno=passed) as dead, pytest.raises(ConnectionAbortedError):
            dead.recv(1)


def test_only_a_commit_asks_for_owners(device: Device) -> None:
    ours, _peer = pair()
    with frozen(device, ours) as (freeze, _image):
        with pytest.raises(Refused) as caught:
            device.call("abort", Decision(id=freeze.id, epoch=freeze.epoch, flags=COMMIT_OWNED))
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(Refused) as caught:
            device.commit(freeze, COMMIT_SETTLED << 1)
        assert caught.value.errno == errno.EINVAL
        device.abort(freeze)


def half_open() -> tuple[socket.socket, socket.socket]:
    """A listener, and a client whose handshake with it ends when it sends something: TCP_DEFER_ACCEPT."""
    listener = new_socket("ipv4")
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    client = new_socket("ipv4")
    client.connect(listener.getsockname())
    return listener, client


def test_a_commit_can_wait_for_handshakes(device: Device) -> None:
    """Refused while one is half done; that goes on, frozen or not, and then the listener moves."""
    listener, client = half_open()
    with frozen(device, listener) as (freeze, _image):
        with pytest.raises(Refused) as caught:
            device.commit(freeze, COMMIT_SETTLED)
        assert caught.value.errno == errno.EAGAIN
        assert device.info(freeze).state == ExportState.FROZEN
        client.sendall(b"here")
        device.abort(freeze)
    listener.settimeout(3)
    child, _address = listener.accept()
    with frozen(device, listener) as (freeze, _image):
        device.commit(freeze, COMMIT_SETTLED)
        assert device.info(freeze).state == ExportState.COMMITTED
    assert read_exactly(child, 4) == b"here"
    child.sendall(b"still")
    assert read_exactly(client, 5) == b"still"


def test_a_handshake_that_a_listener_leaves_behind_is_reset(device: Device) -> None:
    """What the flag is for: without it nobody waits."""
    listener, client = half_open()
    with frozen(device, listener) as (freeze, _image):
        device.commit(freeze)
    client.sendall(b"here")
    client.settimeout(3)
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_commit_of_a_connection_has_no_handshakes_to_wait_for(device: Device) -> None:
    ours, _peer = pair()
    with frozen(device, ours) as (freeze, _image):
        device.commit(freeze, COMMIT_SETTLED)


# ---- Kept busy ----


@contextlib.contextmanager
def missing_page() -> Iterator[tuple[mmap.mmap, int, int]]:
    """(memory, its address, descriptor): who reads it waits in the kernel until the page is given."""
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(USERFAULTFD_X86_64, os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(descriptor, UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
    fcntl.ioctl(descriptor, UFFDIO_REGISTER, struct.pack("=QQQQ", address, mmap.PAGESIZE, 1, 0))
    try:
        yield memory, address, descriptor
    finally:
        give_page(address, descriptor)
        os.close(descriptor)


def give_page(address: int, descriptor: int) -> None:
    with contextlib.suppress(FileExistsError):
        fcntl.ioctl(descriptor, UFFDIO_ZEROPAGE, struct.pack("=QQQq", address, mmap.PAGESIZE, 0, 0))


@pytest.mark.kernels("6.*", "7.*")
def test_a_freeze_gives_up_on_a_socket_that_is_kept_busy(device: Device) -> None:
    """A sender that waits for a page has the socket's lock. Who freezes does nothing else meanwhile."""
    ours, peer = pair()
    with missing_page() as (_memory, address, descriptor):
        sender = threading.Thread(
            target=ctypes.CDLL(None).send, args=(ours.fileno(), ctypes.c_void_p(address), 100, 0)
        )
        sender.start()
        time.sleep(0.2)
        claim = device.claim(ours, lifetime_ms=100)
        started = time.monotonic()
        with pytest.raises(Refused) as caught:
            device.freeze(claim, deadline_ms=5000)
        assert (caught.value.errno, caught.value.refusal) == (errno.EBUSY, Refusal.LOCKED)
        assert 0.2 < time.monotonic() - started < 3
        claim_ended(device)
        give_page(address, descriptor)
        join_all(sender)
    assert read_exactly(peer, 100) == bytes(100)


@pytest.mark.kernels("6.*", "7.*")
def test_freezes_that_wait_stop_no_deadline() -> None:
    """More of them than the module has workers."""
    count = 300
    with contextlib.ExitStack() as stack:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, max(limits[1], 4096)))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        _memory, address, descriptor = stack.enter_context(missing_page())
        busy = [pair() for _turn in range(count)]
        device = stack.enter_context(Device())
        devices = [stack.enter_context(Device(slots=1, slot_bytes=65536)) for _turn in range(count)]
        send = ctypes.CDLL(None).send
        threads = [
            threading.Thread(target=send, args=(ours.fileno(), ctypes.c_void_p(address), 100, 0))
            for ours, _peer in busy
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)

        stop = threading.Event()

        def freeze(mine: Device, sock: socket.socket) -> None:
            while not stop.is_set():
                with contextlib.suppress(Refused):
                    mine.freeze(mine.claim(sock, lifetime_ms=50), deadline_ms=5000)

        freezers = [
            threading.Thread(target=freeze, args=(mine, ours))
            for mine, (ours, _peer) in zip(devices, busy, strict=True)
        ]
        for thread in freezers:
            thread.start()
        time.sleep(1)
        ours, peer = pair()
        device.freeze(device.claim(ours), deadline_ms=100)
        peer.sendall(b"x")
        started = time.monotonic()
        assert read_exactly(ours, 1) == b"x"
        assert time.monotonic() - started < 3
        stop.set()
        give_page(address, descriptor)
        join_all(*threads, *freezers, seconds=20)


def unread(device: Device) -> list[Event]:
    """The events that wait now."""
    os.set_blocking(device.fd, False)
    found: list[Event] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found += device.events()
    return found


@pytest.mark.kernels("6.*")  # not tried in 7.2
@pytest.mark.processors(2)
@pytest.mark.slow
def test_discards_that_wait_stop_no_deadline(device: Device) -> None:
    """Whoever sends into a dormant copy gets its lock when it is discarded, and keeps it with a missing page.

    On one processor and with priority they are there before the discard has put its options back.
    """
    count, workers, deadline_s = 400, 256, 12
    with frozen(device, new_socket("ipv4")) as (_freeze, image):
        pass
    memory = ctypes.create_string_buffer(image, len(image))
    sendto = ctypes.CDLL(None).sendto
    settings = {
        Path("/proc/sys/net/ipv4/tcp_fastopen"): "5",  # data in a SYN, no cookie: read under the lock
        Path("/sys/devices/virtual/workqueue/cpumask"): "1",
    }
    with contextlib.ExitStack() as stack:
        for setting, value in settings.items():
            stack.callback(setting.write_text, setting.read_text())
            setting.write_text(value)
        _memory, address, descriptor = stack.enter_context(missing_page())
        listener = stack.enter_context(new_socket("ipv4"))
        listener.bind(("127.0.0.1", 0))
        listener.listen(count)
        to = struct.pack("=H", socket.AF_INET) + struct.pack(
            "!H4s8x", listener.getsockname()[1], socket.inet_aton("127.0.0.1")
        )
        mine = stack.enter_context(Device(slots=0))
        copies = [stack.enter_context(new_socket("ipv4")) for _turn in range(count)]

        def send(sock: socket.socket) -> None:
            os.sched_setaffinity(0, {0})
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            sendto(sock.fileno(), ctypes.c_void_p(address), 100, socket.MSG_FASTOPEN, to, len(to))

        senders = [threading.Thread(target=send, args=(copy,)) for copy in copies]
        began = time.monotonic()
        for copy in copies:
            mine.call(
                "restore",
                Restore(
                    fd=copy.fileno(), slot=NO_SLOT, image=ctypes.addressof(memory), bytes=len(image),
                    deadline_ms=deadline_s * 1000,
                ),
            )  # fmt: skip
        stack.callback(give_page, address, descriptor)  # first of all: else nothing of this could be closed
        for sender in senders:
            sender.start()
        time.sleep(max(began + deadline_s + 2 - time.monotonic(), 0))
        assert len(unread(mine)) <= count - workers
        ours, peer = pair()
        device.freeze(device.claim(ours), deadline_ms=100)
        peer.sendall(b"x")
        started = time.monotonic()
        assert read_exactly(ours, 1) == b"x"
        assert time.monotonic() - started < 3
        give_page(address, descriptor)
        join_all(*senders, seconds=20)


# ---- Deadlines ----


@pytest.mark.processors(2)
def test_dormant_copies_are_decided_as_soon_as_they_are_known(device: Device) -> None:
    """One thread restores, another discards what it can guess: no deadline is left behind."""
    ours, peer = pair()
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    peer.close()
    stop = threading.Event()
    known: list[int] = [0]

    def guess() -> None:
        while not stop.is_set():
            with contextlib.suppress(Refused):
                device.decide("discard", known[0] + 1)

    thread = threading.Thread(target=guess)
    thread.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        copy = new_socket("ipv4")
        known[0] = device.restore(copy, image, 0).id
        with contextlib.suppress(Refused):
            device.decide("discard", known[0])
        copy.close()
    stop.set()
    join_all(thread)
    copy = new_socket("ipv4")
    device.restore(copy, image, ACTIVATE)
    wait_for(lambda: copy.getsockname()[1] != 0)
