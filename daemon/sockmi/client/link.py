# SPDX-License-Identifier: MIT
"""A connection to the daemon, as coroutines: how it waits is left to its subclasses."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from sockmi.client.errors import BrokenLink, SockMiError, check, silent
from sockmi.client.lines import Lines, encode

CONTROL_PATH = "/run/sockmi/control.sock"
RECONNECT_PAUSE_S = 0.05

_GRACE_S = 2.0  # how much later than asked the daemon may answer
_HUNG_UP_S = 3.0  # how long to wait for its last word


class Link(ABC):
    """A connection to the daemon; an asynchronous context manager.

    Closing it cancels what is under way on it. ``interrupted``: by what a firm wait was; it is hung up.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pid = os.getpid()
        self._lines = Lines()
        self._deadline: float | None = None
        self.interrupted: BaseException | None = None

    @classmethod
    async def open(cls, control: str | os.PathLike[str] | None, timeout_s: float | None = None) -> Self:
        """Connect. Raises SockMiError (ENOENT, ECONNREFUSED, EACCES ...)."""
        path = os.fspath(control) if control else os.environ.get("SOCKMI_CONTROL") or CONTROL_PATH
        link = cls(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        link.allow(timeout_s)
        try:
            while True:
                try:
                    link._connection.connect(path)
                    return link
                except BlockingIOError:  # its backlog is full
                    if link._left_s() == 0:
                        raise silent() from None
                    await cls.pause(RECONNECT_PAUSE_S)
                except OSError as error:
                    why = f"{path}: {error.strerror or error}"
                    raise SockMiError(
                        error.errno or errno.EIO, f"{why}. Is the SockMi daemon running, and may you use it?"
                    ) from None
        except BaseException:
            link.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, whatever children by fork(2) have of it."""
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._lines.close()

    def allow(self, timeout_s: float | None) -> None:
        """From now on wait ``timeout_s`` (and a little), None for ever."""
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s + _GRACE_S

    async def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send this message with these descriptors."""
        line, rights = encode(message, fds)
        sent = 0
        while sent < len(line):
            try:
                sent += self._connection.sendmsg([line[sent:]], [] if sent else rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._ready(writing=True)
            except ConnectionError:
                raise BrokenLink from None
            except OSError as error:
                raise SockMiError(
                    error.errno or errno.EIO, f"sending to the SockMi daemon: {error}"
                ) from None

    async def receive(self, firm: bool = False) -> tuple[dict[str, Any], list[int]]:
        """Receive a message and its descriptors.

        ``firm``: what is answered must not be lost. An interrupt (cancellation, Ctrl-C) makes the daemon end
        the request then, if it is not done: its answer, or the end of the connection, still says which.
        """
        if firm:
            self._deadline = None
        while (message := self._lines.next()) is None:
            try:
                self._lines.receive(self._connection)
            except BlockingIOError:
                try:
                    await self._ready(writing=False)
                except (Exception, GeneratorExit):
                    raise
                except BaseException as interrupt:
                    if not firm:
                        raise
                    self._hang_up(interrupt)
        return message

    def _hang_up(self, interrupt: BaseException) -> None:
        if self.interrupted is None:
            self.interrupted = interrupt
            self.allow(_HUNG_UP_S)
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)

    async def answer(self) -> dict[str, Any]:
        """A line of a response without descriptors. Raises SockMiError for an error response."""
        answer, fds = await self.receive()
        for fd in fds:
            os.close(fd)
        check(answer)
        return answer

    def _left_s(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    @staticmethod
    @abstractmethod
    async def pause(seconds: float) -> None:
        """Sleep."""

    @abstractmethod
    async def _ready(self, writing: bool) -> None:
        """Wait until the connection can be read or written. Raises `silent` after the deadline."""
