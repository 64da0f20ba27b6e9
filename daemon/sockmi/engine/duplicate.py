# SPDX-License-Identifier: MIT
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


def pidfd_getfd(pid: int, fd: int) -> int:
    """Duplicate descriptor ``fd`` of process ``pid``; close-on-exec.

    The kernel checks that the caller could ptrace the process (PTRACE_MODE_ATTACH_REALCREDS).
    Raises OSError: ESRCH, EBADF, EPERM.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(_libc().syscall(_PIDFD_GETFD, pidfd, fd, 0))
        if copy < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return copy
    finally:
        os.close(pidfd)


class NoDescriptors(Refusal):
    """This process, or the host, has no descriptor left: that may pass."""


def duplicate(pid: int, fd: int) -> int:
    """As ``pidfd_getfd``, for a socket; raises Refusal: NO_SUCH_SOCKET, NO_PRIVILEGE or NoDescriptors."""
    try:
        copy = pidfd_getfd(pid, fd)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EPERM:
            message = f"The kernel does not let this process take descriptors of process {pid}."
            raise Refusal(Code.NO_PRIVILEGE, message) from None
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            message = (
                f"This daemon could not take descriptor {fd} of process {pid} ({error}); move fewer sockets "
                "at a time, or raise LimitNOFILE of its unit."
            )
            raise NoDescriptors(Code.INTERNAL, message) from None
        message = f"There is no descriptor {fd} of a process {pid} ({error}); see sockmi list."
        raise Refusal(Code.NO_SUCH_SOCKET, message) from None
    if not stat.S_ISSOCK(os.fstat(copy).st_mode):
        os.close(copy)
        raise Refusal(Code.NO_SUCH_SOCKET, f"Descriptor {fd} of process {pid} is not a socket.")
    return copy
