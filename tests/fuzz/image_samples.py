# SPDX-License-Identifier: MIT
"""Valid images of every kind and state, and the C codec built for the tests."""

from __future__ import annotations

import ctypes
import random
import subprocess
from ipaddress import ip_address
from pathlib import Path

from sockmi.addresses import Endpoint
from sockmi.image import sections as s
from sockmi.image import words as w
from sockmi.image.options import BYTES_OPTIONS, Option
from sockmi.image.words import Family, Kind, NegotiatedFlag, SequenceFlag, State, WindowFlag

ENGINE = Path(__file__).resolve().parents[2] / "daemon" / "libsockmi" / "engine"
SOURCES = [
    ENGINE / name
    for name in ("image.c", "image_check.c", "image_crc.c", "image_list.c", "image_wire.c", "image_writer.c")
]
COMPILE = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{ENGINE}"]

CONNECTED_STATES = (
    State.SYN_SENT,
    State.ESTABLISHED,
    State.FIN_WAIT_1,
    State.FIN_WAIT_2,
    State.CLOSE_WAIT,
    State.CLOSING,
    State.LAST_ACK,
)
_MASK = 0xFFFFFFFF
_OWN, _SENT = SequenceFlag.OWN_FIN, SequenceFlag.OWN_FIN_SENT
_PEER, _READ = SequenceFlag.PEER_FIN, SequenceFlag.PEER_FIN_READ


def build_library(directory: Path) -> ctypes.CDLL:
    """The C codec as a shared library in ``directory``."""
    target = directory / "libimage.so"
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", *COMPILE, "-o", str(target), *map(str, SOURCES)],
        check=True,
        timeout=120,
    )
    library = ctypes.CDLL(str(target))
    library.sockmi_image_validate.argtypes = (
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_char_p,
    )
    library.sockmi_image_error_name.restype = ctypes.c_char_p
    return library


def verdict(library: ctypes.CDLL, image: bytes, limit: int = w.LIMIT_BYTES) -> tuple[str, str]:
    """Error class (or ``ok``) and message of the C codec."""
    message = ctypes.create_string_buffer(160)
    result = library.sockmi_image_validate(image, len(image), limit, message)
    return library.sockmi_image_error_name(result).decode(), message.value.decode()


def endpoint(text: str) -> s.Place:
    """A place from ``ADDRESS PORT``."""
    address, _unused, port = text.partition(" ")
    return s.Place.of(Endpoint(ip_address(address), int(port)))


def _identity(rng: random.Random, kind: Kind, state: State) -> s.Identity:
    mapped = rng.random() < 0.6
    family = rng.choice(list(Family)) if mapped else Family.INET6
    local, remote, origin = (
        ("192.0.2.1 8080", "198.51.100.7 40000", "203.0.113.9 80")
        if mapped
        else ("2001:db8::1 8080", "2001:db8:1::2 40000", "2001:db8::9 80")
    )
    identity = s.Identity(
        migration_id=rng.randbytes(16),
        home_id=rng.randbytes(16),
        hop=rng.randrange(1 << 32),
        owner_uid=rng.randrange(1 << 32),
        family=family,
        kind=kind,
        state=state,
        v6only=rng.randrange(2) if not mapped else 0,
        bind_locks=rng.randrange(4),
    )
    if kind is not Kind.UNCONNECTED:
        identity.local = endpoint(local)
        identity.origin = endpoint(origin) if rng.random() < 0.5 else s.Place()
    if kind is Kind.CONNECTED:
        identity.remote = endpoint(remote)
        identity.listener_id = rng.randbytes(16) if rng.random() < 0.3 else bytes(16)
    return identity


def _options(rng: random.Random) -> list[s.OptionValue]:
    chosen = rng.sample(list(Option), rng.randrange(12))
    options = [
        s.OptionValue(
            option,
            rng.randbytes(rng.randrange(20))
            if option in BYTES_OPTIONS
            else rng.randrange(-(1 << 63), 1 << 63),
            rng.randrange(4),
        )
        for option in chosen
    ]
    if rng.random() < 0.2:
        options.append(s.OptionValue(900, rng.randbytes(3), 0))
    return options


