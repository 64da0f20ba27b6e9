# SPDX-License-Identifier: MIT
"""Which item of a batch goes to which importer, as the policy divides them among the offers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sockmi.engine.base import Kind
from sockmi.policy import Candidate, Policy
from sockmi.protocol.records import Counts, HostId, Item


def wanted(items: Iterable[Item]) -> Counts:
    """The room that they need: each its own, and that of what waits in its queue."""
    found = dict.fromkeys(Kind, 0)
    for item in items:
        found[item.kind] += 1
        found[Kind.CONNECTED] += item.queued
    return Counts(found[Kind.BOUND], found[Kind.LISTENING], found[Kind.CONNECTED])


def divide(
    items: Iterable[Item], candidates: Sequence[Candidate], policy: Policy
) -> list[tuple[HostId, list[Item]]]:
    """Items by host; what no host has room for is left out.

    A listener goes where there is room for its queue too; who has a long one, first.
    """
    found: dict[HostId, list[Item]] = {}
    lists: dict[Kind, list[Item]] = {kind: [] for kind in Kind}
    queues: list[Item] = []
    for item in items:
        (queues if item.queued else lists[item.kind]).append(item)
    for item in sorted(queues, key=lambda one: -one.queued):
        need = wanted([item])
        for candidate in policy.order(candidates):
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
