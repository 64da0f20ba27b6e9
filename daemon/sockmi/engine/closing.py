# SPDX-License-Identifier: MIT
"""Closes descriptors of sockets that others have had: none of them can keep this process waiting.

With SO_LINGER, which is the owner's affair, close(2) waits until all is acknowledged, if the last descriptor
is ours: for as long as the owner, or his peer, likes. ``os.close`` is for sockets that nobody else has had.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection
from typing import Any

from sockmi.native import library

NOBODY = 0xFFFFFFFF  # (uid_t)-1, which is no user's

# A message may bring api.DESCRIPTORS_MAX more: no user alone reaches the second.
_ASIDE_MAX_OF_ONE = 8
_ASIDE_MAX = 512


@functools.cache
def _native() -> Any:
    lib = library()
    lib.sockmi_close.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_size_t]
    lib.sockmi_close_aside.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_size_t, ctypes.c_uint32]
    lib.sockmi_close.restype = lib.sockmi_close_aside.restype = None
    lib.sockmi_closing_aside.argtypes = [ctypes.c_uint32, ctypes.POINTER(ctypes.c_size_t)]
    lib.sockmi_closing_aside.restype = ctypes.c_size_t
    return lib


def close_all(descriptors: Collection[int]) -> None:
    """Close them; what SO_LINGER says is not waited for, and stays as it is."""
    if descriptors:
        _native().sockmi_close((ctypes.c_int * len(descriptors))(*descriptors), len(descriptors))


def close_aside(descriptors: Collection[int], whose: int = NOBODY) -> None:
    """Close what is no socket, in threads: who serves its file system (FUSE) may keep close(2) for ever.

    When this returns they are in our table no more, and no process that we begin has them. ``whose``: the
    user for whom they count, see ``too_many_aside``.
    """
    if descriptors:
        array = (ctypes.c_int * len(descriptors))(*descriptors)
        _native().sockmi_close_aside(array, len(descriptors), whose)


def too_many_aside(whose: int) -> bool:
    """Whether so many of a user's are still being closed that no more may come of him.

    Each has a thread. Root need not suffer for what others do.
    """
    everyone = ctypes.c_size_t()
    own = _native().sockmi_closing_aside(whose, ctypes.byref(everyone))
    return own >= _ASIDE_MAX_OF_ONE or (whose != 0 and everyone.value >= _ASIDE_MAX)
