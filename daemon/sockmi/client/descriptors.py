# SPDX-License-Identifier: MIT
"""Descriptors of the caller, and contexts as sealed memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import socket
import sys

from sockmi.client.errors import SockMiError, strange

CONTEXT_BYTES_MAX = 1 << 20

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def close_quietly(fd: int) -> None:
    """Close it, whatever it is."""
    with contextlib.suppress(OSError):
        os.close(fd)


def fileno(sock: socket.socket | int) -> int:
    """The descriptor of a socket, or the one given."""
    fd = sock if isinstance(sock, int) else sock.fileno()
    if fd < 0:
        raise SockMiError(errno.EBADF, "The socket is closed.")
    return fd


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def option(fd: int, level: int, name: int) -> int:
    """An option of a socket that is a number. Raises OSError.

    Not by a socket object: with a default timeout set, that would make the descriptor non-blocking, and so
    those of every process that shares it.
    """
    value, length = ctypes.c_int(0), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    if _libc().getsockopt(fd, level, name, ctypes.byref(value), ctypes.byref(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return value.value


def tcp_state(fd: int) -> int:
    """The first byte of TCP_INFO. Raises OSError."""
    return option(fd, socket.IPPROTO_TCP, socket.TCP_INFO).to_bytes(4, sys.byteorder, signed=True)[0]


def replace(fd: int, target: int) -> bool:
    """Put ``fd`` in the place of ``target``, which keeps its close-on-exec flag; False if that fails."""
    while True:
        try:
            os.dup2(fd, target, inheritable=os.get_inheritable(target))
        except OSError as error:
            if error.errno == errno.EBUSY:  # another thread is opening this number
                continue
            return False
        os.close(fd)
        return True


def copy_blocking(source: int, to: int) -> None:
    """Make ``to`` block as ``source`` does, or not."""
    try:
        os.set_blocking(to, os.get_blocking(source))
    except OSError as error:
        raise SockMiError(error.errno or errno.EIO, f"Descriptor {source}: {error.strerror}") from None


def check_protocol(fd: int, what: str, *protocols: int) -> None:
    """Raise SockMiError unless it is a TCP socket, or of these ``protocols``; ``what`` names it."""
    try:
        protocol = option(fd, socket.SOL_SOCKET, socket.SO_PROTOCOL)
    except OSError as error:
        raise SockMiError(error.errno or errno.EIO, f"{what}: {error.strerror}") from None
    if protocol not in (socket.IPPROTO_TCP, *protocols):
        raise SockMiError(errno.EPROTOTYPE, f"{what} is not a TCP socket.")


def seal_context(context: bytes | bytearray | memoryview) -> int:
    """The context as a sealed memory descriptor."""
    view = memoryview(context).cast("B")
    if len(view) > CONTEXT_BYTES_MAX:
        raise SockMiError(
            errno.EMSGSIZE, f"The context has {len(view)} bytes; at most {CONTEXT_BYTES_MAX} travel."
        )
    fd = os.memfd_create("sockmi-context", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_context(fd: int) -> bytes:
    """The content of a context's descriptor."""
    size = os.fstat(fd).st_size
    if size > CONTEXT_BYTES_MAX:
        raise strange(f"a context of {size} bytes")
    content = os.pread(fd, size, 0)
    if len(content) != size:
        raise strange("a context cannot be read")
    return content
