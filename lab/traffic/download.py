# SPDX-License-Identifier: MIT
"""A small HTTP/1.1 server of one long, paced download that can be handed over in mid-response.

``GET /download?bytes=N&pace=BYTES_PER_S&seed=S`` answers with N bytes of `Pattern` (seed, "download"),
whose SHA-256 is `Pattern.sha256`.
"""

from __future__ import annotations

import socket
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lab.traffic.pattern import Pattern
from lab.traffic.session import NEVER, Buffered, piece_bytes

HEAD_BYTES_MAX = 8192
PIECE_BYTES = 16384


class Download(Buffered):
    """The server's side."""

    kind = "download"

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.seed = 0
        self.length = 0
        self.offset = 0
        self.pace = 0
        self.answering = False
        self._next_write = 0.0

    def readable(self) -> None:
        if not self._receive():
            # A client that goes away, or that has no more to ask: finish what it asked for.
            if not self.answering:
                self.finished = True
            self.ending = True
        elif not self.answering:
            head, end, _unused = self.incoming.partition(b"\r\n\r\n")
            if end:
                self.incoming = b""
                self._begin(head.decode("latin-1"))
            elif len(self.incoming) > HEAD_BYTES_MAX:
                self._answer("431 Request Header Fields Too Large")
        else:
            self.incoming = b""

    def _begin(self, head: str) -> None:
        method, _unused, rest = head.partition(" ")
        target = urlsplit(rest.partition(" ")[0])
        if method != "GET":
            self._answer("405 Method Not Allowed", "Allow: GET\r\n")
            return
        if target.path != "/download":
            self._answer("404 Not Found")
            return
        query = parse_qs(target.query)
        try:
            length, pace, seed = (int(query.get(key, ["0"])[0]) for key in ("bytes", "pace", "seed"))
        except ValueError:
            length = pace = seed = -1
        if min(length, pace, seed) < 0:
            self._answer("400 Bad Request")
            return
        self.length, self.pace, self.seed = length, pace, seed
        self._answer("200 OK", "Content-Type: application/octet-stream\r\n", length)

    def _answer(self, status: str, fields: str = "", length: int = 0) -> None:
        head = f"HTTP/1.1 {status}\r\n{fields}Content-Length: {length}\r\nConnection: close\r\n\r\n"
        self.outgoing += head.encode()
        self.answering = True

    def write_at(self) -> float:
        if not self.answering:
            return NEVER
        return 0.0 if self.outgoing else self._next_write

    def writable(self, now: float) -> None:
        if self.outgoing:
            self._flush()
        elif self.offset < self.length:
            count = min(piece_bytes(PIECE_BYTES, self.pace), self.length - self.offset)
            piece = Pattern(self.seed, "download").read(self.offset, count)
            count = self.connection.send(piece)
            self.offset += count
            self.sent += count
            if self.pace:
                self._next_write = max(self._next_write, now - 0.05) + count / self.pace
        self.finished = not self.outgoing and self.offset == self.length

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            key: getattr(self, key) for key in ("seed", "length", "offset", "pace", "answering")
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        for key in ("seed", "length", "offset", "pace", "answering"):
            setattr(self, key, state[key])
        self._next_write = time.monotonic()
