# SPDX-License-Identifier: MIT
"""The engine's contract: every option that an application can set and read travels."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from sockmi import image as codec
from sockmi.engine.base import Captured, Placement, Restored
from sockmi.engine.repair import RepairEngine
from tests.lab import engine_lab as el

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SOL, TCP, IP, IP6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6


def number(value: int) -> bytes:
    return struct.pack("i", value)


_FILTER = struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF)  # BPF: accept all

#: name, level, option, value: none of these is a fresh socket's.
GENERAL: list[tuple[str, int, int, bytes]] = [
    ("SO_DEBUG", SOL, 1, number(1)),
    ("SO_REUSEADDR", SOL, 2, number(1)),
    ("SO_DONTROUTE", SOL, 5, number(1)),
    ("SO_BROADCAST", SOL, 6, number(1)),
    ("SO_SNDBUF", SOL, 7, number(50_000)),
    ("SO_RCVBUF", SOL, 8, number(60_000)),
    ("SO_KEEPALIVE", SOL, 9, number(1)),
    ("SO_OOBINLINE", SOL, 10, number(1)),
    ("SO_NO_CHECK", SOL, 11, number(1)),
    ("SO_PRIORITY", SOL, 12, number(3)),
    ("SO_LINGER", SOL, 13, struct.pack("ii", 1, 17)),
    ("SO_REUSEPORT", SOL, 15, number(1)),
    ("SO_RCVLOWAT", SOL, 18, number(9)),
    ("SO_RCVTIMEO", SOL, 20, struct.pack("qq", 3, 252_000)),
    ("SO_SNDTIMEO", SOL, 21, struct.pack("qq", 4, 500_000)),
    ("SO_TIMESTAMP", SOL, 29, number(1)),
    ("SO_MARK", SOL, 36, number(0x77)),
    ("SO_RXQ_OVFL", SOL, 40, number(1)),
    ("SO_WIFI_STATUS", SOL, 41, number(1)),
    ("SO_PEEK_OFF", SOL, 42, number(5)),
    ("SO_NOFCS", SOL, 43, number(1)),
    ("SO_SELECT_ERR_QUEUE", SOL, 45, number(1)),
    ("SO_BUSY_POLL", SOL, 46, number(30)),
    ("SO_MAX_PACING_RATE", SOL, 47, struct.pack("Q", 10**10)),
    ("SO_ZEROCOPY", SOL, 60, number(1)),
    ("SO_PREFER_BUSY_POLL", SOL, 69, number(1)),
    ("SO_BUSY_POLL_BUDGET", SOL, 70, number(16)),
    ("SO_TXREHASH", SOL, 74, number(0)),
    ("SO_RCVMARK", SOL, 75, number(1)),
    ("SO_RCVPRIORITY", SOL, 82, number(1)),
    ("SO_TIMESTAMP_NEW", SOL, 63, number(1)),
    ("SO_TIMESTAMPING_NEW", SOL, 65, number(16)),
    ("TCP_WINDOW_CLAMP", TCP, 10, number(40_000)),
    ("TCP_NODELAY", TCP, 1, number(1)),
    ("TCP_CORK", TCP, 3, number(1)),
    ("TCP_KEEPIDLE", TCP, 4, number(1234)),
    ("TCP_KEEPINTVL", TCP, 5, number(12)),
    ("TCP_KEEPCNT", TCP, 6, number(4)),
    ("TCP_SYNCNT", TCP, 7, number(3)),
    ("TCP_LINGER2", TCP, 8, number(25)),
    ("TCP_DEFER_ACCEPT", TCP, 9, number(7)),
    ("TCP_CONGESTION", TCP, 13, b"reno"),
    ("TCP_THIN_LINEAR_TIMEOUTS", TCP, 16, number(1)),
    ("TCP_USER_TIMEOUT", TCP, 18, number(12_345)),
    ("TCP_NOTSENT_LOWAT", TCP, 25, number(4096)),
    ("TCP_FASTOPEN_NO_COOKIE", TCP, 34, number(1)),
    ("TCP_INQ", TCP, 36, number(1)),
    ("TCP_TX_DELAY", TCP, 37, number(100)),
    ("TCP_RTO_MAX_MS", TCP, 44, number(5000)),
    ("TCP_RTO_MIN_US", TCP, 45, number(48_000)),
    ("TCP_DELACK_MAX_US", TCP, 46, number(40_000)),
]
INET: list[tuple[str, int, int, bytes]] = [
    ("IP_TOS", IP, 1, number(0x48)),
    ("IP_TTL", IP, 2, number(99)),
    ("IP_RECVOPTS", IP, 6, number(1)),
    ("IP_RETOPTS", IP, 7, number(1)),
    ("IP_PKTINFO", IP, 8, number(1)),
    ("IP_MTU_DISCOVER", IP, 10, number(3)),
    ("IP_RECVERR", IP, 11, number(1)),
    ("IP_RECVTTL", IP, 12, number(1)),
    ("IP_RECVTOS", IP, 13, number(1)),
    ("IP_FREEBIND", IP, 15, number(1)),
    ("IP_PASSSEC", IP, 18, number(1)),
    ("IP_TRANSPARENT", IP, 19, number(1)),
    ("IP_RECVORIGDSTADDR", IP, 20, number(1)),
    ("IP_MINTTL", IP, 21, number(7)),
    ("IP_CHECKSUM", IP, 23, number(1)),
    ("IP_BIND_ADDRESS_NO_PORT", IP, 24, number(1)),
    ("IP_RECVFRAGSIZE", IP, 25, number(1)),
    ("IP_RECVERR_RFC4884", IP, 26, number(1)),
    ("IP_MULTICAST_LOOP", IP, 34, number(0)),
    ("IP_LOCAL_PORT_RANGE", IP, 51, struct.pack("I", 50000 | 60000 << 16)),
]
INET_ONLY = [("IP_MULTICAST_ALL", IP, 49, number(0))]  # an IPv6 socket's is 0 from the start
INET6: list[tuple[str, int, int, bytes]] = [
    ("IPV6_2292PKTINFO", IP6, 2, number(1)),
    ("IPV6_2292HOPOPTS", IP6, 3, number(1)),
    ("IPV6_2292DSTOPTS", IP6, 4, number(1)),
    ("IPV6_2292RTHDR", IP6, 5, number(1)),
    ("IPV6_2292HOPLIMIT", IP6, 8, number(1)),
    ("IPV6_FLOWINFO", IP6, 11, number(1)),
    ("IPV6_UNICAST_HOPS", IP6, 16, number(88)),
    ("IPV6_MULTICAST_LOOP", IP6, 19, number(0)),
    ("IPV6_MTU_DISCOVER", IP6, 23, number(3)),
    ("IPV6_RECVERR", IP6, 25, number(1)),
    ("IPV6_MULTICAST_ALL", IP6, 29, number(0)),
    ("IPV6_ROUTER_ALERT_ISOLATE", IP6, 30, number(1)),
    ("IPV6_RECVERR_RFC4884", IP6, 31, number(1)),
    ("IPV6_RECVPKTINFO", IP6, 49, number(1)),
    ("IPV6_RECVHOPLIMIT", IP6, 51, number(1)),
    ("IPV6_RECVHOPOPTS", IP6, 53, number(1)),
    ("IPV6_RECVRTHDR", IP6, 56, number(1)),
    ("IPV6_RECVDSTOPTS", IP6, 58, number(1)),
    ("IPV6_RECVPATHMTU", IP6, 60, number(1)),
    ("IPV6_DONTFRAG", IP6, 62, number(1)),
    ("IPV6_RECVTCLASS", IP6, 66, number(1)),
    ("IPV6_TCLASS", IP6, 67, number(0x48)),
    ("IPV6_AUTOFLOWLABEL", IP6, 70, number(0)),
    ("IPV6_ADDR_PREFERENCES", IP6, 72, number(0x0002)),
    ("IPV6_MINHOPCOUNT", IP6, 73, number(9)),
    ("IPV6_RECVORIGDSTADDR", IP6, 74, number(1)),
    ("IPV6_TRANSPARENT", IP6, 75, number(1)),
    ("IPV6_RECVFRAGSIZE", IP6, 77, number(1)),
    ("IPV6_FREEBIND", IP6, 78, number(1)),
    ("SO_ATTACH_FILTER", SOL, 26, b""),
    ("SO_LOCK_FILTER", SOL, 44, number(1)),
]
#: Only before connect(), or only readable on a socket without a connection.
UNCONNECTED: list[tuple[str, int, int, bytes]] = [
    ("TCP_MAXSEG", TCP, 2, number(1000)),
    ("TCP_SAVE_SYN", TCP, 27, number(1)),
    ("SO_INCOMING_CPU", SOL, 49, number(1)),
]


#: What the kernel engine leaves out, and says so.
KERNEL_LEAVES = {"SO_ATTACH_FILTER", "SO_LOCK_FILTER"}
Table = list[tuple[str, int, int, bytes]]


def table(kind: str, engine: el.Pair) -> Table:
    """All that there is, or all that this engine carries."""
    if kind == "v4":
        return carried(GENERAL + INET + INET_ONLY, engine)
    return carried(GENERAL + INET6 + (INET if kind == "mapped" else []), engine)


def carried(options: Table, engine: el.Pair) -> Table:
    if engine.exporter.name == "repair":
        return options
    return [option for option in options if option[0] not in KERNEL_LEAVES]


def close(*sockets: socket.socket | None) -> None:
    """Without waiting for what SO_LINGER says."""
    for sock in sockets:
        if sock:
            sock.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 0, 0))
            sock.close()


def set_option(sock: socket.socket, name: str, level: int, option: int, value: bytes) -> None:
    if name == "SO_ATTACH_FILTER":
        import ctypes

        code = ctypes.create_string_buffer(_FILTER)
        value = struct.pack("HxxxxxxQ", 1, ctypes.addressof(code))
        sock.setsockopt(level, option, value)
        return
    sock.setsockopt(level, option, value)


def read(sock: socket.socket, level: int, option: int) -> bytes | None:
    """The option as the kernel tells it, or None. (A filter's length counts instructions.)"""
    try:
        return sock.getsockopt(level, option, 1 if option == 26 and level == SOL else 64)
    except OSError as error:
        assert error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)  # SO_PEEK_OFF before Linux 6.9
        return None


