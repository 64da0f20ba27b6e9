# SPDX-License-Identifier: MIT
"""What only the kernel can carry: the out-of-order queue, ECN, ts_recent; and sequence numbers that wrap."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi import image as images
from sockmi.image.sections import EarlyFin
from tests.kmod.inside.test_module_core import move, pair, read_exactly, wait_for
from tests.kmod.module_client import Device, frozen

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_REPAIR_WINDOW = 19, 20, 21, 22, 29
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
FIN, ACK = 1, 0x10
ECN_OPTION = 8  # TCPI_OPT_ECN


@pytest.fixture
def device() -> Iterator[Device]:
    with Device(slot_bytes=8 << 20) as made:
        yield made


def looked_at(device: Device, sock: socket.socket) -> images.Image:
    """The image of a socket that goes on."""
    with frozen(device, sock) as (freeze, image):
        device.abort(freeze)
        return images.decode(image)


# ---- Out of order ----


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def inject(peer: images.Image, offset: int, data: bytes, flags: int = 0, urgent: int = 0) -> None:
    """A segment of the peer's that overtakes ``offset`` bytes: on the wire, with the peer's timestamps."""
    sequence, ends = peer.sequence, peer.identity
    assert sequence
    assert peer.timestamp
    options = struct.pack(">BBBBII", 1, 1, 8, 10, peer.timestamp.tsval, peer.timestamp.ts_recent)
    header = struct.pack(
        ">HHIIBBHHH",
        ends.local.port,
        ends.remote.port,
        (sequence.snd_nxt + offset) & 0xFFFFFFFF,
        sequence.rcv_nxt,
        (20 + len(options)) << 2,
        ACK | flags,
        512,
        0,
        urgent,
    )
    addresses = socket.inet_aton("127.0.0.1") * 2
    pseudo = addresses + struct.pack(">BBH", 0, 6, len(header) + len(options) + len(data))
    sum_ = checksum(pseudo + header + options + data)
    packet = header[:16] + struct.pack(">H", sum_) + header[18:] + options + data
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(packet, ("127.0.0.1", 0))


def test_the_out_of_order_queue_is_carried_byte_for_byte(device: Device) -> None:
    ours, peer = pair()
    stream = random.Random(3).randbytes(60000)  # noqa: S311
    peer.sendall(stream[:100])
    assert read_exactly(ours, 100) == stream[:100]
    # The peer is not asked whether it has sent that: what it hears about it, it ignores.
    state = looked_at(device, peer)
    holes = [(200, 1000), (1000, 3000), (5000, 5001), (20000, 45000)]
    for start, end in holes:
        for at in range(start, end, 1400):
            piece = stream[at : min(at + 1400, end)]
            inject(state, at - 100, piece)
    before = looked_at(device, ours)
    nxt = before.sequence.rcv_nxt
    got = [(segment.seq - nxt & 0xFFFFFFFF, bytes(segment.data)) for segment in before.out_of_order]
    assert got == [
        (100, stream[200:3000]),
        (4900, stream[5000:5001]),
        (19900, stream[20000:45000]),
    ]
    assert before.receive_sack
    copy = move(device, ours, "ipv4")
    after = looked_at(device, copy)
    assert after.receive_sack == before.receive_sack
    assert [(one.seq, bytes(one.data)) for one in after.out_of_order] == [
        (one.seq, bytes(one.data)) for one in before.out_of_order
    ]
    peer.sendall(stream[100:])
    assert read_exactly(copy, len(stream) - 100) == stream[100:]
    assert not looked_at(device, copy).out_of_order


@contextlib.contextmanager
def sysctl(name: str, value: str) -> Iterator[None]:
    path = Path("/proc/sys", *name.split("."))
    before = path.read_text()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


def test_as_much_out_of_order_as_the_window_allows(device: Device) -> None:
    """Its buffers take no more memory at the copy: what the peer was told of would be dropped."""
    with sysctl(
        "net.ipv4.tcp_adv_win_scale", "2"
    ):  # until Linux 6.6: three quarters of the buffer are offered
        ours, peer = pair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        for _turn in range(100):  # the window grows with what is read
            peer.sendall(bytes(50_000))
            read_exactly(ours, 50_000)

        def offered() -> int:
            window = looked_at(device, ours).window
            assert window
            return window.rcv_wnd

        # A reader that was late had all of it acknowledged unread, and offers less until the next one.
        peer.sendall(b"x")
        assert read_exactly(ours, 1) == b"x"
        wait_for(lambda: offered() > 60_000)
        state = looked_at(device, peer)
        most = offered()
        piece = bytes(12_000)
        for at in range(100, most - len(piece), len(piece)):
            inject(state, at, piece)
        [before] = looked_at(device, ours).out_of_order
        assert len(before.data) > most - 3 * len(piece)
        copy = move(device, ours, "ipv4")
        assert [len(one.data) for one in looked_at(device, copy).out_of_order] == [len(before.data)]


@pytest.mark.parametrize("pieces", [[(10, b"x" * 10), (20, b"")], [(10, b"x" * 10)], [(10, b"")]])
def test_a_fin_that_came_too_early_is_carried(device: Device, pieces: list[tuple[int, bytes]]) -> None:
    """Behind data, in one segment with data, alone: read once the hole is filled, without another FIN."""
    ours, peer = pair()
    peer.sendall(b"ab")
    assert read_exactly(ours, 2) == b"ab"
    state = looked_at(device, peer)
    hole = b"y" * 10
    for at, data in pieces:
        inject(state, at, data, FIN if (at, data) == pieces[-1] else 0)
    before = looked_at(device, ours)
    assert not before.fidelity
    assert before.sequence
    early = b"".join(data for _at, data in pieces)
    place = before.sequence.rcv_nxt + len(hole + early) & 0xFFFFFFFF
    assert before.early_fin == EarlyFin(place)
    assert before.receive_sack[0].end_seq == place + 1 & 0xFFFFFFFF
    copy = move(device, ours, "ipv4")
    after = looked_at(device, copy)
    assert (after.early_fin, after.receive_sack) == (before.early_fin, before.receive_sack)
    assert not after.fidelity
    peer.sendall(hole)
    assert read_exactly(copy, len(hole + early)) == hole + early
    assert copy.recv(1) == b""
    assert looked_at(device, copy).identity.state == images.State.CLOSE_WAIT


def test_a_fin_with_data_behind_it_is_told(device: Device) -> None:
    """No honest peer sends that. The image has no place for it, and the peer would send it again."""
    ours, peer = pair()
    state = looked_at(device, peer)
    inject(state, 10, b"", FIN)
    inject(state, 20, b"x" * 10)
    before = looked_at(device, ours)
    assert before.early_fin is None
    assert before.fidelity_names(images.FidelityClass.APPROXIMATED) == ["out-of-order-queue"]
    copy = move(device, ours, "ipv4")
    assert [one.data for one in looked_at(device, copy).out_of_order] == [b"x" * 10]


# ---- ECN, timestamps ----


def test_ecn_and_ts_recent_are_carried(device: Device) -> None:
    switch = Path("/proc/sys/net/ipv4/tcp_ecn")
    before_switch = switch.read_text()
    switch.write_text("1")
    try:
        ours, peer = pair()
    finally:
        switch.write_text(before_switch)
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"
    before = looked_at(device, ours)
    assert before.negotiated.flags & 8
    copy = move(device, ours, "ipv4")
    assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] & ECN_OPTION
    after = looked_at(device, copy)
    assert after.ecn == before.ecn
    assert after.timestamp.ts_recent == before.timestamp.ts_recent
    assert 0 <= after.timestamp.tsval - before.timestamp.tsval & 0xFFFFFFFF < 60_000
    for _turn in range(3):
        copy.sendall(b"y" * 1000)
        assert read_exactly(peer, 1000) == b"y" * 1000


def test_nothing_changes_but_time(device: Device) -> None:
    """Dump, restore, dump: the two images differ in ages and clocks alone."""
    ours, peer = pair()
    ours.sendall(bytes(100_000))
    assert len(read_exactly(peer, 100_000)) == 100_000
    peer.sendall(b"unread")
    wait_for(lambda: len(ours.recv(6, socket.MSG_PEEK)) == 6)
    before = looked_at(device, ours)
    copy = move(device, ours, "ipv4")
    after = looked_at(device, copy)
    assert after.identity == dataclasses.replace(before.identity)
    assert after.sequence == dataclasses.replace(before.sequence, iss=0, irs=0)
    assert after.negotiated == before.negotiated
    assert after.receive_queue == before.receive_queue
    for section, fields in (
        ("window", ("snd_wl1", "snd_wnd", "max_window", "window_clamp", "rcv_ssthresh", "rcv_right_edge")),
        (
            "path_model",
            (
                "cwnd",
                "ssthresh",
                "cwnd_clamp",
                "srtt_us",
                "mdev_us",
                "rttvar_us",
                "rtt_min_us",
                "rto_us",
                "reordering",
                "reord_seen",
                "rack_rtt_us",
                "rack_end_seq",
            ),
        ),
        ("receive_autotune", ("space_bytes", "space_seq", "rtt_us", "rtt_seq", "pingpong", "scaling_ratio")),
        (
            "counters",
            ("bytes_acked", "bytes_received", "bytes_sent", "data_segments_in", "data_segments_out"),
        ),
    ):
        for field in fields:
            was, now = getattr(getattr(before, section), field), getattr(getattr(after, section), field)
            assert now == was, f"{section}.{field}"
    assert after.socket_options == before.socket_options


# ---- Wrapping sequence numbers ----


def wrapping_pair(back: int) -> tuple[socket.socket, socket.socket]:
    """A connection whose sequence numbers wrap after about ``back`` bytes; made in TCP_REPAIR."""
    ends = [socket.socket(), socket.socket()]
    options = struct.pack("=8I", 2, 1460, 3, 7 | 7 << 16, 4, 0, 8, 0)  # MSS, scale, SACK, timestamps
    for sock in ends:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.bind(("127.0.0.1", 0))
    names = [sock.getsockname() for sock in ends]
    for sock, other, send, receive in ((ends[0], names[1], 0, 7), (ends[1], names[0], 7, 0)):
        send, receive = (-back + offset & 0xFFFFFFFF for offset in (send, receive))
        for queue, seq in ((SEND_QUEUE, send), (RECEIVE_QUEUE, receive)):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("=I", seq))
        sock.connect(other)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, options)
        window = struct.pack("=5I", receive, 65535, 65535, 65535, receive)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, window)
    for sock in ends:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)
    return ends[0], ends[1]


@pytest.mark.parametrize("back", [1, 500, 100_000])
def test_sequence_numbers_may_wrap_in_every_queue(device: Device, back: int) -> None:
    ours, peer = wrapping_pair(back)
    data = os.urandom(300_000)
    peer.sendall(data[:2000])
    wait_for(lambda: len(ours.recv(2000, socket.MSG_PEEK)) == 2000)
    ours.setblocking(False)
    sent = 0
    try:
        while sent < len(data):
            sent += ours.send(data[sent:])
    except BlockingIOError:
        pass
    copy = move(device, ours, "ipv4")
    assert read_exactly(copy, 2000) == data[:2000]
    assert read_exactly(peer, sent) == data[:sent]
    peer.sendall(data)
    assert read_exactly(copy, len(data)) == data
