# SPDX-License-Identifier: MIT
"""Every refusal that a daemon can give, made real once: a code, a sentence, and a connection that goes on.

And who may move and take what: docs/control.md, "Who may do what".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.labs import Lab
from lab.plan import PATIENCE
from sockmi.client import Control, Export, ImportRequest, SockMiError, export_sockets, import_socket
from sockmi.engine import preflight
from sockmi.redirect.netlink import IPRoute, NetlinkError
from sockmi.refusal import Code
from tests.lab.matrix_lab import (
    EVERYWHERE,
    TCP,
    Bench,
    Case,
    Held,
    Keeper,
    bench,
    call,
    copy_of,
    exchange,
    moved,
    nft,
    reconfigured,
    state,
    verdict,
)
from tests.lab.mode_lab import legacy_iptables, needs_legacy
from tests.lab.scenario import daemons, status, until
from tests.lab.test_preflight import bpf, md5

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE, IO_URING_SETUP = 0x4206, 425
NOBODY = 65534
IMAGE_BYTES_MAX = 2 << 20


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Bench]:
    """Daemons for all tests of the module, whom everybody may ask."""
    with (
        daemons(
            lab, "ab", redirect={"devices": ["eth0"], "modes": ["forward"]}, control_mode=0o666,
            timing={"freeze_deadline_s": 5.0}, image_bytes_max=IMAGE_BYTES_MAX,
        ) as both,
        bench(lab, "forward", both) as made,
    ):  # fmt: skip
        made.warm()
        yield made


@pytest.fixture
def it(running: Bench) -> Iterator[Bench]:
    """The bench, which is cleared afterwards."""
    yield running
    running.clear()


def refused(
    it: Bench, pairs: Sequence[tuple[int, int]], code: Code, *, outcome: str = "refused", **more: Any
) -> str:
    """They are refused with this code, and a sentence that says what to do; the sentence of the first."""
    try:
        verdicts = [verdict(record) for record in it.export_passively(pairs, **more)]
    except SockMiError as error:  # of the whole request
        verdicts = [("refused", error.code, str(error.strerror))]
    return judged(verdicts, code, outcome)


def judged(verdicts: Sequence[tuple[str | None, str, str]], code: Code, outcome: str = "refused") -> str:
    """The sentence of the first."""
    assert {one[:2] for one in verdicts} == {(outcome, code)}, verdicts
    assert all(len(one[2]) > 25 and "{" not in one[2] for one in verdicts), verdicts
    return verdicts[0][2]


def ours(*socks: socket.socket) -> list[tuple[int, int]]:
    """Sockets of this process."""
    return [(os.getpid(), sock.fileno()) for sock in socks]


def goes_on(case: Case) -> None:
    """Nothing has happened to it."""
    assert case.peer and state(case.ours) == "ESTABLISHED"
    exchange(case.ours, case.peer, 3000)
    exchange(case.peer, case.ours, 3000)


# -- the socket itself


def test_no_tcp_socket(it: Bench) -> None:
    with it.host("a").socket(kind=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        refused(it, ours(udp, unix), Code.NOT_TCP)
    mptcp = 262
    with it.host("a").entered(), socket.socket(socket.AF_INET, socket.SOCK_STREAM, mptcp) as sock:
        refused(it, ours(sock), Code.MPTCP)


def test_no_such_socket(it: Bench) -> None:
    refused(it, [(os.getpid(), 9999)], Code.NO_SUCH_SOCKET)
    with open(os.devnull) as file:  # noqa: PTH123
        refused(it, [(os.getpid(), file.fileno())], Code.NO_SUCH_SOCKET)
    child = subprocess.Popen(["true"])
    child.wait()
    refused(it, [(child.pid, 3)], Code.NO_SUCH_SOCKET)
    with it.host("peer").socket() as elsewhere:
        assert "namespace" in refused(it, ours(elsewhere), Code.NO_SUCH_SOCKET)
    case = it.pair("v4")
    done = it.export_passively([*ours(case.ours), (os.getpid(), 9999)], dry_run=True)
    assert [verdict(record)[:2] for record in done] == [("planned", ""), ("refused", "no-such-socket")]


def refused_for_the_moment(it: Bench, case: Case) -> None:
    """In repair, in a sockmap, with zero-copy under way: each as long as it is so."""
    assert case.peer
    case.ours.setsockopt(TCP, 19, 1)  # TCP_REPAIR
    refused(it, ours(case.ours), Code.IN_REPAIR)
    case.ours.setsockopt(TCP, 19, 0)

    with contextlib.closing(os.fdopen(bpf(0, struct.pack("=IIII", 15, 4, 8, 4)), "rb")) as table:
        key, value = (ctypes.c_uint32 * 1)(0), (ctypes.c_uint64 * 1)(case.fd)
        at = struct.pack("=I4xQQQ", table.fileno(), ctypes.addressof(key), ctypes.addressof(value), 0)
        bpf(2, at)
        refused(it, ours(case.ours), Code.SOCKMAP)
        bpf(3, struct.pack("=I4xQ", table.fileno(), ctypes.addressof(key)))  # BPF_MAP_DELETE_ELEM

    case.ours.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
    case.ours.send(b"zero", 0x4000000)  # MSG_ZEROCOPY
    refused(it, ours(case.ours), Code.ZERO_COPY)
    assert case.peer.recv(4) == b"zero"
    until(lambda: completed(case.ours))
    goes_on(case)


def test_what_cannot_be_carried(it: Bench) -> None:
    """Urgent data, zero-copy, sockmap, repair: refused, and moved as soon as that is over."""
    case = it.pair("v4")
    assert case.peer
    case.peer.send(b"!", socket.MSG_OOB)
    until(lambda: verdict(it.export_passively(ours(case.ours), dry_run=True)[0])[1] == Code.URGENT_DATA)
    refused(it, ours(case.ours), Code.URGENT_DATA)
    case.ours.setblocking(False)  # else Python waits for ordinary data
    assert case.ours.recv(1, socket.MSG_OOB) == b"!"
    case.ours.settimeout(10)
    exchange(case.peer, case.ours, 100)

    refused_for_the_moment(it, case)
    # Each refusal was of the moment.
    [record] = it.export_passively(ours(case.ours))
    moved([record])


def test_kernel_tls(it: Bench) -> None:
    case = it.pair("v4")
    try:
        case.ours.setsockopt(TCP, 31, b"tls")  # TCP_ULP
    except FileNotFoundError:
        pytest.skip(f"this kernel ({os.uname().release}) has no kernel TLS (CONFIG_TLS)")
    assert "tls" in refused(it, ours(case.ours), Code.ULP)


def completed(sock: socket.socket) -> bool:
    """Whether the zero-copy completion has been read."""
    with contextlib.suppress(BlockingIOError):
        sock.recvmsg(0, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        return True
    return False


def test_signed_connections(it: Bench) -> None:
    with it.listener("a", "v4", it.port()) as listener:
        try:
            md5(listener, it.host("peer").address(4))
        except OSError as error:
            pytest.skip(f"no TCP-MD5 in this kernel: {error}")
        refused(it, ours(listener), Code.TCP_MD5)


def test_connections_signed_by_tcp_ao(it: Bench) -> None:
    """A key is enough: the listener and what it accepts would be unreadable."""
    with it.listener("a", "v4", it.port()) as listener:
        remote = struct.pack(
            "=H2s4s120x", socket.AF_INET, b"\0\0", socket.inet_aton(it.address("v4", "peer"))
        )
        key = b"0123456789abcdef"
        lengths = (32, 100, 100, 0, 0, len(key))  # prefix, sndid, rcvid, maclen, keyflags, keylen
        add = remote + struct.pack("=64siIH6B80s", b"hmac(sha1)", 0, 0, 0, *lengths, key)
        try:
            listener.setsockopt(TCP, 38, add)  # TCP_AO_ADD_KEY
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            pytest.skip(f"this kernel ({os.uname().release}) was built without TCP-AO (CONFIG_TCP_AO)")
        refused(it, ours(listener), Code.TCP_AO)


def test_addresses_and_states(it: Bench) -> None:
    scope = it.host("a").python(socket.if_nametoindex, "eth0")
    addresses = it.host("a").run(["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]).stdout
    with it.sock("a", "v6") as local:
        local.bind((addresses.split()[3].split("/")[0], it.port(), 0, scope))
        refused(it, ours(local), Code.LINK_LOCAL)
    case = it.pair("v4")
    assert case.peer
    case.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    case.peer.close()
    until(lambda: state(case.ours) == "CLOSED")
    assert "ended" in refused(it, ours(case.ours), Code.ENDED)


def test_too_large(it: Bench) -> None:
    case = it.pair("v4")
    case.ours.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
    it.deafen([case.port])
    case.ours.setblocking(False)
    assert case.ours.send(bytes(4 << 20)) > IMAGE_BYTES_MAX
    assert str(IMAGE_BYTES_MAX) in refused(it, ours(case.ours), Code.TOO_LARGE)


# -- its owners


def test_owners(it: Bench) -> None:
    """io_uring, a debugger, the daemon itself: before anything is frozen or anybody asked."""
    cases = [it.pair("v4") for _turn in range(2)]

    def with_ring() -> None:
        assert LIBC.syscall(IO_URING_SETUP, 4, ctypes.create_string_buffer(120)) >= 0
        signal.pause()

    def with_debugger() -> None:
        assert LIBC.ptrace(PTRACE_SEIZE, debugged.pid, None, None) == 0
        signal.pause()

    with (
        Keeper([cases[0].fd], with_ring) as ring,
        Keeper([cases[1].fd]) as debugged,
        Keeper([], with_debugger) as debugger,
    ):
        until(lambda: "io_uring" in descriptors(ring.pid))
        until(lambda: f"TracerPid:\t{debugger.pid}" in Path(f"/proc/{debugged.pid}/status").read_text())
        assert str(ring.pid) in refused(it, [(ring.pid, cases[0].fd)], Code.OWNER_IO_URING)
        assert str(debugger.pid) in refused(it, [(debugged.pid, cases[1].fd)], Code.OWNER_TRACED)
    for case in cases:
        goes_on(case)
    refused(it, [(it.daemons["a"].pid, 0)], Code.OWNER_IS_DAEMON)


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE in this kernel")
def test_an_owner_that_cannot_be_stopped(it: Bench, tmp_path: Path) -> None:
    """A file system that never answers keeps its user in uninterruptible sleep; then the socket moves."""
    case = it.pair("v4")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    assert not LIBC.mount(b"none", os.fsencode(tmp_path), b"fuse", 0, options), ctypes.get_errno()

    def wait_for_a_file() -> None:
        with contextlib.suppress(OSError):
            (tmp_path / "file").stat()
        signal.pause()

    with Keeper([case.fd], wait_for_a_file) as owner:
        try:
            until(lambda: "State:\tD" in status_of(owner.pid))
            pairs = [(owner.pid, case.fd)]
            assert str(owner.pid) in refused(it, pairs, Code.OWNER_UNSTOPPABLE, outcome="aborted")
            goes_on(case)
        finally:
            LIBC.umount2(os.fsencode(tmp_path), 1 | 2)  # MNT_FORCE | MNT_DETACH
            os.close(fuse)
        until(lambda: "State:\tS" in status_of(owner.pid))
        moved(it.export_passively(pairs))
    [came] = it.take([it.request(case)])
    it.finish(case, copy_of(came))
    copy_of(came).close()


def descriptors(pid: int) -> str:
    """What a process has open."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    return " ".join(links)


