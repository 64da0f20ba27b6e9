# SPDX-License-Identifier: MIT
"""Owners: the processes that hold a socket. Who they are, and how they are stopped.

:class:`Owners` finds the holders of a set of sockets (one scan of ``/proc``, in C; run it in a
worker thread before the freeze), and stops and resumes them (ptrace, in C, by a process of its own
that outlives this one). The daemon's own duplicates never count.

Between the scan and the stop a new holder can appear. Children are caught: each process id that
the kernel has given out since the scan is looked at when the owners have stopped, until nothing new
is found. A descriptor that was *passed* to an older process meanwhile (SCM_RIGHTS, pidfd_getfd) shows
only in a full scan: :meth:`Owners.strangers`, which may run beside the transfer, in any thread. A
chain of processes that each fork and end at once can outrun every look. Whatever such a holder does
to the socket changes its sequence numbers, which the engine compares before it closes the original.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sockmi.frozen import frozen
from sockmi.native import library
from sockmi.refusal import Code, Refusal

#: Holders by socket: inode -> {pid: [descriptors]}; -1 is a registered file of an io_uring.
Holders = dict[int, dict[int, list[int]]]

ABANDONED = Refusal(
    Code.NO_SUCH_SOCKET,
    "No process has this socket any more: it was closed after it had been selected; see sockmi list.",
)

_PROC = Path("/proc")
_PID_MIN = 300  # RESERVED_PIDS: where process ids go on after a wrap (kernel/pid.c)
# A process in the middle of fork(2) has its id, but cannot be seen yet: look that many ids further back.
_UNSEEN_PIDS = 32
# A look that finds nothing new is repeated if processes were born meanwhile, but so often at most.
_LOOKS = 3
_MANY_PIDS = 3 * _UNSEEN_PIDS  # more ids than a scan leaves unseen: remember that they were looked at
_RESCAN_PIDS = 256  # more ids than this since the scan: a new one, before the freeze, is cheaper
_RESCAN_AGE_S = 60.0  # the ids may have gone round: scan anew
_REMEMBERED_S = 5.0  # what another scan has found may be this old


class _Holder(ctypes.Structure):
    """``struct sockmi_holder`` of holders.h."""

    _fields_ = (("inode", ctypes.c_uint64), ("pid", ctypes.c_int32), ("fd", ctypes.c_int32))


class _StopResult(ctypes.Structure):
    """``struct sockmi_stop_result`` of stop.h."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("tid", ctypes.c_int32),
        ("tracer", ctypes.c_int32),
        ("threads", ctypes.c_uint32),
        ("adopted", ctypes.c_uint32),
    )


_STOP_OK, _STOP_GONE, _STOP_TRACED, _STOP_TIMEOUT, _STOP_DENIED, _STOP_SELF = range(6)


@functools.cache
def _native() -> Any:
    lib = library()
    pid_p, size = ctypes.POINTER(ctypes.c_int32), ctypes.c_size_t
    lib.sockmi_find_holders.argtypes = [
        ctypes.POINTER(ctypes.c_uint64), size, pid_p, size, ctypes.c_int32,
        ctypes.POINTER(_Holder), size, pid_p, size, ctypes.POINTER(size),
    ]  # fmt: skip
    lib.sockmi_find_holders.restype = ctypes.c_ssize_t
    lib.sockmi_stop.argtypes = [pid_p, size, ctypes.c_uint, ctypes.POINTER(_StopResult)]
    lib.sockmi_stop.restype = ctypes.c_int
    lib.sockmi_resume.argtypes = [pid_p, size]
    lib.sockmi_resume.restype = ctypes.c_int
    lib.sockmi_stop_census.argtypes = [ctypes.POINTER(size), ctypes.POINTER(size)]
    lib.sockmi_stop_census.restype = None
    lib.sockmi_stop_tracer.restype = ctypes.c_int32
    return lib


