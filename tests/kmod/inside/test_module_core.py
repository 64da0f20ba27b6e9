# SPDX-License-Identifier: MIT
"""Freeze, thaw, commit, restore on one host; held by the NAT helper where packets could meet no socket."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from sockmi import image as images
from sockmi.addresses import Endpoint, FourTuple
from sockmi.image.sections import Image, Ktls
from sockmi.image.words import NegotiatedFlag, TimestampUnit
from tests.kmod import nat_client
from tests.kmod.module_client import (
    ACTIVATE,
    NO_SLOT,
    Device,
    EventType,
    ExportState,
    Freeze,
    Refusal,
    Refused,
    Restore,
    frozen,
)
from tests.lab.redirect_lab import run

FAMILIES = ("ipv4", "ipv6", "mapped")
ESTABLISHED, SYN_SENT, FIN_WAIT_1, FIN_WAIT_2, TIME_WAIT = 1, 2, 4, 5, 6
CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 7, 8, 9, 10, 11

KEPT_MAX = Path("/sys/module/sockmi/parameters/nat_kept_max_mb")


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made


def new_socket(family: str) -> socket.socket:
    """As the importer makes it."""
    sock = socket.socket(socket.AF_INET if family == "ipv4" else socket.AF_INET6, socket.SOCK_STREAM)
    if family != "ipv4":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return sock


def pair(family: str = "ipv4") -> tuple[socket.socket, socket.socket]:
    """(ours, the peer's): an established connection over loopback."""
    address = {"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "::ffff:127.0.0.1"}[family]
    listener = new_socket(family)
    listener.bind((address, 0))
    listener.listen()
    peer = new_socket(family)
    peer.connect(listener.getsockname())
    ours, _unused = listener.accept()
    listener.close()
    return ours, peer


def tcp_info(sock: socket.socket) -> dict[str, int]:
    """What TCP_INFO says, by its offsets."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 240)

    def word(at: int) -> int:
        return int(struct.unpack_from("=I", raw, at)[0])

    return {
        "state": raw[0],
        "ca_state": raw[1],
        "rto": word(8),
        "ato": word(12),
        "snd_mss": word(16),
        "rcv_mss": word(20),
        "unacked": word(24),
        "sacked": word(28),
        "retrans": word(36),
        "rcv_ssthresh": word(64),
        "rtt": word(68),
        "rttvar": word(72),
        "ssthresh": word(76),
        "cwnd": word(80),
        "advmss": word(84),
        "reordering": word(88),
        "rcv_space": word(96),
        "total_retrans": word(100),
        "bytes_acked": struct.unpack_from("=Q", raw, 120)[0],
        "bytes_received": struct.unpack_from("=Q", raw, 128)[0],
        "min_rtt": word(148),
    }


def state_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def wait_for(what: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def join_all(*threads: threading.Thread, seconds: float = 10) -> None:
    """All have to end; of those that do not, says where in the kernel they are."""
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    stuck = [thread for thread in threads if thread.is_alive()]
    stacks = [f"{thread.name}:\n{_kernel_stack(thread)}" for thread in stuck]
    assert not stuck, "\n".join(["these have not ended", *stacks])


def _kernel_stack(thread: threading.Thread) -> str:
    try:
        return Path(f"/proc/self/task/{thread.native_id}/stack").read_text()
    except OSError as error:
        return f"unknown: {error}"


def read_exactly(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(10)
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, f"the stream ended after {len(data)} of {length} bytes"
        data += part
    return data


def move(device: Device, sock: socket.socket, family: str, flags: int = 0) -> socket.socket:
    """Freeze, commit, restore into a new socket, activate; held where a packet would meet no socket."""
    copy = new_socket(family)
    with contextlib.ExitStack() as stack:
        if state_of(sock) not in (CLOSE, LISTEN):
            stack.enter_context(held(sock))
        freeze, image = stack.enter_context(frozen(device, sock))
        images.decode(image)
        device.commit(freeze)
        dormant = device.restore(copy, image, flags)
    if not flags & ACTIVATE:
        device.decide("activate", dormant.id)
    return copy


@contextlib.contextmanager
def held(sock: socket.socket, flags: nat_client.Flag = nat_client.Flag.HOLD) -> Iterator[None]:
    """What comes in for this socket waits, what it sends is lost; with MUTE its FINs and RSTs alone."""
    flow = nat_client.held(four_tuple(sock), flags)
    nat = nat_client.Nat()
    before = [one for one in nat.list() if (one.local, one.remote) == (flow.local, flow.remote)]
    nat.set(flow)
    try:
        yield
    finally:
        if before:
            nat.set(*before)
        else:
            nat.remove(flow)
        nat.close()


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """What a hold keeps otherwise is lost with it."""
    before = KEPT_MAX.read_text()
    KEPT_MAX.write_text("0")
    try:
        yield
    finally:
        KEPT_MAX.write_text(before)


# ---- The device ----


def test_hello_comes_first() -> None:
    device = Device(slots=0, greet=False)
    with pytest.raises(Refused) as caught:
        device.claim(0)
    assert caught.value.errno == errno.EPROTO
    with pytest.raises(Refused) as caught:
        device.hello(major=2)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert caught.value.argument.abi_major == 1
    assert device.hello().image_max_bytes == images.LIMIT_BYTES
    device.close()


def test_export_slots_cannot_be_written(device: Device) -> None:
    import mmap

    with pytest.raises(PermissionError):
        mmap.mmap(device.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=1 << 40)


# ---- Freeze ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_thaw_loses_nothing_and_costs_no_retransmission(device: Device, family: str) -> None:
    ours, peer = pair(family)
    peer.sendall(b"before")
    wait_for(lambda: len(ours.recv(100, socket.MSG_PEEK)) == 6)
    with frozen(device, ours, deadline_ms=2000) as (freeze, image):
        decoded = images.decode(image)
        assert bytes(decoded.receive_queue) == b"before"
        peer.sendall(b" and after")
        time.sleep(0.15)
        device.abort(freeze)
        assert read_exactly(ours, 16) == b"before and after"
    assert tcp_info(peer)["total_retrans"] == 0
    ours.sendall(b"answer")
    assert read_exactly(peer, 6) == b"answer"


def test_the_deadline_thaws_by_itself(device: Device) -> None:
    ours, peer = pair()
    claim = device.claim(ours)
    freeze = device.freeze(claim, deadline_ms=200)
    assert device.info(claim).state == ExportState.FROZEN
    peer.sendall(b"late")
    started = time.monotonic()
    assert ours.recv(10) == b"late"  # blocks for the rest of the freeze
    assert 0.1 < time.monotonic() - started < 1
    for decide in (device.commit, device.abort):
        with pytest.raises(Refused) as caught:
            decide(freeze)
        assert caught.value.errno == errno.ETIMEDOUT
    assert device.info(claim).timed_out == 1
    events = device.events()
    assert [(event.type, event.id) for event in events] == [(EventType.THAWED, claim.id)]
    assert device.freeze(claim).epoch == freeze.epoch + 1
    with pytest.raises(Refused) as caught:
        device.commit(freeze)
    assert caught.value.errno == errno.ESTALE
    device.release(claim)
    ours.sendall(b"alive")
    assert read_exactly(peer, 5) == b"alive"


def test_the_end_of_the_device_file_thaws() -> None:
    ours, peer = pair()
    device = Device()
    device.freeze(device.claim(ours), deadline_ms=5000)
    started = time.monotonic()
    device.close()
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"
    assert time.monotonic() - started < 2


def test_a_claim_ends_with_its_lifetime(device: Device) -> None:
    ours, _peer = pair()
    claim = device.claim(ours, lifetime_ms=100)
    with Device(slots=0) as other, pytest.raises(Refused) as caught:
        other.claim(ours)
    assert caught.value.refusal == Refusal.BUSY
    assert device.events()[0].type == EventType.CLAIM_ENDED
    with pytest.raises(Refused) as caught:
        device.freeze(claim)
    assert caught.value.errno == errno.ENOENT
    device.release(device.claim(ours))


def test_a_slot_that_is_too_small_is_said_with_the_size() -> None:
    ours, peer = pair()
    peer.sendall(bytes(65536))
    wait_for(lambda: len(ours.recv(65536, socket.MSG_PEEK)) == 65536)
    with Device(slot_bytes=4096) as device:
        claim = device.claim(ours)
        assert claim.bytes > 65536
        with pytest.raises(Refused) as caught:
            device.freeze(claim)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.argument.bytes > 65536
    assert len(read_exactly(ours, 65536)) == 65536


def test_the_owner_of_a_committed_socket_sees_it_end(device: Device) -> None:
    ours, peer = pair()
    blocked: list[object] = []

    def receive() -> None:
        try:
            blocked.append(ours.recv(1))
        except OSError as error:
            blocked.append(error.errno)

    thread = threading.Thread(target=receive)
    thread.start()
    time.sleep(0.1)
    with frozen(device, ours) as (freeze, _unused):
        device.commit(freeze)
        thread.join(2)
        assert blocked == [errno.ECONNABORTED]
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        assert poll.poll(0)[0][1] & select.POLLHUP
        with pytest.raises(OSError) as caught:
            ours.recv(1)
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(BrokenPipeError):
            ours.send(b"x")
    ours.close()
    # The peer has seen neither FIN nor RST.
    peer.setblocking(False)
    time.sleep(0.05)
    with pytest.raises(BlockingIOError):
        peer.recv(1)
    assert state_of(peer) == ESTABLISHED


# ---- Moves ----


@pytest.mark.parametrize("family", FAMILIES)
def test_an_established_connection_moves_with_its_queues(device: Device, family: str) -> None:
    ours, peer = pair(family)
    name = ours.getsockname()[:2], ours.getpeername()[:2]
    peer.sendall(b"unread" * 1000)
    wait_for(lambda: len(ours.recv(6000, socket.MSG_PEEK)) == 6000)
    copy = move(device, ours, family)
    assert (copy.getsockname()[:2], copy.getpeername()[:2]) == name
    assert read_exactly(copy, 6000) == b"unread" * 1000
    for _turn in range(3):
        copy.sendall(b"down" * 5000)
        assert read_exactly(peer, 20000) == b"down" * 5000
        peer.sendall(b"up" * 5000)
        assert read_exactly(copy, 10000) == b"up" * 5000
    copy.close()
    assert peer.recv(1) == b""


@pytest.mark.parametrize("family", FAMILIES)
def test_sent_and_unsent_data_moves(device: Device, family: str) -> None:
    ours, peer = pair(family)
    ours.setblocking(False)
    data = random.Random(family).randbytes(4_000_000)  # noqa: S311
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += ours.send(data[sent : sent + 100_000])
    assert sent > 100_000
    with Device(slot_bytes=8 << 20) as roomy:
        with frozen(roomy, ours) as (freeze, image):
            roomy.abort(freeze)
            assert len(images.decode(image).unsent_queue) > 0  # which takes its time
        copy = move(roomy, ours, family)
    copy.shutdown(socket.SHUT_WR)
    assert read_exactly(peer, sent) == data[:sent]
    assert peer.recv(1) == b""
    peer.sendall(b"thanks")
    assert read_exactly(copy, 6) == b"thanks"


def close_wait_unread(ours: socket.socket, peer: socket.socket) -> None:
    peer.sendall(b"last words")
    peer.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(ours) == CLOSE_WAIT)


def close_wait_fin_unread(ours: socket.socket, peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(ours) == CLOSE_WAIT)


def close_wait_read(ours: socket.socket, peer: socket.socket) -> None:
    close_wait_fin_unread(ours, peer)
    assert ours.recv(1) == b""


def fin_wait_2(ours: socket.socket, _peer: socket.socket) -> None:
    ours.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(ours) == FIN_WAIT_2)


HALF = {
    "close-wait, unread": (close_wait_unread, CLOSE_WAIT),
    "close-wait, FIN unread": (close_wait_fin_unread, CLOSE_WAIT),
    "close-wait, read": (close_wait_read, CLOSE_WAIT),
    "fin-wait-2": (fin_wait_2, FIN_WAIT_2),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", HALF)
def test_half_closed_connections_move(device: Device, case: str, family: str) -> None:
    prepare, state = HALF[case]
    ours, peer = pair(family)
    prepare(ours, peer)
    copy = move(device, ours, family)
    assert state_of(copy) == state
    if state == CLOSE_WAIT:
        if prepare is close_wait_unread:
            assert read_exactly(copy, 10) == b"last words"
        assert copy.recv(1) == b""
        copy.sendall(b"still here")
        assert read_exactly(peer, 10) == b"still here"
        copy.close()
        assert peer.recv(1) == b""
    else:
        assert peer.recv(1) == b""
        peer.sendall(b"after your FIN")
        assert read_exactly(copy, 14) == b"after your FIN"
        peer.close()
        assert copy.recv(1) == b""


def counted_as_established() -> int:
    """CurrEstab of this network namespace."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if "Tcp:" in line
    )
    return int(dict(zip(names, values, strict=True))["CurrEstab"])


@pytest.mark.parametrize("case", HALF)
def test_moves_leave_no_connection_in_the_host_s_count(device: Device, case: str) -> None:
    prepare, _unused = HALF[case]
    before = counted_as_established()
    ours, peer = pair()
    assert counted_as_established() == before + 2
    prepare(ours, peer)
    copy = move(device, ours, "ipv4")
    for sock in (peer, ours, copy):
        sock.close()
    wait_for(lambda: counted_as_established() == before)


def four_tuple(sock: socket.socket) -> FourTuple:
    """As the NAT helper knows it."""
    return FourTuple(
        *(Endpoint(plain_address(name[0]), name[1]) for name in (sock.getsockname(), sock.getpeername()))
    )


def plain_address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", [FIN_WAIT_1, LAST_ACK, CLOSING])
def test_connections_with_an_unacknowledged_fin_move(device: Device, state: int, family: str) -> None:
    ours, peer = pair(family)
    if state == LAST_ACK:
        close_wait_fin_unread(ours, peer)
    closing = state == CLOSING
    with held(ours, nat_client.Flag.MUTE) if closing else held(peer):
        ours.sendall(b"tail")
        ours.shutdown(socket.SHUT_WR)
        if closing:
            peer.shutdown(socket.SHUT_WR)
        wait_for(lambda: state_of(ours) == state)
        copy = move(device, ours, family)
        assert state_of(copy) == state
    wait_for(lambda: state_of(copy) in ((FIN_WAIT_2,) if state == FIN_WAIT_1 else (CLOSE, TIME_WAIT)))
    assert read_exactly(peer, 4) == b"tail"
    assert peer.recv(1) == b""
    if state == FIN_WAIT_1:
        peer.sendall(b"reply")
        assert read_exactly(copy, 5) == b"reply"


def test_into_the_same_descriptor(device: Device) -> None:
    ours, peer = pair()
    for turn in range(20):
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        device.restore(ours, image)
        peer.sendall(b"%d" % (turn % 10))
        assert read_exactly(ours, 1) == b"%d" % (turn % 10)
        ours.sendall(b"!")
        assert read_exactly(peer, 1) == b"!"


def test_dormant_copies_are_mute_until_activated(device: Device) -> None:
    ours, peer = pair()
    ours.sendall(b"read me")
    assert read_exactly(peer, 7) == b"read me"
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    copy = new_socket("ipv4")
    dormant = device.restore(copy, image, flags=0)
    peer.sendall(b"while you slept")
    time.sleep(0.1)
    device.decide("activate", dormant.id)
    assert read_exactly(copy, 15) == b"while you slept"
    assert tcp_info(peer)["total_retrans"] == 0
    with pytest.raises(Refused) as caught:
        device.decide("activate", dormant.id)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("how", ["discard", "close"])
def test_discarded_copies_leave_no_trace(how: str) -> None:
    ours, peer = pair()
    with Device() as device:
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        copy = new_socket("ipv4")
        dormant = device.restore(copy, image, flags=0)
        if how == "discard":
            device.decide("discard", dormant.id)
    assert state_of(copy) == CLOSE
    assert state_of(peer) == ESTABLISHED
    # The image is still good, and so is the socket.
    with Device() as device:
        device.restore(copy, image)
    peer.sendall(b"back")
    assert read_exactly(copy, 4) == b"back"


def test_dormant_copies_are_discarded_in_time(device: Device) -> None:
    """A thread that blocks on a dormant socket cannot be killed: it must not be for ever."""
    ours, peer = pair()
    copy = new_socket("ipv4")
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    memory = ctypes.create_string_buffer(image, len(image))
    made = device.call(
        "restore",
        Restore(
            fd=copy.fileno(), slot=NO_SLOT, image=ctypes.addressof(memory), bytes=len(image), deadline_ms=200
        ),
    )
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        copy.recv(1)
    assert caught.value.errno == errno.ENOTCONN
    assert 0.1 < time.monotonic() - started < 2
    assert [(event.type, event.id) for event in device.events()] == [(EventType.DISCARDED, made.id)]
    with pytest.raises(Refused) as refused:
        device.decide("activate", made.id)
    assert refused.value.errno == errno.ENOENT
    device.restore(copy, image)
    peer.sendall(b"again")
    assert read_exactly(copy, 5) == b"again"


def test_the_path_model_and_the_windows_are_carried(device: Device) -> None:
    ours, peer = pair()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = threading.Thread(target=read_exactly, args=(peer, 3_000_000))
    reader.start()
    ours.sendall(bytes(3_000_000))
    reader.join()
    peer.sendall(bytes(300_000))
    read_exactly(ours, 300_000)
    wait_for(lambda: tcp_info(ours)["unacked"] == 0)
    before = tcp_info(ours)
    copy = move(device, ours, "ipv4")
    after = tcp_info(copy)
    for field in (
        "cwnd",
        "ssthresh",
        "rtt",
        "rttvar",
        "rto",
        "reordering",
        "rcv_ssthresh",
        "rcv_space",
        "snd_mss",
        "rcv_mss",
        "advmss",
        "bytes_acked",
        "bytes_received",
        "min_rtt",
    ):
        assert after[field] == before[field], field
    assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_options_are_carried(device: Device) -> None:
    ours, peer = pair()
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7),
        (socket.SOL_SOCKET, socket.SO_MARK, 42),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16384),
        (socket.IPPROTO_IP, socket.IP_TOS, 0x10),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 5),  # IP_TOS sets it too
        (socket.IPPROTO_IP, socket.IP_TTL, 33),
    ]
    for option in options:
        ours.setsockopt(*option)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 3, 500000))
    rcvbuf = ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    copy = move(device, ours, "ipv4")
    for level, option, value in options:
        assert copy.getsockopt(level, option) == value, (level, option)
    assert struct.unpack("ii", copy.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 9)
    assert struct.unpack("ll", copy.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)) == (3, 500000)
    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == rcvbuf
    peer.close()


