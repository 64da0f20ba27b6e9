# SPDX-License-Identifier: MIT
"""What fails for one socket is refused for that one; the others and the daemon go on."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from sockmi.addresses import Endpoint, FourTuple
from sockmi.api import TakenRequest, parse_request
from sockmi.config import Config
from sockmi.engine.base import Kind, Needs, Placement
from sockmi.engine.owners import Owners
from sockmi.engine.trial import obstacle
from sockmi.exporting import Exporting, Selected
from sockmi.exporting.batches import Batch, Batches
from sockmi.exporting.descriptors import Descriptors
from sockmi.exporting.exports import Exports
from sockmi.exporting.freezer import Freezer
from sockmi.exporting.reachability import Reachability
from sockmi.image import Family, ImageError
from sockmi.import_lists import Candidate
from sockmi.importing import Importing
from sockmi.importing.copies import Copy
from sockmi.importing.handover import Handing, Wish
from sockmi.metrics import Metrics
from sockmi.movelog import MoveLog
from sockmi.placing import Placing
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol.context import Capacity
from sockmi.protocol.records import Arrival, ChunkId, Holding, Item, Place, Route
from sockmi.redirect.base import Mode
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal

ERRORS = [OSError(errno.EMFILE, "Too many open files"), AssertionError("a bug")]
HOME, BATCH = b"h" * 16, b"b" * 16


def bound(number: int) -> Item:
    name = bytes([number]) * 16
    local = Endpoint(IPv4Address("192.0.2.1"), 8000 + number)
    return Item(name, name, Kind.BOUND, "CLOSED", local, None, local, 1, HOME)


def nowhere(connections: Sequence[FourTuple]) -> list[int | None]:
    """The kernel knows none of them."""
    return [None] * len(connections)


def told(**parts: Any) -> tuple[Any, list[e.Event]]:
    """A shell that keeps what it dispatches."""
    events: list[e.Event] = []
    return SimpleNamespace(
        config=Config(), dispatch=events.append, metrics=Metrics(), moves=MoveLog(), **parts
    ), events


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_place_that_cannot_be_tried_is_refused_alone(error: Exception) -> None:
    def trying(_needs: Needs, _by: str, placement: Placement, _other: Endpoint | None) -> Refusal | None:
        assert placement.local
        if placement.local.port == 8001:
            raise error
        return None

    spool, later = SimpleNamespace(provide=None), SimpleNamespace(call_later=lambda *_unused: None)
    shell, events = told(loop=later, spool=spool)
    placing = Placing(
        [Mode.NAT],
        lambda _unused: None,
        nowhere,
        lambda _unused: False,
        trying,
        is_led=lambda _unused: True,
        peers=SimpleNamespace(here=lambda _addresses: ()),  # type: ignore[arg-type]
    )
    redirecting: Any = SimpleNamespace(left_by_takeover=lambda _unused: False)
    importing = Importing(shell, placing, Capacity(), redirecting)
    importing.reservations.reserve(a.Reserve(BATCH, HOME, 1, (bound(1), bound(2)), (Mode.NAT,), (None, None)))
    [done] = events
    assert isinstance(done, e.ReserveDone)
    refused, good = done.places
    assert isinstance(refused, Refusal) and refused.code is Code.INTERNAL and str(error) in refused.message
    assert good == Place()
    again: Sequence[Place] = [placing.choose(bound(3), [Mode.NAT])]
    assert again == [Place()]
    assert not placing._ports.taken(bound(1)), "its port is not kept"


def test_what_cannot_be_journalled_is_not_brought_to_life() -> None:
    """The daemon ends then; but an application's word may be read before that."""

    def write(_unused: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    nothing: Any = SimpleNamespace(
        suspend=lambda *_unused, **_named: None,
        add_holdings=list,
        drop_route=None,
        journal=SimpleNamespace(write=write),
    )
    lifted: list[object] = []
    shell, _unused = told(
        journal=nothing.journal, engine=SimpleNamespace(renew=lambda *_unused: lifted.append(1) or [])
    )
    importing = Importing(shell, nothing, Capacity(), nothing)
    item = bound(1)
    ends = item.local, None, None
    holding = Holding(item.connection, item.migration, Kind.BOUND, 1, HOME, HOME, Place(), *ends)
    client: Any = object()
    copy: Any = SimpleNamespace(
        client=client, record={}, holding=None, handed=None, tuple=None, chunk="c-0", fd=-1,
        migration=item.migration, arrival=Arrival(item, Place()),
        candidate=SimpleNamespace(migration_id=UUID(bytes=item.migration)),
    )  # fmt: skip
    importing.stock.copies.add(copy)
    handing = Handing(Wish(SimpleNamespace(), None), [copy], lambda: None, False)  # type: ignore[arg-type]
    importing.handover._handings[client] = handing
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sockmi.importing.activation.keep_listed", lambda *_unused: None)
        with pytest.raises(OSError, match="No space"):
            importing.activation.activate(a.Activate(ChunkId(BATCH, 0), (holding,)))
    importing.handover.taken(client, TakenRequest(id=1, op="taken", migrations=[copy.candidate.migration_id]))
    assert not handing.decided and handing.taken is not None and not lifted


def test_nothing_is_tried_without_a_local_end() -> None:
    remote = Endpoint(IPv4Address("198.51.100.1"), 80)
    assert obstacle(Needs(), "SYN-SENT", Placement(None, False), remote) is None


def test_urgent_data_is_for_engines_that_carry_it() -> None:
    remote, place = (
        Endpoint(IPv4Address("198.51.100.1"), 80),
        Placement(Endpoint(IPv4Address("192.0.2.1"), 80), False),
    )
    refusal = obstacle(Needs(urgent=True), "ESTABLISHED", place, remote, carries_urgent=False)
    assert refusal is not None and refusal.code is Code.URGENT_DATA
    assert obstacle(Needs(urgent=True), "ESTABLISHED", place, remote, carries_urgent=True) is None
    assert obstacle(Needs(), "ESTABLISHED", place, remote, carries_urgent=False) is None


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_reroute_that_fails_is_refused(error: Exception) -> None:
    def reachable(_unused: object) -> str | None:
        raise error

    ends = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), 4000)
    place = Place(Endpoint(IPv4Address("192.0.2.3"), 4000), Mode.NAT)
    route = Route(b"c" * 16, b"m" * 16, Kind.CONNECTED, 2, HOME, b"x" * 16, place, *ends, ends[0])
    shell, events = told(redirects={Mode.NAT: SimpleNamespace(reachable=reachable)})
    redirecting = Redirecting(shell, {route.connection: route}, {}, nowhere, Counter, lambda _unused: False)
    redirecting.reroute(a.Reroute((route,)))
    [done] = events
    assert isinstance(done, e.RerouteDone)
    [(_unused, hop, refusal)] = done.results
    assert hop == 2 and refusal is not None and refusal.code is Code.REDIRECT


