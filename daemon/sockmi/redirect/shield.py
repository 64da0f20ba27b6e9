# SPDX-License-Identifier: MIT
"""A table that drops every RST, in and out: for the moment in which our tables are gone.

A peer's packet that meets neither a socket nor our rules is answered by RST, which ends a connection that
lives elsewhere. One netlink message is there 20 ms before the program nft has begun.
"""

from __future__ import annotations

import socket
import struct

from sockmi.redirect.nftset import INET

_NFNL_SUBSYS_NFTABLES = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = (_NFNL_SUBSYS_NFTABLES << 8 | one for one in (0, 2, 3, 6))
_NLM_F_REQUEST, _NLM_F_CREATE, _NLM_F_APPEND = 0x1, 0x400, 0x800
_HOOKS = {"in": 0, "out": 3}  # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT
_PRIORITY = -400  # NF_IP_PRI_CONNTRACK_DEFRAG: before whatever could let it pass
_RST = b"\x04"
_FLAGS_AT = 13  # of the TCP header


def raised(table: str) -> bytes:
    """The transaction that makes it; it may be there."""
    name = _text(1, _name(table))
    messages = [_message(_NEWTABLE, _NLM_F_CREATE, name)]
    for chain, hook in _HOOKS.items():
        hooked = _nest(4, _number(1, hook), _number(2, _PRIORITY))
        messages.append(_message(_NEWCHAIN, _NLM_F_CREATE, name, _text(3, chain), hooked, _text(7, "filter")))
        rule = _nest(4, *_expressions())
        messages.append(_message(_NEWRULE, _NLM_F_CREATE | _NLM_F_APPEND, name, _text(2, chain), rule))
    return _transaction(messages)


def lowered(table: str) -> bytes:
    """The transaction that removes it; the kernel refuses if it is not there."""
    return _transaction([_message(_DELTABLE, 0, _text(1, _name(table)))])


def send(transaction: bytes) -> None:
    """Have the kernel carry it out, if it will: nothing depends on it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12) as sock:
        sock.send(transaction)


def _name(table: str) -> str:
    return f"{table}_shield"


def _expressions() -> list[bytes]:
    """meta l4proto tcp, tcp flags & rst != 0: drop."""
    register, verdict = 1, 0
    mask, none = _nest(4, _attr(1, _RST)), _nest(5, _attr(1, b"\0"))
    return [
        _expression("meta", _number(1, register), _number(2, 16)),  # NFT_META_L4PROTO
        _expression("cmp", _number(1, register), _number(2, 0), _nest(3, _attr(1, b"\x06"))),
        # NFT_PAYLOAD_TRANSPORT_HEADER
        _expression("payload", _number(1, register), _number(2, 2), _number(3, _FLAGS_AT), _number(4, 1)),
        _expression("bitwise", _number(1, register), _number(2, register), _number(3, 1), mask, none),
        _expression("cmp", _number(1, register), _number(2, 1), _nest(3, _attr(1, b"\0"))),
        _expression("immediate", _number(1, verdict), _nest(2, _nest(2, _number(1, 0)))),  # NF_DROP
    ]


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *attributes))


def _transaction(messages: list[bytes]) -> bytes:
    ends = (_message(one, 0, family=0, resource=_NFNL_SUBSYS_NFTABLES) for one in (_BATCH_BEGIN, _BATCH_END))
    begin, end = ends
    return begin + b"".join(messages) + end


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
