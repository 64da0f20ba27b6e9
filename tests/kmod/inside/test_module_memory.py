# SPDX-License-Identifier: MIT
"""Every allocation of every call fails once: an error, no leak, no oops, and the connection lives on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import FAMILIES, held, new_socket, pair, read_exactly
from tests.kmod.module_client import (
    ANY_UID,
    DEVICE,
    PUBLISH,
    Device,
    Freeze,
    ListName,
    Refused,
    Request,
    Restore,
    Slots,
    frozen,
)

pytestmark = [
    pytest.mark.kernels("uml-6.1-debug"),
    pytest.mark.complains("kmemleak: Cannot allocate a scan area"),
]
EXPECTED = (
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.EDQUOT,
    errno.EADDRINUSE,  # a port's bucket could not be allocated
    errno.EADDRNOTAVAIL,  # nor a route
    errno.EFAULT,  # the debug kernel's injector fails accesses to user memory too
)


@pytest.fixture(scope="module", autouse=True)
def sleeping_allocations_fail_too() -> Iterator[None]:
    """By default only those that must not wait do."""
    switches = [Path(f"/sys/kernel/debug/{kind}/ignore-gfp-wait") for kind in ("failslab", "fail_page_alloc")]
    before = {switch: switch.read_text() for switch in switches if switch.exists()}
    for switch in before:
        switch.write_text("N")
    yield
    for switch, value in before.items():
        switch.write_text(value)


class Injector:
    """The task's own fault injection: its nth fault point fails."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)

    def arm(self, nth: int) -> None:
        os.pwrite(self.fd, b"%d" % nth, 0)

    def disarm(self) -> bool:
        """Whether it has failed something. The file's own calls have fault points too."""
        try:
            failed = os.pread(self.fd, 16, 0).strip() == b"0"
        except OSError:
            failed = False
        while True:
            try:
                os.pwrite(self.fd, b"0", 0)
            except OSError:
                continue
            return failed


def each_failing(call: Callable[[], object], undo: Callable[[object], object] = lambda _unused: None) -> int:
    """``call`` with its 1st, 2nd ... fault point failing, until none is left; ``undo`` what succeeded."""
    injector = Injector()
    for nth in range(1, 1000):
        made: object = None
        injector.arm(nth)
        try:
            made = call()
        except OSError as error:
            assert error.errno in EXPECTED, error
        finally:
            failed = injector.disarm()
        if made is not None:
            undo(made)
        if not failed:
            os.close(injector.fd)
            return nth - 1
    pytest.fail("more than 1000 fault points")


def test_opening_and_slots() -> None:
    assert each_failing(lambda: os.open(DEVICE, os.O_RDWR), os.close) > 0  # type: ignore[arg-type]
    injector, count = Injector(), 0
    for nth in range(1, 100):
        with Device(slots=0) as device:
            injector.arm(nth)
            try:
                device.call("slots", Slots(kind=1, count=2, bytes=8192))
            except Refused as error:
                assert error.errno in EXPECTED
                count += 1
            finally:
                failed = injector.disarm()
        if not failed:
            break
    assert count > 2


def test_claim_and_freeze() -> None:
    ours, peer = pair()
    peer.sendall(b"x" * 1000)
    with Device() as device:
        assert each_failing(lambda: device.claim(ours), device.release) >= 2  # type: ignore[arg-type]
        claim = device.claim(ours)

        def freeze() -> Freeze:
            try:
                return device.freeze(claim, deadline_ms=100)
            except Refused as error:
                if error.errno == errno.EFAULT:
                    time.sleep(0.2)  # frozen, but the caller could not be told: the deadline mends it
                raise

        each_failing(freeze, device.abort)  # type: ignore[arg-type]
        device.release(claim)
    assert read_exactly(ours, 1000) == b"x" * 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_restore(family: str) -> None:
    ours, peer = pair(family)
    peer.sendall(b"x" * 30000)
    ours.setblocking(False)
    ours.send(b"y" * 30000)
    with Device() as device:
        with held(ours):
            with frozen(device, ours) as (freeze, image):
                device.commit(freeze)
            copy = new_socket(family)

            def restore() -> Restore:
                return device.restore(copy, image, flags=0)

            def discard(made: object) -> None:
                device.decide("discard", made.id)  # type: ignore[attr-defined]

            assert each_failing(restore, discard) > 5
            made = device.restore(copy, image, flags=0)
        device.decide("activate", made.id)
        assert read_exactly(copy, 30000) == b"x" * 30000
        assert read_exactly(peer, 30000) == b"y" * 30000


