# SPDX-License-Identifier: MIT
"""Preflight: every refusal made real, and what is told of sockets that can be moved."""

from __future__ import annotations

import array
import ctypes
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine import inspector
from sockmi.engine.base import Kind, SocketFacts
from sockmi.engine.preflight import inspect as inspect_aside
from sockmi.engine.preflight import inspect_here as inspect
from sockmi.refusal import Code

LIBC = ctypes.CDLL(None, use_errno=True)
TCP_REPAIR, TCP_REPAIR_OFF, TCP_MD5SIG, TCP_ULP, TCP_FASTOPEN_CONNECT = 19, 0, 14, 31, 30
SO_ZEROCOPY, MSG_ZEROCOPY, IPPROTO_MPTCP = 60, 0x4000000, 262
CLONE_NEWNET = 0x40000000
SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]


def facts(sock: socket.socket) -> SocketFacts:
    return inspect([sock.fileno()])[0]


def code(sock: socket.socket) -> Code | None:
    refusal = facts(sock).refusal
    if refusal is not None:
        assert len(refusal.message) > 40 and "{" not in refusal.message, refusal
    return refusal.code if refusal else None


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)


def connected(
    family: int = socket.AF_INET, address: str = "127.0.0.1"
) -> tuple[socket.socket, socket.socket]:
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 0))
        listener.listen()
        peer = socket.socket(family)
        peer.connect(listener.getsockname())
        return listener.accept()[0], peer


@pytest.fixture(params=["ipv4", "ipv6", "v4-mapped"])
def any_pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    family = socket.AF_INET if request.param == "ipv4" else socket.AF_INET6
    address = {"ipv4": "127.0.0.1", "ipv6": "::1", "v4-mapped": "::ffff:127.0.0.1"}[request.param]
    one, other = connected(family, address)
    with one, other:
        yield one, other


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = connected()
    with one, other:
        yield one, other


@pytest.fixture
def namespace() -> Iterator[None]:
    """This thread in a network namespace of its own (without a name), loopback up; then back."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert not LIBC.unshare(CLONE_NEWNET)
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
        yield
    finally:
        assert not LIBC.setns(before, CLONE_NEWNET)
        os.close(before)


# -- what can be moved --


def test_a_connection(any_pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = any_pair
    peer.send(b"hello")
    eventually(lambda: facts(owned).receive_queue_bytes == 5, "the bytes are there")
    seen = facts(owned)
    assert seen.refusal is None
    assert (seen.kind, seen.state, seen.family) == (Kind.CONNECTED, "ESTABLISHED", owned.family)
    assert seen.inode == os.fstat(owned.fileno()).st_ino
    assert seen.cookie == struct.unpack("=Q", owned.getsockopt(socket.SOL_SOCKET, 57, 8))[0]
    mapped = owned.getsockname()[0].startswith("::ffff:")
    assert seen.local and seen.remote and seen.tuple
    assert str(seen.local.address) == ("127.0.0.1" if mapped else owned.getsockname()[0])
    assert (seen.local.port, seen.remote.port) == (owned.getsockname()[1], owned.getpeername()[1])
    info = owned.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    assert seen.needs.window_scale == max(info[6] & 15, info[6] >> 4) > 0
    assert seen.needs.image_bytes_max > seen.receive_queue_bytes


def test_the_send_queue(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, _unused = pair
    owned.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += owned.send(bytes(65536))
    eventually(lambda: facts(owned).send_queue_bytes > 0, "the peer's window is closed")
    seen = facts(owned)
    assert seen.refusal is None and 0 < seen.send_queue_bytes <= sent
    assert seen.needs.image_bytes_max >= seen.send_queue_bytes


def test_unconnected_bound_and_listening() -> None:
    with (
        socket.socket() as fresh,
        socket.socket(socket.AF_INET6) as bound,
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.socket() as waiting,
    ):
        bound.bind(("::1", 0))
        waiting.connect(("127.0.0.1", listener.getsockname()[1]))
        seen = inspect([fresh.fileno(), bound.fileno(), listener.fileno()])
        assert inspect_aside([fresh.fileno(), bound.fileno(), listener.fileno()]) == seen
    assert [s.refusal for s in seen] == [None] * 3
    assert [s.kind for s in seen] == [Kind.BOUND, Kind.BOUND, Kind.LISTENING]
    assert [s.state for s in seen] == ["CLOSED", "CLOSED", "LISTEN"]
    assert seen[0].local == Endpoint.parse("0.0.0.0:0") and seen[0].remote is None
    assert seen[1].local and str(seen[1].local.address) == "::1" and seen[1].local.port
    assert seen[2].local and str(seen[2].local.address) == "::" and seen[2].tuple is None


def test_half_closed_states(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    owned.shutdown(socket.SHUT_WR)
    eventually(lambda: facts(owned).state == "FIN-WAIT-2", "the FIN is acknowledged")
    assert [s.state for s in inspect([owned.fileno(), peer.fileno()])] == ["FIN-WAIT-2", "CLOSE-WAIT"]
    assert code(owned) is code(peer) is None


def test_syn_sent(namespace: None) -> None:
    subprocess.run(
        ["ip", "link", "add", "d0", "up", "type", "veth", "peer", "name", "d1"], check=True, timeout=10
    )
    subprocess.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "d0"], check=True, timeout=10)
    with socket.socket() as opening:
        opening.setblocking(False)
        assert opening.connect_ex(("192.0.2.9", 9)) == 115
        seen = facts(opening)
        assert inspect_aside([opening.fileno()]) == [seen]
        assert (seen.state, seen.kind, seen.refusal) == ("SYN-SENT", Kind.CONNECTED, None)
        assert seen.remote == Endpoint.parse("192.0.2.9:9")


def test_a_thousand_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    fds = [sock.fileno() for sock in pair] * 500
    seen = inspect(fds)
    assert [s.inode for s in seen] == [os.fstat(fd).st_ino for fd in fds]
    assert all(s.refusal is None for s in seen)
    assert inspect_aside(fds) == seen
    assert inspect([]) == inspect_aside([]) == []


def test_out_of_time_is_locked_and_nothing_else(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host an inspector is not through in time; what it left off it does not take for gone."""
    monkeypatch.setattr(inspector, "PATIENCE_S", 0.001)
    fds = [sock.fileno() for sock in pair] * 2000
    refusals = set()
    for _turn in range(30):
        eventually(lambda: not inspector.inspectors().stuck(), "who was left behind has ended")
        refusals |= {one.refusal.code for one in inspect_aside(fds) if one.refusal}
    assert refusals == {Code.LOCKED}


