# SPDX-License-Identifier: MIT
"""One TLS 1.3 connection between two daemons: handshake, frames, write queue. Not whose it is: see stream.py.

A frame is length (u32, of the payload), type (u8), payload. Small payloads are copied once;
a large one is received straight into its own buffer and sent straight from the caller's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import Protocol

from sockmi.addresses import Endpoint
from sockmi.transport.identity import fingerprint_of
from sockmi.transport.sockaddr import family_of, to_sockaddr

_HEADER = struct.Struct("!IB")
_RECORD_BYTES = 16384  # RFC 8446, section 5.1
_SCRATCH_BYTES = _RECORD_BYTES + _HEADER.size
_READS_PER_TURN = 64
_WRITE_BYTES_PER_TURN = 1 << 20


class Frame(IntEnum):
    """Frame types. PING and PONG carry a u32 that the answer repeats."""

    PING = 1
    PONG = 2
    WELCOME = 3  # from the side that was connected to: this is now the connection of the two hosts
    MESSAGE = 4


class Phase(Enum):
    """How far a link has come."""

    CONNECTING = "connecting"
    HANDSHAKE = "handshake"
    READY = "ready"  # both certificates verified
    CLOSED = "closed"


class LinkOwner(Protocol):
    """Who decides about a link."""

    def link_ready(self, link: Link) -> None:
        """The TLS handshake is complete; ``link.fingerprint`` is the other side's."""

    def link_frame(self, link: Link, kind: int, payload: memoryview) -> None:
        """A whole frame."""

    def link_closed(self, link: Link, reason: str) -> None:
        """The link is gone (not called for ``Link.close``)."""

    def link_drained(self, link: Link) -> None:
        """The write queue has become empty after it was not."""