# -- the other hosts


def test_nobody_takes_it(it: Bench) -> None:
    case = it.pair("v4")
    refused(it, ours(case.ours), Code.NO_SUCH_HOST, to="nowhere")
    refused(it, ours(case.ours), Code.NO_SUCH_HOST, to="a")
    refused(it, ours(case.ours), Code.NO_OFFER, to="10.77.1.99", timeout_s=0.3)
    with reconfigured(it, "b", imports={"max_connected": 0}):
        refused(it, ours(case.ours), Code.NO_OFFER, to="b", timeout_s=0.3)
        refused(it, ours(case.ours), Code.NO_OFFER, to=None, timeout_s=0.3)
    goes_on(case)


def test_already_migrating(it: Bench) -> None:
    """The same socket by another descriptor, and another socket under the same migration id."""
    with it.stalled() as stall:
        case, other = it.make("v4", "ESTABLISHED", True), it.pair("v4")
        with Held(it, case) as held:
            moving = held.move()
            stall.wait()
            refused(it, held.pairs, Code.ALREADY_MIGRATING)
            [under_way] = call(it.host("a"), "info")["migrations"]
            sockets = [{"pid": os.getpid(), "fd": other.fd, "migration_id": under_way["migration_id"]}]
            answer = call(it.host("a"), "export", sockets=sockets, to="b")
            judged([verdict(one) for one in answer["migrations"]], Code.ALREADY_MIGRATING)
            stall.lift()
            moved(moving.result())
        goes_on(other)
        [came] = it.take([it.request(case)])
        it.undeafen([case])
        it.finish(case, copy_of(came))
        copy_of(came).close()
        # Asked again under its id, it is answered and not begun.
        sockets = [{"pid": os.getpid(), "fd": other.fd, "migration_id": under_way["migration_id"]}]
        [record] = call(it.host("a"), "export", sockets=sockets, to="b")["migrations"]
        assert (record["outcome"], record["local"]) == ("moved", under_way["local"])
        goes_on(other)


