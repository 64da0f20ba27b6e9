# SPDX-License-Identifier: MIT
"""The engine's contract: every state, moved from one host to another, byte-exact."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from sockmi import image as codec
from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Captured, Placement, Restored
from sockmi.engine.keeper import Keeper
from sockmi.image.words import NegotiatedFlag
from sockmi.refusal import Code, Refusal
from tests.lab import engine_lab as el
from tests.lab.raw_segments import segments

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
KINDS = ["v4", "v6", "mapped"]
FIN, SYN, RST = 1, 2, 4
HERE = Placement(None, False)
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 4096, 16384, 1 << 18

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def lab() -> Iterator[el.Lab]:
    with el.lab() as it:
        yield it


@pytest.fixture(scope="module")
def engine() -> el.Pair:
    """Of both hosts; tests/kmod/inside has this suite for the others."""
    return el.make_pair("repair")


def captured(lab: el.Lab, engine: el.Pair, sock: socket.socket) -> Captured:
    """The image of one socket, which the codec's other implementation accepts too."""
    with lab.host("a"):
        (item,) = engine.capture([sock.fileno()])
    assert isinstance(item, Captured), item
    codec.decode(item.image)
    return item


def restored(lab: el.Lab, engine: el.Pair, image: bytes, host: str = "b") -> int:
    with lab.host(host):
        (item,) = engine.restore([image], [HERE])
    assert isinstance(item, Restored), item
    assert engine.renew([item.fd], [image]) == [None], "it is new"
    return item.fd


def move(lab: el.Lab, engine: el.Pair, sock: socket.socket, port: int) -> tuple[socket.socket, bytes]:
    """From a to b, as the daemons do it; both sides' packets are held meanwhile. Returns the copy."""
    lab.hold("a", port)
    lab.hold("b", port)
    image = captured(lab, engine, sock).image
    fd = restored(lab, engine, image)
    assert engine.release([sock.fileno()], [image]) == [None]
    lab.switch("b")
    lab.unhold("b", port)
    with lab.host("b"):
        assert engine.activate([fd], [image]) == [None]
    copy = socket.socket(fileno=fd)
    copy.settimeout(10)
    return copy, image


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes (fewer at the end of the stream)."""
    data = bytearray()
    while len(data) < count and (part := sock.recv(count - len(data))):
        data += part
    return bytes(data)


def cross(sender: socket.socket, receiver: socket.socket, count: int) -> None:
    """``count`` bytes arrive whole, however little the buffers between the two hold."""
    data = os.urandom(count)
    sending = threading.Thread(target=sender.sendall, args=[data])
    sending.start()
    got = receive(receiver, count)
    sending.join(10)
    assert not sending.is_alive()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def resets(seen: list[el.Segment]) -> Iterator[el.Segment]:
    """The RSTs, but those to a repetition of the last ACK: so answers every host whose socket is gone."""
    ends: int | None = None
    last_acks = 0
    for segment in seen:
        if segment.flags & RST and (segment.from_peer or last_acks < 2 or segment.seq != ends):
            yield segment
        elif segment.flags & FIN and not segment.from_peer:
            ends = (segment.seq + segment.length + 1) & 0xFFFFFFFF
        elif segment.from_peer and segment.ack == ends:
            last_acks += 1


def quiet(lab: el.Lab, port: int, fins: int | None = None) -> None:
    """No RST passed, and not more FIN sequence numbers than ``fins``."""
    seen = lab.recorded(port)
    assert seen
    assert not list(resets(seen)), seen
    if fins is not None:
        assert len({(s.from_peer, s.seq + s.length) for s in seen if s.flags & FIN}) <= fins


@dataclass
class Case:
    """A connection in some state, and what has still to arrive at each end."""

    ours: socket.socket
    peer: socket.socket
    port: int
    to_us: bytes = b""
    to_peer: bytes = b""
    fins: int = 0
    options: list[str] = field(default_factory=list)


def make_case(lab: el.Lab, kind: str, state: str, queued: bool) -> Case:
    """Bring a connection of a into ``state``, with bytes in all three queues if ``queued``."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair(kind, port)
    case = Case(ours, peer, port)
    randomness = random.Random(f"{kind}{state}{queued}")  # noqa: S311
    if queued:
        case.to_us = randomness.randbytes(70_001)
        peer.sendall(case.to_us)
        el.wait_for(lambda: unread(ours) == len(case.to_us))
    peer_fin = state in ("CLOSE-WAIT", "CLOSING", "LAST-ACK")
    if state in ("CLOSE-WAIT", "LAST-ACK"):
        peer.shutdown(socket.SHUT_WR)
        el.wait_for(lambda: el.state(ours) == "CLOSE-WAIT")
    if queued or state in ("FIN-WAIT-1", "CLOSING", "LAST-ACK"):
        if state != "FIN-WAIT-2":
            lab.hold("peer", port, "deaf")  # what we send is sent, and not acknowledged
        if queued:
            case.to_peer = randomness.randbytes(60_007)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 131072)  # some hosts begin with less
            ours.setblocking(False)
            assert ours.send(case.to_peer) == len(case.to_peer)
    if state in ("FIN-WAIT-1", "FIN-WAIT-2", "CLOSING", "LAST-ACK"):
        ours.shutdown(socket.SHUT_WR)
        case.fins += 1
    if state == "FIN-WAIT-2":
        assert receive(peer, len(case.to_peer)) == case.to_peer
        case.to_peer = b""
    if state == "CLOSING":
        peer.shutdown(socket.SHUT_WR)
    case.fins += peer_fin
    el.wait_for(lambda: el.state(ours) == state)
    return case


