# SPDX-License-Identifier: MIT
"""Which item of a batch goes to which importer, as the policy divides them among the offers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from sockmi.engine.base import Kind
from sockmi.policy import Candidate, Policy
from sockmi.protocol.records import Counts, HostId, Item, MigrationId


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
) -> list[tuple[HostId, list[Item]]]:
    """Items by host; what no host has room for is left out.

    Who cannot go just anywhere is looked at first and alone: a listener goes where there is room for its
    queue too (the longest first), and none goes to a host by which it is ``barred``.
    """
    found: dict[HostId, list[Item]] = {}
    lists: dict[Kind, list[Item]] = {kind: [] for kind in Kind}
    particular: list[Item] = []
    hosts = {candidate.host for candidate in candidates}
    for item in items:
        alone = item.queued or not hosts.isdisjoint(barred.get(item.migration, ()))
        (particular if alone else lists[item.kind]).append(item)
    for item in sorted(particular, key=lambda one: -one.queued):
        need = wanted([item])
        fitting = [one for one in candidates if one.host not in barred.get(item.migration, ())]
        for candidate in policy.order(fitting):
            left = Counts(*(room - want for room, want in zip(candidate.rooms, need, strict=True)))
            if min(left) >= 0:
                found.setdefault(candidate.host, []).append(item)
                candidates = [
                    one._replace(rooms=left) if one.host == candidate.host else one for one in candidates
                ]
                break
    counts = Counts(len(lists[Kind.BOUND]), len(lists[Kind.LISTENING]), len(lists[Kind.CONNECTED]))
    for share in policy.assign(counts, candidates):
        taken = found.setdefault(share.host, [])
        for kind, waiting in lists.items():
            count = share.counts.of(kind)
            taken += waiting[:count]
            del waiting[:count]
    return list(found.items())
