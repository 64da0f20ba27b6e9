# SPDX-License-Identifier: MIT
"""The C codec, for the hot path: the same verdicts as sockmi.image.decode(), in about a microsecond."""

from __future__ import annotations

import ctypes
import functools

from sockmi.image.sections import Place
from sockmi.image.words import LIMIT_BYTES, ErrorClass, ImageError
from sockmi.native import library

_ERROR_BYTES = 160


class _Endpoint(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_ubyte * 16),
        ("port", ctypes.c_uint16),
        ("reserved", ctypes.c_uint16),
        ("scope_id", ctypes.c_uint32),
    )


class _Stamp(ctypes.Structure):
    _fields_ = (
        ("fields", ctypes.c_uint32),
        ("hop", ctypes.c_uint32),
        ("migration_id", ctypes.c_ubyte * 16),
        ("home_id", ctypes.c_ubyte * 16),
        ("listener_id", ctypes.c_ubyte * 16),
        ("origin", _Endpoint),
    )


@functools.cache
def _functions() -> ctypes.CDLL:
    lib = library()
    lib.sockmi_image_validate.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p)
    lib.sockmi_image_validate.restype = ctypes.c_int
    lib.sockmi_image_error_name.argtypes = (ctypes.c_int,)
    lib.sockmi_image_error_name.restype = ctypes.c_char_p
    lib.sockmi_image_stamp.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(_Stamp))
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
    order = _Stamp()
    for bit, key, value in (
        (1, "migration_id", migration_id),
        (2, "home_id", home_id),
        (4, "listener_id", listener_id),
    ):
        if value is not None:
            if len(value) != 16:
                raise ValueError(f"{key} has {len(value)} bytes, not 16")
            order.fields |= bit
            setattr(order, key, (ctypes.c_ubyte * 16)(*value))
    if origin is not None:
        order.fields |= 8
        order.origin = _Endpoint((ctypes.c_ubyte * 16)(*origin.address), origin.port, 0, origin.scope_id)
    if hop is not None:
        order.fields |= 16
        order.hop = hop
    buffer = (ctypes.c_char * len(image)).from_buffer(image)
    result = _functions().sockmi_image_stamp(buffer, len(image), ctypes.byref(order))
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
