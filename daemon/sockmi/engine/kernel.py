# SPDX-License-Identifier: MIT
"""The ``kernel`` engine: /dev/sockmi, for hosts where the module is loaded.

A connection is frozen by its own lock, which the module keeps until it is told what to do, or until a
deadline of the kernel's; no process is stopped. What comes in meanwhile waits, and so does whoever calls
something on the socket: also this daemon, which therefore calls nothing on a frozen original or on a dormant
copy (``os.fstat`` and ``os.close`` are no such calls, nor are those for which the kernel needs no lock).
Closing the device file, and so the end of this process, thaws what is frozen and discards what is dormant.

The system calls are in libsockmi-engine (``device.c``), one call for a whole chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sockmi.engine import preflight
from sockmi.engine.base import Captured, Kind, Needs, Placement, Restored, SocketFacts
from sockmi.engine.owners import ABANDONED
from sockmi.engine.repair import RepairEngine
from sockmi.engine.results import (
    RESULT,
    Images,
    Result,
    fidelity_of,
    ints,
    packed_placement,
    refusal_of,
    room,
)
from sockmi.image import Family, peek
from sockmi.image import Kind as ImageKind
from sockmi.native import buffer_of, library
from sockmi.refusal import Code, Refusal

DEVICE = "/dev/sockmi"
#: The interface (``SOCKMI_DEV_ABI_MAJOR``) and the images that this engine knows.
ABI_MAJOR = IMAGE_MAJOR = 1

_SLOT_BYTES = 1 << 20  # images that need more get a device file of their own
_LARGE_TRIES = 4
_CLOSED = 7  # TCP_CLOSE
_THAW_MARGIN_S = 0.1  # in which a chunk is released
_THAWED = Refusal(Code.CHANGED, "the freeze took so long that the kernel has thawed it; try again")


class ModuleMissing(Exception):
    """There is no module that this engine can use; the text says why, and what to do."""


class _Device(ctypes.Structure):
    """``struct sockmi_device`` of device.h."""

    _fields_ = (
        ("fd", ctypes.c_int32),
        ("abi", ctypes.c_uint32),
        ("image", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("freeze_max_ms", ctypes.c_uint32),
        ("dormant_max_ms", ctypes.c_uint32),
        ("slot_bytes", ctypes.c_uint64),
        ("slot_bytes_most", ctypes.c_uint64),
        ("slot", ctypes.c_void_p),
    )


class _Frozen(ctypes.Structure):
    """``struct sockmi_frozen`` of device.h."""

    _fields_ = (("id", ctypes.c_uint64), ("epoch", ctypes.c_uint32), ("reserved", ctypes.c_uint32))


@functools.cache
def _native() -> Any:
    """libsockmi-engine, with the prototypes of the functions used here."""
    lib = library()
    device, frozen = ctypes.POINTER(_Device), ctypes.POINTER(_Frozen)
    pointer, size, fds, u32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int), ctypes.c_uint32
    ids = ctypes.POINTER(ctypes.c_uint64)
    lib.sockmi_device_open.argtypes = [device, ctypes.c_uint64]
    lib.sockmi_device_close.argtypes = [device]
    lib.sockmi_device_check.argtypes = [device, fds, size, pointer]
    lib.sockmi_device_capture.argtypes = [
        device, fds, ctypes.c_char_p, size, u32, pointer, size, frozen, pointer,
    ]  # fmt: skip
    devices = ctypes.POINTER(device)
    lib.sockmi_device_commit.argtypes = [
        devices, fds, frozen, pointer, pointer, size, ctypes.c_int, pointer,
    ]  # fmt: skip
    lib.sockmi_device_commit_together.argtypes = [devices, fds, frozen, pointer, pointer, size, pointer]
    lib.sockmi_device_thaw.argtypes = [device, frozen, size]
    lib.sockmi_device_restore.argtypes = [device, pointer, pointer, pointer, size, fds, ids, pointer]
    lib.sockmi_device_renew.argtypes = [device, fds, ids, pointer, pointer, pointer, size, pointer]
    lib.sockmi_device_activate.argtypes = [device, ids, size, pointer]
    lib.sockmi_device_discard.argtypes = [device, fds, ids, size]
    lib.sockmi_device_deliver.argtypes = [
        device, ctypes.c_char_p, size, ctypes.c_char_p, u32, u32, ctypes.c_int, pointer,
    ]  # fmt: skip
    for name in ("close", "thaw", "discard"):
        getattr(lib, f"sockmi_device_{name}").restype = None
    return lib


def _may_hold() -> bool:
    """Whether the module freezes for this process; a module without this parameter does for everybody."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(0xFFFFFFFF)]:
            return True
    except OSError:  # whoever confines it so far will hear of the first FREEZE
        return True
    parameter = Path("/sys/module/sockmi/parameters/users_may_hold")
    return not parameter.exists() or parameter.read_text() != "0\n"


