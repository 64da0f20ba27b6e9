# SPDX-License-Identifier: MIT
"""The words that messages, events and actions share: items, places, routes, holdings.

``Decision``, ``Route``, ``Notice``, ``PreparedChunk`` and ``Holding`` are the durable records:
the shell writes them to its journal inside the action that makes them and gives them back
in ``events.Started`` after a restart. Everything else is volatile.
"""

# Values that are `frozen` are dataclasses, which pylint does not know.
# pylint: disable=invalid-field-call
from __future__ import annotations

from dataclasses import field
from typing import NamedTuple, TypeAlias

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Kind, Needs
from sockmi.frozen import frozen
from sockmi.redirect.base import Mode

HostId: TypeAlias = bytes
"""16 random bytes, made once per host and kept."""
BatchId: TypeAlias = bytes
"""16 random bytes, made by the shell for each StartExport."""
MigrationId: TypeAlias = bytes
"""16 bytes (UUID): the move of one socket over one hop."""
ConnectionId: TypeAlias = bytes
"""16 bytes: a connection over all its hops; the migration id of its first hop."""

ID_BYTES = 16
CHUNK_ITEMS_MAX = 256
PAGE_ITEMS_MAX = 256
IMAGE_BYTES_MAX = 64 << 20
"""The largest image, and all images of one SHIP together. The image's format has the same limit."""


class ChunkId(NamedTuple):
    """Unique for ever: batch ids are random, numbers are never used twice in a batch."""

    batch: BatchId
    number: int

    def __str__(self) -> str:
        return f"{self.batch.hex()}/{self.number}"


class Counts(NamedTuple):
    """Sockets per import list."""

    bound: int = 0
    listening: int = 0
    connected: int = 0

    def of(self, kind: Kind) -> int:
        """The count for one list."""
        return self[_KIND_INDEX[kind]]

    @property
    def total(self) -> int:
        """All lists together."""
        return self[0] + self[1] + self[2]


_KIND_INDEX = {Kind.BOUND: 0, Kind.LISTENING: 1, Kind.CONNECTED: 2}


@frozen
class Item:
    """One socket that is to move.

    ``local``/``remote``: the socket as it lives on the exporter; ``origin``: the local end
    that the peer knows (equal to ``local`` at the first hop). ``hop`` is the number that the
    connection has *after* this move (1 for the first). ``home`` is the host that the peer
    sends to (the exporter itself at hop 1). ``listener``: migration id of the listener whose
    queue this connection was in. ``size_bytes``: expected image size. Two never travel: ``queued``, how
    many connections in a listener's queue need room with it (asked by dry runs only), and ``handle``, which
    is the shell's own.
    """

    migration: MigrationId
    connection: ConnectionId
    kind: Kind
    state: str
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None
    hop: int
    home: HostId
    needs: Needs = field(default_factory=Needs)
    size_bytes: int = 0
    listener: MigrationId | None = None
    queued: int = field(default=0, compare=False)
    handle: object = field(default=None, compare=False, repr=False)

    @property
    def tuple(self) -> FourTuple | None:
        """Local and remote endpoint of a connected socket, else None."""
        if self.kind is not Kind.CONNECTED or self.local is None or self.remote is None:
            return None
        return FourTuple(self.local, self.remote)


_STATES = {
    Kind.BOUND: frozenset({"CLOSED"}),
    Kind.LISTENING: frozenset({"LISTEN"}),
    Kind.CONNECTED: frozenset(
        {"SYN-SENT", "ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "CLOSING", "LAST-ACK"}
    ),
}


def contradiction(item: Item) -> str | None:
    """What of an item contradicts the rest of it: no socket is like that, so none is looked for."""
    local, remote, origin = item.local, item.remote, item.origin
    if item.state not in _STATES[item.kind]:
        return f"a {item.kind} socket in state {item.state}"
    if (local is None) != (origin is None):
        return "one of local and origin end without the other"
    if item.kind is Kind.CONNECTED:
        if local is None or remote is None or origin is None:
            return "a connection without two ends"
        if not local.version == remote.version == origin.version:
            return "a connection between IP versions"
        return None if local.port and remote.port and origin.port else "a connection with port 0"
    if remote is not None:
        return f"a {item.kind} socket with a remote end"
    if item.kind is Kind.LISTENING and (local is None or not local.port):
        return "a listening socket without a port"
    return None


@frozen
class Place:
    """Where the importer will have the copy.

    ``endpoint`` is what ``redirect.Outbound.importer`` takes: the copy's own endpoint for
    translating modes, the next hop (port: the original's) for address-preserving ones; None
    (with ``mode`` None) if nothing is to be redirected (bound, unconnected).
    """

    endpoint: Endpoint | None = None
    mode: Mode | None = None


@frozen
class Route:
    """Durable, on each host that leads a connection's packets away.

    ``holder`` is the host they are led to, at ``hop``. ``upstream`` is the host from which
    the connection had come here (None if this is its home). ``pinned``: the home could not
    reach a later holder, so this route stays until the connection ends.
    """

    connection: ConnectionId
    migration: MigrationId
    kind: Kind
    hop: int
    home: HostId
    holder: HostId
    place: Place
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None
    upstream: HostId | None = None
    pinned: bool = False

    @property
    def durable(self) -> bool:
        """False for a bound or unconnected socket: nothing leads there, nothing is journalled."""
        return self.kind is not Kind.BOUND


@frozen
class Notice:
    """Durable, on an exporter that is not the connection's home: the home still has to be
    told that at ``hop`` the connection went to ``holder``."""

    connection: ConnectionId
    hop: int
    home: HostId
    holder: HostId
    place: Place


@frozen
class Decision:
    """Durable, on the exporter, from COMMIT until the importer's ACTIVE.

    ``migrations`` are all of the chunk in the order of SHIP; ``committed`` the positions of
    those that moved (the others were undone).
    """

    chunk: ChunkId
    importer: HostId
    migrations: tuple[MigrationId, ...]
    committed: tuple[int, ...]


@frozen
class Arrival:
    """One reserved socket on the importer: what RESERVE said and what we answered."""

    item: Item
    place: Place


@frozen
class PreparedChunk:
    """Durable, on the importer, from PREPARED until the decision is carried out.

    ``arrivals``: all of the chunk in the order of SHIP; ``prepared``: positions of those
    that were restored (the others were refused).
    """

    chunk: ChunkId
    exporter: HostId
    arrivals: tuple[Arrival, ...]
    prepared: tuple[int, ...]


@frozen
class Holding:
    """Durable, on the importer, from ACTIVE until the connection has ended and every host
    that might still redirect it has collected, or until it is exported further."""

    connection: ConnectionId
    migration: MigrationId
    kind: Kind
    hop: int
    home: HostId
    exporter: HostId
    place: Place
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None

    @property
    def durable(self) -> bool:
        """False for a bound or unconnected socket: it is a new socket here, not a hop, and no
        holding is journalled."""
        return self.kind is not Kind.BOUND