def test_taken_ports_and_tuples(it: Bench) -> None:
    """What b has already: a connection with the same ends; a port, for what is not connected."""
    case = it.pair("v4")
    with squatter(it, case, it.address("v4")):
        refused(it, ours(case.ours), Code.TUPLE_TAKEN)
    goes_on(case)
    port = it.port()
    with it.listener("b", "v4", port, EVERYWHERE), it.listener("a", "v4", port, EVERYWHERE) as mine:
        refused(it, ours(mine), Code.PORT_TAKEN)
        with it.sock("peer", "v4") as peer:
            peer.connect((it.address("v4"), port))
            mine.accept()[0].close()


@pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])
def test_taken_ports_of_bound_sockets(it: Bench, kind: str) -> None:
    """Refused before the freeze, and only where the kernel would not let them share."""
    port, anywhere = it.port(), EVERYWHERE if kind == "v4" else "::"
    with it.sock("a", kind) as mine, it.sock("b", "v4" if kind == "mapped" else kind) as other:
        mine.bind((anywhere, port))
        other.bind((EVERYWHERE if kind == "mapped" else anywhere, port))
        assert str(port) in refused(it, ours(mine), Code.PORT_TAKEN)
        for sock in (mine, other):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        moved(it.export_passively(ours(mine)))
        [came] = it.take([ImportRequest(["bound"], local_port=port)])
        copy_of(came).close()
    if kind == "v6":  # beside one of IPv4
        with it.sock("a", kind) as mine, it.listener("b", "v4", port, EVERYWHERE):
            mine.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            mine.bind((anywhere, port))
            moved(it.export_passively(ours(mine)))
            [came] = it.take([ImportRequest(["bound"], local_port=port)])
            copy_of(came).close()


