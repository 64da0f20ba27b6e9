# SPDX-License-Identifier: MIT
"""Promised ports: who can share one with whom is what the kernel says of real sockets."""

from __future__ import annotations

import itertools
import socket
from contextlib import ExitStack
from dataclasses import replace

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Kind, Needs
from sockmi.ports import Ports
from sockmi.protocol.records import Item

ADDRESSES = ["0.0.0.0", "127.0.0.1", "127.0.0.2", "::", "::1", "::ffff:127.0.0.1"]  # noqa: S104
SHARING = [BindFlag(0), BindFlag.REUSE_ADDRESS, BindFlag.REUSE_PORT]
SO_REUSEPORT = 15


def item(number: int, address: str, flags: BindFlag, kind: Kind, port: int = 80) -> Item:
    """A socket that is to move."""
    identifier = number.to_bytes(16, "big")
    local = Endpoint.parse(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
    needs = Needs(bind_flags=flags)
    return Item(identifier, identifier, kind, "", local, None, local, 1, bytes(16), needs)


def bound(address: str, flags: BindFlag, port: int) -> socket.socket:
    """A real one."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(bool(flags & BindFlag.REUSE_ADDRESS)))
    sock.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, int(bool(flags & BindFlag.REUSE_PORT)))
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(flags & BindFlag.V6_ONLY)))
    sock.bind((address, port))
    return sock


def kernel_lets_both(one: Item, other: Item) -> bool:
    """Whether both can be, whichever comes first. Somebody else may have a port: three are tried."""
    return all(any(_lets_follow(*pair) for _try in range(3)) for pair in ((one, other), (other, one)))


def _lets_follow(first: Item, second: Item) -> bool:
    port = 0
    with ExitStack() as stack:
        for each in (first, second):
            assert each.local is not None
            try:
                sock = stack.enter_context(bound(str(each.local.address), each.needs.bind_flags, port))
                if each.kind is Kind.LISTENING:
                    sock.listen()
            except OSError:
                return False
            port = sock.getsockname()[1]
        return True


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ADDRESSES, repeat=2)))
def test_as_the_kernel_does(first: str, second: str) -> None:
    """Every pair of addresses, ways of sharing, and kinds."""
    kinds = [(Kind.BOUND, Kind.BOUND), (Kind.LISTENING, Kind.BOUND), (Kind.LISTENING, Kind.LISTENING)]
    only = [BindFlag(0), BindFlag.V6_ONLY]
    for one, other, (here, there), v6_only in itertools.product(SHARING, SHARING, kinds, only):
        if v6_only and not {first, second} & {"::", "::1"}:
            continue
        pair = [
            item(number, address, flags | (v6_only if address in ("::", "::1") else BindFlag(0)), kind)
            for number, (address, flags, kind) in enumerate(((first, one, here), (second, other, there)))
        ]
        ports = Ports()
        ports.keep(pair[0])
        assert ports.taken(pair[1]) is not kernel_lets_both(*pair), pair


def test_kept_until_forgotten() -> None:
    """Only of sockets that are not connected, and only from others."""
    ports = Ports()
    mine, other = (item(number, "::", BindFlag(0), Kind.LISTENING) for number in (1, 2))
    ports.keep(mine)
    assert ports.taken(other) and not ports.taken(mine)
    assert not ports.taken(item(3, "::", BindFlag(0), Kind.LISTENING, port=81))
    ports.forget(other.migration)
    assert ports.taken(other)
    ports.forget(mine.migration)
    assert not ports.taken(other)
    ports.keep(replace(mine, kind=Kind.CONNECTED))
    ports.keep(replace(mine, local=None))
    assert not ports.taken(other)


def test_devices_are_left_to_the_kernel() -> None:
    """Which ones is not known."""
    ports = Ports()
    ports.keep(item(1, "::", BindFlag.DEVICE, Kind.LISTENING))
    assert not ports.taken(item(2, "::", BindFlag(0), Kind.LISTENING))
