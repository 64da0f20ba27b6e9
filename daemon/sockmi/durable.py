# SPDX-License-Identifier: MIT
"""The protocol's durable records as JSON, for the journal: what is written here is read here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from sockmi.addresses import Endpoint, FourTuple, text_of
from sockmi.engine.base import BindFlag, Kind, Needs
from sockmi.frozen import frozen
from sockmi.journal import Change, Journal, Record, plain
from sockmi.protocol.events import Started
from sockmi.protocol.records import (
    Arrival,
    ChunkId,
    ConnectionId,
    Decision,
    Holding,
    Item,
    MigrationId,
    Notice,
    Place,
    PreparedChunk,
    Route,
)
from sockmi.redirect.base import Mode


@frozen
class Original:
    """A socket that a decision closes. ``cookie``: its SO_COOKIE, which no other socket of this boot has.

    ``holding``: what the decision takes away, to be put back if it is undone. ``listed``: by which migration
    it had come, if it was an image in an import list.
    """

    migration: MigrationId
    connection: ConnectionId
    hop: int
    kind: Kind
    inode: int
    cookie: int
    local: Endpoint | None
    remote: Endpoint | None
    holding: Holding | None
    listed: MigrationId | None = None

    @property
    def tuple(self) -> FourTuple | None:
        """The connection as it lives here, if it is one."""
        return FourTuple(self.local, self.remote) if self.local and self.remote else None


@frozen
class Handed:
    """A socket without a connection that an application is given; see `Original` for what tells it apart."""

    kind: Kind
    inode: int
    cookie: int


Durable = Decision | Route | Notice | PreparedChunk | Holding


def keep(change: Change, records: Iterable[Durable]) -> None:
    """Add records to a transaction."""
    for record in records:
        kind, name = place_of(record)
        change.keep.append((kind, name, _WRITERS[kind](record)))


def drop(change: Change, records: Iterable[Durable]) -> None:
    """The inverse of ``keep``."""
    change.drop.extend(place_of(record) for record in records)


def place_of(record: Durable) -> tuple[Record, str]:
    """Under which kind and name the journal keeps a record."""
    if isinstance(record, Decision):
        return Record.DECISION, str(record.chunk)
    if isinstance(record, PreparedChunk):
        return Record.PREPARED, str(record.chunk)
    if isinstance(record, Notice):
        return Record.NOTICE, notice_name(record.connection, record.hop)
    return (Record.ROUTE if isinstance(record, Route) else Record.HOLDING), record.connection.hex()


def notice_name(connection: bytes, hop: int) -> str:
    """The name of a notice."""
    return f"{connection.hex()}/{hop}"


def started(journal: Journal) -> Started:
    """What the journal holds, as the protocol core's first event."""

    return Started(
        decisions=tuple(_each(journal, Record.DECISION)),
        routes=tuple(_each(journal, Record.ROUTE)),
        notices=tuple(_each(journal, Record.NOTICE)),
        prepared=tuple(_each(journal, Record.PREPARED)),
        holdings=tuple(_each(journal, Record.HOLDING)),
    )


def decisions(journal: Journal) -> Iterator[Decision]:
    """Those of the chunks that are not over."""
    return _each(journal, Record.DECISION)


def modes_in_use(journal: Journal) -> set[Mode]:
    """The redirects that earlier runs have installed: they are looked after, configured still or not."""
    modes = {one.place.mode for kind in (Record.ROUTE, Record.HOLDING) for one in _each(journal, kind)}
    for chunk in _each(journal, Record.PREPARED):
        modes |= {arrival.place.mode for arrival in chunk.arrivals}
    return {mode for mode in modes if mode is not None}


def _each(journal: Journal, kind: Record) -> Iterator[Any]:
    """One after the other: there may be as many as the host has redirects."""
    return (_READERS[kind](content) for _name, content in journal.each(kind))


# -- parts: thousands of records have the same few addresses, places and members, which stand in memory once

