# SPDX-License-Identifier: MIT
"""Record what is on the wire at a host (tcpdump), and judge it: did the peer notice anything?

The checker reads a capture made at one end of the connections, the observer's. There every
byte that was acknowledged must have been seen, nothing may be reset or ended that should not
be, and no receiver may take back what it has acknowledged, or the room that it has told of.
"""

from __future__ import annotations

import re
import select
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import dpkt  # type: ignore[import-untyped]

from lab.host import Host
from lab.plan import PATIENCE, LabError

SNAP_BYTES = 160
"""Enough for Ethernet, IPv6 and all TCP options; the payload's length stands in the IP header."""

Ends = tuple[str, int]


class Capture:
    """tcpdump on a host: ``with Capture(lab.host("peer"), "tcp port 80") as capture: ...``."""

    def __init__(
        self,
        host: Host,
        filter_: str = "tcp",
        path: Path | None = None,
        device: str = "eth0",
        *,
        inbound: bool = False,
    ) -> None:
        """``inbound``: only what comes in, so that what the host forwards is seen once."""
        self.host = host
        self.path = path or host.run_dir / "capture.pcap"
        self.dropped = 0
        self._command = ["tcpdump", "-i", device, "-s", str(SNAP_BYTES), "-B", "65536", "-n", "-U"]
        self._command += ["--immediate-mode", "-Z", "root", "-w", str(self.path)]
        self._command += ["-Q", "in"] if inbound else []
        self._command.append(filter_)
        self._process: subprocess.Popen[str] | None = None

    def start(self, timeout_s: float = 10.0 * PATIENCE) -> None:
        """Returns when packets are being recorded."""
        self._process = self.host.popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        ready, _unused, _unused = select.select([self._process.stderr], [], [], timeout_s)
        first = self._process.stderr.readline() if ready else ""
        if "listening on" not in first:
            self._process.kill()
            _unused, rest = self._process.communicate()
            self._process = None
            raise LabError(f"tcpdump on {self.host.name} does not record: {first}{rest}".strip())

    def stop(self, settle_s: float = 0.05) -> None:
        """Stop recording when the file has not grown for ``settle_s``."""
        process, self._process = self._process, None
        if process is None:
            return
        size, deadline = -1, time.monotonic() + 5.0
        while (now := self.path.stat().st_size if self.path.exists() else 0) != size:
            size = now
            if time.monotonic() > deadline:
                break
            time.sleep(settle_s)
        process.send_signal(signal.SIGINT)
        try:
            _unused, words = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            _unused, words = process.communicate()
        dropped = re.findall(r"(\d+) packets? dropped", words)
        self.dropped = sum(int(number) for number in dropped)

    def check(self, **options: Any) -> Verdict:
        """Judge what was recorded; ``options`` as for `judge`."""
        self.stop()
        observers = {str(self.host.address(version)) for version in (4, 6)}
        verdict = judge(read_pcap(self.path), **{"observers": observers} | options)
        if self.dropped:
            verdict.findings.append(
                Finding(
                    Trouble.INCOMPLETE, "capture", f"tcpdump lost {self.dropped} packets; nothing is proved"
                )
            )
        return verdict

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP segment. ``sack``: (left, right) edges as on the wire; ``length`` of the payload, bytes.

    ``window`` as on the wire, so not yet scaled; ``scale``: what a SYN offers (RFC 7323).
    """

    at_s: float
    source: Ends
    target: Ends
    sequence: int
    acknowledgment: int
    flags: int
    length: int
    sack: tuple[tuple[int, int], ...] = ()
    window: int | None = None
    scale: int | None = None

    def has(self, flag: int) -> bool:
        """True if a flag (``dpkt.tcp.TH_*``) is set."""
        return bool(self.flags & flag)


def read_pcap(path: Path) -> Iterator[Segment]:
    """The TCP segments of a capture, in order; fragments and other packets are left out."""
    with path.open("rb") as file:
        for at_s, frame in dpkt.pcap.Reader(file):
            packet = dpkt.ethernet.Ethernet(frame).data
            if isinstance(packet, dpkt.ip.IP):
                source, target = str(IPv4Address(packet.src)), str(IPv4Address(packet.dst))
                length = packet.len - packet.hl * 4
            elif isinstance(packet, dpkt.ip6.IP6):
                source, target = str(IPv6Address(packet.src)), str(IPv6Address(packet.dst))
                length = packet.plen - sum(len(header) for header in packet.all_extension_headers)
            else:
                continue
            tcp = packet.data
            if isinstance(tcp, dpkt.tcp.TCP):
                yield Segment(
                    at_s,
                    (source, tcp.sport),
                    (target, tcp.dport),
                    tcp.seq,
                    tcp.ack,
                    tcp.flags,
                    length - tcp.off * 4,
                    _sack(tcp.opts),
                    tcp.win,
                    _scale(tcp.opts) if tcp.flags & dpkt.tcp.TH_SYN else None,
                )


def _sack(options: bytes) -> tuple[tuple[int, int], ...]:
    try:
        for kind, value in dpkt.tcp.parse_opts(options):
            if kind == dpkt.tcp.TCP_OPT_SACK:
                edges = [int.from_bytes(value[at : at + 4], "big") for at in range(0, len(value), 4)]
                return tuple(zip(edges[::2], edges[1::2], strict=True))
    except (dpkt.UnpackError, ValueError, IndexError, TypeError):
        pass  # options cut off by the snap length, or not understood
    return ()


def _scale(options: bytes) -> int | None:
    found = [value for kind, value in dpkt.tcp.parse_opts(options) if kind == dpkt.tcp.TCP_OPT_WSCALE]
    return min(found[0][0], 14) if found and found[0] else None


class Trouble(StrEnum):
    """What can be wrong with a capture."""

    RST = "rst"
    FIN = "fin"
    FIN_MOVED = "fin-moved"
    HOLE = "hole"
    ACK_UNSENT = "ack-unsent"
    ACK_BACK = "ack-back"
    SACK_RENEGED = "sack-reneged"
    WINDOW_BACK = "window-back"
    RESTARTED = "restarted"
    INCOMPLETE = "incomplete"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the peer could have noticed: what, on which connection, and when and where."""

    trouble: Trouble
    connection: str
    message: str

    def __str__(self) -> str:
        return f"{self.trouble}: {self.connection}: {self.message}"


