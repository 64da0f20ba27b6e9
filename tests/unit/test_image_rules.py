# SPDX-License-Identifier: MIT
"""Every rule of docs/image.md: an image that breaks it is refused, with the same class, by both codecs."""

# ruff: noqa: S311 (repeatable randomness is what a test wants)

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from sockmi.image import codec
from sockmi.image import sections as s
from sockmi.image.options import Option
from sockmi.image.words import ErrorClass, Family, ImageError, Kind, Section, State
from tests.fuzz.image_samples import build_library, endpoint, verdict

E = ErrorClass


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_library(tmp_path_factory.mktemp("image"))


def connected(state: State = State.ESTABLISHED, flags: int = 0) -> s.Image:
    """A plain connection with 10 bytes in each queue; its numbers wrap."""
    identity = s.Identity(
        bytes(range(16)),
        local=endpoint("192.0.2.1 80"),
        remote=endpoint("192.0.2.2 5000"),
        family=Family.INET,
        kind=Kind.CONNECTED,
        state=state,
    )
    una = 0xFFFFFFFA
    return s.Image(
        identity,
        s.Sequence(una, una + 10 & 0xFFFFFFFF, una + 20 & 0xFFFFFFFF, 105, 95, una, 90, flags),
        s.Window(100, 5000, 6000, 7000, 100),
        s.Negotiated(15, 1460, snd_wscale=7, rcv_wscale=7),
        s.Timestamp(1, 2, 3, flags=1, unit=1),
        b"r" * 10,
        b"s" * 10,
        b"u" * 10,
    )


def syn_sent() -> s.Image:
    image = connected(State.SYN_SENT)
    image.sequence = s.Sequence(0xFFFFFFFF, 0, 0, iss=0xFFFFFFFF)
    image.window = None
    image.negotiated = s.Negotiated(0, 0)
    image.timestamp = None
    image.receive_queue = image.sent_queue = image.unsent_queue = b""
    return image


def fin_wait_2() -> s.Image:
    image = connected(State.FIN_WAIT_2, 1 | 2 | 32)
    assert image.sequence
    image.sequence.snd_una = image.sequence.snd_nxt = image.sequence.write_seq
    image.sent_queue = image.unsent_queue = b""
    return image


def other(kind: Kind) -> s.Image:
    state = State.LISTEN if kind is Kind.LISTENING else State.CLOSED
    local = s.Place() if kind is Kind.UNCONNECTED else endpoint("0.0.0.0 80")
    listener = s.Listener(128) if kind is Kind.LISTENING else None
    return s.Image(s.Identity(local=local, family=Family.INET, kind=kind, state=state), listener=listener)


def change(path: str, value: Any, base: Callable[[], s.Image] = connected) -> s.Image:
    """``base`` with one attribute, named by its path, set."""
    image = base()
    target: Any = image
    *way, last = path.split(".")
    for step in way:
        target = getattr(target, step)
    assert hasattr(target, last)
    setattr(target, last, value)
    return image


def options(*values: s.OptionValue) -> s.Image:
    return change("socket_options", list(values))


def ktls(**changes: Any) -> s.Image:
    half = s.Ktls(1, 0x0304, 0x1301, bytes(16), bytes(12), bytes(4), bytes(8))
    for key, value in changes.items():
        setattr(half, key, value)
    return change("ktls", [half])


def place(text: str, scope: int = 0) -> s.Place:
    found = endpoint(text)
    return s.Place(found.address, found.port, scope)


V6 = "2001:db8::1 80"


def inet6(**changes: Any) -> s.Image:
    image = connected()
    image.identity.family = Family.INET6
    for key, value in changes.items():
        setattr(image.identity, key, value)
    return image


