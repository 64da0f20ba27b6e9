# SPDX-License-Identifier: MIT
"""Addresses of TCP sockets: endpoints and four-tuples, IPv4 and IPv6."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

_MAPPED_BITS = 96


def parse_address(text: str) -> IPv4Address | IPv6Address:
    """As it is on the wire: a v4-mapped one (``::ffff:192.0.2.1``) is IPv4. Raises ValueError."""
    address = ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def parse_network(text: str) -> IPv4Network | IPv6Network:
    """``ADDRESS/BITS``, or an address alone; like ``parse_address``. Raises ValueError."""
    network = ip_network(text, strict=False)
    mapped = parse_address(str(network.network_address))
    if network.version == mapped.version or network.prefixlen < _MAPPED_BITS:
        return network
    return IPv4Network((int(mapped), network.prefixlen - _MAPPED_BITS))


def text_of(address: IPv4Address | IPv6Address) -> str:
    """``str(address)``, remembered: the same few addresses are written again and again."""
    return _text(address.version, int(address))


@lru_cache(maxsize=4096)
def _text(version: int, number: int) -> str:
    return str(IPv4Address(number) if version == 4 else IPv6Address(number))


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One end of a TCP connection.

    A v4-mapped IPv6 address is written as the IPv4 address that is on the wire; that the
    socket itself is an IPv6 one is a property of the socket, not of its endpoint.
    """

    address: IPv4Address | IPv6Address
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 0xFFFF:
            raise ValueError(f"port {self.port} is outside 0..65535")

    def __hash__(self) -> int:
        return hash((int(self.address), self.port))  # that of an ip_address goes by way of its digits

    @property
    def version(self) -> int:
        """IP version, 4 or 6."""
        return self.address.version

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``192.0.2.1:80`` or ``[2001:db8::1]:80``; raise ValueError otherwise."""
        host, separator, port = text.rpartition(":")
        if not separator or not port.isdecimal():
            raise ValueError(f"{text!r} is not ADDRESS:PORT")
        if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
            raise ValueError(f"{text!r}: write an IPv6 address in brackets, [ADDRESS]:PORT")
        return cls(parse_address(host.strip("[]")), int(port))

    def __str__(self) -> str:
        host = text_of(self.address)
        return f"[{host}]:{self.port}" if self.version == 6 else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, order=True)
class FourTuple:
    """The two ends of a connection, as the host that holds the socket sees them."""

    local: Endpoint
    remote: Endpoint

    def __hash__(self) -> int:
        local, remote = self.local, self.remote
        return hash((int(local.address), local.port, int(remote.address), remote.port))

    @property
    def version(self) -> int:
        """IP version of the packets, 4 or 6."""
        return self.local.version

    def __str__(self) -> str:
        return f"{self.local} <-> {self.remote}"
