# SPDX-License-Identifier: MIT
"""What happens to a host: the inputs of ``Core.handle(event, now)``.

An action ``X`` that is answered is answered by exactly one ``XDone``, whatever happens
(unless the daemon dies). ``Started`` is the first event; others before it are ignored.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

from sockmi.engine.base import Fidelity
from sockmi.frozen import frozen
from sockmi.protocol.messages import Channel, Message
from sockmi.protocol.records import (
    BatchId,
    ChunkId,
    ConnectionId,
    Decision,
    Holding,
    HostId,
    Item,
    Notice,
    Place,
    PreparedChunk,
    Route,
)
from sockmi.redirect.base import Mode
from sockmi.refusal import Refusal


@frozen
class Started:
    """The daemon runs; what its journal holds, in any order. Empty on a new host."""

    decisions: tuple[Decision, ...] = ()
    routes: tuple[Route, ...] = ()
    notices: tuple[Notice, ...] = ()
    prepared: tuple[PreparedChunk, ...] = ()
    holdings: tuple[Holding, ...] = ()


@frozen
class Stop:
    """The daemon shall end: what is committed is finished, what is not is undone, nothing new
    is begun. ``actions.Quiet`` follows, at the latest after ``grace_s``."""

    grace_s: float = 5.0


@frozen
class StartExport:
    """Export these sockets; preflight is done and none is frozen.

    ``target``/``target_address``: an explicit importer, or None for any. ``modes``: redirects
    that may be used, in order of preference. ``timeout_s``: what has found no importer by
    then is refused (NO_OFFER); what is being moved then goes on. ``dry_run``: only ask who would
    take them: each is reported PLANNED or REFUSED, and nothing is reserved.
    """

    batch: BatchId
    items: tuple[Item, ...]
    modes: tuple[Mode, ...]
    timeout_s: float
    target: HostId | None = None
    target_address: IPv4Address | IPv6Address | None = None
    dry_run: bool = False


@frozen
class CancelExport:
    """Refuse (TIMEOUT) what of the batch is not yet committed."""

    batch: BatchId


@frozen
class ChildrenFound:
    """Connections from the queue of a listener that has been committed to ``host``: they
    follow it there without another negotiation. ``batch`` is a new id; each item's
    ``listener`` is the listener's migration id."""

    batch: BatchId
    host: HostId
    items: tuple[Item, ...]
    modes: tuple[Mode, ...]
    timeout_s: float


@frozen
class Received:
    """An authenticated message of ``source``, a member of the group (or this host itself: dropped)."""

    source: HostId
    message: Message
    channel: Channel


@frozen
class StreamOpened:
    """The stream that ``actions.OpenStream`` asked for is there (also if it already was)."""

    host: HostId


@frozen
class StreamLost:
    """The stream to or from ``host`` broke or could not be opened; what was sent may be lost."""

    host: HostId
    reason: str = ""


@frozen
class SendFailed:
    """A message that has no bytes (``why``): it was not sent, and would not be another time."""

    to: HostId
    message: Message
    why: str


@frozen
class FreezeDone:
    """Per migration of the chunk, in order: the image (socket frozen), or why not (it runs on)."""

    chunk: ChunkId
    results: tuple[bytes | Refusal, ...]


@frozen
class CommitDone:
    """Per route of ``actions.Commit``, in order: None if committed, else why it was undone."""

    chunk: ChunkId
    results: tuple[Refusal | None, ...]


@frozen
class ReserveDone:
    """Per item of ``actions.Reserve`` with this ``page``, in order."""

    batch: BatchId
    exporter: HostId
    page: int
    places: tuple[Place | Refusal, ...]


@frozen
class PrepareDone:
    """Per arrival of ``actions.Prepare``, in order; the spool and the journal have it."""

    chunk: ChunkId
    results: tuple[Fidelity | Refusal, ...]


@frozen
class ActivateDone:
    """Per holding of ``actions.Activate``, in order: None if live or in the import list.

    ``listed``: which of them (indices) are in the import list.
    """

    chunk: ChunkId
    results: tuple[Refusal | None, ...]
    listed: tuple[int, ...] = ()


@frozen
class RerouteDone:
    """Per route of ``actions.Reroute``, in order: (connection, hop) and None or why not."""

    results: tuple[tuple[ConnectionId, int, Refusal | None], ...]


@frozen
class CollectDone:
    """These (connection, hop) routes are gone, from the kernel and from the journal."""

    routes: tuple[tuple[ConnectionId, int], ...]


@frozen
class ConnectionsEnded:
    """Imported connections that exist on this host no more (closed, timed out, reset, owner
    gone). Connections that are not held here are ignored. After a restart the shell tells
    again what it finds ended among its holdings."""

    connections: tuple[ConnectionId, ...]


@frozen
class Forget:
    """An operator's word that ``host`` will never come back: nothing is sent to it any more.

    What waits for its COLLECTED, REROUTED or ACTIVE is taken as answered; the routes that
    lead to it are collected. Chunks that are prepared here and in doubt because of it stay in
    doubt: only the exporter's journal knows.
    """

    host: HostId


Event: TypeAlias = (
    Started
    | Stop
    | StartExport
    | CancelExport
    | ChildrenFound
    | Received
    | StreamOpened
    | StreamLost
    | SendFailed
    | FreezeDone
    | CommitDone
    | ReserveDone
    | PrepareDone
    | ActivateDone
    | RerouteDone
    | CollectDone
    | ConnectionsEnded
    | Forget
)
