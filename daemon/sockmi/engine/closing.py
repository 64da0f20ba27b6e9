# SPDX-License-Identifier: MIT
"""Closes descriptors of sockets that others have had: none of them can keep this process waiting.

With SO_LINGER, which is the owner's affair, close(2) waits until all is acknowledged, if the last descriptor
is ours: for as long as the owner, or his peer, likes. ``os.close`` is for sockets that nobody else has had.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Collection
from queue import SimpleQueue
from typing import Any

from sockmi.native import library


@functools.cache
def _native() -> Any:
    lib = library()
    lib.sockmi_close.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_size_t]
    lib.sockmi_close.restype = None
    return lib


def close_all(descriptors: Collection[int]) -> None:
    """Close them; what SO_LINGER says is not waited for, and stays as it is."""
    if descriptors:
        _native().sockmi_close((ctypes.c_int * len(descriptors))(*descriptors), len(descriptors))


@functools.cache
def _aside() -> SimpleQueue[int]:
    waiting: SimpleQueue[int] = SimpleQueue()

    def run() -> None:
        while True:
            with contextlib.suppress(OSError):
                os.close(waiting.get())

    threading.Thread(target=run, name="closing", daemon=True).start()
    return waiting


def close_aside(descriptors: Collection[int]) -> None:
    """Close what is no socket, in a thread: who serves its file system (FUSE) may keep close(2) for ever."""
    for one in descriptors:
        _aside().put(one)
