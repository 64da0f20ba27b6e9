# SPDX-License-Identifier: MIT
"""Messages to bytes and back. Pure; strict: sizes before contents, nothing left over.

Big-endian. A message is a version octet, a type octet and the fields of ``LAYOUT`` in order;
``docs/protocol.md`` is made from that table. The transport frames, seals and authenticates.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from sockmi.protocol import messages
from sockmi.protocol.fields import ADDRESS, ID, OPTIONAL_ID, U16, U32, U64, CodecError, Field, many, pair
from sockmi.protocol.messages import STREAM_ONLY, Message
from sockmi.protocol.record_fields import (
    CHUNK,
    CODE,
    COUNTS,
    HOP,
    HOPS,
    IMAGES,
    ITEM,
    MODES,
    MOVE,
    NEEDS,
    PLACE,
    PLACES,
    POSITIONS,
    RESULTS,
    VERDICT,
)
from sockmi.protocol.records import CHUNK_ITEMS_MAX, IMAGE_BYTES_MAX, PAGE_ITEMS_MAX

VERSION = 1
DATAGRAM_BYTES_MAX = 1200
STREAM_BYTES_MAX = IMAGE_BYTES_MAX + (1 << 20)

LAYOUT: Mapping[type, tuple[tuple[str, Field], ...]] = {
    messages.Request: (
        ("batch", ID),
        ("counts", COUNTS),
        ("needs", NEEDS),
        ("size_bytes", U64),
        ("modes", MODES),
        ("target", OPTIONAL_ID),
        ("target_address", ADDRESS),
    ),
    messages.Offer: (
        ("batch", ID),
        ("rooms", COUNTS),
        ("waiting", COUNTS),
        ("load", U16),
        ("weight", U16),
        ("modes", MODES),
        ("lease_ms", U32),
    ),
    messages.Release: (("batch", ID), ("chosen", many(ID, 60))),
    messages.Reserve: (
        ("batch", ID),
        ("page", U32),
        ("items", many(ITEM, PAGE_ITEMS_MAX)),
        ("modes", MODES),
    ),
    messages.Reserved: (("batch", ID), ("page", U32), ("places", PLACES)),
    messages.Ship: (
        ("chunk", CHUNK),
        ("migrations", many(ID, CHUNK_ITEMS_MAX)),
        ("places", many(PLACE, CHUNK_ITEMS_MAX)),
        ("images", IMAGES),
    ),
    messages.Prepared: (("chunk", CHUNK), ("results", RESULTS)),
    messages.Confirm: (("chunk", CHUNK), ("committed", POSITIONS)),
    messages.Active: (
        ("chunk", CHUNK),
        ("refused", many(pair(U16, CODE, "3"), CHUNK_ITEMS_MAX)),
        ("listed", POSITIONS),
    ),
    messages.Abort: (("chunk", CHUNK),),
    messages.Query: (("chunk", CHUNK),),
    messages.Undecided: (("chunk", CHUNK),),
    messages.Reroute: (("moves", many(MOVE, 16)),),
    messages.Rerouted: (("verdicts", many(pair(HOP, VERDICT, "21"), 48)),),
    messages.Ended: (("hops", HOPS),),
    messages.Collected: (("hops", HOPS),),
    messages.Audit: (("hops", HOPS),),
    messages.Audited: (("gone", HOPS),),
}
TYPES: tuple[type, ...] = tuple(LAYOUT)
"""The type octet of a message is its place in this tuple."""
_NUMBERS = {kind: number for number, kind in enumerate(TYPES)}


def encode(message: Message) -> bytes:
    """The bytes of ``message``; raise CodecError if a field is out of its range."""
    kind = type(message)
    out = bytearray((VERSION, _NUMBERS[kind]))
    try:
        for name, field in LAYOUT[kind]:
            field.put(out, getattr(message, name))
    except (struct.error, KeyError, OverflowError, ValueError) as error:
        if isinstance(error, CodecError):
            raise
        raise CodecError(f"{kind.__name__.upper()} cannot be written: {error}") from None
    most = STREAM_BYTES_MAX if kind in STREAM_ONLY else DATAGRAM_BYTES_MAX
    if len(out) > most:
        raise CodecError(f"{kind.__name__.upper()} of {len(out)} bytes, at most {most} are allowed")
    return bytes(out)


def decode(data: bytes | bytearray | memoryview) -> Message:
    """The message in ``data``, all of it; raise CodecError otherwise, whatever the bytes are."""
    if len(data) < 2:
        raise CodecError(f"{len(data)} bytes are no message")
    if data[0] != VERSION:
        raise CodecError(f"protocol version {data[0]}; this daemon speaks {VERSION}: upgrade the older one")
    if data[1] >= len(TYPES):
        raise CodecError(f"message type {data[1]} is not known")
    kind = TYPES[data[1]]
    most = STREAM_BYTES_MAX if kind in STREAM_ONLY else DATAGRAM_BYTES_MAX
    if len(data) > most:
        raise CodecError(f"{kind.__name__.upper()} of {len(data)} bytes, at most {most} are allowed")
    view = memoryview(data)
    at = 2
    values = []
    try:
        for _unused, field in LAYOUT[kind]:
            value, at = field.get(view, at)
            values.append(value)
    except CodecError as error:
        raise CodecError(f"{kind.__name__.upper()}: {error}") from None
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise CodecError(f"{kind.__name__.upper()} is cut short or garbled: {error}") from None
    if at != len(view):
        raise CodecError(f"{kind.__name__.upper()}: {len(view) - at} bytes too many")
    message: Message = kind(*values)
    return message
