# SPDX-License-Identifier: MIT
"""The control socket's server: lines and descriptors in, lines and descriptors out (docs/control.md).

Plain callbacks on one event loop; nothing here knows what a request means.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_core import to_json

from sockmi import api
from sockmi.engine.closing import close_all, close_aside, too_many_aside
from sockmi.engine.files import can_wait
from sockmi.processes import no_new_process
from sockmi.refusal import Code, Refusal

_log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
_READ_BYTES = 65536
_UNSENT_BYTES_MAX = 16 << 20
_CLIENTS_MAX = 1024
_CLIENTS_OF_ALL_BUT_ROOT_MAX = 896
_CLIENTS_OF_A_USER_MAX = 256  # other than root
_ACCEPT_AGAIN_S = 0.2
_CROWDED = (
    "Files that this user has sent before are still not closed, as who serves their file system (FUSE) does "
    "not answer; end that program, and send sockets."
)


class Handler(Protocol):
    """What the daemon does with requests."""

    def request(self, client: Client, request: Any, descriptors: list[int]) -> None:
        """Handle one request; owns ``descriptors`` from now on. Refusals raised become the answer.

        What is left for later must be done under ``Client.answering``: each request has its answer.
        """

    def gone(self, client: Client) -> None:
        """The client has closed its connection, or has been disconnected."""


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of whoever has connected."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    return pid, uid, gid


class Client:
    """One connection; ``pid``, ``uid`` and ``gid`` are the kernel's word (SO_PEERCRED)."""

    def __init__(self, server: ControlServer, connection: socket.socket) -> None:
        self._server = server
        self._connection = connection
        self.pid, self.uid, self.gid = _credentials(connection)
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._unsent_bytes = 0
        self._busy = False
        self._on_read: Callable[[], object] | None = None
        self.closed = False
        connection.setblocking(False)
        server.loop.add_reader(connection, self._readable)

    @property
    def administrator(self) -> bool:
        """Whether this client may act on sockets that are not its own."""
        return bool(self.uid == 0)

    # -- out

    def respond(self, response: BaseModel | dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one line; ``descriptors`` stay the caller's (they are duplicated until they are sent).

        A dict is a response of plain values, for the hot path: it is not validated.
        """
        if isinstance(response, dict):
            line, more = to_json(response) + b"\n", response.get("more")
        else:
            line = response.model_dump_json(by_alias=True).encode() + b"\n"
            more = getattr(response, "more", False)
        self._send(line, descriptors)
        if self._busy and not more:
            self._busy = False
            if self._received:
                self._server.loop.call_soon(self._next_lines)

    def refuse(self, request_id: str | int | None, refusal: Refusal) -> None:
        """Answer that the whole request failed."""
        self.respond(api.ErrorResponse(id=request_id, error=api.Why.of(refusal)))

    @contextlib.contextmanager
    def answering(self, request: Any) -> Iterator[None]:
        """Whatever is raised inside becomes the answer to ``request``, and is not raised further."""
        try:
            yield
        except Refusal as refusal:
            self.refuse(request.id, refusal)
        except Exception as error:
            _log.exception("request %r of pid %d", request.op, self.pid)
            message = f"The daemon failed on this request ({error}); its log has the details."
            self.refuse(request.id, Refusal(Code.INTERNAL, message))

    def when_read(self, callback: Callable[[], object]) -> None:
        """Call back, later, when the client has read what it was sent; never if it is disconnected."""
        if self._unsent:
            self._on_read = callback
        elif not self.closed:
            self._server.loop.call_soon(callback)

    def _send(self, line: bytes, descriptors: Sequence[int]) -> None:
        if self.closed:
            return
        if self._unsent:
            if self._unsent_bytes + len(line) > _UNSENT_BYTES_MAX:
                _log.warning("control client pid %d does not read its answers; disconnected", self.pid)
                self.close()
                return
            self._wait(line, descriptors)
            return
        try:
            sent = self._sendmsg(line, descriptors)
        except BlockingIOError:
            self._wait(line, descriptors)
            return
        except OSError:
            self.close()
            return
        if sent < len(line):
            self._queue(memoryview(line)[sent:], [])

    def _sendmsg(self, line: bytes | memoryview, descriptors: Sequence[int]) -> int:
        if not descriptors:
            return self._connection.send(line)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        return self._connection.sendmsg([line], [rights])

    def _wait(self, line: bytes, descriptors: Sequence[int]) -> None:
        """Keep a whole line and its descriptors; who needs more than are left is disconnected."""
        kept: list[int] = []
        try:
            for one in descriptors:
                kept.append(os.dup(one))
        except OSError as error:
            _log.warning("control client pid %d: %s; disconnected", self.pid, error)
            close_all(kept)
            self.close()
            return
        self._queue(memoryview(line), kept)

    def _queue(self, line: memoryview, descriptors: list[int]) -> None:
        if not self._unsent:
            self._server.loop.add_writer(self._connection, self._writable)
        self._unsent.append((line, descriptors))
        self._unsent_bytes += len(line)

    def _writable(self) -> None:
        while self._unsent:
            line, descriptors = self._unsent[0]
            try:
                sent = self._sendmsg(line, descriptors)
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            close_all(descriptors)
            self._unsent_bytes -= sent
            if sent < len(line):
                self._unsent[0] = (line[sent:], [])
                return
            self._unsent.popleft()
        self._server.loop.remove_writer(self._connection)
        if (callback := self._on_read) is not None:
            self._on_read = None
            self._server.loop.call_soon(callback)

    # -- in

    def _readable(self) -> None:
        if not no_new_process.acquire(blocking=False):
            return  # it still is readable at the loop's next turn
        try:
            self._receive()
        finally:
            no_new_process.release()
        self._next_lines()

    def _receive(self) -> None:
        # Without room for them the kernel drops descriptors, and nobody waits for that.
        crowded = too_many_aside(self.uid)
        space = 0 if crowded else socket.CMSG_SPACE(api.DESCRIPTORS_MAX * 4)
        try:
            data, ancillary, flags, _unused = self._connection.recvmsg(
                _READ_BYTES, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) // 4 * 4])
                self._descriptors.extend(received)
                if any(can_wait(one) for one in received) and not self._replace():
                    return
        if flags & socket.MSG_CTRUNC and crowded:
            self.refuse(None, Refusal(Code.BAD_REQUEST, _CROWDED))
            self.close()
            return
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > 2 * api.DESCRIPTORS_MAX:
            self.refuse(None, Refusal(Code.BAD_REQUEST, "Too many descriptors came at once; send fewer."))
            self.close()
            return
        if not data:
            self.close()
            return
        self._received += data

    def _replace(self) -> bool:
        """In place of what may keep us waiting, what is as little of a socket; False if there is no room."""
        aside = [one for one in self._descriptors if can_wait(one)]
        kept: list[int] = []
        try:
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            kept.append(nothing)
            kept += [os.dup(nothing) for _turn in aside[1:]]
        except OSError as error:
            _log.warning("control client pid %d: %s; disconnected", self.pid, error)
            close_all(kept)
            self._descriptors = deque(one for one in self._descriptors if one not in aside)
            close_aside(aside, self.uid)
            self.close()
            return False
        places = iter(kept)
        self._descriptors = deque(next(places) if one in aside else one for one in self._descriptors)
        close_aside(aside, self.uid)
        return True

    def _next_lines(self) -> None:
        """Requests are answered one after the other, in order."""
        while not self.closed and not self._busy and (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            self._line(line)
        if self.closed or len(self._received) <= api.LINE_BYTES_MAX:
            return
        if not self._busy:
            message = f"A line is longer than {api.LINE_BYTES_MAX} bytes; split it."
            self.refuse(None, Refusal(Code.BAD_REQUEST, message))
        # While a request is under way a client has no need to send more than one other.
        self.close()

    def _line(self, line: bytes) -> None:
        try:
            request = api.parse_request(line)
        except Refusal as refusal:
            # Which descriptors belong to a line that cannot be read is unknown: start afresh.
            self.refuse(None, refusal)
            close_all(self._descriptors)
            self._descriptors.clear()
            return
        if request.fds > len(self._descriptors):
            self.refuse(request.id, Refusal(Code.BAD_REQUEST, "Fewer descriptors came than the line says."))
            self.close()
            return
        descriptors = [self._descriptors.popleft() for _turn in range(request.fds)]
        self._busy = True
        with self.answering(request):
            self._server.handler.request(self, request, descriptors)

    def close(self) -> None:
        """Disconnect; what was not yet sent is lost, its descriptors are closed."""
        if self.closed:
            return
        self.closed = True
        self._on_read = None
        self._server.loop.remove_reader(self._connection)
        self._server.loop.remove_writer(self._connection)
        self._connection.close()
        close_all(self._descriptors)
        for _unused, descriptors in self._unsent:
            close_all(descriptors)
        self._unsent.clear()
        self._server.forget(self)


class ControlServer:
    """Listens on a unix socket. A stale socket file is replaced; one that answers is an error."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: Path, mode: int, handler: Handler) -> None:
        self.loop = loop
        self.handler = handler
        self._path = path
        self._clients: set[Client] = set()
        self._of_user: Counter[int] = Counter()
        self._crowded: set[int] = set()
        self._again: asyncio.TimerHandle | None = None
        self._exhausted = False
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
                probe.connect(str(path))
                raise RuntimeError(
                    f"{path}: another daemon answers there; stop it, or choose another run_dir"
                )
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        old_mask = os.umask(0o777 & ~mode)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(old_mask)
        self._listener.listen(128)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _unused = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left: who connects waits in the backlog
            if not self._exhausted:
                _log.error("%s: nobody can be accepted now (%s); see sockmi doctor", self._path, error)
            self._exhausted = True
            self.loop.remove_reader(self._listener)
            self._again = self.loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        self._exhausted = False
        if not self._has_room(connection):
            connection.close()
            return
        client = Client(self, connection)
        self._clients.add(client)
        self._of_user[client.uid] += 1

    def _has_room(self, connection: socket.socket) -> bool:
        """Nobody takes the room of others; root, who mends what is wrong, gets in whoever is there."""
        _unused, uid, _unused = _credentials(connection)
        others = len(self._clients) - self._of_user[0]
        crowded = len(self._clients) >= _CLIENTS_MAX or (
            uid != 0
            and (self._of_user[uid] >= _CLIENTS_OF_A_USER_MAX or others >= _CLIENTS_OF_ALL_BUT_ROOT_MAX)
        )
        if crowded and uid not in self._crowded:
            count = f"{self._of_user[uid]} of {len(self._clients)} connections are user {uid}'s"
            _log.warning("%s: %s; more of that user are closed at once", self._path, count)
            self._crowded.add(uid)
        return not crowded

    def _accept_again(self) -> None:
        self._again = None
        self.loop.add_reader(self._listener, self._accept)

    def forget(self, client: Client) -> None:
        """A client has closed."""
        self._clients.discard(client)
        self._of_user[client.uid] -= 1
        if not self._of_user[client.uid]:
            del self._of_user[client.uid]
            self._crowded.discard(client.uid)
        self.handler.gone(client)

    def close(self) -> None:
        """Stop listening, disconnect everybody, remove the socket file."""
        if self._again is not None:
            self._again.cancel()
        self.loop.remove_reader(self._listener)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        for client in list(self._clients):
            client.close()
