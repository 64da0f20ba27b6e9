# SPDX-License-Identifier: MIT
"""Rules between the sections: addresses, what belongs to kind and state, sequence numbers, windows.

The order of the checks is that of docs/image.md, so that both implementations give the same error class.
"""

from __future__ import annotations

from dataclasses import fields

from sockmi.image.sections import Identity, Image, Place, Window
from sockmi.image.words import (
    ErrorClass,
    Family,
    ImageError,
    Kind,
    NegotiatedFlag,
    RangeFlag,
    Section,
    SequenceFlag,
    State,
    TimestampFlag,
    UrgentFlag,
    WindowFlag,
)

_MASK = 0xFFFFFFFF
_HALF = 1 << 31
_MAX_WINDOW = 65535

_ANY = {Section.IDENTITY, Section.SOCKET_OPTIONS, Section.CONTEXT, Section.FIDELITY}
_CONNECTED = set(Section) - {Section.LISTENER}
_NOT_IN_SYN_SENT = {
    Section.OUT_OF_ORDER,
    Section.SACK_SCOREBOARD,
    Section.RECEIVE_SACK,
    Section.URGENT,
    Section.KTLS,
    Section.EARLY_FIN,
}
_CONNECTED_STATES = {
    State.SYN_SENT,
    State.ESTABLISHED,
    State.FIN_WAIT_1,
    State.FIN_WAIT_2,
    State.CLOSE_WAIT,
    State.CLOSING,
    State.LAST_ACK,
}
_STATES = {
    Kind.BOUND: {State.CLOSED},
    Kind.UNCONNECTED: {State.CLOSED},
    Kind.LISTENING: {State.LISTEN},
    Kind.CONNECTED: _CONNECTED_STATES,
}

_OWN, _SENT = SequenceFlag.OWN_FIN, SequenceFlag.OWN_FIN_SENT
_PEER, _READ = SequenceFlag.PEER_FIN, SequenceFlag.PEER_FIN_READ
_NO_FIN = SequenceFlag(0)
# By state: the FIN flags that must be set, those that may.
_FINS = {
    State.SYN_SENT: (_NO_FIN, _NO_FIN),
    State.ESTABLISHED: (_NO_FIN, _NO_FIN),
    State.FIN_WAIT_1: (_OWN, _SENT),
    State.FIN_WAIT_2: (_OWN | _SENT, _NO_FIN),
    State.CLOSE_WAIT: (_PEER, _READ),
    State.CLOSING: (_OWN | _PEER, _SENT | _READ),
    State.LAST_ACK: (_OWN | _PEER, _SENT | _READ),
}


def seq_after(a: int, b: int) -> bool:
    """True if ``a`` comes after ``b`` modulo 2^32 (RFC 9293, section 3.4)."""
    return (b - a) & _MASK >= _HALF


def _fail(error_class: ErrorClass, message: str) -> None:
    raise ImageError(error_class, message)


def _is_definite(place: Place) -> bool:
    """A unicast address and a port."""
    address = place.address[12:] if place.is_mapped else place.address
    multicast = address[0] & 0xF0 == 0xE0 if place.is_mapped else address[0] == 0xFF
    return bool(place.port) and any(address) and not multicast


def _check_addresses(v: Identity) -> None:
    for which, place in (("local", v.local), ("remote", v.remote), ("origin", v.origin)):
        if place.is_none:
            continue
        if v.family == Family.INET and not place.is_mapped:
            _fail(ErrorClass.ADDRESS, f"identity: the {which} address of an IPv4 socket is not v4-mapped")
        if v.v6only and place.is_mapped:
            _fail(ErrorClass.ADDRESS, f"identity: the {which} address of a v6only socket is v4-mapped")
        if place.is_mapped and place.scope_id:
            _fail(ErrorClass.ADDRESS, f"identity: the {which} IPv4 address has a scope")
    if v.v6only and v.family == Family.INET:
        _fail(ErrorClass.ADDRESS, "identity: v6only on an IPv4 socket")
    if v.kind == Kind.CONNECTED:
        if not (_is_definite(v.local) and _is_definite(v.remote)):
            _fail(
                ErrorClass.ADDRESS,
                "identity: a connected socket needs unicast addresses and ports at both ends",
            )
        if v.local.is_mapped != v.remote.is_mapped:
            _fail(ErrorClass.ADDRESS, "identity: one end is IPv4, the other IPv6")
        if not v.origin.is_none and not (_is_definite(v.origin) and v.origin.is_mapped == v.local.is_mapped):
            _fail(
                ErrorClass.ADDRESS,
                "identity: origin is not an address and port of the connection's IP version",
            )
        return
    if not v.remote.is_none:
        _fail(ErrorClass.ADDRESS, "identity: a socket that is not connected has a remote endpoint")
    if v.kind == Kind.UNCONNECTED and not (v.local.is_none and v.origin.is_none):
        _fail(ErrorClass.ADDRESS, "identity: an unconnected socket has a local endpoint")
    if v.kind == Kind.BOUND and v.local.is_none:
        _fail(ErrorClass.ADDRESS, "identity: a bound socket has no local endpoint")
    if v.kind == Kind.LISTENING and not v.local.port:
        _fail(ErrorClass.ADDRESS, "identity: a listening socket has no local port")