def _open(slot_bytes: int) -> _Device:
    """A device file; ModuleMissing says why there is none."""
    if not _may_hold():
        raise ModuleMissing(
            "the module lets nobody keep sockets locked who does not administer the host, and this is a user "
            "namespace of its own; set the module's parameter users_may_hold"
        )
    device = _Device()
    error = -_native().sockmi_device_open(ctypes.byref(device), slot_bytes)
    if not error:
        return device
    if error == errno.EPROTONOSUPPORT:
        raise ModuleMissing(
            f"the loaded module speaks {DEVICE} {device.abi >> 16}.{device.abi & 0xFFFF} with images "
            f"{device.image >> 16}.{device.image & 0xFFFF}, and this daemon {ABI_MAJOR} with images "
            f"{IMAGE_MAJOR}; install a module and a daemon of the same release"
        )
    if error in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        raise ModuleMissing(f"{DEVICE} does not exist; load the module (modprobe sockmi)")
    raise ModuleMissing(
        f"{DEVICE} cannot be used: {os.strerror(error)}; see its owner, mode and DeviceAllow="
    )


@dataclass(slots=True)
class _Held:
    """An original that is frozen, or was until the kernel's deadline.

    ``until_s``: that deadline (time.monotonic()). ``own``: a device file for it alone, as its image is large.
    """

    device: _Device
    frozen: _Frozen
    image: bytes
    until_s: float
    own: bool = False


@dataclass(slots=True)
class _Dormant:
    """A copy that waits; ``since`` is time.monotonic()."""

    id: int
    placement: bytes
    since: float


