# SPDX-License-Identifier: MIT
"""A server of sessions: one thread, any number of connections; takes them by accept or by adoption."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.traffic.download import Download
from lab.traffic.duplex import Duplex
from lab.traffic.handover import Export, Rendezvous, endpoint_text, remote_text
from lab.traffic.lines import Lines
from lab.traffic.session import MOVED, Session

KINDS: dict[str, type[Session]] = {kind.kind: kind for kind in (Duplex, Lines, Download)}


@dataclass(slots=True)
class Counts:
    """What a server has done so far. ``failures``: sentences."""

    accepted: int = 0
    adopted: int = 0
    moved_away: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)


class Server:
    """Serves one kind of session until `stop`.

    ``listener`` may be None: then it only adopts. When a connection was taken away its context
    is left at ``rendezvous``.
    """

    def __init__(self, kind: type[Session], listener: socket.socket | None, rendezvous: Rendezvous) -> None:
        self.kind = kind
        self.counts = Counts()
        self.rendezvous = rendezvous
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._sessions: dict[Session, str] = {}
        self._events: dict[Session, int] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._running = True
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    # -- from any thread

    def adopt(self, connection: socket.socket, context: bytes) -> None:
        """Go on with a connection that another process had; an empty context: as if just accepted."""
        self._call(lambda: self._adopt(connection, context))

    def hand_over(self, export: Export) -> None:
        """Export every session with its context; those that are refused go on here."""
        self._call(lambda: self._export_all(export))

    def failed(self, sentence: str) -> None:
        """Count a failure from outside."""
        self.counts.failures.append(sentence)

    def stop(self) -> None:
        """End `serve`; connections are closed."""
        self._running = False
        self._call(lambda: None)

    def _call(self, action: Callable[[], None]) -> None:
        self._calls.append(action)
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"!")

    # -- the loop

    def serve(self) -> None:
        """Serve until `stop`."""
        try:
            while self._running:
                for key, events in self._selector.select(self._schedule()):
                    if isinstance(key.fileobj, Session):
                        self._step(key.fileobj, events)
                    elif key.fileobj is self._listener:
                        self._accept()
                    else:
                        os.read(self._wake_read, 4096)
                while self._calls:
                    self._calls.popleft()()
        finally:
            for session in list(self._sessions):
                self._drop(session)
            if self._listener is not None:
                self._listener.close()
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def in_thread(self) -> threading.Thread:
        """Serve in a new thread."""
        thread = threading.Thread(target=self.serve, name=f"{self.kind.kind} server", daemon=True)
        thread.start()
        return thread

    def _schedule(self) -> float | None:
        """Ask for the events that each session wants now; seconds until the next one wants to write."""
        now, next_at = time.monotonic(), float("inf")
        for session in self._sessions:
            write_at = session.write_at()
            events = selectors.EVENT_READ if session.reading else 0
            if write_at <= now:
                events |= selectors.EVENT_WRITE
            else:
                next_at = min(next_at, write_at)
            self._want(session, events)
        return None if next_at == float("inf") else max(0.0, next_at - now)

    def _want(self, session: Session, events: int) -> None:
        before = self._events.get(session, 0)
        if events == before:
            return
        if not events:
            self._selector.unregister(session)
        elif before:
            self._selector.modify(session, events)
        else:
            self._selector.register(session, events)
        self._events[session] = events

    def _step(self, session: Session, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                session.readable()
            if events & selectors.EVENT_WRITE and not session.finished:
                session.writable(time.monotonic())
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in MOVED:
                self._moved(session)
            else:
                self.failed(f"{self.kind.kind} with {self._sessions[session]}: {error}")
                self._drop(session)
            return
        except Exception as error:
            self.failed(f"{self.kind.kind} with {self._sessions[session]}: {error}")
            self._drop(session)
            return
        if session.finished:
            self.counts.finished += 1
            self._drop(session)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, name = self._listener.accept()
            remote = endpoint_text(name)  # the peer may have gone already: not getpeername
            self.rendezvous.forget(remote)
            self._sessions[self.kind(connection)] = remote
            self.counts.accepted += 1

    def _adopt(self, connection: socket.socket, context: bytes) -> None:
        try:
            session = self.kind.resume(connection, context) if context else self.kind(connection)
            self._sessions[session] = remote_text(connection)
            self.counts.adopted += 1
        except (ValueError, KeyError, OSError) as error:
            self.failed(f"cannot go on with a connection that was handed over: {error!r}")
            connection.close()

    def _moved(self, session: Session) -> None:
        self.rendezvous.put(self._sessions[session], session.context())
        self.counts.moved_away += 1
        self._drop(session)

    def _export_all(self, export: Export) -> None:
        sessions = list(self._sessions)
        try:
            reasons = export([(session.connection, session.context()) for session in sessions])
        except OSError as error:
            self.failed(f"hand-over: {error}")
            return
        for session, why in zip(sessions, reasons, strict=True):
            if why:
                self.failed(f"hand-over of {self._sessions[session]}: {why}")
            else:
                self.counts.moved_away += 1
                self._drop(session)

    def _drop(self, session: Session) -> None:
        if self._events.pop(session, 0):
            self._selector.unregister(session)
        del self._sessions[session]
        session.close()


def listen(address: str, port: int) -> socket.socket:
    """A listening socket; ``::`` takes IPv4, too."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server(
        (address, port), family=family, backlog=1024, dualstack_ipv6=address == "::", reuse_port=False
    )
