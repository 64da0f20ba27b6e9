# SPDX-License-Identifier: MIT
"""The control socket's requests: each is answered, each descriptor closed once, each record its owner's."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from sockmi import api, operations
from sockmi.control import Client
from sockmi.engine.listing import Holder, ListedSocket
from sockmi.engine.owners import Scan
from sockmi.exporting import Selected
from sockmi.journal import Change, Journal
from sockmi.operations import Operations
from sockmi.operations import exports as exports_operations
from sockmi.operations import records as records_operations
from sockmi.operations import sockets as sockets_operations
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found
from tests.unit.test_draining import found


class FakeClient:
    """A client that reads as fast as it is answered."""

    answering = Client.answering

    def __init__(self, loop: asyncio.AbstractEventLoop, uid: int = 0) -> None:
        self.loop, self.uid, self.pid = loop, uid, 1
        self.administrator = uid == 0
        self.closed = False
        self.lines: list[Any] = []

    def respond(self, response: Any, descriptors: Any = ()) -> None:
        self.lines.append(response if isinstance(response, dict) else response.model_dump(by_alias=True))
        if not self.lines[-1].get("more"):
            self.loop.stop()

    def refuse(self, request_id: Any, refusal: Refusal) -> None:
        self.respond(api.ErrorResponse(id=request_id, error=api.Why.of(refusal)))

    def when_read(self, callback: Callable[[], object]) -> None:
        self.loop.call_soon(callback)


class Exporting:
    """Takes what it is given, and moves it at once."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.taken: list[Selected] = []
        self.fail: Exception | None = None

    def export(self, selection: list[Selected], *, done: Any, **_unused: Any) -> bytes:
        for one in selection:
            os.close(one.descriptor)
        if self.fail is not None:
            raise self.fail
        self.taken += selection
        records = [record(one.migration_id, user_id=one.user_id, pid=one.pid) for one in selection]
        done(records)
        return b""


def record(migration: UUID | None = None, **news: Any) -> dict[str, Any]:
    return {
        "migration_id": str(migration or uuid4()),
        "direction": "export",
        "kind": "connected",
        "state": "ESTABLISHED",
        "from": "a",
        "to": "b",
        "started_at": "2026-11-23T12:00:00.000Z",
        "step": "active",
        "outcome": "moved",
        **news,
    }


class Setting:
    """Operations of a daemon that has a journal and little else."""

    def __init__(self, path: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(2))
        self.journal = Journal(path / "journal.db")
        self.exporting = Exporting(self.journal)
        self.engine = SimpleNamespace(
            look=lambda fds: [SimpleNamespace(refusal=None) for _unused in fds], judge=lambda _fds, seen: seen
        )
        daemon: Any = SimpleNamespace(
            loop=self.loop,
            journal=self.journal,
            exporting=SimpleNamespace(admission=self.exporting, exports={}, batches=()),
            members=SimpleNamespace(target=lambda to: (None, None)),
            shell=SimpleNamespace(engine=self.engine, peers=SimpleNamespace(judge=lambda seen: seen)),
            stopping=False,
            host_name="a",
        )
        self.operations = Operations(daemon)

    def ask(self, request: Any, *descriptors: int, uid: int = 0) -> list[Any]:
        """All lines of the answer."""
        client: Any = FakeClient(self.loop, uid)

        def begin() -> None:
            with client.answering(request):
                self.operations.request(client, request, list(descriptors))

        self.loop.call_soon(begin)
        watchdog = self.loop.call_later(60, self.loop.stop)
        self.loop.run_forever()
        watchdog.cancel()
        assert client.lines, "no answer came"
        return list(client.lines)

    def know(self, *records: dict[str, Any]) -> None:
        self.journal.write(
            Change(audit=[(UUID(one["migration_id"]), one["direction"], one) for one in records])
        )

    def known(self, migration: UUID) -> dict[str, Any]:
        found = self.journal.migration(migration, "export")
        assert found is not None
        return found


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    Scan.now()  # keeps a descriptor for good
    before = list(Path("/proc/self/fd").iterdir())
    one = Setting(tmp_path)
    yield one
    one.journal.close()
    one.loop.run_until_complete(one.loop.shutdown_default_executor())
    one.loop.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= len(before), "descriptors leaked"


