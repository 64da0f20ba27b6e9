# SPDX-License-Identifier: MIT
"""Appended records come back whole and in order, whatever was cut off; none is taken in twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sockmi import appendlog
from sockmi.appendlog import AppendLog, Mark

NOTHING = Mark(0, 0)


def contents(log: AppendLog) -> list[bytes]:
    return [content for content, _unused in log.waiting()]


def test_what_is_appended_waits_until_it_is_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    assert path.stat().st_mode & 0o777 == 0o600
    assert contents(log) == []
    large = os.urandom(appendlog._READ_BYTES * 2 + 7)
    for content in (b"one", b"", large, b"four"):
        log.append(content)
    assert contents(log) == [b"one", b"", large, b"four"]
    (_unused, _unused), (_unused, second), *_unused = log.waiting()
    log.take(second)
    assert log.mark == second
    assert contents(log) == [large, b"four"]
    log.close()
    assert contents(AppendLog(path, second)) == [large, b"four"]


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    log.append(b"first")
    log.append(b"second")
    log.close()
    whole = path.read_bytes()
    for length in range(len(whole) - 13, len(whole)):
        path.write_bytes(whole[:length])
        log = AppendLog(path, NOTHING)
        assert contents(log) == [b"first"]
        log.append(b"third")
        assert contents(log) == [b"first", b"third"]
        log.close()
    path.write_bytes(whole[:-1] + b"!")
    assert contents(AppendLog(path, NOTHING)) == [b"first"]
    for garbage in (b"\0" * 7, b"\xff" * 20):
        path.write_bytes(whole + garbage)
        assert contents(AppendLog(path, NOTHING)) == [b"first", b"second"]


def test_zeros_are_no_records(tmp_path: Path) -> None:
    """A host that lost its power may have a tail of zeros."""
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    log.append(b"first")
    log.close()
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert contents(AppendLog(path, NOTHING)) == [b"first"]


def test_it_begins_anew_when_all_is_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appendlog, "_ANEW_BYTES", 100)
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    log.append(b"a" * 60)
    log.append(b"b" * 60)
    (_unused, first), (_unused, second) = log.waiting()
    log.take(first)
    assert log.mark.generation == first.generation
    log.take(second)
    assert log.mark.generation == first.generation + 1
    assert path.stat().st_size < 100
    log.append(b"c")
    assert contents(log) == [b"c"]
    # Whatever of its notes the reader has, it gets what it has not taken in.
    log.close()
    for taken in (first, second, log.mark):
        assert contents(AppendLog(path, taken)) == [b"c"]


def test_what_the_reader_has_taken_in_does_not_come_again(tmp_path: Path) -> None:
    """The host lost its power: the file is older than the reader's note of it."""
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    log.append(b"first")
    log.close()
    log = AppendLog(path, Mark(log.mark.generation, path.stat().st_size + 1))
    assert contents(log) == []
    log.append(b"a long record, so that the file is longer than it was before")
    taken = log.mark
    log.close()
    assert contents(AppendLog(path, taken)) != []
    log = AppendLog(path, Mark(taken.generation + 7, 16))
    assert contents(log) == []
    assert log.mark.generation == taken.generation + 8


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events"
    log = AppendLog(path, NOTHING)
    log.append(b"first")
    size = path.stat().st_size
    write = os.pwritev

    def partly(fd: int, parts: list[bytes], at: int) -> int:
        return write(fd, [b"".join(parts)[:5]], at)

    def fails(_fd: int, _content: bytes, _at: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", partly)
        log.append(b"second, in two pieces")
        patched.setattr(os, "pwrite", fails)
        with pytest.raises(OSError, match="No space"):
            log.append(b"third")
    assert contents(log) == [b"first", b"second, in two pieces"]
    assert path.stat().st_size == size + 8 + 21
    log.append(b"fourth")
    assert contents(log)[2:] == [b"fourth"]


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_bad_disk_when_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever fails, or is the last thing that this process does: the file can be read, and goes on."""
    monkeypatch.setattr(appendlog, "_ANEW_BYTES", 100)
    path = tmp_path / "events"

    def fails(*_unused: object) -> None:
        raise OSError(5, "Input/output error")

    def failing(step: Callable[[], object]) -> None:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
            patched.setattr(os, call, fails)
            step()

    failing(lambda: AppendLog(path, NOTHING))
    log = AppendLog(path, NOTHING)
    log.append(b"a" * 200)
    ((_unused, taken),) = log.waiting()
    failing(lambda: log.take(taken))
    assert contents(AppendLog(path, taken)) == []
    log.append(b"b")
    assert contents(log) == contents(AppendLog(path, taken)) == [b"b"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(b"SQLite format 3 and more")
    with pytest.raises(ValueError, match="not a file of appended records"):
        AppendLog(path, NOTHING)
