# SPDX-License-Identifier: MIT
"""What owners and peers see and do while and after their connections move: real daemons, real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab.labs import Lab
from tests.lab.matrix_lab import (
    TCP,
    Bench,
    Case,
    Held,
    Keeper,
    Later,
    bench,
    copy_of,
    moved,
    receive,
    reconfigured,
    same,
    state,
    unread,
    verdict,
)
from tests.lab.matrix_states import waiting
from tests.lab.scenario import ask, daemons, status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Bench]:
    """Daemons for all tests of the module, with a freeze that may last as long as a test wants."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, "forward", both) as made,
    ):
        made.warm()
        yield made


@pytest.fixture
def it(running: Bench) -> Iterator[Bench]:
    """The bench, which is cleared afterwards."""
    yield running
    running.clear()


# -- after the move


def outcome(action: Callable[[], Any]) -> str:
    """The name of the errno of a call, or its result."""
    try:
        return repr(action())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def fill(sock: socket.socket) -> None:
    """Until the next send would block."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 18))
    time.sleep(0.05)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 14))


def test_blocked_calls_wake(it: Bench, tmp_path: Path) -> None:
    """recv, send, accept, connect, poll and edge-triggered epoll; then a definite errno; close is silent."""
    with it.watched(tmp_path):
        names = ("recv", "send", "poll", "epoll", "epoll-old")
        cases = {name: it.pair("v4") for name in names}
        fill(cases["send"].ours)
        listener = it.listener("a", "v4", it.port())
        connecting = it.make("v4", "SYN-SENT", False)
        sockets = {name: case.ours for name, case in cases.items()}
        sockets |= {"accept": listener, "connect": connecting.ours}
        for sock in sockets.values():
            sock.setblocking(True)
        ready, told = os.pipe()

        def owner() -> dict[str, list[str]]:
            """One thread for each kind of waiting; what it meets, call by call."""
            met: dict[str, list[str]] = {}
            # Registered long before, readable already once: an edge must come all the same.
            old = select.epoll()
            old.register(sockets["epoll-old"], select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            old.poll(0)

            def wait(name: str) -> None:
                sock = sockets[name]
                blocked: Callable[[], Any]
                if name == "recv":
                    blocked = partial(sock.recv, 1)
                elif name == "send":
                    blocked = partial(sock.send, bytes(1 << 20))
                elif name == "accept":
                    blocked = sock.accept
                elif name == "connect":
                    writable = select.poll()
                    writable.register(sock, select.POLLOUT)
                    blocked = partial(decided, writable)
                elif name == "poll":
                    one = select.poll()
                    one.register(sock, select.POLLIN)
                    blocked = partial(polled, one, 20_000)
                else:
                    edge = old
                    if name == "epoll":
                        edge = select.epoll()
                        edge.register(sock, select.EPOLLIN | select.EPOLLET)
                    blocked = partial(polled, edge, 20)
                met[name] = [outcome(blocked)]
                if name == "accept":
                    met[name] += [outcome(sock.accept)]
                    return
                met[name] += [outcome(lambda: sock.recv(1)), outcome(lambda: sock.recv(1))]
                met[name] += [outcome(lambda: sock.send(b"x"))]
                met[name] += [outcome(sock.getpeername), outcome(lambda: sock.shutdown(socket.SHUT_RDWR))]

            threads = [threading.Thread(target=wait, args=(name,)) for name in sockets]
            for thread in threads:
                thread.start()
            os.write(told, b"x")
            for thread in threads:
                thread.join()
            for sock in sockets.values():
                sock.close()
            return met

        fds = {name: sock.fileno() for name, sock in sockets.items()}
        with Keeper([*fds.values(), told], owner) as keeper:
            assert os.read(ready, 1) == b"x"
            until(lambda: asleep(keeper.pid, len(sockets) + 1))
            for sock in sockets.values():
                sock.close()
            done = it.export_passively([(keeper.pid, fd) for fd in fds.values()])
            moved(done)
            met = keeper.result()
        os.close(ready)
        os.close(told)
        dead = ["ENOTCONN", "EPIPE", "ENOTCONN", "ENOTCONN"]
        assert met["accept"] == ["EINVAL", "EINVAL"], met
        assert met["recv"] == ["ECONNABORTED", "ENOTCONN", *dead], met
        # A blocked send tells how much it has sent, if anything.
        assert met["send"][0] == "ECONNABORTED" or int(met["send"][0]) > 0, met
        for name in ("poll", "epoll", "epoll-old"):
            assert met[name][0] == "['err', 'hup']", met
            assert met[name][1:] == ["ECONNABORTED", *dead], met
        assert met["connect"] == ["True", "ECONNABORTED", *dead], met
        it.undeafen([connecting])
        requests = [it.request(case) for case in [*cases.values(), connecting]]
        imported = it.take(requests)
        cases["send"].to_peer = b""
        for case, one in zip([*cases.values(), connecting], imported, strict=True):
            copy = copy_of(one)
            if case is cases["send"]:
                assert case.peer
                reading = Later(read_all, case.peer)
                copy.shutdown(socket.SHUT_WR)
                assert set(reading.result(60)) == {0}
                case.peer.shutdown(socket.SHUT_WR)
                assert copy.recv(1) == b""
                copy.close()
                continue
            it.finish(case, copy)
            copy.close()


def read_all(sock: socket.socket) -> bytes:
    """Until the end of the stream."""
    data = bytearray()
    while part := sock.recv(1 << 20):
        data += part
    return bytes(data)


def decided(writable: select.poll) -> bool:
    """Whether a connection is there or has failed, within 20 s."""
    return bool(writable.poll(20_000))


def polled(waiting: select.poll | select.epoll, timeout: float) -> list[str]:
    """The names of what poll (milliseconds) or epoll (seconds) reports that matter here."""
    [(_unused, mask)] = waiting.poll(timeout)
    return [name for name, bit in (("in", 1), ("err", 8), ("hup", 16)) if mask & bit]


def asleep(pid: int, count: int) -> bool:
    """Whether so many threads of a process sleep."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states.count("S") >= count


