# SPDX-License-Identifier: MIT
"""Routes to thousands of addresses, asked in one go, and this host's addresses; from any thread.

Many questions go in one netlink datagram. What routes.py asks, about a few hosts, wants more of each answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

from sockmi.frozen import frozen
from sockmi.redirect.ways import Address

Ends: TypeAlias = tuple[Address | None, Address]

_RTM_NEWADDR, _RTM_GETADDR, _RTM_NEWROUTE, _RTM_GETROUTE = 20, 22, 24, 26
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 2, 4, 5, 18
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_INDEX = struct.Struct("=I")
_NAME = struct.Struct("=16sH22x")  # struct ifreq, as far as it is asked for
_SIOCGIFHWADDR = 0x8927
_ARPHRD_ETHER = 1
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_QUESTIONS_AT_ONCE = 64  # so that all answers fit into the receive buffer
_TIMEOUT_S = 1.0


@frozen
class Hop:
    """Where packets to an address go: ``kind`` is the kernel's RTN_* number, ``device`` an index.

    ``direct``: no router is between.
    """

    kind: int
    device: int
    direct: bool


@frozen
class Own:
    """Where this host has an address."""

    device: int
    prefix_length: int


def hops(ends: Sequence[Ends]) -> list[Hop | None]:
    """The route from an address of this host (None: from any) to each other one; None: there is none.

    OSError if the kernel does not answer.
    """
    found: list[Hop | None] = []
    with _netlink() as kernel:
        for start in range(0, len(ends), _QUESTIONS_AT_ONCE):
            found += _asked(kernel, ends[start : start + _QUESTIONS_AT_ONCE])
    return found


def own_addresses() -> dict[Address, Own]:
    """All addresses of this host."""
    found: dict[Address, Own] = {}
    question = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    with _netlink() as kernel:
        kernel.send(_message(_RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, question))
        while True:
            for kind, _unused, body in _messages(kernel.recv(1 << 16)):
                if kind != _RTM_NEWADDR:
                    return found
                _family, length, _flags, _scope, device = _ADDRESS.unpack_from(body)
                attributes = _attributes(body[_ADDRESS.size :])
                if packed := attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS):
                    found[ip_address(packed)] = Own(device, length)


def is_segment(device: int) -> bool:
    """Whether it has link-layer addresses: then a direct route by it leads to a neighbour."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        question = _NAME.pack(socket.if_indextoname(device).encode(), 0)
        _name, kind = _NAME.unpack(fcntl.ioctl(any_socket, _SIOCGIFHWADDR, question))
        return bool(kind == _ARPHRD_ETHER)
    return False


def _netlink() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    made.settimeout(_TIMEOUT_S)
    return made


def _asked(kernel: socket.socket, ends: Sequence[Ends]) -> list[Hop | None]:
    questions = (
        _message(_RTM_GETROUTE, _NLM_F_REQUEST, number, _question(*one)) for number, one in enumerate(ends)
    )
    kernel.send(b"".join(questions))
    found: dict[int, Hop | None] = {}
    while len(found) < len(ends):
        for kind, number, body in _messages(kernel.recv(1 << 16)):
            found[number] = _hop(body) if kind == _RTM_NEWROUTE else None
    return [found[number] for number in range(len(ends))]


def _question(source: Address | None, address: Address) -> bytes:
    bits = address.max_prefixlen
    route = _ROUTE.pack(_FAMILY[address.version], bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
    return route + _packed(_RTA_DST, address) + (_packed(_RTA_SRC, source) if source else b"")


def _hop(body: bytes) -> Hop:
    kind = body[7]
    attributes = _attributes(body[_ROUTE.size :])
    (device,) = _INDEX.unpack(attributes.get(_RTA_OIF, bytes(4)))
    return Hop(kind, device, _RTA_GATEWAY not in attributes and _RTA_VIA not in attributes)


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0) + body


def _packed(attribute: int, address: IPv4Address | IPv6Address) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + address.max_prefixlen // 8, attribute) + address.packed


def _messages(answer: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, number and body of each."""
    offset = 0
    while offset + _HEADER.size <= len(answer):
        length, kind, _flags, number, _port = _HEADER.unpack_from(answer, offset)
        if length < _HEADER.size:
            return
        yield kind, number, answer[offset + _HEADER.size : offset + length]
        offset += length + 3 & ~3


def _attributes(body: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += length + 3 & ~3
    return found