def sockets(*migrations: UUID | None, **fields: Any) -> dict[str, Any]:
    items = [api.ExportItem(descriptor=True, migration_id=one, **fields) for one in migrations]
    return {"sockets": items, "fds": len(items) * (2 if fields.get("context") else 1)}


def memfd() -> int:
    descriptor = os.memfd_create("context", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return descriptor


def null() -> int:
    return os.open(os.devnull, os.O_RDONLY)


# -- which socket


def test_a_number_that_is_another_socket_by_now_is_refused(setting: Setting) -> None:
    """As ``list`` has said: the socket of this inode, and how much had come on it."""
    with socket.socket() as held:
        words = [sys.executable, "-c", "input()"]
        with subprocess.Popen(words, pass_fds=[held.fileno()], stdin=subprocess.PIPE) as owner:
            there = {"pid": owner.pid, "fd": held.fileno(), "received_bytes": 7}
            inode = os.fstat(held.fileno()).st_ino
            request = api.ExportRequest(
                sockets=[api.ExportItem(**there, inode=one) for one in (inode, inode + 1)]
            )
            [answer] = setting.ask(request)
            owner.kill()
    assert [one["outcome"] for one in answer["migrations"]] == ["moved", "refused"]
    assert answer["migrations"][1]["refusal"]["code"] == "no-such-socket"
    assert [one.received for one in setting.exporting.taken] == [7]


# -- migration ids


def test_what_has_moved_is_answered_and_the_rest_is_moved(setting: Setting) -> None:
    before, now = uuid4(), uuid4()
    setting.know(record(before, user_id=7, ended_at="2026-11-23T12:00:01.000Z"))
    request = api.ExportRequest(**sockets(before, now))
    [answer] = setting.ask(request, null(), null(), uid=7)
    assert [one["outcome"] for one in answer["migrations"]] == ["moved", "moved"]
    assert answer["migrations"][0]["ended_at"] == datetime(2026, 11, 23, 12, 0, 1, tzinfo=UTC)
    assert [one.migration_id for one in setting.exporting.taken] == [now]


def test_all_that_have_moved_are_answered_wherever_they_shall_go_now(setting: Setting) -> None:
    before = uuid4()
    setting.know(record(before, to="b"))
    [answer] = setting.ask(api.ExportRequest(**sockets(before), to="nowhere"), null())
    assert [one["to"] for one in answer["migrations"]] == ["b"]


def test_what_was_lost_is_not_begun_again(setting: Setting) -> None:
    before = uuid4()
    setting.know(record(before, outcome="failed"))
    [answer] = setting.ask(api.ExportRequest(**sockets(before, None)), null(), null())
    assert [one["outcome"] for one in answer["migrations"]] == ["failed", "moved"]


def test_what_was_refused_is_tried_again(setting: Setting) -> None:
    before = uuid4()
    setting.know(record(before, outcome="refused", user_id=7))
    [answer] = setting.ask(api.ExportRequest(**sockets(before)), null(), uid=7)
    assert [one["outcome"] for one in answer["migrations"]] == ["moved"]


@pytest.mark.parametrize("outcome", ["moved", "refused", "failed"])
@pytest.mark.parametrize("owner", [7, None])
def test_a_foreign_id_is_refused(setting: Setting, outcome: str, owner: int | None) -> None:
    foreign, own = uuid4(), uuid4()
    setting.know(record(foreign, outcome=outcome, user_id=owner))
    before = setting.known(foreign)
    [answer] = setting.ask(api.ExportRequest(**sockets(foreign, own)), null(), null(), uid=8)
    codes = [(one["refusal"] or {}).get("code") for one in answer["migrations"]]
    assert codes == [Code.NO_PRIVILEGE, None]
    assert [one.migration_id for one in setting.exporting.taken] == [own]
    assert setting.known(foreign) == before
    [answer] = setting.ask(api.ExportRequest(**sockets(foreign)), null(), uid=0)
    assert answer["migrations"][0]["outcome"] == ("failed" if outcome == "failed" else "moved")


# -- descriptors


def test_descriptors_are_closed_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is free again is somebody else's: the second close must not come."""
    closed: list[int] = []
    close = os.close

    def watch(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    setting.exporting.fail = ZeroDivisionError("oops")
    passed = [null(), memfd()]
    monkeypatch.setattr(os, "close", watch)
    for module in (operations, exports_operations):
        monkeypatch.setattr(module, "close_all", lambda some: [watch(one) for one in some])
    [answer] = setting.ask(api.ExportRequest(**sockets(None, context=True)), *passed)
    monkeypatch.undo()
    assert answer["error"]["code"] == Code.INTERNAL
    assert sorted(closed) == sorted(passed)


def test_descriptors_that_nobody_wants_are_closed(setting: Setting) -> None:
    setting.ask(api.HistoryRequest(fds=2), null(), null())
    [answer] = setting.ask(api.DrainRequest(fds=1), null(), uid=9)
    assert answer["error"]["code"] == Code.NO_PRIVILEGE


# -- every request is answered


def fails(*_unused: Any) -> Any:
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize("request_", [api.ListRequest(id=5), api.DrainRequest(id=5)])
def test_a_look_through_proc_that_fails_is_an_answer(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    monkeypatch.setattr(sockets_operations, "select", fails)
    [answer] = setting.ask(request_)
    assert (answer["id"], answer["error"]["code"]) == (5, Code.INTERNAL)
    assert not setting.operations.drains.going


def test_an_inspection_that_fails_is_an_answer(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets_operations, "select", lambda *_unused: [found(n) for n in range(500)])
    monkeypatch.setattr(sockets_operations, "duplicate", lambda pid, fd: null())
    setting.engine.look = fails
    [answer] = setting.ask(api.ListRequest())
    assert answer["error"]["code"] == Code.INTERNAL


def test_a_drain_that_fails_in_the_middle_is_an_answer(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sockmi import draining

    monkeypatch.setattr(sockets_operations, "select", lambda *_unused: [found(1)])
    monkeypatch.setattr(draining, "duplicate", lambda pid, fd, inode: null())
    setting.exporting.fail = ZeroDivisionError("oops")
    *_unused, answer = setting.ask(api.DrainRequest(id=6))
    assert (answer["id"], answer["error"]["code"]) == (6, Code.INTERNAL)
    assert not setting.operations.drains.going


def test_a_history_that_cannot_be_read_is_an_answer(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_operations.History, "page", fails)
    [answer] = setting.ask(api.HistoryRequest())
    assert answer["error"]["code"] == Code.INTERNAL


# -- list


def test_owners_that_cannot_be_stopped_are_a_verdict(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def socket_of(inode: int, *holders: Holder) -> Found:
        listed = found(inode).socket
        with_holders = {name: getattr(listed, name) for name in ListedSocket.__slots__} | {"holders": holders}
        return Found(ListedSocket(**with_holders), holders[0], None)

    me = os.getpid()
    rows = [
        socket_of(1, Holder(me, 5, "plain")),
        socket_of(2, Holder(me, 6, "plain"), Holder(1 << 22, 7, "ring", has_ring=True)),
    ]
    monkeypatch.setattr(sockets_operations, "select", lambda *_unused: rows)
    monkeypatch.setattr(sockets_operations, "duplicate", lambda pid, fd: null())
    [answer] = setting.ask(api.ListRequest())
    assert [one["movable"] for one in answer["sockets"]] == [True, False]
    assert answer["sockets"][1]["refusal"]["code"] == Code.OWNER_IO_URING


# -- history


def test_history_filters(setting: Setting) -> None:
    batch = uuid4()
    rows = [
        record(started_at="2026-11-23T12:00:00.000Z", outcome="moved", batch_id=str(batch)),
        record(started_at="2026-11-23T12:00:00.500Z", outcome="failed", to="c"),
        record(started_at="2026-11-24T12:00:00.000Z", outcome="refused", direction="import"),
        record(started_at="2026-11-25T12:00:00.000Z", outcome=None),
    ]
    setting.know(*rows)

    def which(**fields: Any) -> list[int]:
        lines = setting.ask(api.HistoryRequest(**fields))
        ids = [one["migration_id"] for line in lines for one in line["migrations"]]
        assert all(
            set(api.MigrationRecord.model_fields) - {"from_"} <= set(one)
            for line in lines
            for one in line["migrations"]
        )
        return [[one["migration_id"] for one in rows].index(one) for one in ids]

    day = datetime(2026, 11, 24, tzinfo=UTC)
    assert which() == [2, 1, 0]
    assert which(limit=1) == [2]
    assert which(since=day) == [2]
    assert which(until=day) == [1, 0]
    assert which(since=datetime(2026, 11, 23, 12, 0, 0, 100_000, tzinfo=UTC), until=day) == [1]
    assert which(outcomes=[api.Outcome.MOVED, api.Outcome.FAILED]) == [1, 0]
    assert which(outcomes=[]) == []
    assert which(direction=api.Direction.IMPORT) == [2]
    assert which(batch_id=batch) == [0]
    assert which(host="c") == [1]
    assert which(host="a") == [2, 1, 0]


def test_history_leaves_time_for_all_else(setting: Setting) -> None:
    """100,000 records: the loop is never kept for long, whether many match or none."""
    for _turn in range(100):
        setting.know(*(record(blackout_us=900, fidelity={"carried": ["x"] * 10}) for _turn in range(1000)))
    turns: list[float] = []
    last = time.thread_time()  # of the processor, whoever else uses it

    def tick() -> None:
        nonlocal last
        now = time.thread_time()
        turns.append(now - last)
        last = now
        setting.loop.call_later(0.005, tick)

    setting.loop.call_soon(tick)
    lines = setting.ask(api.HistoryRequest(limit=20_000))
    assert sum(len(line["migrations"]) for line in lines) == 20_000
    assert setting.ask(api.HistoryRequest(host="nobody"))[-1]["migrations"] == []
    assert len(turns) > 20
    # On a slow machine all turns are longer: then none of them may be a sixth of the whole.
    limit_s = max(0.2, sum(turns) / 6)
    assert max(turns) < limit_s, f"the loop was kept for {max(turns):.2f} s of {sum(turns):.2f} s"


def test_info_leaves_time_for_all_else(setting: Setting) -> None:
    """Anybody may ask for thousands, and wait: they are not looked up all at once, nor again and again."""
    looked = 0
    most = 0
    migration = setting.journal.migration

    def count(*which: Any) -> Any:
        nonlocal looked
        looked += 1
        return migration(*which)

    def tick() -> None:
        nonlocal most, last
        most, last = max(most, looked - last), looked
        setting.loop.call_soon(tick)

    last = 0
    setting.journal.migration = count  # type: ignore[method-assign]
    under_way = record(outcome=None)
    setting.know(under_way)
    ids = [UUID(under_way["migration_id"]), *(uuid4() for _turn in range(2000))]
    setting.loop.call_soon(tick)
    (line,) = setting.ask(api.InfoRequest(migration_ids=ids, wait_s=0.3), uid=1000)
    assert [one["migration_id"] for one in line["migrations"]] == [ids[0]]
    assert looked < 2 * len(ids) + 100
    assert most < 1000


def test_contexts_of_one_user_have_a_limit(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes with exports that nobody takes stays in the daemon's memory as long as they wait."""
    monkeypatch.setattr("sockmi.operations.exports._CONTEXTS_BYTES_MAX", 2500)
    ended: list[Callable[[], None]] = []

    def waits(selection: list[Selected], *, done: Any, **_unused: Any) -> bytes:
        for one in selection:
            os.close(one.descriptor)
        ended.append(lambda: done([record(one.migration_id) for one in selection]))
        return b""

    def ask(uid: int) -> list[Any]:
        context = os.memfd_create("context", os.MFD_ALLOW_SEALING)
        os.write(context, bytes(1000))
        fcntl.fcntl(context, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        request = api.ExportRequest(**sockets(uuid4(), context=True))
        client: Any = FakeClient(setting.loop, uid)
        with client.answering(request):
            setting.operations.request(client, request, [null(), context])
        return list(client.lines)

    monkeypatch.setattr(setting.exporting, "export", waits)
    assert ask(1000) == ask(1000) == []
    (line,) = ask(1000)
    assert line["error"]["code"] == "too-large"
    assert ask(1001) == []
    assert ask(0) == ask(0) == ask(0) == []
    ended[0]()
    assert ask(1000) == []
    for end in ended[1:]:
        end()
    setting.loop.run_forever()  # it has been stopped, by whoever was answered
