# SPDX-License-Identifier: MIT
"""Which item of a batch goes to which importer, as the policy divides them among the offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from sockmi.engine.base import Kind
from sockmi.policy import Candidate, Policy
from sockmi.protocol.records import Counts, HostId, Item, MigrationId
from sockmi.protocol.together import Address


def wanted(items: Iterable[Item]) -> Counts:
    """The room that they need: each its own, and that of what waits in its queue."""
    found = dict.fromkeys(Kind, 0)
    for item in items:
        found[item.kind] += 1
        found[Kind.CONNECTED] += item.queued
    return Counts(found[Kind.BOUND], found[Kind.LISTENING], found[Kind.CONNECTED])


def divide(
    items: Iterable[Item],
    candidates: Sequence[Candidate],
    policy: Policy,
    barred: Mapping[MigrationId, Set[HostId]],
    *,
    whole_addresses: bool = False,
) -> list[tuple[HostId, list[Item]]]:
    """Items by host; what no host has room for is left out.

    Who cannot go just anywhere is looked at first and alone, the largest first: a listener goes where there
    is room for its queue too, with ``whole_addresses`` all connections of an address go to one host, and
    none goes to a host by which it is ``barred``.
    """
    found: dict[HostId, list[Item]] = {}
    lists: dict[Kind, list[Item]] = {kind: [] for kind in Kind}
    particular: list[list[Item]] = []
    addresses: dict[Address, list[Item]] = {}
    hosts = {candidate.host for candidate in candidates}
    for item in items:
        if whole_addresses and item.kind is Kind.CONNECTED and item.local is not None:
            addresses.setdefault(item.local.address, []).append(item)
        elif item.queued or not hosts.isdisjoint(barred.get(item.migration, ())):
            particular.append([item])
        else:
            lists[item.kind].append(item)
    particular += addresses.values()
    for unit in sorted(particular, key=lambda one: -wanted(one).total):
        need = wanted(unit)
        closed = {host for item in unit for host in barred.get(item.migration, ())}
        rooms = {
            one.host: Counts(*(room - want for room, want in zip(one.rooms, need, strict=True)))
            for one in candidates
        }
        fitting = [one for one in candidates if one.host not in closed and min(rooms[one.host]) >= 0]
        if fitting:
            chosen = policy.choose(need, fitting)
            found.setdefault(chosen, []).extend(unit)
            candidates = [
                one._replace(rooms=rooms[chosen]) if one.host == chosen else one for one in candidates
            ]
    counts = Counts(len(lists[Kind.BOUND]), len(lists[Kind.LISTENING]), len(lists[Kind.CONNECTED]))
    for share in policy.assign(counts, candidates):
        taken = found.setdefault(share.host, [])
        for kind, waiting in lists.items():
            count = share.counts.of(kind)
            taken += waiting[:count]
            del waiting[:count]
    return list(found.items())