def test_a_tuple_that_is_taken_at_home(it: Bench) -> None:
    """It can only come back to where it was."""
    case = it.pair("v4")
    moved(it.export_passively(ours(case.ours)))
    [came] = it.take([it.request(case)])
    case.ours.close()
    case.ours = copy_of(came)
    with squatter(it, case, it.address("v4"), "a"):
        refused(it, ours(case.ours), Code.TUPLE_TAKEN, to="a", source="b")
    goes_on(case)
    moved(it.export_passively(ours(case.ours), to="a", source="b"))
    [came] = it.take([it.request(case)], "a")
    it.finish(case, copy_of(came))
    copy_of(came).close()


@contextlib.contextmanager
def squatter(it: Bench, case: Case, address: str, host: str = "b") -> Iterator[socket.socket]:
    """A connection from ``address`` that has all else in common with ``case``; it says nothing."""
    with it.sock(host, "v4") as sock:
        sock.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
        sock.setsockopt(TCP, 19, 1)  # TCP_REPAIR
        sock.bind((address, case.port))
        sock.connect(case.remote)
        yield sock


def test_window_scale(it: Bench) -> None:
    """A SYN has offered a window scale that b would not: its answer would be misunderstood."""
    b = it.host("b")
    before = b.run(["sysctl", "-n", "net.ipv4.tcp_rmem"]).stdout.strip()
    case = it.make("v4", "SYN-SENT", False)
    b.run(["sysctl", "-w", "net.ipv4.tcp_rmem=4096 65536 65536"])
    most = b.run(["sysctl", "-n", "net.core.rmem_max"], check=False).stdout.strip()
    try:
        refused(it, ours(case.ours), Code.WINDOW_SCALE)
        assert state(case.ours) == "SYN-SENT", most
    finally:
        b.run(["sysctl", "-w", f"net.ipv4.tcp_rmem={before}"])
    it.undeafen([case])
    it.finish(case, case.ours)


def test_a_smaller_window_scale_is_no_obstacle(it: Bench) -> None:
    """Who has a small buffer offers a small scale, and so does its copy."""
    case = it.make("v4", "SYN-SENT", False, receive_buffer_bytes=20_000)
    moved(it.export_passively(ours(case.ours)))
    [came] = it.take([it.request(case)])
    it.undeafen([case])
    it.finish(case, copy_of(came))
    copy_of(came).close()


