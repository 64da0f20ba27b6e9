# SPDX-License-Identifier: MIT
"""Options of the socket that an image comes into: the image's after a restore, its own after a failed one."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from sockmi import image as images
from tests.kmod.inside.test_module_core import held, move, new_socket, pair, wait_for
from tests.kmod.module_client import ACTIVATE, Device, ListName, Refusal, Refused, Request, Restore, frozen
from tests.lab.test_engine_options import GENERAL, INET, INET6, INET_ONLY, KERNEL_LEAVES, Table, read

SOL, TCP, IP = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP
#: Not of the image's options: foreign addresses are the caller's to allow.
CALLERS = {"IP_FREEBIND", "IP_TRANSPARENT", "IPV6_FREEBIND", "IPV6_TRANSPARENT"}
#: What the caller has chosen before the image came.
OWN: Table = [
    ("SO_KEEPALIVE", SOL, 9, (1).to_bytes(4, "little")),
    ("SO_LINGER", SOL, 13, (1).to_bytes(4, "little") + (3).to_bytes(4, "little")),
    ("SO_RCVBUF", SOL, 8, (77_000).to_bytes(4, "little")),
    ("TCP_KEEPIDLE", TCP, 4, (321).to_bytes(4, "little")),
    ("IP_TOS", IP, 1, (0x20).to_bytes(4, "little")),
    ("IP_RECVTTL", IP, 12, (1).to_bytes(4, "little")),
]


def table(family: str) -> Table:
    rows = GENERAL + (INET + INET_ONLY if family == "ipv4" else INET6 + (INET if family == "mapped" else []))
    return [row for row in rows if row[0] not in KERNEL_LEAVES]


def set_all(sock: socket.socket, rows: Table) -> int:
    """What this kernel has of them; how many."""
    done = 0
    for _name, level, option, value in rows:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
            done += 1
    return done


def values(sock: socket.socket, rows: Table) -> dict[str, bytes | None]:
    found = {name: read(sock, level, option) for name, level, option, _value in rows}
    # An interface of the moment, and the default that a closed socket tells.
    return {name: value for name, value in found.items() if name not in CALLERS}


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made


@contextlib.contextmanager
def committed(device: Device, family: str) -> Iterator[bytes]:
    """The image of a connection with every option set, which is nowhere now."""
    ours, peer = pair(family)
    with held(ours):
        assert set_all(ours, table(family)) > 30
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        yield image
    # The option's own 17 seconds are for a connection.
    ours.setsockopt(SOL, socket.SO_LINGER, bytes(8))
    ours.close()
    peer.close()


def target(family: str) -> tuple[socket.socket, dict[str, bytes | None]]:
    """A caller's socket with options of its own."""
    sock = new_socket(family)
    set_all(sock, OWN)
    return sock, values(sock, table(family))


@pytest.mark.parametrize("family", ["ipv4", "ipv6", "mapped"])
def test_a_discarded_restore_leaves_the_socket_s_own_options(device: Device, family: str) -> None:
    with committed(device, family) as image:
        sock, before = target(family)
        made = device.restore(sock, image, flags=0)
        device.decide("discard", made.id)
        assert values(sock, table(family)) == before
        # And the next image finds nothing of the one before.
        sock.bind(("", 0))
        sock.listen()


def test_a_restore_that_was_not_decided_in_time_leaves_them_too(device: Device) -> None:
    with committed(device, "ipv4") as image:
        sock, before = target("ipv4")
        argument, memory = argument_of(sock, image)
        argument.deadline_ms = 50
        device.call("restore", argument)
        wait_for(lambda: bool(device.events()))
        wait_for(lambda: values(sock, table("ipv4")) == before)
        del memory


@pytest.mark.parametrize("family", ["ipv4", "ipv6", "mapped"])
def test_a_failed_restore_leaves_the_socket_s_own_options(device: Device, family: str) -> None:
    """It fails late: after the options have been set."""
    with committed(device, family) as image:
        first = new_socket(family)
        device.decide("activate", device.restore(first, image, flags=0).id)
        sock, before = target(family)
        with pytest.raises(Refused) as caught:
            device.restore(sock, image, flags=0)
        assert caught.value.refusal == Refusal.TUPLE_TAKEN
        assert caught.value.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
        assert values(sock, table(family)) == before
        first.setsockopt(SOL, socket.SO_LINGER, bytes(8))
        first.close()


@pytest.mark.parametrize("family", ["ipv4", "ipv6", "mapped"])
def test_options_are_the_image_s_whatever_was_there(device: Device, family: str) -> None:
    """An image with no option set, into a socket with all."""
    ours, peer = pair(family)
    fresh = values(ours, table(family))
    with held(ours), frozen(device, ours) as (freeze, image):
        device.commit(freeze)
        sock = new_socket(family)
        assert set_all(sock, table(family)) > 30
        made = device.restore(sock, image, flags=ACTIVATE)
    assert made.lost == 0
    now = values(sock, table(family))
    assert {name for name in fresh if fresh[name] != now[name]} == set()
    peer.close()


def test_an_import_does_not_see_the_image_before(device: Device) -> None:
    """The paper's own call: into the same descriptor, one after the other, the first with every option."""
    with committed(device, "ipv4") as image:
        sock = new_socket("ipv4")
        device.decide("discard", device.restore(sock, image, flags=0).id)
    ours, peer = pair("ipv4")
    fresh = values(ours, table("ipv4"))
    with held(ours), frozen(device, ours) as (freeze, second):
        device.commit(freeze)
        device.list_add(second)
        _count, (request,) = device.take(Request(fd=sock.fileno(), list=ListName.CONNECTED))
        assert request.result == 1, Refusal(request.refusal)
    now = values(sock, table("ipv4"))
    assert {name for name in fresh if fresh[name] != now[name]} == set()
    assert not images.decode(second).fidelity
    peer.close()


def argument_of(sock: socket.socket, image: bytes) -> tuple[Restore, object]:
    """RESTORE's argument, and the memory it points to."""
    import ctypes

    from tests.kmod.module_client import NO_SLOT

    memory = ctypes.create_string_buffer(image, len(image))
    argument = Restore(fd=sock.fileno(), slot=NO_SLOT, image=ctypes.addressof(memory), bytes=len(image))
    return argument, memory


@pytest.mark.parametrize("option", [20, 21], ids=["receive", "send"])  # SO_RCVTIMEO, SO_SNDTIMEO
def test_a_timeout_longer_than_an_image_can_say(device: Device, option: int) -> None:
    """It moves as the longest; modulo 2^64 these microseconds would be half a second."""
    ours, peer = pair()
    ours.setsockopt(SOL, option, struct.pack("qq", 18_446_744_073_710, 0))
    copy = move(device, ours, "ipv4")
    seconds, _unused = struct.unpack("qq", copy.getsockopt(SOL, option, 16))
    assert seconds == (2**63 - 1) // 10**6
    copy.close()
    peer.close()