def find_holders(inodes: Iterable[int] | None, pids: Sequence[int] = ()) -> tuple[Holders, set[int]]:
    """Who holds these sockets (None: all sockets), among ``pids`` (none: all processes).

    Returns the holders, without this process, and those of them that have an io_uring. Processes
    that end meanwhile are left out; OSError if ``/proc`` cannot be read.
    """
    wanted = set(inodes) if inodes is not None else set()
    if inodes is not None and not wanted:
        return {}, set()
    holders, rings = _scan(wanted, pids)
    # Whoever puts a socket under a lower number while his descriptors are read, and closes the higher one
    # (dup2, as every import does), is seen with neither: what is missing is looked for once more.
    missing = wanted - holders.keys()
    if not missing or pids:
        return holders, rings
    more, more_rings = _scan(missing, pids)
    return holders | more, rings | more_rings


def _scan(wanted: set[int], pids: Sequence[int]) -> tuple[Holders, set[int]]:
    """One look through ``/proc`` of ``find_holders``; ``wanted``: if empty, all."""
    holder_room, ring_room = max(256, 4 * len(wanted)), 256
    numbers = (ctypes.c_uint64 * len(wanted))(*sorted(wanted))
    only = (ctypes.c_int32 * len(pids))(*pids)
    while True:
        found = (_Holder * holder_room)()
        rings, ring_count = (ctypes.c_int32 * ring_room)(), ctypes.c_size_t()
        count = _native().sockmi_find_holders(
            numbers, len(wanted), only, len(pids), os.getpid(), found, holder_room,
            rings, ring_room, ctypes.byref(ring_count),
        )  # fmt: skip
        if count < 0:
            raise OSError(-count, f"cannot scan /proc for the holders of sockets: {os.strerror(-count)}")
        if count <= holder_room and ring_count.value <= ring_room:
            break
        holder_room, ring_room = max(holder_room, count * 2), max(ring_room, ring_count.value * 2)
    holders: Holders = {}
    for at in range(count):
        entry = found[at]  # not a slice, which would make objects of all of them at once
        holders.setdefault(entry.inode, {}).setdefault(entry.pid, []).append(entry.fd)
    return holders, set(rings[: ring_count.value])