def test_urgent_data_is_carried_exactly(device: Device) -> None:
    ours, peer = pair()
    peer.sendall(b"abc")
    peer.send(b"!", socket.MSG_OOB)
    peer.sendall(b"def")
    wait_for(lambda: len(ours.recv(10, socket.MSG_PEEK)) == 3)
    time.sleep(0.05)
    copy = move(device, ours, "ipv4")
    assert copy.recv(10) == b"abc"
    assert copy.recv(1, socket.MSG_OOB) == b"!"
    assert read_exactly(copy, 3) == b"def"


# ---- Closed and listening ----


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("kind", ["unconnected", "bound", "listening"])
def test_sockets_without_a_connection_move(device: Device, kind: str, family: str) -> None:
    sock = new_socket(family)
    if kind != "unconnected":
        sock.bind(("127.0.0.1" if family == "ipv4" else "::1", 0))
    if kind == "listening":
        sock.listen(17)
    name = sock.getsockname()
    copy = move(device, sock, family)
    assert copy.getsockname() == name
    if kind == "listening":
        with pytest.raises(OSError) as caught:
            sock.accept()
        assert caught.value.errno == errno.EINVAL
        client = new_socket(family)
        client.connect(name)
        child, _unused = copy.accept()
        client.sendall(b"hello")
        assert read_exactly(child, 5) == b"hello"


