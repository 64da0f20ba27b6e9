# SPDX-License-Identifier: MIT
"""Messages to bytes and back. Pure; strict: sizes before contents, nothing left over.

Big-endian. A message is a version octet, a type octet and the fields of ``LAYOUT`` in order;
``docs/protocol.md`` is made from that table. The transport frames, seals and authenticates.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Fidelity, Kind, Needs
from sockmi.frozen import frozen
from sockmi.protocol import messages
from sockmi.protocol.messages import STREAM_ONLY, Hop, Message, Move, Verdict
from sockmi.protocol.records import (
    CHUNK_ITEMS_MAX,
    IMAGE_BYTES_MAX,
    PAGE_ITEMS_MAX,
    ChunkId,
    Counts,
    Item,
    Place,
    contradiction,
)
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

VERSION = 1
DATAGRAM_BYTES_MAX = 1200
STREAM_BYTES_MAX = IMAGE_BYTES_MAX + (1 << 20)
TEXT_BYTES_MAX = 400


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


def _put_id(out: bytearray, value: bytes) -> None:
    if len(value) != 16:
        raise CodecError(f"an id has 16 bytes, not {len(value)}")
    out += value


def _take(data: memoryview, at: int, count: int) -> tuple[bytes, int]:
    if count > len(data) - at:
        raise CodecError(f"{count} bytes are announced at offset {at}, {len(data) - at} are there")
    return bytes(data[at : at + count]), at + count


ID = Field("16", _put_id, lambda data, at: _take(data, at, 16))
_NO_ID = bytes(16)


def _get_optional_id(data: memoryview, at: int) -> tuple[bytes | None, int]:
    value, at = _take(data, at, 16)
    return (None if value == _NO_ID else value), at


OPTIONAL_ID = Field("16 (0: none)", lambda out, value: _put_id(out, value or _NO_ID), _get_optional_id)
_CHUNK = struct.Struct(">16sI")


def _put_chunk(out: bytearray, value: ChunkId) -> None:
    if len(value.batch) != 16:
        raise CodecError("a batch id has 16 bytes")
    out += _CHUNK.pack(*value)


CHUNK = Field("20", _put_chunk, lambda data, at: (ChunkId(*_CHUNK.unpack_from(data, at)), at + 20))
_COUNTS = struct.Struct(">III")
COUNTS = Field(
    "12",
    lambda out, value: out.extend(_COUNTS.pack(*value)),
    lambda data, at: (Counts(*_COUNTS.unpack_from(data, at)), at + 12),
)
_NEEDS = struct.Struct(">BBQ")


_BIND_FLAGS = [BindFlag(number) for number in range(sum(BindFlag) + 1)]


def _flag(value: int) -> bool:
    if value > 1:
        raise CodecError(f"a flag is 0 or 1, not {value}")
    return value == 1


def _needs(scale: int, flags: int, image_bytes_max: int) -> Needs:
    if scale > 14:
        raise CodecError(f"window scale {scale} is more than 14 (RFC 7323)")
    if flags >> 1 >= len(_BIND_FLAGS):
        raise CodecError(f"unknown flags {flags:#x}")
    return Needs(scale, bool(flags & 1), image_bytes_max, _BIND_FLAGS[flags >> 1])


def _needs_parts(needs: Needs) -> tuple[int, int, int]:
    return needs.window_scale, needs.timestamp_us | needs.bind_flags << 1, needs.image_bytes_max


NEEDS = Field(
    "10",
    lambda out, value: out.extend(_NEEDS.pack(*_needs_parts(value))),
    lambda data, at: (_needs(*_NEEDS.unpack_from(data, at)), at + _NEEDS.size),
)
E = TypeVar("E", bound=StrEnum)


def _enum(kind: type[E]) -> Field:
    values = list(kind)
    codes = {value: number for number, value in enumerate(values)}

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        number = data[at]
        if number >= len(values):
            raise CodecError(f"{number} is no {kind.__name__}")
        return values[number], at + 1

    return Field("1", lambda out, value: out.append(codes[value]), get)


KIND, MODE, CODE, VERDICT = _enum(Kind), _enum(Mode), _enum(Code), _enum(Verdict)


def _put_modes(out: bytearray, value: tuple[Mode, ...]) -> None:
    out.append(len(value))
    for mode in value:
        MODE.put(out, mode)


def _get_modes(data: memoryview, at: int) -> tuple[tuple[Mode, ...], int]:
    count = data[at]
    if count > len(Mode):
        raise CodecError(f"{count} modes are more than there are")
    modes = tuple(MODE.get(data, at + 1 + index)[0] for index in range(count))
    if len(set(modes)) != count:
        raise CodecError("a mode stands twice")
    return modes, at + 1 + count


MODES = Field("1 + n", _put_modes, _get_modes)


@lru_cache(maxsize=65536)
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


@lru_cache(maxsize=65536)
def _packed(address: IPv4Address | IPv6Address) -> bytes:
    return address.packed.ljust(16, b"\0")


def _put_address(out: bytearray, value: IPv4Address | IPv6Address | None) -> None:
    out.append(0 if value is None else value.version)
    out += _NO_ID if value is None else _packed(value)


def _get_address(data: memoryview, at: int) -> tuple[IPv4Address | IPv6Address | None, int]:
    packed, end = _take(data, at + 1, 16)
    return _address(data[at], packed), end


ADDRESS = Field("17 (version 0: none)", _put_address, _get_address)
_NO_ENDPOINT = (0, 0, _NO_ID)


def _endpoint_parts(value: Endpoint | None) -> tuple[int, int, bytes]:
    return _NO_ENDPOINT if value is None else (value.address.version, value.port, _packed(value.address))


@lru_cache(maxsize=65536)
def _endpoint(version: int, port: int, packed: bytes) -> Endpoint | None:
    address = _address(version, packed)
    if address is None:
        if port:
            raise CodecError("a port without an address")
        return None
    return Endpoint(address, port)


_PLACE = struct.Struct(">BBH16s")
_MODES = list(Mode)
_MODE_CODES = {mode: number for number, mode in enumerate(_MODES)}
_NO_MODE = 255


def _put_place(out: bytearray, value: Place) -> None:
    mode = _NO_MODE if value.mode is None else _MODE_CODES[value.mode]
    out += _PLACE.pack(mode, *_endpoint_parts(value.endpoint))


def _get_place(data: memoryview, at: int) -> tuple[Place, int]:
    mode, version, port, packed = _PLACE.unpack_from(data, at)
    if mode != _NO_MODE and mode >= len(_MODES):
        raise CodecError(f"{mode} is no mode")
    place = Place(_endpoint(version, port, packed), None if mode == _NO_MODE else _MODES[mode])
    return place, at + _PLACE.size


PLACE = Field("20", _put_place, _get_place)

_ITEM = struct.Struct(">16s16s16s16sIQBBQB12sBH16sBH16sBH16s")
_KINDS = list(Kind)
_KIND_CODES = {kind: number for number, kind in enumerate(_KINDS)}


def _put_item(out: bytearray, item: Item) -> None:
    state = item.state.encode("ascii")
    if not 0 < len(state) <= 12 or not len(item.migration) == len(item.connection) == len(item.home) == 16:
        raise CodecError(f"an item's ids have 16 bytes and its state 1..12: {item}")
    out += _ITEM.pack(
        item.migration, item.connection, item.home, item.listener or _NO_ID, item.hop, item.size_bytes,
        *_needs_parts(item.needs), _KIND_CODES[item.kind], state,
        *_endpoint_parts(item.local), *_endpoint_parts(item.remote), *_endpoint_parts(item.origin),
    )  # fmt: skip


def _get_item(data: memoryview, at: int) -> tuple[Item, int]:
    (migration, connection, home, listener, hop, size, scale, flags, image_max, kind, state,
     *ends) = _ITEM.unpack_from(data, at)  # fmt: skip
    if kind >= len(_KINDS) or hop < 1:
        raise CodecError(f"an item with kind {kind}, hop {hop}")
    name = state.rstrip(b"\0")
    if not name.replace(b"-", b"").replace(b"_", b"").isalnum() or not name.isascii():
        raise CodecError("a state is a word")
    item = Item(
        migration, connection, _KINDS[kind], name.decode("ascii"),
        _endpoint(*ends[0:3]), _endpoint(*ends[3:6]), _endpoint(*ends[6:9]), hop, home,
        _needs(scale, flags, image_max), size, None if listener == _NO_ID else listener,
    )  # fmt: skip
    if wrong := contradiction(item):
        raise CodecError(wrong)
    return item, at + _ITEM.size


ITEM = Field(str(_ITEM.size), _put_item, _get_item)


def _put_text(out: bytearray, value: str) -> None:
    text = value.encode()[:TEXT_BYTES_MAX].decode(errors="ignore").encode()
    U16.put(out, len(text))
    out += text


def _get_text(data: memoryview, at: int) -> tuple[str, int]:
    length, at = U16.get(data, at)
    if length > TEXT_BYTES_MAX:
        raise CodecError(f"a text of {length} bytes")
    text, at = _take(data, at, length)
    return text.decode(), at


def _put_refusal(out: bytearray, value: Refusal) -> None:
    CODE.put(out, value.code)
    _put_text(out, value.message)


def _get_refusal(data: memoryview, at: int) -> tuple[Refusal, int]:
    code, at = CODE.get(data, at)
    message, at = _get_text(data, at)
    return Refusal(code, message), at


def _many(one: Field, most: int, size: str = "") -> Field:
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


def _put_outcome(out: bytearray, value: Place | Refusal) -> None:
    if isinstance(value, Refusal):
        out.append(1)
        _put_refusal(out, value)
    else:
        out.append(0)
        _put_place(out, value)


def _get_outcome(data: memoryview, at: int) -> tuple[Place | Refusal, int]:
    return _get_refusal(data, at + 1) if _flag(data[at]) else _get_place(data, at + 1)


PLACES = _many(
    Field("", _put_outcome, _get_outcome), PAGE_ITEMS_MAX, "(1 + place 20 | 1 + refusal 1 + 2 + text)"
)
_NAME_BYTES_MAX, _NAMES_MAX = 64, 256


def _put_names(out: bytearray, names: Sequence[str]) -> None:
    if len(names) > _NAMES_MAX:
        raise CodecError(f"{len(names)} names in a fidelity report")
    out += len(names).to_bytes(2, "big")
    for name in names:
        text = name.encode()
        if len(text) > _NAME_BYTES_MAX:
            raise CodecError(f"the name {name!r} is too long")
        out.append(len(text))
        out += text


def _get_names(data: memoryview, at: int) -> tuple[list[str], int]:
    count, at = U16.get(data, at)
    if count > _NAMES_MAX:
        raise CodecError(f"{count} names in a fidelity report")
    names = []
    for _turn in range(count):
        length = data[at]
        if length > _NAME_BYTES_MAX:
            raise CodecError(f"a name of {length} bytes")
        name, at = _take(data, at + 1, length)
        names.append(name.decode())
    return names, at


_REFUSED = 0xFFFF


def _put_results(out: bytearray, results: tuple[Fidelity | Refusal, ...]) -> None:
    """Most sockets of a chunk have the same report: each distinct one is written once."""
    reports: dict[tuple[tuple[str, ...], ...], int] = {}
    numbers = []
    for result in results:
        if isinstance(result, Refusal):
            numbers.append(_REFUSED)
        else:
            key = (tuple(result.carried), tuple(result.approximated), tuple(result.reset))
            numbers.append(reports.setdefault(key, len(reports)))
    if len(results) > CHUNK_ITEMS_MAX:
        raise CodecError(f"{len(results)} results, at most {CHUNK_ITEMS_MAX} are in a chunk")
    out += struct.pack(">HH", len(reports), len(results))
    for report in reports:
        for listed in report:
            _put_names(out, listed)
    for number, result in zip(numbers, results, strict=True):
        U16.put(out, number)
        if isinstance(result, Refusal):
            _put_refusal(out, result)


def _get_results(data: memoryview, at: int) -> tuple[tuple[Fidelity | Refusal, ...], int]:
    kinds, at = U16.get(data, at)
    count, at = U16.get(data, at)
    if kinds > count or count > CHUNK_ITEMS_MAX:
        raise CodecError(f"{count} results with {kinds} reports")
    reports = []
    for _turn in range(kinds):
        lists = []
        for _turn in range(3):
            names, at = _get_names(data, at)
            lists.append(names)
        reports.append(Fidelity(*lists))
    results: list[Fidelity | Refusal] = []
    for _turn in range(count):
        number, at = U16.get(data, at)
        if number == _REFUSED:
            refusal, at = _get_refusal(data, at)
            results.append(refusal)
        elif number < kinds:
            results.append(reports[number])
        else:
            raise CodecError(f"report {number} of {kinds}")
    return tuple(results), at


RESULTS = Field(
    "2 + 2 + k * report + n * (2 [+ refusal]) (k <= n <= 256; report: 3 * (2 + m * (1 + name)))",
    _put_results,
    _get_results,
)


def _put_images(out: bytearray, images: tuple[bytes, ...]) -> None:
    if len(images) > CHUNK_ITEMS_MAX:
        raise CodecError(f"{len(images)} images, at most {CHUNK_ITEMS_MAX} are in a chunk")
    lengths = [len(image) for image in images]
    if sum(lengths) > IMAGE_BYTES_MAX:
        raise CodecError(f"images of {sum(lengths)} bytes, at most {IMAGE_BYTES_MAX} are in a chunk")
    out += struct.pack(f">H{len(images)}I", len(images), *lengths)
    for image in images:
        out += image


def _get_images(data: memoryview, at: int) -> tuple[tuple[bytes, ...], int]:
    count, at = U16.get(data, at)
    if count > CHUNK_ITEMS_MAX:
        raise CodecError(f"{count} images")
    lengths = struct.unpack_from(f">{count}I", data, at)
    at += 4 * count
    if sum(lengths) > min(IMAGE_BYTES_MAX, len(data) - at):
        raise CodecError("the images are longer than the message, or than a chunk may be")
    images = []
    for length in lengths:
        images.append(bytes(data[at : at + length]))
        at += length
    return tuple(images), at


IMAGES = Field("2 + n * 4 + the images (n <= 256)", _put_images, _get_images)


def _put_positions(out: bytearray, positions: tuple[int, ...]) -> None:
    bits = 0
    for position in positions:
        if not 0 <= position < CHUNK_ITEMS_MAX:
            raise CodecError(f"position {position} in a chunk")
        bits |= 1 << position
    octets = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    out.append(len(octets))
    out += octets


def _get_positions(data: memoryview, at: int) -> tuple[tuple[int, ...], int]:
    length = data[at]
    if length > CHUNK_ITEMS_MAX // 8:
        raise CodecError(f"{length} octets of positions")
    octets, at = _take(data, at + 1, length)
    if octets and not octets[-1]:
        raise CodecError("positions with a needless octet")
    bits = int.from_bytes(octets, "little")
    return tuple(position for position in range(length * 8) if bits >> position & 1), at


POSITIONS = Field("1 + n (n <= 32; bit i of octet j: position 8 * j + i)", _put_positions, _get_positions)


def _pair(first: Field, second: Field, size: str) -> Field:
    def put(out: bytearray, value: Any) -> None:
        first.put(out, value[0])
        second.put(out, value[1])

    def get(data: memoryview, at: int) -> tuple[Any, int]:
        one, at = first.get(data, at)
        two, at = second.get(data, at)
        return (one, two), at

    return Field(size, put, get)


_HOP = struct.Struct(">16sI")


def _put_hop(out: bytearray, hop: Hop) -> None:
    _put_id(out, hop[0])
    U32.put(out, hop[1])


HOP = Field("20", _put_hop, lambda data, at: (Hop(*_HOP.unpack_from(data, at)), at + 20))


def _put_move(out: bytearray, move: Move) -> None:
    _put_hop(out, Hop(move.connection, move.hop))
    _put_id(out, move.holder)
    _put_place(out, move.place)


def _get_move(data: memoryview, at: int) -> tuple[Move, int]:
    hop, at = HOP.get(data, at)
    holder, at = _take(data, at, 16)
    place, at = _get_place(data, at)
    return Move(hop[0], hop[1], holder, place), at


MOVE = Field("56", _put_move, _get_move)
HOPS = _many(HOP, 48)

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
    messages.Release: (("batch", ID), ("chosen", _many(ID, 60))),
    messages.Reserve: (
        ("batch", ID),
        ("page", U32),
        ("items", _many(ITEM, PAGE_ITEMS_MAX)),
        ("modes", MODES),
    ),
    messages.Reserved: (("batch", ID), ("page", U32), ("places", PLACES)),
    messages.Ship: (
        ("chunk", CHUNK),
        ("migrations", _many(ID, CHUNK_ITEMS_MAX)),
        ("places", _many(PLACE, CHUNK_ITEMS_MAX)),
        ("images", IMAGES),
    ),
    messages.Prepared: (("chunk", CHUNK), ("results", RESULTS)),
    messages.Confirm: (("chunk", CHUNK), ("committed", POSITIONS)),
    messages.Active: (("chunk", CHUNK), ("refused", _many(_pair(U16, CODE, "3"), CHUNK_ITEMS_MAX))),
    messages.Abort: (("chunk", CHUNK),),
    messages.Query: (("chunk", CHUNK),),
    messages.Undecided: (("chunk", CHUNK),),
    messages.Reroute: (("moves", _many(MOVE, 16)),),
    messages.Rerouted: (("verdicts", _many(_pair(HOP, VERDICT, "21"), 48)),),
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
