"""The spool keeps promised images, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from sockmi.spool import Spool, SpoolError


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
    path = tmp_path / f"{chunk}.images"
    whole = path.read_bytes()
    for damaged in (b"", b"other", whole[:-1], whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(SpoolError, match=str(chunk)):
            spool.read(chunk)


def test_an_unfinished_write_is_not_a_promise(tmp_path: Path) -> None:
    (tmp_path / f"{uuid4()}.new").write_bytes(b"half")
    assert Spool(tmp_path).chunks() == []
    assert list(tmp_path.iterdir()) == []
