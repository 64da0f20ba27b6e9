# SPDX-License-Identifier: MIT
"""Joins a connection to this program's standard input and output, for `sockmi import` without --exec."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys

_BYTES = 65536


def relay(connection: socket.socket) -> None:
    """Copy both ways until the peer has ended; the end of the input is passed on as a FIN.

    Raises OSError if the connection breaks, BrokenPipeError if nobody reads the output.
    """
    connection.setblocking(True)
    source: int | None = sys.stdin.fileno()
    target = sys.stdout.fileno()
    while True:
        watched: list[int | socket.socket] = [connection] if source is None else [connection, source]
        ready, _unused, _unused = select.select(watched, [], [])
        if connection in ready:
            content = connection.recv(_BYTES)
            if not content:
                return
            while content:
                content = content[os.write(target, content) :]
        if source is not None and source in ready:
            content = os.read(source, _BYTES)
            if content:
                connection.sendall(content)
            else:
                source = None
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
