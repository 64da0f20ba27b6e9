# SPDX-License-Identifier: MIT
"""The sections of an image as dataclasses, and their bytes.

Times are in microseconds, sizes in bytes, sequence numbers modulo 2^32; the meaning of each field is
in docs/image.md. ``pack`` and ``unpack`` convert; what a field may hold is checked elsewhere
(sockmi.image.check).
"""

from __future__ import annotations

import re
import struct
from dataclasses import astuple, dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar, Self

from sockmi.addresses import Endpoint
from sockmi.frozen import frozen
from sockmi.image.words import FidelityClass, OptionType

_MAPPED = bytes(10) + b"\xff\xff"
_WIDTHS = {"x": 1, "s": 1, "B": 1, "H": 2, "I": 4, "Q": 8}


@cache
def reserved_offsets(layout: str) -> tuple[int, ...]:
    """Offsets of the pad bytes (``x``) of a struct format without alignment."""
    offsets: list[int] = []
    position = 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout):
        size = int(count or 1) * _WIDTHS[kind]
        if kind == "x":
            offsets.extend(range(position, position + size))
        position += size
    return tuple(offsets)


class _Fixed:
    """A section whose payload is one struct; its fields are the dataclass's, in order."""

    LAYOUT: ClassVar[str]

    def pack(self) -> bytes:
        """The payload; struct.error if a field does not fit."""
        return struct.pack(self.LAYOUT, *astuple(self))  # type: ignore[call-overload]

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read a payload of the right length."""
        return cls(*struct.unpack(cls.LAYOUT, payload))

    @classmethod
    def size(cls) -> int:
        """Length of the payload."""
        return struct.calcsize(cls.LAYOUT)


@frozen
class Place:
    """An endpoint as in the image: 16 address bytes (IPv4 is v4-mapped), port, interface index."""

    address: bytes = bytes(16)
    port: int = 0
    scope_id: int = 0

    @property
    def is_none(self) -> bool:
        """No endpoint: all is zero."""
        return not (any(self.address) or self.port or self.scope_id)

    @property
    def is_mapped(self) -> bool:
        """An IPv4 address."""
        return self.address[:12] == _MAPPED

    @classmethod
    def of(cls, endpoint: Endpoint | None, scope_id: int = 0) -> Place:
        """From an endpoint; None is the place that is none."""
        if endpoint is None:
            return cls()
        packed = endpoint.address.packed
        return cls(packed if len(packed) == 16 else _MAPPED + packed, endpoint.port, scope_id)

    @property
    def endpoint(self) -> Endpoint | None:
        """The endpoint; None if there is none."""
        if self.is_none:
            return None
        if self.is_mapped:
            return Endpoint(IPv4Address(self.address[12:]), self.port)
        return Endpoint(IPv6Address(self.address), self.port)


@dataclass(slots=True)
class Identity:
    """Which socket this is."""

    LAYOUT: ClassVar[str] = "<16s16s16s16sH2xI16sH2xI16sH2xIIIHBBBB2x"

    migration_id: bytes = bytes(16)
    home_id: bytes = bytes(16)
    listener_id: bytes = bytes(16)
    local: Place = field(default_factory=Place)
    remote: Place = field(default_factory=Place)
    origin: Place = field(default_factory=Place)
    hop: int = 0
    owner_uid: int = 0
    family: int = 0
    kind: int = 0
    state: int = 0
    v6only: int = 0
    bind_locks: int = 0

    def pack(self) -> bytes:
        """The payload; struct.error if a field does not fit."""
        return struct.pack(
            self.LAYOUT,
            self.migration_id,
            self.home_id,
            self.listener_id,
            *astuple(self.local),
            *astuple(self.remote),
            *astuple(self.origin),
            self.hop,
            self.owner_uid,
            self.family,
            self.kind,
            self.state,
            self.v6only,
            self.bind_locks,
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Identity:
        """Read a payload of the right length."""
        v = struct.unpack(cls.LAYOUT, payload)
        return cls(v[0], v[1], v[2], Place(*v[3:6]), Place(*v[6:9]), Place(*v[9:12]), *v[12:])

    @classmethod
    def size(cls) -> int:
        """Length of the payload."""
        return struct.calcsize(cls.LAYOUT)


@dataclass(slots=True)
class Sequence(_Fixed):
    """Sequence numbers, and what became of the FINs."""

    LAYOUT: ClassVar[str] = "<8I"

    snd_una: int = 0
    snd_nxt: int = 0
    write_seq: int = 0
    rcv_nxt: int = 0
    copied_seq: int = 0
    iss: int = 0
    irs: int = 0
    flags: int = 0


@dataclass(slots=True)
class Window(_Fixed):
    """Windows of both directions, in bytes, scaled."""

    LAYOUT: ClassVar[str] = "<9I4x"

    snd_wl1: int = 0
    snd_wnd: int = 0
    max_window: int = 0
    rcv_wnd: int = 0
    rcv_wup: int = 0
    flags: int = 0
    window_clamp: int = 0
    rcv_ssthresh: int = 0
    rcv_right_edge: int = 0


@dataclass(slots=True)
class Negotiated(_Fixed):
    """What the handshake agreed on."""

    LAYOUT: ClassVar[str] = "<I4HBB2x"

    flags: int = 0
    mss_clamp: int = 0
    advmss: int = 0
    rcv_mss: int = 0
    mss_cache: int = 0
    snd_wscale: int = 0
    rcv_wscale: int = 0


@dataclass(slots=True)
class Timestamp(_Fixed):
    """The timestamp clock (RFC 7323)."""

    LAYOUT: ClassVar[str] = "<QIIIIHB5x"

    ts_recent_age_us: int = 0
    tsval: int = 0
    ts_recent: int = 0
    syn_first_tsval: int = 0
    syn_last_tsval: int = 0
    flags: int = 0
    unit: int = 0


@dataclass(slots=True)
class Listener(_Fixed):
    """What a listening socket needs besides its options."""

    LAYOUT: ClassVar[str] = "<IIQ"

    backlog: int = 0
    fastopen_qlen: int = 0
    defer_accept_us: int = 0


@dataclass(slots=True)
class PathModel(_Fixed):
    """What the sender has learnt of the path."""

    LAYOUT: ClassVar[str] = "<QQ22IBBB5x"

    pacing_rate_bytes_s: int = 0
    rack_age_us: int = 0
    flags: int = 0
    cwnd: int = 0
    ssthresh: int = 0
    cwnd_cnt: int = 0
    cwnd_clamp: int = 0
    prior_cwnd: int = 0
    prior_ssthresh: int = 0
    srtt_us: int = 0
    mdev_us: int = 0
    mdev_max_us: int = 0
    rttvar_us: int = 0
    rtt_min_us: int = 0
    rto_us: int = 0
    reordering: int = 0
    reord_seen: int = 0
    undo_marker: int = 0
    undo_retrans: int = 0
    high_seq: int = 0
    rtt_seq: int = 0
    rack_rtt_us: int = 0
    rack_reo_wnd_us: int = 0
    rack_end_seq: int = 0
    backoff: int = 0
    retransmits: int = 0
    congestion_state: int = 0


@dataclass(slots=True)
class ReceiveAutotune(_Fixed):
    """Receive buffer tuning and delayed ACKs."""

    LAYOUT: ClassVar[str] = "<QQ5IBBB9x"

    space_age_us: int = 0
    rtt_age_us: int = 0
    space_bytes: int = 0
    space_seq: int = 0
    rtt_us: int = 0
    rtt_seq: int = 0
    ato_us: int = 0
    quick: int = 0
    pingpong: int = 0
    scaling_ratio: int = 0


@dataclass(slots=True)
class Urgent(_Fixed):
    """Urgent pointers of both directions."""

    LAYOUT: ClassVar[str] = "<IIHB5x"

    snd_up: int = 0
    urg_seq: int = 0
    flags: int = 0
    urg_byte: int = 0


@dataclass(slots=True)
class Ecn(_Fixed):
    """ECN machine and, for accurate ECN (RFC 9768), its counters."""

    LAYOUT: ClassVar[str] = "<9I4x"

    flags: int = 0
    delivered_ce: int = 0
    received_ce: int = 0
    received_ce_bytes: int = 0
    received_ect0_bytes: int = 0
    received_ect1_bytes: int = 0
    delivered_ce_bytes: int = 0
    delivered_ect0_bytes: int = 0
    delivered_ect1_bytes: int = 0


@dataclass(slots=True)
class Timers(_Fixed):
    """Microseconds until each timer expires, 1 if it is due, 0 if it is not armed."""

    LAYOUT: ClassVar[str] = "<7Q"

    retransmit_us: int = 0
    probe_us: int = 0
    loss_probe_us: int = 0
    reorder_us: int = 0
    delayed_ack_us: int = 0
    keepalive_us: int = 0
    fin_wait_2_us: int = 0


@dataclass(slots=True)
class Counters(_Fixed):
    """What TCP_INFO counts."""

    LAYOUT: ClassVar[str] = "<16Q"

    bytes_acked: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    bytes_retransmitted: int = 0
    segments_out: int = 0
    segments_in: int = 0
    data_segments_out: int = 0
    data_segments_in: int = 0
    delivered: int = 0
    lost: int = 0
    total_retransmissions: int = 0
    duplicate_sacks: int = 0
    busy_us: int = 0
    receive_window_limited_us: int = 0
    send_buffer_limited_us: int = 0
    app_limited: int = 0


# ---- Entries of lists ----


@dataclass(slots=True)
class SentRange(_Fixed):
    """One range of the sent queue."""

    LAYOUT: ClassVar[str] = "<QIIHH4x"

    sent_age_us: int = 0
    seq: int = 0
    end_seq: int = 0
    flags: int = 0
    retransmissions: int = 0


@dataclass(slots=True)
class Range(_Fixed):
    """One block of received data that we told the peer of (SACK)."""

    LAYOUT: ClassVar[str] = "<II"

    seq: int = 0
    end_seq: int = 0


@dataclass(slots=True)
class Ktls(_Fixed):
    """One half of a kernel TLS session, at a record boundary; key, iv and salt in their own length."""

    LAYOUT: ClassVar[str] = "<BBBBHH32s16s8s8sI4x"

    direction: int
    version: int
    cipher: int
    key: bytes
    iv: bytes
    salt: bytes
    record_sequence: bytes
    flags: int = 0

    def pack(self) -> bytes:
        """The payload; struct.error if a field does not fit."""
        if len(self.key) > 32 or len(self.iv) > 16 or len(self.salt) > 8 or len(self.record_sequence) != 8:
            raise struct.error("key, iv, salt or record_sequence has the wrong length")
        lengths = len(self.key), len(self.iv), len(self.salt)
        return struct.pack(
            self.LAYOUT,
            self.direction,
            *lengths,
            self.version,
            self.cipher,
            self.key,
            self.iv,
            self.salt,
            self.record_sequence,
            self.flags,
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read a payload of the right length; bytes beyond each length are dropped."""
        direction, key_length, iv_length, salt_length, version, cipher, key, iv, salt, number, flags = (
            struct.unpack(cls.LAYOUT, payload)
        )
        return cls(
            direction, version, cipher, key[:key_length], iv[:iv_length], salt[:salt_length], number, flags
        )