BAD: list[tuple[str, ErrorClass, s.Image]] = [
    ("bind_locks", E.RESERVED, change("identity.bind_locks", 4)),
    ("family", E.VALUE, change("identity.family", 3)),
    ("kind 0", E.VALUE, change("identity.kind", 0)),
    ("kind 5", E.VALUE, change("identity.kind", 5)),
    ("state 0", E.VALUE, change("identity.state", 0)),
    ("state 12", E.VALUE, change("identity.state", 12)),
    ("v6only", E.VALUE, change("identity.v6only", 2)),
    ("sequence flags", E.RESERVED, change("sequence.flags", 64)),
    ("window flags", E.RESERVED, change("window.flags", 8)),
    ("window clamp", E.RESERVED, change("window.window_clamp", 1)),
    ("window ssthresh", E.RESERVED, change("window.rcv_ssthresh", 1)),
    ("window edge", E.RESERVED, change("window.rcv_right_edge", 1)),
    ("negotiated flags", E.RESERVED, change("negotiated.flags", 64 | 15)),
    ("snd_wscale", E.VALUE, change("negotiated.snd_wscale", 15)),
    ("rcv_wscale", E.VALUE, change("negotiated.rcv_wscale", 15)),
    ("scale without scaling", E.VALUE, change("negotiated.flags", 14)),
    ("accecn without ecn", E.VALUE, change("negotiated.flags", 16 | 7)),
    ("timestamp flags", E.RESERVED, change("timestamp.flags", 5)),
    ("ts_recent without flag", E.RESERVED, change("timestamp.flags", 0)),
    ("syn tsval without flag", E.RESERVED, change("timestamp.syn_last_tsval", 1)),
    ("timestamp unit", E.VALUE, change("timestamp.unit", 3)),
    ("backlog", E.VALUE, change("listener.backlog", 1 << 31, lambda: other(Kind.LISTENING))),
    ("fastopen_qlen", E.VALUE, change("listener.fastopen_qlen", 1 << 31, lambda: other(Kind.LISTENING))),
    ("option flags", E.RESERVED, options(s.OptionValue(Option.NODELAY, 1, 4))),
    ("option id 0", E.VALUE, options(s.OptionValue(0, 1))),
    ("option id 1024", E.VALUE, options(s.OptionValue(1024, 1))),
    ("option bytes too long", E.LENGTH, options(s.OptionValue(Option.CONGESTION, bytes(4097)))),
    ("option of wrong type", E.VALUE, options(s.OptionValue(Option.NODELAY, b"1"))),
    ("option of wrong type 2", E.VALUE, options(s.OptionValue(Option.CONGESTION, 1))),
    ("option twice", E.DUPLICATE, options(s.OptionValue(Option.MARK, 1), s.OptionValue(Option.MARK, 1))),
    ("unknown option twice", E.DUPLICATE, options(s.OptionValue(999, 1), s.OptionValue(999, 1))),
    ("unknown mandatory option", E.UNKNOWN_MANDATORY, options(s.OptionValue(999, 1, 1))),
    ("options too long", E.LENGTH, options(*(s.OptionValue(i, bytes(4096)) for i in range(900, 917)))),
    ("path flags", E.RESERVED, change("path_model", s.PathModel(flags=8, cwnd=1, rto_us=1))),
    ("cwnd 0", E.VALUE, change("path_model", s.PathModel(rto_us=1))),
    ("rto 0", E.VALUE, change("path_model", s.PathModel(cwnd=1))),
    ("backoff", E.VALUE, change("path_model", s.PathModel(cwnd=1, rto_us=1, backoff=64))),
    ("congestion state", E.VALUE, change("path_model", s.PathModel(cwnd=1, rto_us=1, congestion_state=5))),
    ("empty segment", E.VALUE, change("out_of_order", [s.Segment(110, b"")])),
    ("range flags", E.RESERVED, change("sack_scoreboard", [s.SentRange(0, 0xFFFFFFFA, 0, 16)])),
    ("urgent flags", E.RESERVED, change("urgent", s.Urgent(flags=16))),
    ("snd_up without flag", E.RESERVED, change("urgent", s.Urgent(snd_up=1))),
    ("urg_seq without flag", E.RESERVED, change("urgent", s.Urgent(urg_seq=1))),
    ("urg_byte without flag", E.RESERVED, change("urgent", s.Urgent(urg_byte=1))),
    ("urgent flags exclude", E.VALUE, change("urgent", s.Urgent(0, 100, 2 | 4))),
    ("ecn flags", E.RESERVED, change("ecn", s.Ecn(8))),
    ("congestion name empty", E.VALUE, change("congestion_private", s.CongestionPrivate("", 1))),
    ("congestion name", E.VALUE, change("congestion_private", s.CongestionPrivate("a b", 1))),
    ("congestion name rest", E.VALUE, change("congestion_private", s.CongestionPrivate("a\0b", 1))),
    ("congestion too long", E.LENGTH, change("congestion_private", s.CongestionPrivate("a", 1, bytes(1025)))),
    ("ktls flags", E.RESERVED, ktls(flags=2)),
    ("ktls direction", E.VALUE, ktls(direction=3)),
    ("ktls key", E.VALUE, ktls(key=bytes(17))),
    ("ktls iv", E.VALUE, ktls(iv=bytes(7))),
    ("ktls version", E.VALUE, ktls(version=0x0302)),
    ("ktls cipher", E.VALUE, ktls(cipher=0)),
    ("ktls twice", E.DUPLICATE, change("ktls", ktls().ktls * 2)),
    ("ktls three", E.LENGTH, change("ktls", ktls().ktls * 3)),
    ("fidelity class", E.VALUE, change("fidelity", [s.FidelityName(4, "x")])),
    ("fidelity name empty", E.VALUE, change("fidelity", [s.FidelityName(1, "")])),
    ("fidelity name", E.VALUE, change("fidelity", [s.FidelityName(1, "a b")])),
    ("fidelity too long", E.LENGTH, change("fidelity", [s.FidelityName(1, "x" * 255)] * 256)),
    ("context too long", E.LENGTH, change("context", bytes((1 << 20) + 1))),
    ("receive_sack too long", E.LENGTH, change("receive_sack", [s.Range(110, 111)] * 5)),
    # addresses
    ("ipv6 in ipv4", E.ADDRESS, change("identity.remote", endpoint(V6))),
    ("ipv6 origin in ipv4", E.ADDRESS, change("identity.origin", endpoint(V6))),
    ("mapped in v6only", E.ADDRESS, inet6(v6only=1)),
    ("mapped with scope", E.ADDRESS, inet6(local=place("192.0.2.1 80", 3))),
    ("v6only on ipv4", E.ADDRESS, change("identity.v6only", 1, lambda: other(Kind.UNCONNECTED))),
    ("no local", E.ADDRESS, change("identity.local", s.Place())),
    ("no remote port", E.ADDRESS, change("identity.remote", endpoint("192.0.2.2 0"))),
    ("wildcard remote", E.ADDRESS, change("identity.remote", endpoint("0.0.0.0 80"))),
    ("multicast remote", E.ADDRESS, change("identity.remote", endpoint("224.0.0.1 80"))),
    ("multicast remote 6", E.ADDRESS, inet6(local=endpoint(V6), remote=endpoint("ff02::1 80"))),
    ("mixed versions", E.ADDRESS, inet6(remote=endpoint(V6))),
    ("origin without port", E.ADDRESS, change("identity.origin", endpoint("192.0.2.3 0"))),
    ("origin of other version", E.ADDRESS, inet6(origin=endpoint(V6))),
    ("bound with remote", E.ADDRESS,
     change("identity.remote", endpoint("1.2.3.4 5"), lambda: other(Kind.BOUND))),
    ("unconnected, local", E.ADDRESS, change("identity.local", endpoint("1.2.3.4 80"),
                                             lambda: other(Kind.UNCONNECTED))),
    ("unconnected, origin", E.ADDRESS, change("identity.origin", endpoint("1.2.3.4 5"),
                                              lambda: other(Kind.UNCONNECTED))),
    ("bound to nothing", E.ADDRESS, change("identity.local", s.Place(), lambda: other(Kind.BOUND))),
    ("listening without port", E.ADDRESS, change("identity.local", endpoint("1.2.3.4 0"),
                                                 lambda: other(Kind.LISTENING))),
    # kind and state
    *((f"connected in {state.name}", E.STATE, change("identity.state", state))
      for state in (State.SYN_RECEIVED, State.TIME_WAIT, State.CLOSED, State.LISTEN)),
    ("bound in LISTEN", E.STATE, change("identity.state", State.LISTEN, lambda: other(Kind.BOUND))),
    ("unconnected ESTABLISHED", E.STATE, change("identity.state", 1, lambda: other(Kind.UNCONNECTED))),
    ("listening CLOSED", E.STATE, change("identity.state", State.CLOSED, lambda: other(Kind.LISTENING))),
    ("bound with listener id", E.STATE, change("identity.listener_id", b"x" * 16, lambda: other(Kind.BOUND))),
    ("listener on connected", E.STATE, change("listener", s.Listener(1))),
    ("listener on bound", E.STATE, change("listener", s.Listener(1), lambda: other(Kind.BOUND))),
    ("window on listening", E.STATE, change("window", s.Window(), lambda: other(Kind.LISTENING))),
    ("queue on bound", E.STATE, change("receive_queue", b"x", lambda: other(Kind.BOUND))),
    ("urgent in SYN-SENT", E.STATE, change("urgent", s.Urgent(), syn_sent)),
    ("out of order in SYN-SENT", E.STATE, change("out_of_order", [s.Segment(9, b"x")], syn_sent)),
    ("early FIN in SYN-SENT", E.STATE, change("early_fin", s.EarlyFin(9), syn_sent)),
    ("ktls in SYN-SENT", E.STATE, change("ktls", ktls().ktls, syn_sent)),
    ("scoreboard in SYN-SENT", E.STATE, change("sack_scoreboard", [s.SentRange(0, 0, 1)], syn_sent)),
    ("receive_sack in SYN-SENT", E.STATE, change("receive_sack", [s.Range(1, 2)], syn_sent)),
    # missing
    ("no listener", E.MISSING, change("listener", None, lambda: other(Kind.LISTENING))),
    ("no sequence", E.MISSING, change("sequence", None)),
    ("no window", E.MISSING, change("window", None)),
    ("no negotiated", E.MISSING, change("negotiated", None)),
    ("no timestamp", E.MISSING, change("timestamp", None)),
    ("no sequence in SYN-SENT", E.MISSING, change("sequence", None, syn_sent)),
    # flags of the connection
    ("FIN in ESTABLISHED", E.STATE, change("sequence.flags", 1 | 32)),
    ("peer FIN in ESTABLISHED", E.STATE, change("sequence.flags", 4)),
    ("read FIN that never came", E.STATE, change("sequence.flags", 8)),
    ("no FIN in FIN-WAIT-1", E.STATE, connected(State.FIN_WAIT_1)),
    ("FIN sent, not queued", E.STATE, connected(State.FIN_WAIT_1, 2)),
    ("FIN not sent in FIN-WAIT-2", E.STATE, change("sequence.flags", 1 | 32, fin_wait_2)),
    ("no peer FIN in CLOSE-WAIT", E.STATE, connected(State.CLOSE_WAIT)),
    ("own FIN in CLOSE-WAIT", E.STATE, connected(State.CLOSE_WAIT, 4 | 1 | 32)),
    ("no peer FIN in CLOSING", E.STATE, connected(State.CLOSING, 1 | 32)),
    ("no own FIN in LAST-ACK", E.STATE, connected(State.LAST_ACK, 4)),
    ("SHUT_WR without FIN", E.STATE, change("sequence.flags", 32)),
    ("FIN without SHUT_WR", E.STATE, connected(State.FIN_WAIT_1, 1)),
    ("shut in SYN-SENT", E.STATE, change("sequence.flags", 16, syn_sent)),
    ("timestamp not negotiated", E.STATE, change("negotiated.flags", 1 | 2 | 8)),
    ("SYN values in ESTABLISHED", E.STATE, change("timestamp.flags", 3)),
    ("ecn not negotiated", E.STATE, change("ecn", s.Ecn(), lambda: change("negotiated.flags", 7))),
    ("receive_sack not negotiated", E.STATE,
     change("receive_sack", [s.Range(110, 111)], lambda: change("negotiated.flags", 5))),
    ("sacked not negotiated", E.STATE,
     change("sack_scoreboard", [s.SentRange(0, 0xFFFFFFFA, 0, 1)], lambda: change("negotiated.flags", 5))),
    ("out of order after FIN", E.STATE,
     change("out_of_order", [s.Segment(110, b"x")], lambda: connected(State.CLOSE_WAIT, 4))),
    ("early FIN after FIN", E.STATE,
     change("early_fin", s.EarlyFin(110), lambda: connected(State.CLOSE_WAIT, 4))),
    ("mss 0", E.VALUE, change("negotiated.mss_clamp", 0)),
    ("snd_wscale in SYN-SENT", E.VALUE, change("negotiated", s.Negotiated(1, 0, snd_wscale=1), syn_sent)),
    # sequence numbers
    ("una after nxt", E.SEQUENCE, change("sequence.snd_una", 5)),
    ("nxt after write", E.SEQUENCE, change("sequence.snd_nxt", 15)),
    ("una after write", E.SEQUENCE,
     change("sequence", s.Sequence(0, 0x60000000, 0xC0000000, 105, 95))),
    ("copied after rcv_nxt", E.SEQUENCE, change("sequence.copied_seq", 106)),
    ("SYN-SENT una", E.SEQUENCE, change("sequence.iss", 7, syn_sent)),
    ("SYN-SENT data", E.SEQUENCE, change("sequence.write_seq", 1, syn_sent)),
    ("SYN-SENT received", E.SEQUENCE, change("sequence.rcv_nxt", 1, syn_sent)),
    ("FIN-WAIT-2 unacknowledged", E.SEQUENCE, change("sequence.snd_una", 13, fin_wait_2)),
    ("own FIN sent, data unsent", E.SEQUENCE, connected(State.FIN_WAIT_1, 1 | 2 | 32)),
    ("peer FIN read, data unread", E.SEQUENCE, connected(State.CLOSE_WAIT, 4 | 8)),
    # queues
    ("receive queue short", E.QUEUE, change("receive_queue", b"r" * 9)),
    ("sent queue long", E.QUEUE, change("sent_queue", b"s" * 11)),
    ("unsent queue missing", E.QUEUE, change("unsent_queue", b"")),
    ("peer FIN not counted", E.QUEUE, connected(State.CLOSE_WAIT, 4)),
    ("own FIN not counted", E.QUEUE, connected(State.FIN_WAIT_1, 1 | 32)),
    ("queue in SYN-SENT", E.QUEUE, change("sent_queue", b"x", syn_sent)),
    # windows
    ("snd_wnd too large", E.WINDOW, change("window.snd_wnd", (65535 << 7) + 1)),
    ("max_window too large", E.WINDOW, change("window.max_window", (65535 << 7) + 1)),
    ("rcv_wnd too large", E.WINDOW, change("window.rcv_wnd", (65535 << 7) + 1)),
    ("max_window too small", E.WINDOW, change("window.max_window", 4999)),
    ("snd_wl1", E.WINDOW, change("window.snd_wl1", 7106)),
    ("rcv_wup", E.WINDOW, change("window.rcv_wup", 106)),
    ("right edge low", E.WINDOW, change("window", s.Window(100, 1, 1, 7000, 100, 4, rcv_right_edge=7099))),
    ("right edge high", E.WINDOW,
     change("window", s.Window(100, 1, 1, 7000, 100, 4, rcv_right_edge=101 + (1 << 30)))),
    ("out of order at rcv_nxt", E.SEQUENCE, change("out_of_order", [s.Segment(105, b"x")])),
    ("out of order overlap", E.SEQUENCE,
     change("out_of_order", [s.Segment(110, b"xx"), s.Segment(111, b"x")])),
    ("out of order descending", E.SEQUENCE,
     change("out_of_order", [s.Segment(120, b"x"), s.Segment(110, b"x")])),
    ("out of order beyond", E.WINDOW, change("out_of_order", [s.Segment(7099, b"xx")])),
    ("out of order before", E.WINDOW, change("out_of_order", [s.Segment(100, b"x")])),
    ("early FIN at rcv_nxt", E.SEQUENCE, change("early_fin", s.EarlyFin(105))),
    ("early FIN within data", E.SEQUENCE,
     change("early_fin", s.EarlyFin(111), lambda: change("out_of_order", [s.Segment(110, b"xx")]))),
    ("early FIN beyond", E.WINDOW, change("early_fin", s.EarlyFin(7100))),
    ("receive_sack at rcv_nxt", E.SEQUENCE, change("receive_sack", [s.Range(105, 106)])),
    ("receive_sack empty", E.SEQUENCE, change("receive_sack", [s.Range(110, 110)])),
    ("receive_sack beyond", E.WINDOW, change("receive_sack", [s.Range(7099, 7101)])),
    ("scoreboard empty range", E.SEQUENCE, change("sack_scoreboard", [s.SentRange(0, 0, 0)])),
    ("scoreboard beyond", E.SEQUENCE, change("sack_scoreboard", [s.SentRange(0, 0, 5)])),
    ("scoreboard before", E.SEQUENCE, change("sack_scoreboard", [s.SentRange(0, 0xFFFFFFF9, 0)])),
    ("scoreboard overlap", E.SEQUENCE,
     change("sack_scoreboard", [s.SentRange(0, 0xFFFFFFFA, 1), s.SentRange(0, 0, 2)])),
    ("snd_up outside", E.SEQUENCE, change("urgent", s.Urgent(15, flags=1))),
    ("urg_seq outside", E.SEQUENCE, change("urgent", s.Urgent(0, 105, 2))),
    ("urg_seq read outside", E.SEQUENCE, change("urgent", s.Urgent(0, 94, 4))),
    ("urg_seq announced", E.SEQUENCE, change("urgent", s.Urgent(0, 105 + 65536, 8))),
]  # fmt: skip