def test_timestamp_unit(it: Bench) -> None:
    """A SYN whose clock counts microseconds, as the route at a says and that at b does not."""
    feature = 1 << 4  # RTAX_FEATURE_TCP_USEC_TS
    for name in "ba":
        try:
            route_features(it, name, feature if name == "a" else 0)
        except NetlinkError as error:
            assert error.code == errno.EINVAL
            pytest.skip("this kernel knows no such feature of a route (Linux 6.7)")
    try:
        case = it.make("v4", "SYN-SENT", False)
        if not preflight.syn_offered(case.fd)[1]:
            pytest.skip("this kernel has no timestamps in microseconds (Linux 6.7)")
        assert "tcp_usec_ts" in refused(it, ours(case.ours), Code.TIMESTAMP_UNIT)
        assert state(case.ours) == "SYN-SENT"
        route_features(it, "b", feature)
        moved(it.export_passively(ours(case.ours)))
        [came] = it.take([it.request(case)])
        it.undeafen([case])
        it.finish(case, copy_of(came))
        # One that is established has its own unit, whatever the route says.
        plain = it.pair("v4")
        assert plain.ours.getsockopt(TCP, 24) & 1 == 1  # TCP_TIMESTAMP
        route_features(it, "b", 0)
        moved(it.export_passively(ours(plain.ours)))
        [moved_plain] = it.take([it.request(plain)])
        assert copy_of(moved_plain).getsockopt(TCP, 24) & 1 == 1
        it.finish(plain, copy_of(moved_plain))
        for one in (came, moved_plain):
            copy_of(one).close()
    finally:
        for name in "ab":
            route_features(it, name, None)


def route_features(it: Bench, name: str, features: int | None) -> None:
    """A host route to the peer with these features; None: none."""

    def work() -> None:
        with IPRoute() as ip:
            to: dict[str, Any] = {"dst": f"{it.host('peer').address(4)}/32"}
            to["oif"] = ip.link_lookup(ifname="eth0")[0]
            with contextlib.suppress(NetlinkError):
                ip.route("del", **to)
            if features is not None:
                ip.route("add", **to, metrics={"features": features} if features else {})

    it.host(name).python(work)


def test_it_cannot_be_restored(it: Bench) -> None:
    """b's firewall keeps the copy from hearing that its peer has closed: undone."""
    case = it.make("v4", "CLOSE-WAIT", True)
    rule = f"type filter hook input priority 0; iif lo tcp sport {case.remote[1]} drop"
    nft(it.host("b"), f"table inet wall {{ chain in {{ {rule}; }}; }}\n")
    try:
        assert "firewall" in refused(it, ours(case.ours), Code.RESTORE, outcome="aborted")
        assert state(case.ours) == "CLOSE-WAIT"
    finally:
        nft(it.host("b"), "delete table inet wall\n")
    it.undeafen([case])
    it.finish(case, case.ours)


# -- in the middle


def test_it_takes_too_long(it: Bench) -> None:
    """An importer that is not prepared in time: undone."""
    with it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with reconfigured(it, "a", timing={"freeze_deadline_s": 1.0}), Held(it, case) as held:
            # A second attempt ends because the importer does not answer; the first reason is told.
            moving = held.move()
            stall.wait()
            assert "1.0 s" in judged(
                [verdict(one) for one in moving.result()], Code.FREEZE_DEADLINE, "aborted"
            )
            held.back()
    it.undeafen([case])
    it.finish(case, case.ours)


def test_whoever_asked_has_gone(it: Bench) -> None:
    """Its migration is undone; the history says so."""
    with it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with Held(it, case) as held:
            connection = held.begin()
            stall.wait()
            [under_way] = call(it.host("a"), "info")["migrations"]
            connection.close()
            until(lambda: not call(it.host("a"), "info")["migrations"])
            held.back()
        wanted = {"migration_ids": [under_way["migration_id"]], "wait_s": 5.0}
        records = call(it.host("a"), "info", **wanted)["migrations"]
        judged([verdict(one) for one in records if one["direction"] == "export"], Code.TIMEOUT, "aborted")
    it.undeafen([case])
    it.finish(case, case.ours)


def test_it_changes_while_frozen(it: Bench) -> None:
    """A descriptor under way in a unix socket has no owner to stop: what it does is found, and it stays."""
    with it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        here, there = socket.socketpair()
        with here, there:
            socket.send_fds(here, [b"x"], [case.fd])
            with Held(it, case) as held:
                moving = held.move()
                stall.wait()
                _unused, [passed], _unused, _unused = socket.recv_fds(there, 1, 1)
                with socket.socket(fileno=passed) as stranger:
                    assert stranger.recv(10) == case.to_us[:10]
                    case.to_us = case.to_us[10:]
                stall.lift()
                judged([verdict(one) for one in moving.result()], Code.CHANGED, "aborted")
                held.back()
    it.undeafen([case])
    it.finish(case, case.ours)


