# SPDX-License-Identifier: MIT
"""Import lists, events: what applications and daemons use beside single moves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint
from tests.kmod.inside.test_module_core import join_all, new_socket, pair, read_exactly, wait_for
from tests.kmod.module_client import (
    ANY_UID,
    NO_SLOT,
    ORDINALS,
    PUBLISH,
    Claim,
    Decision,
    Deliver,
    Device,
    EventType,
    ExportInfo,
    Freeze,
    ListAdd,
    ListInfo,
    ListName,
    ListNext,
    Match,
    Refusal,
    Refused,
    Request,
    Restore,
    Slots,
    frozen,
)
from tests.kmod.module_mover import packed

SYSCTL = Path("/proc/sys/sockmi")
NOBODY = 65534
WAITERS_MAX = 64  # SOCKMI_WAITERS_MAX


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made
        after = 0
        for name in ListName:
            while True:
                try:
                    after = made.call("list_next", ListNext(list=name)).id
                except Refused:
                    break
                made.decide("remove", after)


def captured(device: Device, sock: socket.socket) -> bytes:
    """The image; the original is closed."""
    with frozen(device, sock) as (freeze, image):
        device.commit(freeze)
        return image


def of_each_kind(device: Device) -> dict[ListName, bytes]:
    """An image for each list."""
    bound, listener = socket.socket(), socket.socket()
    for sock in (bound, listener):
        sock.bind(("127.0.0.1", 0))
    listener.listen()
    connected, _peer = pair()
    return {
        name: captured(device, sock)
        for name, sock in zip(ListName, (bound, listener, connected), strict=True)
    }


def wanted(sock: socket.socket, name: ListName = ListName.CONNECTED, **criteria: int) -> Request:
    return Request(fd=sock.fileno(), list=name, **criteria)


# ---- Lists ----


def test_an_entry_is_imported_once_it_is_published(device: Device) -> None:
    ours, peer = pair()
    entry = device.list_add(captured(device, ours), flags=ANY_UID)
    copy = new_socket("ipv4")
    assert device.take(wanted(copy))[0] == 0
    info = device.list_info(ListName.CONNECTED)
    assert (info.entries, info.reserved) == (0, 1)
    device.decide("publish", entry.id)
    count, (request,) = device.take(wanted(copy))
    assert (count, request.result, request.id) == (1, 1, entry.id)
    peer.sendall(b"here")
    assert read_exactly(copy, 4) == b"here"
    info = device.list_info(ListName.CONNECTED)
    assert (info.entries, info.reserved) == (0, 0)


def test_a_waiting_import_wakes_up(device: Device) -> None:
    ours, peer = pair()
    copy = new_socket("ipv4")
    results: list[tuple[int, list[Request]]] = []
    thread = threading.Thread(target=lambda: results.append(device.take(wanted(copy), timeout_ms=-1)))
    thread.start()
    wait_for(lambda: device.list_info(ListName.CONNECTED).waiting == 1)
    match = Match(family=socket.AF_INET, kind=3, state=1, flags=ANY_UID)
    assert device.call("match", match).waiting == 1
    device.list_add(captured(device, ours))
    join_all(thread)
    assert results[0][0] == 1
    assert device.list_info(ListName.CONNECTED).waiting == 0
    copy.sendall(b"woken")
    assert read_exactly(peer, 5) == b"woken"


def test_import_gives_up_after_its_timeout(device: Device) -> None:
    started = time.monotonic()
    copy = new_socket("ipv4")
    assert device.take(wanted(copy), timeout_ms=200)[0] == 0
    assert 0.15 < time.monotonic() - started < 2


def test_a_signal_ends_an_import_that_waits(device: Device) -> None:
    copy = new_socket("ipv4")

    def stop(*_unused: object) -> None:
        raise KeyboardInterrupt  # else Python would call again

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            device.take(wanted(copy), timeout_ms=-1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert device.list_info(ListName.CONNECTED).waiting == 0
    # The socket is still good for the next.
    ours, peer = pair()
    device.list_add(captured(device, ours))
    assert device.take(wanted(copy))[0] == 1
    peer.sendall(b"1")
    assert read_exactly(copy, 1) == b"1"


def test_criteria_choose(device: Device) -> None:
    first, _peer1 = pair()
    second, _peer2 = pair()
    port = second.getsockname()[1]
    for sock in (first, second):
        device.list_add(captured(device, sock))
    request = wanted(copy := new_socket("ipv4"))
    request.local.port = port
    assert device.take(request)[0] == 1
    assert copy.getsockname()[1] == port
    # No IPv6 connection, no listener, no other state.
    other = new_socket("ipv4")
    assert device.take(wanted(other, states=1 << 8))[0] == 0
    assert device.take(wanted(other, ListName.LISTENING))[0] == 0
    request = wanted(other, remote_prefix=104)
    request.remote.address[10:13] = [0xFF, 0xFF, 10]
    assert device.take(request)[0] == 0
    request.remote.address[12] = 127
    assert device.take(request)[0] == 1


@pytest.mark.parametrize(("first", "second"), [("ipv4", "ipv6"), ("ipv6", "ipv4")])
def test_entries_of_another_family_are_in_nobody_s_way(device: Device, first: str, second: str) -> None:
    ours, _peer = pair(first)
    device.list_add(captured(device, ours))
    copy = new_socket(second)
    count, (request,) = device.take(wanted(copy), timeout_ms=10)
    assert (count, request.result) == (0, 0), "it waits, as if there were none"
    ours, peer = pair(second)
    device.list_add(captured(device, ours))
    assert device.take(wanted(copy))[0] == 1
    peer.sendall(b"1")
    assert read_exactly(copy, 1) == b"1"
    assert device.list_info(ListName.CONNECTED).entries == 1


def test_who_waits_is_told_by_family(device: Device) -> None:
    copy = new_socket("ipv4")
    waiter = threading.Thread(target=device.take, args=[wanted(copy)], kwargs={"timeout_ms": 30_000})
    waiter.start()
    wait_for(lambda: device.list_info(ListName.CONNECTED).waiting == 1)

    def waiting(family: int) -> int:
        return int(device.call("match", Match(family=family, kind=3, state=1)).waiting)

    assert [waiting(family) for family in (socket.AF_INET, socket.AF_INET6, 0)] == [1, 0, 1]
    ours, _peer = pair()
    device.list_add(captured(device, ours))
    join_all(waiter)


def test_an_entry_whose_address_is_not_here_is_left_for_others(device: Device) -> None:
    ours, _peer = pair()
    device.list_add(captured(device, ours), local=packed(Endpoint(ip_address("192.0.2.77"), 80)))
    copy = new_socket("ipv4")
    count, (request,) = device.take(wanted(copy))
    assert (count, request.result, request.refusal) == (0, -errno.EADDRNOTAVAIL, Refusal.ADDRESS)
    ours, peer = pair()
    device.list_add(captured(device, ours))
    count, (request,) = device.take(wanted(copy))
    assert (count, request.result, request.refusal) == (1, 1, 0)
    peer.sendall(b"1")
    assert read_exactly(copy, 1) == b"1"
    assert device.list_info(ListName.CONNECTED).entries == 1


def test_the_calls_of_a_user_that_wait_are_bounded() -> None:
    def wait() -> int:
        errors: list[int] = []
        mine, sockets = Device(slots=0), [new_socket("ipv4") for _turn in range(WAITERS_MAX + 1)]

        def take(sock: socket.socket) -> None:
            try:
                mine.take(wanted(sock), timeout_ms=-1)
            except Refused as refused:
                errors.append(refused.errno or 0)

        for sock in sockets:
            threading.Thread(target=take, args=[sock]).start()
        wait_for(lambda: bool(errors), 20)
        time.sleep(0.5)  # it stays the only one
        return errors[0] if len(errors) == 1 else 0

    assert as_nobody(wait) == errno.EBUSY


@pytest.mark.parametrize("name", ListName, ids=[name.name.lower() for name in ListName])
def test_each_list_has_a_maximum(device: Device, name: ListName) -> None:
    """A full one says so; the others have room."""
    images = of_each_kind(device)
    maximum = SYSCTL / f"max_{name.name.lower()}"
    before = maximum.read_text()
    maximum.write_text("2")
    try:
        for _turn in range(2):
            device.list_add(images[name])
        with pytest.raises(Refused) as caught:
            device.list_add(images[name])
        assert (caught.value.errno, caught.value.refusal) == (errno.ENOSPC, Refusal.LIST_FULL)
        info = device.list_info(name)
        assert (info.max, info.entries) == (2, 2)
        for other in set(ListName) - {name}:
            device.list_add(images[other])
    finally:
        maximum.write_text(before)


@pytest.mark.parametrize("name", ["max_bound", "max_listening", "max_connected"])
def test_a_maximum_is_bounded(name: str) -> None:
    """Lists are walked under a lock, and a namespace's root sets its maxima."""
    before = (SYSCTL / name).read_text()
    try:
        (SYSCTL / name).write_text("16384")
        with pytest.raises(OSError, match="Invalid argument"):
            (SYSCTL / name).write_text("16385")
        assert int((SYSCTL / name).read_text()) == 16384
    finally:
        (SYSCTL / name).write_text(before)


