# SPDX-License-Identifier: MIT
"""Netlink messages that make small nftables tables, without the program nft, which takes 20 ms to begin.

Numbers and attributes are those of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from sockmi.redirect.nftset import INET

PREROUTING, OUTPUT = 0, 3  # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT
OWNED = 2  # NFT_TABLE_F_OWNER
DROP = 0  # NF_DROP
_NETLINK_NETFILTER, _NFNL_SUBSYS_NFTABLES = 12, 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _DELRULE = (
    _NFNL_SUBSYS_NFTABLES << 8 | one for one in (0, 2, 3, 6, 8)
)
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_APPEND = 0x1, 0x4, 0x400, 0x800
_VERDICT, _REGISTER = 0, 1
_META_MARK, _META_L4PROTO = 3, 16
_TRANSPORT_HEADER, _FLAGS_AT, _RST = 2, 13, b"\x04"
_EQUAL, _UNLIKE = 0, 1


def new_table(name: str, flags: int = 0) -> bytes:
    """Of family inet; it may be there, with the same flags. The kernel answers."""
    return _message(_NEWTABLE, _NLM_F_CREATE | _NLM_F_ACK, _text(1, name), _number(2, flags))


def delete_table(name: str) -> bytes:
    """The inverse of ``new_table``; the kernel refuses if it is not there."""
    return _message(_DELTABLE, 0, _text(1, name))


def new_chain(table: str, name: str, hook: int, priority: int) -> bytes:
    """A base chain of type filter."""
    hooked = _nest(4, _number(1, hook), _number(2, priority))
    return _message(_NEWCHAIN, _NLM_F_CREATE, _text(1, table), _text(3, name), hooked, _text(7, "filter"))


def flush_chain(table: str, name: str) -> bytes:
    """Remove its rules, if it has any."""
    return _message(_DELRULE, 0, _text(1, table), _text(2, name))


def new_rule(table: str, chain: str, *expressions: bytes) -> bytes:
    """At the chain's end."""
    rule = _nest(4, *expressions)
    return _message(_NEWRULE, _NLM_F_CREATE | _NLM_F_APPEND, _text(1, table), _text(2, chain), rule)


def is_rst() -> list[bytes]:
    """meta l4proto tcp, tcp flags & rst != 0"""
    header = _number(2, _TRANSPORT_HEADER), _number(3, _FLAGS_AT), _number(4, 1)
    mask, none = _nest(4, _attr(1, _RST)), _nest(5, _attr(1, b"\0"))
    return [
        _expression("meta", _number(1, _REGISTER), _number(2, _META_L4PROTO)),
        _compare(_EQUAL, b"\x06"),
        _expression("payload", _number(1, _REGISTER), *header),
        _expression("bitwise", _number(1, _REGISTER), _number(2, _REGISTER), _number(3, 1), mask, none),
        _compare(_UNLIKE, b"\0"),
    ]


def is_marked(mark: int) -> list[bytes]:
    """meta mark == mark"""
    return [
        _expression("meta", _number(1, _REGISTER), _number(2, _META_MARK)),
        _compare(_EQUAL, struct.pack("=I", mark)),
    ]


def set_mark(mark: int) -> list[bytes]:
    """meta mark set mark"""
    value = _nest(2, _attr(1, struct.pack("=I", mark)))
    return [
        _expression("immediate", _number(1, _REGISTER), value),
        _expression("meta", _number(2, _META_MARK), _number(3, _REGISTER)),
    ]


def drop() -> list[bytes]:
    """drop"""
    return [_expression("immediate", _number(1, _VERDICT), _nest(2, _nest(2, _number(1, DROP))))]


def transaction(messages: Iterable[bytes]) -> bytes:
    """All of them, or nothing."""
    begin, end = (
        _message(one, 0, family=0, resource=_NFNL_SUBSYS_NFTABLES) for one in (_BATCH_BEGIN, _BATCH_END)
    )
    return begin + b"".join(messages) + end


def send(one: bytes) -> None:
    """Have the kernel carry out a transaction, if it will: nothing depends on it."""
    with opened() as sock:
        sock.send(one)


def opened() -> socket.socket:
    """A netlink socket for transactions, in the caller's network namespace."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *attributes))


def _compare(how: int, value: bytes) -> bytes:
    return _expression("cmp", _number(1, _REGISTER), _number(2, how), _nest(3, _attr(1, value)))


def _message(kind: int, flags: int, *attributes: bytes, family: int = INET, resource: int = 0) -> bytes:
    body = struct.pack("!BBH", family, 0, resource) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | flags, 0, 0) + body


def _attr(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _nest(kind: int, *attributes: bytes) -> bytes:
    return _attr(0x8000 | kind, b"".join(attributes))


def _text(kind: int, text: str) -> bytes:
    return _attr(kind, text.encode() + b"\0")


def _number(kind: int, number: int) -> bytes:
    return _attr(kind, struct.pack("!i", number))
