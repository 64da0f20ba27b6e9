# SPDX-License-Identifier: MIT
"""The kernel engine's alone: freezes that stay, the kernel's deadlines, what no system call carries."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi import image as codec
from sockmi.crashpoints import VARIABLE
from sockmi.engine.base import Captured, Placement, Restored
from sockmi.engine.kernel import KernelEngine
from sockmi.refusal import Code, Refusal
from tests.lab import engine_lab as el
from tests.lab.crash_lab import CLOSED, state_of
from tests.lab.scenario import until
from tests.lab.test_engine_states import receive

HERE = Placement(None, False)
PARAMETERS = Path("/sys/module/sockmi/parameters")
TOGETHER = """
import os, sys
from sockmi import crashpoints, native
from sockmi.engine.kernel import KernelEngine
crashpoints.arm(native.library())
engine, fds = KernelEngine(), [int(word) for word in sys.argv[1:]]
engine.stop([os.fstat(fd).st_ino for fd in fds], [], 1.0)
images = [one.image for one in engine.capture(fds, 5.0)]
sys.exit(engine.release(fds, images, together=True) != [None] * len(fds))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[el.Lab]:
    with el.lab() as it:
        yield it


@pytest.fixture
def engine() -> Iterator[KernelEngine]:
    with contextlib.closing(KernelEngine()) as it:
        yield it


def descriptors() -> int:
    """How many are open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def freeze(engine: KernelEngine, sock: socket.socket, thaw_after_s: float = 5.0) -> tuple[int, bytes]:
    """As the daemon does: its inode, and its image."""
    inode = os.fstat(sock.fileno()).st_ino
    assert engine.stop([inode], [], 1.0) == [None]
    (item,) = engine.capture([sock.fileno()], thaw_after_s)
    assert isinstance(item, Captured), item
    return inode, item.image


def test_frozen_until_resumed(lab: el.Lab, engine: KernelEngine) -> None:
    """The owner waits, and so does what its peer sends; then both go on. The daemon waits for nothing."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    before = descriptors()
    inode, _unused = freeze(engine, ours)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(ours.recv(10)))
    reader.start()
    peer.sendall(b"waits")
    began = time.monotonic()
    with lab.host("a"):
        (facts,) = engine.inspect([ours.fileno()])
    assert time.monotonic() - began < 0.2
    assert facts.refusal is not None and facts.refusal.code is Code.ALREADY_MIGRATING
    assert (facts.inode, facts.state, str(facts.local)) == (inode, "ESTABLISHED", f"{el.HOST4}:{port}")
    reader.join(0.3)
    assert reader.is_alive() and not got
    engine.resume([inode])
    reader.join(5)
    assert got == [b"waits"]
    with lab.host("a"):
        (facts,) = engine.inspect([ours.fileno()])
    assert facts.refusal is None
    assert descriptors() == before
    ours.close()
    peer.close()


def test_kernel_thaws_by_itself(lab: el.Lab, engine: KernelEngine) -> None:
    """Then the original goes on, and is not given away, though it has not changed."""
    lab.switch("a")
    ours, peer = lab.pair("v6", lab.port())
    inode, image = freeze(engine, ours, 0.2)
    peer.sendall(b"in time")
    assert ours.recv(10) == b"in time"  # waits for the deadline
    (refused,) = engine.release([ours.fileno()], [image])
    assert isinstance(refused, Refusal) and refused.code is Code.CHANGED
    engine.resume([inode])
    ours.sendall(b"on")
    assert peer.recv(10) == b"on"
    ours.close()
    peer.close()


def test_end_of_the_daemon_thaws(lab: el.Lab) -> None:
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    child = os.fork()
    if child == 0:
        freeze(KernelEngine(), ours)
        os._exit(0)
    os.waitpid(child, 0)
    peer.sendall(b"here")
    began = time.monotonic()
    assert ours.recv(10) == b"here"
    assert time.monotonic() - began < 2
    ours.close()
    peer.close()


