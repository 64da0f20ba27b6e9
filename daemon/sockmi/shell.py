# SPDX-License-Identifier: MIT
"""What the halves of the daemon's I/O shell share: the host's parts, and small conversions."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar
from uuid import UUID

from sockmi.addresses import FourTuple
from sockmi.config import Config
from sockmi.engine.base import Engine
from sockmi.journal import Change, Journal
from sockmi.metrics import Metrics
from sockmi.movelog import MoveLog
from sockmi.peers import Peers
from sockmi.protocol.actions import Action
from sockmi.protocol.events import Event
from sockmi.protocol.records import Holding, HostId, Route
from sockmi.redirect.base import Holds, Inbound, Mode, Outbound, Redirect
from sockmi.redirect.held import HeldPackets
from sockmi.redirect.ways import Address
from sockmi.refusal import Code, Refusal
from sockmi.spool import Spool

T = TypeVar("T")

_log = logging.getLogger(__name__)

_UNWRITTEN_MAX = 10_000

_TRANSLATING = frozenset({Mode.NAT, Mode.IPTABLES})


class Loop(Protocol):
    """The part of an event loop that the shell uses."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Any:
        """As asyncio's."""

    def run_in_executor(self, executor: None, func: Callable[..., object], *args: Any) -> Any:
        """As asyncio's."""


@dataclass(slots=True)
class Shell:
    """This host's parts.

    ``dispatch`` feeds an event to the protocol core; its actions follow in order. ``send_held`` ships
    packets that a hold has kept to the importer, with the message that follows at once. ``addresses_of`` a
    host of the group: those that are known.
    """

    config: Config
    host_id: HostId
    host_name: str
    loop: Loop
    engine: Engine
    holds: Holds
    held: HeldPackets
    redirects: dict[Mode, Redirect]
    peers: Peers
    journal: Journal
    spool: Spool
    metrics: Metrics
    dispatch: Callable[[Event], None]
    send_held: Callable[[HostId, bytes], bool]
    name_of: Callable[[HostId], str]
    addresses_of: Callable[[HostId], Collection[Address]]
    unwritten: deque[tuple[UUID, str, dict[str, Any]]] = field(
        default_factory=lambda: deque(maxlen=_UNWRITTEN_MAX)
    )
    moves: MoveLog = field(default_factory=MoveLog)

    def note(self, change: Change) -> None:
        """Journal what a restart would find out by itself: a full disk must not end the daemon for it."""
        try:
            self.journal.write(change)
        except Exception:
            _log.exception("the journal cannot be written; outcomes are kept, the next start does the rest")
            # Not the records: newer ones may be written before.
            self.unwritten.extend(change.audit)

    def catch_up(self) -> None:
        """Journal the outcomes that could not be written; raises as the journal does."""
        if self.unwritten:
            self.journal.write(Change(audit=list(self.unwritten)))
            self.unwritten.clear()


def outbound(route: Route) -> Outbound | None:
    """What a route installs in the kernel; None if nothing is redirected."""
    if route.place.mode is None or route.place.endpoint is None or not route.local or not route.remote:
        return None
    return Outbound(FourTuple(route.local, route.remote), route.place.endpoint)


def living(holding: Holding) -> FourTuple | None:
    """A holding's connection as it lives on this host; None if it is none."""
    if holding.remote is None:
        return None
    local = holding.place.endpoint if holding.place.mode in _TRANSLATING else holding.local
    return FourTuple(local, holding.remote) if local else None


def inbound(holding: Holding) -> Inbound | None:
    """What a holding installs in this kernel; None if it is no connection."""
    connection = living(holding)
    if connection is None or holding.place.mode is None:
        return None
    return Inbound(connection, holding.origin or connection.local)


def by_mode(pairs: Iterable[tuple[Mode | None, T]]) -> dict[Mode, list[T]]:
    """Group by redirect mode, leaving out what has none."""
    groups: dict[Mode, list[T]] = {}
    for mode, one in pairs:
        if mode is not None:
            groups.setdefault(mode, []).append(one)
    return groups


def audit(change: Change, migration: bytes, direction: str, **news: Any) -> None:
    """Add news of a migration to a transaction."""
    change.audit.append((UUID(bytes=migration), direction, news))


def why(refusal: Refusal) -> dict[str, str]:
    """A refusal as a migration record has it."""
    from sockmi.api import ERRNO

    return {"code": refusal.code, "message": refusal.message, "errno": ERRNO[refusal.code]}


@functools.cache
def _record_defaults() -> dict[str, Any]:
    from sockmi.api import FidelityReport, MigrationRecord

    fields = MigrationRecord.model_fields.items()
    defaults = {name: one.default for name, one in fields if not one.is_required()}
    return defaults | {"fidelity": FidelityReport().model_dump()}


def whole_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record with every field of ``api.MigrationRecord``, for responses that are not validated."""
    return _record_defaults() | record


def now_text() -> str:
    """Now, as migration records have it."""
    return _time_text(time.time_ns() // 1_000_000)


@functools.lru_cache(maxsize=1)
def _time_text(milliseconds: int) -> str:
    """A chunk asks for it hundreds of times in one of them."""
    return time_text(datetime.fromtimestamp(milliseconds / 1000, UTC))


def time_text(moment: datetime) -> str:
    """A time as migration records have it: ISO 8601, UTC (``Z``), to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def microseconds_since(start: float) -> int:
    """Whole microseconds since ``start`` (time.monotonic())."""
    return round((time.monotonic() - start) * 1e6)


def unwritable(error: Exception) -> Refusal:
    """What is not done because it cannot be journalled."""
    return Refusal(Code.INTERNAL, f"The journal cannot be written ({error}); see sockmi doctor.")


def unknown(actions: Action) -> AssertionError:
    """For an action that nobody carries out."""
    return AssertionError(f"no part of the shell carries out {type(actions).__name__}")
