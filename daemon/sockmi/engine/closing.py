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


@functools.cache
def _native() -> Any:
    lib = library()
    for function in (lib.sockmi_close, lib.sockmi_close_aside):
        function.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_size_t]
        function.restype = None
    return lib


def close_all(descriptors: Collection[int]) -> None:
    """Close them; what SO_LINGER says is not waited for, and stays as it is."""
    if descriptors:
        _native().sockmi_close((ctypes.c_int * len(descriptors))(*descriptors), len(descriptors))


def close_aside(descriptors: Collection[int]) -> None:
    """Close what is no socket, in threads: who serves its file system (FUSE) may keep close(2) for ever.

    When this returns they are in our table no more, and no process that we begin has them.
    """
    if descriptors:
        _native().sockmi_close_aside((ctypes.c_int * len(descriptors))(*descriptors), len(descriptors))
