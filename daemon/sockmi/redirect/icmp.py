# SPDX-License-Identifier: MIT
"""ICMP errors about moved connections: found at the exporter, told to the importer.

A router that cannot send on a packet of the importer answers to its source address, which is the
exporter's (``forward``, ``takeover`` until the address has moved) or was translated to
it (``nat``). So a raw socket on the exporter takes in errors; the quoted packet's header names the
connection; the importer's daemon gets the error in the importer's terms, checks that it
has imported that connection, and gives it to its own kernel as a locally made packet. This needs
nothing per connection and nothing per data packet, unlike a second in-kernel map.

The other way round, in ``nat``: the exporter's kernel may find a peer's packet too long for the
way to the importer, after translation. The ruleset leads that error here too,
and it goes out again to the peer, in the peer's terms.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import ip_address

from sockmi.addresses import Endpoint, FourTuple
from sockmi.frozen import frozen
from sockmi.ip_versions import families
from sockmi.redirect.base import Outbound
from sockmi.redirect.settings import Tag
from sockmi.redirect.tables import Tables
from sockmi.redirect.ways import Address

TCP = socket.IPPROTO_TCP
ICMP6 = socket.IPPROTO_ICMPV6
_ERRORS = {4: frozenset((3, 11, 12)), 6: frozenset((1, 2, 3, 4))}  # RFC 792; RFC 4443
_TOO_BIG = {4: (3, 4), 6: (2, 0)}
_MTU_MIN = {4: 68, 6: 1280}
_QUOTE_BYTES = 8  # of the TCP header: ports and sequence number (RFC 792)
_WIRE = struct.Struct("!BBBI16s16sH16sHI")
_SO_MARK = 36
_ICMP_FILTER = 1
_SOL_RAW = 255
_IPV6_HDRINCL = 36
_IP_PKTINFO = 8
_LOOPBACK = 1  # index of lo in every network namespace
_AT_ONCE = 64


@frozen
class IcmpError:
    """One ICMP or ICMPv6 error about a TCP segment.

    ``tuple``: of the quoted segment, ``local`` being its source. ``reporter``: who sent the error.
    ``info``: the second word of the ICMP header: for "too big" the MTU in bytes, else 0 or a pointer.
    ``sequence``: the quoted TCP sequence number.
    """

    type: int
    code: int
    info: int
    reporter: Address
    tuple: FourTuple
    sequence: int

    @property
    def version(self) -> int:
        """IP version of the error and of what it quotes."""
        return self.tuple.version

    @property
    def too_big(self) -> bool:
        """Fragmentation needed (RFC 1191) or packet too big (RFC 8201); ``info`` is the MTU."""
        return (self.type, self.code) == _TOO_BIG[self.version]

    def to_bytes(self) -> bytes:
        """The wire form, for the stream between daemons; 64 bytes."""
        t = self.tuple
        return _WIRE.pack(
            self.version,
            self.type,
            self.code,
            self.info,
            self.reporter.packed,
            t.local.address.packed,
            t.local.port,
            t.remote.address.packed,
            t.remote.port,
            self.sequence,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> IcmpError:
        """Inverse of ``to_bytes``; ValueError for anything that is not an error of the kinds we relay."""
        if len(data) != _WIRE.size:
            raise ValueError(f"ICMP error of {len(data)} bytes; must be {_WIRE.size}")
        version, kind, code, info, *ends, sequence = _WIRE.unpack(data)
        if version not in _ERRORS or kind not in _ERRORS[version]:
            raise ValueError(f"IP version {version}, ICMP type {kind} is no ICMP error")
        wide = 4 if version == 4 else 16
        reporter, local, lport, remote, rport = ends
        if any(any(each[wide:]) for each in (reporter, local, remote)):
            raise ValueError("ICMP error: an IPv4 address is followed by other bytes")
        return cls(
            kind,
            code,
            info,
            ip_address(reporter[:wide]),
            FourTuple(Endpoint(ip_address(local[:wide]), lport), Endpoint(ip_address(remote[:wide]), rport)),
            sequence,
        )


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of ``data``."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse(message: bytes, reporter: Address) -> IcmpError | None:
    """An ICMP message (without its IP header) if it is an error that quotes a TCP segment, else None."""
    version = reporter.version
    if len(message) < 8 or message[0] not in _ERRORS[version]:
        return None
    kind, code, _unused, info = struct.unpack_from("!BBHI", message)
    quoted = message[8:]
    if version == 4:
        if len(quoted) < 20 or quoted[0] >> 4 != 4:
            return None
        header = (quoted[0] & 15) * 4
        if quoted[9] != TCP or header < 20 or struct.unpack_from("!H", quoted, 6)[0] & 0x1FFF:
            return None
        source, destination = quoted[12:16], quoted[16:20]
        if (kind, code) == _TOO_BIG[4]:
            info &= 0xFFFF
    else:
        header = 40
        if len(quoted) < header or quoted[0] >> 4 != 6 or quoted[6] != TCP:
            return None
        source, destination = quoted[8:24], quoted[24:40]
    if len(quoted) < header + _QUOTE_BYTES:
        return None
    sport, dport, sequence = struct.unpack_from("!HHI", quoted, header)
    ends = FourTuple(Endpoint(ip_address(source), sport), Endpoint(ip_address(destination), dport))
    return IcmpError(kind, code, info, reporter, ends, sequence)


def build(error: IcmpError) -> bytes:
    """The whole IP packet that tells ``error`` to the quoted segment's source."""
    t = error.tuple
    source, destination = t.local.address.packed, t.remote.address.packed
    segment = struct.pack("!HHI", t.local.port, t.remote.port, error.sequence)
    outer_source, outer_destination = error.reporter.packed, source
    if error.version == 4:
        quoted = _ipv4(TCP, 1500, source, destination) + segment
        body = struct.pack("!BBHI", error.type, error.code, 0, error.info) + quoted
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        return _ipv4(socket.IPPROTO_ICMP, 20 + len(body), outer_source, outer_destination) + body
    quoted = _ipv6(TCP, 1460, source, destination) + segment
    body = struct.pack("!BBHI", error.type, error.code, 0, error.info) + quoted
    pseudo = outer_source + outer_destination + struct.pack("!II", len(body), ICMP6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    return _ipv6(ICMP6, len(body), outer_source, outer_destination) + body


def _ipv4(protocol: int, length: int, source: bytes, destination: bytes) -> bytes:
    dont_fragment = 0x4000
    fields = (0x45, 0, length, 0, dont_fragment, 64, protocol, 0, source, destination)
    header = struct.pack("!BBHHHBBH4s4s", *fields)
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:]