_once = lru_cache(maxsize=1024)


def write_endpoint(endpoint: Endpoint | None) -> list[Any] | None:
    """``[address, port]``, or None."""
    return None if endpoint is None else [text_of(endpoint.address), endpoint.port]


def read_endpoint(content: list[Any] | None) -> Endpoint | None:
    """The inverse of ``write_endpoint``."""
    return None if content is None else _endpoint(*content)


@_once
def _endpoint(address: str, port: int) -> Endpoint:
    return Endpoint(_address(address), port)


_address = _once(ip_address)
_member = _once(bytes.fromhex)


def _write_place(place: Place) -> list[Any]:
    return [write_endpoint(place.endpoint), plain(place.mode) if place.mode else None]


def _read_place(content: list[Any]) -> Place:
    endpoint, mode = content
    return _place(read_endpoint(endpoint), mode)


@_once
def _place(endpoint: Endpoint | None, mode: str | None) -> Place:
    return Place(endpoint, Mode(mode) if mode else None)


def _write_chunk(chunk: ChunkId) -> list[Any]:
    return [chunk.batch.hex(), chunk.number]


def _read_chunk(content: list[Any]) -> ChunkId:
    return ChunkId(bytes.fromhex(content[0]), content[1])


# -- records


def _write_decision(one: Decision) -> list[Any]:
    return [
        _write_chunk(one.chunk),
        one.importer.hex(),
        [migration.hex() for migration in one.migrations],
        list(one.committed),
    ]


def _read_decision(content: list[Any]) -> Decision:
    chunk, importer, migrations, committed = content
    return Decision(
        _read_chunk(chunk),
        bytes.fromhex(importer),
        tuple(bytes.fromhex(migration) for migration in migrations),
        tuple(committed),
    )


def _write_route(one: Route) -> list[Any]:
    return [
        one.connection.hex(),
        one.migration.hex(),
        plain(one.kind),
        one.hop,
        one.home.hex(),
        one.holder.hex(),
        _write_place(one.place),
        write_endpoint(one.local),
        write_endpoint(one.remote),
        write_endpoint(one.origin),
        one.upstream.hex() if one.upstream else None,
        one.pinned,
    ]


def _read_route(content: list[Any]) -> Route:
    connection, migration, kind, hop, home, holder, place, local, remote, origin, upstream, pinned = content
    known_as = bytes.fromhex(connection)
    return Route(
        known_as,
        known_as if migration == connection else bytes.fromhex(migration),
        Kind(kind),
        hop,
        _member(home),
        _member(holder),
        _read_place(place),
        read_endpoint(local),
        read_endpoint(remote),
        read_endpoint(origin),
        _member(upstream) if upstream else None,
        pinned,
    )


def _write_notice(one: Notice) -> list[Any]:
    return [one.connection.hex(), one.hop, one.home.hex(), one.holder.hex(), _write_place(one.place)]


def _read_notice(content: list[Any]) -> Notice:
    connection, hop, home, holder, place = content
    return Notice(bytes.fromhex(connection), hop, _member(home), _member(holder), _read_place(place))


def _write_item(item: Item) -> list[Any]:
    return [
        item.migration.hex(),
        item.connection.hex(),
        plain(item.kind),
        item.state,
        write_endpoint(item.local),
        write_endpoint(item.remote),
        write_endpoint(item.origin),
        item.hop,
        item.home.hex(),
        _write_needs(item.needs),
        item.size_bytes,
        item.listener.hex() if item.listener else None,
    ]


def _write_needs(one: Needs) -> list[Any]:
    return [
        one.window_scale,
        one.timestamp_us,
        one.image_bytes_max,
        one.bind_flags,
        one.urgent,
        one.direct,
    ]


def _read_needs(content: list[Any]) -> Needs:
    """Earlier releases wrote fewer."""
    return Needs(*content[:3], *map(BindFlag, content[3:4]), *content[4:])