def process_name(pid: int) -> str:
    """The command name of a process, ``?`` if it has ended."""
    try:
        return (_PROC / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "?"


def pids_of_unit(unit: str) -> set[int]:
    """The processes of a systemd unit (``nginx.service``, also ``nginx``) or of a cgroup (a path, ``/a/b``).

    A slice or a cgroup includes what lies below it. Reads ``/proc/PID/cgroup`` (v2, and systemd's v1 tree).
    """
    if not unit.strip("/"):
        raise ValueError("the unit is empty; name one, such as nginx.service, or a cgroup path, such as /a/b")
    path = "/" + unit.strip("/") if "/" in unit else None
    name = unit if "." in unit else f"{unit}.service"
    pids = set()
    for entry in os.scandir(_PROC):
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            for line in (_PROC / entry.name / "cgroup").read_text().splitlines():
                _unused, controllers, group = line.split(":", 2)
                if controllers not in ("", "name=systemd"):
                    continue
                if (path and (group + "/").startswith(path + "/")) or (not path and name in group.split("/")):
                    pids.add(int(entry.name))
    return pids


@functools.cache
def _last_pid_file() -> int:
    try:
        return os.open(_PROC / "sys/kernel/ns_last_pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a kernel without CONFIG_CHECKPOINT_RESTORE
        return os.open(_PROC / "loadavg", os.O_RDONLY | os.O_CLOEXEC)


def _last_pid() -> int:
    """The process or thread id that the kernel gave out last."""
    return int(os.pread(_last_pid_file(), 128, 0).split()[-1])


def _pids_between(first: int, last: int) -> list[int]:
    """The ids given out after ``first``, up to ``last``; they go round (kernel/pid.c alloc_pid())."""
    if last >= first:
        return list(range(first + 1, last + 1))
    pid_max = int((_PROC / "sys/kernel/pid_max").read_text())
    return [*range(first + 1, pid_max), *range(_PID_MIN, last + 1)]


def _status(pid: int, *fields: str) -> list[str]:
    """Fields of ``/proc/PID/status``; empty strings if the process has ended."""
    try:
        text = (_PROC / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return ["" for _unused in fields]
    values = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return [values.get(field, "") for field in fields]


def _process(pid: int) -> str:
    return f"the owner {process_name(pid)} (pid {pid})"


def _traced(pid: int, tracer: int) -> Refusal:
    by = f"{process_name(tracer)}, pid {tracer}" if tracer > 0 else "an unknown process"
    return Refusal(
        Code.OWNER_TRACED,
        f"{_process(pid)} is being traced by {by}, and can have one tracer only; detach that first",
    )


def _io_uring(pid: int) -> Refusal:
    return Refusal(
        Code.OWNER_IO_URING,
        f"{_process(pid)} uses io_uring, whose operations go on without the process; "
        "run the application without io_uring",
    )


def _restless(pid: int, timeout_s: float) -> Refusal:
    return Refusal(
        Code.OWNER_UNSTOPPABLE,
        f"{_process(pid)} may have children that run: for {timeout_s * 1000:.0f} ms processes were born "
        "faster than they could be looked at; try again when the host is calmer",
    )


def _stop_refusal(pid: int, result: _StopResult, timeout_s: float) -> Refusal:
    if result.code == _STOP_TRACED:
        return _traced(pid, result.tracer)
    if result.code == _STOP_SELF:
        return Refusal(
            Code.OWNER_IS_DAEMON, f"{_process(pid)} is this daemon; name the application's process"
        )
    if result.code == _STOP_DENIED:
        return Refusal(
            Code.NO_PRIVILEGE,
            f"the kernel forbids to stop {_process(pid)}; give the daemon CAP_SYS_PTRACE, and look for a "
            "security module that limits ptrace",
        )
    if result.code == _STOP_TIMEOUT:
        (state,) = _status(result.tid, "State")
        return Refusal(
            Code.OWNER_UNSTOPPABLE,
            f"thread {result.tid} of {_process(pid)} did not stop within {max(timeout_s, 0) * 1000:.0f} ms"
            f" (state {state or 'unknown'}); try again when it does not wait for a disk or in vfork",
        )
    return Refusal(
        Code.OWNER_UNSTOPPABLE, f"{_process(pid)} cannot be stopped: {os.strerror(result.error)}; try again"
    )


def obstacle_of(pid: int, *, has_ring: bool) -> Refusal | None:
    """What would keep a process from being stopped, as far as it shows; whom we stop is no obstacle."""
    if has_ring:
        return _io_uring(pid)
    (tracer,) = _status(pid, "TracerPid")
    if tracer in ("", "0") or int(tracer) == _native().sockmi_stop_tracer():
        return None
    return _traced(pid, int(tracer))


@frozen
class Scan:
    """When a scan began: the time (monotonic), and the process id after which it may have missed one.

    ``seen``: those after ``last_pid`` that could be seen before it began, so that it has not missed them.
    """

    time_s: float
    last_pid: int
    seen: frozenset[int] = frozenset()

    @classmethod
    def now(cls) -> Scan:
        last = _last_pid()
        first = max(min(last, _PID_MIN), last - _UNSEEN_PIDS)
        seen = frozenset(pid for pid in range(first + 1, last + 1) if os.access(f"/proc/{pid}", os.F_OK))
        return cls(time.monotonic(), first, seen)


@dataclass(slots=True, eq=False)
class _Cohort:
    """Sockets that were looked for together: their scan moves on for all of them at once."""

    scan: Scan


@dataclass(slots=True)
class _Known:
    """The holders of one socket, as of its cohort's scan: by process, its descriptors as far as we know."""

    cohort: _Cohort
    held: dict[int, list[int]]

    @property
    def scan(self) -> Scan:
        """When it was last looked for."""
        return self.cohort.scan


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _alone(
    method: Callable[Concatenate[Owners, _P], _T],
) -> Callable[Concatenate[Owners, _P], _T]:
    """Nothing changes in the table of holders meanwhile; a scan by another thread waits with its news."""

    @functools.wraps(method)
    def locked(self: Owners, /, *args: _P.args, **named: _P.kwargs) -> _T:
        with self._lock:
            return method(self, *args, **named)

    return locked


class Owners:
    """Finds, stops and resumes the owners of sockets; see the module docstring.

    ``find`` and ``strangers`` may run in any thread; the others in one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # of _known, _remembered and _rings; not held while a thread scans
        self._known: dict[int, _Known] = {}
        self._remembered: set[int] = set()  # known from another scan, not asked for yet
        self._rings: set[int] = set()
        self._stops: dict[int, list[frozenset[int]]] = {}  # inode -> of each stop, for whom it counts
        self._counts: Counter[int] = Counter()  # pid -> stops not yet resumed

    # -- who --

    @_alone
    def remember(self, scan: Scan, holders: Holders, rings: set[int]) -> None:
        """What a scan of others, stamped before it began, has found of sockets.

        Spares the next ``find`` of each a scan, within seconds. ``rings``: those that have an io_uring.
        """
        cohort = _Cohort(scan)
        known = {
            inode: _Known(cohort, dict(held)) for inode, held in holders.items() if inode not in self._stops
        }
        self._rings = (self._rings - {pid for one in known.values() for pid in one.held}) | rings
        self._known.update(known)
        self._remembered.update(known)

    def find(self, inodes: Iterable[int]) -> Holders:
        """All holders of these sockets except this process; one scan of ``/proc``, or what is remembered.

        Remembers them for ``stop``, for a minute. Call it shortly before, outside the freeze.
        """
        wanted = set(inodes)
        if (remembered := self._recall(wanted)) is not None:
            return remembered
        scan = Scan.now()
        holders, rings = find_holders(wanted)
        self._learn(scan, wanted, holders, rings)
        return {inode: holders.get(inode, {}) for inode in wanted}

    @_alone
    def _recall(self, wanted: set[int]) -> Holders | None:
        """What ``remember`` has been told of all of them lately; once."""
        begun_s = time.monotonic()
        lately = wanted <= self._remembered and all(
            begun_s - self._known[inode].scan.time_s < _REMEMBERED_S for inode in wanted
        )
        self._remembered -= wanted
        return {inode: dict(self._known[inode].held) for inode in wanted} if lately else None

    @_alone
    def _learn(self, scan: Scan, wanted: set[int], holders: Holders, rings: set[int]) -> None:
        for inode, known in list(self._known.items()):
            if scan.time_s - known.scan.time_s > 2 * _RESCAN_AGE_S and inode not in self._stops:
                self._known.pop(inode, None)
                self._remembered.discard(inode)
        self._note_rings(holders, rings)
        cohort = _Cohort(scan)
        self._known.update({inode: _Known(cohort, dict(holders.get(inode, {}))) for inode in wanted})

    def _note_rings(self, holders: Holders, rings: set[int]) -> None:
        self._rings = (self._rings - {pid for by_pid in holders.values() for pid in by_pid}) | rings

    def _born(self, inodes: set[int], last_pid: int) -> list[int]:
        """The ids given out since the oldest scan of these sockets, but for the holders known already."""
        scans = {self._known[inode].scan for inode in inodes}
        known = set().union(*(self._known[inode].held for inode in inodes))
        oldest = min(scans, key=lambda scan: scan.time_s)
        between = _pids_between(oldest.last_pid, last_pid)
        return [pid for pid in between if pid not in known and pid not in oldest.seen]

    def _refresh(self, inodes: set[int]) -> None:
        """Before the freeze: scan anew if the known holders are old."""
        oldest_s = min(self._known[inode].scan.time_s for inode in inodes)
        if time.monotonic() - oldest_s > _RESCAN_AGE_S or len(self._born(inodes, _last_pid())) > _RESCAN_PIDS:
            self.find(inodes | self._known.keys())  # those that are still to be stopped need not ask again

    def _catch_up(self, inodes: set[int]) -> bool:
        """Look at the processes born since the scan. True if another look is needed.

        In ascending order: if a process has ended before it is looked at, the child that it may
        have left (of a higher id) has been visible since.
        """
        last_pid = _last_pid()
        born = self._born(inodes, last_pid)
        holders: Holders = {}
        rings: set[int] = set()
        if len(born) > _MANY_PIDS:
            # Look for all that was looked for with these, so that nobody's next look need go back as far.
            cohorts = {self._known[inode].cohort for inode in inodes}
            reached, last_pid = Scan.now(), _last_pid()
            born = self._born(inodes, last_pid)
            # Whatever they hold, as they are few: else thousands of sockets would have to be named.
            found, rings = find_holders(None, born) if born else ({}, set())
            holders = {
                inode: by_pid
                for inode, by_pid in found.items()
                if (known := self._known.get(inode)) is not None and known.cohort in cohorts
            }
            for cohort in cohorts:
                cohort.scan = replace(reached, time_s=cohort.scan.time_s)
        elif born:
            holders, rings = find_holders(inodes, born)
        self._note_rings(holders, rings)
        for inode, by_pid in holders.items():
            self._known[inode].held.update(by_pid)
        return not inodes.isdisjoint(holders) or _last_pid() != last_pid

    def descriptors(self, inode: int) -> list[tuple[int, int]]:
        """(process, descriptor) of a socket, as far as is known; see ``held``. Nothing is looked for."""
        known = self._known.get(inode)
        return [(pid, fd) for pid, fds in known.held.items() for fd in fds if fd >= 0] if known else []

    def holders(self, inode: int) -> list[int]:
        """The processes that have a socket, as far as is known. Nothing is looked for."""
        known = self._known.get(inode)
        return sorted(known.held) if known else []

    def held(self, inodes: Collection[int]) -> set[int]:
        """Those of these sockets that some other process holds now.

        One look at each where it was found; only what is not there any more is looked for, in one scan.
        """
        missing = {inode for inode in inodes if not self._is_where_it_was(inode)}
        found = find_holders(missing)[0] if missing else {}
        return {inode for inode in inodes if inode not in missing or inode in found}

    def _is_where_it_was(self, inode: int) -> bool:
        for pid, fd in self.descriptors(inode):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":  # noqa: PTH115 - it is fast
                    return True
        return False

    def strangers(self, inodes: Iterable[int]) -> dict[int, set[int]]:
        """Holders that run although the socket is stopped: a descriptor was passed on. Normally empty."""
        holders, _unused = find_holders(inodes)
        running = {inode: {pid for pid in pids if not self._counts[pid]} for inode, pids in holders.items()}
        return {inode: pids for inode, pids in running.items() if pids}

    @_alone
    def verdicts(self, inodes: Sequence[int], *, stopping: bool = True) -> list[Refusal | None]:
        """Preflight: what would keep the owners of each socket from being stopped, as far as it shows.

        Without ``stopping``: only what cannot be borne although nobody is stopped.
        """
        unknown = set(inodes) - self._known.keys()
        if unknown:
            self.find(unknown)
        pids: set[int] = set().union(*(self._known[inode].held for inode in inodes))
        by_pid = {pid: self._verdict(pid, stopping=stopping) for pid in pids}
        return [
            next((verdict for pid in sorted(self._known[inode].held) if (verdict := by_pid[pid])), None)
            for inode in inodes
        ]

    def _verdict(self, pid: int, *, stopping: bool) -> Refusal | None:
        if pid in self._rings:
            return _io_uring(pid)
        if not stopping:
            return None
        (tracer,) = _status(pid, "TracerPid")
        if tracer not in ("", "0") and not self._counts[pid]:
            return _traced(pid, int(tracer))
        return None

    # -- stop and resume --

    @_alone
    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """Stop every process that holds one of ``inodes``; see :meth:`sockmi.engine.base.Engine.stop`.

        ``pids`` are holders that the caller knows of; they count for each socket that ``find`` has
        not seen (which is then looked for here). ``timeout_s`` is for all of them together.
        """
        if os.getpid() in pids:
            message = f"the owner (pid {os.getpid()}) is this daemon itself; name the application's process"
            return [Refusal(Code.OWNER_IS_DAEMON, message) for _unused in inodes]
        deadline_s = time.monotonic() + timeout_s
        wanted = set(inodes)
        unknown = wanted - self._known.keys()
        if unknown:
            self.find(unknown)
            for inode in unknown:
                held = self._known[inode].held
                held.update({pid: [] for pid in pids if pid not in held})
        if not wanted:
            return []
        self._refresh(wanted)
        refused: dict[int, Refusal] = {}  # by pid
        stopped: set[int] = set()  # by this call
        looks, again = 0, True
        while True:
            movable = [inode for inode in wanted if not self._known[inode].held.keys() & refused.keys()]
            owners: set[int] = set().union(*(self._known[inode].held for inode in movable))
            fresh = {pid for pid in owners - stopped if not self._counts[pid]}
            if not fresh and (not again or looks >= _LOOKS):
                break
            refused.update({pid: _io_uring(pid) for pid in fresh & self._rings})
            if fresh & self._rings:
                continue
            left_s = deadline_s - time.monotonic()
            for pid, result in zip(fresh, self._native_stop(list(fresh), left_s), strict=True):
                if result.code == _STOP_OK:
                    stopped.add(pid)
                elif result.code == _STOP_GONE:
                    for inode in wanted:
                        self._known[inode].held.pop(pid, None)
                else:
                    refused[pid] = _stop_refusal(pid, result, timeout_s)
            looks = 0 if fresh else looks + 1
            again = self._catch_up(wanted)
            if fresh and left_s < 0:
                owners = set().union(*(self._known[inode].held for inode in movable))
                refused.update({pid: _restless(pid, timeout_s) for pid in owners})
                break
        return self._settle(inodes, refused, stopped)

    def _settle(
        self, inodes: Sequence[int], refused: Mapping[int, Refusal], stopped: set[int]
    ) -> list[Refusal | None]:
        """Count the stops per socket, and let go whom no socket of this call needs."""
        refusals: list[Refusal | None] = []
        for inode in inodes:
            owners = frozenset(self._known[inode].held)
            refusals.append(next((refused[pid] for pid in sorted(owners) if pid in refused), None))
            if refusals[-1] is None:
                self._stops.setdefault(inode, []).append(owners)
                self._counts.update(owners)
        self._native_resume([pid for pid in stopped if not self._counts[pid]])
        return refusals

    @_alone
    def resume(self, inodes: Sequence[int]) -> None:
        """The inverse of ``stop``; sockets that are not stopped are ignored. Never fails."""
        idle = []
        for inode in inodes:
            stops = self._stops.get(inode)
            if not stops:
                continue
            for pid in stops.pop():
                self._counts[pid] -= 1
                if not self._counts[pid]:
                    del self._counts[pid]
                    idle.append(pid)
            if not stops:
                del self._stops[inode]
                self._known.pop(inode, None)
                self._remembered.discard(inode)
        self._native_resume(idle)

    def resume_all(self) -> None:
        """Undo every stop (shutting down); never fails."""
        self.resume([inode for inode, stops in list(self._stops.items()) for _unused in stops])

    def stopped_pids(self) -> set[int]:
        """The processes that are stopped just now."""
        return set(self._counts)

    @staticmethod
    def _native_stop(pids: Sequence[int], timeout_s: float) -> list[_StopResult]:
        results = (_StopResult * len(pids))()
        timeout_us = min(max(0, int(timeout_s * 1e6)), 0xFFFFFFFF)
        error = _native().sockmi_stop((ctypes.c_int32 * len(pids))(*pids), len(pids), timeout_us, results)
        if error < 0:
            raise OSError(-error, f"cannot start the thread that stops processes: {os.strerror(-error)}")
        return list(results)

    @staticmethod
    def _native_resume(pids: Sequence[int]) -> None:
        if pids:
            _native().sockmi_resume((ctypes.c_int32 * len(pids))(*pids), len(pids))