def test_the_importer_dies(it: Bench) -> None:
    """Before it is prepared: undone. It comes back and takes others."""
    with it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with Held(it, case) as held:
            moving = held.move(timeout_s=1.0)
            stall.wait()
            it.daemons["b"].kill()
            judged([verdict(one) for one in moving.result()], Code.PEER_LOST, "aborted")
            held.back()
    it.undeafen([case])
    it.daemons["b"].start()
    [record] = it.export_passively(ours(case.ours))
    moved([record])
    [came] = it.take([it.request(case)])
    it.finish(case, copy_of(came))
    copy_of(came).close()


def test_the_exporter_stops(it: Bench) -> None:
    """What is not committed is undone, and the daemon ends cleanly."""
    with it.stalled() as stall:
        case = it.make("v4", "ESTABLISHED", True)
        with Held(it, case) as held:
            moving = held.move()
            stall.wait()
            process = it.daemons["a"].process
            assert process
            process.terminate()
            judged([verdict(one) for one in moving.result()], Code.SHUTTING_DOWN, "aborted")
            held.back()
            assert process.wait(10 * PATIENCE) == 0
    it.daemons["a"].start()
    until(lambda: bool(call(it.host("a"), "groups")["groups"][0]["members"]))
    it.undeafen([case])
    it.finish(case, case.ours)


# -- who may do what


def as_nobody(it: Bench, host: str, work: Callable[[], Any], keep: Sequence[int] = ()) -> Keeper:
    """A process of user nobody on a host, which does ``work``."""

    def start() -> Any:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return work()

    with it.host(host).entered():
        return Keeper(keep, start)


def told(action: Callable[[], Any]) -> str:
    """The code of a refusal, or the errno's number, or what came."""
    try:
        return str(action())
    except SockMiError as error:
        return error.code or str(error.errno)


def test_another_user(it: Bench) -> None:
    """He exports what is his alone, imports what was his, and administers nothing."""
    control = {name: it.host(name).control_socket for name in "ab"}
    port = it.port()
    shared = it.pair("v4")
    roots = Keeper([shared.fd])
    listener = it.listener("peer", "v4", port)
    address = listener.getsockname()

    def ask_a(op: str, **fields: Any) -> list[dict[str, Any]]:
        with Control(control["a"], timeout_s=30) as connection:
            return list(connection.call(op, **fields))

    def nobody() -> dict[str, Any]:
        own = socket.create_connection(address, timeout=10)
        root_owned = socket.socket(fileno=shared.fd)
        found: dict[str, Any] = {
            "named": told(lambda: ask_a("export", sockets=[{"pid": os.getpid(), "fd": own.fileno()}])),
            "drain": told(lambda: ask_a("drain", filter={})),
            "reload": told(lambda: ask_a("reload")),
            "leave": told(lambda: ask_a("groups", action="leave", name="lab", force=True)),
            "foreign": told(
                lambda: export_sockets([Export(shared.fd, roots.pid)], "b", control=control["a"])
            ),
            "listed": [row["user_id"] for one in ask_a("list") for row in one["sockets"]],
            "status": told(lambda: ask_a("status")[0]["host"]),
        }
        for name, sock in (("shared", root_owned), ("own", own)):
            dry, real = (
                export_sockets([Export(sock)], "b", control=control["a"], dry_run=dry)[0]
                for dry in (True, False)
            )
            found[name] = [verdict(dry)[:2], verdict(real)[:2]]
        return found

    with roots, as_nobody(it, "a", nobody, [shared.fd]) as child:
        found = child.result(60)
    peer, _unused = listener.accept()
    listener.close()
    no = str(Code.NO_PRIVILEGE)
    assert [found[name] for name in ("named", "drain", "reload", "leave")] == [no] * 4, found
    assert found["foreign"] == "1", "EPERM, by the kernel: pidfd_getfd"
    assert found["shared"] == [("refused", no), ("refused", no)]
    assert set(found["listed"]) == {NOBODY} and found["status"] == "a"
    assert found["own"] == [("planned", ""), ("moved", "")]
    goes_on(shared)

    # At b there are his connection and one of root's, and he gets only his own.
    moved(it.export_passively(ours(shared.ours)))
    until(lambda: status(it.host("b"))["import_lists"]["connected"]["length"] == 2)

    def import_all() -> list[tuple[str, int]]:
        got = []
        while arrived := import_socket(ImportRequest(), 0.2, control=control["b"]):
            for one in arrived:
                assert one.socket and os.fstat(one.fd).st_uid == NOBODY
                got.append((str(one.remote), one.socket.send(b"from nobody")))
        return got

    with as_nobody(it, "b", import_all) as child:
        got = child.result(60)
    assert got == [(f"{address[0]}:{port}", 11)]
    assert peer.recv(100) == b"from nobody"
    peer.close()
    [came] = it.take([it.request(shared)])
    it.finish(shared, copy_of(came))
    copy_of(came).close()