def _filled(image: Image) -> set[Section]:
    """Sections that say something: lists and queues that are not empty, others that are there."""
    names = {field.name for field in fields(image) if getattr(image, field.name) not in (None, b"", [])}
    return {section for section in Section if section.name.lower() in names}


def _check_belonging(image: Image) -> None:
    v = image.identity
    if v.state not in _STATES[Kind(v.kind)]:
        _fail(ErrorClass.STATE, f"identity: state {v.state} does not fit kind {v.kind}")
    if v.kind != Kind.CONNECTED and any(v.listener_id):
        _fail(ErrorClass.STATE, "identity: only a connected socket can belong to a listener")
    allowed = _ANY
    if v.kind == Kind.LISTENING:
        allowed = _ANY | {Section.LISTENER}
    elif v.kind == Kind.CONNECTED:
        allowed = _CONNECTED - (_NOT_IN_SYN_SENT if v.state == State.SYN_SENT else set())
    for section in sorted(_filled(image) - allowed):
        _fail(
            ErrorClass.STATE,
            f"section {section.name.lower()} does not belong to kind {v.kind} in state {v.state}",
        )


def _check_missing(image: Image) -> None:
    v = image.identity
    needed: list[Section] = []
    if v.kind == Kind.LISTENING:
        needed = [Section.LISTENER]
    elif v.kind == Kind.CONNECTED:
        needed = [Section.SEQUENCE, Section.NEGOTIATED]
        if v.state != State.SYN_SENT:
            needed.append(Section.WINDOW)
        if image.negotiated and image.negotiated.flags & NegotiatedFlag.TIMESTAMPS:
            needed.append(Section.TIMESTAMP)
    for section in needed:
        if getattr(image, section.name.lower()) is None:
            _fail(ErrorClass.MISSING, f"section {section.name.lower()} is missing")


def _check_connection_flags(image: Image) -> None:
    sequence, negotiated = image.sequence, image.negotiated
    assert sequence and negotiated
    flags, state = SequenceFlag(sequence.flags), State(image.identity.state)
    agreed = NegotiatedFlag(negotiated.flags)
    must, may = _FINS[state]
    fins = flags & (_OWN | _SENT | _PEER | _READ)
    if fins & must != must or fins & ~(must | may):
        _fail(ErrorClass.STATE, f"sequence: flags {sequence.flags:#x} do not fit state {state.rfc_name}")
    if bool(flags & SequenceFlag.SHUT_WR) != bool(flags & _OWN):
        _fail(ErrorClass.STATE, "sequence: shut for writing and an own FIN go together")
    if state == State.SYN_SENT and flags:
        _fail(ErrorClass.STATE, f"sequence: flags {sequence.flags:#x} in SYN-SENT")
    if image.timestamp:
        if not agreed & NegotiatedFlag.TIMESTAMPS:
            _fail(ErrorClass.STATE, "section timestamp, but timestamps were not negotiated")
        if image.timestamp.flags & TimestampFlag.SYN and state != State.SYN_SENT:
            _fail(ErrorClass.STATE, "timestamp: SYN values outside SYN-SENT")
    if image.ecn and not agreed & NegotiatedFlag.ECN:
        _fail(ErrorClass.STATE, "section ecn, but ECN was not negotiated")
    sacked = any(entry.flags & RangeFlag.SACKED for entry in image.sack_scoreboard)
    if (image.receive_sack or sacked) and not agreed & NegotiatedFlag.SACK:
        _fail(ErrorClass.STATE, "receive_sack or a sacked range, but SACK was not negotiated")
    if image.out_of_order and flags & _PEER:
        _fail(ErrorClass.STATE, "section out_of_order after the peer's FIN")
    if image.early_fin and flags & _PEER:
        _fail(ErrorClass.STATE, "section early_fin after the peer's FIN")
    if state != State.SYN_SENT and not negotiated.mss_clamp:
        _fail(ErrorClass.VALUE, "negotiated: mss_clamp is 0")
    if state == State.SYN_SENT and negotiated.snd_wscale:
        _fail(ErrorClass.VALUE, f"negotiated: snd_wscale {negotiated.snd_wscale} in SYN-SENT")


