# SPDX-License-Identifier: MIT
"""One connection as a server or client sees it: a state that can be handed to another process."""

from __future__ import annotations

import errno
import json
import socket
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

NEVER = float("inf")
SEGMENT_BYTES = 1400

MOVED = frozenset({errno.ECONNABORTED, errno.ENOTCONN})
"""What calls on a descriptor fail with when its connection was taken to another host.

A peer that resets the connection gives ECONNRESET or EPIPE instead.
"""


def piece_bytes(largest: int, pace: int) -> int:
    """How much to write at once: at a pace in bytes a second, for 5 ms, or a segment if that is more."""
    return min(largest, max(SEGMENT_BYTES, pace // 200)) if pace else largest


class Session(ABC):
    """The state of one connection; does non-blocking I/O when it is told that it can.

    ``context()`` says all that another process needs, with the socket, to go on. It is exact
    at any moment between two calls of `readable` and `writable`, also if one of them raised.
    """

    kind: ClassVar[str]

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.finished = False
        self.reading = True  # until the end of the peer's stream
        self.sent = 0
        self.received = 0

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self.connection.fileno()

    def close(self) -> None:
        """Close the descriptor."""
        self.connection.close()

    @abstractmethod
    def readable(self) -> None:
        """There is something to read, or the end."""

    @abstractmethod
    def writable(self, now: float) -> None:
        """The socket takes bytes, and it is ``write_at()`` (monotonic seconds) or later."""

    @abstractmethod
    def write_at(self) -> float:
        """When this side wants to write next, monotonic seconds: 0 at once, NEVER."""

    def stop(self) -> None:  # noqa: B027 - most sessions end by themselves
        """Come to an end soon, in an orderly way."""

    def context(self) -> bytes:
        """The state, as opaque bytes."""
        own = {"kind": self.kind, "sent": self.sent, "received": self.received}
        return json.dumps(own | self._state()).encode()

    @classmethod
    def resume(cls, connection: socket.socket, context: bytes) -> Self:
        """A session that goes on where ``context`` was taken; ValueError if it is of another kind."""
        state = json.loads(context)
        if state.pop("kind") != cls.kind:
            raise ValueError(f"this context is not of a {cls.kind} session: {context[:80]!r}")
        session = cls(connection)
        session.sent, session.received = state.pop("sent"), state.pop("received")
        session._restore(state)
        return session

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What this kind adds to the context."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """The inverse of ``_state``."""


class Buffered(Session):
    """A session whose unsent and unparsed bytes are small enough to be kept in buffers."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.incoming = b""
        self.outgoing = b""
        self.ending = False

    def _flush(self) -> None:
        if self.outgoing:
            count = self.connection.send(self.outgoing)
            self.outgoing = self.outgoing[count:]
            self.sent += count

    def _receive(self) -> bool:
        """Read into ``incoming``; False at the end of the stream."""
        data = self.connection.recv(1 << 16)
        self.incoming += data
        self.received += len(data)
        self.reading = bool(data)
        return self.reading

    def _state(self) -> dict[str, Any]:
        return {"incoming": self.incoming.hex(), "outgoing": self.outgoing.hex(), "ending": self.ending}

    def _restore(self, state: dict[str, Any]) -> None:
        self.incoming, self.outgoing = bytes.fromhex(state["incoming"]), bytes.fromhex(state["outgoing"])
        self.ending = state["ending"]
