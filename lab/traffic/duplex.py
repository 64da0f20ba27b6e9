# SPDX-License-Identifier: MIT
"""Both directions at once, pseudo-random and checked byte by byte.

The client opens with a header that says what both sides send: seed, bytes each way (0: until
told to stop) and the server's pace. Each side sends its pattern, then a trailer with the
length, then FIN; so loss at the very end is found too.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

from lab.traffic.pattern import Corruption, Pattern
from lab.traffic.session import NEVER, Session, piece_bytes

_HEADER = struct.Struct("!4sQQQQ")
_TRAILER = struct.Struct("!8sQ")
_MAGIC = b"DPX1"
_TRAILER_MAGIC = b"\xffTRAILER"
_WRITE_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Terms:
    """What is sent. Lengths in bytes, 0 for endless; paces in bytes a second, 0 for unlimited."""

    seed: int
    client_bytes: int = 0
    server_bytes: int = 0
    server_pace: int = 0


class Duplex(Session):
    """Either side; `open_client` makes the client's."""

    kind = "duplex"

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.client = False
        self.terms: Terms | None = None
        self.pace = 0
        self.length: int | None = None  # of our own pattern, when it is known
        self.held = b""  # received, but perhaps the header or the trailer
        self.checked = 0
        self.fin_sent = False
        self.fin_received = False
        self._next_write = 0.0
        # Write sizes need not be the same after a hand-over.
        self._sizes = random.Random()  # noqa: S311

    @classmethod
    def open_client(cls, connection: socket.socket, terms: Terms, pace: int = 0) -> Duplex:
        """The client's side of a new connection; sends the header. ``pace`` in bytes a second."""
        connection.setblocking(True)
        connection.sendall(
            _HEADER.pack(_MAGIC, terms.seed, terms.client_bytes, terms.server_bytes, terms.server_pace)
        )
        session = cls(connection)
        session.client, session.pace = True, pace
        session._agree(terms)
        return session

    def _agree(self, terms: Terms) -> None:
        self.terms = terms
        self._sizes.seed(f"{terms.seed}/{self.client}")
        self.length = (terms.client_bytes if self.client else terms.server_bytes) or self.length
        self.pace = self.pace if self.client else terms.server_pace

    @property
    def _outgoing(self) -> Pattern:
        assert self.terms is not None
        return Pattern(self.terms.seed, "client" if self.client else "server")

    @property
    def _incoming(self) -> Pattern:
        assert self.terms is not None
        return Pattern(self.terms.seed, "server" if self.client else "client")

    def stop(self) -> None:
        """Send no more of the pattern."""
        if self.length is None:
            self.length = self.sent

    def write_at(self) -> float:
        if self.terms is None or self.fin_sent:
            return NEVER
        return self._next_write

    def writable(self, now: float) -> None:
        wanted = int(piece_bytes(_WRITE_BYTES_MAX, self.pace) ** self._sizes.uniform(0, 1))
        if self.length is None or self.sent < self.length:
            left = wanted if self.length is None else min(wanted, self.length - self.sent)
            data = self._outgoing.read(self.sent, left)
        else:
            data = _TRAILER.pack(_TRAILER_MAGIC, self.length)[self.sent - self.length :]
        if data:
            count = self.connection.send(data)
            self.sent += count
            if self.pace:
                self._next_write = max(self._next_write, now - 0.05) + count / self.pace
        if self.length is not None and self.sent == self.length + _TRAILER.size:
            self.connection.shutdown(socket.SHUT_WR)
            self.fin_sent = True
            self.finished = self.fin_received

    def readable(self) -> None:
        data = self.connection.recv(1 << 18)
        self.received += len(data)
        self.held += data
        if self.terms is None and len(self.held) >= _HEADER.size:
            magic, *values = _HEADER.unpack_from(self.held)
            if magic != _MAGIC:
                raise Corruption(f"the stream does not begin with a header: {self.held[:16]!r}")
            self.held = self.held[_HEADER.size :]
            self._agree(Terms(*values))
        if self.terms is not None:
            certain = len(self.held) - _TRAILER.size
            if certain > 0:
                self._incoming.check(self.checked, self.held[:certain])
                self.checked += certain
                self.held = self.held[certain:]
        if not data:
            self.reading = False
            self._end()

    def _end(self) -> None:
        expected = _TRAILER.pack(_TRAILER_MAGIC, self.checked)
        if self.held != expected:
            raise Corruption(
                f"the stream ended after {self.received} bytes without its trailer; "
                f"the last are {self.held.hex()}, not {expected.hex()}"
            )
        assert self.terms is not None
        promised = self.terms.server_bytes if self.client else self.terms.client_bytes
        if promised and self.checked != promised:
            raise Corruption(f"the stream ended after {self.checked} bytes of {promised}")
        self.fin_received = True
        self.stop()
        self.finished = self.fin_sent

    def _state(self) -> dict[str, Any]:
        return {
            "terms": asdict(self.terms) if self.terms else None,
            "client": self.client,
            "length": self.length,
            "pace": self.pace,
            "held": self.held.hex(),
            "checked": self.checked,
            "fin_sent": self.fin_sent,
            "fin_received": self.fin_received,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.client, self.length, self.pace = state["client"], state["length"], state["pace"]
        self.held, self.checked = bytes.fromhex(state["held"]), state["checked"]
        self.fin_sent, self.fin_received = state["fin_sent"], state["fin_received"]
        if state["terms"]:
            self._agree(Terms(**state["terms"]))
        self._next_write = time.monotonic()
        self.reading = not self.fin_received
        self.finished = self.fin_sent and self.fin_received