def test_all_holders_lose_it(it: Bench, tmp_path: Path) -> None:
    """A socket with duplicates in one process and in forked ones: it dies in all, the first is told."""
    with it.watched(tmp_path):
        case = it.pair("v4")
        assert case.peer
        duplicate = case.ours.dup()
        first, second = os.pipe(), os.pipe()

        def holder(reading: int) -> Callable[[], list[str]]:
            def work() -> list[str]:
                os.read(reading, 1)
                sock = case.ours
                sock.settimeout(None)
                return [outcome(lambda: sock.recv(1)), outcome(lambda: duplicate.send(b"x"))]

            return work

        keep = [case.fd, duplicate.fileno()]
        with (
            Keeper([*keep, first[0]], holder(first[0])) as one,
            Keeper([*keep, second[0]], holder(second[0])) as other,
        ):
            [record] = it.export_passively([(other.pid, case.fd)])
            moved([record])
            os.write(first[1], b"x")
            assert one.result() == ["ECONNABORTED", "EPIPE"]
            os.write(second[1], b"x")
            assert other.result() == ["ENOTCONN", "EPIPE"]
        assert outcome(lambda: case.ours.recv(1)) == outcome(lambda: duplicate.recv(1)) == "ENOTCONN"
        for fd in (*first, *second):
            os.close(fd)
        [came] = it.take([it.request(case)])
        duplicate.close()
        case.ours.close()
        it.finish(case, copy_of(came))
        copy_of(came).close()


# -- in the middle of a migration


def taken(it: Bench, case: Case) -> socket.socket:
    """The connection, out of b's list."""
    [came] = it.take([it.request(case)])
    return copy_of(came)


