# SPDX-License-Identifier: MIT
"""A socket's cookie, asked for in a way that does not wait for its lock: it may be dormant, or frozen.

(A ``socket.socket`` made of a descriptor calls getsockname(2), which does.)
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket

_SO_COOKIE = 57


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def cookie_of(fd: int) -> int:
    """The number by which the kernel tells this socket from all others since it booted; OSError."""
    cookie, length = ctypes.c_uint64(), ctypes.c_uint32(8)
    if _libc().getsockopt(fd, socket.SOL_SOCKET, _SO_COOKIE, ctypes.byref(cookie), ctypes.byref(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return cookie.value
