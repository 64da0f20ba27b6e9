# SPDX-License-Identifier: MIT
"""The ``repair`` engine: TCP_REPAIR from user space, for hosts where no kernel module can be loaded.

The system calls are in libsockmi-engine (``capture.c``, ``restore.c``, ``activate.c``, ``release.c``),
one call for a whole chunk; here results become images, descriptors and refusals in words.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine import preflight
from sockmi.engine.base import Captured, Fidelity, Kind, Placement, Restored, SocketFacts
from sockmi.engine.owners import Owners
from sockmi.native import library
from sockmi.refusal import Code, Refusal

#: SO_MARK of the segments that tell a copy what its peer has closed; a hold lets it in.
INJECT_MARK = 0x50C1

_TCP_REPAIR = 19
_REPAIR_OFF_NO_PROBE = -1
_RESULT = struct.Struct("=iiiiQQQQQ6HI")  # struct sockmi_result (engine.h)
_PLACEMENT = struct.Struct("=16sHHIB3x")  # struct sockmi_placement
_FIRST_BUFFER_BYTES = 1 << 20


class _Result(IntEnum):
    """enum sockmi_code (engine.h)."""

    OK = 0
    FAILED = 1
    NOT_TCP = 2
    NO_SOCKET = 3
    NO_PRIVILEGE = 4
    WRONG_STATE = 5
    URGENT_DATA = 6
    IN_REPAIR = 7
    CHANGED = 8
    NO_ROOM = 9
    TOO_LARGE = 10
    BAD_IMAGE = 11
    TUPLE_TAKEN = 12
    PORT_TAKEN = 13
    NO_ADDRESS = 14
    SCALE = 15
    UNIT = 16
    NOT_DELIVERED = 17


#: What each result means to the user; {errno}, {step}, {state}, {detail} are filled in.
_WORDS: dict[_Result, tuple[Code, str]] = {
    _Result.FAILED: (Code.RESTORE, "{step} failed: {errno}; see the kernel's log, and `sockmi doctor`"),
    _Result.NOT_TCP: (Code.NOT_TCP, "the descriptor is no TCP socket; only TCP sockets can be moved"),
    _Result.NO_SOCKET: (Code.NO_SUCH_SOCKET, "the descriptor is not open, or no socket ({errno})"),
    _Result.NO_PRIVILEGE: (
        Code.NO_PRIVILEGE,
        "{step}: {errno}; the daemon needs CAP_NET_ADMIN over the socket's network namespace",
    ),
    _Result.WRONG_STATE: (
        Code.STATE,
        "the socket is {state} and cannot be moved (a closed one only if nothing is left to read)",
    ),
    _Result.URGENT_DATA: (
        Code.URGENT_DATA,
        "urgent data is in the receive queue, and cannot be moved by this engine; try again when it is read",
    ),
    _Result.IN_REPAIR: (
        Code.IN_REPAIR,
        "TCP_REPAIR is on: somebody else is moving or repairing this socket; let that finish first",
    ),
    _Result.CHANGED: (
        Code.CHANGED,
        "the socket changed while it was frozen ({step}); it goes on where it was, try again",
    ),
    _Result.TOO_LARGE: (
        Code.TOO_LARGE,
        "{step}: the queues are too large for this host; raise net.ipv4.tcp_mem, or try when less is queued",
    ),
    _Result.BAD_IMAGE: (Code.IMAGE, "the image is refused: {image}"),
    _Result.TUPLE_TAKEN: (
        Code.TUPLE_TAKEN,
        "this host has a connection with the same addresses and ports already; choose another port",
    ),
    _Result.PORT_TAKEN: (
        Code.PORT_TAKEN,
        "the local port is in use on this host; free it, or choose another",
    ),
    _Result.NO_ADDRESS: (
        Code.RESTORE,
        "{step}: {errno}; the local address is not this host's, or no route leads to the peer",
    ),
    _Result.SCALE: (
        Code.WINDOW_SCALE,
        "the SYN offered another window scale than this host's {detail}; make net.ipv4.tcp_rmem equal",
    ),
    _Result.UNIT: (
        Code.TIMESTAMP_UNIT,
        "the connection's timestamps have a unit that this host's kernel or route does not offer",
    ),
    _Result.NOT_DELIVERED: (
        Code.RESTORE,
        "the copy was not told that its peer has closed: packets with the inject mark do not arrive; "
        "see the firewall's input rules",
    ),
}


@functools.cache
def _native() -> Any:
    """libsockmi-engine, with the prototypes of the functions used here."""
    lib = library()
    pointer, size, ints = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)
    for capture in (lib.sockmi_capture, lib.sockmi_capture_common):
        capture.argtypes = [ints, size, pointer, size, pointer]
    lib.sockmi_restore.argtypes = [pointer, pointer, pointer, size, ctypes.c_uint32, ints, pointer]
    lib.sockmi_activate.argtypes = [ints, pointer, pointer, size, pointer]
    lib.sockmi_release.argtypes = [ints, pointer, pointer, size, pointer]
    lib.sockmi_discard.argtypes = [ints, size]
    lib.sockmi_discard.restype = None
    lib.sockmi_deaden.argtypes = [ctypes.c_int]
    for name in ("sockmi_fidelity_name", "sockmi_option_name", "sockmi_step_name"):
        getattr(lib, name).argtypes = [ctypes.c_uint]
        getattr(lib, name).restype = ctypes.c_char_p
    lib.sockmi_image_error_name.argtypes = [ctypes.c_int]
    lib.sockmi_image_error_name.restype = ctypes.c_char_p
    return lib


@functools.lru_cache(maxsize=4096)
def _names(mask: int) -> tuple[str, ...]:
    """Names of the fidelity bits in ``mask``."""
    found = (_native().sockmi_fidelity_name(bit) for bit in range(mask.bit_length()) if mask >> bit & 1)
    return tuple(name.decode() for name in found)


def _option_names(ids: Sequence[int], count: int) -> list[str]:
    """``option:TCP_..`` for each option that the host did not take."""
    names = [
        f"option:{(_native().sockmi_option_name(i) or str(i).encode()).decode().lower()}" for i in ids if i
    ]
    return [*names, f"options:{count - len(names)}-more"] if count > len(names) else names


def _fidelity(result: tuple[Any, ...]) -> Fidelity:
    carried, approximated, reset, lost = *result[6:9], result[15]
    return Fidelity(
        list(_names(carried & ~approximated & ~reset)),
        list(_names(approximated & ~reset)),
        [*_names(reset), *_option_names(result[9:15], lost)] if lost else list(_names(reset)),
    )


def _refusal(result: tuple[Any, ...], failed: Code = Code.RESTORE) -> Refusal:
    """The words for a result that is not OK; ``failed`` is the code of a system call's failure."""
    code, error, step, detail = result[:4]
    meaning, words = _WORDS[_Result(code)]
    if code == _Result.FAILED:
        meaning = failed
    image = (_native().sockmi_image_error_name(detail) or b"") if code == _Result.BAD_IMAGE else b""
    option = _native().sockmi_option_name(detail) if step == 4 else None
    name = (_native().sockmi_step_name(step) or b"?").decode()
    return Refusal(
        meaning,
        words.format(
            errno=os.strerror(error) if error else "no error",
            step=f"{name} {option.decode()}" if option else name,
            state=preflight.STATES.get(detail, str(detail)),
            detail=detail,
            image=image.decode(),
        ),
    )


