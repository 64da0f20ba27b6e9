# SPDX-License-Identifier: MIT
"""Loads the engine's C library, once.

The parts that call it declare the prototypes of the functions they use, beside their use.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from pathlib import Path

_M_ARENA_MAX = -8  # malloc.h
_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def library() -> ctypes.CDLL:
    """libsockmi-engine.so: from ``$SOCKMI_ENGINE_LIBRARY``, the package, or the source tree's build.

    Raises FileNotFoundError with the places that were tried. Calls keep errno (``ctypes.get_errno``).
    """
    named = os.environ.get("SOCKMI_ENGINE_LIBRARY")
    places = (
        [Path(named)]
        if named
        else [
            _PACKAGE / "libsockmi-engine.so",
            _PACKAGE.parent / "libsockmi" / "build" / "libsockmi-engine.so",
        ]
    )
    for place in places:
        if place.is_file():
            return ctypes.CDLL(str(place), use_errno=True)
    tried = ", ".join(map(str, places))
    raise FileNotFoundError(
        f"libsockmi-engine.so is not at {tried}; build it with `make -C daemon/libsockmi`"
    )


def buffer_of(length: int) -> mmap.mmap:
    """``length`` bytes, of which only those that have been written take memory."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def one_heap() -> None:
    """Threads take their memory where the others do (mallopt(3)), not each from an arena of its own."""
    with contextlib.suppress(AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give memory that is free, but not at the end of the heap, back to the kernel (malloc_trim(3))."""
    with contextlib.suppress(AttributeError):  # a C library that is not glibc
        ctypes.CDLL(None).malloc_trim(0)
