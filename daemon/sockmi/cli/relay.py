# SPDX-License-Identifier: MIT
"""Joins a connection to this program's standard input and output, for `sockmi import` without --exec."""

from __future__ import annotations

import contextlib
import os
import select
import socket

_BYTES = 65536
_WRITTEN = 4096  # so much goes into a pipe that poll(2) calls writable, without waiting: PIPE_BUF


def relay(connection: socket.socket, source: int, target: int) -> None:
    """Copy both ways until the peer has ended; the end of the input is passed on as a FIN.

    Neither way waits for the other: a peer, or a program behind the pipes, may send before it reads on.
    Raises OSError if the connection breaks, BrokenPipeError if nobody reads the output.
    """
    connection.setblocking(False)
    arrived = going = b""
    more_comes = more_goes = True
    broken: OSError | None = None  # told when all that has come is delivered
    while more_comes or arrived or going:
        readable: list[int] = []
        writable: list[int] = []
        if more_comes and not arrived:
            readable.append(connection.fileno())
        if more_comes and more_goes and not going:
            readable.append(source)
        if going:
            writable.append(connection.fileno())
        if arrived:
            writable.append(target)
        readable, writable, _unused = select.select(readable, writable, [])
        if connection.fileno() in readable:
            arrived = connection.recv(_BYTES)
            more_comes = bool(arrived)
        if target in writable:
            arrived = arrived[os.write(target, arrived[:_WRITTEN]) :]
        if connection.fileno() in writable:
            try:
                going = going[connection.send(going) :]
            except OSError as error:
                broken, going, more_comes = error, b"", False
        if source in readable:
            going = os.read(source, _BYTES)
            if not going:
                more_goes = False
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
    if broken is not None:
        raise broken