@dataclass(slots=True)
class Segment:
    """Bytes that were received out of order."""

    seq: int
    data: bytes

    def pack(self) -> bytes:
        """The entry, padded to 8."""
        return struct.pack("<II", self.seq, len(self.data)) + self.data + bytes(-len(self.data) % 8)


@dataclass(slots=True)
class EarlyFin(_Fixed):
    """The peer's FIN, received out of order."""

    LAYOUT: ClassVar[str] = "<I4x"

    seq: int = 0


@dataclass(slots=True)
class OptionValue:
    """A socket option: an id of sockmi.image.options and its value."""

    option: int
    value: int | bytes
    flags: int = 0

    def pack(self) -> bytes:
        """The entry, padded to 8."""
        number = isinstance(self.value, int)
        value = struct.pack("<q", self.value) if isinstance(self.value, int) else self.value
        kind = OptionType.INT if number else OptionType.BYTES
        return (
            struct.pack("<HBBI", self.option, kind, self.flags, len(value)) + value + bytes(-len(value) % 8)
        )


@dataclass(slots=True)
class CongestionPrivate:
    """Private state of a congestion control, opaque: only the same name and version may read it."""

    name: str
    version: int
    data: bytes = b""

    def pack(self) -> bytes:
        """The payload; struct.error if a field does not fit."""
        name = self.name.encode()
        if len(name) > 15:
            raise struct.error("the name has more than 15 bytes")
        return struct.pack("<16sI4x", name, self.version) + self.data