def test_the_three_kinds_have_lists_of_their_own(device: Device) -> None:
    bound, listener = socket.socket(), socket.socket()
    bound.bind(("127.0.0.1", 0))
    listener.bind(("127.0.0.1", 0))
    name = listener.getsockname()
    listener.listen(5)
    for sock in (bound, listener):
        device.list_add(captured(device, sock))
    assert [device.list_info(each).entries for each in ListName] == [1, 1, 0]
    copies = [new_socket("ipv4"), new_socket("ipv4")]
    count, requests = device.take(wanted(copies[0], ListName.BOUND), wanted(copies[1], ListName.LISTENING))
    assert count == 2, [request.result for request in requests]
    socket.create_connection(name).close()
    copies[1].accept()


def test_a_walk_goes_on_when_its_last_entry_is_gone(device: Device) -> None:
    ours, _peer = pair()
    image = captured(device, ours)
    ids = [device.list_add(image).id for _turn in range(3)]
    first = device.call("list_next", ListNext(list=ListName.CONNECTED)).id
    device.decide("remove", first)
    rest = [device.call("list_next", ListNext(list=ListName.CONNECTED, after=first)).id]
    rest.append(device.call("list_next", ListNext(list=ListName.CONNECTED, after=rest[0])).id)
    assert [first, *rest] == ids
    with pytest.raises(Refused) as caught:
        device.call("list_next", ListNext(list=ListName.CONNECTED, after=rest[1]))
    assert caught.value.errno == errno.ENOENT


