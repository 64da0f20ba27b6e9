# SPDX-License-Identifier: MIT
"""A core under test, whose test plays the shell and the other hosts."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any, TypeVar

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Kind, Needs
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.context import Capacity, Settings
from sockmi.protocol.core import Core
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import ChunkId, Counts, Item, Place
from sockmi.redirect.base import Mode
from sockmi.refusal import Code

ME, B, C = (bytes([letter]) * 16 for letter in b"ABC")
BATCH = b"batch-batch-batc"
PLACE = Place(Endpoint(IPv4Address("192.0.2.2"), 4000), Mode.NAT)
ROOMY = Counts(9, 9, 9)
T = TypeVar("T")
ONE = bytes([1]) * 16
"""The name of ``item(1)``."""


def item(number: int, **fields: Any) -> Item:
    name = bytes([number]) * 16
    ends = [Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), number)]
    base: dict[str, Any] = {
        "migration": name, "connection": name, "kind": Kind.CONNECTED, "state": "ESTABLISHED",
        "local": ends[0], "remote": ends[1], "origin": ends[0], "hop": 1, "home": ME,
    }  # fmt: skip
    return Item(**(base | fields))


def names(items: Any) -> list[int]:
    return [one.migration[0] for one in items]


def request(counts: Counts, batch: bytes = BATCH, **fields: Any) -> m.Request:
    base: dict[str, Any] = {"needs": Needs(), "size_bytes": 0, "modes": (Mode.NAT,)}
    return m.Request(batch, counts, **(base | fields))


def only(out: list[a.Action], kind: type[T]) -> T:
    found = [one for one in out if isinstance(one, kind)]
    assert len(found) == 1, out
    return found[0]


def sent(out: list[a.Action], kind: type[T]) -> list[tuple[bytes | None, T]]:
    return [(one.to, one.message) for one in out if isinstance(one, a.Send) and isinstance(one.message, kind)]


def results(out: list[a.Action]) -> dict[bytes, tuple[Outcome, Code | None]]:
    return {
        one.migration: (one.outcome, one.refusal.code if one.refusal else None)
        for action in out
        if isinstance(action, a.Report)
        for one in action.results
    }


def reported(out: list[a.Action]) -> list[a.Result]:
    return [one for action in out if isinstance(action, a.Report) for one in action.results]


class Bench:
    """One core under test; the test plays the shell and the other hosts."""

    def __init__(
        self, capacity: Capacity | None = None, started: e.Started | None = None, **settings: Any
    ) -> None:
        capacity = capacity or Capacity(
            ROOMY, modes=(Mode.NAT,), addresses=frozenset({IPv4Address("192.0.2.1")})
        )
        self.core = Core(ME, Settings(**settings), capacity)
        self.capacity = capacity
        self.now = 100.0
        self.begun = self.core.handle(started or e.Started(), self.now)

    def do(self, event: e.Event) -> list[a.Action]:
        return self.core.handle(event, self.now)

    def hear(self, source: bytes, message: m.Message, channel: Channel = Channel.DATAGRAM) -> list[a.Action]:
        return self.do(e.Received(source, message, channel))

    def stream(self, source: bytes, message: m.Message) -> list[a.Action]:
        return self.hear(source, message, Channel.STREAM)

    def wait(self, seconds: float) -> list[a.Action]:
        """Let time go on, ringing each deadline at its time."""
        out: list[a.Action] = []
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            out += self.core.handle_timer(self.now)
        self.now = end
        return out

    # exporter's path, up to some point
    def export(self, *items: Item, **fields: Any) -> list[a.Action]:
        return self.do(e.StartExport(BATCH, items, (Mode.NAT,), 5.0, **fields))

    def offer(self, host: bytes, rooms: Counts = ROOMY, waiting: int = 0, load: int = 0) -> list[a.Action]:
        offer = m.Offer(BATCH, rooms, Counts(0, 0, waiting), load, 1, (Mode.NAT,), 1000)
        return self.hear(host, offer)

    def reserved(self, out: list[a.Action]) -> a.Freeze:
        if any(isinstance(one, a.OpenStream) for one in out):
            out = self.do(e.StreamOpened(B))
        ((_unused, reserve),) = sent(out, m.Reserve)
        return only(self.stream(B, m.Reserved(BATCH, reserve.page, (PLACE,) * len(reserve.items))), a.Freeze)

    def to_freezing(self, *items: Item) -> a.Freeze:
        self.export(*items)
        return self.reserved(self.offer(B))

    def to_shipped(self, *items: Item) -> ChunkId:
        freeze = self.to_freezing(*items)
        self.do(e.FreezeDone(freeze.chunk, tuple(b"image" for _unused in freeze.items)))
        return freeze.chunk

    def to_committing(self, *items: Item) -> ChunkId:
        chunk = self.to_shipped(*items)
        only(self.stream(B, m.Prepared(chunk, (Fidelity(),) * len(items))), a.Commit)
        return chunk

    # importer's path
    def to_prepared(self, *items: Item, source: bytes = B, batch: bytes = BATCH) -> ChunkId:
        out = self.stream(source, m.Reserve(batch, 0, items, (Mode.NAT,)))
        reserve = only(out, a.Reserve)
        self.do(e.ReserveDone(batch, source, reserve.page, (PLACE,) * len(items)))
        chunk = ChunkId(batch, 0)
        names = tuple(one.migration for one in items)
        prepare = only(
            self.stream(source, m.Ship(chunk, names, (PLACE,) * len(items), (b"image",) * len(items))),
            a.Prepare,
        )
        out = self.do(e.PrepareDone(prepare.chunk, (Fidelity(),) * len(items)))
        assert sent(out, m.Prepared)[0][0] == source
        return chunk

    def to_held(self, *items: Item, source: bytes = B, batch: bytes = BATCH) -> None:
        chunk = self.to_prepared(*items, source=source, batch=batch)
        out = self.stream(source, m.Confirm(chunk, tuple(range(len(items)))))
        only(out, a.Activate)
        assert sent(self.do(e.ActivateDone(chunk, (None,) * len(items))), m.Active)