def unread(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def finish(lab: el.Lab, case: Case, copy: socket.socket, state: str) -> None:
    """Everything arrives, both directions go on as far as the state allows, and then it ends well."""
    peer = case.peer
    assert receive(copy, len(case.to_us)) == case.to_us
    assert receive(peer, len(case.to_peer)) == case.to_peer
    ours_closed = state in ("FIN-WAIT-1", "FIN-WAIT-2", "CLOSING", "LAST-ACK")
    peer_closed = state in ("CLOSE-WAIT", "CLOSING", "LAST-ACK")
    if not ours_closed:
        cross(copy, peer, 200_000)
        copy.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    if not peer_closed:
        cross(peer, copy, 200_000)
        peer.shutdown(socket.SHUT_WR)
    assert copy.recv(1) == b""
    el.wait_for(lambda: el.state(copy) == "CLOSED", 8)
    quiet(lab, case.port, 2)
    copy.close()
    peer.close()
    case.ours.close()


@pytest.mark.parametrize("queued", [False, True], ids=["empty", "queued"])
@pytest.mark.parametrize(
    "state",
    ["ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "CLOSING", "LAST-ACK"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_state_moves(lab: el.Lab, engine: el.Pair, kind: str, state: str, queued: bool) -> None:
    case = make_case(lab, kind, state, queued)
    lab.hold("a", case.port)
    before = codec.decode(captured(lab, engine, case.ours).image)
    lab.unhold("a", case.port)
    if queued and state != "FIN-WAIT-2":
        assert before.sent_queue and before.receive_queue == case.to_us
        assert before.sent_queue + before.unsent_queue == case.to_peer
    copy, _unused = move(lab, engine, case.ours, case.port)
    merged = state == "CLOSING" and before.unsent_queue and engine.importer.name == "repair"
    expected = "LAST-ACK" if merged else state
    assert el.state(copy) == expected
    if state in ("CLOSING", "FIN-WAIT-1", "LAST-ACK") or (queued and state != "FIN-WAIT-2"):
        lab.unhold("peer", case.port, "deaf")
    finish(lab, case, copy, state)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_windows_both_ways(lab: el.Lab, engine: el.Pair, kind: str) -> None:
    """Both receivers full, both senders with unsent data: all of it arrives, after the move."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair(kind, port)
    sent = {}
    for sock in (ours, peer):
        sock.setblocking(False)
        data = os.urandom(1 << 20)
        total = 0
        for _turn in range(200):
            try:
                total += sock.send(data[total : total + 65536])
            except BlockingIOError:
                select.select([], [sock], [], 0.02)
            if total >= len(data):
                data += os.urandom(1 << 20)
        sent[sock] = data[:total]
    copy, image = move(lab, engine, ours, port)
    facts = codec.decode(image)
    assert facts.window is not None and facts.window.snd_wnd < 65536 and facts.unsent_queue
    peer.settimeout(10)
    results = {}
    for sock, data in ((copy, sent[peer]), (peer, sent[ours])):
        results[sock] = receive(sock, len(data)) == data
    assert all(results.values())
    quiet(lab, port, 0)
    for sock in (ours, peer, copy):
        sock.close()


def repair_pair(lab: el.Lab, kind: str, port: int, ours_seq: int, peer_seq: int) -> list[socket.socket]:
    """A connection made by hand, so that its sequence numbers can be chosen."""
    family = socket.AF_INET6 if kind == "v6" else socket.AF_INET
    us, them = (el.HOST6, el.PEER6) if kind == "v6" else (el.HOST4, el.PEER4)
    made = []
    for host, local, remote, snd, rcv in (
        ("a", (us, port), (them, port), ours_seq, peer_seq),
        ("peer", (them, port), (us, port), peer_seq, ours_seq),
    ):
        with lab.host(host):
            sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(el.TCP, el.REPAIR, 1)
        sock.bind(local)
        for queue, seq in ((2, snd), (1, rcv)):
            sock.setsockopt(el.TCP, el.REPAIR_QUEUE, queue)
            sock.setsockopt(el.TCP, el.QUEUE_SEQ, struct.pack("I", seq))
        sock.setsockopt(el.TCP, socket.TCP_MAXSEG, 1460)
        sock.connect(remote)
        options = struct.pack("8I", 2, 1460, 3, 7 | 7 << 16, 4, 0, 8, 0)
        sock.setsockopt(el.TCP, el.REPAIR_OPTIONS, options)
        sock.setsockopt(el.TCP, el.REPAIR_WINDOW, struct.pack("5I", rcv, 60000, 60000, 60000, rcv))
        made.append(sock)
    for sock in made:
        sock.setsockopt(el.TCP, el.REPAIR, -1)
        sock.settimeout(10)
    return made


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("before_wrap", [1, 1000, 20_000, 50_000])
def test_sequence_wrap(lab: el.Lab, engine: el.Pair, kind: str, before_wrap: int) -> None:
    """2^32 lies inside the receive queue, the sent data or the unsent data."""
    lab.switch("a")
    port = lab.port()
    start = 2**32 - before_wrap
    ours, peer = repair_pair(lab, kind, port, start, start)
    to_us, to_peer = os.urandom(30_000), os.urandom(55_000)
    peer.sendall(to_us)
    el.wait_for(lambda: unread(ours) == len(to_us))
    lab.hold("peer", port, "deaf")
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 131072)  # some hosts begin with less
    ours.setblocking(False)
    assert ours.send(to_peer) == len(to_peer)
    copy, image = move(lab, engine, ours, port)
    sequence = codec.decode(image).sequence
    assert sequence is not None and sequence.copied_seq == start == sequence.snd_una
    lab.unhold("peer", port, "deaf")
    finish(lab, Case(ours, peer, port, to_us, to_peer), copy, "ESTABLISHED")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answered", [False, True], ids=["syn-lost", "syn-ack-held"])
def test_syn_sent(lab: el.Lab, engine: el.Pair, kind: str, answered: bool) -> None:
    """The SYN was lost, or its answer waits outside: the copy's connect() succeeds, with the same ISN."""
    lab.switch("a")
    port = lab.port()
    target = el.PEER6 if kind == "v6" else el.PEER4
    with lab.host("peer"):
        family = socket.AF_INET6 if kind == "v6" else socket.AF_INET
        listener = socket.create_server((target, port), family=family)
    with lab.host("a"):
        ours = socket.socket(socket.AF_INET if kind == "v4" else socket.AF_INET6, socket.SOCK_STREAM)
    ours.setblocking(False)
    ours.bind((el.HOST4 if kind == "v4" else f"::ffff:{el.HOST4}" if kind == "mapped" else el.HOST6, port))
    if answered:
        lab.hold("a", port, "in")  # the SYN arrives, its answer does not
    else:
        lab.hold("peer", port, "deaf")
    ours.connect_ex((f"::ffff:{target}" if kind == "mapped" else target, port))
    assert el.state(ours) == "SYN-SENT"
    first: list[el.Segment] = []

    def passed() -> bool:
        first.extend(s for s in lab.recorded(port) if s.flags & SYN)
        return len(first) >= 1 + answered

    el.wait_for(passed)
    lab.hold("a", port)
    copy, image = move(lab, engine, ours, port)
    if not answered:
        lab.unhold("peer", port, "deaf")
    facts = codec.decode(image)
    assert facts.sequence is not None and facts.sequence.iss == first[0].seq
    peer, _unused = listener.accept()
    peer.settimeout(10)
    copy.settimeout(10)
    copy.sendall(b"hello")
    assert receive(peer, 5) == b"hello"
    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    seen = lab.recorded(port)
    assert {s.seq for s in seen if s.flags & SYN and not s.from_peer} <= {first[0].seq}
    assert not [s for s in seen if s.flags & RST]
    for sock in (ours, peer, copy, listener):
        sock.close()


@contextlib.contextmanager
def ecn(lab: el.Lab, host: str, value: str) -> Iterator[None]:
    """The sysctl tcp_ecn of a host: 1 asks with every SYN, 2 answers those who ask."""
    switch = Path("/proc/sys/net/ipv4/tcp_ecn")
    with lab.host(host):
        before = switch.read_text()
        switch.write_text(value)
    try:
        yield
    finally:
        with lab.host(host):
            switch.write_text(before)


@pytest.mark.parametrize("copy_asks", [True, False])
def test_ecn_that_a_syn_has_offered(lab: el.Lab, engine: el.Pair, copy_asks: bool) -> None:
    """The module sends the same SYN; the other engine cannot, and tells."""
    port = lab.port()
    with lab.host("a"):
        ours = socket.socket()
    ours.setblocking(False)
    ours.bind((el.HOST4, port))
    lab.hold("a", port)
    lab.hold("b", port)
    with ecn(lab, "a", "1"), ecn(lab, "b", "1" if copy_asks else "2"):
        ours.connect_ex((el.PEER4, port))
        image = captured(lab, engine, ours).image
        negotiated = codec.decode(image).negotiated
        assert negotiated is not None and negotiated.flags & NegotiatedFlag.ECN
        with lab.host("b"):
            (item,) = engine.restore([image], [HERE])
    assert isinstance(item, Restored), item
    engine.discard([item.fd])
    assert engine.release([ours.fileno()], [image]) == [None]
    ours.close()
    assert ("ecn" in item.fidelity.reset) is (engine.importer.name == "repair" and not copy_asks)


def test_syn_sent_captured_with_stops(lab: el.Lab, engine: el.Pair, tmp_path: Path) -> None:
    """However long a capture takes, the first SYN is as old as it is: the peer's answer would meet an RST."""
    if engine.exporter.name == "kernel":
        pytest.skip("it does not read that sysctl, and no process is stopped")
    slow, stop_s, slack_ms = tmp_path / "slow", 0.05, 12
    os.mkfifo(slow)
    pipe = os.open(slow, os.O_RDWR)
    port = lab.port()

    def write_late() -> None:
        time.sleep(stop_s)
        os.write(pipe, b"4096 131072 6291456")

    def capture(ours: socket.socket) -> Captured:
        # This thread alone has a pipe for that sysctl: it is stopped where it reads it.
        with lab.host("a"):
            for outcome in (
                libc.unshare(CLONE_NEWNS),
                libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None),
                libc.mount(bytes(slow), b"/proc/sys/net/ipv4/tcp_rmem", None, MS_BIND, None),
            ):
                assert outcome == 0, os.strerror(ctypes.get_errno())
        return captured(lab, engine, ours)

    lab.switch("a")
    with lab.host("peer"):
        listener = socket.create_server((el.PEER4, port))
    with lab.host("a"), socket.socket() as ours:
        ours.setblocking(False)
        ours.bind((el.HOST4, port))
        lab.hold("a", port, "in")
        ours.connect_ex((el.PEER4, port))
        lab.unhold("a", port, "in")
        first = next(s for s in lab.recorded(port) if s.flags & SYN)
        with ThreadPoolExecutor(2) as pool:
            begun = time.monotonic()
            pool.submit(write_late)
            image = codec.decode(pool.submit(capture, ours).result(timeout=20).image)
            assert time.monotonic() - begun > stop_s
    listener.close()
    os.close(pipe)
    assert image.timestamp is not None and image.timestamp.syn_first_tsval is not None and first.tsval
    assert 0 <= first.tsval - image.timestamp.syn_first_tsval <= slack_ms


@pytest.mark.parametrize("kind", KINDS)
def test_blocked_connect_does_not_begin_again(lab: el.Lab, engine: el.Pair, kind: str) -> None:
    """A stopped thread's connect() is restarted by the kernel: it must fail then, and send nothing."""
    lab.switch("a")
    port = lab.port()
    local, target = {
        "v4": (el.HOST4, el.PEER4),
        "v6": (el.HOST6, el.PEER6),
        "mapped": (f"::ffff:{el.HOST4}", f"::ffff:{el.PEER4}"),
    }[kind]
    with lab.host("a"):
        ours = socket.socket(socket.AF_INET if kind == "v4" else socket.AF_INET6, socket.SOCK_STREAM)
    ours.bind((local, port))
    lab.hold("peer", port, "deaf")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, b"%d" % ours.connect_ex((target, port)))
        os._exit(0)
    try:
        el.wait_for(lambda: el.state(ours) == "SYN-SENT")
        inode = os.fstat(ours.fileno()).st_ino
        assert engine.stop([inode], [child], 5.0) == [None]
        image = captured(lab, engine, ours).image
        lab.recorded(port)
        with lab.host("a"):
            assert engine.release([ours.fileno()], [image]) == [None]
        engine.resume([inode])
        assert select.select([read_end], [], [], 5)[0]
        forbidden = (errno.ENETUNREACH, errno.EHOSTUNREACH)
        ends = forbidden if engine.exporter.name == "repair" else (errno.ECONNABORTED,)
        assert int(os.read(read_end, 9)) in ends
        assert not lab.recorded(port)
    finally:
        engine.owners.resume_all()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)
        ours.close()


