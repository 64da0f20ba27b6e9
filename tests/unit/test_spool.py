# SPDX-License-Identifier: MIT
"""The spool keeps promised images, whole or not at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from uuid import uuid4

import pytest

from sockmi.spool import Spool, SpoolError, chunk_in


def test_round_trip_and_removal(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    chunk, images = str(uuid4()), {uuid4(): b"one", uuid4(): b"", uuid4(): bytes(100_000)}
    spool.write(chunk, images)
    again = Spool(tmp_path / "spool")
    assert again.chunks() == [chunk]
    assert again.read(chunk) == images
    again.remove(chunk)
    again.remove(chunk)
    assert again.chunks() == []
    with pytest.raises(KeyError):
        again.read(chunk)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    chunk = str(uuid4())
    spool.write(chunk, {uuid4(): b"twelve bytes"})
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"other", whole[:-1], whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(SpoolError, match=str(path)):
            spool.read(chunk)


def test_an_unfinished_write_is_not_a_promise(tmp_path: Path) -> None:
    (tmp_path / f"{uuid4()}.new").write_bytes(b"half")
    spool = Spool(tmp_path)
    spool.write("a-0", {uuid4(): b"image"})
    [path] = tmp_path.iterdir()
    path.write_bytes(bytes(8) + path.read_bytes()[8:])  # all but the magic, which comes last
    assert Spool(tmp_path).chunks() == []
    assert list(tmp_path.iterdir()) == []


def test_files_are_used_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.provide()
    [slot] = tmp_path.iterdir()
    before = slot.stat().st_ino
    long, short = {uuid4(): bytes(5000)}, {uuid4(): b"short"}
    for number, images in enumerate((long, short, long)):
        spool.write(f"a-{number}", images)
        assert spool.read(f"a-{number}") == images
        assert [chunk_in(path) for path in tmp_path.iterdir()] == spool.chunks() == [f"a-{number}"]
        spool.remove(f"a-{number}")
        assert [chunk_in(path) for path in tmp_path.iterdir()] == [None]
        assert (slot.stat().st_ino, slot.stat().st_size) == (before, 0)
        spool.provide()
    assert list(tmp_path.iterdir()) == [slot]
    assert Spool(tmp_path).chunks() == list(tmp_path.iterdir()) == []


def test_many_are_kept_and_few_files_stay(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    images = {f"{number}-0": {uuid4(): bytes([number])} for number in range(100)}
    for chunk, image in images.items():
        spool.write(chunk, image)
    assert sum(map(_is_slot, Path("/proc/self/fd").iterdir())) < 80
    again = Spool(tmp_path)
    assert {chunk: again.read(chunk) for chunk in again.chunks()} == images
    again.write("new-0", images["7-0"])
    for chunk in images:
        again.remove(chunk)
    assert again.chunks() == ["new-0"]
    assert len(list(tmp_path.iterdir())) == 1
    for chunk in images:
        spool.remove(chunk)


def test_a_file_that_somebody_has_removed_is_not_written_to(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.provide()
    [slot] = tmp_path.iterdir()
    slot.unlink()
    images = {uuid4(): b"image"}
    spool.write("a-0", images)
    assert Spool(tmp_path).read("a-0") == images


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    write = os.pwritev
    images = {uuid4(): b"a first image", uuid4(): b"a second image"}

    def partly(fd: int, parts: list[bytes], at: int) -> int:
        return write(fd, [b"".join(parts)[:11]], at)

    def fails(_fd: int, _content: bytes, _at: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", partly)
        spool.write("a-0", images)
        patched.setattr(os, "pwrite", fails)
        with pytest.raises(OSError, match="No space"):
            spool.write("a-1", images)
        spool.provide()
    assert spool.chunks() == Spool(tmp_path).chunks() == ["a-0"]
    assert spool.read("a-0") == images


def test_what_an_earlier_release_has_spooled(tmp_path: Path) -> None:
    """One file per chunk, named after it."""
    identity, path = uuid4(), tmp_path / "a-0.images"
    path.write_bytes(b"SMSPOOL1" + struct.pack("<16sQ", identity.bytes, 5) + b"image")
    spool = Spool(tmp_path)
    assert spool.chunks() == ["a-0"]
    assert spool.read("a-0") == {identity: b"image"}
    spool.remove("a-0")
    assert list(tmp_path.iterdir()) == []


def _is_slot(fd: Path) -> bool:
    try:
        return fd.readlink().suffix == ".slot"
    except OSError:
        return False
