# SPDX-License-Identifier: MIT
"""The engine's contract: reading changes nothing, closing says nothing, bad input is refused by name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from sockmi import image as codec
from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Captured, Placement, Restored
from sockmi.engine.repair import INJECT_MARK, RepairEngine
from sockmi.redirect.held import HeldPackets
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables
from sockmi.refusal import Code, Refusal
from tests.lab import engine_lab as el

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
KINDS = ["v4", "v6", "mapped"]
FIN, RST = 1, 4
HERE = Placement(None, False)


@pytest.fixture(scope="module")
def lab() -> Iterator[el.Lab]:
    with el.lab() as it:
        yield it


@pytest.fixture(scope="module")
def engine() -> el.Pair:
    """Of both hosts; tests/kmod/inside has this suite for the others."""
    return el.make_pair("repair")


def capture(lab: el.Lab, engine: el.Pair, sock: socket.socket) -> bytes:
    with lab.host("a"):
        (item,) = engine.capture([sock.fileno()])
    assert isinstance(item, Captured), item
    return item.image


# -- capture changes nothing --


def _plain(address: str) -> IPv4Address | IPv6Address:
    """As it is on the wire: an IPv4 address for a v4-mapped one."""
    ip = ip_address(address)
    return (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip


def _pump(sock: socket.socket, seed: int, stop: threading.Event | None) -> tuple[bytes, bytes]:
    """Send random bytes in random pieces and read what comes, until ``stop`` (or the other end's FIN).

    Returns the SHA-256 of what was sent and of what was received.
    """
    randomness = random.Random(seed)  # noqa: S311
    pool = randomness.randbytes(1 << 20)
    sent_sum, got_sum = hashlib.sha256(), hashlib.sha256()
    pending, sending, receiving = b"", True, True
    while sending or receiving:
        readable, writable, _unused = select.select(
            [sock] if receiving else [], [sock] if sending else [], [], 0.05
        )
        if readable:
            data = sock.recv(65536)
            got_sum.update(data)
            receiving = bool(data)
        if sending and not pending and (stop.is_set() if stop else not receiving):
            sock.shutdown(socket.SHUT_WR)
            sending = False
        elif writable:
            start = randomness.randrange(len(pool))
            pending = pending or pool[start : start + randomness.randrange(1, 20_000)]
            done = sock.send(pending)
            sent_sum.update(pending[:done])
            pending = pending[done:]
    return sent_sum.digest(), got_sum.digest()


def _fork_owner(sock: socket.socket) -> tuple[int, int]:
    """A process that pumps until the end of the stream, then writes the two sums; its pid, and the pipe."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(read_end)
            os.write(write_end, b"".join(_pump(sock, 1, None)))
        os._exit(0)
    os.close(write_end)
    return child, read_end


class _Freezer:
    """Freezes a connection of this network namespace as the daemon does, and undoes it."""

    def __init__(self, engine: el.Pair, sock: socket.socket, owner: int) -> None:
        local, remote = (Endpoint(_plain(end[0]), end[1]) for end in (sock.getsockname(), sock.getpeername()))
        self.connection = FourTuple(local, remote)
        self.engine = engine
        self.delivered = 0
        self._fd, self._owner, self._inode = sock.fileno(), owner, os.fstat(sock.fileno()).st_ino
        self._tables = Tables(Settings(devices=("eth0",), forward=False))
        self._tables.setup()
        self._kept = HeldPackets(self._tables.settings.log_group, self._tables.settings.inject_mark)

    def freeze(self, hold: bool) -> Captured | Refusal:
        """Stop the owner, hold the packets, capture."""
        assert self.engine.stop([self._inode], [self._owner], 5.0) == [None]
        if hold:
            self._kept.want([self.connection])
            self._tables.hold([self.connection], 5.0)
        (item,) = self.engine.capture([self._fd])
        return item

    def undo(self) -> None:
        """Let packets through again, deliver what was held, resume the owner."""
        self._tables.unhold([self.connection])
        self.delivered += self._kept.deliver(self._kept.take([self.connection]))
        self.engine.resume([self._inode])

    def close(self) -> None:
        """Undo, and leave nothing."""
        self.undo()
        self.engine.owners.resume_all()
        self._kept.close()
        self._tables.teardown()
        self._tables.close()


@pytest.mark.parametrize(("kind", "rounds"), [("v4", 1000), ("v6", 200), ("mapped", 100)])
def test_freeze_and_abort_under_load(lab: el.Lab, engine: el.Pair, kind: str, rounds: int) -> None:
    """The owner is another process; the stream goes on byte-exact, options stay. Now and then without
    a hold: then the stream may move while it is read, which is refused by name.
    """
    lab.switch("a")
    port = lab.port()
    rounds = rounds // 10 if "SOCKMI_INSIDE" in os.environ else rounds  # kernels in guests take their time
    ours, peer = lab.pair(kind, port)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for sock in (ours, peer):
        sock.setblocking(False)
    child, read_end = _fork_owner(ours)
    stop, sums = threading.Event(), []
    thread = threading.Thread(target=lambda: sums.append(_pump(peer, 2, stop)))
    thread.start()
    changed = [0, 0]
    try:
        with lab.host("a"), contextlib.closing(_Freezer(engine, ours, child)) as it:
            for i in range(rounds):
                hold = i % 10 != 0
                item = it.freeze(hold)
                if isinstance(item, Captured):
                    codec.decode(item.image)
                else:  # a packet may be past the hold already when that comes
                    assert item.code == Code.CHANGED, item
                    changed[hold] += 1
                it.undo()
                assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
                assert ours.getsockopt(el.TCP, el.REPAIR) == 0
            assert it.delivered, "nothing was ever held"
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
        theirs = os.read(read_end, 64)
        assert (theirs[:32], theirs[32:]) == (sums[0][1], sums[0][0])
        assert changed[True] <= rounds // 10, changed
    finally:
        stop.set()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        thread.join(5)
        with contextlib.suppress(ChildProcessError):  # reaped by the thread that traced it
            os.waitpid(child, 0)
        os.close(read_end)
        ours.close()
        peer.close()
    assert not [s for s in lab.recorded(port) if s.flags & RST]


def test_capture_leaves_the_peek_offset(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    peer.sendall(b"0123456789")
    try:
        ours.setsockopt(socket.SOL_SOCKET, 42, 3)  # SO_PEEK_OFF
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("TCP has SO_PEEK_OFF since Linux 6.9")
    el.wait_for(lambda: len(ours.recv(10, socket.MSG_PEEK)) >= 7)
    ours.setsockopt(socket.SOL_SOCKET, 42, 3)
    image = codec.decode(capture(lab, engine, ours))
    assert image.receive_queue == b"0123456789"
    assert ours.getsockopt(socket.SOL_SOCKET, 42) == 3
    assert ours.recv(2, socket.MSG_PEEK) == b"34"
    ours.close()
    peer.close()


def test_large_and_many(lab: el.Lab, engine: el.Pair) -> None:
    """A batch that is larger than the first buffer; images are of the sockets in order."""
    lab.switch("a")
    port = lab.port()
    pairs = [lab.pair("v4", port) for _turn in range(8)]
    for i, (ours, peer) in enumerate(pairs):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        peer.settimeout(1)
        with contextlib.suppress(TimeoutError):
            peer.sendall(bytes([i]) * 400_000)
    with lab.host("a"):
        items = engine.capture([ours.fileno() for ours, _unused in pairs])
    for i, item in enumerate(items):
        assert isinstance(item, Captured), item
        queue = codec.decode(item.image).receive_queue
        assert queue and set(queue) == {i}
    for ours, peer in pairs:
        ours.close()
        peer.close()


# -- release --


def _blocked(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run ``call`` in a thread; its result, or its errno, is in the list afterwards."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except OSError as error:
            outcome.append(error.errno)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive(), "not blocked"
    return thread, outcome


@pytest.mark.parametrize("kind", ["v4", "v6"])
@pytest.mark.parametrize("how", ["recv", "send", "poll", "epoll-edge", "none"])
def test_release_wakes_the_owner(lab: el.Lab, engine: el.Pair, kind: str, how: str) -> None:
    """Nobody is stopped here: the calls are caught in the middle by the release itself."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair(kind, port)
    ours.settimeout(None)
    gone = select.EPOLLERR | select.EPOLLHUP
    epoll = select.epoll()
    thread: threading.Thread | None = None
    outcome: list[object] = [None]
    if how == "recv":
        thread, outcome = _blocked(lambda: ours.recv(1))
    elif how == "send":
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)

        def fill() -> None:
            while True:
                ours.send(bytes(65536))

        thread, outcome = _blocked(fill)
        time.sleep(0.1)
    elif how == "poll":
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        thread, outcome = _blocked(lambda: poll.poll()[0][1] & gone)
    elif how == "epoll-edge":
        epoll.register(ours, select.EPOLLIN | select.EPOLLET)
        thread, outcome = _blocked(lambda: epoll.poll()[0][1] & gone)
    lab.hold("a", port)
    image = capture(lab, engine, ours)
    assert engine.release([ours.fileno()], [image]) == [None]
    if thread:
        thread.join(3)
        assert not thread.is_alive()
    # Caught in the middle of recv, the kernel says EPIPE (sk_wait_event); a restarted one ECONNABORTED.
    expected = {"recv": errno.EPIPE, "send": errno.ECONNABORTED, "poll": gone, "epoll-edge": gone}
    if how in ("recv", "send"):
        assert outcome[0] in (expected[how], errno.ECONNABORTED, errno.EPIPE)
    elif how != "none":
        assert outcome[0] == gone
    errors = []
    for call in (lambda: ours.recv(1), lambda: ours.recv(1), lambda: ours.send(b"x"), lambda: ours.recv(1)):
        with pytest.raises(OSError) as raised:
            call()
        errors.append(raised.value.errno)
    first = [] if outcome[0] == errno.ECONNABORTED else [errno.ECONNABORTED]
    rest = [errno.ENOTCONN, errno.ENOTCONN, errno.EPIPE, errno.ENOTCONN]
    wanted = (first + rest[1:]) if first else rest
    assert errors == wanted
    lab.recorded(port)
    lab.unhold("a", port)
    ours.close()
    epoll.close()
    time.sleep(0.05)
    assert not lab.recorded(port), "closing a released descriptor has sent something"
    peer.close()


def test_release_wakes_each_accept(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    listener = lab.listener("v4", lab.port())
    blocked = [_blocked(listener.accept) for _turn in range(3)]
    image = capture(lab, engine, listener)
    assert engine.release([listener.fileno()], [image]) == [None]
    for thread, outcome in blocked:
        thread.join(3)
        assert outcome == [errno.EINVAL]
    with pytest.raises(OSError) as raised:
        listener.accept()
    assert raised.value.errno == errno.EINVAL
    listener.close()


@pytest.mark.parametrize("what", ["sent", "received", "read", "state", "acknowledged"])
def test_release_refuses_what_has_changed(lab: el.Lab, engine: el.Pair, what: str) -> None:
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    peer.sendall(b"before")
    el.wait_for(lambda: len(ours.recv(6, socket.MSG_PEEK)) == 6)
    if what == "acknowledged":
        lab.hold("peer", port, "deaf")
        ours.sendall(b"in flight")
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    image = capture(lab, engine, ours)
    assert engine.compare([ours.fileno()], [image]) == [None]
    if what == "sent":
        ours.sendall(b"x")
        assert peer.recv(1) == b"x"
    elif what == "received":
        peer.sendall(b"x")
        el.wait_for(lambda: len(ours.recv(7, socket.MSG_PEEK)) == 7)
    elif what == "read":
        ours.recv(1)
    elif what == "state":
        peer.shutdown(socket.SHUT_WR)
        el.wait_for(lambda: el.state(ours) == "CLOSE-WAIT")
    else:
        lab.unhold("peer", port, "deaf")
        assert peer.recv(9, socket.MSG_WAITALL) == b"in flight"
    if engine.exporter.name == "repair":  # the kernel's have been frozen until then, or are frozen again
        (refused,) = engine.compare([ours.fileno()], [image])
        assert isinstance(refused, Refusal) and refused.code == Code.CHANGED
    (refused,) = engine.release([ours.fileno()], [image])
    assert isinstance(refused, Refusal) and refused.code == Code.CHANGED
    ours.sendall(b"goes on")
    assert peer.recv(100).endswith(b"goes on")
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
    ours.close()
    peer.close()


# -- restore, discard, activate --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["ESTABLISHED", "FIN-WAIT-2", "CLOSE-WAIT"])
def test_discard_says_nothing(lab: el.Lab, engine: el.Pair, kind: str, state: str) -> None:
    """Not even with unread data and unacknowledged data; the original goes on as if nothing had been."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair(kind, port)
    lab.hold("b", port)
    peer.sendall(b"unread")
    if state == "CLOSE-WAIT":
        peer.shutdown(socket.SHUT_WR)
        el.wait_for(lambda: el.state(ours) == state)
    elif state == "FIN-WAIT-2":
        ours.shutdown(socket.SHUT_WR)
        el.wait_for(lambda: el.state(ours) == state)
    el.wait_for(lambda: len(ours.recv(6, socket.MSG_PEEK)) == 6)
    image = capture(lab, engine, ours)
    with lab.host("b"):
        (made,) = engine.restore([image], [HERE])
    assert isinstance(made, Restored), made
    lab.hold("a", port, "out")  # the original may have a delayed ACK to send
    lab.unhold("b", port)  # from here on anything of the copy would be seen
    lab.recorded(port)
    engine.discard([made.fd, -1])
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(made.fd)
    time.sleep(0.05)
    assert not lab.recorded(port)
    lab.unhold("a", port, "out")
    assert ours.recv(100) == b"unread"
    if state != "FIN-WAIT-2":
        ours.sendall(b"on")
        assert peer.recv(2) == b"on"
    ours.close()
    peer.close()


def test_dormant_copy_of_a_dead_process_says_nothing(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    image = capture(lab, engine, ours)
    lab.recorded(port)
    child = os.fork()
    if child == 0:
        with lab.host("b"):
            engine.restore([image], [HERE])
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.05)
    assert not lab.recorded(port)
    ours.close()
    peer.close()


def _make_foreign(lab: el.Lab) -> None:
    """b without the service addresses; packets to them are delivered if they carry the inject mark."""
    peers = "".join(
        f"neigh replace {host} lladdr {el.MAC['peer']} dev eth0 nud permanent\n"
        for host in (el.PEER4, el.PEER6)
    )
    lines = f"""addr del {el.HOST4}/24 dev eth0
        addr del {el.HOST6}/64 dev eth0
        addr add 10.77.0.20/24 dev eth0
        addr add fd77::20/64 dev eth0 nodad
        {peers}
        rule add fwmark {INJECT_MARK} lookup 100
        route add local default dev lo table 100"""
    lines6 = f"""rule add fwmark {INJECT_MARK} lookup 100
        route add local default dev lo table 100"""
    rules = f"""table inet divert {{ chain pre {{ type filter hook prerouting priority mangle;
        ip daddr {el.HOST4} meta l4proto tcp meta mark set {INJECT_MARK}
        ip6 daddr {el.HOST6} meta l4proto tcp meta mark set {INJECT_MARK}
        }}
        }}"""
    with lab.host("b"):
        subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True, timeout=20)
        subprocess.run(["ip", "-6", "-batch", "-"], input=lines6, text=True, check=True, timeout=20)
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=20)


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_placement(engine: el.Pair, kind: str) -> None:
    """The copy keeps an address that its host does not have, also when a FIN must be delivered to it."""
    with el.lab() as lab:
        port = lab.port()
        ours, peer = lab.pair(kind, port)
        _make_foreign(lab)
        peer.shutdown(socket.SHUT_WR)
        el.wait_for(lambda: el.state(ours) == "CLOSE-WAIT")
        lab.hold("a", port)
        lab.hold("b", port)
        image = capture(lab, engine, ours)
        address = Endpoint(ip_address(el.HOST6 if kind == "v6" else el.HOST4), port)
        with lab.host("b"):
            (refused,) = engine.restore([image], [Placement(address, False)])
            assert isinstance(refused, Refusal), refused
            (made,) = engine.restore([image], [Placement(address, True)])
            assert isinstance(made, Restored), made
        assert engine.release([ours.fileno()], [image]) == [None]
        lab.switch("b")
        lab.unhold("b", port)
        with lab.host("b"):
            assert engine.activate([made.fd], [image]) == [None]
        copy = socket.socket(fileno=made.fd)
        copy.settimeout(5)
        assert el.state(copy) == "CLOSE-WAIT" and copy.recv(1) == b""
        copy.sendall(b"from elsewhere")
        assert peer.recv(100) == b"from elsewhere"
        copy.close()
        assert peer.recv(1) == b""
        assert not [s for s in lab.recorded(port) if s.flags & RST]
        ours.close()
        peer.close()


def test_translated_placement(lab: el.Lab, engine: el.Pair) -> None:
    """The copy has another port than the original: what a NAT redirect needs."""
    lab.switch("a")
    port, other = lab.port(), lab.port()
    ours, peer = lab.pair("v4", port)
    image = capture(lab, engine, ours)
    with lab.host("b"):
        (made,) = engine.restore([image], [Placement(Endpoint(ip_address(el.HOST4), other), False)])
    assert isinstance(made, Restored), made
    if engine.importer.name == "kernel":  # before, calls on it would wait
        lab.hold("b", other)
        assert engine.activate([made.fd], [image]) == [None]
    copy = socket.socket(fileno=made.fd)
    assert copy.getsockname() == (el.HOST4, other) and copy.getpeername() == ours.getpeername()
    engine.discard([copy.detach()])
    ours.close()
    peer.close()


def test_windows_and_path(lab: el.Lab, engine: el.Pair) -> None:
    """MSS, scales, clock and advertised window are those of the original."""
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    peer.sendall(bytes(300_000))
    got = 0
    while got < 300_000:
        got += len(ours.recv(100_000))
    ours.sendall(b"x")
    assert peer.recv(1)
    before = ours.getsockopt(el.TCP, socket.TCP_INFO, 104)
    last = [s for s in lab.recorded(port) if not s.from_peer][-1]
    lab.hold("a", port)
    lab.hold("b", port)
    image = capture(lab, engine, ours)
    with lab.host("b"):
        (made,) = engine.restore([image], [HERE])
        assert isinstance(made, Restored), made
    assert engine.release([ours.fileno()], [image]) == [None]
    lab.switch("b")
    lab.unhold("b", port)
    with lab.host("b"):
        assert engine.activate([made.fd], [image]) == [None]
    copy = socket.socket(fileno=made.fd)
    after = copy.getsockopt(el.TCP, socket.TCP_INFO, 104)
    assert before[5] & 7 == after[5] & 7  # tcpi_options: timestamps, SACK, scaling
    assert before[6] == after[6]  # both scales
    assert struct.unpack_from("I", before, 16) == struct.unpack_from("I", after, 16)  # tcpi_snd_mss
    copy.sendall(b"y")
    assert peer.recv(1) == b"y"
    first = next(s for s in lab.recorded(port) if not s.from_peer)
    assert first.window >= last.window - 1, "the window has shrunk"
    assert last.tsval is not None and first.tsval is not None
    assert 0 <= (first.tsval - last.tsval) % 2**32 < 10_000
    copy.close()
    ours.close()
    peer.close()


def test_hundred_in_one_call(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    port = lab.port()
    listener = lab.listener("v4", port)
    pairs = []
    for _turn in range(100):
        peer, address = lab.client("v4")
        peer.connect((address, port))
        pairs.append((listener.accept()[0], peer))
    lab.hold("a", port)
    lab.hold("b", port)
    fds = [ours.fileno() for ours, _unused in pairs]
    with lab.host("a"):
        images = [item.image for item in engine.capture(fds) if isinstance(item, Captured)]
    assert len(images) == len(fds)
    with lab.host("b"):
        made = [
            item.fd for item in engine.restore(images, [HERE] * len(images)) if isinstance(item, Restored)
        ]
    assert len(made) == len(fds)
    assert engine.release(fds, images) == [None] * len(fds)
    lab.switch("b")
    lab.unhold("b", port)
    with lab.host("b"):
        assert engine.activate(made, images) == [None] * len(fds)
    copies = [socket.socket(fileno=fd) for fd in made]
    for i, (copy, (_unused, peer)) in enumerate(zip(copies, pairs, strict=True)):
        copy.settimeout(5)
        peer.sendall(b"%d" % i)
        assert copy.recv(10) == b"%d" % i
        copy.sendall(b"%d!" % i)
        assert peer.recv(10) == b"%d!" % i
    assert not [s for s in lab.recorded(port) if s.flags & (RST | FIN)]
    for sock in (*copies, *(s for pair in pairs for s in pair), listener):
        sock.close()


# -- refusals --


def refused_capture(lab: el.Lab, engine: el.Pair, fd: int) -> Refusal:
    with lab.host("a"):
        (item,) = engine.capture([fd])
    assert isinstance(item, Refusal), item
    assert len(item.message) > 20
    return item


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [(b"", b""), (b"data", b""), (b"", b"more"), (b"data", b"more")]
)
@pytest.mark.parametrize("read", [False, True])
def test_urgent_data_is_refused(  # noqa: PLR0917
    lab: el.Lab, engine: el.Pair, inline: bool, before: bytes, after: bytes, read: bool
) -> None:
    """Wherever the mark is, as long as it is in the queue; when it is past, the socket moves."""
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
    if before:
        peer.sendall(before)
    peer.send(b"!", socket.MSG_OOB)
    if after:
        peer.sendall(after)
    total = len(before + after) + 1
    el.wait_for(lambda: _queued(ours) >= total)
    if read and not inline:
        ours.settimeout(None)  # with a timeout, Python would wait for POLLIN first
        assert ours.recv(1, socket.MSG_OOB) == b"!"
    if engine.exporter.name == "repair":
        assert refused_capture(lab, engine, ours.fileno()).code == Code.URGENT_DATA
    elif engine.importer.name == "repair":
        image = capture(lab, engine, ours)
        (refused,) = engine.restore([image], [HERE])
        assert isinstance(refused, Refusal) and refused.code == Code.URGENT_DATA
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE) == inline
    peer.sendall(b"end")
    data = b""
    while not data.endswith(b"end"):
        data += ours.recv(100)
    assert data == before + (b"!" if inline else b"") + after + b"end"
    codec.decode(capture(lab, engine, ours))
    ours.close()
    peer.close()


