# SPDX-License-Identifier: MIT
"""From payloads to an Image: each section is checked by itself, in the order of the types."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from enum import IntFlag
from typing import Any

from sockmi.frozen import frozen
from sockmi.image import sections as s
from sockmi.image import words as w
from sockmi.image.options import option_type
from sockmi.image.words import ErrorClass, ImageError, Section


@frozen
class Spec:
    """What is known of a section: the length is least..most and a multiple of ``multiple``."""

    least: int
    most: int
    multiple: int = 1


def _fixed(kind: Any) -> Spec:
    size: int = kind.size()
    return Spec(size, size)


FIXED: dict[Section, Any] = {
    Section.IDENTITY: s.Identity,
    Section.SEQUENCE: s.Sequence,
    Section.WINDOW: s.Window,
    Section.NEGOTIATED: s.Negotiated,
    Section.TIMESTAMP: s.Timestamp,
    Section.LISTENER: s.Listener,
    Section.PATH_MODEL: s.PathModel,
    Section.RECEIVE_AUTOTUNE: s.ReceiveAutotune,
    Section.URGENT: s.Urgent,
    Section.ECN: s.Ecn,
    Section.TIMERS: s.Timers,
    Section.COUNTERS: s.Counters,
    Section.EARLY_FIN: s.EarlyFin,
}

_QUEUE = Spec(0, w.QUEUE_MAX_BYTES)

SPECS: dict[int, Spec] = {
    **{section: _fixed(kind) for section, kind in FIXED.items()},
    Section.RECEIVE_QUEUE: _QUEUE,
    Section.SENT_QUEUE: _QUEUE,
    Section.UNSENT_QUEUE: _QUEUE,
    Section.SOCKET_OPTIONS: Spec(0, w.OPTIONS_MAX_BYTES, 8),
    Section.OUT_OF_ORDER: Spec(0, w.QUEUE_MAX_BYTES, 8),
    Section.SACK_SCOREBOARD: Spec(0, 24 << 16, 24),
    Section.RECEIVE_SACK: Spec(0, 32, 8),
    Section.CONGESTION_PRIVATE: Spec(24, 24 + w.CONGESTION_MAX_BYTES),
    Section.KTLS: Spec(80, 160, 80),
    Section.CONTEXT: Spec(0, w.CONTEXT_MAX_BYTES),
    Section.FIDELITY: Spec(0, w.FIDELITY_MAX_BYTES),
}


def check_length(section: int, length: int) -> None:
    """Refuse a payload length that the section cannot have."""
    spec = SPECS[section]
    if not spec.least <= length <= spec.most or length % spec.multiple:
        raise ImageError(
            ErrorClass.LENGTH,
            f"section {name(section)}: length {length} is not in {spec.least}..{spec.most} "
            f"or not a multiple of {spec.multiple}",
        )


def name(section: int) -> str:
    """Name of a known section type, number of another."""
    return Section(section).name.lower() if section in SPECS else str(section)


def _require(condition: object, error_class: ErrorClass, message: str) -> None:
    if not condition:
        raise ImageError(error_class, message)


def _reserved(condition: object, section: str) -> None:
    _require(
        condition, ErrorClass.RESERVED, f"{section}: reserved bits, or a field without its flag, not zero"
    )


def _flags(value: int, known: type[IntFlag], section: str) -> None:
    _reserved(not value & ~w.known_bits(known), section)


def _pads_zero(layout: str, payload: bytes) -> bool:
    return not any(payload[offset] for offset in s.reserved_offsets(layout))


# ---- Fixed sections: reserved bits first, then values ----


def _identity(v: s.Identity) -> None:
    _flags(v.bind_locks, w.BindLock, "identity")
    _require(v.family in (2, 10), ErrorClass.VALUE, f"identity: family {v.family} is neither 2 nor 10")
    _require(1 <= v.kind <= 4, ErrorClass.VALUE, f"identity: kind {v.kind} is unknown")
    _require(1 <= v.state <= 11, ErrorClass.VALUE, f"identity: state {v.state} is unknown")
    _require(v.v6only <= 1, ErrorClass.VALUE, f"identity: v6only is {v.v6only}, not 0 or 1")


def _sequence(v: s.Sequence) -> None:
    _flags(v.flags, w.SequenceFlag, "sequence")


def _window(v: s.Window) -> None:
    _flags(v.flags, w.WindowFlag, "window")
    _reserved(not v.window_clamp or v.flags & w.WindowFlag.CLAMP, "window")
    _reserved(not v.rcv_ssthresh or v.flags & w.WindowFlag.SSTHRESH, "window")
    _reserved(not v.rcv_right_edge or v.flags & w.WindowFlag.RIGHT_EDGE, "window")


def _negotiated(v: s.Negotiated) -> None:
    _flags(v.flags, w.NegotiatedFlag, "negotiated")
    scales = v.snd_wscale, v.rcv_wscale
    _require(
        max(scales) <= 14, ErrorClass.VALUE, f"negotiated: window scales {scales}, at most 14 is allowed"
    )
    _require(
        v.flags & w.NegotiatedFlag.WSCALE or not any(scales),
        ErrorClass.VALUE,
        "negotiated: window scales without window scaling",
    )
    _require(
        v.flags & w.NegotiatedFlag.ECN or not v.flags & w.NegotiatedFlag.ACCECN,
        ErrorClass.VALUE,
        "negotiated: accurate ECN without ECN",
    )


def _timestamp(v: s.Timestamp) -> None:
    _flags(v.flags, w.TimestampFlag, "timestamp")
    _reserved(v.flags & w.TimestampFlag.RECENT or not (v.ts_recent or v.ts_recent_age_us), "timestamp")
    _reserved(v.flags & w.TimestampFlag.SYN or not (v.syn_first_tsval or v.syn_last_tsval), "timestamp")
    _require(v.unit in (1, 2), ErrorClass.VALUE, f"timestamp: unit {v.unit} is neither 1 (ms) nor 2 (us)")


def _listener(v: s.Listener) -> None:
    _require(
        max(v.backlog, v.fastopen_qlen) < 1 << 31,
        ErrorClass.VALUE,
        "listener: backlog or fastopen_qlen is above 2^31-1",
    )


def _path_model(v: s.PathModel) -> None:
    _flags(v.flags, w.PathFlag, "path_model")
    _require(v.cwnd and v.rto_us, ErrorClass.VALUE, "path_model: cwnd or rto_us is 0")
    _require(
        v.backoff <= 63 and v.congestion_state <= 4,
        ErrorClass.VALUE,
        f"path_model: backoff {v.backoff} is above 63 or congestion_state {v.congestion_state} above 4",
    )


def _urgent(v: s.Urgent) -> None:
    _flags(v.flags, w.UrgentFlag, "urgent")
    receive = v.flags & ~w.UrgentFlag.SEND
    _reserved(v.flags & w.UrgentFlag.SEND or not v.snd_up, "urgent")
    _reserved(receive or not (v.urg_seq or v.urg_byte), "urgent")
    _require(receive.bit_count() <= 1, ErrorClass.VALUE, f"urgent: flags {v.flags:#x} exclude each other")


def _ecn(v: s.Ecn) -> None:
    _flags(v.flags, w.EcnFlag, "ecn")


_FIXED_CHECKS: dict[Section, Callable[[Any], None]] = {
    Section.IDENTITY: _identity,
    Section.SEQUENCE: _sequence,
    Section.WINDOW: _window,
    Section.NEGOTIATED: _negotiated,
    Section.TIMESTAMP: _timestamp,
    Section.LISTENER: _listener,
    Section.PATH_MODEL: _path_model,
    Section.URGENT: _urgent,
    Section.ECN: _ecn,
}


# ---- Lists ----


def _items(payload: bytes, section: str) -> Iterator[tuple[bytes, bytes]]:
    """Header (8 bytes, the last 4 a length) and bytes of each entry."""
    position = 0
    while position < len(payload):
        header = payload[position : position + 8]
        length = struct.unpack_from("<I", header, 4)[0] if len(header) == 8 else 0
        start = position + 8
        position = start + (length + 7) // 8 * 8
        _require(
            len(header) == 8 and position <= len(payload),
            ErrorClass.LENGTH,
            f"{section}: the last entry is cut off",
        )
        _require(
            not any(payload[start + length : position]),
            ErrorClass.RESERVED,
            f"{section}: padding is not zero",
        )
        yield header, payload[start : start + length]


def _entries(payload: bytes, size: int) -> Iterator[bytes]:
    return (payload[at : at + size] for at in range(0, len(payload), size))


def _options(payload: bytes) -> list[s.OptionValue]:
    found: dict[int, s.OptionValue] = {}
    for header, data in _items(payload, "socket_options"):
        option, kind, flags, _unused = struct.unpack("<HBBI", header)
        what = f"socket_options: option {option}"
        known = option_type(option)
        _flags(flags, w.OptionFlag, what)
        _require(1 <= option <= w.TYPE_MAX, ErrorClass.VALUE, f"{what}: the id is not in 1..{w.TYPE_MAX}")
        _require(kind in (1, 2), ErrorClass.VALUE, f"{what}: type {kind} is unknown")
        fits = len(data) == 8 if kind == w.OptionType.INT else len(data) <= w.OPTION_VALUE_MAX_BYTES
        _require(fits, ErrorClass.LENGTH, f"{what}: length {len(data)}")
        _require(
            known or not flags & w.OptionFlag.MANDATORY,
            ErrorClass.UNKNOWN_MANDATORY,
            f"{what} is mandatory and unknown to format version {w.MAJOR}.{w.MINOR}: update this host",
        )
        _require(known in (None, kind), ErrorClass.VALUE, f"{what} has type {kind}, not {known}")
        _require(option not in found, ErrorClass.DUPLICATE, f"{what} is there twice")
        value = struct.unpack("<q", data)[0] if kind == w.OptionType.INT else data
        found[option] = s.OptionValue(option, value, flags)
    return list(found.values())


def _segments(payload: bytes) -> list[s.Segment]:
    segments = []
    for header, data in _items(payload, "out_of_order"):
        _require(data, ErrorClass.VALUE, "out_of_order: an empty segment")
        segments.append(s.Segment(struct.unpack_from("<I", header)[0], data))
    return segments


def _scoreboard(payload: bytes) -> list[s.SentRange]:
    ranges = []
    for entry in _entries(payload, s.SentRange.size()):
        _reserved(_pads_zero(s.SentRange.LAYOUT, entry), "sack_scoreboard")
        value = s.SentRange.unpack(entry)
        _flags(value.flags, w.RangeFlag, "sack_scoreboard")
        ranges.append(value)
    return ranges


def _receive_sack(payload: bytes) -> list[s.Range]:
    return [s.Range.unpack(entry) for entry in _entries(payload, s.Range.size())]


def _is_printable(text: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in text)


def _congestion(payload: bytes) -> s.CongestionPrivate:
    padded, version, reserved = struct.unpack_from("<16sII", payload)
    text, _unused, rest = padded.partition(b"\0")
    _reserved(not reserved, "congestion_private")
    _require(
        1 <= len(text) <= 15 and _is_printable(text) and not any(rest),
        ErrorClass.VALUE,
        "congestion_private: the name is not 1..15 printable characters and zeros",
    )
    return s.CongestionPrivate(text.decode(), version, payload[24:])


def _ktls(payload: bytes) -> list[s.Ktls]:
    halves: dict[int, s.Ktls] = {}
    for entry in _entries(payload, s.Ktls.size()):
        half = s.Ktls.unpack(entry)
        _reserved(_pads_zero(s.Ktls.LAYOUT, entry) and not half.flags & ~1, "ktls")
        _require(half.direction in (1, 2), ErrorClass.VALUE, f"ktls: direction {half.direction} is unknown")
        _unused, key, iv, salt = entry[:4]
        _require(
            key in (16, 24, 32) and 8 <= iv <= 16 and salt <= 8,
            ErrorClass.VALUE,
            f"ktls: key, iv and salt of {key}, {iv} and {salt} bytes",
        )
        _require(
            half.version in (0x0303, 0x0304) and half.cipher,
            ErrorClass.VALUE,
            f"ktls: version {half.version:#x} or cipher suite {half.cipher:#x} is unknown",
        )
        _reserved(half.pack() == entry, "ktls")
        _require(
            half.direction not in halves,
            ErrorClass.DUPLICATE,
            f"ktls: direction {half.direction} is there twice",
        )
        halves[half.direction] = half
    return list(halves.values())


def _fidelity(payload: bytes) -> list[s.FidelityName]:
    names = []
    position = 0
    while position < len(payload):
        head = payload[position : position + 2]
        text = payload[position + 2 : position + 2 + head[1]] if len(head) == 2 else b""
        _require(
            len(head) == 2 and len(text) == head[1], ErrorClass.LENGTH, "fidelity: the last entry is cut off"
        )
        _require(1 <= head[0] <= 3, ErrorClass.VALUE, f"fidelity: class {head[0]} is not in 1..3")
        _require(text and _is_printable(text), ErrorClass.VALUE, "fidelity: a name is empty or not printable")
        names.append(s.FidelityName(head[0], text.decode()))
        position += 2 + len(text)
    return names


_LISTS: dict[Section, Callable[[bytes], Any]] = {
    Section.SOCKET_OPTIONS: _options,
    Section.OUT_OF_ORDER: _segments,
    Section.SACK_SCOREBOARD: _scoreboard,
    Section.RECEIVE_SACK: _receive_sack,
    Section.CONGESTION_PRIVATE: _congestion,
    Section.KTLS: _ktls,
    Section.FIDELITY: _fidelity,
}


def parse(payloads: Mapping[int, bytes]) -> s.Image:
    """An Image of known sections' payloads, whose lengths fit; raises ImageError."""
    _require(Section.IDENTITY in payloads, ErrorClass.MISSING, "section identity is missing")
    values: dict[str, Any] = {}
    for number, payload in sorted(payloads.items()):
        section = Section(number)
        kind = FIXED.get(section)
        if kind is not None:
            _reserved(_pads_zero(kind.LAYOUT, payload), name(section))
            value = kind.unpack(payload)
            _FIXED_CHECKS.get(section, lambda _unused: None)(value)
        else:
            value = _LISTS.get(section, bytes)(payload)
        values[name(section)] = value
    return s.Image(**values)