def test_a_reroute_that_cannot_be_journalled_is_undone() -> None:
    """The kernel leads where it has led before; the waypoint is told to stay."""
    led: list[object] = []
    redirect = SimpleNamespace(
        reachable=lambda _unused: None, reroute=lambda ways: led.extend(one.importer for one in ways)
    )

    def write(_unused: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ends = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), 4000)
    places = [Place(Endpoint(IPv4Address(f"192.0.2.{one}"), 4000), Mode.NAT) for one in (2, 3)]
    old, new = (
        Route(b"c" * 16, b"m" * 16, Kind.CONNECTED, hop, HOME, b"x" * 16, place, *ends, ends[0])
        for hop, place in enumerate(places, 1)
    )
    shell, events = told(redirects={Mode.NAT: redirect}, journal=SimpleNamespace(write=write))
    redirecting = Redirecting(shell, {old.connection: old}, {}, nowhere, Counter, lambda _unused: False)
    redirecting.reroute(a.Reroute((new,)))
    [done] = events
    assert isinstance(done, e.RerouteDone)
    [(_unused, _unused, refusal)] = done.results
    assert refusal is not None and refusal.code is Code.INTERNAL
    assert led == [places[1].endpoint, places[0].endpoint]
    assert redirecting.routes == {old.connection: old}


