# SPDX-License-Identifier: MIT
"""Descriptors of the caller, and contexts as sealed memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket

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


def socket_of(fd: int) -> socket.socket:
    """A socket object for a duplicate of ``fd``."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


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


def check_protocol(fd: int, what: str) -> None:
    """Raise SockMiError unless it is a TCP socket; ``what`` names it."""
    try:
        with socket_of(fd) as view:
            protocol = view.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    except OSError as error:
        raise SockMiError(error.errno or errno.EIO, f"{what}: {error.strerror}") from None
    if protocol != socket.IPPROTO_TCP:
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