def connect(endpoint: Endpoint) -> socket.socket:
    """Begin a TCP connection; OSError if not even that is possible."""
    one = socket.socket(
        family_of(endpoint.address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    try:
        one.connect(to_sockaddr(endpoint))
    except BlockingIOError:
        pass
    except BaseException:
        one.close()
        raise
    return one


class Link:
    """See the module docstring. ``last_heard`` is the loop's time when bytes last came in."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        owner: LinkOwner,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server: bool,
        frame_bytes_max: int,
        user_timeout_s: float,
    ) -> None:
        self.server = server
        self.phase = Phase.HANDSHAKE if server else Phase.CONNECTING
        self.fingerprint = b""
        self.last_heard = loop.time()
        self.queued_bytes = 0
        self.timer: asyncio.TimerHandle | None = None  # the owner's; cancelled by close
        self._loop = loop
        self._owner = owner
        self._context = context
        self._frame_bytes_max = frame_bytes_max
        self._raw: socket.socket = sock
        self._fd = sock.fileno()
        self._tls: ssl.SSLSocket | None = None
        self._writing = False
        self._corked = False  # what is queued waits for the frame that follows it
        self._queue: deque[memoryview] = deque()
        self._chunk = memoryview(b"")  # what is being written; TLS wants the same bytes again after a block
        self._scratch = memoryview(bytearray())
        self._have = 0  # bytes of a partial header in the scratch
        self._kind = 0
        self._large = memoryview(b"")  # the frame that is coming in
        self._missing = 0  # bytes that it lacks
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout_s * 1000))
        if server:
            loop.call_soon(self._start_tls)
        else:
            self._watch_writable(True)

    # --- for the owner ---

    def send(self, kind: Frame, payload: Iterable[memoryview] = (), *, more: bool = False) -> None:
        """Queue a frame and write what can be written now. The buffers must not change until sent.

        ``more``: another frame follows at once, and is written with this one.
        """
        parts = [part for part in payload if part.nbytes]
        length = sum(part.nbytes for part in parts)
        idle = self._corked or (not self._queue and not self._chunk)
        self._queue.append(memoryview(_HEADER.pack(length, kind)))
        self._queue.extend(parts)
        self.queued_bytes += _HEADER.size + length
        if idle and not self._writing and self.phase is Phase.READY:
            if more:
                if not self._corked:
                    self._loop.call_soon(self._uncork)
                self._corked = True
            else:
                self._corked = False
                self._flush()

    def _uncork(self) -> None:
        """Nothing has followed."""
        if self._corked:
            self._corked = False
            if not self._writing:
                self._flush()

    def close(self) -> None:
        """Close at once; what is queued is gone. Repeating it is harmless."""
        if self.phase is Phase.CLOSED:
            return
        self.phase = Phase.CLOSED
        if self.timer is not None:
            self.timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._queue.clear()
        self._chunk = self._large = memoryview(b"")
        self.queued_bytes = 0
        (self._tls or self._raw).close()

    def fail(self, reason: str) -> None:
        """Close and tell the owner why."""
        if self.phase is not Phase.CLOSED:
            self.close()
            self._owner.link_closed(self, reason)

    # --- coming up ---

    def _start_tls(self) -> None:
        if self.phase is Phase.CLOSED:
            return
        try:
            self._tls = self._context.wrap_socket(
                self._raw, server_side=self.server, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:
            self.fail(f"TLS cannot start: {error}")
            return
        self.phase = Phase.HANDSHAKE
        self._loop.add_reader(self._fd, self._readable)
        self._handshake()

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._watch_writable(False)
        except ssl.SSLWantWriteError:
            self._watch_writable(True)
        except (OSError, ValueError) as error:
            self.fail(f"TLS handshake: {_reason(error)}")
        else:
            self._watch_writable(False)
            certificate = self._tls.getpeercert(binary_form=True)
            if certificate is None or self._tls.version() != "TLSv1.3":
                self.fail("TLS handshake: no certificate, or not TLS 1.3")
                return
            self.fingerprint = fingerprint_of(certificate)
            self.last_heard = self._loop.time()
            self.phase = Phase.READY
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
            self._owner.link_ready(self)
            self._flush()
            self._read()  # what came with the handshake's last flight is in TLS's buffer, not in the socket's

    def _watch_writable(self, on: bool) -> None:
        if on != self._writing and self.phase is not Phase.CLOSED:
            self._writing = on
            if on:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)

    def _writable(self) -> None:
        if self.phase is Phase.CONNECTING:
            code = self._raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._watch_writable(False)
            if code:
                self.fail(f"connect: {os.strerror(code)}")
            else:
                self._start_tls()
        elif self.phase is Phase.HANDSHAKE:
            self._handshake()
        elif self.phase is Phase.READY:
            self._flush()

    def _readable(self) -> None:
        if self.phase is Phase.HANDSHAKE:
            self._handshake()
        elif self.phase is Phase.READY:
            self._read()

    # --- in ---

    def _read(self) -> None:
        """Read what is there, but let others have their turn in a long transfer."""
        for _turn in range(_READS_PER_TURN):
            if self.phase is not Phase.READY or self._tls is None:
                return
            into = self._large[-self._missing :] if self._missing else self._scratch[self._have :]
            try:
                count = self._tls.recv_into(into)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                # TLS 1.3 does not renegotiate: a read waits for a write only while a key update is
                # answered, and the next flush or read carries on with it.
                break
            except (OSError, ValueError) as error:
                self.fail(_reason(error))
                return
            if not count:
                self.fail("closed by the other host")
                return
            self.last_heard = self._loop.time()
            if self._missing:
                self._missing -= count
                if not self._missing:
                    frame, self._large = self._large, memoryview(b"")
                    self._owner.link_frame(self, self._kind, frame.toreadonly())
            else:
                self._parse(self._have + count)
            if self.phase is not Phase.READY or not (self._missing or self._tls.pending()):
                break  # in the middle of a frame it is worth asking for more
        else:
            if self.phase is Phase.READY:
                self._loop.call_soon(self._readable)  # TLS may hold bytes of which the poll knows nothing
        if self.phase is Phase.READY and self._chunk and not self._writing:
            self._flush()

    def _parse(self, end: int) -> None:
        """Deliver the frames in the scratch; begin the buffer of one that is not complete."""
        at = 0
        while end - at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._scratch, at)
            if length > self._frame_bytes_max:
                self.fail(f"frame of {length} bytes, more than {self._frame_bytes_max}")
                return
            at += _HEADER.size
            here = min(length, end - at)
            if here < length:
                self._kind = kind
                self._large = memoryview(bytearray(length))
                self._large[:here] = self._scratch[at:end]
                self._missing = length - here
                at = end
                break
            payload = memoryview(bytes(self._scratch[at : at + here]))
            at += here
            self._owner.link_frame(self, kind, payload)
            if self.phase is not Phase.READY:
                return
        self._have = end - at
        self._scratch[: self._have] = self._scratch[at:end]

    # --- out ---

    def _flush(self) -> None:
        """Write until the queue is empty, the socket full, or the turn over."""
        written = 0
        had = bool(self._chunk or self._queue)
        while self.phase is Phase.READY and self._tls is not None:
            if not self._chunk and not self._next_chunk():
                self._watch_writable(False)
                if had:
                    self._owner.link_drained(self)
                return
            try:
                count = self._tls.send(self._chunk)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._watch_writable(True)
                return
            except (OSError, ValueError) as error:
                # Not now: whoever calls send must not be called back from within.
                self._loop.call_soon(self.fail, _reason(error))
                return
            self._chunk = self._chunk[count:]
            self.queued_bytes -= count
            written += count
            if written >= _WRITE_BYTES_PER_TURN:
                self._watch_writable(True)
                return

    def _next_chunk(self) -> bool:
        """Gather small buffers into one record; a large one goes out as it is."""
        if not self._queue:
            return False
        first = self._queue.popleft()
        if first.nbytes >= _RECORD_BYTES or not self._queue:
            self._chunk = first
            return True
        gathered = bytearray(first)
        while self._queue and len(gathered) < _RECORD_BYTES:
            part = self._queue.popleft()
            room = _RECORD_BYTES - len(gathered)
            if part.nbytes > room:
                self._queue.appendleft(part[room:])
                part = part[:room]
            gathered += part
        self._chunk = memoryview(gathered)
        return True


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or error)