class KernelEngine:
    """See :class:`sockmi.engine.base.Engine`. All calls from one thread."""

    name: Literal["kernel"] = "kernel"
    carries_urgent: Literal[True] = True

    def __init__(self, repair: RepairEngine | None = None) -> None:
        """Raises ModuleMissing. ``repair``: for what a daemon with that engine has left in repair."""
        self._repair = repair or RepairEngine()
        self.owners = self._repair.owners
        self._device = _open(_SLOT_BYTES)
        self._buffer = buffer_of(_SLOT_BYTES)
        self._stops: Counter[int] = Counter()
        self._held: dict[int, _Held] = {}
        self._dormant: dict[int, _Dormant] = {}

    @property
    def version(self) -> str:
        """Of the device interface."""
        return f"{self._device.abi >> 16}.{self._device.abi & 0xFFFF}"

    def close(self) -> None:
        """Thaw what is frozen, discard what is dormant."""
        for held in self._held.values():
            if held.own:
                _native().sockmi_device_close(ctypes.byref(held.device))
        self._held.clear()
        self._dormant.clear()
        _native().sockmi_device_close(ctypes.byref(self._device))

    # -- preflight

    def inspect(self, fds: Sequence[int]) -> list[SocketFacts]:
        """Preflight of each descriptor, in order."""
        return self.judge(fds, self._seen(fds, preflight.inspect_here))

    def look(self, fds: Sequence[int]) -> list[SocketFacts]:
        """What there is to see of each descriptor in a second. For any thread."""
        return self._seen(fds, preflight.inspect)

    def _seen(self, fds: Sequence[int], inspect: Callable[..., list[SocketFacts]]) -> list[SocketFacts]:
        """What is frozen is not asked: its image says what it is."""
        held = [(fd, self._held.get(_inode(fd))) for fd in fds]
        found = [_facts_of(fd, one.image) if one is not None else None for fd, one in held]
        fresh = [at for at, one in enumerate(found) if one is None]
        seen = inspect([fds[at] for at in fresh], carried=preflight.Finding.URGENT)
        for at, facts in zip(fresh, seen, strict=True):
            found[at] = facts
        return [one for one in found if one is not None]

    def judge(self, fds: Sequence[int], seen: list[SocketFacts]) -> list[SocketFacts]:
        """What the module says of those against which there is nothing else."""
        held = [self._held.get(_inode(fd)) for fd in fds]
        facts = [
            known if one is None else _facts_of(fd, one.image)
            for fd, one, known in zip(fds, held, seen, strict=True)
        ]
        asked = [at for at, one in enumerate(facts) if one.refusal is None]
        results = room(len(asked))
        numbers = ints([fds[at] for at in asked])
        if _native().sockmi_device_check(ctypes.byref(self._device), numbers, len(asked), results):
            for at, result in zip(asked, RESULT.iter_unpack(results.raw), strict=False):
                if result[0] != Result.OK:
                    facts[at] = replace(facts[at], refusal=refusal_of(result, Code.INTERNAL))
        return facts

    def obstacles(self, inodes: Sequence[int]) -> list[Refusal | None]:
        """Nobody is stopped; but what a ring does with a socket that is frozen has not been tried."""
        return self.owners.verdicts(inodes, stopping=False)

    # -- exports

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """From now on what is captured stays frozen; its owners run."""
        self._stops.update(inodes)
        return [None] * len(inodes)

    def resume(self, inodes: Sequence[int]) -> None:
        """The inverse of ``stop``, and the thaw of what was captured meanwhile."""
        for inode in inodes:
            if self._stops[inode] > 1:
                self._stops[inode] -= 1
                continue
            self._stops.pop(inode, None)
            self._thaw(inode)

    def _thaw(self, inode: int) -> None:
        held = self._held.pop(inode, None)
        if held is None:
            return
        _native().sockmi_device_thaw(ctypes.byref(held.device), ctypes.byref(held.frozen), 1)
        if held.own:
            _native().sockmi_device_close(ctypes.byref(held.device))

    def capture(self, fds: Sequence[int], thaw_after_s: float = 1.0) -> list[Captured | Refusal]:
        """Read the whole state of each socket; those that are stopped stay frozen, but for listeners."""
        for fd in fds:
            self._thaw(_inode(fd))  # so that it can be claimed again
        captured: list[Captured | Refusal | None] = [None] * len(fds)
        todo = list(range(len(fds)))
        deadline_ms = max(1, min(int(thaw_after_s * 1000), self._device.freeze_max_ms))
        while todo:
            needed = self._capture_some(self._device, fds, todo, captured, deadline_ms=deadline_ms)
            large = [at for at, length in needed.items() if length > self._device.slot_bytes]
            for at in large:
                captured[at] = self._capture_large(fds[at], needed.pop(at), deadline_ms)
            if sum(needed.values()) > len(self._buffer):
                self._buffer = buffer_of(sum(needed.values()))
            todo = list(needed)
        return [item for item in captured if item is not None]

    def _capture_some(
        self,
        device: _Device,
        fds: Sequence[int],
        todo: list[int],
        captured: list[Captured | Refusal | None],
        *,
        deadline_ms: int,
        own: bool = False,
    ) -> dict[int, int]:
        """Capture those in ``todo``; of each for which there was no room: how much it needs, in bytes."""
        results, count = room(len(todo)), len(todo)
        frozen = (_Frozen * count)()
        inodes = {at: _inode(fds[at]) for at in todo}
        until_s = time.monotonic() + deadline_ms / 1000
        keep = bytes(bool(self._stops.get(inode)) for inode in inodes.values())
        buffer = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer)
        _native().sockmi_device_capture(
            ctypes.byref(device), ints([fds[at] for at in todo]), keep, count, deadline_ms,
            ctypes.byref(buffer), len(self._buffer), frozen, results,
        )  # fmt: skip
        del buffer
        needed: dict[int, int] = {}
        with memoryview(self._buffer) as view:
            for at, one, result in zip(todo, frozen, RESULT.iter_unpack(results.raw), strict=False):
                code, offset, length = result[0], result[4], result[5]
                if code == Result.OK:
                    image = bytes(view[offset : offset + length])
                    captured[at] = Captured(image, fidelity_of(result))
                    if one.id:
                        self._held[inodes[at]] = _Held(
                            device, _Frozen(one.id, one.epoch), image, until_s, own
                        )
                elif code == Result.NO_ROOM:
                    needed[at] = length + 8
                else:
                    captured[at] = refusal_of(result, Code.INTERNAL)
        return needed

    def _capture_large(self, fd: int, needed: int, deadline_ms: int) -> Captured | Refusal:
        """One whose image does not fit into the slot: in a device file of its own while it is frozen."""
        captured: list[Captured | Refusal | None] = [None]
        for _turn in range(_LARGE_TRIES):
            wanted = needed + needed // 4  # it goes on until it is frozen
            if len(self._buffer) < wanted:
                self._buffer = buffer_of(wanted)
            try:
                device = _open(wanted)
            except ModuleMissing as missing:
                return Refusal(Code.TOO_LARGE, f"there is no room for an image of {needed} bytes: {missing}")
            most = device.slot_bytes >= device.slot_bytes_most
            grown = self._capture_some(device, [fd], [0], captured, deadline_ms=deadline_ms, own=True)
            if _inode(fd) not in self._held:
                _native().sockmi_device_close(ctypes.byref(device))
            if captured[0] is not None:
                return captured[0]
            needed = grown[0]
            if most:
                return Refusal(
                    Code.TOO_LARGE,
                    f"an image of {needed} bytes is larger than the module's slots; try when less is queued",
                )
        return Refusal(Code.CHANGED, "its queues grow faster than they can be read; try again")

    def compare(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """What is frozen equals its image; refuse what the kernel thaws about now, or has thawed."""
        soon = time.monotonic() + _THAW_MARGIN_S
        held = [self._held.get(_inode(fd)) for fd in fds]
        return [_THAWED if one is not None and one.until_s < soon else None for one in held]

    def release(
        self, fds: Sequence[int], images: Sequence[bytes], *, owned: bool = False, together: bool = False
    ) -> list[Refusal | None]:
        """Close each original without a packet, if it still equals its image; see the contract."""
        count = len(fds)
        if not count:
            return []
        held = [self._held.get(_inode(fd)) for fd in fds]
        frozen = (_Frozen * count)(*(one.frozen if one else _Frozen() for one in held))
        devices = (ctypes.POINTER(_Device) * count)(
            *(ctypes.pointer(one.device if one else self._device) for one in held)
        )
        given, results = Images(images), room(count)
        what = devices, ints(fds), frozen, given.pointers, given.lengths, count
        if together:
            _native().sockmi_device_commit_together(*what, results)
        else:
            _native().sockmi_device_commit(*what, owned, results)
        outcomes: list[Refusal | None] = [None] * count
        for at, result in enumerate(RESULT.iter_unpack(results.raw[: count * RESULT.size])):
            if result[0] == Result.NO_ROOM:  # it has grown since
                outcomes[at] = Refusal(Code.CHANGED, "more is queued than when it was frozen; try again")
            elif result[0] == Result.NO_SOCKET:
                outcomes[at] = ABANDONED
            elif result[0] != Result.OK:
                outcomes[at] = refusal_of(result, Code.INTERNAL)
            elif (one := held[at]) is not None:
                one.frozen.id = 0
                self._thaw(_inode(fds[at]))
        return outcomes

    def deaden(self, fd: int) -> Refusal | None:
        """Finish ``release`` of a bound or unconnected original."""
        inode = _inode(fd)
        self.stop([inode], [], 0)
        try:
            (item,) = self.capture([fd])
            if isinstance(item, Captured):
                return self.release([fd], [item.image])[0]
        finally:
            self.resume([inode])
        return self._repair.deaden(fd)  # it is dead, or was being killed by the other engine

    # -- imports

    def restore(self, images: Sequence[bytes], placements: Sequence[Placement]) -> list[Restored | Refusal]:
        """Make a dormant copy of each image: whole, non-blocking, close-on-exec, its lock held."""
        count = len(images)
        given, results, fds, ids = Images(images), room(count), (ctypes.c_int * count)(), _ids([0] * count)
        where = [packed_placement(placement) for placement in placements]
        _native().sockmi_device_restore(
            ctypes.byref(self._device),
            given.pointers,
            given.lengths,
            b"".join(where),
            count,
            fds,
            ids,
            results,
        )
        now = time.monotonic()
        made: list[Restored | Refusal] = []
        for fd, one, place, result in zip(fds, ids, where, RESULT.iter_unpack(results.raw), strict=False):
            if result[0] == Result.OK:
                self._dormant[fd] = _Dormant(one, place, now)
                made.append(Restored(fd, fidelity_of(result)))
            else:
                made.append(refusal_of(result))
        return made

    def discard(self, fds: Sequence[int]) -> None:
        """The inverse of ``restore``: close dormant copies without a packet."""
        ours = [(fd, one.id) for fd in fds if (one := self._dormant.pop(fd, None)) is not None]
        if ours:
            _native().sockmi_device_discard(
                ctypes.byref(self._device),
                ints([fd for fd, _unused in ours]),
                _ids([one for _unused, one in ours]),
                len(ours),
            )
        closed = {fd for fd, _unused in ours}
        self._repair.discard([fd for fd in fds if fd not in closed])

    def renew(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Make copies anew whose time is nearly over."""
        limit = time.monotonic() - self._device.dormant_max_ms / 2000
        old = [at for at, fd in enumerate(fds) if (one := self._dormant.get(fd)) and one.since < limit]
        outcomes: list[Refusal | None] = [None] * len(fds)
        if not old:
            return outcomes
        copies = [self._dormant[fds[at]] for at in old]
        given, results = Images([images[at] for at in old]), room(len(old))
        ids = _ids([copy.id for copy in copies])
        _native().sockmi_device_renew(
            ctypes.byref(self._device), ints([fds[at] for at in old]), ids, given.pointers, given.lengths,
            b"".join(copy.placement for copy in copies), len(old), results,
        )  # fmt: skip
        now = time.monotonic()
        for at, copy, one, result in zip(old, copies, ids, RESULT.iter_unpack(results.raw), strict=False):
            copy.id, copy.since = one, now
            if result[0] != Result.OK:
                outcomes[at] = refusal_of(result)
        return outcomes

    def activate(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Bring dormant copies to life. One that is refused has never lived."""
        count, results = len(fds), room(len(fds))
        ids = _ids([one.id if (one := self._dormant.pop(fd, None)) else 0 for fd in fds])
        if not _native().sockmi_device_activate(ctypes.byref(self._device), ids, count, results):
            return [None] * count
        unpacked = itertools.islice(RESULT.iter_unpack(results.raw), count)
        return [None if result[0] == Result.OK else refusal_of(result) for result in unpacked]

    def deliver(
        self, image: bytes, placement: Placement, device: str | None, uid: int, *, only_ask: bool = False
    ) -> Refusal | None:
        """Through the accept() of whoever listens for it, if that is root's or of user ``uid``."""
        result, interface = room(1), 0
        if device is not None:
            with contextlib.suppress(OSError):  # it has just gone
                interface = socket.if_nametoindex(device)
        where = len(image), packed_placement(placement), interface
        if not _native().sockmi_device_deliver(
            ctypes.byref(self._device), image, *where, uid, only_ask, result
        ):
            return None
        return refusal_of(next(RESULT.iter_unpack(result.raw)))

    # -- what there is of a socket

    def lives(self, fd: int, kind: Kind) -> bool:
        """Whether a copy is dormant no more. An earlier daemon's was discarded when that ended."""
        if fd in self._dormant:
            return False
        with _socket(fd) as each:
            if kind is Kind.LISTENING:
                return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            if self.in_repair(fd):
                return False
            if kind is Kind.BOUND:
                return bool(each.getsockname()[1])
            return each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _CLOSED

    def in_repair(self, fd: int) -> bool:
        """Whether a socket is in repair: if it is one of ours, another engine's."""
        return self._repair.in_repair(fd)

    def end_repair(self, fd: int) -> bool:
        """Lead a socket out of repair that a killed daemon left in it; False if it was not."""
        return self._repair.end_repair(fd)

    def left_in_repair(self) -> set[int]:
        """The inodes of originals that a killed daemon left in repair, which had the other engine."""
        return self._repair.left_in_repair()

    def forget_left(self) -> None:
        """What is left in repair still has no owner."""
        self._repair.forget_left()


def _facts_of(fd: int, image: bytes) -> SocketFacts:
    """Of a socket that is frozen."""
    known, identity = peek(image), os.fstat(fd)
    kind = Kind.BOUND if known.kind is ImageKind.UNCONNECTED else Kind[known.kind.name]
    return SocketFacts(
        identity.st_ino,
        0,
        kind,
        known.state.name.replace("_", "-"),
        socket.AF_INET6 if known.family is Family.INET6 else socket.AF_INET,
        known.local,
        known.remote,
        known.receive_bytes,
        known.sent_bytes + known.unsent_bytes,
        Needs(),
        Refusal(Code.ALREADY_MIGRATING, "this socket is being migrated; wait for it (sockmi info)"),
    )


def _inode(fd: int) -> int:
    with contextlib.suppress(OSError):
        return os.fstat(fd).st_ino
    return 0


def _ids(numbers: Sequence[int]) -> Any:
    return (ctypes.c_uint64 * len(numbers))(*numbers)


def _socket(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
