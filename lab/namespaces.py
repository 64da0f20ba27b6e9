# SPDX-License-Identifier: MIT
"""Named network namespaces: enter them, and find and end the processes that live in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lab.plan import LabError

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(namespace: str) -> Path:
    """Where a named namespace is mounted, as ``ip netns`` has it."""
    return Path("/run/netns") / namespace


def exists(namespace: str) -> bool:
    """True if there is a namespace mounted under that name (an empty file alone is none)."""
    return os.path.ismount(path_of(namespace))


def _netns() -> Any:
    import pyroute2.netns  # 0.1 s to load, which hundreds of programs in labs do without

    return pyroute2.netns


def create(namespace: str) -> None:
    """Make a named namespace; raise LabError if there is one of that name."""
    if path_of(namespace).exists():
        raise LabError(f"namespace {namespace} exists and is not ours: remove it: ip netns del {namespace}")
    _netns().create(namespace)
    if not path_of(namespace).exists():
        raise LabError(f"namespace {namespace} could not be made; root (CAP_SYS_ADMIN) is needed")


def remove(namespace: str) -> bool:
    """Remove a named namespace; False if there was none. Works for one that is half made, too."""
    try:
        _netns().remove(namespace)
    except FileNotFoundError:
        return False
    except OSError:
        path_of(namespace).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """The calling thread is in ``namespace`` until the block ends (setns(2)); other threads are not.

    Sockets opened and processes started inside belong to the namespace for good.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            inside = os.open(path_of(namespace), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise LabError(
                f"there is no namespace {namespace}; is the lab up? python3 -m lab status"
            ) from None
        try:
            _setns(inside)
        finally:
            os.close(inside)
        try:
            yield
        finally:
            _setns(before)
    finally:
        os.close(before)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise LabError(f"cannot enter the namespace: {os.strerror(error)}; root (CAP_SYS_ADMIN) is needed")


def processes_in(namespaces: Iterable[str]) -> dict[int, list[int]]:
    """Index in ``namespaces`` -> pids of the processes in that namespace, ourselves left out.

    A process cannot leave its namespace without privilege, and nobody else is in a lab's: so
    this is the exact list of what was started in the lab, children of children included.
    """
    wanted: dict[tuple[int, int], int] = {}
    for index, namespace in enumerate(namespaces):
        with contextlib.suppress(FileNotFoundError):
            status = path_of(namespace).stat()
            wanted[status.st_dev, status.st_ino] = index
    # A half made namespace is an ordinary file; it holds no process.
    found: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{entry.name}/ns/net").stat()
                index = wanted.get((status.st_dev, status.st_ino), -1)
                if index >= 0:
                    found.setdefault(index, []).append(int(entry.name))
    return found


def end_processes(namespaces: Iterable[str], grace_s: float = 2.0) -> int:
    """End every process in ``namespaces``: SIGTERM, after ``grace_s`` SIGKILL. Their number.

    Each is held by a pidfd before it is checked, so that a recycled pid is never hit.
    """
    names = list(namespaces)
    ended = 0
    for round_ in range(20):
        held = _pidfds(names)
        if not held:
            return ended
        number = signal.SIGTERM if round_ == 0 else signal.SIGKILL
        try:
            for pidfd in held:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
            _wait(held, grace_s)
            ended += len(held) if round_ == 0 else 0
        finally:
            for pidfd in held:
                os.close(pidfd)
    raise LabError(f"processes in {', '.join(names)} do not end: {processes_in(names)}")


def _pidfds(namespaces: list[str]) -> list[int]:
    held: dict[int, int] = {}
    for pids in processes_in(namespaces).values():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                held[pid] = os.pidfd_open(pid)
    # Again, now that the pids cannot be given to anyone else.
    still = {pid for pids in processes_in(namespaces).values() for pid in pids}
    for pid in held.keys() - still:
        os.close(held.pop(pid))
    return list(held.values())


def _wait(pidfds: list[int], timeout_s: float) -> None:
    poller = select.poll()
    for pidfd in pidfds:
        poller.register(pidfd, select.POLLIN)
    waiting, deadline = len(pidfds), time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for pidfd, _unused in poller.poll(left_s * 1000):
            poller.unregister(pidfd)
            waiting -= 1