def test_traffic_is_not_mistaken_for_urgent_data(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    script = "import socket\ns = socket.socket(fileno={})\ntry:\n  while True: {}\nexcept OSError: pass"
    with ExitStack() as stack:
        for fd, action in ((peer.fileno(), "s.send(bytes(5000))"), (owned.fileno(), "s.recv(3000)")):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", script.format(fd, action)], pass_fds=[fd])
            )
            stack.callback(process.kill)
        eventually(lambda: facts(owned).receive_queue_bytes, "traffic flows")
        assert [facts(owned).refusal for _turn in range(500)] == [None] * 500


# -- refusals --


def test_not_tcp() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        assert code(udp) is code(unix) is Code.NOT_TCP
    with Path(os.devnull).open() as file:
        seen = inspect([file.fileno()])[0]
        assert seen.refusal and seen.refusal.code is Code.NOT_TCP


def test_no_such_descriptor() -> None:
    (seen,) = inspect([123456])
    assert seen.refusal and seen.refusal.code is Code.NO_SUCH_SOCKET
    assert "123456" in seen.refusal.message


def test_mptcp(namespace: None) -> None:
    Path("/proc/sys/net/mptcp/enabled").write_text("1")
    with socket.socket(proto=IPPROTO_MPTCP) as multipath:
        assert code(multipath) is Code.MPTCP


def test_another_network_namespace(pair: tuple[socket.socket, socket.socket], namespace: None) -> None:
    assert code(pair[0]) is Code.NO_SUCH_SOCKET


