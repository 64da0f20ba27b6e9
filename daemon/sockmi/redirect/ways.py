# SPDX-License-Identifier: MIT
"""What a host's routing tables say of an address."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from sockmi.frozen import frozen

Address: TypeAlias = IPv4Address | IPv6Address


@frozen
class Way:
    """How packets to an address leave this host: ``kind`` is the kernel's RTN_* number."""

    kind: int
    device: str
    device_type: int
    gateway: Address | None
    source: Address | None
    mtu_bytes: int


@frozen
class Held:
    """An address of this host, as it must be put back."""

    address: Address
    device: str
    prefix_length: int
    alone: bool
    has_dependents: bool