@pytest.fixture(scope="module")
def lab() -> Iterator[el.Lab]:
    with el.lab() as it:
        yield it


@pytest.fixture(scope="module")
def engine() -> el.Pair:
    """Of both hosts; tests/kmod/inside has this suite for the kernel engine."""
    return el.make_pair("repair")


def copy_of(lab: el.Lab, engine: el.Pair, sock: socket.socket) -> tuple[socket.socket, bytes, Restored]:
    copy, item, made = moved(lab, engine, sock)
    return copy, item.image, made


def moved(lab: el.Lab, engine: el.Pair, sock: socket.socket) -> tuple[socket.socket, Captured, Restored]:
    with lab.host("a"):
        (item,) = engine.capture([sock.fileno()])
    assert isinstance(item, Captured), item
    assert "rare-options" not in item.fidelity.reset
    with lab.host("b"):
        (made,) = engine.restore([item.image], [Placement(None, False)])
        assert isinstance(made, Restored), made
        assert engine.activate([made.fd], [item.image]) == [None]
    return socket.socket(fileno=made.fd), item, made


def compare(sock: socket.socket, copy: socket.socket, options: list[tuple[str, int, int, bytes]]) -> None:
    different: list[tuple[str, bytes | None, bytes | None]] = []
    for name, level, option, _unused in options:
        before, after = read(sock, level, option), read(copy, level, option)
        if before != after:
            different.append((name, before, after))
    assert not different


@pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])
def test_each_option_alone(lab: el.Lab, engine: el.Pair, kind: str) -> None:
    """One socket for each option, set after connect(); the copy has it, and nothing else that is new."""
    lab.switch("a")
    taken = 0
    port = lab.port()
    lab.hold("b", port)
    for name, level, option, value in table(kind, engine):
        sock, peer = lab.pair(kind, port)
        fresh = read(sock, level, option)
        try:
            if fresh is None:
                continue
            if name == "SO_LOCK_FILTER":
                set_option(sock, "SO_ATTACH_FILTER", SOL, 26, b"")
            set_option(sock, name, level, option, value)
        except OSError:
            continue
        finally:
            peer.close()
        taken += 1
        # SO_DEBUG and the like: a value that is not the fresh one must be there to be carried.
        if name != "SO_REUSEADDR":
            assert read(sock, level, option) != fresh, name
        copy, _unused, made = copy_of(lab, engine, sock)
        compare(sock, copy, [(name, level, option, value)])
        assert not [r for r in made.fidelity.reset if r.startswith("option")], name
        close(sock, copy)
    assert taken >= len(table(kind, engine)) - 8


#: Another number of the same option, no option of the application's, or one that does nothing to TCP.
NOT_OPTIONS = {
    *((SOL, one) for one in (16, 34, 76)),  # SO_PASSCRED, SO_PASSSEC, SO_PASSPIDFD: Linux < 6.16 takes them
    *((SOL, one) for one in (32, 33)),  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
    *((TCP, one) for one in (19, 20, 21, 22, 24, 29)),  # TCP_REPAIR, its queues, options, clock and windows
}