def test_another_users_listener(it: Bench) -> None:
    """Its connections are his, though it was the daemon that took them out of its queue."""
    control = {name: it.host(name).control_socket for name in "ab"}
    port, address = it.port(), it.address("v4")

    def export() -> str:
        with socket.create_server((address, port)) as listener:
            listener.settimeout(10)
            until(lambda: struct.unpack_from("I", listener.getsockopt(TCP, socket.TCP_INFO, 104), 24) == (1,))
            return verdict(export_sockets([Export(listener)], "b", control=control["a"])[0])[0] or ""

    def imports() -> list[bytes]:
        requests = [ImportRequest(["listening"]), ImportRequest(["connected"], local_port=port)]
        got: list[bytes] = []
        while len(got) < 2:
            for one in import_socket(requests, 10, control=control["b"]):
                assert one.socket
                got.append(b"" if one.request == 0 else one.socket.recv(10))
        return sorted(got)

    with as_nobody(it, "a", export) as exporter:
        peer = it.sock("peer", "v4")
        until(lambda: peer.connect_ex((address, port)) in (0, errno.EISCONN))
        peer.sendall(b"hello")
        assert exporter.result(30) == "moved"
    with as_nobody(it, "b", imports) as importer:
        assert importer.result(30) == [b"", b"hello"]
    peer.close()


def test_another_users_duplicate(it: Bench) -> None:
    """Who shares a socket with a set-user-id process may not move it, though its real user is his own."""
    control = it.host("a").control_socket
    with it.listener("peer", "v4", it.port()) as listener:
        address = listener.getsockname()

        def as_three(saved: int, work: Callable[[], Any]) -> Callable[[], Any]:
            def start() -> Any:
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, saved)
                return work()

            return start

        def export() -> list[str]:
            codes = []
            for saved in (0, NOBODY):
                own = socket.create_connection(address, timeout=10)
                users = f"Uid:\t{NOBODY}\t{NOBODY}\t{saved}\t"
                with Keeper([own.fileno()], as_three(saved, signal.pause)) as other:
                    until(lambda pid=other.pid, users=users: users in status_of(pid))  # type: ignore[misc]
                    with Keeper([own.fileno()], as_three(NOBODY, functools.partial(plan, own))) as caller:
                        own.close()
                        codes.append(caller.result(30))
            return codes

        def plan(sock: socket.socket) -> str:
            [record] = export_sockets([Export(sock)], control=control, dry_run=True)
            return record.code or str(record.outcome)

        with it.host("a").entered(), Keeper([], export) as keeper:
            assert keeper.result(60) == [Code.NO_PRIVILEGE, "planned"]


def status_of(pid: int) -> str:
    """What the kernel says of a process."""
    return Path(f"/proc/{pid}/status").read_text()


def test_contexts_are_checked(it: Bench) -> None:
    """Only sealed ones of up to a megabyte are taken."""
    case = it.pair("v4")
    for flags, size, code in (
        (os.MFD_CLOEXEC, 10, Code.BAD_REQUEST),
        (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING, (1 << 20) + 1, Code.TOO_LARGE),
    ):
        memory = os.memfd_create("context", flags)
        os.truncate(memory, size)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(it.host("a").control_socket))
            raw.settimeout(10)
            item = f'{{"pid":{os.getpid()},"fd":{case.fd},"descriptor":true,"context":true}}'
            line = f'{{"op":"export","fds":2,"sockets":[{item}],"to":"b"}}\n'
            socket.send_fds(raw, [line.encode()], [case.fd, memory])
            assert f'"{code}"'.encode() in raw.recv(1 << 16)
        os.close(memory)
    goes_on(case)


# -- other networks


