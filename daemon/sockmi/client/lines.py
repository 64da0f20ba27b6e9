# SPDX-License-Identifier: MIT
"""Lines and descriptors on the control socket, without the waiting."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from sockmi.client.errors import BrokenLink, SockMiError, strange

LINE_BYTES_MAX = 1 << 20
DESCRIPTORS_MAX = 253


class Lines:
    """Received bytes and descriptors, cut into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._searched = 0
        self._fds: deque[int] = deque()

    def receive(self, connection: socket.socket) -> None:
        """Read what is there; raises BlockingIOError, or SockMiError at the end."""
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, flags, _unused = connection.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            raise BrokenLink from None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise SockMiError(errno.EMFILE, "Not all descriptors that the daemon sent could be received.")
        if not data:
            raise BrokenLink
        self._bytes += data

    def next(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, None if it is not yet complete."""
        end = self._bytes.find(b"\n", self._searched)
        if (len(self._bytes) if end < 0 else end) >= LINE_BYTES_MAX:
            raise strange("it is longer than a line may be")
        if end < 0:
            self._searched = len(self._bytes)
            return None
        line = bytes(self._bytes[:end])
        del self._bytes[: end + 1]
        self._searched = 0
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise strange("it is no JSON object")
        count = message.get("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise strange(f"it says {count!r} descriptors, {len(self._fds)} came")
        return message, [self._fds.popleft() for _turn in range(count)]

    def close(self) -> None:
        """Close descriptors that nobody took."""
        while self._fds:
            os.close(self._fds.popleft())


def encode(message: dict[str, Any], fds: Sequence[int]) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """Line and ancillary data of a message. Raises SockMiError (EMSGSIZE)."""
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise SockMiError(errno.EMSGSIZE, "The request is longer than a line of the control socket may be.")
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())
    return line, [rights] if fds else []
