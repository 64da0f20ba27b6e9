# SPDX-License-Identifier: MIT
"""The clients: each makes one connection, checks every byte, and writes down what it saw."""

from __future__ import annotations

import contextlib
import hashlib
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.traffic.duplex import Duplex, Terms
from lab.traffic.handover import endpoint_text, local_text, remote_text
from lab.traffic.pattern import Corruption
from lab.traffic.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Result:
    """How a client ended; ``error`` is empty if all went well. ``longest_gap_us``: see `Timeline`."""

    error: str
    sent: int
    received: int
    longest_gap_us: int
    longest_reply_us: int = 0

    @property
    def ok(self) -> bool:
        """True if the peer noticed nothing."""
        return not self.error


class _Client:
    """What the clients share: connect, guard, write the last line."""

    kind = ""

    def __init__(self, remote: tuple[str, int], name: str, timeline: Path | None, silence_s: float) -> None:
        self.remote = remote
        self.silence_s = silence_s
        self.stopping = threading.Event()
        self.timeline = Timeline(timeline, self.kind, name)
        self.name = name
        self.sent = self.received = 0
        self.longest_reply_us = 0

    def stop(self) -> None:
        """End soon, in an orderly way. May be called from a signal handler or another thread."""
        self.stopping.set()

    def run(self) -> Result:
        """Do it all; errors are in the result."""
        error = ""
        try:
            self._talk()
        except (OSError, Corruption, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        self.timeline.finish(error, longest_reply_us=self.longest_reply_us, **self._ends())
        return Result(error, self.sent, self.received, self.timeline.longest_gap_us, self.longest_reply_us)

    def _talk(self) -> None:
        raise NotImplementedError

    def _ends(self) -> dict[str, str]:
        return {}

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self.remote, timeout=self.silence_s)
        self.timeline.connected(local_text(connection), remote_text(connection))
        return connection

    def _progress(self, sent: int, received: int) -> None:
        self.sent, self.received = sent, received
        self.timeline.progress(sent, received)


class DuplexClient(_Client):
    """Both directions at once; see `lab.traffic.duplex`. Paces in bytes a second.

    With a zero in ``terms`` for the lengths it goes on until `stop`. ``silence_s`` without any
    progress is an error.
    """

    kind = "duplex"

    def __init__(
        self,
        remote: tuple[str, int],
        terms: Terms,
        *,
        pace: int = 0,
        name: str = "duplex",
        timeline: Path | None = None,
        silence_s: float = 20.0,
    ) -> None:
        super().__init__(remote, name, timeline, silence_s)
        self.terms, self.pace = terms, pace

    def _talk(self) -> None:
        with self._connect() as connection, selectors.DefaultSelector() as selector:
            session = Duplex.open_client(connection, self.terms, self.pace)
            selector.register(session, selectors.EVENT_READ)
            last_progress = time.monotonic()
            while not session.finished:
                if self.stopping.is_set():
                    session.stop()
                now = time.monotonic()
                wait_s = session.write_at() - now
                events = selectors.EVENT_READ if session.reading else 0
                events |= selectors.EVENT_WRITE if wait_s <= 0 else 0
                before = session.sent + session.received
                if events:
                    selector.modify(session, events)
                    ready = selector.select(min(0.1, max(0.0, wait_s) if wait_s > 0 else 0.1))
                else:
                    time.sleep(min(0.1, wait_s))
                    ready = []
                for _unused, happened in ready:
                    with contextlib.suppress(BlockingIOError):
                        if happened & selectors.EVENT_READ:
                            session.readable()
                        if happened & selectors.EVENT_WRITE:
                            session.writable(time.monotonic())
                if session.sent + session.received != before:
                    last_progress = time.monotonic()
                    self._progress(session.sent, session.received)
                elif time.monotonic() - last_progress > self.silence_s:
                    counts = f"sent {session.sent}, received {session.received}"
                    raise TimeoutError(f"no byte moved for {self.silence_s:.0f} s; {counts}")


