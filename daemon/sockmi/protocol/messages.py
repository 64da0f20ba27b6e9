# SPDX-License-Identifier: MIT
"""What hosts say to each other. Frozen, without behaviour; the bytes are codec.py's matter.

The sender is never in a message: the transport authenticates it and the shell passes it in
``events.Received``. Datagram messages fit in 1,200 bytes; the others need a stream.
"""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from sockmi.engine.base import Fidelity, Needs
from sockmi.frozen import frozen
from sockmi.protocol.records import (
    BatchId,
    ChunkId,
    ConnectionId,
    Counts,
    HostId,
    Item,
    MigrationId,
    Place,
)
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal


class Channel(StrEnum):
    """How a message travels."""

    DATAGRAM = "datagram"  # may be lost, repeated, reordered
    STREAM = "stream"  # in order, complete until the stream is lost


# --- negotiation ---------------------------------------------------------------------------


@frozen
class Request:
    """REQUEST, exporter to all (or to the target): who takes these sockets?

    ``needs`` are the maxima over the batch; ``size_bytes`` the sum of the expected images;
    ``modes`` the redirects that the exporter could use. With ``target`` or
    ``target_address`` only that host answers.
    """

    batch: BatchId
    counts: Counts
    needs: Needs
    size_bytes: int
    modes: tuple[Mode, ...]
    target: HostId | None = None
    target_address: IPv4Address | IPv6Address | None = None


@frozen
class Offer:
    """OFFER, importer to exporter: room for so many, kept for ``lease_ms``.

    ``waiting``: import requests of applications that are pending here. ``load``: per mille
    of this host's import lists in use. ``weight``: configured share, 0 is "only if nobody else".
    """

    batch: BatchId
    rooms: Counts
    waiting: Counts
    load: int
    weight: int
    modes: tuple[Mode, ...]
    lease_ms: int


@frozen
class Release:
    """RELEASE, exporter to all: hosts that are not in ``chosen`` drop what they keep for the
    batch, except what is already prepared. To one host, with ``chosen`` empty, at its end."""

    batch: BatchId
    chosen: tuple[HostId, ...] = ()


@frozen
class Reserve:
    """RESERVE (stream), exporter to importer: one page of the batch's items."""

    batch: BatchId
    page: int
    items: tuple[Item, ...]
    modes: tuple[Mode, ...]


@frozen
class Reserved:
    """RESERVED (stream), the answer: per item of the page a place or a refusal, in order."""

    batch: BatchId
    page: int
    places: tuple[Place | Refusal, ...]


# --- two-phase commit ----------------------------------------------------------------------


@frozen
class Ship:
    """SHIP (stream), exporter to importer: the frozen chunk, all in order of ``migrations``.

    ``places`` are those of RESERVED, said again: a reservation that has changed since is refused.
    """

    chunk: ChunkId
    migrations: tuple[MigrationId, ...]
    places: tuple[Place, ...]
    images: tuple[bytes, ...]


@frozen
class Prepared:
    """PREPARED (stream), the answer: per socket what the copy lacks, or why there is none."""

    chunk: ChunkId
    results: tuple[Fidelity | Refusal, ...]


@frozen
class Confirm:
    """CONFIRM, exporter to importer: these positions of the chunk are committed, the others
    undone. Repeated until ACTIVE; also the answer to QUERY."""

    chunk: ChunkId
    committed: tuple[int, ...]


@frozen
class Active:
    """ACTIVE, importer to exporter: CONFIRM has been carried out and is journalled.

    ``refused``: (position, code) of copies that could not be brought to life. ``listed``: positions of those
    that wait in an import list: their peers hear nothing until an application takes them.
    """

    chunk: ChunkId
    refused: tuple[tuple[int, Code], ...] = ()
    listed: tuple[int, ...] = ()


@frozen
class Abort:
    """ABORT, exporter to importer: the chunk was undone; also the answer to QUERY."""

    chunk: ChunkId


@frozen
class Query:
    """QUERY, importer to exporter: I am prepared; what became of the chunk?"""

    chunk: ChunkId


@frozen
class Undecided:
    """UNDECIDED, exporter to importer: ask again."""

    chunk: ChunkId


# --- redirects over hops -------------------------------------------------------------------


class Hop(NamedTuple):
    """A connection at one hop: what fences REROUTE, ENDED and AUDIT."""

    connection: ConnectionId
    hop: int


class Move(NamedTuple):
    """A connection went to ``holder`` at ``hop``."""

    connection: ConnectionId
    hop: int
    holder: HostId
    place: Place


class Verdict(StrEnum):
    """What the home did with a move."""

    DONE = "done"  # leads to that holder or to a later one: the waypoint may go
    GONE = "gone"  # the connection has ended: the waypoint may go
    REFUSED = "refused"  # the home cannot reach the holder: the waypoint must stay


@frozen
class Reroute:
    """REROUTE, former holder to home: lead these connections straight to their new holders."""

    moves: tuple[Move, ...]


@frozen
class Rerouted:
    """REROUTED, the answer; connections without a verdict are asked again."""

    verdicts: tuple[tuple[Hop, Verdict], ...]


@frozen
class Ended:
    """ENDED, holder to home and exporter: these connections have ended here."""

    hops: tuple[Hop, ...]


@frozen
class Collected:
    """COLLECTED, the answer: nothing leads there any more."""

    hops: tuple[Hop, ...]


@frozen
class Audit:
    """AUDIT, a host with routes to their holder, now and then: do you still have these?"""

    hops: tuple[Hop, ...]


@frozen
class Audited:
    """AUDITED, the answer: these I have not. Silence about a connection means it lives."""

    gone: tuple[Hop, ...]


Message: TypeAlias = (
    Request
    | Offer
    | Release
    | Reserve
    | Reserved
    | Ship
    | Prepared
    | Confirm
    | Active
    | Abort
    | Query
    | Undecided
    | Reroute
    | Rerouted
    | Ended
    | Collected
    | Audit
    | Audited
)

STREAM_ONLY: frozenset[type] = frozenset({Reserve, Reserved, Ship, Prepared})
