# SPDX-License-Identifier: MIT
"""A rendezvous for servers on different machines: who had a connection keeps its context until asked."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lab.traffic.handover import CONTEXT_WAIT_S, Rendezvous

PORT = 7799
ASK_S = 2.0


class RemoteRendezvous(Rendezvous):
    """Answers questions at ``address`` and ``port``, and asks the servers at the addresses ``others``.

    A question is the peer's endpoint and a line feed, the answer the context, or nothing. What has been given
    is forgotten, so that a context is never taken twice, nor after the connection has moved on.
    """

    def __init__(
        self, directory: Path, others: Sequence[str], *, address: str = "", port: int = PORT
    ) -> None:
        super().__init__(directory)
        self.others = others
        self.port = port
        self._giving = threading.Lock()
        self._listener = socket.create_server((address, port), backlog=64)
        threading.Thread(target=self._answer, name="rendezvous", daemon=True).start()

    def take(self, remote: str, timeout_s: float = CONTEXT_WAIT_S) -> bytes:
        """Take the context of ``remote`` from who has it; TimeoutError if nobody does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for other in self.others:
                with contextlib.suppress(OSError):
                    if context := self._ask(other, remote):
                        return context
            time.sleep(0.05)
        raise TimeoutError(
            f"none of {', '.join(self.others)} has a context for {remote} after {timeout_s:.0f} s"
        )

    def _ask(self, other: str, remote: str) -> bytes:
        with socket.create_connection((other, self.port), timeout=ASK_S) as made:
            made.sendall(f"{remote}\n".encode())
            return b"".join(iter(lambda: made.recv(1 << 16), b""))

    def _answer(self) -> None:
        while True:
            asking, _unused = self._listener.accept()
            threading.Thread(target=self._give, args=(asking,), daemon=True).start()

    def _give(self, asking: socket.socket) -> None:
        with asking, self._giving, contextlib.suppress(OSError):
            asking.settimeout(ASK_S)
            remote = asking.makefile("r").readline().strip()
            kept = self._path(remote)
            if kept.exists():
                asking.sendall(kept.read_bytes())
                kept.unlink()
