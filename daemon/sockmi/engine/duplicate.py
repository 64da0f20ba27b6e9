# SPDX-License-Identifier: MIT
"""A descriptor of ours for another process's socket: pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

from sockmi.engine.closing import close_all, close_aside
from sockmi.engine.files import inode_in, link_of
from sockmi.limits import is_spare
from sockmi.refusal import Code, Refusal

# The same number on every architecture (since Linux 5.6, all tables agree).
_PIDFD_GETFD = 438
_ABSENT = frozenset({errno.ESRCH, errno.EBADF, errno.EINVAL})
_FORBIDDEN = frozenset({errno.EPERM, errno.EACCES})
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class Duplicator:
    """Duplicates for what is frozen: many of few processes; the last descriptors of this process too."""

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}  # pid -> pidfd

    def duplicate(self, pid: int, fd: int, inode: int) -> int:
        """As ``duplicate``."""
        try:
            process = self._processes.get(pid, -1)
            if process < 0:
                process = self._processes[pid] = os.pidfd_open(pid)
            copy = _getfd(process, fd)
        except (OSError, OverflowError) as error:
            raise _refusal(pid, fd, error) from None
        return _checked(copy, pid, fd, inode)

    def close(self) -> None:
        """Let go of the processes."""
        while self._processes:
            os.close(self._processes.popitem()[1])


def _getfd(process: int, fd: int) -> int:
    copy = int(_libc().syscall(_PIDFD_GETFD, process, fd, 0))
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return copy


def _checked(copy: int, pid: int, fd: int, inode: int | None) -> int:
    """Close it, and raise, if it is not what was looked for."""
    found = inode_in(link_of(copy))
    if found is not None and inode in (None, found):
        return copy
    if found is None:
        close_aside([copy])
    else:
        close_all([copy])
    raise _other(pid, fd, "not a socket" if found is None else "another socket by now")


def _other(pid: int, fd: int, what: str) -> Refusal:
    return Refusal(Code.NO_SUCH_SOCKET, f"Descriptor {fd} of process {pid} is {what}; see sockmi list.")


def pidfd_getfd(pid: int, fd: int) -> int:
    """Duplicate descriptor ``fd`` of process ``pid``; close-on-exec.

    The kernel checks that the caller could ptrace the process (PTRACE_MODE_ATTACH_REALCREDS).
    Raises OSError: ESRCH, EBADF, EPERM, EMFILE, ENFILE.
    """
    pidfd = os.pidfd_open(pid)
    try:
        return _getfd(pidfd, fd)
    finally:
        os.close(pidfd)


def duplicate(pid: int, fd: int, inode: int | None = None) -> int:
    """As ``pidfd_getfd``, for a socket (with ``inode``: for that one, not one that has its number now).

    Raises Refusal: NO_SUCH_SOCKET, NO_PRIVILEGE, NO_DESCRIPTORS, or INTERNAL for what nobody expects.
    """
    if inode is None and (link := link_of(fd, pid)) and inode_in(link) is None:
        raise _other(pid, fd, "not a socket")  # of which we should have to let go again
    try:
        copy = pidfd_getfd(pid, fd)
    except (OSError, OverflowError) as error:
        raise _refusal(pid, fd, error) from None
    if is_spare(copy):
        close_all([copy])
        raise _refusal(pid, fd, OSError(errno.EMFILE, "the last ones are kept for moves under way"))
    return _checked(copy, pid, fd, inode)


def _refusal(pid: int, fd: int, error: OSError | OverflowError) -> Refusal:
    code = getattr(error, "errno", None)
    if code in _FORBIDDEN:
        return Refusal(
            Code.NO_PRIVILEGE,
            f"The kernel does not let this process take descriptors of process {pid} ({error}); give the "
            "daemon CAP_SYS_PTRACE, and look for a security module that limits ptrace.",
        )
    if code in _EXHAUSTED:
        return Refusal(
            Code.NO_DESCRIPTORS,
            f"There is no descriptor left to take descriptor {fd} of process {pid} with ({error}); move "
            "fewer at once, or raise LimitNOFILE in the daemon's unit (ENFILE: fs.file-max).",
        )
    if code in _ABSENT or isinstance(error, OverflowError):
        message = f"There is no descriptor {fd} of a process {pid} ({error}); see sockmi list."
        return Refusal(Code.NO_SUCH_SOCKET, message)
    return Refusal(
        Code.INTERNAL,
        f"Descriptor {fd} of process {pid} cannot be taken ({error}); pidfd_getfd(2) needs Linux 5.6 and a "
        "seccomp filter that lets it pass.",
    )