def test_an_entry_that_an_import_tries_is_still_there(device: Device) -> None:
    """What comes of it is not known yet, so it can be neither removed nor called gone."""
    ours, peer = pair()
    image = captured(device, ours)
    copy = new_socket("ipv4")
    with Device() as holder:
        freeze = holder.freeze(holder.claim(copy), deadline_ms=3000)
        entry = device.list_add(image)
        results: list[tuple[int, list[Request]]] = []
        thread = threading.Thread(target=lambda: results.append(device.take(wanted(copy))))
        thread.start()
        time.sleep(0.2)
        with pytest.raises(Refused) as caught:
            device.decide("remove", entry.id)
        assert caught.value.errno == errno.EBUSY
        assert device.call("list_next", ListNext(list=ListName.CONNECTED)).id == entry.id
        assert device.list_info(ListName.CONNECTED).entries == 1
        with new_socket("ipv4") as other:
            assert device.take(wanted(other))[0] == 0
        holder.abort(freeze)
        join_all(thread)
    assert results[0][0] == 1
    with pytest.raises(Refused) as caught:
        device.decide("remove", entry.id)
    assert caught.value.errno == errno.ENOENT
    peer.sendall(b"1")
    assert read_exactly(copy, 1) == b"1"


@pytest.mark.processors(2)
def test_ids_are_those_of_the_entries_though_they_go_at_once(device: Device) -> None:
    """One thread removes what another has hardly added (KASAN, several processors: no use after free)."""
    ours, _peer = pair()
    image = captured(device, ours)
    made = [device.list_add(image).id]
    stop = threading.Event()

    def remove() -> None:
        while not stop.is_set():
            with contextlib.suppress(Refused):
                device.decide("remove", made[-1] + 1)

    thread = threading.Thread(target=remove)
    thread.start()
    for _turn in range(500):
        made.append(device.list_add(image).id)
        with contextlib.suppress(Refused):
            device.decide("remove", made[-1])
    stop.set()
    join_all(thread)
    assert made == list(range(made[0], made[0] + 501))