@pytest.mark.parametrize("error", [*ERRORS, ImageError("section", "damaged")], ids=repr)
def test_an_image_that_cannot_be_looked_at_is_refused(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place in the list is free again."""

    def examine(*_unused: object) -> None:
        raise error

    monkeypatch.setattr("sockmi.importing.preparer.examine", examine)
    loop = SimpleNamespace(call_later=lambda *_unused: None)
    engine = SimpleNamespace(restore=lambda *_unused: [], discard=list)
    shell, events = told(loop=loop, engine=engine)
    redirecting: Any = SimpleNamespace(
        suspend=lambda *_unused, **_named: None,
        lead_again=list,
        miss_listeners=list,
        listener_found=lambda _unused: None,
    )
    placing: Any = SimpleNamespace(forget=lambda _unused: None)
    importing = Importing(shell, placing, Capacity(), redirecting)
    room = importing.stock.lists.room(Kind.BOUND)
    importing.preparer.prepare(a.Prepare(ChunkId(BATCH, 0), HOME, (Arrival(bound(1), Place()),), (b"image",)))
    [done] = events
    assert isinstance(done, e.PrepareDone)
    [refusal] = done.results
    assert isinstance(refusal, Refusal)
    assert importing.stock.lists.room(Kind.BOUND) == room


def test_owners_run_again_though_a_hold_cannot_be_lifted() -> None:
    """It ends by itself, in the kernel."""
    resumed: list[int] = []

    def unhold(_unused: object) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    facts: Any = SimpleNamespace(
        tuple=object(), kind=Kind.CONNECTED, inode=7, state="ESTABLISHED", local=None, remote=None
    )
    engine = SimpleNamespace(resume=resumed.extend, name="repair")
    shell, _unused = told(holds=SimpleNamespace(unhold=unhold), engine=engine, host_name="a")
    exports = Exports(shell, Batches())
    export = exports.register(Selected(-1, None, None), facts, BATCH)
    export.stopped = True
    onward: Any = SimpleNamespace(give_back=list)
    descriptors = Descriptors(Owners(), lambda _unused: None)
    freezer = Freezer(shell, exports, descriptors, onward, Reachability(shell))
    freezer.thaw(a.Thaw(ChunkId(BATCH, 0), (export.migration,)))
    assert resumed == [7] and not export.stopped


def test_a_socket_under_way_is_refused_however_often_it_is_asked_for() -> None:
    """A second request, which is refused, does not free it for a third."""
    facts: Any = SimpleNamespace(
        refusal=None, inode=7, kind=Kind.CONNECTED, state="ESTABLISHED", local=None, remote=None, tuple=None,
        receive_queue_bytes=0, send_queue_bytes=0,
    )  # fmt: skip
    ended: list[dict[str, Any]] = []
    shell, _unused = told(
        engine=SimpleNamespace(name="repair", owners=Owners()),
        host_name="a",
        journal=SimpleNamespace(write=lambda _unused: None), note=lambda _unused: None,
    )  # fmt: skip
    exporting = Exporting(
        shell, SimpleNamespace(holding_of=None),  # type: ignore[arg-type]
        look=lambda fds, done: done([facts] * len(fds)),
        find_holders=lambda *_unused: None, find=lambda _unused: None, destroy=lambda *_unused: True,
        onward=SimpleNamespace(),  # type: ignore[arg-type]
    )  # fmt: skip
    for _turn in range(3):
        selected = Selected(os.open(os.devnull, os.O_RDONLY), 1, 3)
        exporting.admission.export(
            [selected], target=(None, None), timeout_s=1.0, dry_run=False, done=ended.extend
        )
    assert [one["refusal"]["code"] for one in ended] == [Code.ALREADY_MIGRATING] * 2
    assert len(exporting.exports) == 1


def test_an_outcome_that_cannot_be_told() -> None:
    """The batch is over all the same."""

    def done(_unused: object) -> None:
        raise ValueError("not in the model")

    batches = Batches()
    batches.open(BATCH, Batch(done, None))
    batches.close(BATCH)
    assert BATCH not in batches


def prepared(shell: Any, context_bytes: int = 0) -> tuple[Importing, Copy]:
    """An importer with a dormant copy, which the shell's spool has."""
    redirecting: Any = SimpleNamespace(
        suspend=lambda *_unused, **_named: None,
        lead_again=list,
        miss_listeners=list,
        listener_found=lambda _unused: None,
    )
    placing: Any = SimpleNamespace(forget=lambda _unused: None)
    importing = Importing(shell, placing, Capacity(), redirecting)
    item = bound(1)
    candidate = Candidate(UUID(bytes=item.migration), item.kind, item.local, None, 0, None)
    facts: Any = SimpleNamespace(context_bytes=context_bytes, family=Family.INET)
    copy = Copy(
        Arrival(item, Place()), f"{BATCH.hex()}-0", candidate, Placement(item.local, False), facts, {},
        datetime.now(UTC), fd=-1, image=b"image",
    )  # fmt: skip
    importing.stock.copies.add(copy)
    importing.stock.images.remember(copy)
    return importing, copy


@pytest.mark.parametrize("full", [False, True])
def test_what_is_discarded_stays_in_the_spool_while_the_journal_has_it(full: bool) -> None:
    """So that the next start can make it again, and ask."""
    removed: list[str] = []

    def write(_unused: object) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    shell, _unused = told(
        journal=SimpleNamespace(write=write),
        spool=SimpleNamespace(remove=removed.append),
        engine=SimpleNamespace(discard=list, name="repair"),
    )
    importing, copy = prepared(shell)
    importing.preparer.discard(a.Discard(ChunkId(BATCH, 0), (copy.arrival.item.migration,)))
    assert not importing.stock.copies
    assert removed == ([] if full else [copy.chunk])


def test_who_cannot_be_given_a_context_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more descriptors: its sockets are listed as if it had gone, and the daemon goes on."""

    def no_more(_unused: bytes) -> int:
        raise ERRORS[0]

    class Someone:
        pid, uid, closed = 7, 0, False

        def close(self) -> None:
            self.closed = True
            importing.handover.gone(self)  # type: ignore[arg-type]

    monkeypatch.setattr("sockmi.importing.handover.context_file", no_more)
    monkeypatch.setattr("sockmi.importing.handover.section", lambda *_unused: b"context")
    timer = SimpleNamespace(cancel=lambda: None)
    shell, _unused = told(
        loop=SimpleNamespace(call_later=lambda *_unused: timer),
        engine=SimpleNamespace(discard=list, name="repair"),
    )
    importing, copy = prepared(shell, context_bytes=7)
    client: Any = Someone()
    wish: Any = parse_request(b'{"op": "import", "requests": [{"states": ["bound"]}]}')
    importing.handover._wishes[client] = Wish(wish, None)
    ended: list[bool] = []
    importing.handover.hand(client, [copy], lambda: ended.append(True))
    assert client.closed and ended == [True] and copy.client is None
    assert importing.stock.lists.is_listed(copy.candidate.migration_id)