@dataclass(slots=True)
class Verdict:
    """Findings, and figures that are no fault: segments, retransmitted ones, bytes each way."""

    findings: list[Finding] = field(default_factory=list)
    connections: int = 0
    segments: int = 0
    retransmissions: int = 0

    @property
    def clean(self) -> bool:
        """True if nobody could have noticed anything."""
        return not self.findings

    def __str__(self) -> str:
        head = (
            f"{self.connections} connections, {self.segments} segments, {self.retransmissions} retransmitted"
        )
        return "\n".join([head, *map(str, self.findings)])


class _Direction:
    """What one side sent, with sequence numbers unwrapped to count from its first one."""

    def __init__(self) -> None:
        self.base: int | None = None
        self.sent_to = 0  # the highest sequence number seen, plus one
        self.covered_to = 0  # all before this was seen
        self.beyond: list[tuple[int, int]] = []  # seen after a hole, sorted and disjoint
        self.fin_at: int | None = None
        self.acknowledged = 0  # by the other side
        self.acknowledged_at_s = 0.0
        self.acknowledged_seen = False
        self.regressions = 0
        self.sacked: list[tuple[int, int]] = []  # by the other side, above ``acknowledged``
        self.offered: list[int | None] = []  # the window scale of its SYN, when that was seen
        self.room_to = 0  # the highest right edge of the window that the other side has told it
        self.room_at_s = 0.0

    @property
    def over(self) -> bool:
        """Whether its FIN has been acknowledged."""
        return self.fin_at is not None and self.acknowledged > self.fin_at

    def unwrap(self, sequence: int) -> int:
        """The 64-bit number nearest to what was sent last whose low 32 bits are ``sequence``."""
        if self.base is None:
            self.base = sequence
        offset = (sequence - self.base) & 0xFFFFFFFF
        near = max(self.sent_to, self.acknowledged)
        offset += (near - offset + (1 << 31)) >> 32 << 32
        return offset

    def see(self, begin: int, end: int) -> bool:
        """Segment [begin, end) is seen; True if all of it had been seen before."""
        again = end <= self.covered_to or any(a <= begin and end <= b for a, b in self.beyond)
        self.sent_to = max(self.sent_to, end)
        spans = sorted([*self.beyond, (begin, end)])
        self.beyond = []
        for left, right in spans:
            if left <= self.covered_to:
                self.covered_to = max(self.covered_to, right)
            elif self.beyond and left <= self.beyond[-1][1]:
                self.beyond[-1] = (self.beyond[-1][0], max(self.beyond[-1][1], right))
            else:
                self.beyond.append((left, right))
        return again


