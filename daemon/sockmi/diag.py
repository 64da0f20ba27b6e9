# SPDX-License-Identifier: MIT
"""sock_diag(7): is there a socket for this connection, and which connections have just ended.

One netlink request for one question (about 10 us); pyroute2's DiagSocket is made for dumps. The kernel
finds a socket with SO_BINDTODEVICE (or in a VRF, or of a link-local address) only for who names its device:
what is not found without one is looked for on each device, many of them in one system call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address

from sockmi.addresses import Endpoint, FourTuple
from sockmi.frozen import frozen

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_DESTROY_GROUPS = {4: 1, 6: 3}  # SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_SOCKET_ID = struct.Struct("!HH16s16s4s8s")
_NO_COOKIE = b"\xff" * 8
_ANY_DEVICE = 0
_DEVICES_AT_ONCE = 64  # so that all answers fit into the receive buffer
_DEVICES_AGE_S = 1.0  # to list them takes longer than to ask
_LISTEN, _TIME_WAIT = 10, 6
_SO_RCVBUFFORCE = 33
_MAPPED = bytes(10) + b"\xff\xff"


@frozen
class Found:
    """A connection's socket. ``state``: the kernel's number (TCP_ESTABLISHED is 1, TCP_TIME_WAIT is 6).

    ``inode`` is 0 when no process has it any more; ``cookie`` is its SO_COOKIE; ``queued``: bytes, both ways.
    """

    state: int
    inode: int
    cookie: int
    queued: int = 0


class SocketDiag:
    """Questions about single connections of this network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )
        self._socket.settimeout(1.0)
        self._sequence = 0
        self._devices: list[int] = []
        self._listed_at = -_DEVICES_AGE_S - 1

    def state(self, connection: FourTuple) -> int | None:
        """The kernel's state number of a connection, or None: no such socket."""
        found = self.find(connection)
        return found.state if found else None

    def find(self, connection: FourTuple) -> Found | None:
        """The socket of a connection, or None."""
        for devices in self._device_groups():
            for answer in self._ask(_SOCK_DIAG_BY_FAMILY, connection, _NO_COOKIE, devices):
                if isinstance(answer, bytes) and (found := _found(answer)) is not None:
                    return found
        return None

    def destroy(self, connection: FourTuple, cookie: int) -> bool:
        """End that socket whoever has it; False if this kernel cannot (CONFIG_INET_DIAG_DESTROY).

        The kernel sends an RST (but of one in TIME-WAIT): hold the connection before. A socket that
        is gone is no error.
        """
        for devices in self._device_groups():
            for code in self._ask(_SOCK_DESTROY, connection, struct.pack("=Q", cookie), devices):
                if code == errno.EOPNOTSUPP:
                    return False
                if code == 0:
                    return True
        return True

    def bury(self, connection: FourTuple) -> bool:
        """End what is in TIME-WAIT, silently; False if it is in another state, or this kernel cannot."""
        found = self.find(connection)
        if found is None or found.state != _TIME_WAIT:
            return found is None
        return self.destroy(connection, found.cookie)

    def _device_groups(self) -> Iterator[list[int]]:
        """First none, as most sockets have no device, then all of this network namespace."""
        yield [_ANY_DEVICE]
        now = time.monotonic()
        if now - self._listed_at > _DEVICES_AGE_S:
            self._devices, self._listed_at = [index for index, _unused in socket.if_nameindex()], now
        for start in range(0, len(self._devices), _DEVICES_AT_ONCE):
            yield self._devices[start : start + _DEVICES_AT_ONCE]

    def _ask(
        self, kind: int, connection: FourTuple, cookie: bytes, devices: Sequence[int]
    ) -> list[bytes | int]:
        """The answer for each device: a message, or an errno (0: carried out; there is no such socket)."""
        local, remote = connection.local, connection.remote
        family = socket.AF_INET if connection.version == 4 else socket.AF_INET6
        flags = _NLM_F_REQUEST | (_NLM_F_ACK if kind == _SOCK_DESTROY else 0)
        head = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
        ends = local.port, remote.port, local.address.packed, remote.address.packed
        requests = []
        first = self._sequence + 1
        for device in devices:
            self._sequence += 1
            body = head + _SOCKET_ID.pack(*ends, struct.pack("=I", device), cookie)
            requests.append(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        self._socket.send(b"".join(requests))
        answers: dict[int, bytes | int] = {}
        while len(answers) < len(devices):
            answer = self._socket.recv(8192)
            _unused, answered, _unused, sequence, _unused = _HEADER.unpack_from(answer)
            if not first <= sequence <= self._sequence:
                continue  # to a question whose asker has given up
            if answered != _NLMSG_ERROR:
                answers[sequence] = answer
                continue
            code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            if code not in (0, errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP):
                raise OSError(code, f"sock_diag about {connection}: {os.strerror(code)}")
            answers[sequence] = code
        return list(answers.values())

    def close(self) -> None:
        """Close the netlink socket."""
        self._socket.close()


def _found(answer: bytes) -> Found | None:
    body = _HEADER.size
    state = answer[body + 1]
    (cookie,) = struct.unpack_from("=Q", answer, body + 44)
    received, unsent = struct.unpack_from("=II", answer, body + 56)
    (inode,) = struct.unpack_from("=I", answer, body + 68)
    # The kernel's look-up falls back to a listener.
    return None if state == _LISTEN else Found(state, inode, cookie, received + unsent)


class DestroyedSockets:
    """News of TCP sockets that the kernel has destroyed; needs CAP_NET_ADMIN."""

    def __init__(
        self,
        ended: Callable[[FourTuple], None],
        listener_ended: Callable[[Endpoint], None],
        lost: Callable[[], None],
    ) -> None:
        """``ended`` gets each connection; ``lost``: news were dropped, look for yourself.

        ``listener_ended`` gets the local end of each socket without a peer: it need not have listened.
        """
        self._ended = ended
        self._listener_ended = listener_ended
        self._lost = lost
        self.socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_SOCK_DIAG,
        )
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        groups = sum(1 << (group - 1) for group in _DESTROY_GROUPS.values())
        self.socket.bind((0, groups))

    def readable(self) -> None:
        """Read all news; for the event loop."""
        while True:
            try:
                news = self.socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._lost()
                    continue
                raise
            for local, remote in _ends(news):
                if remote.port:
                    self._ended(FourTuple(local, remote))
                elif local.port:
                    self._listener_ended(local)

    def close(self) -> None:
        """Close the netlink socket."""
        self.socket.close()


def _ends(news: bytes) -> Iterator[tuple[Endpoint, Endpoint]]:
    offset = 0
    while offset + _HEADER.size + 4 + _SOCKET_ID.size <= len(news):
        length, kind, *_unused = _HEADER.unpack_from(news, offset)
        if length < _HEADER.size:
            return
        if kind == _SOCK_DIAG_BY_FAMILY:
            body = offset + _HEADER.size
            family = news[body]
            local_port, remote_port, local, remote, _unused, _unused = _SOCKET_ID.unpack_from(news, body + 4)
            yield (
                Endpoint(_address(family, local), local_port),
                Endpoint(_address(family, remote), remote_port),
            )
        offset += (length + 3) & ~3


def _address(family: int, packed: bytes) -> IPv4Address | IPv6Address:
    if family == socket.AF_INET:
        return IPv4Address(packed[:4])
    if packed.startswith(_MAPPED):
        return IPv4Address(packed[12:])
    return IPv6Address(packed)