def _check_sequence(image: Image) -> None:
    v = image.sequence
    assert v
    if (
        seq_after(v.snd_una, v.snd_nxt)
        or seq_after(v.snd_nxt, v.write_seq)
        or seq_after(v.snd_una, v.write_seq)
    ):
        _fail(
            ErrorClass.SEQUENCE,
            f"sequence: snd_una {v.snd_una}, snd_nxt {v.snd_nxt}, write_seq {v.write_seq} are not in order",
        )
    if seq_after(v.copied_seq, v.rcv_nxt):
        _fail(ErrorClass.SEQUENCE, f"sequence: copied_seq {v.copied_seq} is after rcv_nxt {v.rcv_nxt}")
    if image.identity.state == State.SYN_SENT:
        after = (v.iss + 1) & _MASK
        if (v.snd_una, v.snd_nxt, v.write_seq, v.copied_seq) != (v.iss, after, after, v.rcv_nxt):
            _fail(ErrorClass.SEQUENCE, f"sequence: not that of SYN-SENT with iss {v.iss}")
    if image.identity.state == State.FIN_WAIT_2 and v.snd_una != v.write_seq:
        _fail(ErrorClass.SEQUENCE, "sequence: snd_una is not write_seq in FIN-WAIT-2")
    if v.flags & _SENT and v.snd_nxt != v.write_seq:
        _fail(ErrorClass.SEQUENCE, "sequence: snd_nxt is not write_seq after the own FIN")
    if v.flags & _READ and v.copied_seq != v.rcv_nxt:
        _fail(ErrorClass.SEQUENCE, "sequence: copied_seq is not rcv_nxt, but the peer's FIN has been read")


def _check_queues(image: Image) -> None:
    v, state = image.sequence, image.identity.state
    assert v
    sent_fin = bool(v.flags & _SENT)
    unread_fin = v.flags & _PEER and not v.flags & _READ
    syn_or_fin = state == State.SYN_SENT or (sent_fin and state != State.FIN_WAIT_2)
    unsent_fin = v.flags & _OWN and not sent_fin
    for which, queue, start, end, more in (
        ("receive_queue", image.receive_queue, v.copied_seq, v.rcv_nxt, unread_fin),
        ("sent_queue", image.sent_queue, v.snd_una, v.snd_nxt, syn_or_fin),
        ("unsent_queue", image.unsent_queue, v.snd_nxt, v.write_seq, unsent_fin),
    ):
        numbers = (end - start) & _MASK
        if len(queue) + bool(more) != numbers:
            _fail(
                ErrorClass.QUEUE,
                f"{which}: {len(queue)} bytes{' and a SYN or FIN' if more else ''}, "
                f"but {numbers} sequence numbers from {start} to {end}",
            )


def _check_window(image: Image, v: Window) -> None:
    sequence, negotiated = image.sequence, image.negotiated
    assert sequence and negotiated
    snd_max, rcv_max = _MAX_WINDOW << negotiated.snd_wscale, _MAX_WINDOW << negotiated.rcv_wscale
    if max(v.snd_wnd, v.max_window) > snd_max or v.rcv_wnd > rcv_max:
        _fail(ErrorClass.WINDOW, f"window: snd_wnd or max_window above {snd_max} or rcv_wnd above {rcv_max}")
    if v.max_window < v.snd_wnd:
        _fail(ErrorClass.WINDOW, f"window: max_window {v.max_window} is below snd_wnd {v.snd_wnd}")
    if seq_after(v.snd_wl1, (sequence.rcv_nxt + v.rcv_wnd) & _MASK):
        _fail(ErrorClass.WINDOW, f"window: snd_wl1 {v.snd_wl1} is outside the receive window")
    if seq_after(v.rcv_wup, sequence.rcv_nxt):
        _fail(ErrorClass.WINDOW, f"window: rcv_wup {v.rcv_wup} is after rcv_nxt {sequence.rcv_nxt}")
    edge = (v.rcv_right_edge - v.rcv_wup) & _MASK
    if v.flags & WindowFlag.RIGHT_EDGE and not v.rcv_wnd <= edge <= 1 << 30:
        _fail(ErrorClass.WINDOW, "window: rcv_right_edge does not fit rcv_wup and rcv_wnd")


