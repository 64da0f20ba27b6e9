# SPDX-License-Identifier: MIT
"""Network namespaces have import lists of their own, which end with them; sockets of two are not mixed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod import forked
from tests.kmod.inside.test_module_core import new_socket, pair, wait_for
from tests.kmod.module_client import ANY_UID, PUBLISH, Device, ListName, Refusal, Refused, Request, frozen

CLONE_NEWNET = 0x40000000
REFCNT = Path("/sys/module/sockmi/refcnt")
EXPORT = Path("/proc/sys/sockmi/export")


@pytest.fixture
def image() -> bytes:
    """Of a connection that lives on."""
    ours, _peer = pair()
    with Device() as device, frozen(device, ours) as (freeze, made):
        device.abort(freeze)
        return made


@contextlib.contextmanager
def elsewhere(action: Callable[[socket.socket], None]) -> Iterator[tuple[int, socket.socket]]:
    """``action`` in a process with a network namespace of its own, and a socket to us; its pid, our end."""

    def act(theirs: socket.socket) -> None:
        assert not ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET)
        action(theirs)

    child, ours = forked.start(act, 20)
    try:
        yield child, ours
    finally:
        forked.end(child, ours)


def count(device: Device) -> int:
    return int(device.list_info(ListName.CONNECTED).entries)


def wanted(sock: socket.socket) -> Request:
    return Request(fd=sock.fileno(), list=ListName.CONNECTED)


def test_an_entry_is_seen_in_its_namespace_alone(image: bytes) -> None:
    def look(parent: socket.socket) -> None:
        with Device(slots=0) as device:
            assert count(device) == 0
            sock = new_socket("ipv4")
            assert device.take(wanted(sock))[0] == 0
            mine = device.list_add(image, flags=ANY_UID | PUBLISH)
            assert count(device) == 1
            parent.sendall(b"x")
            assert parent.recv(1) == b"x"
            device.decide("remove", mine.id)

    with Device(slots=0) as device:
        here = device.list_add(image, flags=ANY_UID | PUBLISH)
        with elsewhere(look) as (_child, talk):
            assert talk.recv(1) == b"x"
            assert count(device) == 1
            device.decide("remove", here.id)
            assert count(device) == 0
            talk.sendall(b"x")


def test_sockets_of_two_namespaces_are_not_mixed() -> None:
    """IMPORT serves those of one; the sysctl of one exports nothing of another."""

    def lend(parent: socket.socket) -> None:
        sock = new_socket("ipv4")
        socket.send_fds(parent, [str(sock.fileno()).encode()], [sock.fileno()])
        parent.recv(1)

    with elsewhere(lend) as (child, talk), Device(slots=0) as device:
        number, (borrowed,), _flags, _address = socket.recv_fds(talk, 16, 1)
        own = new_socket("ipv4")
        with socket.socket(fileno=borrowed) as foreign, pytest.raises(Refused) as caught:
            device.take(wanted(own), wanted(foreign))
        assert caught.value.errno == errno.EXDEV
        with pytest.raises(OSError) as refused:
            EXPORT.write_text(f"pid={child} fd={int(number)}")
        assert refused.value.errno == errno.EXDEV
        assert f"reason {int(Refusal.NAMESPACE)}" in EXPORT.read_text()


def test_published_entries_end_with_their_namespace(image: bytes) -> None:
    """They keep the module loaded, but no longer than there is somebody who could want them."""

    def publish(parent: socket.socket) -> None:
        with Device(slots=0) as device:
            for _turn in range(3):
                device.list_add(image, flags=ANY_UID | PUBLISH)
        parent.sendall(b"x")
        parent.recv(1)

    before = int(REFCNT.read_text())
    with elsewhere(publish) as (_child, talk):
        assert talk.recv(1) == b"x"
        assert int(REFCNT.read_text()) == before + 3
    wait_for(lambda: int(REFCNT.read_text()) == before, 30)


def test_each_namespace_finds_its_own_sysctls() -> None:
    """Though another's have just been looked at by the same mount of /proc."""
    file = Path("/proc/sys/sockmi/max_bound")
    before = file.read_text()
    try:
        file.write_text("7")
        look = f"cat {file}; echo 5 > {file}; cat {file}"
        other = subprocess.check_output(["unshare", "-n", "sh", "-c", look], text=True)
        assert other.split() == [before.strip(), "5"]
        assert file.read_text() == "7\n"
    finally:
        file.write_text(before)