def _fins(rng: random.Random, state: State) -> SequenceFlag:
    maybe_sent = _SENT if rng.random() < 0.5 else SequenceFlag(0)
    maybe_read = _READ if rng.random() < 0.5 else SequenceFlag(0)
    own = SequenceFlag.SHUT_WR | _OWN
    return {
        State.FIN_WAIT_1: own | maybe_sent,
        State.FIN_WAIT_2: own | _SENT,
        State.CLOSE_WAIT: _PEER | maybe_read,
        State.CLOSING: own | _PEER | maybe_sent | maybe_read,
        State.LAST_ACK: own | _PEER | maybe_sent | maybe_read,
    }.get(state, SequenceFlag(0))


def _queue(rng: random.Random, wanted: bool) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 8, 100, 1448))) if wanted else b""


def _numbers(rng: random.Random, image: s.Image) -> None:
    """Queues and the sequence numbers that belong to them, near the wrap as often as not."""
    state = State(image.identity.state)
    base = rng.choice((rng.randrange(1 << 32), -rng.randrange(3000) & _MASK))
    flags = _fins(rng, state)
    sent_fin = bool(flags & _SENT)
    if state is State.SYN_SENT:
        image.sequence = s.Sequence(base, (base + 1) & _MASK, (base + 1) & _MASK, iss=base)
        return
    if rng.random() < 0.3:
        flags |= SequenceFlag.SHUT_RD
    image.receive_queue = _queue(rng, not flags & _READ)
    image.sent_queue = _queue(rng, state is not State.FIN_WAIT_2)
    image.unsent_queue = _queue(rng, not sent_fin)
    snd_nxt = base + len(image.sent_queue) + (sent_fin and state is not State.FIN_WAIT_2)
    write_seq = snd_nxt + len(image.unsent_queue) + (bool(flags & _OWN) and not sent_fin)
    copied = rng.choice((rng.randrange(1 << 32), -rng.randrange(1500) & _MASK))
    rcv_nxt = copied + len(image.receive_queue) + (bool(flags & _PEER) and not flags & _READ)
    image.sequence = s.Sequence(
        base, snd_nxt & _MASK, write_seq & _MASK, rcv_nxt & _MASK, copied, base, copied, int(flags)
    )


def _extras(rng: random.Random, image: s.Image) -> None:
    """Sections that only an engine inside the kernel can fill."""
    sequence, negotiated, window = image.sequence, image.negotiated, image.window
    assert sequence and negotiated and window
    sack = bool(negotiated.flags & NegotiatedFlag.SACK)
    if rng.random() < 0.5 and not sequence.flags & _PEER:
        marked = window.flags & WindowFlag.RIGHT_EDGE
        edge = window.rcv_right_edge if marked else window.rcv_wup + window.rcv_wnd
        room = (edge - sequence.rcv_nxt) & _MASK
        position = 1
        while position + 20 < room < 1 << 31 and len(image.out_of_order) < 4:
            data = rng.randbytes(rng.randrange(1, 20))
            image.out_of_order.append(s.Segment((sequence.rcv_nxt + position) & _MASK, data))
            if sack:
                end = position + len(data)
                image.receive_sack.append(
                    s.Range((sequence.rcv_nxt + position) & _MASK, (sequence.rcv_nxt + end) & _MASK)
                )
            position += len(data) + rng.randrange(3)
        if position < room < 1 << 31 and rng.random() < 0.5:
            image.early_fin = s.EarlyFin((sequence.rcv_nxt + position) & _MASK)
    if rng.random() < 0.5 and len(image.sent_queue) > 8:
        flag = w.RangeFlag.SACKED if sack else w.RangeFlag.LOST
        una = sequence.snd_una
        image.sack_scoreboard = [
            s.SentRange(rng.randrange(1 << 40), (una + a) & _MASK, (una + b) & _MASK, int(flag), 1)
            for a, b in ((0, 2), (2, 3), (5, 8))
        ]
    if rng.random() < 0.3 and image.receive_queue:
        image.urgent = s.Urgent(
            sequence.snd_nxt, (sequence.copied_seq + len(image.receive_queue) - 1) & _MASK, 1 | 2, 65
        )
    if negotiated.flags & NegotiatedFlag.ECN:
        image.ecn = s.Ecn(flags=rng.randrange(8), delivered_ce=5)
    if rng.random() < 0.3:
        image.path_model = s.PathModel(flags=7, cwnd=10, rto_us=200_000, backoff=2, congestion_state=4)
        image.receive_autotune = s.ReceiveAutotune(space_bytes=14600, scaling_ratio=128)
        image.timers = s.Timers(retransmit_us=1)
        image.counters = s.Counters(bytes_acked=rng.randrange(1 << 64))
        image.congestion_private = s.CongestionPrivate("cubic", 1, rng.randbytes(rng.randrange(100)))
    if rng.random() < 0.2:
        image.ktls = [
            s.Ktls(direction, 0x0304, 0x1301, rng.randbytes(16), rng.randbytes(12), b"", rng.randbytes(8))
            for direction in rng.sample((1, 2), rng.randrange(1, 3))
        ]


