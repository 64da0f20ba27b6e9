# SPDX-License-Identifier: MIT
"""What the shell shall do: the outputs of ``Core.handle`` and ``Core.handle_timer``.

Carry out a list in order. Actions that touch redirects, holds or the journal (``Commit``,
``Thaw``, ``Prepare``, ``Activate``, ``Discard``, ``Reroute``, ``Collect``, ...) take effect in
the order in which they were given, over all lists. An action that names an answer gets exactly one.
Records in an action are journalled by it, in one transaction, before its answer.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity
from sockmi.frozen import frozen
from sockmi.protocol.messages import Channel, Message
from sockmi.protocol.records import (
    Arrival,
    BatchId,
    ChunkId,
    ConnectionId,
    Decision,
    Holding,
    HostId,
    Item,
    MigrationId,
    Notice,
    Place,
    Route,
)
from sockmi.redirect.base import Mode
from sockmi.refusal import Refusal

# --- both roles ----------------------------------------------------------------------------


@frozen
class Send:
    """Send ``message`` to a host, or to the whole group (``to`` None).

    STREAM: on the stream with that host, whoever opened it; if there is none, drop it and
    report ``events.StreamLost``. DATAGRAM: best effort.
    """

    to: HostId | None
    message: Message
    channel: Channel


@frozen
class OpenStream:
    """Answer: ``events.StreamOpened`` or ``events.StreamLost``. Streams stay open."""

    host: HostId


class Outcome(StrEnum):
    """How far a migration has come."""

    COMMITTED = "committed"  # on its way, only forward from here
    ACTIVE = "active"  # the importer has it
    REFUSED = "refused"  # it goes on where it was
    PLANNED = "planned"  # a dry run: the importer has room for it
    LOST = "lost"  # committed, but the importer could not bring it to life


@frozen
class Result:
    """What became of one migration; ``fidelity`` is the importer's part of the report.

    ``listed``: active, and in an import list.
    """

    migration: MigrationId
    outcome: Outcome
    importer: HostId | None = None
    place: Place | None = None
    refusal: Refusal | None = None
    fidelity: Fidelity | None = None
    listed: bool = False


@frozen
class Report:
    """News of a batch, for whoever asked for it and for the audit journal."""

    batch: BatchId
    results: tuple[Result, ...]


@frozen
class BatchDone:
    """Every migration of the batch is ACTIVE, REFUSED, PLANNED or LOST; nothing of it is left."""

    batch: BatchId


@frozen
class Ignored:
    """A message that does not fit, dropped; for logs and metrics."""

    source: HostId
    message: Message
    why: str


@frozen
class Quiet:
    """After ``events.Stop``: nothing volatile is under way, the daemon may exit. What is still in
    doubt is in the journal."""


# --- exporter ------------------------------------------------------------------------------


@frozen
class Freeze:
    """Stop the owners, hold the packets, capture. Answer: ``events.FreezeDone``.

    The kernel's own hold must outlast ``deadline_s`` plus the time that ``Commit`` may take.
    """

    chunk: ChunkId
    items: tuple[Item, ...]
    places: tuple[Place, ...]
    deadline_s: float


@frozen
class Thaw:
    """The inverse of ``Freeze`` for these (never committed): unhold, resume. No answer.

    Always given for each frozen item that does not get into ``Commit``.
    """

    chunk: ChunkId
    migrations: tuple[MigrationId, ...]


@frozen
class Commit:
    """The point of no return. Answer: ``events.CommitDone``.

    In order: redirects of ``routes`` in place (mutes the original); each original compared
    once more with its image, and what differs or has lost its hold taken back and thawed;
    journal, in one transaction: ``decision`` (``committed`` reduced to those that passed), their
    routes and notices, and the holdings of these connections deleted; then the originals closed
    without a packet. If the journal fails, take all back, thaw, and refuse all. Found in the
    journal after a restart: close the originals that are left. Routes that are not ``durable``
    (bound sockets) stand here only to name their migration: no redirect, no journal entry.
    """

    decision: Decision
    routes: tuple[Route, ...]
    notices: tuple[Notice, ...]


@frozen
class LetGo:
    """CONFIRM is on its way: keep the books of what ``Commit`` has given away, and let the owners run.

    Apart from ``Commit``, as the importer waits for CONFIRM and for none of this. No answer.
    """

    chunk: ChunkId


@frozen
class ForgetDecision:
    """The importer is ACTIVE: delete the decision from the journal. No answer."""

    chunk: ChunkId


# --- importer ------------------------------------------------------------------------------


@frozen
class Reserve:
    """Choose the place of each copy, keep its port. Answer: ``events.ReserveDone``.

    ``page`` is the core's own number for this call, unique while the daemon runs. ``former``, per
    item: where this host had the connection when it led it away, or None. The copy has to be
    there again, whatever the mode: other hosts may still lead packets to that endpoint (and
    if this is the home, the peer itself does).
    """

    batch: BatchId
    exporter: HostId
    page: int
    items: tuple[Item, ...]
    modes: tuple[Mode, ...]
    former: tuple[Endpoint | None, ...]


@frozen
class Unreserve:
    """The inverse of ``Reserve``: these will not come. No answer.

    It takes effect after every earlier ``Reserve`` and before every later one.
    """

    migrations: tuple[MigrationId, ...]


@frozen
class Prepare:
    """Validate, hold the tuples, restore dormant; spool the images and journal a
    ``PreparedChunk``, if at least one went well. Answer: ``events.PrepareDone``.

    Reservations of refused ones are given up by this action. Connections that this host itself still
    leads away come back: while the copy is held its redirect is out of force (``take_back`` in the
    kernel; the journal keeps the route), or packets would go round between the two hosts from COMMIT
    until ``Activate``. After a restart the same follows from the journal: a route whose connection is
    prepared is not in force.
    """

    chunk: ChunkId
    exporter: HostId
    arrivals: tuple[Arrival, ...]
    images: tuple[bytes, ...]


@frozen
class Activate:
    """Bring to life, or put into the import list. Answer: ``events.ActivateDone``.

    In order: routes of this host for ``returning`` connections taken back, and whatever late-packet
    drop it still has for the tuples of ``holdings``; journal, in one
    transaction: the chunk's PreparedChunk deleted, ``holdings`` written, those routes deleted;
    translation in place, hold removed, live. Found in the journal after a restart: finish. If
    it fails for one, delete its holding again and say so in the answer. Holdings that are not
    ``durable`` (bound sockets) are not journalled.
    """

    chunk: ChunkId
    holdings: tuple[Holding, ...]
    returning: tuple[ConnectionId, ...] = ()


@frozen
class Discard:
    """The inverse of ``Prepare`` for these: closed without a packet, unheld, image and spool
    entry deleted, reservation given up; if it is all that was left of the chunk, its PreparedChunk
    deleted. Idempotent: what is already gone is skipped. No answer. Routes that ``Prepare`` had put
    out of force are in force again before the copy goes (``send_away``)."""

    chunk: ChunkId
    migrations: tuple[MigrationId, ...]


# --- redirects over hops -------------------------------------------------------------------


@frozen
class Reroute:
    """Home: lead these connections to their new holders; journal the routes. Only existing
    entries are replaced. Answer: ``events.RerouteDone``."""

    routes: tuple[Route, ...]


@frozen
class SaveRoutes:
    """Journal these routes (``pinned`` changed); the kernel's entries stay. No answer."""

    routes: tuple[Route, ...]


@frozen
class Collect:
    """Stop diverting (late packets are dropped silently for a while), delete from the journal.
    Only the route of exactly this hop. Answer: ``events.CollectDone``."""

    routes: tuple[Route, ...]


@frozen
class ForgetNotices:
    """The home has answered: delete the notices (connection, hop) from the journal. No answer."""

    notices: tuple[tuple[ConnectionId, int], ...]


@frozen
class ForgetHoldings:
    """Ended and collected everywhere: remove this host's translation of these connections and
    delete the holdings (connection, hop) from the journal. No answer."""

    holdings: tuple[tuple[ConnectionId, int], ...]


Action: TypeAlias = (
    Send
    | OpenStream
    | Report
    | BatchDone
    | Ignored
    | Quiet
    | Freeze
    | Thaw
    | Commit
    | LetGo
    | ForgetDecision
    | Reserve
    | Unreserve
    | Prepare
    | Activate
    | Discard
    | Reroute
    | SaveRoutes
    | Collect
    | ForgetNotices
    | ForgetHoldings
)