def test_lists() -> None:
    ours, peer = pair()
    with Device() as device:
        with held(ours):
            with frozen(device, ours) as (freeze, image):
                device.commit(freeze)

            def remove(entry: object) -> None:
                device.decide("remove", entry.id)  # type: ignore[attr-defined]

            assert each_failing(lambda: device.list_add(image, flags=ANY_UID), remove) >= 2
            copy = new_socket("ipv4")
            device.list_add(image, flags=ANY_UID | PUBLISH)

            def take() -> bool | None:
                count, (request,) = device.take(Request(fd=copy.fileno(), list=ListName.CONNECTED))
                if request.result < 0:
                    raise Refused(-request.result, "import", request)
                return count == 1 or None

            def put_back(_unused: object) -> None:
                with frozen(device, copy) as (again, _image):
                    device.commit(again)
                device.list_add(image, flags=ANY_UID | PUBLISH)

            # A result that cannot be told leaves the socket imported; then take() finds nothing more, or
            # what the last of them has put back is still there.
            assert each_failing(take, put_back) >= 2
            copy2 = new_socket("ipv4")
            with contextlib.suppress(OSError), frozen(device, copy) as (again, _image):
                device.commit(again)
            if device.list_info(ListName.CONNECTED).entries == 0:
                device.list_add(image, flags=ANY_UID | PUBLISH)
            assert device.take(Request(fd=copy2.fileno(), list=ListName.CONNECTED))[0] == 1
        peer.sendall(b"alive")
        assert read_exactly(copy2, 5) == b"alive"
    assert copy2.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@pytest.mark.complains("sockmi.export:")
def test_an_export_by_the_sysctl() -> None:
    """The request, the export, its claim: if one cannot be had, nothing is left of the others."""
    ours, peer = pair()
    wait_ms = Path("/sys/module/sockmi/parameters/sysctl_wait_ms")
    before = wait_ms.read_text()
    command = f"pid={os.getpid()} fd={ours.fileno()}".encode()
    sysctl = os.open("/proc/sys/sockmi/export", os.O_WRONLY)
    injector = Injector()
    told = Counter[int]()
    wait_ms.write_text("50")
    try:
        with Device() as device:
            device.serve()
            for nth in range(1, 100):
                injector.arm(nth)
                error = 0
                try:
                    os.pwrite(sysctl, command, 0)
                except OSError as caught:
                    error = caught.errno or 0
                failed = injector.disarm()
                told[error] += 1
                device.release(device.claim(ours))
                if not failed:
                    break
    finally:
        wait_ms.write_text(before)
        os.close(sysctl)
        os.close(injector.fd)
    # Nobody has moved it; and if the event was lost, the daemon has heard of nothing.
    assert set(told) <= {*EXPECTED, errno.ETIMEDOUT, errno.EBUSY}
    assert told[errno.ENOMEM] >= 3 and told[errno.ETIMEDOUT], told
    peer.sendall(b"alive")
    assert read_exactly(ours, 5) == b"alive"