class _Connection:
    def __init__(self, name: str, begin_s: float) -> None:
        self.name = name
        self.begin_s = begin_s
        self.sides: dict[Ends, _Direction] = {}


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed; see `judge`."""

    fin_from: Collection[str] | None = None
    rst_from: Collection[str] = ()
    allow: Collection[Trouble] = ()
    reordering_s: float = 0.02
    observers: Collection[str] = ()


def judge(
    segments: Iterable[Segment],
    *,
    fin_from: Collection[str] | None = None,
    rst_from: Collection[str] = (),
    allow: Collection[Trouble] = (),
    reordering_s: float = 0.02,
    observers: Collection[str] = (),
) -> Verdict:
    """Judge the segments of any number of connections.

    ``fin_from``: addresses that may end their side (None: all; a FIN may still not move or be
    followed by data). ``rst_from``: addresses that may reset. ``allow``: troubles that are not
    reported. ``reordering_s``: a segment that acknowledges less than one before, or tells of less room, but
    no later after it than this, was overtaken on its way. ``observers``: addresses whose own windows are
    not judged, as their kernels take them back when buffers are made smaller.
    """
    rules = Rules(fin_from, rst_from, allow, reordering_s, observers)
    connections: dict[frozenset[Ends], _Connection] = {}
    verdict = Verdict()
    for segment in segments:
        verdict.segments += 1
        key = frozenset((segment.source, segment.target))
        connection = connections.get(key)
        if connection is None:
            name = f"{_text(segment.source)} <-> {_text(segment.target)}"
            connection = connections[key] = _Connection(name, segment.at_s)
        for trouble, message in _look(connection, segment, rules, verdict):
            if trouble not in allow:
                at_ms = (segment.at_s - connection.begin_s) * 1e3
                side = f"from {_text(segment.source)} at {at_ms:.1f} ms: {message}"
                verdict.findings.append(Finding(trouble, connection.name, side))
    for connection in connections.values():
        for ends, sent in connection.sides.items():
            if sent.beyond and Trouble.HOLE not in allow:
                gap = f"bytes {sent.covered_to} to {sent.beyond[0][0]} were never seen, later ones were"
                verdict.findings.append(Finding(Trouble.HOLE, connection.name, f"from {_text(ends)}: {gap}"))
            if sent.regressions and Trouble.ACK_BACK not in allow:
                what = f"{sent.regressions} segments acknowledge less of it than one before"
                verdict.findings.append(
                    Finding(Trouble.ACK_BACK, connection.name, f"to {_text(ends)}: {what}")
                )
    verdict.connections = len(connections)
    if not connections and Trouble.NOTHING not in allow:
        verdict.findings.append(Finding(Trouble.NOTHING, "capture", "no TCP segment at all was recorded"))
    return verdict


def _look(
    connection: _Connection,
    segment: Segment,
    rules: Rules,
    verdict: Verdict,
) -> Iterator[tuple[Trouble, str]]:
    """Take one segment into account; what is wrong with it."""
    sender = connection.sides.setdefault(segment.source, _Direction())
    other = connection.sides.setdefault(segment.target, _Direction())
    if segment.has(dpkt.tcp.TH_RST):
        # Nobody has the connection any more: a RST answers what came late or twice, on any host.
        if segment.source[0] not in rules.rst_from and not (sender.over and other.over):
            yield Trouble.RST, "RST"
        return
    syn, fin = segment.has(dpkt.tcp.TH_SYN), segment.has(dpkt.tcp.TH_FIN)
    fresh = sender.base is None
    if fresh or not syn:
        begin = sender.unwrap(segment.sequence)
    else:
        begin = (segment.sequence - (sender.base or 0)) & 0xFFFFFFFF
        if begin != 0:
            yield Trouble.RESTARTED, "a second SYN with another sequence number"
            return
    if syn:
        sender.offered = [segment.scale]
    end = begin + segment.length + syn + fin
    if end > begin:
        # A one byte probe of a closed window repeats old data, as a keepalive does.
        if sender.see(begin, end):
            verdict.retransmissions += 1
        if sender.fin_at is not None and end > sender.fin_at + 1:
            yield Trouble.FIN_MOVED, f"data up to {end} after a FIN at {sender.fin_at}"
    if fin:
        if rules.fin_from is not None and segment.source[0] not in rules.fin_from:
            yield Trouble.FIN, "FIN"
        if sender.fin_at not in (None, end - 1):
            yield Trouble.FIN_MOVED, f"FIN at {end - 1}, before at {sender.fin_at}"
        sender.fin_at = end - 1
    if segment.has(dpkt.tcp.TH_ACK):
        behind = other.acknowledged_seen and other.unwrap(segment.acknowledgment) < other.acknowledged
        yield from _acknowledged(other, segment, rules.reordering_s)
        if not behind and segment.source[0] not in rules.observers:
            yield from _told_room(sender, other, segment, rules.reordering_s)


def _told_room(
    sender: _Direction, sent: _Direction, segment: Segment, reordering_s: float
) -> Iterator[tuple[Trouble, str]]:
    """RFC 9293, 3.8.6: the right edge is not to move back. Closed it may be: memory may have run out."""
    if not (sender.offered and sent.offered and segment.window):
        return
    scales = sender.offered[0], sent.offered[0]
    scale = 0 if None in scales or segment.has(dpkt.tcp.TH_SYN) else scales[0] or 0
    room_to = sent.unwrap(segment.acknowledgment) + (segment.window << scale)
    # What is told is rounded to the scale.
    if room_to + (1 << scale) <= sent.room_to and segment.at_s > sent.room_at_s + reordering_s:
        yield Trouble.WINDOW_BACK, f"room for bytes up to {room_to}, before up to {sent.room_to}"
    if room_to > sent.room_to:
        sent.room_to, sent.room_at_s = room_to, segment.at_s


def _acknowledged(sent: _Direction, segment: Segment, reordering_s: float) -> Iterator[tuple[Trouble, str]]:
    """``segment`` acknowledges what ``sent`` describes."""
    # If nothing of that side was seen yet, this is where it begins: it sent all before.
    number = sent.unwrap(segment.acknowledgment)
    if number > sent.sent_to:
        yield Trouble.ACK_UNSENT, f"acknowledges {number}, but only {sent.sent_to} were sent"
    elif number > sent.covered_to:
        yield Trouble.HOLE, f"acknowledges {number}, but bytes from {sent.covered_to} were never seen"
    if sent.acknowledged_seen and number < sent.acknowledged:
        sent.regressions += segment.at_s > sent.acknowledged_at_s + reordering_s
        return
    if number > sent.acknowledged or not sent.acknowledged_seen:
        sent.acknowledged, sent.acknowledged_at_s, sent.acknowledged_seen = number, segment.at_s, True
    blocks = [(sent.unwrap(left), sent.unwrap(right)) for left, right in segment.sack]
    # The first block may tell of a duplicate instead (RFC 2883).
    if blocks and (blocks[0][1] <= number or any(_within(blocks[0], block) for block in blocks[1:])):
        blocks = blocks[1:]
    blocks = [block for block in blocks if block[0] >= number]
    standing = [span for span in sent.sacked if span[1] > number]
    # Three blocks fit beside timestamps: fewer are the receiver's whole list.
    if len(segment.sack) < 3 and not segment.has(dpkt.tcp.TH_SYN):
        for left, right in standing:
            if not any(_within((max(left, number), right), block) for block in blocks):
                yield (
                    Trouble.SACK_RENEGED,
                    f"bytes {left} to {right} were selectively acknowledged before, and are not any more",
                )
        standing = []
    sent.sacked = standing + [block for block in blocks if block not in standing]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _text(ends: Ends) -> str:
    return f"[{ends[0]}]:{ends[1]}" if ":" in ends[0] else f"{ends[0]}:{ends[1]}"