def test_reserved_entries_end_with_their_file_and_published_ones_do_not(device: Device) -> None:
    ours, _peer = pair()
    image = captured(device, ours)
    with Device(slots=0) as other:
        other.list_add(image, flags=ANY_UID)
        other.list_add(image, flags=ANY_UID | PUBLISH)
    info = device.list_info(ListName.CONNECTED)
    assert (info.entries, info.reserved) == (1, 0)


def as_nobody(action: object) -> int:
    """Exit code of a child without privileges that runs ``action``."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = action()  # type: ignore[operator]
        except OSError as error:
            code = error.errno or 98
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_entry_is_for_its_user(device: Device) -> None:
    ours, peer = pair()
    image = captured(device, ours)

    def take() -> int:
        with Device(slots=0) as mine:
            copy = new_socket("ipv4")
            if mine.take(wanted(copy))[0] == 0:
                return 1
            copy.sendall(b"mine")
        return 0

    device.list_add(image, flags=PUBLISH, uid=1000)
    assert as_nobody(take) == 1
    device.list_add(image, flags=PUBLISH, uid=NOBODY)
    assert as_nobody(take) == 0
    assert read_exactly(peer, 4) == b"mine"
    assert peer.recv(1) == b""


UNPRIVILEGED = {"hello", "import"}
OF_THE_FILE = {"commit", "abort", "release", "export_info", "activate", "discard"}
"""What is done with a claim or a copy: who has the device file decides; nobody else's has that id."""


@pytest.mark.parametrize("name", sorted(set(ORDINALS) - UNPRIVILEGED))
def test_the_unprivileged_may_do_nothing_else(device: Device, name: str) -> None:
    """Though their arguments are good, and what they name is there."""
    ours, _peer = pair()
    listener = socket.create_server(("127.0.0.1", 0))
    image = captured(device, ours)
    memory = ctypes.create_string_buffer(image, len(image))
    given = {"slot": NO_SLOT, "image": ctypes.addressof(memory), "bytes": len(image)}
    entry = device.list_add(image)
    claim = device.claim(listener)
    arguments = {
        "slots": Slots(kind=1, count=1, bytes=4096),
        "claim": Claim(fd=ours.fileno()),
        "restore": Restore(fd=ours.fileno(), **given),
        "deliver": Deliver(flags=ANY_UID, **given),
        "list_add": ListAdd(flags=ANY_UID, **given),
        "publish": Decision(id=entry.id),
        "remove": Decision(id=entry.id),
        "list_info": ListInfo(list=ListName.CONNECTED),
        "list_next": ListNext(list=ListName.CONNECTED),
        "match": Match(family=socket.AF_INET, kind=3, state=1),
        **dict.fromkeys(OF_THE_FILE, Decision(id=claim.id)),
        "freeze": Freeze(id=claim.id),
        "export_info": ExportInfo(id=claim.id),
    }

    def call() -> int:
        with Device(slots=0) as mine:
            mine.call(name, arguments.get(name, ORDINALS[name][1]()))
        return 0

    assert as_nobody(call) == (errno.ENOENT if name in OF_THE_FILE else errno.EPERM)
    assert device.list_info(ListName.CONNECTED).entries == 1
    device.release(claim)


def test_another_process_s_descriptors_are_not_for_the_unprivileged() -> None:
    def claim() -> int:
        with Device(slots=0) as mine:
            mine.claim(0, pid=os.getppid())
        return 0

    assert as_nobody(claim) == errno.EPERM


# ---- Events ----


def test_events_by_poll_and_by_signal(device: Device) -> None:
    ours, _peer = pair()
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _frame: got.append(number))
    fcntl.fcntl(device.fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(device.fd, 10, signal.SIGUSR1)  # F_SETSIG
    fcntl.fcntl(device.fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    with pytest.raises(BlockingIOError):
        device.events()
    poll = select.poll()
    poll.register(device.fd, select.POLLIN)
    assert poll.poll(0) == []
    claim = device.claim(ours)
    device.freeze(claim, deadline_ms=50)
    assert poll.poll(2000)
    wait_for(lambda: got == [signal.SIGUSR1])
    assert device.events()[0].type == EventType.THAWED
    device.release(claim)