def _check_received(image: Image, window: Window) -> None:
    assert image.sequence
    base = image.sequence.rcv_nxt
    edge = window.rcv_right_edge if window.flags & WindowFlag.RIGHT_EDGE else window.rcv_wup + window.rcv_wnd
    room = (edge - base) & _MASK
    room = room if room < _HALF else 0
    previous = 1
    for segment in image.out_of_order:
        start = (segment.seq - base) & _MASK
        if start < previous:
            _fail(ErrorClass.SEQUENCE, f"out_of_order: segment {segment.seq} is not after the one before")
        previous = start + len(segment.data)
        if previous > room:
            _fail(ErrorClass.WINDOW, f"out_of_order: segment {segment.seq} is outside the window")
    if image.early_fin:
        fin = (image.early_fin.seq - base) & _MASK
        if fin < previous:
            _fail(ErrorClass.SEQUENCE, "early_fin: not after all out-of-order data")
        if fin >= room:
            _fail(ErrorClass.WINDOW, "early_fin: outside the window")
    for block in image.receive_sack:
        start, end = (block.seq - base) & _MASK, (block.end_seq - base) & _MASK
        if not 1 <= start < end:
            _fail(
                ErrorClass.SEQUENCE, f"receive_sack: {block.seq} to {block.end_seq} is no range after rcv_nxt"
            )
        if end > room:
            _fail(ErrorClass.WINDOW, f"receive_sack: {block.seq} to {block.end_seq} is outside the window")


def _check_sent(image: Image) -> None:
    assert image.sequence
    base = image.sequence.snd_una
    sent = (image.sequence.snd_nxt - base) & _MASK
    previous = 0
    for entry in image.sack_scoreboard:
        start, end = (entry.seq - base) & _MASK, (entry.end_seq - base) & _MASK
        if not previous <= start < end <= sent:
            _fail(
                ErrorClass.SEQUENCE,
                f"sack_scoreboard: {entry.seq} to {entry.end_seq} is not a range of the sent data, in order",
            )
        previous = end


def _check_urgent(image: Image) -> None:
    sequence, v = image.sequence, image.urgent
    assert sequence
    if v is None:
        return
    if v.flags & UrgentFlag.SEND:
        offset = (v.snd_up - sequence.snd_una) & _MASK
        if offset > (sequence.write_seq - sequence.snd_una) & _MASK:
            _fail(ErrorClass.SEQUENCE, f"urgent: snd_up {v.snd_up} is outside the queues")
    if v.flags & (UrgentFlag.RECEIVED | UrgentFlag.READ):
        offset = (v.urg_seq - sequence.copied_seq) & _MASK
        if offset >= len(image.receive_queue):
            _fail(ErrorClass.SEQUENCE, f"urgent: urg_seq {v.urg_seq} is outside the receive queue")
    if v.flags & UrgentFlag.ANNOUNCED and (v.urg_seq - sequence.rcv_nxt) & _MASK > _MAX_WINDOW:
        _fail(ErrorClass.SEQUENCE, f"urgent: urg_seq {v.urg_seq} is not within 65535 after rcv_nxt")


def check(image: Image) -> None:
    """Check an image whose sections are each right by themselves; raises ImageError."""
    _check_addresses(image.identity)
    _check_belonging(image)
    _check_missing(image)
    if image.identity.kind != Kind.CONNECTED:
        return
    _check_connection_flags(image)
    _check_sequence(image)
    _check_queues(image)
    if image.window is None:  # SYN-SENT may have none yet; what needs them is not allowed there
        return
    _check_window(image, image.window)
    _check_received(image, image.window)
    _check_sent(image)
    _check_urgent(image)
