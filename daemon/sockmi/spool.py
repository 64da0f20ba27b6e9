# SPDX-License-Identifier: MIT
"""Images that this host has promised to be able to restore: one file per chunk.

A file is written whole before PREPARED is said, renamed into place, and removed when every socket
of the chunk is live with its application or discarded. It survives the daemon, which is all that
is asked of it: a host that loses power has lost its connections with it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

_MAGIC = b"SMSPOOL1"
_ENTRY = struct.Struct("<16sQ")


class SpoolError(Exception):
    """A spool file is damaged; the text names it."""


class Spool:
    """The images of prepared chunks, by chunk name (letters, digits, dashes) and migration id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in directory.glob("*.new"):
            leftover.unlink()

    def write(self, chunk: str, images: Mapping[UUID, bytes]) -> None:
        """Store the images of a chunk; raise OSError (say, ENOSPC) with nothing stored."""
        target = self._path(chunk)
        unfinished = target.with_suffix(".new")
        parts: list[bytes] = [_MAGIC]
        for migration_id, image in images.items():
            parts += (_ENTRY.pack(migration_id.bytes, len(image)), image)
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                content = memoryview(b"".join(parts))
                while content:
                    content = content[os.write(descriptor, content) :]
            finally:
                os.close(descriptor)
            unfinished.rename(target)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, chunk: str) -> dict[UUID, bytes]:
        """The images of a chunk; KeyError if there are none, SpoolError if the file is damaged."""
        path = self._path(chunk)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise KeyError(chunk) from None
        if not content.startswith(_MAGIC):
            raise SpoolError(f"{path}: not a spool file")
        images: dict[UUID, bytes] = {}
        offset = len(_MAGIC)
        while offset < len(content):
            if offset + _ENTRY.size > len(content):
                raise SpoolError(f"{path}: cut off at byte {offset}")
            identity, length = _ENTRY.unpack_from(content, offset)
            offset += _ENTRY.size
            if offset + length > len(content):
                raise SpoolError(f"{path}: cut off at byte {offset}")
            images[UUID(bytes=identity)] = content[offset : offset + length]
            offset += length
        return images

    def remove(self, chunk: str) -> None:
        """The inverse of ``write``; absent files are fine."""
        with contextlib.suppress(FileNotFoundError):
            self._path(chunk).unlink()

    def chunks(self) -> list[str]:
        """The chunks that have a file."""
        return [path.stem for path in self._directory.glob("*.images")]

    def _path(self, chunk: str) -> Path:
        return self._directory / f"{chunk}.images"
