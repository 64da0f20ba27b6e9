# SPDX-License-Identifier: MIT
"""Images that this host has promised to be able to restore: one file per chunk.

To make and to remove files costs more than to write them, and it stands in the freeze: so there are
**slots**, files that are used again. One without the magic at its begin holds nothing: that is written
last, and before PREPARED is said. It is emptied when every socket of the chunk is live with its
application or discarded. It survives the daemon, which is all that is asked of it: a host that loses
power has lost its connections with it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

_MAGIC = b"SMSPOOL2"
_HEAD = struct.Struct("<HQ")  # after the magic: bytes of the chunk's name, which follows, and of all entries
_ENTRY = struct.Struct("<16sQ")
_OLD_MAGIC = b"SMSPOOL1"  # entries follow; the chunk's name was the file's
_IOV_MAX = 1024
_FREE_MAX = 8  # slots that are kept for what will come, each open
_OPEN_MAX = 64  # slots in use that are kept open: others are removed in the end


class SpoolError(Exception):
    """A spool file is damaged; the text names it."""


@dataclass(slots=True)
class _Slot:
    path: Path
    fd: int  # -1: not open


class Spool:
    """The images of prepared chunks, by chunk name (letters, digits, dashes) and migration id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._used: dict[str, _Slot] = {}
        self._free: list[_Slot] = []
        self._open = 0  # of those in use
        self._number = 0
        for path in sorted(directory.iterdir()):
            if path.suffix == ".slot" and path.stem.isdecimal():
                self._number = max(self._number, int(path.stem) + 1)
            if (name := chunk_in(path)) is None:
                path.unlink()
            else:
                self._used[name] = _Slot(path, -1)

    def provide(self) -> None:
        """Have a slot ready for what will come. It costs; a full disk is told by ``write``."""
        if not self._free:
            with contextlib.suppress(OSError):
                self._free.append(self._make())

    def write(self, chunk: str, images: Mapping[UUID, bytes]) -> None:
        """Store the images of a chunk; raise OSError (say, ENOSPC) with nothing stored."""
        name = chunk.encode()
        parts = [b"", name]
        for migration_id, image in images.items():
            parts += (_ENTRY.pack(migration_id.bytes, len(image)), image)
        length = sum(map(len, parts)) - len(name)
        parts[0] = _HEAD.pack(len(name), length)
        slot = self._take()
        try:
            if len(parts) > _IOV_MAX:
                parts = [b"".join(parts)]
            end = len(_MAGIC) + _HEAD.size + len(name) + length
            at = len(_MAGIC) + os.pwritev(slot.fd, parts, len(_MAGIC))
            if at < end:
                rest = memoryview(b"".join(parts))
                while at < end:
                    at += os.pwrite(slot.fd, rest[at - len(_MAGIC) :], at)
            os.pwrite(slot.fd, _MAGIC, 0)
        except BaseException:
            self._drop(slot)
            raise
        self._used[chunk] = slot
        if self._open < _OPEN_MAX:
            self._open += 1
        else:
            os.close(slot.fd)
            slot.fd = -1

    def read(self, chunk: str) -> dict[UUID, bytes]:
        """The images of a chunk; KeyError if there are none, SpoolError if the file is damaged."""
        path = self._used[chunk].path
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise KeyError(chunk) from None
        offset, end = len(_OLD_MAGIC), len(content)
        if content.startswith(_MAGIC) and len(content) >= len(_MAGIC) + _HEAD.size:
            name, length = _HEAD.unpack_from(content, len(_MAGIC))
            offset = len(_MAGIC) + _HEAD.size + name
            end = offset + length
        elif not content.startswith(_OLD_MAGIC):
            raise SpoolError(f"{path}: not a spool file")
        images: dict[UUID, bytes] = {}
        while offset < end:
            if offset + _ENTRY.size > min(end, len(content)):
                raise SpoolError(f"{path}: cut off at byte {offset}")
            identity, length = _ENTRY.unpack_from(content, offset)
            offset += _ENTRY.size
            if offset + length > min(end, len(content)):
                raise SpoolError(f"{path}: cut off at byte {offset}")
            images[UUID(bytes=identity)] = content[offset : offset + length]
            offset += length
        return images

    def remove(self, chunk: str) -> None:
        """The inverse of ``write``; absent ones are fine."""
        slot = self._used.pop(chunk, None)
        if slot is None:
            return
        if slot.fd >= 0:
            self._open -= 1
        if slot.fd < 0 or len(self._free) >= _FREE_MAX:
            self._drop(slot)
        else:
            os.ftruncate(slot.fd, 0)
            self._free.append(slot)

    def chunks(self) -> list[str]:
        """The chunks that have images here."""
        return list(self._used)

    def _take(self) -> _Slot:
        while self._free:
            slot = self._free.pop()
            if os.fstat(slot.fd).st_nlink:
                return slot
            os.close(slot.fd)  # somebody has removed the file
        return self._make()

    def _make(self) -> _Slot:
        path = self._directory / f"{self._number}.slot"
        self._number += 1
        return _Slot(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    @staticmethod
    def _drop(slot: _Slot) -> None:
        if slot.fd >= 0:
            os.close(slot.fd)
        slot.path.unlink(missing_ok=True)


def chunk_in(path: Path) -> str | None:
    """The name of the chunk whose images are in a file of the spool; None: nobody's."""
    if path.suffix == ".images":
        return path.stem
    if path.suffix != ".slot":
        return None
    with path.open("rb") as file:
        head = file.read(len(_MAGIC) + _HEAD.size)
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _HEAD.size:
            return None
        return file.read(_HEAD.unpack_from(head, len(_MAGIC))[0]).decode(errors="replace")