def test_no_redirect_leads_there(lab: Lab) -> None:
    """d is behind a router, and forward needs one segment."""
    modes = {"devices": ["eth0"], "modes": ["forward"]}
    with daemons(lab, "cd", unicast=True, redirect=modes) as both, bench(lab, "forward", both) as it:
        case = it.pair("v4", host="c")
        done = it.export_passively(ours(case.ours), to="d", source="c", timeout_s=2.0)
        judged([verdict(record) for record in done], Code.NO_REDIRECT)
        goes_on(case)
        case.close()


def test_an_image_that_lies(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter with a fault sends what its checksum does not fit, then the image of another migration."""
    faults = tmp_path / "sitecustomize.py"
    faults.write_text(
        """
import sys
if "sockmi.service" in " ".join(sys.orig_argv):
    from sockmi.exporting import freezer
    from sockmi.rehearsing import Rehearsal
    Rehearsal.lead_away = Rehearsal.take_in = lambda self: None  # they have no such fault
    stamp, count = freezer.stamp, 0
    def lie(image, **fields):
        global count
        count += 1
        if count == 2:
            fields["migration_id"] = bytes(16)
        stamp(image, **fields)
        if count == 1:
            image[-1] ^= 1
    freezer.stamp = lie
"""
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    modes = {"devices": ["eth0"], "modes": ["nat"]}
    with daemons(lab, "cd", unicast=True, redirect=modes) as both, bench(lab, "nat", both) as it:
        case = it.pair("v4", host="c")
        for words in ("The image is not valid: ", "another socket than the one"):
            [record] = it.export_passively(ours(case.ours), to="d", source="c")
            assert words in judged([verdict(record)], Code.IMAGE, "aborted")
            goes_on(case)
        moved(it.export_passively(ours(case.ours), to="d", source="c"))
        [came] = it.take([ImportRequest(["connected"], local_port=case.port)], "d")
        it.finish(case, copy_of(came))
        copy_of(came).close()
        case.close()


def test_the_redirect_fails(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no room, say: undone at the commit."""
    (tmp_path / "sitecustomize.py").write_text(
        """
import errno, os, sys
if "sockmi.service" in " ".join(sys.orig_argv):
    from sockmi.redirect.nat import Nat
    from sockmi.rehearsing import Rehearsal
    Rehearsal.lead_away = lambda self: None  # it has no such fault
    lead_away = Nat.send_away
    def fail(self, connections):
        if not connections:
            return
        Nat.send_away = lead_away
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
    Nat.send_away = fail
"""
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    modes = {"devices": ["eth0"], "modes": ["nat"]}
    with daemons(lab, "cd", unicast=True, redirect=modes) as both, bench(lab, "nat", both) as it:
        case = it.pair("v4", host="c")
        [record] = it.export_passively(ours(case.ours), to="d", source="c")
        judged([verdict(record)], Code.REDIRECT, "aborted")
        goes_on(case)
        moved(it.export_passively(ours(case.ours), to="d", source="c"))
        [came] = it.take([ImportRequest(["connected"], local_port=case.port)], "d")
        it.finish(case, copy_of(came))
        copy_of(came).close()
        case.close()


@pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])
@pytest.mark.parametrize("mode", ["nat", pytest.param("iptables", marks=needs_legacy)])
def test_a_taken_port_is_no_obstacle_to_translation(lab: Lab, tmp_path: Path, mode: str, kind: str) -> None:
    """Another port is chosen."""
    modes, there = {"devices": ["eth0"], "modes": [mode]}, "v6" if kind == "v6" else "v4"
    with (
        legacy_iptables(tmp_path) if mode == "iptables" else contextlib.nullcontext(),
        daemons(lab, "cd", unicast=True, redirect=modes) as both,
        bench(lab, mode, both) as it,
    ):
        case = it.pair(kind, host="c")
        with it.sock("d", there) as squatting:
            squatting.setsockopt(TCP, 19, 1)
            squatting.bind((it.address(there, "d"), case.port))
            squatting.connect(case.remote)
            done = it.export_passively(ours(case.ours), to="d", source="c")
            moved(done)
            [came] = it.take([ImportRequest(["connected"], local_port=case.port)], "d")
            copy = copy_of(came)
            assert came.local and str(came.local.address) == it.address(there, "d")
            assert copy.getsockname()[:2] == (it.address(kind, "d"), came.local.port)
            assert came.local.port != case.port
            it.finish(case, copy)
            copy.close()
        case.close()