def settable(family: int, make: Callable[[], socket.socket]) -> Iterator[tuple[int, int, bytes]]:
    """Every option that this kernel lets an application set to a number, and tells; and its value then."""
    for level in (SOL, TCP, IP, *[IP6] * (family == socket.AF_INET6)):
        for option in range(1, 256):
            if (level, option) in NOT_OPTIONS:
                continue
            for value in (1, 0, 2, 7, 1000):
                sock = make()
                with contextlib.closing(sock), contextlib.suppress(OSError):
                    before = sock.getsockopt(level, option, 64)
                    sock.setsockopt(level, option, number(value))
                    if sock.getsockopt(level, option, 64) != before:
                        yield level, option, number(value)
                        break


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def test_every_option_that_this_kernel_has(
    lab: el.Lab, engine: el.Pair, family: socket.AddressFamily
) -> None:
    """Also those that nobody has written down here: the copy has it, or the fidelity says that it is lost."""
    lab.switch("a")
    address = el.HOST4 if family == socket.AF_INET else "::"  # else it is for IPv6 alone, and IP_* do nothing

    def make() -> socket.socket:
        with lab.host("a"):
            return socket.socket(family)

    silent = []
    for level, option, value in settable(family, make):
        with lab.host("a"):
            sock = socket.socket(family)
        sock.bind((address, lab.port()))
        try:
            sock.setsockopt(level, option, value)
        except OSError:  # not once it is bound
            sock.close()
            continue
        copy, item, made = moved(lab, engine, sock)
        exporter = codec.decode(item.image).fidelity_names(codec.FidelityClass.RESET)
        lost = (*item.fidelity.reset, *exporter, *made.fidelity.reset)
        told = any(one.startswith("option") for one in lost)
        if not told and copy.getsockopt(level, option, 64) != sock.getsockopt(level, option, 64):
            silent.append((level, option, value))
        close(sock, copy)
    assert not silent


def test_a_priority_of_its_own(lab: el.Lab, engine: el.Pair) -> None:
    """IP_TOS sets SO_PRIORITY too, but the application has set that back."""
    lab.switch("a")
    port = lab.port()
    lab.hold("b", port)
    sock, peer = lab.pair("v4", port)
    options = [("IP_TOS", IP, 1, number(0x10)), ("SO_PRIORITY", SOL, 12, number(0))]
    for name, level, option, value in options:
        set_option(sock, name, level, option, value)
    copy, _unused, _unused = copy_of(lab, engine, sock)
    compare(sock, copy, options)
    close(sock, copy, peer)


