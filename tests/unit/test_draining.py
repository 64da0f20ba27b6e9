# SPDX-License-Identifier: MIT
"""A drain tells of every socket that was selected: moved, refused and why, or closed meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi import api, draining
from sockmi.addresses import Endpoint
from sockmi.draining import Drain
from sockmi.engine import duplicate as duplicate_module
from sockmi.engine.listing import Holder, ListedSocket
from sockmi.engine.owners import Holders, Owners
from sockmi.exporting import Selected
from sockmi.limits import is_spare
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found
from sockmi.shell import why

LOCAL, REMOTE = Endpoint.parse("192.0.2.1:80"), Endpoint.parse("192.0.2.9:4000")


def found(inode: int, pid: int = 510, fd: int | None = None) -> Found:
    listed = ListedSocket(inode, inode, socket.AF_INET, "ESTABLISHED", LOCAL, REMOTE, 0, 0, 0, ())
    return Found(listed, Holder(pid, inode if fd is None else fd, "server"), None)


class Exporting:
    """Moves whatever it gets, later; ``rooms``: how many descriptors it can have."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.held = 0
        self.moved: list[Selected] = []
        self.fail: Exception | None = None

    def export(self, selection: list[Selected], *, done: Any, progress: Any, **_unused: Any) -> bytes:
        if self.fail is not None:
            raise self.fail
        self.held += len(selection)

        def end() -> None:
            self.held -= len(selection)
            self.moved += selection
            for one in selection:
                progress({"outcome": "moved", "pid": one.pid, "fd": one.fd})
            done([])

        self._loop.call_later(0.02, end)
        return b""

    def turn_away(self, refused: list[tuple[dict[str, Any], Refusal]]) -> list[dict[str, Any]]:
        return [record | {"outcome": "refused", "refusal": why(refusal)} for record, refusal in refused]


