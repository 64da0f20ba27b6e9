# SPDX-License-Identifier: MIT
"""What a daemon reads and changes in an image without decoding all of it, in a few microseconds.

The images come from an engine, or were checked when they arrived: only what these functions need is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from sockmi.addresses import Endpoint
from sockmi.image import words as w
from sockmi.image.codec import check_header, checksum, pack_section, seal, walk
from sockmi.image.parse import SPECS, check_length
from sockmi.image.sections import FidelityName, Identity, Place
from sockmi.image.words import ErrorClass, Family, ImageError, Kind, Section, State

_SECTION = struct.Struct("<HHI")
_IDENTITY = struct.Struct(Identity.LAYOUT)
_ORIGIN = struct.Struct("<16sH2xI")
_HOP = struct.Struct("<I")
# Offsets in IDENTITY.
_MIGRATION_ID, _HOME_ID, _LISTENER_ID, _LOCAL_AT, _ORIGIN_AT, _HOP_AT = 0, 16, 32, 48, 96, 120


class Summary(NamedTuple):
    """Who an image is, and how large; lengths are in bytes."""

    migration_id: bytes
    home_id: bytes
    listener_id: bytes
    family: Family
    kind: Kind
    state: State
    v6only: bool
    local_place: Place
    remote_place: Place
    origin_place: Place
    hop: int
    owner_uid: int
    receive_bytes: int
    sent_bytes: int
    unsent_bytes: int
    context_bytes: int
    total_bytes: int

    @property
    def local(self) -> Endpoint | None:
        """Local endpoint, None if there is none."""
        return self.local_place.endpoint

    @property
    def remote(self) -> Endpoint | None:
        """Remote endpoint, None if there is none."""
        return self.remote_place.endpoint

    @property
    def origin(self) -> Endpoint | None:
        """What the peer knows the host as; None: the local endpoint."""
        return self.origin_place.endpoint


def _identity_at(image: bytes | bytearray, start: int) -> int:
    """Offset of IDENTITY's payload."""
    at = start + w.SECTION_HEADER_BYTES
    if len(image) < at + _IDENTITY.size:
        raise ImageError(ErrorClass.LENGTH, f"{len(image)} bytes are too few for an identity")
    if _SECTION.unpack_from(image, start) != (Section.IDENTITY, w.MANDATORY, _IDENTITY.size):
        raise ImageError(ErrorClass.SECTION, "the first section is not identity")
    return at


def _lengths(image: bytes | bytearray, start: int) -> Iterator[tuple[int, int]]:
    end = len(image)
    while start < end:
        if end - start < w.SECTION_HEADER_BYTES:
            raise ImageError(
                ErrorClass.LENGTH, "the bytes after the last section are less than a section header"
            )
        kind, _unused, length = _SECTION.unpack_from(image, start)
        start += w.SECTION_HEADER_BYTES + (length + 7 & ~7)
        if start > end:
            raise ImageError(
                ErrorClass.LENGTH, f"section {kind}: length {length} exceeds the bytes that are left"
            )
        yield kind, length


def peek(image: bytes | bytearray, limit: int = w.LIMIT_BYTES) -> Summary:
    """Read identity and sizes; raises ImageError if header, lengths or identity cannot be read."""
    start, _unused, _unused = check_header(image, limit)
    v = _IDENTITY.unpack_from(image, _identity_at(image, start))
    lengths = dict(_lengths(image, start))
    try:
        family, kind, state = Family(v[14]), Kind(v[15]), State(v[16])
    except ValueError as error:
        raise ImageError(ErrorClass.VALUE, f"identity: {error}") from None
    return Summary(
        v[0],
        v[1],
        v[2],
        family,
        kind,
        state,
        bool(v[17]),
        Place(v[3], v[4], v[5]),
        Place(v[6], v[7], v[8]),
        Place(v[9], v[10], v[11]),
        v[12],
        v[13],
        lengths.get(Section.RECEIVE_QUEUE, 0),
        lengths.get(Section.SENT_QUEUE, 0),
        lengths.get(Section.UNSENT_QUEUE, 0),
        lengths.get(Section.CONTEXT, 0),
        len(image),
    )


