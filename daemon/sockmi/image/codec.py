# SPDX-License-Identifier: MIT
"""The container: header, sections, checksum. ``decode`` and ``encode`` are each other's inverse."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from sockmi.frozen import frozen
from sockmi.image import words as w
from sockmi.image.check import check
from sockmi.image.parse import SPECS, check_length, name, parse
from sockmi.image.sections import Image
from sockmi.image.words import ErrorClass, ImageError, Section

_HEADER = struct.Struct("<8sHHIQII")
_SECTION = struct.Struct("<HHI")


@frozen
class RawSection:
    """A section as bytes; ``start`` and ``end`` are offsets of the whole, header and padding included."""

    type: int
    flags: int
    length: int
    start: int
    end: int

    @property
    def payload_slice(self) -> slice:
        """Where the payload is."""
        return slice(self.start + w.SECTION_HEADER_BYTES, self.start + w.SECTION_HEADER_BYTES + self.length)


def checksum(image: bytes | bytearray | memoryview) -> int:
    """CRC-32 of all but the checksum itself."""
    view = memoryview(image)
    return zlib.crc32(view[w.CHECKSUM_OFFSET + 4 :], zlib.crc32(view[: w.CHECKSUM_OFFSET]))


def check_header(image: bytes | bytearray | memoryview, limit: int = w.LIMIT_BYTES) -> tuple[int, int, int]:
    """Check all of the header but the checksum; header length, number of sections, checksum."""
    if len(image) > limit:
        raise ImageError(ErrorClass.LIMIT, f"{len(image)} bytes are more than the limit of {limit}")
    if len(image) < w.HEADER_BYTES:
        raise ImageError(
            ErrorClass.TRUNCATED, f"{len(image)} bytes are less than a header of {w.HEADER_BYTES}"
        )
    magic, major, minor, header_length, total, sections, crc = _HEADER.unpack_from(image)
    if magic != w.MAGIC:
        raise ImageError(ErrorClass.MAGIC, "the first 8 bytes are not those of an image")
    if major != w.MAJOR:
        raise ImageError(
            ErrorClass.VERSION,
            f"format version {major}.{minor}, this host reads {w.MAJOR}.x: update the older host",
        )
    if total != len(image):
        raise ImageError(ErrorClass.LENGTH, f"header: total length {total}, but there are {len(image)} bytes")
    if not w.HEADER_BYTES <= header_length <= len(image) or header_length % 8:
        raise ImageError(
            ErrorClass.LENGTH,
            f"header: header length {header_length} is not a multiple of 8 in {w.HEADER_BYTES}..{len(image)}",
        )
    return header_length, sections, crc


def walk(image: bytes | bytearray | memoryview, start: int) -> Iterator[RawSection]:
    """The sections from offset ``start``, each checked as far as its type does not matter."""
    while start < len(image):
        left = len(image) - start - w.SECTION_HEADER_BYTES
        if left < 0:
            raise ImageError(
                ErrorClass.LENGTH, "the bytes after the last section are less than a section header"
            )
        kind, flags, length = _SECTION.unpack_from(image, start)
        if not 1 <= kind <= w.TYPE_MAX:
            raise ImageError(ErrorClass.SECTION, f"section type {kind} is not in 1..{w.TYPE_MAX}")
        if flags & ~w.MANDATORY:
            raise ImageError(ErrorClass.RESERVED, f"section {kind}: reserved flags {flags:#x} are set")
        padded = (length + 7) & ~7
        if padded > left:
            raise ImageError(
                ErrorClass.LENGTH, f"section {kind}: length {length} exceeds the {left} bytes that are left"
            )
        end = start + w.SECTION_HEADER_BYTES + padded
        if any(image[end - padded + length : end]):
            raise ImageError(ErrorClass.RESERVED, f"section {kind}: padding is not zero")
        yield RawSection(kind, flags, length, start, end)
        start = end


def decode(image: bytes | bytearray | memoryview, limit: int = w.LIMIT_BYTES) -> Image:
    """Read and check an image; raises ImageError."""
    header_length, sections, crc = check_header(image, limit)
    if checksum(image) != crc:
        raise ImageError(ErrorClass.CHECKSUM, "the checksum is wrong: the image was damaged")
    payloads: dict[int, bytes] = {}
    seen: set[int] = set()
    unknown = 0
    for raw in walk(image, header_length):
        if not seen and raw.type != Section.IDENTITY:
            raise ImageError(ErrorClass.SECTION, f"the first section is {raw.type}, not identity")
        if raw.type in seen:
            raise ImageError(ErrorClass.DUPLICATE, f"section {raw.type} is there twice")
        seen.add(raw.type)
        if raw.type in SPECS:
            check_length(raw.type, raw.length)
            payloads[raw.type] = bytes(image[raw.payload_slice])
        elif raw.flags & w.MANDATORY:
            raise ImageError(
                ErrorClass.UNKNOWN_MANDATORY,
                f"section {raw.type} is mandatory and unknown to format version {w.MAJOR}.{w.MINOR}: "
                "update this host",
            )
        else:
            unknown += 1
    if len(seen) != sections:
        raise ImageError(ErrorClass.LENGTH, f"header: {sections} sections, but there are {len(seen)}")
    result = parse(payloads)
    result.unknown_sections = unknown
    check(result)
    return result


def seal(body: bytes, sections: int) -> bytes:
    """An image of sections' bytes."""
    total = w.HEADER_BYTES + len(body)
    head = _HEADER.pack(w.MAGIC, w.MAJOR, w.MINOR, w.HEADER_BYTES, total, sections, 0)
    crc = zlib.crc32(body, zlib.crc32(head[: w.CHECKSUM_OFFSET]))
    return head[: w.CHECKSUM_OFFSET] + crc.to_bytes(4, "little") + body


def pack_section(section: int, payload: bytes) -> bytes:
    """A section's header, payload and padding."""
    flags = w.MANDATORY if section in w.MANDATORY_SECTIONS else 0
    return _SECTION.pack(section, flags, len(payload)) + payload + bytes(-len(payload) % 8)


def _payload(section: Section, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return b"".join(entry.pack() for entry in value)
    return bytes(value.pack())


def pack(image: Image) -> bytes:
    """Write an image without any check: for tools and tests. Empty sections are left out.

    ImageError if a value does not fit its field.
    """
    parts: list[bytes] = []
    for section in Section:
        value = getattr(image, name(section))
        if value in (None, b"", []):
            continue
        try:
            parts.append(pack_section(section, _payload(section, value)))
        except struct.error as error:
            raise ImageError(ErrorClass.VALUE, f"section {name(section)}: {error}") from None
    return seal(b"".join(parts), len(parts))


def encode(image: Image, limit: int = w.LIMIT_BYTES) -> bytes:
    """Write an image, and check it; raises ImageError. Empty sections are left out."""
    encoded = pack(image)
    decode(encoded, limit)
    return encoded
