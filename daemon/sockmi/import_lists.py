# SPDX-License-Identifier: MIT
"""The import side's waiting room: sockets that came, applications that wait (paper, 3.1 and 3.3).

Three lists (bound, listening, connected), each with a maximum; requests with criteria; the matching
between them. No I/O: the daemon tells what arrives and does what is answered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.frozen import frozen


@frozen
class Criteria:
    """What a socket must be like to satisfy one import request; None means any."""

    states: frozenset[Kind]
    preferred: frozenset[Kind] = frozenset()
    local_address: IPv4Address | IPv6Address | None = None
    local_port: int | None = None
    remote_address: IPv4Address | IPv6Address | None = None
    remote_port: int | None = None
    listener: UUID | None = None

    def match(self, candidate: Candidate) -> bool:
        """Whether ``candidate`` satisfies every criterion that is given."""
        return (
            candidate.kind in self.states
            and _endpoint_matches(candidate.local, self._local_address(candidate), self.local_port)
            and _endpoint_matches(candidate.remote, self.remote_address, self.remote_port)
            and self.listener in (None, candidate.listener)
        )

    def _local_address(self, candidate: Candidate) -> IPv4Address | IPv6Address | None:
        """The wanted address; None (any) for a socket that is bound to all addresses of that family."""
        bound = candidate.local.address if candidate.local else None
        wanted = self.local_address
        if wanted is not None and bound is not None and bound.is_unspecified:
            return None if bound.version == wanted.version else wanted
        return wanted


@frozen
class Candidate:
    """What the matching needs to know of a socket that comes or waits in a list.

    ``local`` is the endpoint that the peer knows. ``uid`` is the user that owned the socket at
    the exporter: only that user, or root, may take it.
    """

    migration_id: UUID
    kind: Kind
    local: Endpoint | None
    remote: Endpoint | None
    uid: int = 0
    listener: UUID | None = None


@dataclass(eq=False, slots=True)
class Waiting:
    """One import request of a waiting application, and the migration that is to satisfy it.

    ``order``: who waits longer has the smaller one.
    """

    client: object
    index: int
    criteria: Criteria
    uid: int
    claimed_by: UUID | None = None
    order: int = 0

    def accepts(self, candidate: Candidate) -> bool:
        """Whether it is free, allowed to have ``candidate``, and wants it."""
        return self.claimed_by is None and self.uid in (0, candidate.uid) and self.criteria.match(candidate)


class ImportLists:
    """Sockets that wait for an application, applications that wait for a socket, and room for more.

    Costs do not grow with the length of the lists: requests that ask for the same are kept together. Nor with
    what other users have listed or wait for, but for root, who may have anything.
    """

    def __init__(self, maxima: dict[Kind, int]) -> None:
        self.maxima = maxima
        self._listed: dict[Kind, dict[UUID, Candidate]] = {kind: {} for kind in Kind}
        self._listed_of: dict[tuple[Kind, int], dict[UUID, Candidate]] = {}  # the same by user
        self._reserved: dict[Kind, set[UUID]] = {kind: set() for kind in Kind}
        self._lent: set[UUID] = set()
        self._free: dict[int, dict[Criteria, dict[Waiting, None]]] = {}  # by user
        self._free_of_kind: Counter[Kind] = Counter()
        self._free_count = 0
        self._order = itertools.count()
        self._claimed: dict[UUID, Waiting] = {}
        self._by_client: dict[object, list[Waiting]] = {}

    # -- room

    def room(self, kind: Kind) -> int:
        """How many more sockets of this kind may be reserved."""
        return max(0, self.maxima[kind] - len(self._listed[kind]) - len(self._reserved[kind]))

    def reserve(self, migration_id: UUID, kind: Kind) -> bool:
        """Keep a place; False if the list is full. Repeating it changes nothing."""
        if migration_id in self._reserved[kind] or migration_id in self._listed[kind]:
            return True
        if self.room(kind) == 0:
            return False
        self._reserved[kind].add(migration_id)
        return True

    def unreserve(self, migration_id: UUID) -> None:
        """The inverse of ``reserve``; a request that was claimed for the migration is free again."""
        for reserved in self._reserved.values():
            reserved.discard(migration_id)
        self.unclaim(migration_id)

    def unclaim(self, migration_id: UUID) -> None:
        """A request that was claimed for the migration is free again."""
        if (waiting := self._claimed.pop(migration_id, None)) is not None:
            waiting.claimed_by = None
            if waiting in self._by_client.get(waiting.client, ()):
                self._bucket(waiting)

    def reserved(self, kind: Kind) -> int:
        """How many places are kept for sockets that are prepared."""
        return len(self._reserved[kind])

    # -- sockets

    def put(self, candidate: Candidate) -> None:
        """List a socket that no application has yet taken."""
        self._reserved[candidate.kind].discard(candidate.migration_id)
        self._listed[candidate.kind][candidate.migration_id] = candidate
        own = self._listed_of.setdefault((candidate.kind, candidate.uid), {})
        own[candidate.migration_id] = candidate

    def remove(self, migration_id: UUID) -> Candidate | None:
        """Take a socket out of its list (or None: it is not listed)."""
        self._lent.discard(migration_id)
        for listed in self._listed.values():
            if (candidate := listed.pop(migration_id, None)) is not None:
                own = self._listed_of[candidate.kind, candidate.uid]
                del own[migration_id]
                if not own:
                    del self._listed_of[candidate.kind, candidate.uid]
                return candidate
        return None

    def lend(self, migration_id: UUID) -> None:
        """It is being moved on: it stays in its list, but no application gets it."""
        self._lent.add(migration_id)

    def give_back(self, migration_id: UUID) -> None:
        """The inverse of ``lend``."""
        self._lent.discard(migration_id)

    def is_lent(self, migration_id: UUID) -> bool:
        """Whether it is being moved on."""
        return migration_id in self._lent

    def is_free(self, migration_id: UUID) -> bool:
        """Whether a socket is in one of the lists, and is not being moved on."""
        return migration_id not in self._lent and self.is_listed(migration_id)

    def is_listed(self, migration_id: UUID) -> bool:
        """Whether a socket is in one of the lists."""
        return any(migration_id in listed for listed in self._listed.values())

    def listed(self) -> Iterator[Candidate]:
        """Every listed socket, oldest first within its kind."""
        for listed in self._listed.values():
            yield from listed.values()

    def counts(self) -> dict[Kind, int]:
        """How many sockets each list holds."""
        return {kind: len(listed) for kind, listed in self._listed.items()}

    # -- applications

    def wait(self, requests: Iterable[Waiting]) -> None:
        """Applications wait until ``cancel`` or a match."""
        for waiting in requests:
            waiting.order = next(self._order)
            self._by_client.setdefault(waiting.client, []).append(waiting)
            if waiting.claimed_by is None:
                self._bucket(waiting)

    def cancel(self, client: object) -> None:
        """The inverse of ``wait``: all requests of one client, claimed ones too."""
        for waiting in self._by_client.pop(client, ()):
            self._unbucket(waiting)
            if waiting.claimed_by is not None:
                self._claimed.pop(waiting.claimed_by, None)

    def waiting(self) -> int:
        """How many requests wait and are not yet claimed."""
        return self._free_count

    def waiting_of(self, uid: int) -> int:
        """How many of those are one user's."""
        return sum(map(len, self._free.get(uid, {}).values()))

    def waiting_for(self, kind: Kind) -> int:
        """How many of those would take a socket of this kind."""
        return self._free_of_kind[kind]

    def waits_for(self, candidate: Candidate) -> bool:
        """Whether some waiting application would take ``candidate`` now."""
        return next(self._fitting(candidate), None) is not None

    # -- matching

    def claim(self, candidate: Candidate) -> Waiting | None:
        """The request that gets a newly come socket: one that prefers its kind before one that does not."""
        fitting = list(self._fitting(candidate))
        if not fitting:
            return None
        chosen = min(fitting, key=lambda one: (candidate.kind not in one.criteria.preferred, one.order))
        self._claim(chosen, candidate)
        return chosen

    def take(self, waiting: Waiting) -> Candidate | None:
        """The listed socket that a newly come request gets: its preferred kind first, then the oldest."""
        kinds = sorted(
            waiting.criteria.states, key=lambda kind: (kind not in waiting.criteria.preferred, kind)
        )
        for kind in kinds:
            listed = self._listed_of.get((kind, waiting.uid), {}) if waiting.uid else self._listed[kind]
            for candidate in listed.values():
                if self._is_to_be_had(candidate.migration_id) and waiting.accepts(candidate):
                    self._claim(waiting, candidate)
                    return candidate
        return None

    def _is_to_be_had(self, migration_id: UUID) -> bool:
        return migration_id not in self._claimed and migration_id not in self._lent

    def claimed(self, migration_id: UUID) -> Waiting | None:
        """The request that was claimed for a migration."""
        return self._claimed.get(migration_id)

    def _claim(self, waiting: Waiting, candidate: Candidate) -> None:
        self._unbucket(waiting)
        waiting.claimed_by = candidate.migration_id
        self._claimed[candidate.migration_id] = waiting

    def _fitting(self, candidate: Candidate) -> Iterator[Waiting]:
        """One free request of each sort that would take the candidate."""
        for uid in {candidate.uid, 0}:
            for bucket in self._free.get(uid, {}).values():
                first = next(iter(bucket))
                if first.accepts(candidate):
                    yield first

    def _bucket(self, waiting: Waiting) -> None:
        bucket = self._free.setdefault(waiting.uid, {}).setdefault(waiting.criteria, {})
        if waiting not in bucket:
            bucket[waiting] = None
            self._count(waiting, 1)

    def _unbucket(self, waiting: Waiting) -> None:
        own = self._free.get(waiting.uid, {})
        bucket = own.get(waiting.criteria, {})
        if waiting not in bucket:
            return
        del bucket[waiting]
        self._count(waiting, -1)
        if not bucket:
            del own[waiting.criteria]
        if not own:
            del self._free[waiting.uid]

    def _count(self, waiting: Waiting, change: int) -> None:
        self._free_count += change
        for kind in waiting.criteria.states:
            self._free_of_kind[kind] += change


def _endpoint_matches(
    endpoint: Endpoint | None, address: IPv4Address | IPv6Address | None, port: int | None
) -> bool:
    if endpoint is None:
        return address is None and port is None
    return address in (None, endpoint.address) and port in (None, endpoint.port)