def _read_item(content: list[Any]) -> Item:
    migration, connection, kind, state, local, remote, origin, hop, home, needs, size_bytes, listener = (
        content
    )
    return Item(
        bytes.fromhex(migration),
        bytes.fromhex(connection),
        Kind(kind),
        state,
        read_endpoint(local),
        read_endpoint(remote),
        read_endpoint(origin),
        hop,
        bytes.fromhex(home),
        _read_needs(needs),
        size_bytes,
        bytes.fromhex(listener) if listener else None,
    )


def write_arrival(arrival: Arrival) -> list[Any]:
    """An item and its place."""
    return [_write_item(arrival.item), _write_place(arrival.place)]


def read_arrival(content: list[Any]) -> Arrival:
    """The inverse of ``write_arrival``."""
    return Arrival(_read_item(content[0]), _read_place(content[1]))


def _write_prepared(one: PreparedChunk) -> list[Any]:
    return [
        _write_chunk(one.chunk),
        one.exporter.hex(),
        [write_arrival(arrival) for arrival in one.arrivals],
        list(one.prepared),
    ]


def _read_prepared(content: list[Any]) -> PreparedChunk:
    chunk, exporter, arrivals, prepared = content
    return PreparedChunk(
        _read_chunk(chunk),
        bytes.fromhex(exporter),
        tuple(read_arrival(arrival) for arrival in arrivals),
        tuple(prepared),
    )


def _write_holding(one: Holding) -> list[Any]:
    return [
        one.connection.hex(),
        one.migration.hex(),
        plain(one.kind),
        one.hop,
        one.home.hex(),
        one.exporter.hex(),
        _write_place(one.place),
        write_endpoint(one.local),
        write_endpoint(one.remote),
        write_endpoint(one.origin),
    ]


def _read_holding(content: list[Any]) -> Holding:
    connection, migration, kind, hop, home, exporter, place, local, remote, origin = content
    return Holding(
        bytes.fromhex(connection),
        bytes.fromhex(migration),
        Kind(kind),
        hop,
        bytes.fromhex(home),
        bytes.fromhex(exporter),
        _read_place(place),
        read_endpoint(local),
        read_endpoint(remote),
        read_endpoint(origin),
    )


def write_original(one: Original) -> list[Any]:
    """A socket that a decision closes."""
    return [
        one.migration.hex(),
        one.connection.hex(),
        one.hop,
        plain(one.kind),
        one.inode,
        one.cookie,
        write_endpoint(one.local),
        write_endpoint(one.remote),
        _write_holding(one.holding) if one.holding else None,
        *([one.listed.hex()] if one.listed else []),
    ]


def read_original(content: list[Any]) -> Original:
    """The inverse of ``write_original``."""
    migration, connection, hop, kind, inode, cookie, local, remote, holding, *listed = content
    return Original(
        bytes.fromhex(migration),
        bytes.fromhex(connection),
        hop,
        Kind(kind),
        inode,
        cookie,
        read_endpoint(local),
        read_endpoint(remote),
        _read_holding(holding) if holding else None,
        bytes.fromhex(listed[0]) if listed else None,
    )


def write_handed(one: Handed) -> list[Any]:
    """A socket that an application is given."""
    return [plain(one.kind), one.inode, one.cookie]


def read_handed(content: list[Any]) -> Handed:
    """The inverse of ``write_handed``."""
    kind, inode, cookie = content
    return Handed(Kind(kind), inode, cookie)


_WRITERS: dict[Record, Any] = {
    Record.DECISION: _write_decision,
    Record.ROUTE: _write_route,
    Record.NOTICE: _write_notice,
    Record.PREPARED: _write_prepared,
    Record.HOLDING: _write_holding,
}
_READERS: dict[Record, Any] = {
    Record.DECISION: _read_decision,
    Record.ROUTE: _read_route,
    Record.NOTICE: _read_notice,
    Record.PREPARED: _read_prepared,
    Record.HOLDING: _read_holding,
}
