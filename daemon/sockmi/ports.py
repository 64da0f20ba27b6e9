# SPDX-License-Identifier: MIT
"""Ports that are promised to sockets which are not connected, as the kernel would judge their bind(2)s.

The kernel knows only sockets that exist; a promised one may be an image still. And of two with
SO_REUSEADDR it would find out only at their listen(2)s.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from sockmi.engine.base import BindFlag, Kind
from sockmi.frozen import frozen
from sockmi.protocol.records import Item, MigrationId


@frozen
class Name:
    """What a socket is bound to, and with whom it can share that."""

    address: IPv4Address | IPv6Address
    flags: BindFlag
    listening: bool

    def shares_with(self, other: Name) -> bool:
        """Whether both can have the same port."""
        if BindFlag.DEVICE in self.flags | other.flags or not (self.covers(other) or other.covers(self)):
            return True  # which devices is not known here
        both = self.flags & other.flags
        if BindFlag.REUSE_PORT in both:
            return True
        return BindFlag.REUSE_ADDRESS in both and not self.listening and not other.listening

    def covers(self, other: Name) -> bool:
        """Whether it has all the addresses that the other has."""
        if self.address == other.address:
            return True
        if not self.address.is_unspecified:
            return False
        return self.address.version == other.address.version or (
            self.address.version == 6 and BindFlag.V6_ONLY not in self.flags
        )


class Ports:
    """See the module docstring."""

    def __init__(self) -> None:
        self._names: dict[int, dict[MigrationId, Name]] = {}
        self._ports: dict[MigrationId, int] = {}

    def taken(self, item: Item) -> bool:
        """Whether another one that was promised its port cannot share it with this one."""
        if item.local is None or not item.local.port:
            return False
        name = _name(item)
        others = self._names.get(item.local.port, {})
        return not all(
            name.shares_with(other) for migration, other in others.items() if migration != item.migration
        )

    def keep(self, item: Item) -> None:
        """Promise a socket its port, if it has one and is not connected."""
        if item.kind is not Kind.CONNECTED and item.local is not None and item.local.port:
            self._names.setdefault(item.local.port, {})[item.migration] = _name(item)
            self._ports[item.migration] = item.local.port

    def forget(self, migration: MigrationId) -> None:
        """The inverse of ``keep``; what is not kept is ignored."""
        if (port := self._ports.pop(migration, None)) is not None:
            del self._names[port][migration]
            if not self._names[port]:
                del self._names[port]


def _name(item: Item) -> Name:
    assert item.local is not None
    address, flags = item.local.address, item.needs.bind_flags
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Name(address, flags, item.kind is Kind.LISTENING)
