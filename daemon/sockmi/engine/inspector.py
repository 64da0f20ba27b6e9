# SPDX-License-Identifier: MIT
"""Inspectors: processes that look at sockets for the daemon, so that no owner can keep it waiting.

Almost every call on a socket waits for its lock, and that wait cannot be interrupted, nor killed: while a
call of the owner waits in the kernel for memory that nobody serves (a page of FUSE, or of userfaultfd) it
has no end. An inspector (``inspector.c``) has threads for that, and says in time which sockets are locked.
One that is stuck is left behind, with nothing open but what it is stuck at, until the lock comes free.
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sockmi.engine.files import inode_in, link_of
from sockmi.native import library
from sockmi.processes import no_new_process

#: How long a look may take, however many sockets of it are locked, in seconds.
PATIENCE_S = 1.0
#: How many inspectors may be stuck; while there are as many nothing is looked at.
STUCK_MAX = 64

_LOOKS_MAX = 4096  # SOCKMI_LOOKS_MAX
_GRACE_S = 10.0  # more than that, and it is not a lock that the answer waits for
_REQUEST = struct.Struct("=III")
_LOOK = struct.Struct("=iiQ")
_ANSWER = struct.Struct("=I")
_FACTS = struct.Struct("=QQIiIIIIHHHHBBBBBBBx16s16s16sQIII4x")  # struct sockmi_facts
_NOT_TAKEN, _LOCKED = 1 << 17, 1 << 18


class Look(NamedTuple):
    """A descriptor of some process; with ``inode``: only if that is still what it is."""

    pid: int
    fd: int
    inode: int = 0


class Facts(NamedTuple):
    """``struct sockmi_facts`` of inspect.h."""

    inode: int
    cookie: int
    findings: int
    error: int
    receive_queue: int
    send_queue: int
    receive_buffer: int
    send_buffer: int
    family: int
    protocol: int
    local_port: int
    remote_port: int
    state: int
    send_scale: int
    receive_scale: int
    timestamp_us: int
    version: int
    bind_flags: int
    direct: int
    local: bytes
    remote: bytes
    ulp: bytes
    received: int
    sent_ms: int
    received_ms: int
    uid: int

    @property
    def locked(self) -> bool:
        """Nothing is known of it, as somebody keeps its lock."""
        return bool(self.findings & _LOCKED)


FACTS_BYTES = _FACTS.size


def unpacked(buffer: bytes) -> list[Facts]:
    """What the C library has written, in order."""
    return [Facts(*fields) for fields in _FACTS.iter_unpack(buffer)]


@functools.cache
def _native() -> Any:
    lib = library()
    lib.sockmi_inspector_start.argtypes = [ctypes.c_int]
    lib.sockmi_inspector_start.restype = ctypes.c_int
    return lib


@dataclass(eq=False, slots=True)
class _Inspector:
    """``pidfd`` can be read when the process, with all its threads, has ended. ``network``: its namespace."""

    pidfd: int
    control: socket.socket
    network: int

    @classmethod
    def start(cls) -> _Inspector:
        ours, theirs = socket.socketpair()
        with theirs, no_new_process:
            pid = int(_native().sockmi_inspector_start(theirs.fileno()))
        if pid < 0:
            ours.close()
            raise OSError(-pid, f"cannot start an inspector: {os.strerror(-pid)}")
        try:
            return cls(os.pidfd_open(pid), ours, _network())
        except OSError:
            ours.close()
            raise

    def ask(self, looks: Sequence[Look], *, brief: bool) -> tuple[list[Facts], bool]:
        """The facts, and whether it is stuck, and ends."""
        self.control.settimeout(PATIENCE_S + _GRACE_S)
        request = _REQUEST.pack(len(looks), brief, int(PATIENCE_S * 1000))
        self.control.sendall(request + b"".join(_LOOK.pack(*one) for one in looks))
        (stuck,) = _ANSWER.unpack(self._receive(_ANSWER.size))
        return unpacked(self._receive(_FACTS.size * len(looks))), bool(stuck)

    def end(self) -> None:
        """It ends when it is not stuck."""
        self.control.close()
        os.close(self.pidfd)

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            if not (part := self.control.recv(length - len(parts))):
                raise ConnectionResetError("an inspector has gone")
            parts += part
        return bytes(parts)


@dataclass(slots=True)
class _Stuck:
    """An inspector that was left behind: at which sockets, and of which users."""

    pidfd: int
    inodes: frozenset[int]
    users: frozenset[int]


class Inspectors:
    """Those of this process, for any thread: each look has one for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Inspector] = []
        self._stuck: list[_Stuck] = []

    def look(self, looks: Sequence[Look], *, brief: bool = False) -> list[Facts]:
        """What there is to know of each, within ``PATIENCE_S`` for each 4,096 of them; or that it is locked.

        While a socket of a user other than root is locked, his others are not looked at either: else he
        could have us wait again and again. ``brief``: the state, and what has come and gone.
        OSError: no inspector can be started.
        """
        found: list[Facts] = []
        for start in range(0, len(looks), _LOOKS_MAX):
            found += self._look(looks[start : start + _LOOKS_MAX], brief)
        return found

    def stuck(self) -> int:
        """How many are stuck just now."""
        with self._lock:
            self._forget_ended()
            return len(self._stuck)

    def _look(self, looks: Sequence[Look], brief: bool) -> list[Facts]:
        avoided = self._avoided(looks)
        going = [one for at, one in enumerate(looks) if at not in avoided]
        facts = iter(self._asked(going, brief) if going else ())
        return [avoided[at] if at in avoided else next(facts) for at in range(len(looks))]

    def _asked(self, looks: Sequence[Look], brief: bool) -> list[Facts]:
        inspector = self._take()
        try:
            facts, stuck = inspector.ask(looks, brief=brief)
        except BaseException:
            inspector.end()
            raise
        if stuck:
            self._leave(inspector, [one for one in facts if one.locked])
        else:
            self._give_back(inspector)
        return facts

    def _take(self) -> _Inspector:
        with self._lock:
            idle, self._idle = self._idle, []
        for one in idle:
            if one.network == _network():
                return one
            one.end()
        return _Inspector.start()

    def _give_back(self, inspector: _Inspector) -> None:
        with self._lock:
            if not self._idle:
                self._idle.append(inspector)
                return
        inspector.end()

    def _leave(self, inspector: _Inspector, locked: Sequence[Facts]) -> None:
        inspector.control.close()
        with self._lock:
            self._stuck.append(
                _Stuck(
                    inspector.pidfd,
                    frozenset(one.inode for one in locked if one.inode),
                    frozenset(one.uid for one in locked if one.uid),
                )
            )

    def _forget_ended(self) -> None:
        if not self._stuck:
            return
        poll = select.poll()
        for one in self._stuck:
            poll.register(one.pidfd, select.POLLIN)
        ended = {fd for fd, _unused in poll.poll(0)}
        for fd in ended:
            os.close(fd)
        self._stuck = [one for one in self._stuck if one.pidfd not in ended]

    def _avoided(self, looks: Sequence[Look]) -> dict[int, Facts]:
        """Those of which it is known that they are locked, or whose user has one that is."""
        with self._lock:
            self._forget_ended()
            if not self._stuck:
                return {}
            full = len(self._stuck) >= STUCK_MAX
            inodes = frozenset[int]().union(*(one.inodes for one in self._stuck))
            users = frozenset[int]().union(*(one.users for one in self._stuck))
        avoided = {}
        for at, (inode, uid) in enumerate(map(_whose, looks)):
            if full or inode in inodes or uid in users:
                avoided[at] = _facts_of_locked(inode, uid)
        return avoided


def _network() -> int:
    """This thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116 - it is fast


def _whose(look: Look) -> tuple[int, int]:
    """Inode and user of a socket, without a call that might wait; zeros if it is none.

    Others' descriptors may be of something else by now, so their user is not asked for.
    """
    if (inode := inode_in(link_of(look.fd, look.pid))) is None:
        return 0, 0
    return inode, os.fstat(look.fd).st_uid if look.pid == os.getpid() else 0


def _facts_of_locked(inode: int, uid: int) -> Facts:
    empty = Facts(*_FACTS.unpack(bytes(_FACTS.size)))
    return empty._replace(inode=inode, uid=uid, findings=_LOCKED)


def own(fds: Iterable[int]) -> list[Look]:
    """Descriptors of this process."""
    pid = os.getpid()
    return [Look(pid, fd) for fd in fds]


@functools.cache
def inspectors() -> Inspectors:
    """Those of this process."""
    return Inspectors()