@pytest.mark.parametrize(("error_class", "image"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_broken_rule(library: ctypes.CDLL, error_class: ErrorClass, image: s.Image) -> None:
    with pytest.raises(ImageError) as caught:
        codec.encode(image)
    assert caught.value.error_class is error_class, caught.value
    found, message = verdict(library, codec.pack(image))
    assert (found, bool(message)) == (error_class.value, True), message


@pytest.mark.parametrize(
    "image",
    [connected(), syn_sent(), fin_wait_2(), ktls(), *(other(k) for k in Kind if k is not Kind.CONNECTED)],
)
def test_the_samples_are_right_before_they_are_broken(library: ctypes.CDLL, image: s.Image) -> None:
    assert codec.decode(codec.encode(image)) == image
    assert verdict(library, codec.pack(image)) == ("ok", "")


# ---- The bytes themselves ----


def resealed(image: bytes | bytearray) -> bytes:
    """With total length and checksum that fit."""
    changed = bytearray(image)
    struct.pack_into("<Q", changed, 16, len(changed))
    struct.pack_into("<I", changed, 28, codec.checksum(changed))
    return bytes(changed)


def poked(offset: int, layout: str, value: int) -> bytes:
    changed = bytearray(GOOD)
    struct.pack_into(layout, changed, offset, value)
    return resealed(changed)


def with_raw(*parts: bytes, count: int | None = None) -> bytes:
    """GOOD and further sections."""
    changed = bytearray(GOOD + b"".join(parts))
    number = struct.unpack_from("<I", GOOD, 24)[0] + len(parts) if count is None else count
    struct.pack_into("<I", changed, 24, number)
    return resealed(changed)


def raw(section: int, flags: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("<HHI", section, flags, size) + payload + bytes(-len(payload) % 8)


GOOD = codec.encode(connected())
IDENTITY = 32 + 8
SECTIONS = {found.type: found for found in codec.walk(GOOD, 32)}


def reserved_poke(section: Section, offset: int) -> bytes:
    return poked(SECTIONS[section].start + 8 + offset, "B", 1)


OPTION = struct.pack("<HBBIq", Option.NODELAY, 1, 0, 8, 1)
RANGE = struct.pack("<QIIHHI", 0, 0xFFFFFFFA, 0, 0, 0, 1)
KTLS = bytearray(ktls().ktls[0].pack())
CONGESTION = struct.pack("<16sII", b"cubic", 1, 1)

BAD_BYTES: list[tuple[str, ErrorClass, bytes]] = [
    ("nothing", E.TRUNCATED, b""),
    ("31 bytes", E.TRUNCATED, GOOD[:31]),
    ("magic", E.MAGIC, b"X" + GOOD[1:]),
    ("major", E.VERSION, poked(8, "<H", 2)),
    ("longer than it says", E.LENGTH, GOOD + bytes(8)),
    ("shorter than it says", E.LENGTH, GOOD[:-8]),
    ("total length", E.LENGTH, GOOD[:16] + b"\xff" * 8 + GOOD[24:]),
    ("header length 24", E.LENGTH, poked(12, "<I", 24)),
    ("header length 36", E.LENGTH, poked(12, "<I", 36)),
    ("header length beyond", E.LENGTH, poked(12, "<I", 0xFFFFFFF8)),
    ("checksum", E.CHECKSUM, GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    ("checksum of the header", E.CHECKSUM, GOOD[:10] + b"\x07" + GOOD[11:]),
    ("section count", E.LENGTH, with_raw(count=3)),
    ("no sections", E.MISSING, codec.seal(b"", 0)),
    ("cut section header", E.LENGTH, resealed(GOOD + b"\1\0\0\0")),
    ("section type 0", E.SECTION, with_raw(raw(0, 0, b""))),
    ("section type 1024", E.SECTION, with_raw(raw(1024, 0, b""))),
    ("identity not first", E.SECTION, codec.seal(raw(22, 0, b"x"), 1)),
    ("section flags", E.RESERVED, with_raw(raw(22, 2, b"x"))),
    ("section longer than the image", E.LENGTH, with_raw(raw(22, 0, b"", 8))),
    ("section length 2^32-1", E.LENGTH, with_raw(raw(22, 0, b"", 0xFFFFFFFF))),
    ("section padding", E.RESERVED, with_raw(raw(22, 0, b"x" + bytes(6) + b"x", 1))),
    ("section twice", E.DUPLICATE, with_raw(raw(22, 0, b"x"), raw(22, 0, b"y"))),
    ("unknown section twice", E.DUPLICATE, with_raw(raw(500, 0, b"x"), raw(500, 0, b"y"))),
    ("unknown mandatory section", E.UNKNOWN_MANDATORY, with_raw(raw(500, 1, b"x"))),
    ("identity length", E.LENGTH, codec.seal(raw(1, 1, bytes(128)), 1)),
    ("ktls length", E.LENGTH, with_raw(raw(Section.KTLS, 1, bytes(81)))),
    ("ktls empty", E.LENGTH, with_raw(raw(Section.KTLS, 1, b""))),
    ("options length", E.LENGTH, with_raw(raw(9, 0, bytes(9)))),
    ("identity reserved", E.RESERVED, reserved_poke(Section.IDENTITY, 135)),
    ("local reserved", E.RESERVED, reserved_poke(Section.IDENTITY, 48 + 18)),
    ("remote reserved", E.RESERVED, reserved_poke(Section.IDENTITY, 72 + 18)),
    ("origin reserved", E.RESERVED, reserved_poke(Section.IDENTITY, 96 + 19)),
    ("window reserved", E.RESERVED, reserved_poke(Section.WINDOW, 36)),
    ("negotiated reserved", E.RESERVED, reserved_poke(Section.NEGOTIATED, 15)),
    ("timestamp reserved", E.RESERVED, reserved_poke(Section.TIMESTAMP, 31)),
    ("path reserved", E.RESERVED,
     with_raw(raw(11, 0, s.PathModel(cwnd=1, rto_us=1).pack()[:-1] + b"\1"))),
    ("autotune reserved", E.RESERVED, with_raw(raw(12, 0, bytes(47) + b"\1"))),
    ("urgent reserved", E.RESERVED, with_raw(raw(16, 1, bytes(15) + b"\1"))),
    ("ecn reserved", E.RESERVED, with_raw(raw(17, 0, bytes(39) + b"\1"))),
    ("early FIN reserved", E.RESERVED, with_raw(raw(24, 0, bytes(7) + b"\1"))),
    ("range reserved", E.RESERVED, with_raw(raw(14, 0, RANGE))),
    ("ktls reserved", E.RESERVED, with_raw(raw(21, 1, bytes(KTLS[:-1]) + b"\1"))),
    ("ktls key beyond", E.RESERVED, with_raw(raw(21, 1, bytes(KTLS[:39]) + b"\1" + bytes(KTLS[40:])))),
    ("ktls salt length", E.VALUE, with_raw(raw(21, 1, bytes(KTLS[:3]) + b"\x09" + bytes(KTLS[4:])))),
    ("congestion reserved", E.RESERVED, with_raw(raw(20, 0, CONGESTION))),
    ("option cut off", E.LENGTH, with_raw(raw(9, 0, OPTION[:8]))),
    ("option type", E.VALUE, with_raw(raw(9, 0, OPTION[:2] + b"\3" + OPTION[3:]))),
    ("option padding", E.RESERVED, with_raw(raw(9, 0, struct.pack("<HBBI", 111, 2, 0, 1) + b"12345678"))),
    ("option int of 4 bytes", E.LENGTH, with_raw(raw(9, 0, struct.pack("<HBBIq", 100, 1, 0, 4, 1)))),
    ("segment cut off", E.LENGTH, with_raw(raw(13, 0, struct.pack("<IIQ", 110, 9, 1)))),
    ("segment length 2^32-1", E.LENGTH, with_raw(raw(13, 0, struct.pack("<IIQ", 110, 0xFFFFFFFF, 1)))),
    ("segment padding", E.RESERVED, with_raw(raw(13, 0, struct.pack("<IIQ", 110, 1, 1 << 56)))),
    ("fidelity cut off", E.LENGTH, with_raw(raw(23, 0, b"\1\5abc"))),
    ("fidelity cut header", E.LENGTH, with_raw(raw(23, 0, b"\1"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error_class", "image"), [row[1:] for row in BAD_BYTES], ids=[row[0] for row in BAD_BYTES]
)
def test_broken_bytes(library: ctypes.CDLL, error_class: ErrorClass, image: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        codec.decode(image)
    assert caught.value.error_class is error_class, caught.value
    found, message = verdict(library, image)
    assert (found, bool(message)) == (error_class.value, True), message


def test_limit_comes_before_all_else(library: ctypes.CDLL) -> None:
    with pytest.raises(ImageError) as caught:
        codec.decode(b"no image at all", 14)
    assert caught.value.error_class is E.LIMIT
    assert verdict(library, b"no image at all", 14)[0] == "limit"
    assert verdict(library, GOOD, len(GOOD))[0] == "ok"


def test_unknown_optional_section_is_skipped_and_mandatory_one_named(library: ctypes.CDLL) -> None:
    image = with_raw(raw(500, 0, b"future"))
    assert codec.decode(image).unknown_sections == 1
    assert verdict(library, image)[0] == "ok"
    image = with_raw(raw(500, 1, b"future"))
    with pytest.raises(ImageError, match="section 500 is mandatory and unknown"):
        codec.decode(image)
    assert "section 500 is mandatory and unknown" in verdict(library, image)[1]


def test_longer_header_and_newer_minor_are_read(library: ctypes.CDLL) -> None:
    image = bytearray(GOOD[:32] + b"extended" + GOOD[32:])
    struct.pack_into("<HHI", image, 8, 1, 9, 40)
    sealed = resealed(image)
    assert codec.decode(sealed) == connected()
    assert verdict(library, sealed)[0] == "ok"


def test_every_single_bit_flip_is_noticed(library: ctypes.CDLL) -> None:
    rng = random.Random(4)
    for bit in rng.sample(range(len(GOOD) * 8), 400):
        damaged = bytearray(GOOD)
        damaged[bit // 8] ^= 1 << bit % 8
        assert verdict(library, bytes(damaged))[0] != "ok"
        with pytest.raises(ImageError):
            codec.decode(damaged)


def test_no_rule_class_is_untested() -> None:
    tested = {row[1] for row in BAD} | {row[1] for row in BAD_BYTES} | {E.LIMIT}
    assert tested == set(ErrorClass)