def test_a_copy_that_cannot_listen_is_as_it_was(device: Device) -> None:
    listener = new_socket("ipv4")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    name = listener.getsockname()
    with frozen(device, listener) as (freeze, image):
        device.commit(freeze)
    listener.close()
    rival, copy = new_socket("ipv4"), new_socket("ipv4")
    rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    rival.bind(name)
    made = device.restore(copy, image, flags=0)
    rival.listen()
    with pytest.raises(Refused) as caught:
        device.decide("activate", made.id)
    assert caught.value.errno == errno.EADDRINUSE
    assert copy.getsockname()[1] == 0
    assert not copy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    rival.close()
    device.restore(copy, image)
    client = socket.create_connection(name)
    child, _unused = copy.accept()
    client.sendall(b"x")
    assert read_exactly(child, 1) == b"x"


def test_children_nobody_accepted_are_not_reset(device: Device) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    clients = [socket.create_connection(listener.getsockname()) for _turn in range(3)]
    with frozen(device, listener) as (freeze, _unused):
        device.commit(freeze)
    listener.close()
    time.sleep(0.05)
    for client in clients:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def test_children_nobody_accepted_live_on_in_the_group(device: Device) -> None:
    """net.ipv4.tcp_migrate_req: the kernel gives them to another listener, as after any close."""
    servers: list[socket.socket] = []
    for _turn in range(2):
        server = new_socket("ipv4")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(servers[0].getsockname() if servers else ("127.0.0.1", 0))
        server.listen()
        servers.append(server)
    with sysctl("tcp_migrate_req", 1):
        client = socket.create_connection(servers[0].getsockname())
        [leaves], _unused, _unused = select.select(servers, [], [], 5)
        with frozen(device, leaves) as (freeze, _image):
            device.commit(freeze)
    [stays] = [server for server in servers if server is not leaves]
    stays.settimeout(5)
    child, _unused = stays.accept()
    client.sendall(b"question")
    assert read_exactly(child, 8) == b"question"
    child.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_that_is_being_made_moves(device: Device, family: str) -> None:
    listener = new_socket(family)
    listener.bind(({"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "::ffff:127.0.0.1"}[family], 0))
    listener.listen()
    name = listener.getsockname()
    end = Endpoint(plain_address(name[0]), name[1])
    ours, copy = new_socket(family), new_socket(family)
    with nat_client.opened() as nat:
        nat.add(nat_client.Flow(end, None, nat_client.Flag.HOLD))
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            ours.connect(name)
        assert state_of(ours) == SYN_SENT
        with frozen(device, ours) as (freeze, image):
            before = images.decode(image)
            device.commit(freeze)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
        device.restore(copy, image)
        assert state_of(copy) == SYN_SENT
        with frozen(device, copy) as (freeze, again):
            device.abort(freeze)
        after = images.decode(again)
        assert after.sequence == before.sequence
        assert after.timestamp.syn_first_tsval == before.timestamp.syn_first_tsval
        assert after.negotiated.rcv_wscale == before.negotiated.rcv_wscale
    wait_for(lambda: state_of(copy) == ESTABLISHED, 10)
    child, _unused = listener.accept()
    copy.sendall(b"connected")
    assert read_exactly(child, 9) == b"connected"
    child.sendall(b"welcome")
    assert read_exactly(copy, 7) == b"welcome"


@contextlib.contextmanager
def sysctl(name: str, value: int) -> Iterator[None]:
    """Of IPv4 TCP, in this namespace."""
    switch = Path("/proc/sys/net/ipv4", name)
    before = switch.read_text()
    switch.write_text(str(value))
    try:
        yield
    finally:
        switch.write_text(before)


@contextlib.contextmanager
def connecting(listener: socket.socket) -> Iterator[socket.socket]:
    """One in SYN-SENT: the listener has heard it, and what it answers is lost until the end."""
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    name = listener.getsockname()
    ours = new_socket("ipv4")
    ours.setblocking(False)
    run("nft", f"add table ip deaf; add chain ip deaf in {{ type filter hook input priority 0; }}; "
               f"add rule ip deaf in tcp sport {name[1]} drop")  # fmt: skip
    try:
        with contextlib.suppress(BlockingIOError):
            ours.connect(name)
        assert state_of(ours) == SYN_SENT
        yield ours
    finally:
        run("nft", "delete table ip deaf")


ASKS, ANSWERS, ASKS_FOR_ACCURATE = 1, 2, 3  # tcp_ecn: with every SYN; only those who ask


@pytest.mark.parametrize("offered", [True, False])
def test_a_syn_says_of_ecn_what_it_has_said(device: Device, offered: bool) -> None:
    """Whatever this host's own would say: the peer may have heard the first one."""
    listener, copy = new_socket("ipv4"), new_socket("ipv4")
    with sysctl("tcp_ecn", ASKS if offered else ANSWERS), connecting(listener) as ours:
        with frozen(device, ours) as (freeze, image):
            assert bool(images.decode(image).negotiated.flags & NegotiatedFlag.ECN) is offered
            device.commit(freeze)
        with sysctl("tcp_ecn", ANSWERS if offered else ASKS):
            device.restore(copy, image)
    wait_for(lambda: state_of(copy) == ESTABLISHED, 10)
    child, _unused = listener.accept()
    for end in (copy, child):
        with frozen(device, end) as (freeze, image):
            assert bool(images.decode(image).negotiated.flags & NegotiatedFlag.ECN) is offered
            device.abort(freeze)


@pytest.mark.parametrize("name", ["tcp_sack", "tcp_timestamps", "tcp_window_scaling"])
def test_a_syn_that_this_host_does_not_send_is_refused(device: Device, name: str) -> None:
    copy = new_socket("ipv4")
    with connecting(new_socket("ipv4")) as ours:
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        with sysctl(name, 0), pytest.raises(Refused) as caught:
            device.restore(copy, image)
        assert caught.value.refusal == Refusal.SCALE
        device.restore(copy, image)


@pytest.mark.kernels("7.2")
def test_accurate_ecn_is_refused_offered_or_agreed_on(device: Device) -> None:
    with sysctl("tcp_ecn", ASKS_FOR_ACCURATE):
        agreed, _peer = pair()
        with connecting(new_socket("ipv4")) as offered:
            for ours in (agreed, offered):
                with pytest.raises(Refused) as caught, frozen(device, ours):
                    pass
                assert caught.value.refusal == Refusal.ACCECN


# ---- Refusals ----


def test_refusals_have_names(device: Device) -> None:
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    local, _other = socket.socketpair()
    for sock, refusal in ((datagram, Refusal.NOT_TCP), (local, Refusal.NOT_TCP)):
        with pytest.raises(Refused) as caught:
            device.claim(sock)
        assert caught.value.refusal == refusal
    ours, _peer = pair()
    ours.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    with pytest.raises(Refused) as caught:
        device.claim(ours)
    assert caught.value.refusal == Refusal.ULP
    ours, _peer2 = pair()
    ours.setsockopt(socket.IPPROTO_TCP, 19, 1)
    with pytest.raises(Refused) as caught:
        device.claim(ours)
    assert caught.value.refusal == Refusal.REPAIR
    ours.setsockopt(socket.IPPROTO_TCP, 19, 0)


def with_ktls(image: Image) -> None:
    image.ktls = [Ktls(1, 0x0304, 0x1301, bytes(16), bytes(12), bytes(4), bytes(8))]


def with_accurate_ecn(image: Image) -> None:
    image.negotiated.flags |= NegotiatedFlag.ECN | NegotiatedFlag.ACCECN


def in_microseconds(image: Image) -> None:
    image.timestamp.unit = TimestampUnit.US


@pytest.mark.parametrize(
    ("change", "refusal"), [(with_ktls, Refusal.KTLS), (with_accurate_ecn, Refusal.ACCECN)]
)
def test_images_that_no_socket_can_be(
    device: Device, change: Callable[[Image], None], refusal: Refusal
) -> None:
    is_refused(device, change, refusal)


@pytest.mark.kernels("6.1", "uml-*")
def test_an_image_whose_timestamps_this_kernel_cannot_count(device: Device) -> None:
    is_refused(device, in_microseconds, Refusal.TS_UNIT)


def is_refused(device: Device, change: Callable[[Image], None], refusal: Refusal) -> None:
    """And the socket is as good as before."""
    ours, peer = pair()
    with frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    forged = images.decode(image)
    change(forged)
    copy = new_socket("ipv4")
    with pytest.raises(Refused) as caught:
        device.restore(copy, images.encode(forged))
    assert caught.value.refusal == refusal
    device.restore(copy, image)
    peer.sendall(b"lives")
    assert read_exactly(copy, 5) == b"lives"


def test_targets_that_are_in_use_are_refused(device: Device) -> None:
    ours, peer = pair()
    with frozen(device, ours) as (freeze, image):
        bound = socket.create_server(("127.0.0.1", 0))
        for sock, refusal in (
            (peer, Refusal.TARGET),
            (bound, Refusal.TARGET),
            (new_socket("ipv6"), Refusal.FAMILY),
        ):
            with pytest.raises(Refused) as caught:
                device.restore(sock, image)
            assert caught.value.refusal == refusal
        fresh = new_socket("ipv4")
        with pytest.raises(Refused) as caught:
            device.restore(fresh, image)
        assert caught.value.refusal == Refusal.TUPLE_TAKEN
        device.commit(freeze)
        device.restore(fresh, image)
    peer.sendall(b"ok")
    assert read_exactly(fresh, 2) == b"ok"


def test_another_process_s_socket_is_found_by_pid(device: Device) -> None:
    ours, peer = pair()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        claim = device.claim(ours.fileno(), pid=child)
        assert claim.local.name == ours.getsockname()
        assert claim.remote.name == peer.getsockname()
        device.release(claim)
        with pytest.raises(Refused) as caught:
            device.claim(999, pid=child)
        assert caught.value.errno == errno.EBADF
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.processors(2)
def test_freezes_under_threads_that_hammer(device: Device) -> None:
    ours, peer = pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)  # what is queued has to go into a slot
    stop = threading.Event()
    pattern = bytes(range(250)) * 300
    sent, received, wrong = 0, 0, 0

    def drain() -> None:
        nonlocal received, wrong
        peer.settimeout(20)
        while part := peer.recv(65536):
            at = received % 250
            wrong += part != pattern[at : at + len(part)]
            received += len(part)

    def write() -> None:
        nonlocal sent
        while not stop.is_set():
            ours.sendall(pattern)
            sent += len(pattern)
        ours.shutdown(socket.SHUT_WR)

    def poke() -> None:
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError):
                ours.recv(1, socket.MSG_DONTWAIT)

    threads = [threading.Thread(target=each, daemon=True) for each in (drain, write, poke, poke)]
    for thread in threads:
        thread.start()
    # In a process of its own: Python keeps its global lock in getsockopt(), which waits for the thaw.
    child = os.fork()
    while child == 0:
        tcp_info(ours)
    try:
        for _turn in range(10):
            before = received
            claim = device.claim(ours)  # anew: it does not live for ever, and this machine may be slow
            for _turn in range(10):
                freeze: Freeze = device.freeze(claim, deadline_ms=5000)
                image = device.image(freeze)
                device.abort(freeze)
                images.decode(image)
            device.release(claim)
            wait_for(lambda before=before: received > before)
    finally:
        stop.set()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for thread in threads:
        thread.join(30)
    assert (received, wrong) == (sent, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_stream_moves_many_times(device: Device, family: str) -> None:
    """Both directions at full speed, held only from the commit to the restore; byte for byte."""
    ours, peer = pair(family)
    total, moves = 3_000_000, 30
    down, up = (random.Random(seed).randbytes(total) for seed in (1, 2))  # noqa: S311
    got = bytearray()
    results: list[object] = []

    def talk() -> None:
        try:
            writer = threading.Thread(target=peer.sendall, args=(up,))
            writer.start()
            results.append(read_exactly(peer, total) == down)
            writer.join()
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=talk)
    thread.start()
    sent = done = 0
    with Device(slot_bytes=16 << 20) as roomy:
        pause = total // moves
        while sent < total or len(got) < total:
            readable, writable, _unused = select.select([ours], [ours] if sent < total else [], [], 10)
            assert readable or writable, "the stream stands still"
            if readable:
                part = ours.recv(65536)
                assert part
                got += part
            if writable:
                ours.setblocking(False)
                sent += ours.send(down[sent : sent + 65536])
                ours.setblocking(True)
            if done < moves and len(got) > pause * done:
                done += 1
                with held(ours), frozen(roomy, ours) as (freeze, image):
                    images.decode(image)
                    roomy.commit(freeze)
                    copy = new_socket(family)
                    dormant = roomy.restore(copy, image, flags=0)
                ours.close()
                roomy.decide("activate", dormant.id)
                ours = copy
    thread.join(20)
    assert results == [True]
    assert bytes(got) == up
    assert done == moves


def test_a_socket_that_was_v4_mapped_is_no_target_for_ipv6(device: Device) -> None:
    """It would send by IPv4 for ever; a v4-mapped connection it takes again."""
    mapped, peer = pair("mapped")
    native, _peer = pair("ipv6")
    target = new_socket("mapped")
    with held(mapped), frozen(device, mapped) as (freeze, image):
        device.commit(freeze)
        mapped.close()
        for _turn in range(2):
            device.restore(target, image)
            with frozen(device, target) as (again, image):
                device.commit(again)
        with frozen(device, native) as (freeze, other):
            with pytest.raises(Refused) as caught:
                device.restore(target, other)
            assert caught.value.refusal == Refusal.TARGET
            device.abort(freeze)
        device.restore(copy := new_socket("mapped"), image)
    peer.sendall(b"1")
    assert read_exactly(copy, 1) == b"1"


@pytest.mark.processors(2)
def test_who_slept_in_a_send_has_no_part_in_the_next_connection(device: Device) -> None:
    """The socket has another connection before the sender that was woken by COMMIT gets a processor."""
    ours, peer = pair()
    other, others_peer = pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    sending = threading.Thread(target=send_when_idle, args=(ours.fileno(),), daemon=True)
    with held(other), frozen(device, other, deadline_ms=5000) as (freeze, image):
        sending.start()
        time.sleep(1)  # until the peer's buffer and its own are full
        device.commit(freeze)
        with frozen(device, ours, slot=1) as (begun, _image):
            device.commit(begun)
        device.restore(ours, image)
    sending.join(20)
    assert not sending.is_alive()
    ours.sendall(b"1")
    assert others_peer.recv(100) == b"1"
    peer.close()


def send_when_idle(descriptor: int) -> None:
    """More than fits; the thread runs only when nobody else wants to."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    ctypes.CDLL(None).send(descriptor, bytes(16 << 20), 16 << 20, 0)