def test_shut_for_reading(lab: el.Lab, engine: el.Pair) -> None:
    """shutdown(SHUT_RD) is no FIN: the peer sees nothing of it, the copy's receivers do."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    ours.shutdown(socket.SHUT_RD)
    copy, _unused = move(lab, engine, ours, port)
    assert copy.recv(1) == b""
    copy.sendall(b"still")
    assert receive(peer, 5) == b"still"
    quiet(lab, port, 0)
    for sock in (copy, peer, ours):
        sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_listener_with_children(lab: el.Lab, engine: el.Pair, kind: str) -> None:
    """Each child moves as a connection; the listener listens on, with its backlog."""
    lab.switch("a")
    port = lab.port()
    listener = lab.listener(kind, port)
    clients = []
    for i in range(5):
        client, address = lab.client(kind)
        client.connect((address, port))
        client.sendall(b"%d" % i)
        clients.append(client)
    lab.hold("a", port)
    image = captured(lab, engine, listener).image
    assert codec.decode(image).listener.backlog == 1024  # type: ignore[union-attr]
    (refused,) = engine.release([listener.fileno()], [image])
    assert isinstance(refused, Refusal) and refused.code == Code.CHANGED
    keeper = Keeper.start(listener.fileno())
    assert (keeper.take(), keeper.take()) == (len(clients), len(clients))
    kept = [socket.socket(fileno=fd) for fd in keeper.sockets()]
    children = [sock for sock in kept if sock.family != socket.AF_UNIX and el.state(sock) == "ESTABLISHED"]
    assert len(children) == len(clients)
    copies = []
    moved, _unused = move(lab, engine, listener, port)
    for child in children:
        lab.hold("a", port)
        copies.append(move(lab, engine, child, port)[0])
    assert sorted(receive(copy, 1) for copy in copies) == [b"%d" % i for i in range(5)]
    assert el.state(moved) == "LISTEN" and el.state(listener) == "CLOSED"
    late, address = lab.client(kind)
    late.connect((address, port))
    accepted, _unused = moved.accept()
    late.sendall(b"late")
    assert receive(accepted, 4) == b"late"
    quiet(lab, port, 0)
    for sock in (late, accepted, moved, listener, *copies, *kept, *clients):
        sock.close()
    keeper.end()
    el.wait_for(lambda: not keeper.alive)
    assert keeper.sockets() == []


@pytest.mark.parametrize("kind", ["v4", "v6", "dual", "v6only"])
@pytest.mark.parametrize("bound", [False, True])
def test_unconnected(lab: el.Lab, engine: el.Pair, kind: str, bound: bool) -> None:
    family = socket.AF_INET if kind == "v4" else socket.AF_INET6
    with lab.host("a"):
        sock = socket.socket(family, socket.SOCK_STREAM)
    if kind in ("dual", "v6only"):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, kind == "v6only")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    port = lab.port() if bound else 0
    if bound:
        sock.bind({"v4": (el.HOST4, port), "v6": (el.HOST6, port)}.get(kind, ("::", port)))
    image = captured(lab, engine, sock).image
    fd = restored(lab, engine, image)
    name = sock.getsockname()
    with lab.host("a"):
        assert engine.release([sock.fileno()], [image]) == [None]
        assert engine.deaden(sock.fileno()) is None  # again, as after a crash
    dead(sock)
    with lab.host("b"):
        assert engine.activate([fd], [image]) == [None]
    copy = socket.socket(fileno=fd)
    assert copy.getsockname() == name and copy.family == family
    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if family == socket.AF_INET6:
        wanted = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        assert copy.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == wanted
    if bound:
        (refused,) = restore_again(lab, engine, image)
        assert isinstance(refused, Refusal) and refused.code == Code.PORT_TAKEN
    sock.close()
    copy.close()


def dead(sock: socket.socket) -> None:
    """Nothing can be made of it any more."""
    assert errno_of(sock.listen) == errno.EINVAL
    assert errno_of(sock.accept) == errno.EINVAL
    there = ("::1" if sock.family == socket.AF_INET6 else "127.0.0.1", 22)
    assert [errno_of(sock.connect, there) for _turn in range(2)] == [errno.EISCONN] * 2
    assert [errno_of(sock.send, b"!") for _turn in range(2)] == [errno.ECONNABORTED, errno.EPIPE]
    assert errno_of(sock.listen) == errno.EINVAL
    assert sock.getsockopt(el.TCP, el.REPAIR) == 0


def errno_of(call: Callable[..., object], *args: object) -> int:
    with pytest.raises(OSError) as raised:
        call(*args)
    assert raised.value.errno is not None
    return raised.value.errno


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("what", ["device", "foreign", "deferred", "options", "shared"])
def test_dead_whatever_it_was_set_to(lab: el.Lab, engine: el.Pair, kind: str, what: str) -> None:
    """Options that would lead its last connection elsewhere do not: the segment never leaves the host."""
    family, level = (
        (socket.AF_INET, socket.IPPROTO_IP) if kind == "v4" else (socket.AF_INET6, socket.IPPROTO_IPV6)
    )
    with lab.host("a"):
        sock, other = socket.socket(family), socket.socket(family)
    port, address = lab.port(), el.HOST4 if kind == "v4" else el.HOST6
    if what == "device":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    elif what == "foreign":
        sock.setsockopt(level, 15 if kind == "v4" else 78, 1)  # IP_FREEBIND
        address = "192.0.2.77" if kind == "v4" else "2001:db8::77"
    elif what == "deferred":
        sock.setsockopt(el.TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
    elif what == "options":
        if kind == "v6":
            sock.setsockopt(level, socket.IPV6_TCLASS, 8)
        else:
            sock.setsockopt(level, socket.IP_OPTIONS, bytes([131, 7, 4, *socket.inet_aton(el.PEER4), 0]))
    else:
        for one in (sock, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((address, port))
    if what == "shared":
        other.bind((address, port))
        other.listen()
    image = captured(lab, engine, sock).image
    lab.recorded(port)
    with lab.host("a"):
        assert engine.release([sock.fileno()], [image]) == [None]
    dead(sock)
    assert el.state(other) == ("LISTEN" if what == "shared" else "CLOSED")
    sock.close()
    other.close()
    assert lab.recorded(port) == []


def test_what_cannot_be_made_dead_is_as_before(lab: el.Lab, engine: el.Pair) -> None:
    """No loopback address to connect to: refused, and the owner notices nothing."""
    if engine.exporter.name == "kernel":
        pytest.skip("it needs no address for that")
    with lab.host("a"):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    port = lab.port()
    sock.bind((el.HOST4, port))
    image = captured(lab, engine, sock).image
    rule = ["ip", "-n", lab.name("a"), "route", "add", "table", "7", "unreachable", "default"]
    subprocess.run(rule, check=True)
    rules = ["ip", "-n", lab.name("a"), "rule"]
    subprocess.run([*rules, "add", "to", "127.0.0.0/8", "lookup", "7", "pref", "1"], check=True)
    subprocess.run([*rules, "del", "pref", "0"], check=True)
    subprocess.run([*rules, "add", "pref", "2", "lookup", "local"], check=True)
    try:
        with lab.host("a"):
            (refused,) = engine.release([sock.fileno()], [image])
    finally:
        subprocess.run([*rules, "add", "pref", "0", "lookup", "local"], check=True)
        subprocess.run([*rules, "del", "pref", "1"], check=True)
        subprocess.run([*rules, "del", "pref", "2"], check=True)
    assert isinstance(refused, Refusal) and refused.code == Code.INTERNAL
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    sock.listen()
    assert sock.getsockname() == (el.HOST4, port)
    sock.close()


def restore_again(lab: el.Lab, engine: el.Pair, image: bytes) -> list[Restored | Refusal]:
    with lab.host("b"):
        return engine.restore([image], [HERE])


def test_a_hole_is_told_only_while_there_is_one(lab: el.Lab, engine: el.Pair) -> None:
    """The kernel counts what ever came out of order; what still waits is what the copy will not have."""
    lab.switch("a")
    sock, peer = lab.pair("v4", lab.port())
    far, near = (Endpoint(ip_address(name[0]), name[1]) for name in (peer.getsockname(), sock.getsockname()))
    before, then, behind = b"0123456789", b"abcdefghij", 10
    peer.setsockopt(el.TCP, el.REPAIR, 1)
    numbers = []
    for queue in (1, 2):  # TCP_RECV_QUEUE, TCP_SEND_QUEUE
        peer.setsockopt(el.TCP, el.REPAIR_QUEUE, queue)
        numbers.append(struct.unpack("I", peer.getsockopt(el.TCP, el.QUEUE_SEQ, 4))[0])
    peer.setsockopt(el.TCP, el.REPAIR, -1)
    with (
        lab.host("peer"),
        segments(FourTuple(far, near), then, sequence=numbers[1] + behind, ack=numbers[0]) as send,
    ):
        send()
    el.wait_for(lambda: struct.unpack_from("I", sock.getsockopt(el.TCP, socket.TCP_INFO, 240), 224)[0] > 0)
    left_out = engine.exporter.name == "repair"
    assert ("out-of-order-queue" in captured(lab, engine, sock).fidelity.reset) is left_out
    peer.sendall(before + then)
    assert sock.recv(20, socket.MSG_WAITALL) == before + then
    assert "out-of-order-queue" not in captured(lab, engine, sock).fidelity.reset
    sock.close()
    peer.close()
