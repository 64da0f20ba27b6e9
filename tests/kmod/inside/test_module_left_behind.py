# SPDX-License-Identifier: MIT
"""What an image cannot have is named in its fidelity report, and only then; or the socket is refused."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

from tests.kmod.inside.test_module_core import held, move, new_socket, pair, read_exactly, tcp_info, wait_for
from tests.kmod.inside.test_module_exact import inject
from tests.kmod.inside.test_module_timers import APPROXIMATED, names
from tests.kmod.inside.test_module_windows import looked_at
from tests.kmod.inside.test_nat_kept import LIMIT
from tests.kmod.module_client import Device, Refusal, Refused
from tests.lab.test_preflight import MSG_ZEROCOPY, SO_ZEROCOPY, bpf, drain_errors

RESET = 3  # of docs/image.md, section 23
SO_ATTACH_REUSEPORT_CBPF = 51
BPF_MAP_CREATE, BPF_MAP_UPDATE, BPF_MAP_DELETE, BPF_BTF_LOAD = 0, 2, 3, 18
SK_STORAGE, NO_PREALLOC = 24, 1
URG = 0x20
IP_XFRM_POLICY, IPV6_XFRM_POLICY = 17, 35


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made


def listener() -> socket.socket:
    sock = new_socket("ipv4")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def test_the_program_of_a_reuseport_group(device: Device) -> None:
    """Before and after it is attached; the group's other socket has it too."""
    with listener() as ours, new_socket("ipv4") as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(ours.getsockname())
        other.listen()
        assert not looked_at(device, ours).fidelity
        first = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # return 0
        program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(first))
        ours.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
        for one in (ours, other):
            assert names(looked_at(device, one), RESET) == {"reuseport-program"}


def storage_map() -> int:
    """A map of BPF_MAP_TYPE_SK_STORAGE with a number for each socket, which wants a type for it."""
    types = struct.pack("=IIII", 1, 1 << 24, 4, 1 << 24 | 32)  # int, signed, 4 bytes
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), 5)
    btf = ctypes.create_string_buffer(header + types + b"\0int\0")
    described = bpf(BPF_BTF_LOAD, struct.pack("=QQIIII", ctypes.addressof(btf), 0, len(btf) - 1, 0, 0, 0))
    kind = struct.pack("=IIIII", SK_STORAGE, 4, 4, 0, NO_PREALLOC)
    made = bpf(BPF_MAP_CREATE, kind + bytes(28) + struct.pack("=III", described, 1, 1))
    os.close(described)
    return made


# Linux 7.2 stores nothing on a processor without cmpxchg16b, as the guests' is (ENOMEM of kmalloc_nolock()).
@pytest.mark.kernels("6.*", "uml-*")
def test_bpf_storage(device: Device) -> None:
    """As long as a program, or its loader, keeps something with the socket."""
    ours, peer = pair()
    storage = storage_map()
    try:
        key, value = (ctypes.c_uint32(number) for number in (ours.fileno(), 7))
        place = struct.pack("=I4xQ", storage, ctypes.addressof(key))
        assert not looked_at(device, ours).fidelity
        bpf(BPF_MAP_UPDATE, place + struct.pack("=Q", ctypes.addressof(value)))
        assert names(looked_at(device, ours), RESET) == {"bpf-storage"}
        bpf(BPF_MAP_DELETE, place)
        assert not looked_at(device, ours).fidelity
    finally:
        os.close(storage)
    for one in (ours, peer):
        one.close()


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """What a hold drops is lost."""
    before = LIMIT.read_text()
    LIMIT.write_text("0")
    try:
        yield
    finally:
        LIMIT.write_text(before)


@pytest.mark.parametrize(("algorithm", "told"), [("cubic", True), ("reno", False)])
def test_what_a_congestion_control_remembers(device: Device, algorithm: str, told: bool) -> None:
    """After a loss, when it has recovered: Reno is all in the window and the threshold."""
    ours, peer = pair()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
    assert not looked_at(device, ours).fidelity
    with held(peer), nothing_kept():
        ours.sendall(b"lost")
        wait_for(lambda: tcp_info(ours)["ca_state"] == 4, 20)  # TCP_CA_Loss
    wait_for(lambda: tcp_info(ours)["unacked"] == 0, 20)
    ours.sendall(b"more")
    wait_for(lambda: tcp_info(ours)["unacked"] == tcp_info(ours)["ca_state"] == 0, 20)
    image = looked_at(device, ours)
    assert image.path_model and image.path_model.ssthresh < 1 << 30
    assert names(image, APPROXIMATED) == ({"congestion-state"} if told else set())
    for one in (ours, peer):
        one.close()