def test_a_port_that_is_chosen_later(lab: el.Lab, engine: el.Pair) -> None:
    """IP_BIND_ADDRESS_NO_PORT, also of a socket for IPv6 alone: it has none, and connect() chooses it."""
    lab.switch("a")
    for family, address in ((socket.AF_INET, el.HOST4), (socket.AF_INET6, el.HOST6)):
        with lab.host("a"):
            sock = socket.socket(family)
        if family == socket.AF_INET6:
            sock.setsockopt(IP6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(IP, 24, 1)
        sock.setsockopt(IP, 51, struct.pack("I", 50000 | 60000 << 16))  # IP_LOCAL_PORT_RANGE
        sock.bind((address, 0))
        assert sock.getsockname()[1] == 0
        copy, _unused, _unused = copy_of(lab, engine, sock)
        assert copy.getsockname()[1] == 0
        assert copy.getsockopt(IP, 24) == 1
        assert read(copy, IP, 51) == read(sock, IP, 51)
        close(sock, copy)


@pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])
@pytest.mark.parametrize("what", ["connected", "bound", "listening"])
def test_all_options_together(lab: el.Lab, engine: el.Pair, kind: str, what: str) -> None:
    lab.switch("a")
    port = lab.port()
    lab.hold("b", port)
    options = table(kind, engine) + (carried(UNCONNECTED, engine) if what != "connected" else [])
    peer = None
    if what == "connected":
        sock, peer = lab.pair(kind, port)
    elif what == "listening":
        sock = lab.listener(kind, port)
    else:
        with lab.host("a"):
            sock = socket.socket(socket.AF_INET if kind == "v4" else socket.AF_INET6, socket.SOCK_STREAM)
        sock.bind(({"v4": el.HOST4, "v6": el.HOST6, "mapped": "::"}[kind], port))
    for name, level, option, value in options:
        with contextlib.suppress(OSError):
            set_option(sock, name, level, option, value)
    copy, image, _unused = copy_of(lab, engine, sock)
    assert len(codec.decode(image).socket_options) > 40
    compare(sock, copy, options)
    close(sock, copy, peer)


def test_hosts_with_other_defaults(lab: el.Lab, engine: el.Pair) -> None:
    """What was a default at the exporter is kept where the default is another."""
    lab.switch("a")
    port = lab.port()
    lab.hold("b", port)
    sock, peer = lab.pair("v4", port)
    names = {
        "net/ipv4/tcp_keepalive_time": "100",
        "net/ipv4/tcp_keepalive_probes": "3",
        "net/ipv4/ip_default_ttl": "33",
        "net/ipv4/tcp_congestion_control": "reno",
        "net/ipv4/tcp_fin_timeout": "5",
    }
    with lab.host("b"):
        from pathlib import Path

        old = {name: Path("/proc/sys", name).read_text() for name in names}
        for name, value in names.items():
            Path("/proc/sys", name).write_text(value)
    try:
        import time

        time.sleep(1.1)  # fresh sockets' options are remembered for a second
        copy, _unused, _unused = copy_of(lab, engine, sock)
        compare(sock, copy, table("v4", engine))
        copy.close()
    finally:
        with lab.host("b"):
            for name, value in old.items():
                Path("/proc/sys", name).write_text(value)
    sock.close()
    peer.close()


