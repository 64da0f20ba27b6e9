# SPDX-License-Identifier: MIT
"""A file that records are appended to, until a reader has taken them in.

To append costs one write(2), a tenth of what a database takes, and it survives the process. Each record
has its length and checksum, so a last one that was cut off is known and left out: its ``append`` has not
returned, and nobody relies on it. When all is taken in the file begins anew, under the next generation: so
a reader's note of how far it has come (``Mark``) cannot be mistaken for one about what the file holds now.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct("<8sQ")  # magic, generation
_RECORD = struct.Struct("<II")  # length, checksum
_MAGIC = b"SMEVENT1"
_ANEW_BYTES = 1 << 20  # a file of at least this size begins anew when all of it is taken in
_READ_BYTES = 1 << 18


class Mark(NamedTuple):
    """How far a reader has come: up to byte ``offset`` of a generation, and all of those before."""

    generation: int
    offset: int


class AppendLog:
    """One writer, which is the reader too. All calls are synchronous and short."""

    def __init__(self, path: Path, taken: Mark) -> None:
        """Open or create; ``taken``: the reader's last note.

        OSError if it cannot be opened, ValueError if it is something else.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            header, size = os.pread(self._fd, _HEADER.size, 0), os.fstat(self._fd).st_size
            whole = len(header) == _HEADER.size
            magic, generation = _HEADER.unpack(header) if whole else (_MAGIC, -1)
            if magic != _MAGIC:
                raise ValueError("not a file of appended records")
            # Shorter than what was taken in: the host has lost its power, and the disk has an older state.
            if (generation, size) < taken:
                self._begin(max(generation, taken.generation) + 1)
            else:
                self.generation = generation
                self._taken = taken.offset if generation == taken.generation else _HEADER.size
                self._end = max((end for _unused, end in self._records()), default=self._taken)
                os.ftruncate(self._fd, self._end)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def mark(self) -> Mark:
        """How far the reader has come."""
        return Mark(self.generation, self._taken)

    def close(self) -> None:
        """What is not taken in stays."""
        os.close(self._fd)

    def append(self, content: bytes) -> None:
        """When the call returns it survives the process; OSError (say, ENOSPC) with nothing appended."""
        parts = [_RECORD.pack(len(content), self._checksum(content)), content]
        length = _RECORD.size + len(content)
        try:
            written = os.pwritev(self._fd, parts, self._end)
            while written < length:
                written += os.pwrite(self._fd, b"".join(parts)[written:], self._end + written)
        except BaseException:
            os.ftruncate(self._fd, self._end)
            raise
        self._end += length

    def waiting(self) -> Iterator[tuple[bytes, Mark]]:
        """What is not taken in yet, in order, each with the mark of its end."""
        for content, end in self._records():
            yield content, Mark(self.generation, end)

    def take(self, mark: Mark) -> None:
        """All up to a mark of ``waiting`` is taken in, and the reader has noted that safely."""
        self._taken = mark.offset
        if self._taken == self._end >= _ANEW_BYTES:
            self._begin(self.generation + 1)

    def _begin(self, generation: int) -> None:
        """The header comes first: what is still behind it then is of an earlier generation, and no record."""
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, generation), 0)
        self.generation = generation
        self._taken = self._end = _HEADER.size
        os.ftruncate(self._fd, self._end)

    def _checksum(self, content: bytes) -> int:
        """Never that of another generation, nor 0 for nothing."""
        return zlib.crc32(content, self.generation & 0xFFFFFFFF)

    def _records(self) -> Iterator[tuple[bytes, int]]:
        """Whole records from where the reader has come to, and the offset of the end of each."""
        at, size = self._taken, _READ_BYTES
        while block := os.pread(self._fd, size, at):
            begin = length = 0
            while len(block) - begin >= _RECORD.size:
                length, checksum = _RECORD.unpack_from(block, begin)
                content = block[begin + _RECORD.size : begin + _RECORD.size + length]
                if len(content) < length or self._checksum(content) != checksum:
                    break
                begin += _RECORD.size + length
                yield content, at + begin
            at += begin
            if begin:
                size = _READ_BYTES
            elif size < _RECORD.size + length <= os.fstat(self._fd).st_size - at:
                size = _RECORD.size + length
            else:
                return