class Setting:
    """A drain whose descriptors and holders are as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = asyncio.new_event_loop()
        self.exporting = Exporting(self.loop)
        self.owners = Owners()
        self.duplicate: Callable[[int, int], int] = lambda pid, fd: fd
        self.holders: Holders = {}
        self.kernel: set[int] = set()
        self.lines: list[dict[str, Any]] = []
        self.failure: Exception | None = None

        def duplicate(pid: int, fd: int, inode: int) -> int:
            return self.duplicate(pid, fd)

        monkeypatch.setattr(draining, "duplicate", duplicate)
        monkeypatch.setattr(draining, "find_holders", lambda inodes: (self.holders, set()))

    def drain(self, rows: list[Found], **fields: Any) -> dict[str, Any]:
        """Run it to its end; the progress at the end."""
        daemon: Any = SimpleNamespace(
            loop=self.loop,
            exporting=SimpleNamespace(
                admission=self.exporting,
                exports=self.exporting,
                descriptors=SimpleNamespace(
                    passed_on=lambda lost: [one.inode in self.kernel for one in lost]
                ),
            ),
            importing=SimpleNamespace(onward=SimpleNamespace(select=lambda _wanted: ())),
            host_name="a",
            shell=SimpleNamespace(engine=SimpleNamespace(owners=self.owners)),
        )

        def report(line: dict[str, Any]) -> None:
            self.lines.append(line)
            if not line["more"]:
                self.loop.stop()

        def fail(error: Exception) -> None:
            self.failure = error
            self.loop.stop()

        request = api.DrainRequest(**fields)
        self.loop.call_soon(Drain(daemon, request, (None, None), report, fail).start, rows, [])
        self.loop.call_later(20, self.loop.stop)
        self.loop.run_forever()
        return dict(self.lines[-1]["progress"])

    @property
    def refusals(self) -> list[str]:
        records = [one for line in self.lines for one in line["migrations"]]
        return [one["refusal"]["code"] for one in records if one.get("refusal")]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    one = Setting(monkeypatch)
    yield one
    one.loop.close()


def counts(progress: dict[str, Any]) -> tuple[int, ...]:
    return tuple(progress[name] for name in ("selected", "moved", "refused", "closed", "remaining"))


def raising(code: Code) -> Callable[[int, int], int]:
    def duplicate(pid: int, fd: int) -> int:
        raise Refusal(code, "No.")

    return duplicate


def test_what_may_not_be_taken_is_refused(setting: Setting) -> None:
    setting.duplicate = raising(Code.NO_PRIVILEGE)
    assert counts(setting.drain([found(1), found(2)])) == (2, 0, 2, 0, 0)
    assert setting.refusals == ["no-privilege"] * 2


def test_what_nobody_holds_any_more_is_closed(setting: Setting) -> None:
    setting.duplicate = raising(Code.NO_SUCH_SOCKET)
    assert counts(setting.drain([found(1), found(2)])) == (2, 0, 0, 2, 0)


def test_what_is_on_its_way_between_two_processes_is_not_closed(setting: Setting) -> None:
    setting.duplicate = raising(Code.NO_SUCH_SOCKET)
    setting.kernel = {2}
    assert counts(setting.drain([found(1), found(2)])) == (2, 0, 1, 1, 0)
    assert setting.refusals == ["changed"]


def test_a_socket_that_was_passed_on_is_moved(setting: Setting) -> None:
    def only_the_new_holder(pid: int, fd: int) -> int:
        if pid != 600:
            raise Refusal(Code.NO_SUCH_SOCKET, "No.")
        return fd

    setting.duplicate = only_the_new_holder
    setting.holders = {1: {600: [7]}}
    assert counts(setting.drain([found(1), found(2)])) == (2, 1, 0, 1, 0)
    assert [(one.pid, one.fd) for one in setting.exporting.moved] == [(600, 7)]


def test_a_socket_that_is_held_but_cannot_be_found_is_refused(setting: Setting) -> None:
    """It is looked for once, not for ever."""
    setting.duplicate = raising(Code.NO_SUCH_SOCKET)
    setting.holders = {1: {600: [7]}, 2: {600: [-1]}}
    assert counts(setting.drain([found(1), found(2)])) == (2, 0, 2, 0, 0)
    assert sorted(setting.refusals) == ["no-such-socket", "owner-io-uring"]


def test_any_of_the_holders_will_do(setting: Setting) -> None:
    def second(pid: int, fd: int) -> int:
        if pid == 510:
            raise Refusal(Code.NO_PRIVILEGE, "No.")
        return fd

    setting.duplicate = second
    assert counts(setting.drain([found(1, 510), found(1, 511, 9)])) == (1, 1, 0, 0, 0)


def test_it_waits_for_descriptors(setting: Setting) -> None:
    def few(pid: int, fd: int) -> int:
        taken[0] += 1
        if taken[0] > 3 and setting.exporting.held:
            raise Refusal(Code.NO_DESCRIPTORS, "No.")
        return fd

    taken = [0]
    assert counts(setting.drain([found(n) for n in range(1, 11)])) == (10, 10, 0, 0, 0)


def test_it_does_not_wait_for_ever(setting: Setting) -> None:
    setting.duplicate = raising(Code.NO_DESCRIPTORS)
    assert counts(setting.drain([found(1)], timeout_s=0.3)) == (1, 0, 1, 0, 0)
    assert setting.refusals == ["no-descriptors"]


def test_a_plan_does_not_wait(setting: Setting) -> None:
    setting.duplicate = raising(Code.NO_DESCRIPTORS)
    assert counts(setting.drain([found(1)], dry_run=True)) == (1, 0, 1, 0, 0)


def test_what_goes_wrong_is_told(setting: Setting) -> None:
    setting.exporting.fail = ZeroDivisionError("oops")
    setting.drain([found(1)])
    assert setting.failure is setting.exporting.fail


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EMFILE, Code.NO_DESCRIPTORS),
        (errno.ENFILE, Code.NO_DESCRIPTORS),
        (errno.EPERM, Code.NO_PRIVILEGE),
        (errno.ESRCH, Code.NO_SUCH_SOCKET),
        (errno.EBADF, Code.NO_SUCH_SOCKET),
        (errno.ENOSYS, Code.INTERNAL),
    ],
)
def test_each_errno_has_its_refusal(monkeypatch: pytest.MonkeyPatch, number: int, code: Code) -> None:
    def fail(pid: int, fd: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(duplicate_module, "pidfd_getfd", fail)
    with pytest.raises(Refusal) as caught:
        duplicate_module.duplicate(1, 1)
    assert caught.value.code is code


def test_another_socket_under_the_same_number_is_not_it() -> None:
    with socket.socket() as one, socket.socket() as two:
        inode = os.fstat(one.fileno()).st_ino
        os.close(duplicate_module.duplicate(os.getpid(), one.fileno(), inode))
        with pytest.raises(Refusal) as caught:
            duplicate_module.duplicate(os.getpid(), two.fileno(), inode)
    assert caught.value.code is Code.NO_SUCH_SOCKET


def test_the_last_descriptors_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_spare(3)
    with socket.socket() as one:
        before = len(list(Path("/proc/self/fd").iterdir()))
        monkeypatch.setattr(duplicate_module, "is_spare", lambda descriptor: True)
        with pytest.raises(Refusal) as caught:
            duplicate_module.duplicate(os.getpid(), one.fileno())
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert caught.value.code is Code.NO_DESCRIPTORS