def test_a_listener_is_imported_or_not() -> None:
    """With SO_REUSEPORT it is listen() that allocates, after bind()."""
    listener = new_socket("ipv4")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    name = listener.getsockname()
    with Device() as device:
        with frozen(device, listener) as (freeze, image):
            device.commit(freeze)
        listener.close()
        copy = new_socket("ipv4")
        device.list_add(image, flags=ANY_UID | PUBLISH)

        def take() -> bool | None:
            count, (request,) = device.take(Request(fd=copy.fileno(), list=ListName.LISTENING))
            if request.result < 0:
                assert copy.getsockname()[1] == 0
                assert not copy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
                raise Refused(-request.result, "import", request)
            return count == 1 or None

        assert each_failing(take) >= 2
        client = socket.create_connection(name)
        child, _unused = copy.accept()
        client.sendall(b"x")
        assert read_exactly(child, 1) == b"x"


@pytest.mark.parametrize("family", FAMILIES)
def test_delivery(family: str) -> None:
    """Of what the call itself allocates; the socket is made by a worker, see the next test."""
    with Device() as device:
        server = new_socket(family)
        server.bind(({"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "::ffff:127.0.0.1"}[family], 0))
        server.listen()
        peer = new_socket(family)
        peer.connect(server.getsockname())
        ours, _unused = server.accept()
        peer.sendall(b"x" * 1000)
        ours.sendall(b"y" * 1000)
        time.sleep(0.05)

        with held(ours):
            with frozen(device, ours) as (freeze, image):
                device.commit(freeze)

            def again(_unused: object) -> None:
                copy, _unused = server.accept()
                with frozen(device, copy) as (freeze, _image):
                    device.commit(freeze)
                copy.close()

            assert each_failing(lambda: device.deliver(image), again) > 5
            # It waits there if the last fault was that its result could not be told.
            with contextlib.suppress(Refused):
                device.deliver(image)
            server.setblocking(False)
            copy, _unused = server.accept()
            with pytest.raises(BlockingIOError):
                server.accept()
        assert read_exactly(copy, 1000) == b"x" * 1000
        assert read_exactly(peer, 1000) == b"y" * 1000


def test_the_worker_that_makes_a_delivered_socket_has_no_memory() -> None:
    stat = Path("/sys/kernel/debug/failslab")
    module = Path("/sys/module/sockmi/sections/.text")
    start = int(module.read_text(), 16)
    settings = {
        "require-start": f"{start:#x}",
        "require-end": f"{start + (1 << 20):#x}",
        "stacktrace-depth": "32",
        "task-filter": "N",
        "verbose": "0",
        "interval": "1",
        "probability": "100",
    }
    before = {name: (stat / name).read_text().strip() for name in settings}
    with Device() as device:
        server = new_socket("ipv4")
        server.bind(("127.0.0.1", 0))
        server.listen()
        peer = socket.create_connection(server.getsockname())
        ours, _unused = server.accept()
        with held(ours):
            with frozen(device, ours) as (freeze, image):
                device.commit(freeze)
            failures = set()
            try:
                for name, value in settings.items():
                    if name != "probability":
                        (stat / name).write_text(value)
                # "space": bytes that are still allocated before the first failure.
                for space in range(0, 40000, 512):
                    (stat / "space").write_text(str(space))
                    (stat / "times").write_text("1")
                    (stat / "probability").write_text("100")
                    try:
                        device.deliver(image)
                    except Refused as error:
                        failures.add(error.errno)
                    else:
                        break
                    finally:
                        (stat / "probability").write_text("0")
            finally:
                (stat / "times").write_text("-1")
                (stat / "space").write_text("0")
                for name, value in before.items():
                    with contextlib.suppress(OSError):
                        (stat / name).write_text(value)
            assert failures
            assert failures <= set(EXPECTED)
            server.settimeout(5)
            try:
                copy, _unused = server.accept()
            except TimeoutError:
                device.deliver(image)
                copy, _unused = server.accept()
        peer.sendall(b"x")
        assert read_exactly(copy, 1) == b"x"