@dataclass(slots=True)
class FidelityName:
    """One line of the fidelity report."""

    what: int
    name: str

    def pack(self) -> bytes:
        """The entry; struct.error if the name is longer than 255 bytes."""
        name = self.name.encode()
        return struct.pack("<BB", self.what, len(name)) + name


@dataclass(slots=True)
class Image:
    """The whole state of one socket; a section that is None, or empty, is not there."""

    identity: Identity
    sequence: Sequence | None = None
    window: Window | None = None
    negotiated: Negotiated | None = None
    timestamp: Timestamp | None = None
    receive_queue: bytes = b""
    sent_queue: bytes = b""
    unsent_queue: bytes = b""
    socket_options: list[OptionValue] = field(default_factory=list)
    listener: Listener | None = None
    path_model: PathModel | None = None
    receive_autotune: ReceiveAutotune | None = None
    out_of_order: list[Segment] = field(default_factory=list)
    sack_scoreboard: list[SentRange] = field(default_factory=list)
    receive_sack: list[Range] = field(default_factory=list)
    urgent: Urgent | None = None
    ecn: Ecn | None = None
    timers: Timers | None = None
    counters: Counters | None = None
    congestion_private: CongestionPrivate | None = None
    ktls: list[Ktls] = field(default_factory=list)
    context: bytes = b""
    fidelity: list[FidelityName] = field(default_factory=list)
    early_fin: EarlyFin | None = None
    unknown_sections: int = 0

    def fidelity_names(self, what: FidelityClass) -> list[str]:
        """Names of one class of the fidelity report."""
        return [entry.name for entry in self.fidelity if entry.what == what]
