# SPDX-License-Identifier: MIT
"""How values of every kind are written into messages: numbers, ids, addresses, texts, lists.

Pure; sizes are checked before contents are read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

from sockmi.addresses import Endpoint
from sockmi.frozen import frozen

TEXT_BYTES_MAX = 400
# Some chunks' worth: ports differ from connection to connection, so that more would only keep memory.
_CACHED = 512


class CodecError(ValueError):
    """Bytes that are no message of this version, or a message that cannot be written."""


@frozen
class Field:
    """How one kind of value is written; ``size`` is for people.

    ``put`` appends to the buffer; ``get`` takes (buffer, offset) and gives (value, offset).
    """

    size: str
    put: Callable[[bytearray, Any], None]
    get: Callable[[memoryview, int], tuple[Any, int]]


def _struct(code: str, size: str) -> Field:
    one = struct.Struct(">" + code)

    def put(out: bytearray, value: Any) -> None:
        out += one.pack(value)

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        return one.unpack_from(data, at)[0], at + one.size

    return Field(size, put, get)


U8, U16, U32, U64 = (_struct(code, size) for code, size in (("B", "1"), ("H", "2"), ("I", "4"), ("Q", "8")))


def put_id(out: bytearray, value: bytes) -> None:
    """16 bytes; raise CodecError if there are not as many."""
    if len(value) != 16:
        raise CodecError(f"an id has 16 bytes, not {len(value)}")
    out += value


def take(data: memoryview, at: int, count: int) -> tuple[bytes, int]:
    """``count`` bytes from offset ``at``, and the offset behind them; raise CodecError if there are fewer."""
    if count > len(data) - at:
        raise CodecError(f"{count} bytes are announced at offset {at}, {len(data) - at} are there")
    return bytes(data[at : at + count]), at + count


ID = Field("16", put_id, lambda data, at: take(data, at, 16))
NO_ID = bytes(16)


def _get_optional_id(data: memoryview, at: int) -> tuple[bytes | None, int]:
    value, at = take(data, at, 16)
    return (None if value == NO_ID else value), at


OPTIONAL_ID = Field("16 (0: none)", lambda out, value: put_id(out, value or NO_ID), _get_optional_id)


E = TypeVar("E", bound=StrEnum)


def enum(kind: type[E]) -> Field:
    """One octet: the place of the member in ``kind``."""
    values = list(kind)
    codes = {value: number for number, value in enumerate(values)}

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        number = data[at]
        if number >= len(values):
            raise CodecError(f"{number} is no {kind.__name__}")
        return values[number], at + 1

    return Field("1", lambda out, value: out.append(codes[value]), get)


@lru_cache(maxsize=_CACHED)
def _address(version: int, packed: bytes) -> IPv4Address | IPv6Address | None:
    if version == 6:
        return IPv6Address(packed)
    if any(packed[4 if version == 4 else 0 :]):
        raise CodecError("padding that is not 0")
    if version == 4:
        return IPv4Address(packed[:4])
    if version:
        raise CodecError(f"IP version {version}")
    return None


@lru_cache(maxsize=_CACHED)
def _packed(address: IPv4Address | IPv6Address) -> bytes:
    return address.packed.ljust(16, b"\0")


def _put_address(out: bytearray, value: IPv4Address | IPv6Address | None) -> None:
    out.append(0 if value is None else value.version)
    out += NO_ID if value is None else _packed(value)


def _get_address(data: memoryview, at: int) -> tuple[IPv4Address | IPv6Address | None, int]:
    packed, end = take(data, at + 1, 16)
    return _address(data[at], packed), end


ADDRESS = Field("17 (version 0: none)", _put_address, _get_address)
_NO_ENDPOINT = (0, 0, NO_ID)


def endpoint_parts(value: Endpoint | None) -> tuple[int, int, bytes]:
    """IP version (0: none), port and 16 octets of address, as a struct's B, H and 16s take them."""
    return _NO_ENDPOINT if value is None else (value.address.version, value.port, _packed(value.address))


@lru_cache(maxsize=_CACHED)
def endpoint(version: int, port: int, packed: bytes) -> Endpoint | None:
    """The inverse of ``endpoint_parts``; raise CodecError if they contradict each other."""
    address = _address(version, packed)
    if address is None:
        if port:
            raise CodecError("a port without an address")
        return None
    return Endpoint(address, port)


def put_text(out: bytearray, value: str) -> None:
    """A length (U16) and UTF-8, cut to TEXT_BYTES_MAX."""
    text = value.encode()[:TEXT_BYTES_MAX].decode(errors="ignore").encode()
    U16.put(out, len(text))
    out += text


def get_text(data: memoryview, at: int) -> tuple[str, int]:
    """The inverse of ``put_text``; raise CodecError if it is too long."""
    length, at = U16.get(data, at)
    if length > TEXT_BYTES_MAX:
        raise CodecError(f"a text of {length} bytes")
    text, at = take(data, at, length)
    return text.decode(), at


def many(one: Field, most: int, size: str = "") -> Field:
    """A count (U16) and that many of ``one``, at most ``most``; ``size``: of one, for people."""
    put_one, get_one = one.put, one.get

    def put(out: bytearray, values: Any) -> None:
        if len(values) > most:
            raise CodecError(f"{len(values)} entries, at most {most} go into one message")
        out += len(values).to_bytes(2, "big")
        for value in values:
            put_one(out, value)

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        count, at = U16.get(data, at)
        if count > most or count > len(data) - at:
            raise CodecError(f"{count} entries are announced, at most {most} or what is left are allowed")
        values = []
        for _turn in range(count):
            value, at = get_one(data, at)
            values.append(value)
        return tuple(values), at

    return Field(f"2 + n * {size or one.size} (n <= {most})", put, get)


def pair(first: Field, second: Field, size: str) -> Field:
    """Two values, one after the other."""

    def put(out: bytearray, value: Any) -> None:
        first.put(out, value[0])
        second.put(out, value[1])

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        one, at = first.get(data, at)
        two, at = second.get(data, at)
        return (one, two), at

    return Field(size, put, get)
