# SPDX-License-Identifier: MIT
"""Hosts in network namespaces, live streams between them, and a bare TCP_REPAIR mover.

For the redirects' contract tests only: it knows nothing of the engine, so that a fault there cannot
hide one here.

    peer, a, b, c, r --- one bridge;  r --- d behind a link with an MTU of 1300
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables

NARROW_MTU = 1300
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count()
_NUMBER = {"peer": 1, "a": 2, "b": 3, "c": 4, "r": 254}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def run(*words: str, text: str | None = None) -> str:
    """A command's output; its failure is an error with what it said."""
    done = subprocess.run(words, input=text, text=True, capture_output=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}{done.stdout}")
    return done.stdout


def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    """Poll until ``condition`` yields something true, and return that."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)
    return found


@dataclass
class Host:
    """One network namespace; ``tables`` are made in it when first asked for."""

    name: str
    namespace: str
    settings: Settings = field(default_factory=Settings)
    _tables: Tables | None = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run the calling thread in this host's namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        to = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            if _libc.setns(to, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            yield
        finally:
            _libc.setns(before, _CLONE_NEWNET)
            os.close(before)
            os.close(to)

    @property
    def tables(self) -> Tables:
        if self._tables is None:
            with self.inside():
                self._tables = Tables(self.settings)
        return self._tables

    def restart(self) -> Tables:
        """A new daemon on this host: all that is in memory is gone."""
        self.close()
        return self.tables

    def close(self) -> None:
        if self._tables is not None:
            self._tables.close()
            self._tables = None

    def address(self, version: int) -> str:
        if self.name == "d":
            return "10.9.1.2" if version == 4 else "fd09:1::2"
        number = _NUMBER[self.name]
        return f"10.9.0.{number}" if version == 4 else f"fd09::{number:x}"

    def ip(self, *words: str) -> str:
        return run("ip", "-n", self.namespace, *words)

    def nft(self, *words: str, text: str | None = None) -> str:
        return run("ip", "netns", "exec", self.namespace, "nft", *words, text=text)

    def sysctl(self, name: str, value: int | str) -> None:
        with self.inside():
            Path("/proc/sys", name).write_text(str(value))


def sweep() -> None:
    """Remove what labs of processes that were killed have left, and only that."""
    for path in Path("/run/netns").glob("smt-*-rd*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, timeout=30, check=False)


class Lab:
    """All hosts; a context manager that leaves nothing."""

    def __init__(self, with_d: bool = False) -> None:
        prefix = f"smt-{os.getpid()}-rd{next(_serial)}"
        names = ["peer", "a", "b", "c"] + (["r", "d"] if with_d else [])
        self.hosts = {name: Host(name, f"{prefix}-{name}") for name in names}
        self._switch = f"{prefix}-s"
        self.switch = Host("switch", self._switch)  # its port to a host is p and the host's name

    def __getattr__(self, name: str) -> Host:
        hosts: dict[str, Host] = self.__dict__["hosts"]
        if name not in hosts:
            raise AttributeError(name)
        return hosts[name]

    def __enter__(self) -> Lab:
        sweep()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for namespace in (self._switch, *(h.namespace for h in self.hosts.values())):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        lines = ["link add br0 type bridge stp_state 0 forward_delay 0", "link set br0 up"]
        for host in self.hosts.values():
            if host.name != "d":
                lines += [
                    f"link add p{host.name} type veth peer name eth0 netns {host.namespace}",
                    f"link set p{host.name} master br0 up",
                ]
        run("ip", "-n", self._switch, "-batch", "-", text="\n".join(lines))
        for host in self.hosts.values():
            host.sysctl("net/ipv6/conf/default/accept_dad", 0)
            host.sysctl("net/ipv6/conf/all/forwarding", 1)
            host.sysctl("net/ipv4/ip_forward", 1)
            host.sysctl("net/ipv6/conf/default/accept_ra", 0)
        if "d" in self.hosts:
            self.r.ip("link", "add", "eth1", "mtu", str(NARROW_MTU), "type", "veth", "peer", "name", "eth0",
                      "mtu", str(NARROW_MTU), "netns", self.d.namespace)  # fmt: skip
            for words in ("addr add 10.9.1.254/24 dev eth1", "addr add fd09:1::fe/64 dev eth1 nodad"):
                self.r.ip(*words.split())
            self.r.ip("link", "set", "eth1", "up")
        for host in self.hosts.values():
            gateway = ("10.9.1.254", "fd09:1::fe") if host.name == "d" else ("10.9.0.254", "fd09::fe")
            lines = [
                f"addr add {host.address(4)}/24 dev eth0",
                f"addr add {host.address(6)}/64 dev eth0 nodad",
                "link set eth0 up",
            ]
            if host.name != "r" and "r" in self.hosts:
                lines += [f"route add default via {gateway[0]}", f"route add ::/0 via {gateway[1]}"]
            run("ip", "-n", host.namespace, "-batch", "-", text="\n".join(lines))

    def __exit__(self, *_unused: object) -> None:
        for host in self.hosts.values():
            host.close()
        for namespace in (self._switch, *(h.namespace for h in self.hosts.values())):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=30, check=False)


# --- a live stream ---------------------------------------------------------------------------

_PERIOD = 65521
_PATTERN = random.Random(7).randbytes(_PERIOD)  # noqa: S311 (test data)


def pattern(offset: int, count: int) -> bytes:
    """The bytes that both ends send; what arrives is compared with them by offset."""
    start = offset % _PERIOD
    return (_PATTERN * (2 + count // _PERIOD))[start : start + count]


class Talker:
    """One end: sends the pattern and checks what comes, in a thread, until it is paused."""

    def __init__(self, sock: socket.socket, pause_s: float = 0.0005, largest: int = 900) -> None:
        self.sent = self.received = 0
        self.failure: BaseException | None = None
        self.pause_s, self.largest = pause_s, largest
        self._rng = random.Random(11)  # noqa: S311 (test data)
        self.resume(sock)

    def resume(self, sock: socket.socket) -> None:
        """Go on with ``sock``, the same connection as before."""
        self.sock = sock
        sock.setblocking(False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pause(self) -> socket.socket:
        """Stop; nothing is added or taken until ``resume``."""
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.check()
        return self.sock

    def check(self) -> None:
        if self.failure is not None:
            raise AssertionError(f"stream broke after {self.received} bytes in") from self.failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    self.sent += self.sock.send(pattern(self.sent, self._rng.randint(1, self.largest)))
                if select.select([self.sock], [], [], self.pause_s)[0]:
                    data = self.sock.recv(1 << 18)
                    assert data, "unexpected end of stream"
                    assert data == pattern(self.received, len(data)), f"wrong bytes at {self.received}"
                    self.received += len(data)
        except BaseException as failure:
            self.failure = failure


class Capture:
    """TCP segments that arrive at a host: how many carried RST or FIN, and all ICMP redirects."""

    def __init__(self, host: Host) -> None:
        with host.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._sock.settimeout(0.1)
        self.resets = self.fins = self.segments = self.redirects = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                packet, source = self._sock.recvfrom(256)
            except TimeoutError:
                continue
            if source[2] == socket.PACKET_OUTGOING or source[1] not in (0x0800, 0x86DD):
                continue
            if packet[0] >> 4 == 4:
                protocol, body = packet[9], packet[(packet[0] & 15) * 4 :]
            else:
                protocol, body = packet[6], packet[40:]
            if protocol == socket.IPPROTO_TCP:
                self.segments += 1
                self.resets += bool(body[13] & 4)
                self.fins += bool(body[13] & 1)
            elif (protocol, body[0]) in ((1, 5), (58, 137)):
                self.redirects += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._sock.close()


# --- a bare mover ------------------------------------------------------------------------------

_TCP = socket.IPPROTO_TCP
_REPAIR, _QUEUE, _SEQ, _OPTIONS, _STAMP, _WINDOW = 19, 20, 21, 22, 24, 29
_RECEIVE, _SEND = 1, 2


@dataclass(frozen=True)
class Image:
    """What the mover carries."""

    sequences: tuple[int, int]
    received: bytes
    sent: bytes
    unsent: bytes
    window: bytes
    mss: int
    scales: int
    stamp: int
    tuple: FourTuple


def ends(sock: socket.socket) -> FourTuple:
    """Both endpoints of a connected socket."""

    def one(name: tuple[Any, ...]) -> Endpoint:
        return Endpoint(ip_address(name[0]), name[1])

    return FourTuple(one(sock.getsockname()), one(sock.getpeername()))


def _ioctl_int(sock: socket.socket, number: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, number, b"\0" * 4))[0])


def dump(sock: socket.socket) -> Image:
    """Read a connection; leaves it in repair mode, so that ``close`` says nothing."""
    sock.setblocking(False)
    sock.setsockopt(_TCP, _REPAIR, 1)
    unsent = _ioctl_int(sock, 0x894B)
    queued = _ioctl_int(sock, 0x5411)
    peeked, sequences = [], []
    for queue in (_RECEIVE, _SEND):
        sock.setsockopt(_TCP, _QUEUE, queue)
        sequences.append(sock.getsockopt(_TCP, _SEQ) & 0xFFFFFFFF)
        try:
            peeked.append(sock.recv(1 << 24, socket.MSG_PEEK))
        except BlockingIOError:
            peeked.append(b"")
    sock.setsockopt(_TCP, _QUEUE, 0)
    received, sending = peeked
    assert len(sending) == queued
    info = sock.getsockopt(_TCP, socket.TCP_INFO, 8)
    return Image(
        ((sequences[0] - len(received)) & 0xFFFFFFFF, (sequences[1] - queued) & 0xFFFFFFFF),
        received,
        sending[: queued - unsent],
        sending[queued - unsent :],
        sock.getsockopt(_TCP, _WINDOW, 20),
        sock.getsockopt(_TCP, socket.TCP_MAXSEG),
        info[6],
        sock.getsockopt(_TCP, _STAMP),
        ends(sock),
    )


def restore(image: Image, local: Endpoint) -> socket.socket:
    """A dormant copy bound to ``local`` in the caller's namespace; ``wake`` it once the redirect is there."""
    version = image.tuple.version
    sock = socket.socket(_FAMILY[version], socket.SOCK_STREAM)
    transparent = (socket.IPPROTO_IP, 19) if version == 4 else (socket.IPPROTO_IPV6, 75)
    sock.setsockopt(*transparent, 1)
    sock.setsockopt(_TCP, _REPAIR, 1)
    sock.setsockopt(_TCP, socket.TCP_MAXSEG, image.mss)
    sock.bind((str(local.address), local.port))
    for queue, sequence in zip((_RECEIVE, _SEND), image.sequences, strict=True):
        sock.setsockopt(_TCP, _QUEUE, queue)
        sock.setsockopt(_TCP, _SEQ, struct.pack("=I", sequence))
    remote = image.tuple.remote
    sock.connect((str(remote.address), remote.port))
    options = ((2, image.mss), (3, image.scales & 15 | (image.scales >> 4) << 16), (4, 0), (8, 0))
    sock.setsockopt(_TCP, _OPTIONS, b"".join(struct.pack("=II", *each) for each in options))
    sock.setsockopt(_TCP, _STAMP, image.stamp)
    for queue, data in ((_RECEIVE, image.received), (_SEND, image.sent)):
        sock.setsockopt(_TCP, _QUEUE, queue)
        while data:
            data = data[sock.send(data[:16384]) :]
    sock.setsockopt(_TCP, _WINDOW, image.window)
    sock.setsockopt(_TCP, _QUEUE, 0)
    return sock


def wake(sock: socket.socket, image: Image) -> None:
    """Out of repair, and send what had not been sent."""
    sock.setsockopt(_TCP, _REPAIR, 0)
    if image.unsent:
        sock.sendall(image.unsent)


def service_address(version: int) -> str:
    """An address that ``a`` can have besides its own, and give away."""
    return "10.9.0.100" if version == 4 else "fd09::64"


def connect(
    peer: Host, server: Host, version: int, address: str | None = None
) -> tuple[socket.socket, socket.socket]:
    """(the peer's end, the server's end) of a new connection."""
    family = _FAMILY[version]
    with server.inside():
        listener = socket.create_server((address or server.address(version), 0), family=family)
    with peer.inside():
        client = socket.socket(family, socket.SOCK_STREAM)
    with client, contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        client.settimeout(10)

        def connected() -> bool:
            try:
                client.connect(listener.getsockname()[:2])
            except OSError as error:
                if error.errno != errno.EHOSTUNREACH:  # an IPv6 neighbour that is not yet awake
                    raise
                return False
            return True

        until(connected, "a connection")
        accepted, _unused = listener.accept()
        accepted.setsockopt(_TCP, socket.TCP_NODELAY, 1)
        return client.dup(), accepted