@pytest.mark.parametrize(("algorithm", "told"), [("cubic", True), ("reno", False)])
def test_what_a_congestion_control_remembers_within_its_first_slow_start(
    device: Device, algorithm: str, told: bool
) -> None:
    """CUBIC has seen delays, by which it ends slow start before anything is lost."""
    ours, peer = pair()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
    assert not looked_at(device, ours).fidelity
    ours.sendall(b"x")
    assert read_exactly(peer, 1) == b"x"
    wait_for(lambda: tcp_info(ours)["unacked"] == 0)
    image = looked_at(device, ours)
    assert image.path_model and image.path_model.ssthresh >= 1 << 30
    assert names(image, APPROXIMATED) == ({"slow-start-state"} if told else set())
    for one in (ours, peer):
        one.close()


@pytest.mark.kernels("6.*", "7.*")  # the User-Mode-Linux kernel has no IPsec
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("direction", [0, 1])
def test_ipsec_policies_of_a_socket_stay(device: Device, family: str, direction: int) -> None:
    """The copy's packets would go out unencrypted."""
    subprocess.run(["modprobe", "xfrm_user"], check=True, timeout=60)
    ours, peer = pair(family)
    version = socket.AF_INET if family == "ipv4" else socket.AF_INET6
    selector = bytes(40) + struct.pack("=H", version) + bytes(14)
    unlimited = struct.pack("=4Q", *[(1 << 64) - 1] * 4) + bytes(32)
    allow = selector + unlimited + bytes(32) + struct.pack("=IIBBBB4x", 0, 0, direction, 0, 0, 0)
    level, option = (
        (socket.IPPROTO_IP, IP_XFRM_POLICY) if family == "ipv4" else (socket.IPPROTO_IPV6, IPV6_XFRM_POLICY)
    )
    device.release(device.claim(ours))
    ours.setsockopt(level, option, allow)
    with pytest.raises(Refused) as caught:
        device.claim(ours)
    assert caught.value.refusal == Refusal.IPSEC
    ours.setsockopt(level, option, None, 0)
    assert not looked_at(device, ours).fidelity
    for one in (ours, peer):
        one.close()


def refusal(device: Device, sock: socket.socket) -> Refusal | None:
    """Of claim or freeze, after which it goes on; None: it could move now."""
    try:
        looked_at(device, sock)
    except Refused as refused:
        return refused.refusal
    return None


def test_an_urgent_byte_that_overtook_others(device: Device) -> None:
    """The image has no place for its mark until it is in order; without it the copy would read it in line."""
    ours, peer = pair()
    stream = b"in order, !urgent"
    at = stream.index(b"!")
    state = looked_at(device, peer)
    inject(state, at, stream[at:], URG, urgent=1)
    wait_for(lambda: refusal(device, ours) == Refusal.URGENT)
    assert ours.recv(1, socket.MSG_OOB) == b"!"
    assert refusal(device, ours) == Refusal.URGENT, "read, but not to be read again"
    inject(state, 0, stream[:at])
    assert read_exactly(ours, at) == stream[:at]
    assert refusal(device, ours) is None
    copy = move(device, ours, "ipv4")
    assert read_exactly(copy, 6) == stream[at + 1 :]
    for one in (copy, ours, peer):
        one.close()


def test_a_byte_that_came_before_its_mark(device: Device) -> None:
    """Linux then skips it without ever having it; so would not the copy."""
    ours, peer = pair()
    state = looked_at(device, peer)
    inject(state, 4, b"4567")
    inject(state, 0, b"0", URG, urgent=6)  # the mark: 5
    inject(state, 1, b"123")
    wait_for(lambda: refusal(device, ours) == Refusal.URGENT)
    assert read_exactly(ours, 5) + read_exactly(ours, 2) == b"0123467"
    assert refusal(device, ours) is None
    for one in (ours, peer):
        one.close()


def test_sends_from_the_owner_s_memory(device: Device) -> None:
    """Under way, and until he has read that they are over; then it moves."""
    ours, peer = pair()
    ours.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    assert not looked_at(device, ours).fidelity, "allowed, but nothing is under way"
    data = bytes(range(256)) * 64
    with held(peer):
        assert ours.send(data, MSG_ZEROCOPY) == len(data)
        assert refusal(device, ours) == Refusal.ZEROCOPY
    assert read_exactly(peer, len(data)) == data
    wait_for(lambda: tcp_info(ours)["unacked"] == 0)
    assert refusal(device, ours) == Refusal.ZEROCOPY, "over, but he has not read it"
    wait_for(lambda: drain_errors(ours) and refusal(device, ours) is None)
    assert names(looked_at(device, ours), RESET) == {"zerocopy-count"}
    copy = move(device, ours, "ipv4")
    copy.sendall(b"on")
    assert read_exactly(peer, 2) == b"on"
    for one in (copy, ours, peer):
        one.close()