class _Images:
    """Images as the C library takes them: pointers and lengths, nothing is copied."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self._keep = [image if isinstance(image, bytes) else bytes(image) for image in images]
        self.pointers = (ctypes.c_char_p * len(images))(*self._keep)
        self.lengths = (ctypes.c_size_t * len(images))(*map(len, self._keep))


def _ints(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int * len(numbers))(*numbers)


def _room(count: int) -> Any:
    return ctypes.create_string_buffer(max(1, count) * _RESULT.size)


def _placement(placement: Placement) -> bytes:
    endpoint: Endpoint | None = placement.local
    if endpoint is None:
        return _PLACEMENT.pack(bytes(16), 0, 0, 0, placement.transparent)
    packed = endpoint.address.packed
    if isinstance(endpoint.address, IPv4Address):
        packed = bytes(10) + b"\xff\xff" + packed
    return _PLACEMENT.pack(packed, endpoint.port, 0, 0, placement.transparent)


class RepairEngine:
    """See :class:`sockmi.engine.base.Engine`. All calls from one thread."""

    name = "repair"

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
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)

    def inspect(self, fds: Sequence[int]) -> list[SocketFacts]:
        """Preflight of each descriptor, in order."""
        return preflight.inspect(fds)

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """Stop every process that holds one of ``inodes``."""
        return self.owners.stop(inodes, pids, timeout_s)

    def resume(self, inodes: Sequence[int]) -> None:
        """The inverse of ``stop``."""
        self.owners.resume(inodes)

    def capture(self, fds: Sequence[int]) -> list[Captured | Refusal]:
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
        results = _room(len(todo))
        buffer = (ctypes.c_char * len(self._buffer)).from_buffer(self._buffer)
        numbers = _ints([fds[i] for i in todo])
        call = _native().sockmi_capture if self._rare_options else _native().sockmi_capture_common
        call(numbers, len(todo), ctypes.byref(buffer), len(self._buffer), results)
        del buffer
        view = memoryview(self._buffer)
        again: list[int] = []
        wanted = 0
        for i, result in zip(todo, _RESULT.iter_unpack(results.raw), strict=False):
            code, offset, length = result[0], result[4], result[5]
            if code == _Result.OK:
                captured[i] = Captured(bytes(view[offset : offset + length]), _fidelity(result))
            elif code == _Result.NO_ROOM:
                again.append(i)
                wanted += length + 8
            else:
                captured[i] = _refusal(result, Code.INTERNAL)
        view.release()
        if again and wanted > len(self._buffer):
            self._buffer = bytearray(wanted)
        return again

    def release(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Close each original without a packet, if it still equals its image; see the contract."""
        return self._with_images(_native().sockmi_release, fds, images, Code.INTERNAL)

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
        if not self.in_repair(fd):
            return False
        with socket.socket(fileno=os.dup(fd)) as each:
            each.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_NO_PROBE)
            return True

    def activate(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Bring dormant copies to life. One that is refused has never lived."""
        return self._with_images(_native().sockmi_activate, fds, images, Code.RESTORE)

    @staticmethod
    def _with_images(
        call: Any, fds: Sequence[int], images: Sequence[bytes], failed: Code
    ) -> list[Refusal | None]:
        given, results = _Images(images), _room(len(fds))
        if not call(_ints(fds), given.pointers, given.lengths, len(fds), results):
            return [None] * len(fds)
        unpacked = itertools.islice(_RESULT.iter_unpack(results.raw), len(fds))
        return [None if result[0] == _Result.OK else _refusal(result, failed) for result in unpacked]

    def restore(self, images: Sequence[bytes], placements: Sequence[Placement]) -> list[Restored | Refusal]:
        """Make a dormant copy of each image: whole, non-blocking, close-on-exec."""
        count = len(images)
        given, results, fds = _Images(images), _room(count), (ctypes.c_int * count)()
        where = b"".join(map(_placement, placements))
        _native().sockmi_restore(given.pointers, given.lengths, where, count, self._inject_mark, fds, results)
        return [
            Restored(fd, _fidelity(result)) if result[0] == _Result.OK else _refusal(result)
            for fd, result in zip(fds, _RESULT.iter_unpack(results.raw), strict=False)
        ]

    def discard(self, fds: Sequence[int]) -> None:
        """The inverse of ``restore``: close dormant copies without a packet."""
        _native().sockmi_discard(_ints(fds), len(fds))
