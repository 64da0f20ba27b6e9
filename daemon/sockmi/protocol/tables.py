# SPDX-License-Identifier: MIT
"""Every state machine of the protocol, as literal tables.

Two rules. Whatever decides about a change of state stands here; the cores only name triggers.
And a transition that is not declared raises: it is a bug of ours, never of a peer (the cores
drop messages that do not fit the state before they get here). ``docs/protocol.md`` is drawn
from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class UndeclaredTransition(RuntimeError):
    """A trigger that its table does not allow in this state: the shell or a core is wrong."""


class Leg(StrEnum):
    """Exporter: the part of a batch that goes to one importer."""

    OPENING = "opening"  # the stream is being opened
    OPEN = "open"  # reserving, freezing, shipping
    CLOSED = "closed"  # nothing is left, or the importer was lost


class Export(StrEnum):
    """Exporter: one chunk."""

    FREEZING = "freezing"  # the shell freezes
    UNFREEZING = "unfreezing"  # given up, but the shell is still freezing
    SHIPPED = "shipped"  # waits for PREPARED, under the freeze deadline
    COMMITTING = "committing"  # the shell commits: nothing can stop it
    CONFIRMING = "confirming"  # committed; CONFIRM is repeated until ACTIVE
    ABORTED = "aborted"
    DONE = "done"


class Lease(StrEnum):
    """Importer: what is kept for one exporter's batch."""

    OFFERED = "offered"  # room
    RESERVED = "reserved"  # room and places
    GONE = "gone"


class Import(StrEnum):
    """Importer: one chunk."""

    PREPARING = "preparing"  # the shell restores and spools
    DOOMED = "doomed"  # aborted, but the shell is still preparing
    PREPARED = "prepared"  # in doubt: QUERY is repeated until COMMIT or ABORT is known
    ACTIVATING = "activating"  # the shell brings it to life
    DISCARDED = "discarded"
    ACTIVE = "active"


class Routing(StrEnum):
    """A host that leads a connection's packets away (its home, or a waypoint)."""

    ROUTED = "routed"
    REROUTING = "rerouting"  # the shell replaces the holder
    RETURNING = "returning"  # the connection is being activated here
    COLLECTING = "collecting"  # the shell removes the redirect
    GONE = "gone"


LEG: Mapping[Leg, Mapping[str, Leg]] = {
    Leg.OPENING: {"stream opened": Leg.OPEN, "lost": Leg.CLOSED},
    Leg.OPEN: {"nothing left": Leg.CLOSED, "lost": Leg.CLOSED},
    Leg.CLOSED: {},
}

EXPORT: Mapping[Export, Mapping[str, Export]] = {
    Export.FREEZING: {
        "frozen": Export.SHIPPED,
        "none frozen": Export.ABORTED,
        "abort": Export.UNFREEZING,
    },
    Export.UNFREEZING: {"frozen": Export.ABORTED, "none frozen": Export.ABORTED},
    Export.SHIPPED: {
        "PREPARED": Export.COMMITTING,
        "none prepared": Export.ABORTED,
        "abort": Export.ABORTED,
    },
    Export.COMMITTING: {"committed": Export.CONFIRMING, "none committed": Export.ABORTED},
    Export.CONFIRMING: {"ACTIVE": Export.DONE, "importer forgotten": Export.DONE},
    Export.ABORTED: {},
    Export.DONE: {},
}

LEASE: Mapping[Lease, Mapping[str, Lease]] = {
    Lease.OFFERED: {
        "REQUEST": Lease.OFFERED,
        "RESERVE": Lease.RESERVED,
        "RELEASE": Lease.GONE,
        "expired": Lease.GONE,
    },
    Lease.RESERVED: {
        "REQUEST": Lease.RESERVED,
        "RESERVE": Lease.RESERVED,
        "RELEASE": Lease.GONE,
        "expired": Lease.GONE,
    },
    Lease.GONE: {},
}

IMPORT: Mapping[Import, Mapping[str, Import]] = {
    Import.PREPARING: {
        "prepared": Import.PREPARED,
        "none prepared": Import.DISCARDED,
        "ABORT": Import.DOOMED,
    },
    Import.DOOMED: {"prepared": Import.DISCARDED, "none prepared": Import.DISCARDED},
    Import.PREPARED: {"CONFIRM": Import.ACTIVATING, "ABORT": Import.DISCARDED},
    Import.ACTIVATING: {"activated": Import.ACTIVE},
    Import.DISCARDED: {},
    Import.ACTIVE: {},
}

ROUTING: Mapping[Routing, Mapping[str, Routing]] = {
    Routing.ROUTED: {
        "REROUTE": Routing.REROUTING,
        "CONFIRM of its return": Routing.RETURNING,
        "ended": Routing.COLLECTING,
    },
    Routing.REROUTING: {
        "rerouted": Routing.ROUTED,
        "CONFIRM of its return": Routing.RETURNING,
    },
    Routing.RETURNING: {"activated": Routing.GONE},
    Routing.COLLECTING: {"collected": Routing.GONE, "CONFIRM of its return": Routing.RETURNING},
    Routing.GONE: {},
}

TABLES: Mapping[str, Mapping[StrEnum, Mapping[str, StrEnum]]] = {
    "exporter: leg of a batch": LEG,  # type: ignore[dict-item]
    "exporter: chunk": EXPORT,  # type: ignore[dict-item]
    "importer: lease": LEASE,  # type: ignore[dict-item]
    "importer: chunk": IMPORT,  # type: ignore[dict-item]
    "home and waypoint: route": ROUTING,  # type: ignore[dict-item]
}

S = TypeVar("S", bound=StrEnum)


def step(table: Mapping[S, Mapping[str, S]], state: S, trigger: str) -> S:
    """The state after ``trigger``; raise UndeclaredTransition if the table has none."""
    try:
        return table[state][trigger]
    except KeyError:
        raise UndeclaredTransition(f"{type(state).__name__} {state}: {trigger!r} is not declared") from None