def _ipv6(protocol: int, length: int, source: bytes, destination: bytes) -> bytes:
    return struct.pack("!IHBB16s16s", 6 << 28, length, protocol, 64, source, destination)


class _RawSender:
    """Sends whole IP packets under a mark."""

    def __init__(self, mark: int) -> None:
        self._sockets: dict[int, socket.socket] = {}
        for version, family in families().items():
            sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
            sock.setblocking(False)
            if version == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            self._sockets[version] = sock

    def send(self, packet: bytes, destination: Address) -> None:
        self._sockets[destination.version].sendto(packet, (str(destination), 0))

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def _arrived_by(ancillary: Sequence[tuple[int, int, bytes]]) -> int:
    """Index of the interface, from struct in_pktinfo or in6_pktinfo; 0 if there is none."""
    at = {(socket.IPPROTO_IP, _IP_PKTINFO): 0, (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO): 16}
    for level, kind, data in ancillary:
        if (level, kind) in at:
            return int.from_bytes(data[at[level, kind] :][:4], sys.byteorder)
    return 0


class IcmpListener:
    """Takes in the ICMP errors that arrive at this host; one socket for each IP version."""

    def __init__(self) -> None:
        v4 = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        v4.setsockopt(
            _SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~sum(1 << t for t in _ERRORS[4]) & 0xFFFFFFFF)
        )
        v4.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._sockets = [v4]
        if 6 in families():
            v6 = socket.socket(socket.AF_INET6, socket.SOCK_RAW, ICMP6)
            passed = sum(1 << t for t in _ERRORS[6])
            v6.setsockopt(ICMP6, 1, struct.pack("=8I", ~passed & 0xFFFFFFFF, *[0xFFFFFFFF] * 7))
            v6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._sockets.append(v6)
        for sock in self._sockets:
            sock.setblocking(False)

    def filenos(self) -> tuple[int, ...]:
        """Descriptors to wait on for reading."""
        return tuple(sock.fileno() for sock in self._sockets)

    def receive(self, most: int = _AT_ONCE) -> list[tuple[IcmpError, bool]]:
        """Errors that wait, and whether this host itself made them; at most ``most`` of each version.

        What does not quote TCP is left out.
        """
        found: list[tuple[IcmpError, bool]] = []
        for sock in self._sockets:
            with contextlib.suppress(BlockingIOError):
                for _turn in range(most):
                    packet, ancillary, _unused, source = sock.recvmsg(2048, 64)
                    if sock.family == socket.AF_INET:
                        packet = packet[(packet[0] & 15) * 4 :]
                    error = parse(packet, ip_address(source[0].partition("%")[0]))
                    if error is not None:
                        found.append((error, _arrived_by(ancillary) == _LOOPBACK))
        return found

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets:
            sock.close()


