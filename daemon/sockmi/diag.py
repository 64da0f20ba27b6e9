# SPDX-License-Identifier: MIT
"""sock_diag(7): is there a socket for this connection, and which connections have just ended.

Many questions go in one netlink datagram; pyroute2's DiagSocket is made for dumps. The kernel finds a socket
with SO_BINDTODEVICE (or in a VRF, or of a link-local address) only for who names its device: what is not
found without one is looked for on each device.
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
from typing import TypeVar

from sockmi.addresses import Endpoint, FourTuple
from sockmi.frozen import frozen

T = TypeVar("T")

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
_QUESTIONS_AT_ONCE = 64  # so that all answers fit into the receive buffer
_NEWS_AT_ONCE = 256  # however fast sockets end
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

    def states(self, connections: Sequence[FourTuple]) -> list[int | None]:
        """The kernel's state number of each connection, or None: no such socket."""
        return [found.state if found else None for found in self.find_all(connections)]

    def find(self, connection: FourTuple) -> Found | None:
        """The socket of a connection, or None."""
        return self.find_all([connection])[0]

    def find_all(self, connections: Sequence[FourTuple]) -> list[Found | None]:
        """The same for many; OSError if the kernel does not answer."""
        found: list[Found | None] = [None] * len(connections)
        for devices in self._device_groups():
            missing = [at for at, one in enumerate(found) if one is None]
            questions = [(at, device) for at in missing for device in devices]
            for some in _some(questions):
                asked = [(connections[at], _NO_COOKIE, device) for at, device in some]
                for (at, _unused), answer in zip(some, self._ask(_SOCK_DIAG_BY_FAMILY, asked), strict=True):
                    if isinstance(answer, bytes) and found[at] is None:
                        found[at] = _found(answer)
            if None not in found:
                break
        return found

    def destroy(self, connection: FourTuple, cookie: int) -> bool:
        """End that socket whoever has it; False if this kernel cannot (CONFIG_INET_DIAG_DESTROY).

        The kernel sends an RST (but of one in TIME-WAIT): hold the connection before. A socket that
        is gone is no error.
        """
        for devices in self._device_groups():
            for some in _some([(connection, struct.pack("=Q", cookie), device) for device in devices]):
                codes = self._ask(_SOCK_DESTROY, some)
                if errno.EOPNOTSUPP in codes:
                    return False
                if 0 in codes:
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
        yield self._devices

    def _ask(self, kind: int, questions: Sequence[tuple[FourTuple, bytes, int]]) -> list[bytes | int]:
        """Connection, cookie, device: the answer to each, which is a message or an errno.

        (0: carried out; ENOENT: there is no such socket; ESTALE: it has another cookie.)
        """
        flags = _NLM_F_REQUEST | (_NLM_F_ACK if kind == _SOCK_DESTROY else 0)
        first, requests = self._sequence + 1, []
        for connection, cookie, device in questions:
            self._sequence += 1
            requests.append(_header(kind, flags, self._sequence) + _body(connection, cookie, device))
        self._socket.send(b"".join(requests))
        answers: dict[int, bytes | int] = {}
        while len(answers) < len(questions):
            answer = self._socket.recv(8192)
            _unused, answered, _unused, sequence, _unused = _HEADER.unpack_from(answer)
            if not first <= sequence <= self._sequence:
                continue  # to a question whose asker has given up
            if answered != _NLMSG_ERROR:
                answers[sequence] = answer
                continue
            code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            if code not in (0, errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP):
                connection = questions[sequence - first][0]
                raise OSError(code, f"sock_diag about {connection}: {os.strerror(code)}")
            answers[sequence] = code
        return [answers[sequence] for sequence in range(first, first + len(questions))]

    def close(self) -> None:
        """Close the netlink socket."""
        self._socket.close()


def _some(questions: list[T]) -> Iterator[list[T]]:
    """In parts that may be asked at once."""
    for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
        yield questions[start : start + _QUESTIONS_AT_ONCE]


def _header(kind: int, flags: int, sequence: int) -> bytes:
    return _HEADER.pack(_HEADER.size + _REQUEST.size + _SOCKET_ID.size, kind, flags, sequence, 0)


def _body(connection: FourTuple, cookie: bytes, device: int) -> bytes:
    local, remote = connection.local, connection.remote
    family = socket.AF_INET if connection.version == 4 else socket.AF_INET6
    ends = local.port, remote.port, local.address.packed, remote.address.packed
    return _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + _SOCKET_ID.pack(
        *ends, struct.pack("=I", device), cookie
    )


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
        aborted: Callable[[Endpoint, IPv4Address | IPv6Address], None],
        lost: Callable[[], None],
    ) -> None:
        """``ended`` gets each connection; ``lost``: news were dropped, look for yourself.

        ``listener_ended`` gets the local end of each socket without a peer: it need not have listened.
        ``aborted`` gets what the kernel still knows of a connection whose owner has reset it (SO_LINGER
        of 0): its local end and the peer's address.
        """
        self._ended = ended
        self._listener_ended = listener_ended
        self._aborted = aborted
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
        """Read news, a turn's worth; for the event loop."""
        for _turn in range(_NEWS_AT_ONCE):
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
                elif local.port and remote.address.is_unspecified:
                    self._listener_ended(local)
                elif local.port:
                    self._aborted(local, remote.address)

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