def _queued(sock: socket.socket) -> int:
    """rcv_nxt - irs - 1, from TCP_INFO: bytes received so far (RFC 4898 tcpEStatsAppHCThruOctetsReceived)."""
    return int(struct.unpack_from("Q", sock.getsockopt(el.TCP, socket.TCP_INFO, 240), 128)[0])


def test_capture_refuses_by_name(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    ours.setsockopt(el.TCP, el.REPAIR, 1)
    assert refused_capture(lab, engine, ours.fileno()).code == Code.IN_REPAIR
    assert ours.getsockopt(el.TCP, el.REPAIR) == 1, "somebody else's repair was ended"
    ours.setsockopt(el.TCP, el.REPAIR, -1)
    with lab.host("a"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        assert refused_capture(lab, engine, datagram.fileno()).code == Code.NOT_TCP
    read_end, write_end = os.pipe()
    assert refused_capture(lab, engine, read_end).code == Code.NO_SUCH_SOCKET
    os.close(read_end)
    os.close(write_end)
    assert refused_capture(lab, engine, read_end).code == Code.NO_SUCH_SOCKET
    peer.sendall(b"unread")
    el.wait_for(lambda: len(ours.recv(6, socket.MSG_PEEK)) == 6)
    ours.shutdown(socket.SHUT_WR)
    peer.close()
    el.wait_for(lambda: el.state(ours) == "CLOSED")
    assert refused_capture(lab, engine, ours.fileno()).code == Code.STATE
    ours.close()


def test_without_privilege(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    ours, peer = lab.pair("v4", lab.port())
    image = capture(lab, engine, ours)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            (one,) = engine.capture([ours.fileno()])
            (two,) = engine.restore([image], [HERE])
            (three,) = engine.release([ours.fileno()], [image])
            codes = [item.code if isinstance(item, Refusal) else "none" for item in (one, two, three)]
            os.write(write_end, " ".join(codes).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 200).decode().split() == [Code.NO_PRIVILEGE] * 3
    os.close(read_end)
    os.close(write_end)
    ours.close()
    peer.close()


def _open_descriptors() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{path.name} {path.readlink()}")
    return sorted(line for line in found if "/proc/" not in line)


def test_restore_refuses_by_name(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    image = capture(lab, engine, ours)
    broken = bytearray(image)
    broken[40] ^= 1
    elsewhere = Placement(Endpoint(ip_address("10.99.0.1"), port), False)
    with lab.host("b"):
        items = engine.restore([image, image, bytes(broken), b"", image], [HERE, HERE, HERE, HERE, elsewhere])
    first = items[0]
    assert isinstance(first, Restored)
    codes = [item.code for item in items[1:] if isinstance(item, Refusal)]
    assert codes == [Code.TUPLE_TAKEN, Code.IMAGE, Code.IMAGE, Code.RESTORE]
    engine.discard([first.fd])
    before = _open_descriptors()
    with lab.host("b"):
        engine.restore([bytes(broken), image], [HERE, elsewhere])
    assert _open_descriptors() == before, "a refused copy has left a descriptor"
    ours.close()
    peer.close()


def test_undelivered_fin_is_refused(lab: el.Lab, engine: el.Pair) -> None:
    """Without a hold that lets the mark in, the copy cannot learn that its peer has closed."""
    if engine.importer.name == "kernel":
        pytest.skip("nothing is told by packets")
    lab.switch("a")
    port = lab.port()
    ours, peer = lab.pair("v4", port)
    peer.shutdown(socket.SHUT_WR)
    el.wait_for(lambda: el.state(ours) == "CLOSE-WAIT")
    image = capture(lab, engine, ours)
    lab.hold("b", port)
    with lab.host("b"):
        (item,) = RepairEngine(inject_mark=0x1234).restore([image], [HERE])
    assert isinstance(item, Refusal) and item.code == Code.RESTORE and "inject mark" in item.message
    ours.close()
    peer.close()


def test_empty_batch(engine: el.Pair) -> None:
    assert engine.capture([]) == [] and engine.restore([], []) == []
    assert engine.release([], []) == [] and engine.activate([], []) == []
    engine.discard([])
