# SPDX-License-Identifier: MIT
"""The exporter's core: an address leaves with all its connections, or stays with all."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol import messages as m
from sockmi.protocol.actions import Outcome
from sockmi.protocol.records import Counts, Item, Place
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal
from tests.unit.core_bench import BATCH, ROOMY, B, Bench, C, item, names, only, reported, results, sent

ALIAS, OTHER_ALIAS = (IPv4Address(f"192.0.2.{last}") for last in (7, 8))


def of_address(number: int, address: IPv4Address = ALIAS, **fields: Any) -> Item:
    end = Endpoint(address, 80)
    return item(number, local=end, origin=end, **fields)


def place_with(address: IPv4Address) -> Place:
    return Place(Endpoint(address, 80), Mode.TAKEOVER)


class TakeoverBench(Bench):
    """Every connection is led away by takeover."""

    def export(self, *items: Item, **fields: Any) -> list[a.Action]:
        return self.do(e.StartExport(BATCH, items, (Mode.TAKEOVER,), 5.0, **fields))

    def offer(self, host: bytes, rooms: Counts = ROOMY, waiting: int = 0, load: int = 0) -> list[a.Action]:
        return self.hear(host, m.Offer(BATCH, rooms, Counts(0, 0, waiting), load, 1, (Mode.TAKEOVER,), 1000))

    def place(self, page: m.Reserve) -> list[a.Action]:
        places = tuple(place_with(one.local.address) for one in page.items if one.local)  # type: ignore[arg-type]
        return self.stream(B, m.Reserved(BATCH, page.page, places))

    def to_freezing(self, *items: Item) -> a.Freeze:
        self.export(*items)
        return self.frozen_next(self.offer(B))

    def frozen_next(self, out: list[a.Action]) -> a.Freeze:
        if any(isinstance(one, a.OpenStream) for one in out):
            out = self.do(e.StreamOpened(B))
        ((_unused, reserve),) = sent(out, m.Reserve)
        return only(self.place(reserve), a.Freeze)


def test_an_address_is_frozen_whole() -> None:
    """Neither the number of items nor that of bytes divides it, and its items need not stand together."""
    bench = TakeoverBench(chunk_items=3, chunk_bytes=1000)
    freeze = bench.to_freezing(
        of_address(1, size_bytes=900), of_address(2, OTHER_ALIAS), of_address(3, size_bytes=900),
        of_address(4, OTHER_ALIAS), of_address(5, size_bytes=900),
    )  # fmt: skip
    assert names(freeze.items) == [1, 3, 5]
    assert names(only(bench.do(e.FreezeDone(freeze.chunk, (b"",) * 3)), a.Freeze).items) == [2, 4]


def test_an_address_waits_for_all_of_its_places() -> None:
    bench = TakeoverBench(page_items=2, chunk_items=9)
    bench.export(*(of_address(number) for number in (1, 2, 3)))
    bench.offer(B)
    first, second = (one for _unused, one in sent(bench.do(e.StreamOpened(B)), m.Reserve))
    assert not any(isinstance(one, a.Freeze) for one in bench.place(first))
    assert names(only(bench.place(second), a.Freeze).items) == [1, 2, 3]


def test_an_address_with_too_many_connections_stays() -> None:
    bench = TakeoverBench(chunk_items=2)
    bench.export(of_address(1), of_address(2), of_address(3), of_address(4, OTHER_ALIAS))
    bench.offer(B)
    ((_unused, reserve),) = sent(bench.do(e.StreamOpened(B)), m.Reserve)
    out = bench.place(reserve)
    assert names(only(out, a.Freeze).items) == [4]
    assert {one.migration[0] for one in reported(out)} == {1, 2, 3}
    for one in reported(out):
        assert one.refusal and one.refusal.code is Code.REDIRECT
        assert "3 connections have 192.0.2.7" in one.refusal.message
        assert "raise chunk_size" in one.refusal.message


def test_an_address_goes_to_one_importer() -> None:
    """Two have room for half of the connections each; those of one address do not part for that."""
    bench = TakeoverBench()
    bench.export(*(of_address(number) for number in (1, 3, 5)), of_address(2, OTHER_ALIAS))
    assert only(bench.offer(B, Counts(9, 9, 2)), a.OpenStream).host == B
    assert only(bench.offer(C, Counts(9, 9, 3)), a.OpenStream).host == C
    ((_unused, few),) = sent(bench.do(e.StreamOpened(B)), m.Reserve)
    ((_unused, many),) = sent(bench.do(e.StreamOpened(C)), m.Reserve)
    assert (names(few.items), names(many.items)) == ([2], [1, 3, 5])


def test_an_address_that_nobody_has_room_for_stays_whole() -> None:
    bench = TakeoverBench()
    bench.export(of_address(1), of_address(2))
    for host in (B, C):
        assert not any(isinstance(one, a.OpenStream) for one in bench.offer(host, Counts(9, 9, 1)))
    out = reported(bench.wait(30))
    assert {one.refusal.code for one in out if one.refusal} == {Code.NO_OFFER} and len(out) == 2
    assert out[0].refusal
    assert "0 of 2 sockets (takeover leads all connections of an address to one)" in out[0].refusal.message


def test_an_address_is_frozen_again_whole() -> None:
    """One cannot be frozen now: the others of its address are let go, and tried again with it."""
    bench = TakeoverBench()
    changed = Refusal(Code.CHANGED, "a packet came")
    freeze = bench.to_freezing(of_address(1), of_address(2), of_address(3, OTHER_ALIAS))
    out = bench.do(e.FreezeDone(freeze.chunk, (changed, b"image", b"image")))
    assert sent(out, m.Ship)[0][1].migrations == (bytes([3]) * 16,)
    assert only(out, a.Thaw).migrations == (bytes([2]) * 16,)
    assert not results(out)
    assert sent(out, m.Request)[0][1].counts.connected == 2
    freeze = bench.frozen_next(bench.offer(B))
    assert names(freeze.items) == [1, 2]
    # What was only in the other's company is not tried out.
    for _turn in range(2):
        out = bench.do(e.FreezeDone(freeze.chunk, (b"image", changed)))
        assert not results(out)
        bench.wait(0.3)
        freeze = bench.frozen_next(bench.offer(B))
        assert sorted(names(freeze.items)) == [1, 2]
    out = bench.do(e.FreezeDone(freeze.chunk, (b"image", b"image")))
    assert len(sent(out, m.Ship)[0][1].migrations) == 2


def test_an_address_stays_with_one_that_cannot_be_frozen() -> None:
    """The others are tried again: it may have ended. If it has not, the redirect says so."""
    bench = TakeoverBench()
    freeze = bench.to_freezing(of_address(1), of_address(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.OWNER_TRACED, "traced"), b"image")))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.OWNER_TRACED)}
    assert only(out, a.Thaw).migrations == (bytes([2]) * 16,)
    assert not sent(out, m.Ship)
    freeze = bench.frozen_next(bench.offer(B))
    (result,) = reported(bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.REDIRECT, "one is there"),))))
    assert result.refusal and result.refusal.code is Code.REDIRECT


def test_that_another_of_its_address_has_ended_is_not_its_end() -> None:
    """`no-such-socket` is told as closed; what stays with the address is not."""
    bench = TakeoverBench()
    freeze = bench.to_freezing(of_address(1), of_address(2))
    out = bench.do(e.FreezeDone(freeze.chunk, (Refusal(Code.NO_SUCH_SOCKET, "closed"), b"image")))
    assert results(out) == {bytes([1]) * 16: (Outcome.REFUSED, Code.NO_SUCH_SOCKET)}
    (result,) = reported(bench.wait(30))  # nobody offers any more
    assert result.refusal and result.refusal.code is Code.CHANGED
    assert result.refusal.message == "Its address stays, as another connection does that has it: closed"


def test_an_address_stays_with_one_that_the_importer_refuses() -> None:
    """What it has prepared of that address it is told to forget."""
    bench = TakeoverBench()
    items = of_address(1), of_address(2), of_address(3, OTHER_ALIAS)
    freeze = bench.to_freezing(*items)
    bench.do(e.FreezeDone(freeze.chunk, (b"image",) * 3))
    no = Refusal(Code.RESTORE, "no route")
    out = bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(), no, Fidelity())))
    assert only(out, a.Commit).decision.committed == (2,)
    assert set(only(out, a.Thaw).migrations) == {one.migration for one in items[:2]}
    assert set(results(out).values()) == {(Outcome.REFUSED, Code.RESTORE)}

    bench = TakeoverBench()
    freeze = bench.to_freezing(*items[:2])
    bench.do(e.FreezeDone(freeze.chunk, (b"image",) * 2))
    out = bench.stream(B, m.Prepared(freeze.chunk, (Fidelity(), no)))
    assert not any(isinstance(one, a.Commit) for one in out)
    assert sent(out, m.Abort) == [(B, m.Abort(freeze.chunk))]
    assert len(results(out)) == 2
