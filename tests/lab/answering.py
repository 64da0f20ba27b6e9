# SPDX-License-Identifier: MIT
"""A server that answers each byte for as long as it has the connection."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lab.host import Host

SERVER = """
import selectors, socket, sys
port, queued = map(int, sys.argv[1:])
listener = socket.create_server(("", port), backlog=512)
ready = selectors.DefaultSelector()
ready.register(listener, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in ready.select():
        if key.fileobj is listener:
            one = listener.accept()[0]
            if queued:
                one.setsockopt(socket.SOL_SOCKET, 32, 4 * queued)  # SO_SNDBUFFORCE
            ready.register(one, selectors.EVENT_READ)
            continue
        try:
            data = key.fileobj.recv(1)
        except ConnectionAbortedError:
            data = b""  # it has moved
        if data:
            key.fileobj.sendall(b"a" if data == b"?" else bytes(queued))
        else:
            ready.unregister(key.fileobj)
            key.fileobj.close()
"""


@contextmanager
def answering(host: Host, port: int, queued_bytes: int = 0) -> Iterator[None]:
    """To ``?`` it says ``a``; to any other byte ``queued_bytes`` zeros, which its queue has room for."""
    command = [sys.executable, "-c", SERVER, str(port), str(queued_bytes)]
    with host.popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()