def test_urgent_byte(any_pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = any_pair
    peer.send(b"before")
    peer.send(b"!", socket.MSG_OOB)
    peer.send(b"after")
    eventually(lambda: code(owned) is Code.URGENT_DATA, "it has come")
    # Taken out of band: its mark still lies in the queue, and SIOCINQ stops there.
    assert owned.recv(1, socket.MSG_OOB) == b"!"
    assert facts(owned).receive_queue_bytes == 6
    assert code(owned) is Code.URGENT_DATA
    assert owned.recv(64) == b"before"
    assert code(owned) is Code.URGENT_DATA, "at the mark"
    assert owned.recv(64) == b"after"
    assert code(owned) is None


def test_urgent_byte_inline(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    owned.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    peer.send(b"ab!", socket.MSG_OOB)
    eventually(lambda: code(owned) is Code.URGENT_DATA, "it has come")
    assert owned.recv(64) == b"ab"
    assert owned.recv(64) == b"!"
    peer.send(b"c")
    assert owned.recv(64) == b"c"
    assert code(owned) is None


def md5(sock: socket.socket, address: str) -> None:
    key = b"secret"
    struct_sockaddr = struct.pack("=H2s4s120x", socket.AF_INET, b"\0\0", socket.inet_aton(address))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG,
                    struct_sockaddr + struct.pack("=BBHi80s", 0, 0, len(key), 0, key))  # fmt: skip


def test_md5(namespace: None) -> None:
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
            md5(listener, "127.0.0.1")
            md5(client, "127.0.0.1")
            assert code(listener) is Code.TCP_MD5
            client.connect(listener.getsockname())
            with listener.accept()[0] as server:
                assert code(client) is code(server) is Code.TCP_MD5
            with socket.create_server(("127.0.0.1", 0)) as other, socket.socket() as bound:
                bound.bind(("127.0.0.1", 0))
                assert code(other) is code(bound) is None
    except OSError as error:
        if error.errno != 92:  # ENOPROTOOPT
            raise
        pytest.skip("no TCP-MD5 in this kernel")


def test_md5_cannot_be_ruled_out_without_inet_diag() -> None:
    """A seccomp filter takes NETLINK_SOCK_DIAG away, as hardened containers do."""
    ran = in_child("""
        import ctypes, struct
        from sockmi.engine.preflight import inspect_here as inspect
        one, other = connected()
        libc = ctypes.CDLL(None)
        NR_SOCKET = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
        code = [(0x20, 0, 0, 0), (0x15, 0, 3, NR_SOCKET), (0x20, 0, 0, 16), (0x15, 0, 1, 16),
                (0x06, 0, 0, 0x00050000 | 13), (0x06, 0, 0, 0x7fff0000)]
        program = b"".join(struct.pack("=HBBI", *i) for i in code)
        buffer = ctypes.create_string_buffer(program)
        assert not libc.prctl(38, 1, 0, 0, 0)
        assert not libc.prctl(22, 2, struct.pack("=H6xQ", len(code), ctypes.addressof(buffer)))
        print(inspect([one.fileno()])[0].refusal)
    """)
    assert ran.startswith("tcp-md5: ") and "Permission denied" in ran


def in_child(script: str) -> str:
    """Run Python in a process of its own (what it gives up, it gives up alone); its output."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, str(Path(__file__).parent)]))
    prelude = "import os, socket\nfrom test_preflight import connected\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        check=True, capture_output=True, text=True, env=environment, timeout=30,
    ).stdout  # fmt: skip


def test_no_privilege() -> None:
    ran = in_child("""
        import ctypes
        from sockmi.engine.preflight import inspect_here as inspect
        one, other = connected()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            inspect([one.fileno()])
            libc = ctypes.CDLL(None)
            assert not libc.prctl(24, 12, 0, 0, 0)  # PR_CAPBSET_DROP CAP_NET_ADMIN
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            data = (ctypes.c_uint32 * 6)()
            assert not libc.capget(header, data)
            data[0] &= ~(1 << 12)
            data[1] &= ~(1 << 12)
            assert not libc.capset(header, data)
            print(*[f.refusal.code for f in inspect([one.fileno(), listener.fileno()])])
    """)
    assert ran.split() == ["no-privilege", "no-privilege"]


def test_in_repair(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, _unused = pair
    owned.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    assert code(owned) is Code.IN_REPAIR
    owned.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF)
    assert code(owned) is None


def test_ulp(pair: tuple[socket.socket, socket.socket]) -> None:
    try:
        pair[0].setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    except FileNotFoundError:
        pytest.skip("no kernel TLS here")
    assert code(pair[0]) is Code.ULP
    refusal = facts(pair[0]).refusal
    assert refusal and "'tls'" in refusal.message


def test_zero_copy(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    owned.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    owned.setblocking(False)
    assert code(owned) is None, "allowed, but nothing is under way"
    with pytest.raises(BlockingIOError):
        while True:
            owned.send(bytes(65536), MSG_ZEROCOPY)
    assert code(owned) is Code.ZERO_COPY
    peer.settimeout(5)
    owned.shutdown(socket.SHUT_WR)
    while peer.recv(1 << 20):
        pass
    assert code(owned) is Code.ZERO_COPY, "sent, but the completions are not read"
    eventually(lambda: not facts(owned).send_queue_bytes, "all is acknowledged")
    eventually(lambda: drain_errors(owned) and code(owned) is None, "the completions are read")


def drain_errors(sock: socket.socket) -> bool:
    try:
        while True:
            sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
    except BlockingIOError:
        return True


def bpf(command: int, attribute: bytes) -> int:
    result = LIBC.syscall(SYS_BPF, command, ctypes.create_string_buffer(attribute, 128), 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


@pytest.mark.parametrize(("kind", "value_bytes"), [(15, 8), (18, 8), (15, 4)])
def test_sockmap(kind: int, value_bytes: int, pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    try:
        with closing(os.fdopen(bpf(0, struct.pack("=IIII", kind, 4, value_bytes, 16)), "rb")) as table:
            key = (ctypes.c_uint32 * 1)(3)
            value = (ctypes.c_uint64 * 1)(owned.fileno())
            if value_bytes == 8:
                assert code(owned) is code(peer) is None, "the map is empty"
            else:
                assert code(owned) is Code.SOCKMAP, "such a map cannot be read"
            bpf(2, struct.pack("=I4xQQQ", table.fileno(), ctypes.addressof(key), ctypes.addressof(value), 0))
            assert code(owned) is Code.SOCKMAP
            assert code(peer) is (None if value_bytes == 8 else Code.SOCKMAP)
    finally:
        # The kernel frees a map later than its last descriptor goes; others' tests must not see ours.
        eventually(lambda: code(peer) is None, "the map is gone")


def test_link_local(namespace: None) -> None:
    run = ["ip", "-6", "addr", "add", "fe80::1/64", "dev", "lo", "nodad"]
    subprocess.run(run, check=True, timeout=10)
    with (
        socket.create_server(("fe80::1", 0, 0, 1), family=socket.AF_INET6) as listener,
        socket.socket(socket.AF_INET6) as client,
    ):
        # The kernel adds the route of an address a moment later.
        eventually(lambda: client.connect_ex(listener.getsockname()) == 0, "the address is reachable")
        assert code(client) is code(listener) is Code.LINK_LOCAL


def test_fast_open_pending(namespace: None) -> None:
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x407))  # client, server; no cookie needed
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setsockopt(socket.IPPROTO_TCP, 23, 5)  # TCP_FASTOPEN
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect(listener.getsockname())
        seen = facts(client)
        assert seen.state == "SYN-SENT" and seen.refusal and seen.refusal.code is Code.STATE
        client.send(b"in the SYN")
        with listener.accept()[0] as server:
            assert server.recv(64) == b"in the SYN"
            eventually(lambda: code(client) is code(server) is None, "it is an ordinary connection")


def test_fast_open_data_under_way(namespace: None) -> None:
    subprocess.run(
        ["ip", "link", "add", "d0", "up", "type", "veth", "peer", "name", "d1"], check=True, timeout=10
    )
    subprocess.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "d0"], check=True, timeout=10)
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(0x5))
    with socket.socket() as client:
        client.setblocking(False)
        with suppress(BlockingIOError):
            client.sendto(b"in the SYN", socket.MSG_FASTOPEN, ("192.0.2.9", 9))
        assert facts(client).state == "SYN-SENT"
        assert code(client) is Code.STATE


def test_a_connection_that_has_ended(pair: tuple[socket.socket, socket.socket]) -> None:
    owned, peer = pair
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    peer.close()
    eventually(lambda: code(owned) is Code.ENDED, "the RST has come")
    refusal = facts(owned).refusal
    assert refusal and "ended" in refusal.message


def test_descriptors_of_others_are_as_good(pair: tuple[socket.socket, socket.socket]) -> None:
    """One that came by SCM_RIGHTS is the same socket."""
    here, there = socket.socketpair()
    with here, there:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pair[0].fileno()]))])
        _unused, ((_unused, _unused, data),), _unused, _unused = there.recvmsg(1, 64)
        fd = array.array("i", data)[0]
    try:
        ours, theirs = inspect([pair[0].fileno(), fd])
        assert ours == theirs
    finally:
        os.close(fd)
