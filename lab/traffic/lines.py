# SPDX-License-Identifier: MIT
"""A line-by-line service with a state per connection: who it is, and how many lines it sent.

``NAME alice`` is answered by ``hello alice``; every other line by ``alice COUNT LINE``;
``QUIT`` by ``bye alice COUNT`` and the end.
"""

from __future__ import annotations

import socket
from typing import Any

from lab.traffic.session import NEVER, Buffered

LINE_BYTES_MAX = 4096


class Lines(Buffered):
    """The server's side."""

    kind = "lines"

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.name = ""
        self.count = 0

    def readable(self) -> None:
        if not self._receive():
            self.ending = True
            self.finished = not self.outgoing
        while b"\n" in self.incoming and not self.ending:
            line, self.incoming = self.incoming.split(b"\n", 1)
            self.outgoing += self._answer(line.decode(errors="replace")).encode() + b"\n"
        if len(self.incoming) > LINE_BYTES_MAX:
            self.outgoing += b"error: this line is too long\n"
            self.incoming, self.ending = b"", True

    def _answer(self, line: str) -> str:
        word, _unused, rest = line.partition(" ")
        if word == "NAME" and rest:
            self.name = rest
            return f"hello {rest}"
        if not self.name:
            return "error: begin with NAME and your name"
        if line == "QUIT":
            self.ending = True
            return f"bye {self.name} {self.count}"
        self.count += 1
        return f"{self.name} {self.count} {line}"

    def write_at(self) -> float:
        return 0.0 if self.outgoing else NEVER

    def writable(self, now: float) -> None:
        self._flush()
        self.finished = self.ending and not self.outgoing

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"name": self.name, "count": self.count}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.name, self.count = state["name"], state["count"]
