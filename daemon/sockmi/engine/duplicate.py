"""A descriptor of ours for another process's socket: pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat

from sockmi.refusal import Code, Refusal

# The same number on every architecture (since Linux 5.6, all tables agree).
_PIDFD_GETFD = 438


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def duplicate(pid: int, fd: int) -> int:
    """Duplicate descriptor ``fd`` of process ``pid``, which must be a socket.

    The kernel checks that the caller could ptrace the process (PTRACE_MODE_ATTACH_REALCREDS). Raises
    Refusal: NO_SUCH_SOCKET or NO_PRIVILEGE.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise Refusal(Code.NO_SUCH_SOCKET, f"There is no process {pid} ({error}).") from None
    try:
        copy = _libc().syscall(_PIDFD_GETFD, pidfd, fd, 0)
        code = ctypes.get_errno()
    finally:
        os.close(pidfd)
    if copy < 0:
        if code == errno.EPERM:
            raise Refusal(
                Code.NO_PRIVILEGE, f"The kernel does not let this process take descriptors of process {pid}."
            )
        raise Refusal(
            Code.NO_SUCH_SOCKET, f"Process {pid} has no descriptor {fd} ({os.strerror(code)}); see sockmi list."
        )
    if not stat.S_ISSOCK(os.fstat(copy).st_mode):
        os.close(copy)
        raise Refusal(Code.NO_SUCH_SOCKET, f"Descriptor {fd} of process {pid} is not a socket.")
    return copy