def random_image(rng: random.Random, kind: Kind | None = None, state: State | None = None) -> s.Image:
    """A valid image; of this kind and state if given."""
    kind = kind or rng.choice([Kind.CONNECTED] * 5 + list(Kind))
    if kind is Kind.CONNECTED:
        state = state or rng.choice(CONNECTED_STATES)
    else:
        state = State.LISTEN if kind is Kind.LISTENING else State.CLOSED
    image = s.Image(_identity(rng, kind, state))
    image.socket_options = _options(rng)
    image.context = rng.randbytes(rng.choice((0, 0, 1, 13, 4000)))
    image.fidelity = [s.FidelityName(what, f"name-{what}") for what in (1, 2, 3) if rng.random() < 0.5]
    if kind is Kind.LISTENING:
        image.listener = s.Listener(rng.randrange(1 << 31), rng.randrange(1 << 31), rng.randrange(1 << 64))
    if kind is not Kind.CONNECTED:
        return image
    flags = rng.randrange(16)
    scaled = bool(flags & NegotiatedFlag.WSCALE)
    syn = state is State.SYN_SENT
    image.negotiated = s.Negotiated(
        flags,
        rng.choice((0, 1460)) if syn else rng.randrange(1, 65536),
        snd_wscale=rng.randrange(15) if scaled and not syn else 0,
        rcv_wscale=rng.randrange(15) if scaled else 0,
    )
    _numbers(rng, image)
    assert image.sequence
    if flags & NegotiatedFlag.TIMESTAMPS:
        image.timestamp = s.Timestamp(tsval=rng.randrange(1 << 32), unit=rng.choice((1, 2)))
        if syn:
            image.timestamp.syn_first_tsval, image.timestamp.flags = 7, int(w.TimestampFlag.SYN)
        else:
            image.timestamp.ts_recent, image.timestamp.flags = 9, int(w.TimestampFlag.RECENT)
    if not syn or rng.random() < 0.5:
        snd_max = 65535 << image.negotiated.snd_wscale
        rcv_max = 65535 << image.negotiated.rcv_wscale
        snd_wnd = rng.randrange(snd_max + 1)
        rcv_wnd = rng.choice((0, rng.randrange(rcv_max + 1)))
        wup = (image.sequence.rcv_nxt - rng.randrange(100)) & _MASK
        image.window = s.Window(
            snd_wl1=(image.sequence.rcv_nxt - rng.randrange(5000)) & _MASK,
            snd_wnd=snd_wnd,
            max_window=rng.randrange(snd_wnd, snd_max + 1),
            rcv_wnd=rcv_wnd,
            rcv_wup=wup,
        )
        if rng.random() < 0.3:
            image.window.flags = 7
            image.window.window_clamp = image.window.rcv_ssthresh = 4096
            image.window.rcv_right_edge = (wup + rcv_wnd + rng.randrange(1000)) & _MASK
    if not syn:
        _extras(rng, image)
    return image
