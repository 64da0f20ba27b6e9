# SPDX-License-Identifier: MIT
"""How a session reaches its next process: the only place that speaks to the library.

A server that exports a connection itself sends its context with the socket. If a connection
is taken from it (a passive export) it learns that from the next call on its descriptor, and
then knows exactly how far it came: it leaves the context at a rendezvous, a directory that the
servers share, where the server that got the socket finds it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path

CONTEXT_WAIT_S = 10.0
_LOOK_S = 5.0 if "SOCKMI_INSIDE" in os.environ else 0.5  # where the processor is emulated a daemon is slow


def remote_text(connection: socket.socket) -> str:
    """The peer's endpoint as ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``; v4-mapped addresses as IPv4."""
    return endpoint_text(connection.getpeername())


def local_text(connection: socket.socket) -> str:
    """Our endpoint; see `remote_text`."""
    return endpoint_text(connection.getsockname())


def endpoint_text(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """A socket name as text; ValueError if it is not of an IP socket."""
    if not isinstance(name, tuple):
        raise ValueError(f"{name!r} is not the name of an IP socket")
    address = ip_address(name[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return f"[{address}]:{name[1]}" if address.version == 6 else f"{address}:{name[1]}"


class Rendezvous:
    """Contexts under way, by the peer's endpoint: the one name that no redirect changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, remote: str) -> Path:
        return self.directory / remote.replace("/", "_")

    def put(self, remote: str, context: bytes) -> None:
        """Leave a context; whole or not at all."""
        new = self.directory / f".{remote}.{os.getpid()}"
        new.write_bytes(context)
        new.replace(self._path(remote))

    def take(self, remote: str, timeout_s: float = CONTEXT_WAIT_S) -> bytes:
        """Take the context of ``remote``, waiting for it; TimeoutError if nobody leaves it."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                context = self._path(remote).read_bytes()
                self._path(remote).unlink()
                return context
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no context for {remote} in {self.directory} after {timeout_s:.0f} s: "
                    "is the server that had the connection still running?"
                )
            time.sleep(0.0005)

    def forget(self, remote: str) -> None:
        """Drop what an earlier connection from the same endpoint may have left."""
        self._path(remote).unlink(missing_ok=True)


Handed = tuple[socket.socket, bytes]
"""A socket and the context that came with it (empty: none did)."""

Import = Callable[[float], list[Handed]]
"""Wait at most so many seconds for sockets; the empty list if none came."""

Export = Callable[[Sequence[Handed]], list[str]]
"""Export sockets with their contexts; for each the empty string if it moved, else why not."""


def library_import(local_port: int | None = None, at_once_max: int = 64) -> Import:
    """An `Import` from this host's daemon: connected sockets of a port, many in one request."""
    import sockmi

    criteria = [sockmi.ImportRequest([sockmi.Kind.CONNECTED], local_port=local_port)] * at_once_max

    def wait(timeout_s: float) -> list[Handed]:
        arrived = sockmi.import_socket(criteria, timeout_s)
        return [(one.socket or socket.socket(fileno=one.fd), one.context) for one in arrived]

    return wait


def library_export(to: str | None = None, timeout_s: float | None = None) -> Export:
    """An `Export` through this host's daemon, to a host or to any, all in one batch."""
    import sockmi

    make, send = sockmi.Export, sockmi.export_sockets

    def export(handed: Sequence[Handed]) -> list[str]:
        exports = [make(connection, context=context) for connection, context in handed]
        records = send(exports, to, timeout_s=timeout_s)
        return ["" if record.outcome == "moved" else f"{record.code}: {record.message}" for record in records]

    return export


class Importer:
    """A thread that waits for sockets and hands each, with its context, to ``deliver``.

    ``failed`` is told, in a sentence, what could not be adopted; the connection is then closed.
    """

    def __init__(
        self,
        wait: Import,
        rendezvous: Rendezvous,
        deliver: Callable[[socket.socket, bytes], None],
        failed: Callable[[str], None],
    ) -> None:
        self._wait, self._rendezvous, self._deliver, self._failed = wait, rendezvous, deliver, failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="importer", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 4 * _LOOK_S) -> None:
        """Take no more sockets; returns when the thread has ended."""
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                got = self._wait(_LOOK_S)
            except OSError as error:
                self._failed(f"import: {error}")
                self._stopping.wait(0.2)
                continue
            for connection, context in got:
                if context:
                    self._adopt(connection, context)
                else:
                    # The former owner may be slow to notice; the others need not wait for it.
                    threading.Thread(target=self._adopt, args=(connection, context), daemon=True).start()

    def _adopt(self, connection: socket.socket, context: bytes) -> None:
        try:
            self._deliver(connection, context or self._rendezvous.take(remote_text(connection)))
        except (TimeoutError, OSError, ValueError) as error:
            self._failed(str(error))
            connection.close()


def adopted(descriptors: Iterable[int]) -> list[socket.socket]:
    """Sockets of inherited descriptors, for instance of ``sockmi import --exec``."""
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
