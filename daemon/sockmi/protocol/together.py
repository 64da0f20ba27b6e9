# SPDX-License-Identifier: MIT
"""What goes together or not at all: the connections of an address that takeover leads away with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Set
from ipaddress import IPv4Address, IPv6Address

from sockmi.protocol.records import Item, MigrationId, Place
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

Address = IPv4Address | IPv6Address
Ready = tuple[Item, Place]


def leaving(item: Item, place: Place) -> Address | None:
    """The address that the exporter has no more once ``item`` has moved; None if it keeps it."""
    if place.mode is not Mode.TAKEOVER or item.local is None:
        return None
    return item.local.address


def awaited(address: Address, coming: Iterable[Item]) -> bool:
    """Whether an address has to wait for connections that have no place yet."""
    return any(one.local is not None and one.local.address == address for one in coming)


def take_chunk(
    ready: deque[Ready], items_max: int, bytes_max: int, alone: Set[MigrationId] = frozenset()
) -> list[Ready]:
    """Take what is frozen next from ``ready``, in order, but with its whole address.

    At least one item, and at most ``items_max``, as no address has more (``too_many``). ``bytes_max`` (of
    images, as expected) divides no address: one alone may have more. Who is in ``alone`` goes with nothing
    but its address.
    """
    taken: list[Ready] = []
    size = 0
    while ready:
        address = leaving(*ready[0])
        some = [ready[0]] if address is None else [one for one in ready if leaving(*one) == address]
        grown = size + sum(item.size_bytes for item, _unused in some)
        single = any(item.migration in alone for item, _unused in some)
        if taken and (single or len(taken) + len(some) > items_max or grown > bytes_max):
            break
        if address is None:
            ready.popleft()
        else:
            others = [one for one in ready if leaving(*one) != address]
            ready.clear()
            ready.extend(others)
        taken += some
        size = grown
        if single or len(taken) >= items_max:
            break
    return taken


def too_many(count: int, address: Address, items_max: int) -> Refusal:
    """Why so many connections cannot leave with their address."""
    return Refusal(
        Code.REDIRECT,
        f"{count} connections have {address}, and takeover can lead away {items_max} with it, as they are "
        "frozen together; raise chunk_size (126 at most), or use another redirect",
    )


def stays(address: Address | None, refused: Mapping[Address, Refusal]) -> Refusal | None:
    """Why a connection stays that nothing is against: of its address, ``refused`` has one that stays."""
    first = refused.get(address) if address is not None else None
    return None if first is None else stays_too(first)


def stays_too(first: Refusal) -> Refusal:
    """Why a connection stays with its address: another does, by ``first``, whose end is not this one's."""
    code = Code.CHANGED if first.code is Code.NO_SUCH_SOCKET else first.code
    return Refusal(code, f"Its address stays, as another connection does that has it: {first.message}")
