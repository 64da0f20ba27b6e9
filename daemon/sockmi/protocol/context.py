# SPDX-License-Identifier: MIT
"""What the parts of a core share: settings, capacity, timers, and the list of actions."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from sockmi.frozen import frozen
from sockmi.policy import FirstValid, Policy
from sockmi.protocol.actions import Action, Ignored, Send
from sockmi.protocol.messages import Channel, Message
from sockmi.protocol.records import CHUNK_ITEMS_MAX, PAGE_ITEMS_MAX, Counts, HostId
from sockmi.redirect.base import Mode


@frozen
class Settings:
    """Times and sizes; the defaults suit one LAN.

    ``chunk_items``/``chunk_bytes``: how many sockets, and image bytes (at least one socket),
    are frozen together. ``pipeline_depth``: chunks of one leg that may be frozen at once.
    ``freeze_deadline_s``: from Freeze to PREPARED; then the chunk is undone. ``offer_grace_s``:
    how long to collect offers before choosing, unless no better one would come (0: take the first).
    ``freezes_max``: how often a freeze is tried that fails for a passing reason. Retries
    start at ``retry_s`` and double up to ``retry_max_s``.
    """

    request_interval_s: float = 0.25
    offer_grace_s: float = 0.0
    lease_s: float = 5.0
    stream_timeout_s: float = 3.0
    reserve_timeout_s: float = 3.0
    freeze_deadline_s: float = 1.0
    retry_s: float = 0.2
    retry_max_s: float = 15.0
    audit_interval_s: float = 5.0
    chunk_items: int = 32
    chunk_bytes: int = 4 << 20
    pipeline_depth: int = 2
    page_items: int = 128
    pages_in_flight: int = 4
    leg_failures_max: int = 2
    freezes_max: int = 3

    def __post_init__(self) -> None:
        for name in ("request_interval_s", "lease_s", "stream_timeout_s", "reserve_timeout_s",
                     "freeze_deadline_s", "retry_s", "audit_interval_s"):  # fmt: skip
            if not 0 < getattr(self, name) <= float("inf"):
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)!r}")
        if self.offer_grace_s < 0 or self.retry_max_s < self.retry_s:
            raise ValueError("offer_grace_s must be at least 0, retry_max_s at least retry_s")
        for name, most in (("chunk_items", CHUNK_ITEMS_MAX), ("page_items", PAGE_ITEMS_MAX),
                           ("pipeline_depth", 8), ("pages_in_flight", 64)):  # fmt: skip
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 1..{most}, not {getattr(self, name)!r}")
        if min(self.chunk_bytes, self.leg_failures_max, self.freezes_max) < 1:
            raise ValueError("chunk_bytes, leg_failures_max and freezes_max must be at least 1")


@dataclass(slots=True)
class Capacity:
    """What this host can take; the shell keeps it up to date, the core only reads it.

    ``rooms``: free places in the import lists (maximum less what waits there or is prepared;
    what is merely offered or reserved the core subtracts itself). ``waiting``: pending import
    requests. ``load``: per mille. ``modes``: redirects this host can be the importer of.
    ``addresses``: its own. ``members``: the other hosts that are heard now.
    """

    rooms: Counts = field(default_factory=Counts)
    waiting: Counts = field(default_factory=Counts)
    load: int = 0
    weight: int = 1
    modes: tuple[Mode, ...] = ()
    image_bytes_max: int = 1 << 30
    addresses: frozenset[IPv4Address | IPv6Address] = frozenset()
    members: frozenset[HostId] = frozenset()


class Timers:
    """Deadlines by key; setting a key again replaces it. O(log n)."""

    __slots__ = ("_due", "_heap", "_serial")

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._serial = 0

    def set(self, key: Hashable, when: float) -> None:
        """Ring ``key`` at ``when``."""
        self._serial += 1
        self._due[key] = (when, self._serial)
        heapq.heappush(self._heap, (when, self._serial, key))

    def cancel(self, key: Hashable) -> None:
        """Do not ring ``key``; no matter if it is not set."""
        self._due.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._due

    def next(self) -> float | None:
        """The earliest deadline."""
        heap = self._heap
        while heap and self._due.get(heap[0][2]) != heap[0][:2]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop(self, now: float) -> Hashable | None:
        """A key that is due at ``now``, which is then no longer set; None if there is none."""
        when = self.next()
        if when is None or when > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key


class Context:
    """See the module docstring. ``now`` is the time of the event that is being handled."""

    __slots__ = ("capacity", "host", "now", "out", "policy", "settings", "stopping", "timers")

    def __init__(self, host: HostId, settings: Settings, capacity: Capacity, policy: Policy | None) -> None:
        self.host = host
        self.settings = settings
        self.capacity = capacity
        self.policy: Policy = policy or FirstValid()
        self.timers = Timers()
        self.out: list[Action] = []
        self.now = 0.0
        self.stopping = False

    def datagram(self, to: HostId | None, message: Message) -> None:
        """Send best effort; ``to`` None is the whole group."""
        self.out.append(Send(to, message, Channel.DATAGRAM))

    def stream(self, to: HostId, message: Message) -> None:
        """Send in order."""
        self.out.append(Send(to, message, Channel.STREAM))

    def ignore(self, source: HostId, message: Message, why: str) -> None:
        """Drop a message, visibly."""
        self.out.append(Ignored(source, message, why))

    def backoff(self, attempt: int) -> float:
        """Seconds until retry number ``attempt`` (from 0)."""
        return min(self.settings.retry_s * (1 << min(attempt, 20)), self.settings.retry_max_s)
