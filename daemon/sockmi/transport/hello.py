# SPDX-License-Identifier: MIT
"""What a host says of itself in a HELLO: certificate, where its stream listens, what it can do."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from sockmi.frozen import frozen
from sockmi.transport.identity import CERTIFICATE_BYTES_MAX
from sockmi.transport.seal import INTRODUCTION_BYTES_MAX

_ADDRESSES_MAX = 8
_NAMES_MAX = 8
_NAME_BYTES_MAX = 32
_HOST_NAME_BYTES_MAX = 64
_FIELD = struct.Struct("!BH")
_CERTIFICATE, _PORT, _ADDRESS, _HOST_NAME, _ENGINE, _REDIRECT = range(1, 7)


@frozen
class Introduction:
    """``certificate`` is DER. Without ``addresses`` the stream is where the datagrams come from."""

    certificate: bytes
    stream_port: int
    host_name: str = ""
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()
    engines: tuple[str, ...] = ()
    redirects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.certificate) <= CERTIFICATE_BYTES_MAX:
            size = len(self.certificate)
            raise ValueError(f"certificate of {size} bytes, expected 1 to {CERTIFICATE_BYTES_MAX}")
        if not 1 <= self.stream_port <= 0xFFFF:
            raise ValueError(f"stream port {self.stream_port} is outside 1..65535")
        if len(self.host_name.encode()) > _HOST_NAME_BYTES_MAX or not self.host_name.isprintable():
            raise ValueError(f"host name {self.host_name!r}: at most {_HOST_NAME_BYTES_MAX} printable bytes")
        if len(self.addresses) > _ADDRESSES_MAX:
            raise ValueError(f"{len(self.addresses)} addresses, at most {_ADDRESSES_MAX}")
        for address in self.addresses:
            if address.is_unspecified or address.is_multicast or address.is_link_local:
                raise ValueError(f"{address}: other hosts cannot connect to this kind of address")
        for names in (self.engines, self.redirects):
            if len(names) > _NAMES_MAX:
                raise ValueError(f"{len(names)} capabilities of a kind, at most {_NAMES_MAX}")
            for name in names:
                if not (0 < len(name) <= _NAME_BYTES_MAX and name.isascii() and name.isprintable()):
                    raise ValueError(f"capability {name!r}: 1 to {_NAME_BYTES_MAX} printable ASCII bytes")

    def encode(self) -> bytes:
        """Fields of type (u8), length (u16) and value; ValueError if they do not fit in one HELLO."""
        fields = [(_CERTIFICATE, self.certificate), (_PORT, self.stream_port.to_bytes(2, "big"))]
        fields += [(_ADDRESS, address.packed) for address in self.addresses]
        fields += [(_HOST_NAME, self.host_name.encode())] if self.host_name else []
        fields += [(_ENGINE, name.encode()) for name in self.engines]
        fields += [(_REDIRECT, name.encode()) for name in self.redirects]
        encoded = b"".join(_FIELD.pack(kind, len(value)) + value for kind, value in fields)
        if len(encoded) > INTRODUCTION_BYTES_MAX:
            raise ValueError(f"introduction of {len(encoded)} bytes, at most {INTRODUCTION_BYTES_MAX}")
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Introduction:
        """The inverse; ValueError for anything malformed. Fields of unknown type are skipped."""
        values: dict[int, list[bytes]] = {}
        offset = 0
        while offset < len(encoded):
            if len(encoded) - offset < _FIELD.size:
                raise ValueError(f"truncated field at byte {offset}")
            kind, length = _FIELD.unpack_from(encoded, offset)
            offset += _FIELD.size
            if len(encoded) - offset < length:
                left = len(encoded) - offset
                raise ValueError(f"field {kind} at byte {offset}: {length} bytes announced, {left} left")
            values.setdefault(kind, []).append(encoded[offset : offset + length])
            offset += length
        return cls(
            certificate=_single(values, _CERTIFICATE),
            stream_port=int.from_bytes(_single(values, _PORT, 2), "big"),
            host_name=_single(values, _HOST_NAME).decode() if _HOST_NAME in values else "",
            addresses=tuple(_address(value) for value in values.get(_ADDRESS, [])),
            engines=tuple(value.decode() for value in values.get(_ENGINE, [])),
            redirects=tuple(value.decode() for value in values.get(_REDIRECT, [])),
        )


def _single(values: dict[int, list[bytes]], kind: int, size: int | None = None) -> bytes:
    found = values.get(kind, [])
    if len(found) != 1 or (size is not None and len(found[0]) != size):
        raise ValueError(f"field {kind}: expected once" + (f", with {size} bytes" if size else ""))
    return found[0]


def _address(packed: bytes) -> IPv4Address | IPv6Address:
    if len(packed) not in (4, 16):
        raise ValueError(f"address of {len(packed)} bytes")
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