@pytest.mark.parametrize("point", ["release.closed", ""])
def test_released_together(lab: el.Lab, point: str) -> None:
    """The daemon is killed when one of several is closed: all are. Without that they are, too."""
    lab.switch("a")
    with contextlib.ExitStack() as stack:
        fds = []
        for number in range(4):
            for sock in (pair := lab.pair("v4", 6100 + number)):
                stack.enter_context(sock)
            fds.append(pair[0].fileno())
        run = subprocess.run(
            [sys.executable, "-c", TOGETHER, *map(str, fds)],
            env=os.environ | {VARIABLE: point}, pass_fds=fds, timeout=60, check=False, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert run.returncode == (-signal.SIGKILL if point else 0)
        until(lambda: [state_of(fd) for fd in fds] == [CLOSED] * len(fds))


def test_dormant_for_too_long_is_made_anew(lab: el.Lab) -> None:
    """The module discards such a copy; as long as its tuple is held the image is good for another one."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    parameter = PARAMETERS / "dormant_max_ms"
    usual = parameter.read_text()
    parameter.write_text("400")
    try:
        with contextlib.closing(KernelEngine()) as engine:
            inode, image = freeze(engine, ours)
            lab.hold("a", port)
            lab.hold("b", port)
            with lab.host("b"):
                (made,) = engine.restore([image], [HERE])
            assert isinstance(made, Restored), made
            assert engine.release([ours.fileno()], [image]) == [None]
            engine.resume([inode])
            time.sleep(0.7)
            parameter.write_text(usual)
            with lab.host("b"):
                assert engine.renew([made.fd], [image]) == [None]
            lab.switch("b")
            lab.unhold("b", port)
            assert engine.activate([made.fd], [image]) == [None]
            with socket.socket(fileno=made.fd) as copy:
                copy.sendall(b"anew")
                assert peer.recv(10) == b"anew"
    finally:
        parameter.write_text(usual)
    assert not [one for one in lab.recorded(port) if one.flags & 4]
    ours.close()
    peer.close()


def test_larger_than_its_slot(lab: el.Lab, engine: KernelEngine) -> None:
    """It stays frozen like others, in a device file of its own, and is closed from there."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    ours.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    small, other = lab.pair("v4", port)
    sent, data = 0, os.urandom(3 << 20)
    peer.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += peer.send(data[sent : sent + 65536])
    before = descriptors()
    inodes = [os.fstat(one.fileno()).st_ino for one in (small, ours)]
    engine.stop(inodes, [], 1.0)
    items = engine.capture([small.fileno(), ours.fileno()], 5.0)
    images = [item.image for item in items if isinstance(item, Captured)]
    assert len(images) == 2, items
    queue = codec.decode(images[1]).receive_queue
    assert len(queue) > 1 << 20 and data.startswith(queue)
    lab.hold("a", port)
    assert engine.release([small.fileno(), ours.fileno()], images) == [None, None]
    engine.resume(inodes)
    assert descriptors() == before
    for one in (ours, peer, small, other):
        one.close()


def moved(
    lab: el.Lab, engine: KernelEngine, ours: socket.socket, port: int
) -> tuple[socket.socket, Restored]:
    """From a to b, and alive there."""
    inode, image = freeze(engine, ours)
    lab.hold("a", port)
    lab.hold("b", port)
    with lab.host("b"):
        (made,) = engine.restore([image], [HERE])
    assert isinstance(made, Restored), made
    assert engine.release([ours.fileno()], [image]) == [None]
    engine.resume([inode])
    lab.switch("b")
    lab.unhold("b", port)
    assert engine.activate([made.fd], [image]) == [None]
    copy = socket.socket(fileno=made.fd)
    copy.settimeout(10)
    return copy, made


def at_mark(sock: socket.socket) -> bool:
    """SIOCATMARK: the byte that comes next is the one after the urgent one."""
    return struct.unpack("i", fcntl.ioctl(sock, 0x8905, bytes(4)))[0] == 1


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("how", ["unread", "inline", "read"])
def test_urgent_data_moves(lab: el.Lab, engine: KernelEngine, kind: str, how: str) -> None:
    """The byte, its place in the stream, and whether it has been read; nothing stands against it."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair(kind, port)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, how == "inline")
    peer.sendall(b"before")
    peer.send(b"!", socket.MSG_OOB)
    peer.sendall(b"after")
    el.wait_for(lambda: _received(ours) >= 12)
    ours.settimeout(None)  # with a timeout, Python would wait for POLLIN first
    if how == "read":
        assert ours.recv(1, socket.MSG_OOB) == b"!"
    with lab.host("a"):
        (facts,) = engine.inspect([ours.fileno()])
    assert facts.refusal is None and facts.needs.urgent
    copy, made = moved(lab, engine, ours, port)
    assert "urgent-data" in made.fidelity.carried
    assert copy.recv(100) == b"before"  # no recv() goes beyond the mark
    assert at_mark(copy)
    copy.settimeout(None)
    if how == "unread":
        assert copy.recv(1, socket.MSG_OOB) == b"!"
    elif how == "read":
        with pytest.raises(OSError) as raised:
            copy.recv(1, socket.MSG_OOB)
        assert raised.value.errno == errno.EINVAL
    copy.settimeout(10)
    rest = b"!after" if how == "inline" else b"after"
    assert receive(copy, len(rest)) == rest
    peer.sendall(b"on")
    assert receive(copy, 2) == b"on"
    for one in (copy, ours, peer):
        one.close()


def test_urgent_data_that_is_sent_moves(lab: el.Lab, engine: KernelEngine) -> None:
    """What the peer has not acknowledged is sent again as what it was."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    lab.hold("peer", port, "deaf")
    ours.sendall(b"before")
    ours.send(b"!", socket.MSG_OOB)
    copy, made = moved(lab, engine, ours, port)
    assert "urgent-data" in made.fidelity.carried
    lab.unhold("peer", port, "deaf")
    # Nothing may overtake it: Linux takes a byte of a later segment for it, wherever that begins (tcp_urg).
    el.wait_for(lambda: _received(peer) == 7)
    assert receive(peer, 6) == b"before" and at_mark(peer)
    peer.settimeout(None)
    assert peer.recv(1, socket.MSG_OOB) == b"!"
    peer.settimeout(10)
    copy.sendall(b"after")
    assert receive(peer, 5) == b"after"
    for one in (copy, ours, peer):
        one.close()


@contextlib.contextmanager
def losing(lab: el.Lab, host: str, sport: int, seq: int) -> Iterator[None]:
    """The segment from port ``sport`` that begins at ``seq`` does not arrive, however often it is sent."""
    rule = f"tcp sport {sport} tcp sequence {seq} drop"
    chain = f"chain in {{ type filter hook prerouting priority -320; {rule}; }}"
    with lab.host(host):
        subprocess.run(["nft", "-f", "-"], input=f"table inet hole {{\n{chain}\n}}\n", text=True, check=True)
    try:
        yield
    finally:
        with lab.host(host):
            subprocess.run(["nft", "delete", "table", "inet", "hole"], check=True)


def test_holes_on_both_sides(lab: el.Lab, engine: KernelEngine) -> None:
    """What came too early is carried, and not sent again; marks of what was sent are not: that is told."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    for sock in (ours, peer):
        sock.setsockopt(el.TCP, socket.TCP_NODELAY, 1)
    inode, image = freeze(engine, ours)
    engine.resume([inode])
    sequence = codec.decode(image).sequence
    assert sequence is not None
    pieces = [bytes([value]) * 1000 for value in (1, 2)]
    lab.recorded(port)
    with (
        losing(lab, "peer", port, sequence.snd_nxt),
        losing(lab, "a", peer.getsockname()[1], sequence.rcv_nxt),
    ):
        for piece in pieces:
            ours.sendall(piece)
            peer.sendall(piece)
        el.wait_for(lambda: _sacked(ours) == 1 and _sacked(peer) == 1)
        copy, made = moved(lab, engine, ours, port)
    assert "out-of-order-queue" in made.fidelity.carried
    assert "sack-scoreboard" in made.fidelity.reset
    assert "sack-scoreboard" not in made.fidelity.carried
    assert receive(copy, 2000) == receive(peer, 2000) == b"".join(pieces)
    early = sequence.rcv_nxt + 1000 & 0xFFFFFFFF
    assert len([one for one in lab.recorded(port) if one.from_peer and one.length and one.seq == early]) == 1
    for one in (copy, ours, peer):
        one.close()


def _sacked(sock: socket.socket) -> int:
    """tcpi_sacked: segments."""
    return int(struct.unpack_from("I", sock.getsockopt(el.TCP, socket.TCP_INFO, 104), 28)[0])


def _received(sock: socket.socket) -> int:
    """tcpi_bytes_received: an urgent byte counts, wherever it is."""
    return int(struct.unpack_from("Q", sock.getsockopt(el.TCP, socket.TCP_INFO, 240), 128)[0])


def test_path_model_moves(lab: el.Lab, engine: KernelEngine) -> None:
    """Congestion window and RTT of the copy are the original's: no slow start."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    for _turn in range(20):
        ours.sendall(bytes(60_000))
        assert len(receive(peer, 60_000)) == 60_000
    before = ours.getsockopt(el.TCP, socket.TCP_INFO, 104)
    copy, made = moved(lab, engine, ours, port)
    assert {"path-model", "timers", "counters"} <= set(made.fidelity.carried)
    info = copy.getsockopt(el.TCP, socket.TCP_INFO, 104)
    rtt, cwnd = 68, 80  # tcpi_rtt, tcpi_snd_cwnd
    assert struct.unpack_from("I", info, cwnd) == struct.unpack_from("I", before, cwnd)
    assert abs(struct.unpack_from("I", info, rtt)[0] - struct.unpack_from("I", before, rtt)[0]) <= 1
    assert struct.unpack_from("I", info, cwnd)[0] > 10

    for one in (copy, ours, peer):
        one.close()


def test_what_stays_behind_is_named(lab: el.Lab, engine: KernelEngine) -> None:
    """By the option's name, and only if it is set."""
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    with lab.host("a"):
        (item,) = engine.capture([ours.fileno()])
    assert isinstance(item, Captured)
    assert item.fidelity.reset == item.fidelity.approximated == []
    nop = b"\x01"
    ours.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, 3 * nop + b"\x00")
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF))  # BPF: accept all
    ours.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
    ours.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER
    with lab.host("a"):
        (item,) = engine.capture([ours.fileno()])
    assert isinstance(item, Captured)
    assert set(item.fidelity.reset) == {
        "ebpf-filter",
        "option:ip_options",
        "option:lock_filter",
        "socket-options",
    }
    for one in (ours, peer):
        one.close()
