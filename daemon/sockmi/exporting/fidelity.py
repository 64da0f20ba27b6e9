# SPDX-License-Identifier: MIT
"""The fidelity report of a migration: what both engines say, put together."""

from __future__ import annotations

import functools
from typing import Any


def merge(record: dict[str, Any], fidelity: Any) -> None:
    """What either engine had to approximate or reset is no longer carried."""
    mine = record.get("fidelity") or {"carried": [], "approximated": [], "reset": []}
    names = "carried", "approximated", "reset"
    merged = _merged(*(tuple(mine[name]) + tuple(getattr(fidelity, name)) for name in names))
    record["fidelity"] = {name: list(one) for name, one in zip(names, merged, strict=True)}


@functools.lru_cache(maxsize=256)
def _merged(
    carried: tuple[str, ...], approximated: tuple[str, ...], reset: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The worst that is said of each; connections of one kind have the same."""
    parts = {*carried} - {*approximated, *reset}, {*approximated} - {*reset}, {*reset}
    said, less, least = (tuple(sorted(one)) for one in parts)
    return said, less, least
