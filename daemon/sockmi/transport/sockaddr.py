# SPDX-License-Identifier: MIT
"""Between endpoints and the socket module's address tuples, scope of link-local addresses included."""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TypeAlias

from sockmi.addresses import Endpoint

SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
Address: TypeAlias = IPv4Address | IPv6Address

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_IF_INET6 = Path("/proc/net/if_inet6")
_TENTATIVE_OR_FAILED = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_LINK_SCOPE = 0x20


def family_of(address: Address) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def to_sockaddr(endpoint: Endpoint) -> SockAddr:
    """For bind, connect and sendto. The scope of an IPv6 address may be a name or an index."""
    address = endpoint.address
    if isinstance(address, IPv4Address):
        return str(address), endpoint.port
    scope = address.scope_id or "0"
    index = int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)
    return address.compressed.partition("%")[0], endpoint.port, 0, index


def to_endpoint(sockaddr: SockAddr) -> Endpoint:
    """The inverse, of what recvfrom, accept and getsockname return."""
    address: Address = ip_address(sockaddr[0].partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif len(sockaddr) == 4 and sockaddr[3]:
            address = IPv6Address(f"{address}%{sockaddr[3]}")
    return Endpoint(address, sockaddr[1])


def interface_addresses(interface: str, version: int) -> list[Address]:
    """Usable addresses of an interface, global ones before link-local ones; empty if there are none."""
    if version == 4:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            request = struct.pack("16sH14s", interface.encode(), socket.AF_INET, b"")
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:
                return []
        return [IPv4Address(answer[20:24])]
    found: list[tuple[int, Address]] = []
    for line in _IF_INET6.read_text().splitlines() if _IF_INET6.exists() else []:
        packed, index, _prefix, scope, flags, name = line.split()
        if name == interface and not int(flags, 16) & _TENTATIVE_OR_FAILED:
            link = int(scope, 16) == _LINK_SCOPE
            text = IPv6Address(bytes.fromhex(packed))
            found.append((link, IPv6Address(f"{text}%{int(index, 16)}") if link else text))
    return [address for _unused, address in sorted(found, key=lambda entry: entry[0])]


def routed_address(target: Address) -> Address | None:
    """Our address on the way to ``target`` by the routing table; None if there is no way."""
    with socket.socket(family_of(target), socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(to_sockaddr(Endpoint(target, 9)))
        except OSError:
            return None
        return to_endpoint(probe.getsockname()).address
