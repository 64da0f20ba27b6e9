# SPDX-License-Identifier: MIT
"""Packets built and taken apart by hand: TCP, ICMP errors of both families, checksums."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import ip_address

from sockmi.addresses import Endpoint, FourTuple
from tests.lab.redirect_lab import Host

TCP, ICMP, ICMP6 = 6, 1, 58


def sum16(data: bytes) -> int:
    """The Internet checksum's sum, folded; 0xffff for data with a right checksum in it."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def check16(data: bytes) -> bytes:
    """The checksum of ``data`` in which its field is zero."""
    return struct.pack(">H", ~sum16(data) & 0xFFFF)


def pseudo(source: bytes, dest: bytes, protocol: int, length: int) -> bytes:
    """What a transport checksum covers besides its own bytes."""
    if len(source) == 4:
        return source + dest + struct.pack(">HH", protocol, length)
    return source + dest + struct.pack(">II", length, protocol)


def network(source: bytes, dest: bytes, protocol: int, body: int, fragment: int = 0) -> bytes:
    """A network header for ``body`` bytes."""
    if len(source) == 16:
        return struct.pack(">IHBB", 6 << 28, body, protocol, 64) + source + dest
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + body, 7, fragment, 64, protocol, 0) + source + dest
    return head[:10] + check16(head) + head[12:]


def segment(source: Endpoint, dest: Endpoint, payload: bytes, flags: int = 0x18, seq: int = 1) -> bytes:
    """A TCP segment with a right checksum."""
    head = struct.pack(">HHIIBBHHH", source.port, dest.port, seq, 0, 0x50, flags, 1000, 0, 0)
    covered = pseudo(source.address.packed, dest.address.packed, TCP, len(head) + len(payload))
    check = check16(covered + head + payload)
    return head[:16] + check + head[18:] + payload


def quoted(source: Endpoint, dest: Endpoint, tcp_bytes: int) -> bytes:
    """A packet from ``source`` to ``dest``, cut ``tcp_bytes`` after its network header."""
    body = segment(source, dest, bytes(range(200)) * 5)
    return network(source.address.packed, dest.address.packed, TCP, len(body)) + body[:tcp_bytes]


def error(what: tuple[int, int, int], quote: bytes, source: bytes, dest: bytes) -> bytes:
    """An ICMP or ICMPv6 error message with a right checksum; ``what``: type, code, and what follows."""
    kind, code, info = what
    head = struct.pack(">BBHI", kind, code, 0, info)
    covered = pseudo(source, dest, ICMP6, len(head) + len(quote)) if len(source) == 16 else b""
    return head[:2] + check16(covered + head + quote) + head[4:] + quote


@dataclass(frozen=True)
class Got:
    """An ICMP error as it arrived."""

    source: bytes
    dest: bytes
    kind: int
    code: int
    info: int
    ends: FourTuple  # of the quoted packet, its source as local
    quote: bytes
    right: bool  # every checksum that can be checked


def read_error(packet: bytes) -> Got | None:
    """Takes one apart; None: it is none."""
    if packet[0] >> 4 == 4:
        source, dest, protocol, body = (
            packet[12:16],
            packet[16:20],
            packet[9],
            packet[20 : struct.unpack(">H", packet[2:4])[0]],
        )
        covered, right = b"", sum16(packet[:20]) == 0xFFFF
        errors = {3, 4, 5, 11, 12}
    else:
        source, dest, protocol, body = (
            packet[8:24],
            packet[24:40],
            packet[6],
            packet[40 : 40 + struct.unpack(">H", packet[4:6])[0]],
        )
        covered, right = pseudo(source, dest, ICMP6, len(body)), True
        errors = {1, 2, 3, 4}
    if protocol not in (ICMP, ICMP6) or body[0] not in errors:
        return None
    kind, code, _unused, info = struct.unpack(">BBHI", body[:8])
    quote = body[8:]
    right = right and sum16(covered + body) == 0xFFFF
    if quote[0] >> 4 == 4:
        right = right and sum16(quote[:20]) == 0xFFFF
        inner, tcp = (quote[12:16], quote[16:20]), quote[20:]
        whole = struct.unpack(">H", quote[2:4])[0] == len(quote)
    else:
        inner, tcp = (quote[8:24], quote[24:40]), quote[40:]
        whole = struct.unpack(">H", quote[4:6])[0] == len(tcp)
    if whole:
        right = right and sum16(pseudo(*inner, TCP, len(tcp)) + tcp) == 0xFFFF
    ports = struct.unpack(">HH", tcp[:4])
    local, remote = (Endpoint(ip_address(a), p) for a, p in zip(inner, ports, strict=True))
    return Got(source, dest, kind, code, info, FourTuple(local, remote), quote, right)


class Tap:
    """What arrives at a host's eth0."""

    def __init__(self, host: Host) -> None:
        with host.inside():
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
            self.sock.bind(("eth0", 3))
        self.sock.settimeout(0.05)

    def packets(self, seconds: float = 0.4) -> list[bytes]:
        """All within a time."""
        got = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                packet, address = self.sock.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] != socket.PACKET_OUTGOING and address[1] in (0x0800, 0x86DD):
                got.append(packet)
        return got

    def errors(self, seconds: float = 0.4) -> list[Got]:
        """The ICMP errors among them."""
        return [found for packet in self.packets(seconds) if (found := read_error(packet)) is not None]

    def close(self) -> None:
        self.sock.close()


def send(host: Host, protocol: int, dest: str, message: bytes, headers: bool = False) -> None:
    """From ``host``: ``message`` behind a header made by the kernel, or with its own."""
    family = socket.AF_INET6 if ":" in dest else socket.AF_INET
    with host.inside(), socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        if headers:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        sock.sendto(message, (dest, 0))
