# SPDX-License-Identifier: MIT
"""HTTP keep-alive clients: one request after the other on connections that are never opened again.

``keepalive.py ADDRESS PORT CONNECTIONS PAUSE_S``, until its standard input ends: a line of JSON, how many
answers each server has given (the body of an answer is its name), by whom each connection was answered last,
and what went wrong.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time
from collections import Counter


def request(sock: socket.socket, address: str) -> str:
    """The body of one answer."""
    sock.sendall(f"GET / HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(4096)
        if not part:
            raise ConnectionError("the server has closed a connection that it was to keep")
        data += part
    head, _unused, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(f"answered {head!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += sock.recv(4096)
    return body.decode().strip()


def main() -> None:
    address, port, connections, pause_s = sys.argv[1], *map(float, sys.argv[2:])
    answers: Counter[str] = Counter()
    last: dict[int, str] = {}
    errors: list[str] = []
    over = threading.Event()

    def use(number: int) -> None:
        try:
            with socket.create_connection((address, int(port)), timeout=60) as sock:
                while not over.is_set():
                    last[number] = request(sock, address)
                    answers[last[number]] += 1
                    time.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        except OSError as error:
            errors.append(f"connection {number}: {error!r}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(int(connections))]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"answers": answers, "last": Counter(last.values()), "errors": errors}))


if __name__ == "__main__":
    main()