@contextlib.contextmanager
def slow_importer(it: Bench) -> Iterator[None]:
    """b is heard of, and does not answer: what is asked for is not frozen while the block runs."""
    os.kill(it.daemons["b"].pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(it.daemons["b"].pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["v4", "v6"])
def test_the_owner_closes_during_the_negotiation(it: Bench, tmp_path: Path, kind: str) -> None:
    """Its FIN goes out at once, its epoll says nothing more of it, and nothing moves."""
    with it.watched(tmp_path):
        case = it.pair(kind)
        assert case.peer
        reading, writing = os.pipe()

        def owner() -> int:
            epoll = select.epoll()
            epoll.register(case.fd, select.EPOLLIN | select.EPOLLOUT)
            os.read(reading, 1)
            os.close(case.fd)
            os.read(reading, 1)
            return len(epoll.poll(0))

        with Keeper([case.fd, reading], owner) as keeper:
            pair = (keeper.pid, case.fd)
            case.ours.close()
            with slow_importer(it):
                moving = Later(it.export_passively, [pair], timeout_s=20.0)
                until(lambda: bool(under_way(it)))
                time.sleep(0.2)
                os.write(writing, b"x")
                case.peer.settimeout(0.5)
                assert case.peer.recv(1) == b"", "the FIN does not wait for us"
                case.peer.close()
            os.write(writing, b"x")
            assert keeper.result() == 0
            [record] = moving.result()
            assert verdict(record)[:2] == ("refused", "no-such-socket"), record
        os.close(reading)
        os.close(writing)
        assert status(it.host("b"))["import_lists"]["connected"]["length"] == 0


def under_way(it: Bench) -> list[dict[str, Any]]:
    """Migrations that a's daemon has not ended."""
    [answer] = ask(it.host("a"), "info")
    return list(answer["migrations"])


def test_a_descriptor_is_passed_on_during_the_negotiation(it: Bench, tmp_path: Path) -> None:
    """Duplicated, then closed where it was selected; forked, then closed by the parent: it moves."""
    with it.watched(tmp_path):
        renumbered, forked = it.pair("v4"), it.pair("v4")
        reading, writing = os.pipe()

        def owner() -> None:
            os.read(reading, 1)
            os.dup(renumbered.fd)
            os.close(renumbered.fd)
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os.close(forked.fd)
            os.read(reading, 1)

        with Keeper([renumbered.fd, forked.fd, reading], owner) as keeper:
            pairs = [(keeper.pid, case.fd) for case in (renumbered, forked)]
            for case in (renumbered, forked):
                case.ours.close()
            with slow_importer(it):
                moving = Later(it.export_passively, pairs, timeout_s=20.0)
                until(lambda: len(under_way(it)) == 2)
                time.sleep(0.2)
                os.write(writing, b"x")
                time.sleep(0.2)
            moved(moving.result())
        os.close(reading)
        os.close(writing)
        for case in (renumbered, forked):
            copy = taken(it, case)
            it.finish(case, copy)
            copy.close()


def test_the_owner_exits_and_the_migration_is_undone(it: Bench, tmp_path: Path) -> None:
    """Then the connection ends as it does when a process exits: what was sent arrives, then FIN."""
    with it.watched(tmp_path), it.stalled() as stall:
        case = it.pair("v4")
        peer = case.peer
        assert peer
        it.deafen([case.port])
        case.deaf = True
        case.ours.sendall(b"last words" * 500)
        with Held(it, case) as held:
            connection = held.begin()
            stall.wait()
            os.kill(held.keeper.pid, signal.SIGKILL)
            connection.close()
        it.undeafen([case])
        same(read_all(peer), b"last words" * 500, "at the peer")
        peer.shutdown(socket.SHUT_WR)
        until(lambda: state(peer) == "CLOSED")


def test_the_peer_sends_during_the_hold(it: Bench, tmp_path: Path) -> None:
    """Data and FIN that come while it is frozen reach the copy: nothing is lost, nothing answered twice."""
    with it.watched(tmp_path), it.stalled() as stall:
        staying, leaving = it.pair("v4"), it.pair("v6")
        with Held(it, staying, leaving) as held:
            moving = held.move()
            stall.wait()
            assert staying.peer and leaving.peer
            staying.to_us = leaving.to_us = os.urandom(30_000)
            staying.peer.sendall(staying.to_us)
            leaving.peer.sendall(leaving.to_us)
            leaving.peer.shutdown(socket.SHUT_WR)
            stall.lift()
            moved(moving.result())
        leaving.state = "CLOSE-WAIT"
        for case in (staying, leaving):
            copy = taken(it, case)
            it.finish(case, copy)
            copy.close()


def test_the_peer_resets_during_the_hold(it: Bench, tmp_path: Path) -> None:
    """A reset that comes while it is frozen ends the copy, at the latest when that says something.

    An application waits for it: without one it ends in the import list (test_listed_ends.py).
    """
    peer_address = it.host("peer").address(4)
    with it.watched(tmp_path, rst_from=[peer_address]), it.stalled() as stall:
        case = it.pair("v4")
        it.deafen([case.port])
        case.ours.sendall(bytes(5000))
        taking = Later(taken, it, case)
        until(lambda: waiting(it) == 1)
        with Held(it, case) as held:
            moving = held.move()
            stall.wait()
            assert case.peer
            case.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case.peer.close()
            stall.lift()
            moved(moving.result())
        it.deafen([case.port], deaf=False)
        copy = taking.result()
        met = outcome(lambda: copy.send(b"anybody?"))
        assert met in ("8", "ECONNRESET", "EPIPE")
        until(lambda: state(copy) == "CLOSED")
        assert met != "8" or outcome(lambda: copy.recv(1)) == "ECONNRESET"
        copy.close()


def test_everything_stops_and_goes_on(it: Bench, tmp_path: Path) -> None:
    """While frozen the owner stands still and the peer waits; undone, both go on where they were."""
    with it.watched(tmp_path), it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        assert case.peer
        with Held(it, case) as held:
            connection = held.begin()
            stall.wait()
            assert task_state(held.keeper.pid) == "t"
            case.peer.sendall(b"more")
            case.to_us += b"more"
            connection.close()
            until(lambda: task_state(held.keeper.pid) == "S")
            held.back()
        it.undeafen([case])
        it.finish(case, case.ours)
    until(lambda: status(it.host("b"))["import_lists"]["connected"]["length"] == 0)


def task_state(pid: int) -> str:
    """S, t, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- refused by the importer when everything is frozen


def test_the_list_fills_at_the_last_moment(it: Bench, tmp_path: Path) -> None:
    """Refused at PREPARED: the connection goes on, and nothing of it is left at b."""
    with it.watched(tmp_path), it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with Held(it, case) as held:
            moving = held.move()
            stall.wait()
            with reconfigured(it, "b", imports={"max_connected": 0}):
                stall.lift()
                [record] = moving.result()
            held.back()
        assert verdict(record)[:2] == ("aborted", "list-full"), record
        assert record["step"] == "frozen"
        it.undeafen([case])
        it.finish(case, case.ours)
        assert status(it.host("b"))["import_lists"]["connected"]["length"] == 0


def test_the_tuple_is_taken_at_the_last_moment(it: Bench, tmp_path: Path) -> None:
    """Another connection of b has the same ends by then: refused at PREPARED, and that one lives on too."""
    # Nothing of what the squatter hears may be answered.
    with it.watched(tmp_path), it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with Held(it, case) as held:
            moving = held.move()
            stall.wait()
            squatter = it.sock("b", "v4")
            squatter.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
            squatter.setsockopt(TCP, 19, 1)  # TCP_REPAIR: it says nothing to the peer
            squatter.bind((it.address("v4"), case.port))
            squatter.connect(case.remote)
            stall.lift()
            [record] = moving.result()
            held.back()
        assert verdict(record)[:2] == ("aborted", "tuple-taken"), record
        assert state(squatter) == "ESTABLISHED"
        squatter.close()
        it.undeafen([case])
        it.finish(case, case.ours)


def test_big_queues(it: Bench, tmp_path: Path) -> None:
    """Megabytes in the send queue, and a receive queue of megabytes: moved whole, both at once."""
    with it.watched(tmp_path):
        case = it.pair("v4")
        assert case.peer
        case.ours.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
        case.ours.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        case.to_us, case.to_peer = os.urandom(4 << 20), os.urandom(6 << 20)
        filling = Later(case.peer.sendall, case.to_us)
        until(lambda: unread(case.ours) > 2 << 20, 30)
        it.deafen([case.port])
        case.deaf = True
        case.ours.setblocking(False)
        sent = case.ours.send(case.to_peer)
        case.to_peer = case.to_peer[:sent]
        assert sent > 2 << 20
        [record] = it.export_passively([(os.getpid(), case.fd)])
        moved([record])
        assert (
            record["receive_queue_bytes"] > 2 << 20 and record["sent_bytes"] + record["unsent_bytes"] >= sent
        )
        it.undeafen([case])
        copy = taken(it, case)
        copy.settimeout(30)
        same(receive(copy, len(case.to_us)), case.to_us, "receive queue")
        filling.result(30)
        case.to_us = b""
        it.finish(case, copy)
        copy.close()
