# SPDX-License-Identifier: MIT
"""The harness's end of the agent's connection (inside/agent.py says what is spoken)."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from guests.errors import HarnessError

CHUNK = 1 << 16
INPUT_CHUNK = 1 << 15
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


class GuestGoneError(HarnessError):
    """The guest ended, or panicked, while something was asked of it."""


class Command:
    """One command that runs, or ran, in a guest."""

    def __init__(self, line: Line, number: int, words: Sequence[str]) -> None:
        self._line = line
        self.number = number
        self.words = words
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.code: int | None = None
        self.trouble = ""
        self._changed = threading.Condition()

    def feed(self, data: bytes) -> None:
        """Write ``data`` to its standard input."""
        for start in range(0, len(data), INPUT_CHUNK):
            self._line.send("input", data[start : start + INPUT_CHUNK], id=self.number)

    def close_input(self) -> None:
        """End its standard input."""
        self._line.send("input", id=self.number)

    def signal(self, number: int) -> None:
        """Send a signal to it and what it started."""
        self._line.send("kill", id=self.number, signal=number)

    def wait(self, limit: float) -> int:
        """Its exit code. Raises TimeoutError after ``limit`` seconds, GuestGoneError if the guest ends."""
        self.until(lambda: self.code is not None, limit)
        assert self.code is not None
        return self.code

    def until_output(self, text: bytes, limit: float) -> None:
        """Wait until ``text`` is in its standard output."""
        self.until(lambda: text in self.stdout or self.code is not None, limit)
        if text not in self.stdout:
            raise HarnessError(f"{self.words} ended with {self.code} before it said {text!r}: {self.tail()}")

    def until(self, condition: Callable[[], bool], limit: float) -> None:
        """Wait until ``condition()`` holds, for at most ``limit`` seconds."""
        deadline = time.monotonic() + limit
        with self._changed:
            while not condition():
                if self._line.gone:
                    raise GuestGoneError(f"the guest ended while {' '.join(self.words)[:200]} ran in it")
                if self.trouble:
                    raise HarnessError(f"{' '.join(self.words)[:200]}: {self.trouble}")
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise TimeoutError(
                        f"{' '.join(self.words)[:200]} not done after {limit:.0f} s: {self.tail()}"
                    )
                self._changed.wait(min(rest, 0.5))

    def tail(self) -> str:
        """The end of what it said."""
        return (bytes(self.stdout[-1500:]) + bytes(self.stderr[-1500:])).decode(errors="replace")

    def take(self, kind: str, header: Mapping[str, object], data: bytes) -> None:
        """A frame about this command has come."""
        with self._changed:
            if kind == "output":
                (self.stdout if header["stream"] == "stdout" else self.stderr).extend(data)
            elif kind == "exit":
                self.code = int(str(header["code"]))
            else:
                self.trouble = str(header["text"])
            self._changed.notify_all()


class Line:
    """The connection to one guest's agent, from before the guest has booted."""

    def __init__(self, path: Path, limit: float) -> None:
        self._socket = _connected(path, limit)
        self._sending = threading.Lock()
        self._commands: dict[int, Command] = {}
        self._next = 1
        self.gone = False
        self.hello: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name=f"agent {path}").start()

    def send(self, kind: str, data: bytes = b"", **fields: object) -> None:
        """One frame to the agent."""
        frame = json.dumps({"kind": kind, "size": len(data), **fields}).encode() + b"\n" + data
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError as error:
                raise GuestGoneError(f"the guest does not listen any more: {error}") from None

    def start(self, words: Sequence[str], cwd: str, environment: Mapping[str, str]) -> Command:
        """Start a command."""
        number, self._next = self._next, self._next + 1
        command = self._commands[number] = Command(self, number, words)
        self.send("run", id=number, command=list(words), cwd=cwd, env=ENVIRONMENT | dict(environment))
        return command

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _listen(self) -> None:
        stream = self._socket.makefile("rb", CHUNK)
        try:
            while line := stream.readline():
                header = json.loads(line)
                data = stream.read(header["size"])
                if header["kind"] == "hello":
                    self.hello.put(header["release"])
                elif command := self._commands.get(header["id"]):
                    command.take(header["kind"], header, data)
                    if header["kind"] in ("exit", "error"):
                        del self._commands[header["id"]]
        except (OSError, ValueError):
            pass
        self.gone = True
        self.hello.put("")


def _connected(path: Path, limit: float) -> socket.socket:
    deadline = time.monotonic() + limit
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            made.close()
            if time.monotonic() > deadline:
                raise HarnessError(f"QEMU did not make {path} in {limit:.0f} s") from None
            time.sleep(0.02)
        else:
            return made