class LineClient(_Client):
    """Says a line every ``interval_s`` and checks each answer against its own count.

    With ``lines`` 0 until `stop`. With one line and a long interval it is an idle connection.
    """

    kind = "lines"

    def __init__(
        self,
        remote: tuple[str, int],
        *,
        name: str = "alice",
        interval_s: float = 0.1,
        lines: int = 0,
        timeline: Path | None = None,
        silence_s: float = 20.0,
    ) -> None:
        super().__init__(remote, name, timeline, silence_s)
        self.interval_s, self.lines = interval_s, lines
        self._buffer = b""

    def _talk(self) -> None:
        with self._connect() as connection:
            self._say(connection, f"NAME {self.name}", f"hello {self.name}")
            count = 0
            while not (self.lines and count == self.lines) and not self.stopping.wait(self.interval_s):
                count += 1
                line = f"line number {count}"
                self._say(connection, line, f"{self.name} {count} {line}")
            self._say(connection, "QUIT", f"bye {self.name} {count}")
            if self._buffer or connection.recv(1):
                raise Corruption("there is more after the last answer")

    def _say(self, connection: socket.socket, line: str, expected: str) -> None:
        begin_ns = time.monotonic_ns()
        data = line.encode() + b"\n"
        connection.sendall(data)
        self._progress(self.sent + len(data), self.received)
        while b"\n" not in self._buffer:
            data = connection.recv(4096)
            if not data:
                raise Corruption(f"the stream ended where {expected!r} was due")
            self._buffer += data
            self._progress(self.sent, self.received + len(data))
        answer, self._buffer = self._buffer.split(b"\n", 1)
        self.longest_reply_us = max(self.longest_reply_us, (time.monotonic_ns() - begin_ns) // 1000)
        if answer != expected.encode():
            raise Corruption(f"the answer is {answer!r}, not {expected!r}")


class IdleClient(LineClient):
    """Nothing but a name, then silence until `stop` (or ``idle_s``), one line more, and the end."""

    kind = "idle"

    def __init__(
        self,
        remote: tuple[str, int],
        *,
        name: str = "idle",
        idle_s: float = 3600.0,
        timeline: Path | None = None,
        silence_s: float = 20.0,
    ) -> None:
        super().__init__(
            remote, name=name, interval_s=idle_s, lines=1, timeline=timeline, silence_s=silence_s
        )

    def _talk(self) -> None:
        with self._connect() as connection:
            self._say(connection, f"NAME {self.name}", f"hello {self.name}")
            self.stopping.wait(self.interval_s)
            self._say(connection, "still here", f"{self.name} 1 still here")
            self._say(connection, "QUIT", f"bye {self.name} 1")


class CurlClient(_Client):
    """The real curl in a download of known length and SHA-256; see `lab.traffic.download`.

    ``popen`` starts programs (`lab.host.Host.popen` for a host of a lab).
    """

    kind = "curl"

    def __init__(
        self,
        remote: tuple[str, int],
        length: int,
        sha256: str,
        *,
        seed: int = 0,
        pace: int = 0,
        name: str = "curl",
        timeline: Path | None = None,
        silence_s: float = 20.0,
        popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        super().__init__(remote, name, timeline, silence_s)
        self.length, self.sha256 = length, sha256
        host = f"[{remote[0]}]" if ":" in remote[0] else remote[0]
        self.url = f"http://{host}:{remote[1]}/download?bytes={length}&pace={pace}&seed={seed}"
        self._popen = popen
        self._process: subprocess.Popen[bytes] | None = None
        self._local = ""

    def stop(self) -> None:
        """curl cannot end early: a download that is broken off is a failure."""

    def _talk(self) -> None:
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--fail", "--globoff", "--noproxy", "*"]
        command += ["--speed-limit", "1", "--speed-time", str(int(self.silence_s)), "--output", "-"]
        command += ["--write-out", "%{stderr}%{local_ip} %{local_port} %{size_upload}", self.url]
        process = self._popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stderr is not None
        digest = hashlib.sha256()
        self.timeline.connected("", endpoint_text(self.remote))
        with process:
            while data := process.stdout.read(1 << 16):
                digest.update(data)
                self._progress(self.sent, self.received + len(data))
            written = process.stderr.read().decode(errors="replace").strip()
        if process.returncode:
            raise ValueError(f"curl ended with code {process.returncode}: {written}")
        address, port, _unused = written.splitlines()[-1].split()
        self._local = endpoint_text((address, int(port)))
        if self.received != self.length or digest.hexdigest() != self.sha256:
            raise Corruption(
                f"curl got {self.received} bytes of {self.length}, "
                f"SHA-256 {digest.hexdigest()}, not {self.sha256}"
            )

    def _ends(self) -> dict[str, str]:
        return {"local": self._local} if self._local else {}
