# SPDX-License-Identifier: MIT
"""What both engines' C calls give back, in words: results, refusals, fidelity; and how they take images."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine import preflight
from sockmi.engine.base import Fidelity, Placement
from sockmi.native import library
from sockmi.refusal import Code, Refusal

RESULT = struct.Struct("=iiiiQQQQQ6HI")  # struct sockmi_result (engine.h)
_PLACEMENT = struct.Struct("=16sHHIB3x")  # struct sockmi_placement


class Result(IntEnum):
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
    REFUSED = 18
    TOO_LATE = 19
    LAPSED = 20


#: What each result means to the user; {errno}, {step}, {state}, {detail} are filled in.
_WORDS: dict[Result, tuple[Code, str]] = {
    Result.FAILED: (Code.RESTORE, "{step} failed: {errno}; see the kernel's log, and `sockmi doctor`"),
    Result.NOT_TCP: (Code.NOT_TCP, "the descriptor is no TCP socket; only TCP sockets can be moved"),
    Result.NO_SOCKET: (Code.NO_SUCH_SOCKET, "the descriptor is not open, or no socket ({errno})"),
    Result.NO_PRIVILEGE: (
        Code.NO_PRIVILEGE,
        "{step}: {errno}; the daemon needs CAP_NET_ADMIN over the socket's network namespace",
    ),
    Result.WRONG_STATE: (
        Code.STATE,
        "the socket is {state} and cannot be moved (a closed one only if nothing is left to read)",
    ),
    Result.URGENT_DATA: (
        Code.URGENT_DATA,
        "urgent data is in the receive queue, and cannot be moved by this engine; try again when it is read",
    ),
    Result.IN_REPAIR: (
        Code.IN_REPAIR,
        "TCP_REPAIR is on: somebody else is moving or repairing this socket; let that finish first",
    ),
    Result.CHANGED: (
        Code.CHANGED,
        "the socket changed while it was frozen ({step}); it goes on where it was, try again",
    ),
    Result.TOO_LARGE: (
        Code.TOO_LARGE,
        "{step}: the queues are too large for this host; raise net.ipv4.tcp_mem, or try when less is queued",
    ),
    Result.NO_ROOM: (
        Code.TOO_LARGE,
        "{step}: the image is larger than this host's buffers for images; try when less is queued",
    ),
    Result.BAD_IMAGE: (Code.IMAGE, "the image is refused: {image}"),
    Result.TUPLE_TAKEN: (
        Code.TUPLE_TAKEN,
        "this host has a connection with the same addresses and ports already; choose another port",
    ),
    Result.PORT_TAKEN: (
        Code.PORT_TAKEN,
        "the local port is in use on this host; free it, or choose another",
    ),
    Result.NO_ADDRESS: (
        Code.RESTORE,
        "{step}: {errno}; the local address is not this host's, or no route leads to the peer",
    ),
    Result.SCALE: (
        Code.WINDOW_SCALE,
        "the SYN offered another window scale than this host's {detail}; make net.ipv4.tcp_rmem equal",
    ),
    Result.UNIT: (
        Code.TIMESTAMP_UNIT,
        "the connection's timestamps have a unit that this host's kernel or route does not offer",
    ),
    Result.NOT_DELIVERED: (
        Code.RESTORE,
        "the copy was not told that its peer has closed: packets with the inject mark do not arrive; "
        "see the firewall's input rules",
    ),
    Result.TOO_LATE: (
        Code.TIMEOUT,
        "the copy had been waiting for longer than the module's parameter dormant_max_ms, and was discarded",
    ),
    Result.LAPSED: (
        Code.TIMEOUT,
        "the copy had been waiting for so long that its timers ran out; it is made anew, ask again",
    ),
}

#: What the numbers of ``enum sockmi_refusal`` (kmod/uapi/sockmi.h) mean that have no result of their own.
_MODULE_WORDS: dict[int, tuple[Code, str]] = {
    3: (Code.MPTCP, "it is part of a multipath connection, which cannot be moved piece by piece"),
    4: (Code.ULP, "kernel TLS or another protocol is on top of it, whose state the module does not carry"),
    5: (Code.SOCKMAP, "a kernel service (a BPF map of sockets, NFS, ...) owns it"),
    8: (Code.TCP_MD5, "it is signed by TCP-MD5 or TCP-AO, whose keys are not carried; end it instead"),
    9: (Code.STATE, "it is being opened with TCP Fast Open; try again when it is established"),
    10: (Code.STATE, "accurate ECN is negotiated, and this kernel's module cannot carry it"),
    12: (Code.ALREADY_MIGRATING, "somebody else has claimed it from the kernel module; wait for that"),
    13: (Code.INTERNAL, "its queues and sequence numbers do not fit each other; see the kernel's log"),
    16: (Code.RESTORE, "the copy's socket is of another address family than the image"),
    17: (Code.RESTORE, "the copy's socket is in use; this should not happen"),
    22: (
        Code.WINDOW_SCALE,
        "the SYN offered other options than this host would; make net.ipv4.tcp_rmem, tcp_window_scaling, "
        "tcp_sack and tcp_timestamps equal",
    ),
    23: (Code.RESTORE, "the kernel has no memory for it ({errno}); try again"),
    24: (
        Code.NO_SUCH_SOCKET,
        "it lives in another network namespace than this daemon's device; use the daemon of that one",
    ),
    25: (
        Code.LIST_FULL,
        "the kernel module's list of this kind is full; have applications import, or raise sockmi.max_* "
        "(sysctl)",
    ),
    26: (Code.ULP, "the image has kernel TLS keys, which this module does not take"),
    27: (Code.ZERO_COPY, "its owner has completions of MSG_ZEROCOPY to come; try again when they are read"),
    29: (Code.RESTORE, "no program of this host listens for it; start one, or import it"),
    30: (
        Code.RESTORE,
        "who listens for it is multipath TCP, has keys, a filter or an IPsec policy, or is the kernel's own; "
        "import it",
    ),
    31: (Code.NO_PRIVILEGE, "who listens for it is neither root's nor of the user who had it; import it"),
    32: (
        Code.LIST_FULL,
        "the accept queue of who listens for it is full; let that accept, or raise its backlog",
    ),
    33: (
        Code.LOCKED,
        "a call keeps the socket, or that of who listens for it, locked; try again when it has returned",
    ),
    34: (Code.IPSEC, "it has an IPsec policy of its own, and would go on in the clear; end it instead"),
}


@functools.cache
def _native() -> Any:
    """libsockmi-engine, with the prototypes of the functions used here."""
    lib = library()
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


def fidelity_of(result: tuple[Any, ...]) -> Fidelity:
    """What was carried, and what not."""
    carried, approximated, reset, lost = *result[6:9], result[15]
    return Fidelity(
        list(_names(carried & ~approximated & ~reset)),
        list(_names(approximated & ~reset)),
        [*_names(reset), *_option_names(result[9:15], lost)] if lost else list(_names(reset)),
    )


def refusal_of(result: tuple[Any, ...], failed: Code = Code.RESTORE) -> Refusal:
    """The words for a result that is not OK; ``failed`` is the code of a system call's failure."""
    code, error, step, detail = result[:4]
    if code == Result.REFUSED:
        meaning, words = _MODULE_WORDS.get(detail, (Code.INTERNAL, "the kernel module refuses it ({detail})"))
    else:
        meaning, words = _WORDS[Result(code)]
    if code == Result.FAILED:
        meaning = failed
    image = (_native().sockmi_image_error_name(detail) or b"") if code == Result.BAD_IMAGE else b""
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


class Images:
    """Images as the C library takes them: pointers and lengths, nothing is copied."""

    def __init__(self, images: Sequence[bytes]) -> None:
        self._keep = [image if isinstance(image, bytes) else bytes(image) for image in images]
        self.pointers = (ctypes.c_char_p * len(images))(*self._keep)
        self.lengths = (ctypes.c_size_t * len(images))(*map(len, self._keep))


def ints(numbers: Sequence[int]) -> Any:
    """A C array of int."""
    return (ctypes.c_int * len(numbers))(*numbers)


def room(count: int) -> Any:
    """Where C writes ``count`` results."""
    return ctypes.create_string_buffer(max(1, count) * RESULT.size)


def packed_placement(placement: Placement) -> bytes:
    """As ``struct sockmi_placement``."""
    endpoint: Endpoint | None = placement.local
    if endpoint is None:
        return _PLACEMENT.pack(bytes(16), 0, 0, 0, placement.transparent)
    packed = endpoint.address.packed
    if isinstance(endpoint.address, IPv4Address):
        packed = bytes(10) + b"\xff\xff" + packed
    return _PLACEMENT.pack(packed, endpoint.port, 0, 0, placement.transparent)
