# SPDX-License-Identifier: MIT
"""Pseudo-random bytes that can be made, and checked, at any offset."""

from __future__ import annotations

import hashlib
from functools import lru_cache

BLOCK_BYTES = 1 << 16


class Corruption(Exception):
    """A byte of a stream is lost, doubled or changed; the text says where."""


class Pattern:
    """An endless stream, given by a seed and a name: block i is SHAKE128(seed, name, i)."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.name = name

    def read(self, offset: int, count: int) -> bytes:
        """The bytes from ``offset`` to ``offset + count``."""
        parts = []
        while count > 0:
            index, start = divmod(offset, BLOCK_BYTES)
            part = _block(self.seed, self.name, index)[start : start + count]
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self, offset: int, data: bytes) -> None:
        """Raise Corruption unless ``data`` is what stands at ``offset``."""
        expected = self.read(offset, len(data))
        if data != expected:
            wrong = next(i for i, (got, want) in enumerate(zip(data, expected, strict=True)) if got != want)
            raise Corruption(
                f"stream {self.name} (seed {self.seed}): byte {offset + wrong} is {data[wrong]:#04x}, "
                f"not {expected[wrong]:#04x}{self._elsewhere(data[wrong : wrong + 64], offset + wrong)}"
            )

    def sha256(self, count: int) -> str:
        """SHA-256 of the first ``count`` bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for offset in range(0, count, BLOCK_BYTES):
            digest.update(self.read(offset, min(BLOCK_BYTES, count - offset)))
        return digest.hexdigest()

    def _elsewhere(self, data: bytes, offset: int, reach: int = 1 << 20) -> str:
        """Where the wrong bytes belong: a shift tells loss or repetition from change."""
        start = max(0, offset - reach)
        found = self.read(start, 2 * reach).find(data) if len(data) >= 8 else -1
        if found < 0:
            return ""
        shift = start + found - offset
        where = "later (lost)" if shift > 0 else "earlier (repeated)"
        return f"; what came belongs {abs(shift)} bytes {where}"


@lru_cache(maxsize=64)
def _block(seed: int, name: str, index: int) -> bytes:
    return hashlib.shake_128(f"{seed}/{name}/{index}".encode()).digest(BLOCK_BYTES)