class IcmpRelay:
    """At the exporter: each error about a moved connection goes to whom it concerns.

    ``ship(outbound, error)`` must bring ``error``, already in the importer's terms, to the daemon
    at ``outbound.importer.address``. Call ``work`` when one of ``filenos`` is readable.
    """

    def __init__(
        self,
        tables: Tables,
        known_as: Callable[[FourTuple], Endpoint | None],
        ship: Callable[[Outbound, IcmpError], None],
    ) -> None:
        """``known_as``: what the peer knows as the other end of what is led, translated, from it (``local``)
        to an importer; None if nothing is.
        """
        self._tables = tables
        self._known_as = known_as
        self._ship = ship
        self._listener = IcmpListener()
        self._sender = _RawSender(tables.settings.marked(Tag.PASS))
        self.filenos = self._listener.filenos

    def work(self) -> int:
        """Handle the errors that wait; returns how many were passed on."""
        return sum(self._handle(*each) for each in self._listener.receive())

    def _handle(self, error: IcmpError, own: bool) -> bool:
        if error.too_big and error.info and error.info < _MTU_MIN[error.version]:
            return False  # RFC 1191 section 3, RFC 8201 section 4: no such path
        segment = error.tuple
        flow = self._tables.flow(segment)
        if flow is None:
            # only what chain reroute has led here; all else is about connections of others
            return own and self._tables.is_importer(segment.remote.address) and self._back_to_peer(error)
        outbound = self._outbound(segment, *flow)
        if outbound is None:
            return False
        copy = outbound.importer if flow[0] == Tag.NAT_OUT else segment.local
        self._ship(outbound, replace(error, tuple=FourTuple(copy, segment.remote)))
        return True

    def _outbound(self, t: FourTuple, tag: Tag, low: int) -> Outbound | None:
        tables = self._tables
        address = None
        if tag == Tag.NAT_OUT:
            address, port = tables.address(tables.addresses, t), low
        elif tag == Tag.MOVED:
            port = t.local.port
            address = tables.address(tables.nexts, t) or tables.address(tables.addresses, t)
        return None if address is None else Outbound(t, Endpoint(address, port))

    def _back_to_peer(self, error: IcmpError) -> bool:
        """Our kernel's own complaint about a packet that it has translated, or about another's packet."""
        segment = error.tuple
        known = self._known_as(segment)
        if known is not None:
            error = replace(error, tuple=FourTuple(segment.local, known))
        with contextlib.suppress(OSError):
            self._sender.send(build(error), segment.local.address)
            return True
        return False

    def close(self) -> None:
        """Close the sockets."""
        self._listener.close()
        self._sender.close()


class IcmpInjector:
    """At the importer: gives errors that the exporter has sent on to this host's kernel."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._sender = _RawSender(tables.settings.inject_mark)

    def inject(self, error: IcmpError) -> bool:
        """Deliver ``error`` if its connection was imported here; False, and nothing is done, if not."""
        flow = self._tables.flow(error.tuple)
        if flow is None or flow[0] not in (Tag.LOCAL, Tag.NAT_IN):
            return False
        self._sender.send(build(error), error.tuple.local.address)
        return True

    def close(self) -> None:
        """Close the sockets."""
        self._sender.close()
