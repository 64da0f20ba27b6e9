# SPDX-License-Identifier: MIT
"""The C codec, for the hot path: the same verdicts as sockmi.image.decode(), in about a microsecond."""

from __future__ import annotations

import ctypes
import functools
import struct

from sockmi.image.patch import Summary
from sockmi.image.sections import Identity, Place
from sockmi.image.words import LIMIT_BYTES, ErrorClass, Family, ImageError, Kind, State
from sockmi.native import library

_ERROR_BYTES = 160


_STAMP = struct.Struct("=II16s16s16s16sH2xI")  # struct sockmi_stamp
_SUMMARY = struct.Struct("=" + Identity.LAYOUT.lstrip("<") + "QQQQ")  # struct sockmi_summary
_NO_ID = bytes(16)
_NO_PLACE = Place()
# A look-up in a dictionary, as calling an enumeration takes longer than the rest of a summary.
_FAMILIES = {one.value: one for one in Family}
_KINDS = {one.value: one for one in Kind}
_STATES = {one.value: one for one in State}


@functools.cache
def _functions() -> ctypes.CDLL:
    lib = library()
    lib.sockmi_image_validate.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p)
    lib.sockmi_image_validate.restype = ctypes.c_int
    lib.sockmi_image_error_name.argtypes = (ctypes.c_int,)
    lib.sockmi_image_error_name.restype = ctypes.c_char_p
    lib.sockmi_image_examine.argtypes = (
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p,
    )  # fmt: skip
    lib.sockmi_image_examine.restype = ctypes.c_int
    lib.sockmi_image_stamp.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    lib.sockmi_image_stamp.restype = ctypes.c_int
    lib.sockmi_image_replace.argtypes = (
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint16,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    lib.sockmi_image_replace.restype = ctypes.c_ssize_t
    return lib


def _error(error_class: int, message: str) -> ImageError:
    name = _functions().sockmi_image_error_name(error_class).decode()
    return ImageError(ErrorClass(name), message)


def validate(image: bytes, limit: int = LIMIT_BYTES) -> None:
    """Check an image; raises ImageError."""
    message = ctypes.create_string_buffer(_ERROR_BYTES)
    result = _functions().sockmi_image_validate(image, len(image), limit, message)
    if result:
        raise _error(result, message.value.decode(errors="replace"))


def examine(image: bytes, limit: int = LIMIT_BYTES) -> Summary:
    """Check an image, as ``validate`` does, and say whose it is, as ``peek``; raises ImageError."""
    message, summary = ctypes.create_string_buffer(_ERROR_BYTES), ctypes.create_string_buffer(_SUMMARY.size)
    result = _functions().sockmi_image_examine(image, len(image), limit, summary, message)
    if result:
        raise _error(result, message.value.decode(errors="replace"))
    (migration, home, listener, *ends, hop, uid, family, kind, state, v6only, _unused,
     received, sent, unsent, context) = _SUMMARY.unpack(summary)  # fmt: skip
    return Summary(
        migration, home, listener, _FAMILIES[family], _KINDS[kind], _STATES[state], bool(v6only),
        Place(*ends[0:3]), Place(*ends[3:6]), Place(*ends[6:9]), hop, uid,
        received, sent, unsent, context, len(image),
    )  # fmt: skip


def stamp(
    image: bytearray,
    *,
    migration_id: bytes | None = None,
    home_id: bytes | None = None,
    listener_id: bytes | None = None,
    origin: Place | None = None,
    hop: int | None = None,
) -> None:
    """Change the identity in place, in constant time; raises ImageError if the image cannot be read."""
    fields = 0
    for bit, value in ((1, migration_id), (2, home_id), (4, listener_id)):
        if value is not None:
            if len(value) != 16:
                raise ValueError(f"an id has {len(value)} bytes, not 16")
            fields |= bit
    fields |= 8 * (origin is not None) | 16 * (hop is not None)
    place = origin or _NO_PLACE
    order = _STAMP.pack(
        fields, hop or 0, migration_id or _NO_ID, home_id or _NO_ID, listener_id or _NO_ID,
        place.address, place.port, place.scope_id,
    )  # fmt: skip
    buffer = ctypes.c_char.from_buffer(image) if image else None
    result = _functions().sockmi_image_stamp(
        ctypes.byref(buffer) if buffer is not None else None, len(image), order
    )
    if result:
        raise _error(result, "the image cannot be stamped: its header or its first section is wrong")


def with_section(image: bytes, kind: int, payload: bytes) -> bytes:
    """As sockmi.image.with_section(); ValueError if the image or the payload's length is wrong."""
    buffer = ctypes.create_string_buffer(len(image) + len(payload) + 16)
    written: int = _functions().sockmi_image_replace(
        image, len(image), kind, payload, len(payload), buffer, len(buffer)
    )
    if written < 0:
        raise ValueError(f"section {kind} of {len(payload)} bytes cannot be put into this image ({written})")
    return buffer.raw[:written]
