# SPDX-License-Identifier: MIT
"""One end of a counting dialogue that can be handed over: each message is the other's number plus one.

``endpoint.py listen PORT | connect ADDRESS PORT | import PORT``; SIGUSR1 exports the connection (to
``--to``) and ends; SIGTERM ends. ``--c``: by the C library. Prints ``ready``, then the highest number seen;
before that, if the connection has been taken away, its context, which an importer reads if none has come.
"""

from __future__ import annotations

import argparse
import errno
import json
import select
import signal
import socket
import struct
import sys
from pathlib import Path

import sockmi

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.lab.client_callers import C

_NUMBER = struct.Struct("!Q")
TAKEN = (errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE)


class Dialogue:
    """The connection, and what is expected next."""

    def __init__(self, connection: socket.socket, expected: int, partial: bytes = b"") -> None:
        self.connection = connection
        self.expected = expected
        self.partial = partial

    def context(self) -> bytes:
        return json.dumps([self.expected, self.partial.hex()]).encode()

    @classmethod
    def resume(cls, connection: socket.socket, context: bytes) -> Dialogue:
        expected, partial = json.loads(context or sys.stdin.readline())
        connection.setblocking(True)
        return cls(connection, expected, bytes.fromhex(partial))

    def answer(self) -> None:
        """What is complete."""
        while len(self.partial) >= _NUMBER.size:
            (number,) = _NUMBER.unpack_from(self.partial)
            if number != self.expected:
                raise SystemExit(f"expected {self.expected}, got {number}")
            self.connection.sendall(_NUMBER.pack(number + 1))  # short enough to be sent whole, or not at all
            self.partial = self.partial[_NUMBER.size :]
            self.expected = number + 2

    def turn(self) -> bool:
        """Read what came, answer what is complete; False at the end.

        An end that stops with something unread resets the other: that is an end too.
        """
        try:
            data = self.connection.recv(4096)
        except ConnectionResetError:
            return False
        self.partial += data
        self.answer()
        return bool(data)


def listening(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family)


def open_dialogue(arguments: argparse.Namespace) -> Dialogue:
    if arguments.role == "import":
        print("ready", flush=True)
        if arguments.c:
            made = socket.socket()
            [got] = C().take([{"fd": made.fileno(), "states": ["connected"]}], 30)
            return Dialogue.resume(made, got.context)
        criteria = sockmi.ImportRequest(["connected"])
        [arrived] = sockmi.import_socket(criteria, 30)
        assert arrived.socket is not None
        return Dialogue.resume(arrived.socket, arrived.context)
    if arguments.role == "listen":
        with listening(arguments.address or "0.0.0.0", arguments.port) as listener:  # noqa: S104
            print("ready", flush=True)
            return Dialogue(listener.accept()[0], 1)
    connection = socket.create_connection((arguments.address, arguments.port))
    print("ready", flush=True)
    connection.sendall(_NUMBER.pack(1))
    return Dialogue(connection, 2)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("listen", "connect", "import"))
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--to")
    parser.add_argument("--c", action="store_true")
    arguments = parser.parse_args()
    wanted: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda got, _unused: wanted.append(got))
    dialogue = open_dialogue(arguments)
    try:
        dialogue.answer()  # what had come before it came here
        while not wanted:
            readable, _unused, _unused = select.select([dialogue.connection], [], [], 0.05)
            if readable and not dialogue.turn():
                break
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        print(dialogue.context().decode())
    if signal.SIGUSR1 in wanted and arguments.c:
        C().export(dialogue.connection.fileno(), to=arguments.to, context=dialogue.context(), timeout_s=20)
    elif signal.SIGUSR1 in wanted:
        sockmi.export_socket(dialogue.connection, to=arguments.to, context=dialogue.context(), timeout_s=20)
    print(dialogue.expected, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