def queue_bytes(image: bytes) -> tuple[int, int, int]:
    """Of what is in its queues: received, sent and unacknowledged, not sent. ImageError as `peek`."""
    start, _unused, _unused = check_header(image, len(image))
    lengths = dict(_lengths(image, start))
    return (
        lengths.get(Section.RECEIVE_QUEUE, 0),
        lengths.get(Section.SENT_QUEUE, 0),
        lengths.get(Section.UNSENT_QUEUE, 0),
    )


def stamp(
    image: bytes,
    *,
    migration_id: bytes | None = None,
    home_id: bytes | None = None,
    listener_id: bytes | None = None,
    origin: Endpoint | None = None,
    hop: int | None = None,
    local: Endpoint | None = None,
) -> bytes:
    """The image with these fields of its identity changed; ImageError if it cannot be read.

    ValueError if an id has not 16 bytes or the hop does not fit 32 bits. sockmi.image.native.stamp() does
    the same in place and in constant time, for large images; but for ``local``, where the socket lives
    by now: its interface stays if its address does.
    """
    at = _identity_at(image, check_header(image, len(image))[0])
    changed = bytearray(image)
    for offset, value in ((_MIGRATION_ID, migration_id), (_HOME_ID, home_id), (_LISTENER_ID, listener_id)):
        if value is not None:
            if len(value) != 16:
                raise ValueError(f"an id has {len(value)} bytes, not 16")
            changed[at + offset : at + offset + 16] = value
    if origin is not None:
        place = Place.of(origin)
        _ORIGIN.pack_into(changed, at + _ORIGIN_AT, place.address, place.port, place.scope_id)
    if local is not None:
        former = Place(*_ORIGIN.unpack_from(changed, at + _LOCAL_AT))
        place = Place.of(local)
        scope_id = former.scope_id if former.address == place.address else 0
        _ORIGIN.pack_into(changed, at + _LOCAL_AT, place.address, place.port, scope_id)
    if hop is not None:
        if not 0 <= hop < 1 << 32:
            raise ValueError(f"hop {hop} does not fit 32 bits")
        _HOP.pack_into(changed, at + _HOP_AT, hop)
    changed[w.CHECKSUM_OFFSET : w.CHECKSUM_OFFSET + 4] = checksum(changed).to_bytes(4, "little")
    return bytes(changed)


def section(image: bytes, kind: Section) -> bytes:
    """The payload of one section; empty if it is not there."""
    start, _unused, _unused = check_header(image, len(image))
    for raw in walk(image, start):
        if raw.type == kind:
            return bytes(image[raw.payload_slice])
    return b""


def with_section(image: bytes, kind: Section, payload: bytes) -> bytes:
    """The image with one section replaced or added, or removed if ``payload`` is empty.

    IDENTITY cannot be replaced (ValueError); ImageError if the image cannot be read or the length is wrong.
    """
    if kind == Section.IDENTITY or kind not in SPECS:
        raise ValueError(f"section {kind!r} cannot be replaced; change the identity with stamp()")
    if payload:
        check_length(kind, len(payload))
    start, _unused, _unused = check_header(image, len(image))
    parts: list[bytes] = []
    new = pack_section(kind, payload) if payload else b""
    for raw in walk(image, start):
        if raw.type != kind:
            parts.append(image[raw.start : raw.end])
        elif new:
            parts.append(new)
            new = b""
    if new:
        parts.append(new)
    return seal(b"".join(parts), len(parts))


def with_context(image: bytes, context: bytes) -> bytes:
    """The image with the application's context (at most 1 MiB; empty: none)."""
    return with_section(image, Section.CONTEXT, context)


def with_fidelity(image: bytes, names: list[FidelityName]) -> bytes:
    """The image with this fidelity report."""
    return with_section(image, Section.FIDELITY, b"".join(entry.pack() for entry in names))
