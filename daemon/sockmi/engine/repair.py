# SPDX-License-Identifier: MIT
"""The ``repair`` engine: TCP_REPAIR from user space, for hosts where no kernel module can be loaded.

The system calls are in libsockmi-engine (``capture.c``, ``restore.c``, ``lapse.c``, ``activate.c``,
``release.c``), one call for a whole chunk; here results become images, descriptors and refusals
(``results.py``).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sockmi.engine import preflight
from sockmi.engine.base import Captured, Kind, Placement, Restored, SocketFacts
from sockmi.engine.owners import Owners
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
from sockmi.native import buffer_of, library
from sockmi.refusal import Code, Refusal

#: SO_MARK of the segments that tell a copy what its peer has closed; a hold lets it in.
INJECT_MARK = 0x50C1

_TCP_REPAIR = 19
_IN_REPAIR_MAX = 1024  # RECORDS of in_repair.c
_FIRST_BUFFER_BYTES = 1 << 20


@functools.cache
def _native() -> Any:
    """libsockmi-engine, with the prototypes of the functions used here."""
    lib = library()
    pointer, size, ints = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)
    for capture in (lib.sockmi_capture, lib.sockmi_capture_common):
        capture.argtypes = [ints, size, pointer, size, pointer]
    lib.sockmi_restore.argtypes = [pointer, pointer, pointer, size, ctypes.c_uint32, ints, pointer]
    releases = lib.sockmi_release, lib.sockmi_release_together
    for each in (lib.sockmi_compare, *releases, lib.sockmi_lapsed, lib.sockmi_activate):
        each.argtypes = [ints, pointer, pointer, size, pointer]
    lib.sockmi_discard.argtypes = [ints, size]
    lib.sockmi_discard.restype = None
    lib.sockmi_deaden.argtypes = lib.sockmi_end_repair.argtypes = [ctypes.c_int]
    lib.sockmi_in_repair_keep.argtypes = [ctypes.c_char_p]
    lib.sockmi_in_repair_left.argtypes = [ctypes.POINTER(ctypes.c_uint64), size]
    lib.sockmi_in_repair_left.restype = size
    lib.sockmi_in_repair_forget.restype = None
    return lib


def keep_record(path: Path) -> int:
    """Keep in a file, best in memory (``/run``), which originals are in repair, for the next daemon.

    Before anything else is done here. How many the last one has left; OSError: nothing is kept.
    """
    left: int = _native().sockmi_in_repair_keep(os.fsencode(path))
    if left < 0:
        raise OSError(-left, os.strerror(-left), str(path))
    return left


class RepairEngine:
    """See :class:`sockmi.engine.base.Engine`. All calls from one thread."""

    name: Literal["repair"] = "repair"
    carries_urgent: Literal[False] = False
    version = ""

    def __init__(
        self, inject_mark: int = INJECT_MARK, owners: Owners | None = None, rare_options: bool = True
    ) -> None:
        """``inject_mark``: SO_MARK of segments made for copies; the hold of a tuple must let it in.

        ``rare_options``: of connections, look also at socket options that hardly any program sets
        (``RARE`` in ``options.c``). They cost most of the time of a capture; if they are left
        out, the fidelity says so.
        """
        self.owners = owners or Owners()
        self._inject_mark = inject_mark
        self._rare_options = rare_options
        self._buffer = buffer_of(_FIRST_BUFFER_BYTES)

    def inspect(self, fds: Sequence[int]) -> list[SocketFacts]:
        """Preflight of each descriptor, in order."""
        return preflight.inspect_here(fds)

    def look(self, fds: Sequence[int]) -> list[SocketFacts]:
        """What there is to see of each descriptor in a second. For any thread."""
        return preflight.inspect(fds)

    def judge(self, fds: Sequence[int], seen: list[SocketFacts]) -> list[SocketFacts]:
        """As it was seen: there is nothing more to know."""
        return seen

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """Stop every process that holds one of ``inodes``."""
        return self.owners.stop(inodes, pids, timeout_s)

    def resume(self, inodes: Sequence[int]) -> None:
        """The inverse of ``stop``."""
        self.owners.resume(inodes)

    def obstacles(self, inodes: Sequence[int]) -> list[Refusal | None]:
        """What would keep the owners of each socket from being stopped, as far as it shows."""
        return self.owners.verdicts(inodes)

    def capture(self, fds: Sequence[int], thaw_after_s: float = 1.0) -> list[Captured | Refusal]:
        """Read the whole state of each stopped and held socket; leaves it as it was."""
        captured: list[Captured | Refusal | None] = [None] * len(fds)
        todo = list(range(len(fds)))
        while todo:
            todo = self._capture_some(fds, todo, captured)
        return [item for item in captured if item is not None]

    def _capture_some(
        self, fds: Sequence[int], todo: list[int], captured: list[Captured | Refusal | None]
    ) -> list[int]:
        """Capture those in ``todo``; return the ones for which the buffer was too small, and enlarge it."""
        results = room(len(todo))
        buffer = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer)
        numbers = ints([fds[i] for i in todo])
        call = _native().sockmi_capture if self._rare_options else _native().sockmi_capture_common
        call(numbers, len(todo), ctypes.byref(buffer), len(self._buffer), results)
        del buffer
        view = memoryview(self._buffer)
        again: list[int] = []
        wanted = 0
        for i, result in zip(todo, RESULT.iter_unpack(results.raw), strict=False):
            code, offset, length = result[0], result[4], result[5]
            if code == Result.OK:
                captured[i] = Captured(bytes(view[offset : offset + length]), fidelity_of(result))
            elif code == Result.NO_ROOM:
                again.append(i)
                wanted += length + 8
            else:
                captured[i] = refusal_of(result, Code.INTERNAL)
        view.release()
        if again and wanted > len(self._buffer):
            self._buffer = buffer_of(wanted)
        return again

    def compare(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Refuse what does not equal its image any more; changes nothing."""
        return self._with_images(_native().sockmi_compare, fds, images, Code.INTERNAL)

    def release(
        self, fds: Sequence[int], images: Sequence[bytes], *, owned: bool = False, together: bool = False
    ) -> list[Refusal | None]:
        """Close each original without a packet, if it still equals its image; see the contract.

        ``owned`` is not asked: its owners are stopped.
        """
        call = _native().sockmi_release_together if together else _native().sockmi_release
        return self._with_images(call, fds, images, Code.INTERNAL)

    def deaden(self, fd: int) -> Refusal | None:
        """Finish ``release`` of a bound or unconnected original."""
        if _native().sockmi_deaden(fd) == 0:
            return None
        error = os.strerror(ctypes.get_errno())
        return Refusal(Code.INTERNAL, f"it cannot be taken away from its owner: {error}; close it there")

    def lives(self, fd: int, kind: Kind) -> bool:
        """Whether a copy is dormant no more: it listens, or is out of repair."""
        if kind is not Kind.LISTENING:
            return not self.in_repair(fd)
        with socket.socket(fileno=os.dup(fd)) as each:
            return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def in_repair(self, fd: int) -> bool:
        """Whether a socket is in repair: if it is one of ours, dormant."""
        with socket.socket(fileno=os.dup(fd)) as each:
            return bool(each.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR))

    def end_repair(self, fd: int) -> bool:
        """Lead a socket out of repair that a killed daemon left in it; False if it was not."""
        return bool(_native().sockmi_end_repair(fd))

    def left_in_repair(self) -> set[int]:
        """The inodes of originals that a killed daemon left in repair, or with an option changed."""
        inodes = (ctypes.c_uint64 * _IN_REPAIR_MAX)()
        return set(inodes[: _native().sockmi_in_repair_left(inodes, _IN_REPAIR_MAX)])

    def forget_left(self) -> None:
        """What is left in repair still has no owner."""
        _native().sockmi_in_repair_forget()

    def renew(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Refuse those of which a timer has run out: timers run in repair as well, and count."""
        return self._with_images(_native().sockmi_lapsed, fds, images, Code.RESTORE)

    def activate(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Bring dormant copies to life. One that is refused has never lived."""
        return self._with_images(_native().sockmi_activate, fds, images, Code.RESTORE)

    @staticmethod
    def _with_images(
        call: Any, fds: Sequence[int], images: Sequence[bytes], failed: Code
    ) -> list[Refusal | None]:
        given, results = Images(images), room(len(fds))
        if not call(ints(fds), given.pointers, given.lengths, len(fds), results):
            return [None] * len(fds)
        unpacked = itertools.islice(RESULT.iter_unpack(results.raw), len(fds))
        return [None if result[0] == Result.OK else refusal_of(result, failed) for result in unpacked]

    def restore(self, images: Sequence[bytes], placements: Sequence[Placement]) -> list[Restored | Refusal]:
        """Make a dormant copy of each image: whole, non-blocking, close-on-exec."""
        count = len(images)
        given, results, fds = Images(images), room(count), (ctypes.c_int * count)()
        where = b"".join(map(packed_placement, placements))
        _native().sockmi_restore(given.pointers, given.lengths, where, count, self._inject_mark, fds, results)
        return [
            Restored(fd, fidelity_of(result)) if result[0] == Result.OK else refusal_of(result)
            for fd, result in zip(fds, RESULT.iter_unpack(results.raw), strict=False)
        ]

    def discard(self, fds: Sequence[int]) -> None:
        """The inverse of ``restore``: close dormant copies without a packet."""
        _native().sockmi_discard(ints(fds), len(fds))

    def deliver(
        self, image: bytes, placement: Placement, device: str | None, uid: int, *, only_ask: bool = False
    ) -> Refusal | None:
        """Only the kernel module can put a connection into an accept queue."""
        return Refusal(
            Code.RESTORE,
            "only the kernel engine can give a connection to a program that does not ask for it; "
            "load the module (modprobe sockmi)",
        )
