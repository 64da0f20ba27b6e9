# SPDX-License-Identifier: MIT
"""What this host cannot restore, found out before anything is frozen: tried with a socket, closed again.

What is not known before the image is here, or changes until then, is found when the copy is made.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Needs, Placement
from sockmi.engine.preflight import syn_offered
from sockmi.refusal import Code, Refusal

_TCP_REPAIR, _TCP_TIMESTAMP = 19, 24
_SO_REUSEPORT = 15
_TRANSPARENT = {4: (socket.IPPROTO_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}
_UNIT = Refusal(
    Code.TIMESTAMP_UNIT,
    "the connection's timestamps have a unit (ms or us) that the importer's kernel or route does not offer; "
    "make the route feature tcp_usec_ts equal on both hosts, or move it to another one",
)

_URGENT = Refusal(
    Code.URGENT_DATA,
    "urgent data, or the mark of it, is in the receive queue, and the importer's engine, repair, cannot "
    "carry it; try again when the application has read it, or load the kernel module there",
)


@functools.cache
def _kernel_counts_us() -> bool:
    """Linux 6.7 and later."""
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP, 1)
        return syn_offered(sock.fileno())[1]


def obstacle(
    needs: Needs, state: str, placement: Placement, remote: Endpoint | None, *, carries_urgent: bool = True
) -> Refusal | None:
    """Why this host could not make a copy at ``placement``; None as far as it can be known.

    ``carries_urgent``: the engine's.
    """
    if needs.urgent and not carries_urgent:
        return _URGENT
    if placement.local is None:
        return None  # the kernel will choose: nothing to try
    if remote is None:
        return _bind(needs, placement)
    if needs.timestamp_us and not _kernel_counts_us():
        return _UNIT
    return _syn(needs, placement, remote) if state == "SYN-SENT" else None


def _named(sock: socket.socket, placement: Placement, port: int) -> None:
    """Bind, as the engine does."""
    assert placement.local is not None
    if placement.transparent:
        sock.setsockopt(*_TRANSPARENT[placement.local.address.version], 1)
    sock.bind((str(placement.local.address), port))


def _socket(placement: Placement) -> Any:
    assert placement.local is not None
    return socket.socket(socket.AF_INET if placement.local.address.version == 4 else socket.AF_INET6)


def _bind(needs: Needs, placement: Placement) -> Refusal | None:
    local = placement.local
    if local is None or not local.port or needs.bind_flags & BindFlag.DEVICE:
        return None
    with _socket(placement) as sock:
        for flag, level, option in (
            (BindFlag.REUSE_ADDRESS, socket.SOL_SOCKET, socket.SO_REUSEADDR),
            (BindFlag.REUSE_PORT, socket.SOL_SOCKET, _SO_REUSEPORT),
        ):
            sock.setsockopt(level, option, int(bool(needs.bind_flags & flag)))
        if sock.family == socket.AF_INET6:
            only = int(bool(needs.bind_flags & BindFlag.V6_ONLY))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        try:
            _named(sock, placement, local.port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"{local} is in use at the importer; free it there, or move it to another host"
                return Refusal(Code.PORT_TAKEN, message)
    return None


def _syn(needs: Needs, placement: Placement, remote: Endpoint) -> Refusal | None:
    """The copy has to offer what has been offered. Connecting in repair sends nothing and keeps no port."""
    with _socket(placement) as sock, contextlib.suppress(OSError):
        scale, _unused = syn_offered(sock.fileno())
        if scale < needs.window_scale:
            return Refusal(
                Code.WINDOW_SCALE,
                f"its SYN has offered window scale {needs.window_scale}, and the importer's would be "
                f"{scale}; make net.ipv4.tcp_rmem and net.core.rmem_max equal, or move it to another host",
            )
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        _named(sock, placement, 0)
        sock.connect((str(remote.address), remote.port))
        if syn_offered(sock.fileno())[1] != needs.timestamp_us:
            return _UNIT
    return None