def test_buffers_stay_tunable(lab: el.Lab, engine: el.Pair) -> None:
    """A copy's buffers are fixed if the application has fixed them, else the kernel goes on tuning them."""
    lab.switch("a")
    for fixed in (False, True):
        port = lab.port()
        lab.hold("b", port)
        sock, peer = lab.pair("v4", port)
        if fixed:
            sock.setsockopt(SOL, socket.SO_RCVBUF, 300_000)
            sock.setsockopt(SOL, socket.SO_SNDBUF, 300_000)
        peer.sendall(bytes(100_000))
        el.wait_for(lambda sock=sock: sock.recv(100_000, socket.MSG_PEEK | socket.MSG_WAITALL) != b"")  # type: ignore[misc]
        copy, _unused, _unused = copy_of(lab, engine, sock)
        assert read(copy, SOL, 72) == read(sock, SOL, 72) == number(3 if fixed else 0)  # SO_BUF_LOCK
        if fixed:
            compare(sock, copy, [("", SOL, 7, b""), ("", SOL, 8, b"")])
        close(sock, copy, peer)


def test_option_that_this_host_does_not_take(lab: el.Lab, engine: el.Pair) -> None:
    """It is named in the fidelity, and the socket moves all the same."""
    lab.switch("a")
    port = lab.port()
    lab.hold("b", port)
    sock, peer = lab.pair("v4", port)
    with lab.host("a"):
        sock.setsockopt(IP, 50, struct.pack("!I", 1))  # IP_UNICAST_IF: an index means nothing elsewhere
    copy, _unused, made = copy_of(lab, engine, sock)
    assert "option:ip_unicast_if" in made.fidelity.reset
    close(sock, copy, peer)


def test_a_saved_syn_is_lost_and_told(lab: el.Lab, engine: el.Pair) -> None:
    """Nobody can be given one; who is only looked at keeps his."""
    lab.switch("a")
    for saved in (True, False):
        port = lab.port()
        lab.hold("b", port)
        listener = lab.listener("v4", port)
        listener.setsockopt(TCP, 27, int(saved))  # TCP_SAVE_SYN
        peer, address = lab.client("v4")
        peer.connect((address, port))
        sock, _unused = listener.accept()
        with lab.host("a"):
            (item,) = engine.capture([sock.fileno()])
        assert isinstance(item, Captured), item
        assert ("saved-syn" in item.fidelity.reset) == saved
        assert bool(sock.getsockopt(TCP, 28, 256)) == saved  # TCP_SAVED_SYN
        close(sock, peer, listener)


def test_a_flow_label_is_lost_and_told(lab: el.Lab, engine: el.Pair) -> None:
    lab.switch("a")
    for label in (0x12345, 0):
        with lab.host("peer"):
            listener = socket.create_server((el.PEER6, 0), family=socket.AF_INET6)
        with lab.host("a"):
            sock = socket.socket(socket.AF_INET6)
        if label:
            destination = socket.inet_pton(socket.AF_INET6, el.PEER6)
            lease = destination + struct.pack("!IBBHHHI", label, 0, 255, 0, 0, 0, 0)
            lease = lease[:22] + struct.pack("=H", 1) + lease[24:]  # IPV6_FL_F_CREATE
            sock.setsockopt(IP6, 32, lease)  # IPV6_FLOWLABEL_MGR
            sock.setsockopt(IP6, 33, 1)  # IPV6_FLOWINFO_SEND
        sock.connect((*listener.getsockname()[:2], label, 0))
        with lab.host("a"):
            (item,) = engine.capture([sock.fileno()])
        assert isinstance(item, Captured), item
        assert ("option:ipv6_flowlabel" in item.fidelity.reset) == bool(label), item.fidelity
        close(sock, listener)


def test_common_options_only(lab: el.Lab) -> None:
    """In a hurry, rare options of connections are left out, and the fidelity says so."""
    lab.switch("a")
    sock, peer = lab.pair("v4", lab.port())
    sock.setsockopt(TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(SOL, socket.SO_BROADCAST, 1)
    for rare in (False, True):
        (item,) = RepairEngine(rare_options=rare).capture([sock.fileno()])
        assert isinstance(item, Captured), item
        options = {option.option for option in codec.decode(item.image).socket_options}
        assert 100 in options and (4 in options) == rare
        assert ("rare-options" in item.fidelity.reset) != rare
    close(sock, peer)
