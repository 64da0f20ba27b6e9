# SPDX-License-Identifier: MIT
"""Which importers get how much of a batch: one small class per policy. No I/O, no clock, no chance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sockmi.protocol.records import Counts, HostId

FULL = 1000
"""A load of that many per mille: import lists without room."""


class Candidate(NamedTuple):
    """A host with a valid offer. Fields as in ``messages.Offer``."""

    host: HostId
    rooms: Counts
    waiting: Counts
    load: int
    weight: int


class Share(NamedTuple):
    """What one host shall get; never more than its rooms."""

    host: HostId
    counts: Counts


class Policy(ABC):
    """Divides a batch among the offers that are there. What no one has room for is left out:
    the exporter goes on asking for it."""

    name: str
    grace_s: float
    """How long to wait for more offers after the first one, unless an operator has said."""

    def suffices(self, candidates: Sequence[Candidate]) -> bool:
        """Whether no other offer could be better than the best of these: nobody waits for more then."""
        return False

    @abstractmethod
    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Best first; ``candidates`` come in order of arrival."""

    def choose(self, wanted: Counts, candidates: Sequence[Candidate]) -> HostId:
        """One host for what cannot be divided; all ``candidates`` (at least one) have room for it."""
        return self.order(candidates)[0].host

    def assign(self, wanted: Counts, candidates: Sequence[Candidate]) -> list[Share]:
        """Fill the best host first, then the next."""
        return fill(wanted, self.order(candidates))


def fill(wanted: Iterable[int], candidates: Iterable[Candidate]) -> list[Share]:
    """Give each candidate in turn as much as it has room for."""
    left = list(wanted)
    shares = []
    for candidate in candidates:
        given = Counts(*(min(want, room) for want, room in zip(left, candidate.rooms, strict=True)))
        if given.total:
            shares.append(Share(candidate.host, given))
            left = [want - got for want, got in zip(left, given, strict=True)]
    return shares


class Deal:
    """A batch that is being divided: what nobody has got yet, and who has got what."""

    def __init__(self, wanted: Counts, candidates: Iterable[Candidate]) -> None:
        self.left = list(wanted)
        self._given = {candidate.host: [0, 0, 0] for candidate in candidates}

    def give(self, candidate: Candidate, most: int) -> int:
        """As much as it has room for, ``most`` at most; how much that was."""
        given = self._given[candidate.host]
        before = sum(given)
        for index, room in enumerate(candidate.rooms):
            got = max(0, min(self.left[index], room - given[index], most + before - sum(given)))
            given[index] += got
            self.left[index] -= got
        return sum(given) - before

    def shares(self) -> list[Share]:
        """Of those who have got something."""
        return [Share(host, Counts(*given)) for host, given in self._given.items() if any(given)]


class FirstValid(Policy):
    """The paper's: the first valid offer, but one with a waiting importer before one without.

    So whoever has none has to wait a little for those who have.
    """

    name = "first"
    grace_s = 0.02

    def suffices(self, candidates: Sequence[Candidate]) -> bool:
        """There is one with a waiting importer."""
        return any(candidate.waiting.total for candidate in candidates)

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Stable, so that order of arrival decides among equals."""
        return sorted(candidates, key=lambda candidate: not candidate.waiting.total)


class LeastLoaded(Policy):
    """The hosts whose import lists are the emptiest; a waiting importer decides among equals."""

    name = "least-loaded"
    grace_s = 0.05

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Lowest load first."""
        return sorted(candidates, key=lambda candidate: (candidate.load, not candidate.waiting.total))

    def assign(self, wanted: Counts, candidates: Sequence[Candidate]) -> list[Share]:
        """To each as much as makes their loads equal; the rest, in order, to who has room."""
        ordered, deal = self.order(candidates), Deal(wanted, candidates)
        level = bisect_left(
            range(FULL), wanted.total, key=lambda load: sum(_up_to(one, load) for one in candidates)
        )
        for candidate in ordered:
            deal.give(candidate, _up_to(candidate, level))
        for candidate in ordered:
            deal.give(candidate, sum(deal.left))
        return deal.shares()


def _up_to(candidate: Candidate, load: int) -> int:
    """How many sockets bring a host to that ``load``. Its lists are as long as its room and load tell."""
    free = FULL - candidate.load
    return -(-candidate.rooms.total * max(0, load - candidate.load) // free) if free else 0


class Weighted(Policy):
    """In proportion to the hosts' weights, over all batches of this daemon's life.

    Each host has a credit: it earns its share of all sockets moved while it was a candidate, and
    pays for what it got; who has the most credit goes first. Weight 0 gets only what no one
    else has room for.
    """

    name = "weighted"
    grace_s = 0.05

    def __init__(self) -> None:
        self._credit: dict[HostId, float] = {}

    def order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Most credit first, then the heaviest."""
        return sorted(
            candidates, key=lambda one: (one.weight == 0, -self._credit.get(one.host, 0.0), -one.weight)
        )

    def choose(self, wanted: Counts, candidates: Sequence[Candidate]) -> HostId:
        """Who has the most credit then; it pays for all of it."""
        if not self._earn(wanted, candidates):
            return super().choose(wanted, candidates)
        chosen = super().choose(wanted, candidates)
        self._credit[chosen] -= wanted.total
        return chosen

    def assign(self, wanted: Counts, candidates: Sequence[Candidate]) -> list[Share]:
        """Shares by earned credit, rounded down; what is left goes to whom has the most credit then."""
        if not self._earn(wanted, candidates):
            return super().assign(wanted, candidates)
        deal = Deal(wanted, candidates)
        for capped in (True, False):
            for candidate in self.order(candidates):
                most = int(self._credit[candidate.host] + 1e-9) if capped else sum(deal.left)
                self._credit[candidate.host] -= deal.give(candidate, most)
        bound = float(max(wanted.total, 1))  # a host that was full does not claim it all back later
        for candidate in candidates:
            self._credit[candidate.host] = max(-bound, min(bound, self._credit[candidate.host]))
        return deal.shares()

    def _earn(self, wanted: Counts, candidates: Sequence[Candidate]) -> bool:
        """Credit each candidate's share; False if nobody has a weight."""
        weights = sum(candidate.weight for candidate in candidates)
        for candidate in candidates if weights else ():
            earned = wanted.total * candidate.weight / weights
            self._credit[candidate.host] = self._credit.get(candidate.host, 0.0) + earned
        return bool(weights)


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FirstValid, LeastLoaded, Weighted)}
