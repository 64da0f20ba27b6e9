# SPDX-License-Identifier: MIT
"""What the exporter knows of a batch, and of its legs."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from sockmi.protocol import messages
from sockmi.protocol.actions import Outcome, Result
from sockmi.protocol.dividing import wanted
from sockmi.protocol.records import BatchId, ChunkId, HostId, Item, MigrationId, Place
from sockmi.protocol.tables import Leg as LegState
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

# What only follows from an earlier failure of the same migration.
_FOLLOWING = frozenset({Code.PEER_LOST, Code.ALREADY_MIGRATING, Code.NO_OFFER, Code.TIMEOUT})


@dataclass(slots=True)
class Leg:
    """The part of a batch that goes to one importer.

    ``misses``: freeze deadlines in succession that it has missed, the last at ``missed_at``. ``probe``: a
    page; until it is answered nothing is frozen, as nothing says that it would arrive in time.
    """

    host: HostId
    state: LegState = LegState.OPENING
    unreserved: deque[Item] = field(default_factory=deque)
    pages: dict[int, tuple[Item, ...]] = field(default_factory=dict)
    ready: deque[tuple[Item, Place]] = field(default_factory=deque)
    moving: set[ChunkId] = field(default_factory=set)
    misses: int = 0
    missed_at: float = float("-inf")
    probe: int | None = None

    @property
    def unplaced(self) -> list[Item]:
        """Items that the importer has given no place yet."""
        return [*self.unreserved, *(item for page in self.pages.values() for item in page)]

    @property
    def unfrozen(self) -> list[Item]:
        """Items whose freeze has not begun."""
        return [*self.unplaced, *(item for item, _unused in self.ready)]


@dataclass(slots=True)
class Batch:
    """One export: its items ask for importers until each has one.

    ``failures``: of hosts, for reasons that may pass. ``barred``: who has refused an item for good.
    ``alone``: whose chunk has missed its deadline. Which of them was too slow is not known.
    """

    id: BatchId
    modes: tuple[Mode, ...]
    deadline: float
    timeout_s: float
    target: HostId | None
    target_address: IPv4Address | IPv6Address | None = None
    left: int = 0  # items without an outcome
    pending: dict[MigrationId, Item] = field(default_factory=dict)  # without an importer
    reasons: dict[MigrationId, Refusal] = field(default_factory=dict)  # why they were sent back
    offers: dict[HostId, messages.Offer] = field(default_factory=dict)
    legs: dict[HostId, Leg] = field(default_factory=dict)
    failures: dict[HostId, int] = field(default_factory=dict)
    barred: defaultdict[MigrationId, set[HostId]] = field(default_factory=lambda: defaultdict(set))
    freezes: Counter[MigrationId] = field(default_factory=Counter)  # that failed, and may be repeated
    alone: set[MigrationId] = field(default_factory=set)
    next_page: int = 0  # numbers are never used again in a batch: they fence
    next_chunk: int = 0
    expired: Refusal | None = None
    follows: bool = False  # a listener's children: straight to the target, without REQUEST
    dry_run: bool = False  # ends with the offers

    def because(self, migration: MigrationId, reason: Refusal) -> Refusal:
        """Why a migration is refused in the end: the first reason that does not only follow from another."""
        known = self.reasons.get(migration)
        if known is None or (known.code in _FOLLOWING and reason.code not in _FOLLOWING):
            self.reasons[migration] = known = reason
        return known

    def refused(
        self, migrations: Iterable[MigrationId], reason: Refusal, importer: HostId | None = None
    ) -> list[Result]:
        """Results for migrations that are refused, each for its own reason."""
        return [
            Result(one, Outcome.REFUSED, importer, refusal=self.because(one, reason)) for one in migrations
        ]

    @property
    def moves_addresses(self) -> bool:
        """Whether takeover is all that the offers and the batch have in common."""
        common = [set(self.modes).intersection(offer.modes) for offer in self.offers.values()]
        return bool(common) and all(modes == {Mode.TAKEOVER} for modes in common)

    @property
    def satisfied(self) -> bool:
        """Whether the offers that are there take all that is pending."""
        rooms = map(sum, zip(*(offer.rooms for offer in self.offers.values()), strict=True))
        return all(room >= want for room, want in zip(rooms, wanted(self.pending.values()), strict=True))
