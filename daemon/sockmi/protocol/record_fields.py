# SPDX-License-Identifier: MIT
"""How the protocol's records are written into messages: chunks, items, places, results, images, hops.

Pure; strict: sizes and ranges are checked before anything is made of the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from sockmi.engine.base import BindFlag, Fidelity, Kind, Needs
from sockmi.protocol.fields import (
    NO_ID,
    U16,
    U32,
    CodecError,
    Field,
    endpoint,
    endpoint_parts,
    enum,
    get_text,
    many,
    put_id,
    put_text,
    take,
)
from sockmi.protocol.messages import Hop, Move, Verdict
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
_URGENT = 2 * len(_BIND_FLAGS)
_DIRECT = 2 * _URGENT


def _flag(value: int) -> bool:
    if value > 1:
        raise CodecError(f"a flag is 0 or 1, not {value}")
    return value == 1


def _needs(scale: int, flags: int, image_bytes_max: int) -> Needs:
    if scale > 14:
        raise CodecError(f"window scale {scale} is more than 14 (RFC 7323)")
    if flags >= 2 * _DIRECT:
        raise CodecError(f"unknown flags {flags:#x}")
    bind_flags = _BIND_FLAGS[(flags & _URGENT - 1) >> 1]
    urgent, direct = bool(flags & _URGENT), bool(flags & _DIRECT)
    return Needs(scale, bool(flags & 1), image_bytes_max, bind_flags, urgent, direct)


def _needs_parts(needs: Needs) -> tuple[int, int, int]:
    flags = needs.timestamp_us | needs.bind_flags << 1 | needs.urgent * _URGENT | needs.direct * _DIRECT
    return needs.window_scale, flags, needs.image_bytes_max


NEEDS = Field(
    "10",
    lambda out, value: out.extend(_NEEDS.pack(*_needs_parts(value))),
    lambda data, at: (_needs(*_NEEDS.unpack_from(data, at)), at + _NEEDS.size),
)


KIND, MODE, CODE, VERDICT = enum(Kind), enum(Mode), enum(Code), enum(Verdict)


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


_PLACE = struct.Struct(">BBH16s")
_MODES = list(Mode)
_MODE_CODES = {mode: number for number, mode in enumerate(_MODES)}
_NO_MODE = 255


def _put_place(out: bytearray, value: Place) -> None:
    mode = _NO_MODE if value.mode is None else _MODE_CODES[value.mode]
    out += _PLACE.pack(mode, *endpoint_parts(value.endpoint))


@lru_cache(maxsize=256)
def _place(mode: int, version: int, port: int, packed: bytes) -> Place:
    """One for all connections that have it: their redirects keep it."""
    if mode != _NO_MODE and mode >= len(_MODES):
        raise CodecError(f"{mode} is no mode")
    return Place(endpoint(version, port, packed), None if mode == _NO_MODE else _MODES[mode])


def _get_place(data: memoryview, at: int) -> tuple[Place, int]:
    return _place(*_PLACE.unpack_from(data, at)), at + _PLACE.size


PLACE = Field("20", _put_place, _get_place)

_ITEM = struct.Struct(">16s16s16s16sIQBBQB12sBH16sBH16sBH16s")
_KINDS = list(Kind)
_KIND_CODES = {kind: number for number, kind in enumerate(_KINDS)}


def _put_item(out: bytearray, item: Item) -> None:
    state = item.state.encode("ascii")
    if not 0 < len(state) <= 12 or not len(item.migration) == len(item.connection) == len(item.home) == 16:
        raise CodecError(f"an item's ids have 16 bytes and its state 1..12: {item}")
    out += _ITEM.pack(
        item.migration, item.connection, item.home, item.listener or NO_ID, item.hop, item.size_bytes,
        *_needs_parts(item.needs), _KIND_CODES[item.kind], state,
        *endpoint_parts(item.local), *endpoint_parts(item.remote), *endpoint_parts(item.origin),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _host(host: bytes) -> bytes:
    """One for all connections that have it, as ``_place``."""
    return host


def _get_item(data: memoryview, at: int) -> tuple[Item, int]:
    (migration, connection, home, listener, hop, size, scale, flags, image_max, kind, state,
     *ends) = _ITEM.unpack_from(data, at)  # fmt: skip
    if kind >= len(_KINDS) or hop < 1:
        raise CodecError(f"an item with kind {kind}, hop {hop}")
    name = state.rstrip(b"\0")
    if not name.replace(b"-", b"").replace(b"_", b"").isalnum() or not name.isascii():
        raise CodecError("a state is a word")
    item = Item(
        migration, migration if connection == migration else connection, _KINDS[kind], name.decode("ascii"),
        endpoint(*ends[0:3]), endpoint(*ends[3:6]), endpoint(*ends[6:9]), hop, _host(home),
        _needs(scale, flags, image_max), size, None if listener == NO_ID else listener,
    )  # fmt: skip
    if wrong := contradiction(item):
        raise CodecError(wrong)
    return item, at + _ITEM.size


ITEM = Field(str(_ITEM.size), _put_item, _get_item)


def _put_refusal(out: bytearray, value: Refusal) -> None:
    CODE.put(out, value.code)
    put_text(out, value.message)


def _get_refusal(data: memoryview, at: int) -> tuple[Refusal, int]:
    code, at = CODE.get(data, at)
    message, at = get_text(data, at)
    return Refusal(code, message), at


def _put_outcome(out: bytearray, value: Place | Refusal) -> None:
    if isinstance(value, Refusal):
        out.append(1)
        _put_refusal(out, value)
    else:
        out.append(0)
        _put_place(out, value)


def _get_outcome(data: memoryview, at: int) -> tuple[Place | Refusal, int]:
    return _get_refusal(data, at + 1) if _flag(data[at]) else _get_place(data, at + 1)


PLACES = many(
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
        name, at = take(data, at + 1, length)
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
    octets, at = take(data, at + 1, length)
    if octets and not octets[-1]:
        raise CodecError("positions with a needless octet")
    bits = int.from_bytes(octets, "little")
    return tuple(position for position in range(length * 8) if bits >> position & 1), at


POSITIONS = Field("1 + n (n <= 32; bit i of octet j: position 8 * j + i)", _put_positions, _get_positions)


_HOP = struct.Struct(">16sI")


def _put_hop(out: bytearray, hop: Hop) -> None:
    put_id(out, hop[0])
    U32.put(out, hop[1])


HOP = Field("20", _put_hop, lambda data, at: (Hop(*_HOP.unpack_from(data, at)), at + 20))


def _put_move(out: bytearray, move: Move) -> None:
    _put_hop(out, Hop(move.connection, move.hop))
    put_id(out, move.holder)
    _put_place(out, move.place)


def _get_move(data: memoryview, at: int) -> tuple[Move, int]:
    hop, at = HOP.get(data, at)
    holder, at = take(data, at, 16)
    place, at = _get_place(data, at)
    return Move(hop[0], hop[1], holder, place), at


MOVE = Field("56", _put_move, _get_move)
HOPS = many(HOP, 48)
