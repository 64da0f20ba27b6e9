# SPDX-License-Identifier: MIT
"""A small daemon that speaks docs/control.md, for tests of its clients; breaks where it is told to."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

from pydantic import BaseModel

from sockmi import api
from sockmi.refusal import Refusal

Socket = socket.socket
TCP_REPAIR = 19
REPAIR_OFF = 0


@dataclass
class Dormant:
    """A socket in the import list; ``peer`` is the other end of its connection.

    ``name``: what getsockname() says, of one that cannot be asked, as the module keeps it locked.
    """

    socket: Socket
    peer: Socket | None
    kind: str = "connected"
    context: bytes | None = None
    listener: UUID | None = None
    name: tuple[Any, ...] | None = None
    migration_id: UUID = field(default_factory=uuid4)
    claimed: bool = False
    taken: bool = False

    def activate(self) -> None:
        if self.kind == "listening":
            self.socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
            self.socket.listen()
        else:
            self.socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
        self.taken = True


def connection(address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """A live TCP connection: this end, and the peer's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        peer = socket.create_connection(listener.getsockname()[:2], timeout=10)
        here, _unused = listener.accept()
    here.settimeout(10)
    return here, peer


def endpoint(name: tuple[Any, ...]) -> str:
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


class FakeDaemon:
    """Serves in threads. ``break_at`` names a step before or after which a connection is closed.

    Steps: ``accept``, ``request``, ``fds`` (sent them, then closes), ``half-line``,
    ``taken`` (read it, did nothing), ``live`` (activated, did not say so), ``garbage``, ``silent``.
    Exports that are not answered: ``late`` (done), ``unbegun``, ``mute`` (and nothing is known of it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.break_at = ""
        self.activation_refusal: Refusal | None = None
        self.undone = 0  # how many moves are undone when their sockets have been taken
        self.undecided = False  # for longer than the client waits
        self.deciding: threading.Event | None = None  # until it is set, or the client hangs up
        self.refusal: Refusal | None = None
        self.outcomes: dict[str, Any] = {}
        self.listed: list[Dormant] = []
        self.requests: list[Any] = []
        self.contexts: list[bytes] = []
        self.inodes: list[int] = []
        self.records: dict[UUID, dict[str, Any]] = {}
        self.corrupt: Callable[[dict[str, Any], list[int]], None] = lambda _answer, _fds: None
        self.sent_fds = 0
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self._stopping = False
        self._listener: socket.socket

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Listen."""
        self._stopping = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._run(self._accept)

    def stop(self) -> None:
        """Close everything but the import list."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._changed:
            self._changed.notify_all()
            for one in list(self._connections):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def __exit__(self, *_unused: object) -> None:
        self.stop()
        for one in self.listed:
            one.socket.close()
            if one.peer:
                one.peer.close()

    def put(
        self,
        address: str = "127.0.0.1",
        kind: str = "connected",
        context: bytes | None = None,
        listener: UUID | None = None,
    ) -> Dormant:
        """List a dormant socket."""
        peer = None
        if kind == "connected":
            here, peer = connection(address)
        else:
            here = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            here.bind((address, 0))
        here.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        dormant = Dormant(here, peer, kind, context, listener)
        with self._changed:
            self.listed.append(dormant)
            self._changed.notify_all()
        return dormant

    # -- one client

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                one, _unused = self._listener.accept()
            except OSError as error:
                if error.errno == errno.EMFILE:  # the test's doing, whose process this is, too
                    time.sleep(0.01)
                    continue
                return
            if self.break_at == "accept":
                one.close()
                continue
            with self._changed:
                self._connections.add(one)
            self._run(self._serve, one)

    def _serve(self, one: socket.socket) -> None:
        with one, contextlib.suppress(ConnectionError, EOFError, BrokenPipeError):
            for line, fds in self._lines(one):
                try:
                    request = api.parse_request(line)
                except Refusal as refusal:
                    one.sendall(api.error_line(refusal, api.request_id(line)))
                    continue
                assert request.fds == len(fds), (request, fds)
                self.requests.append(request)
                if self.break_at == "request":
                    for fd in fds:
                        os.close(fd)
                    return
                getattr(self, f"_{request.op}")(one, request, fds)
        with self._changed:
            self._connections.discard(one)

    def _lines(self, one: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
        received, fds = b"", array.array("i")
        while True:
            data, ancillary, _unused, _unused = one.recvmsg(
                65536, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                return
            for _unused, _unused, content in ancillary:
                fds.frombytes(content)
            received += data
            while b"\n" in received:
                line, received = received.split(b"\n", 1)
                yield line, list(fds)
                del fds[:]

    def _send(
        self, one: socket.socket, answer: dict[str, Any], fds: list[int], model: type[BaseModel]
    ) -> None:
        if answer["ok"]:
            model.model_validate_json(json.dumps(answer))
        self.corrupt(answer, fds)
        line = json.dumps(answer).encode() + b"\n"
        if self.break_at == "garbage":
            line = b'{"ok": tru\n'
        if self.break_at == "half-line":
            line = line[:-5]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = one.sendmsg([line], rights)
        one.sendall(line[sent:])
        self.sent_fds += len(fds)
        if self.break_at in ("fds", "half-line"):
            raise EOFError

    def _refuse(self, one: socket.socket, refusal: Refusal) -> None:
        one.sendall(api.error_line(refusal))

    # -- ops

    def _record(self, **fields: Any) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat()
        return {"state": None, "from": "a", "to": "b", "started_at": now, "hop": 1, **fields}

    def _match(self, one: Dormant, want: api.ImportCriteria) -> bool:
        if one.claimed:
            return False
        host, port = (one.name or one.socket.getsockname())[:2]
        remote: tuple[Any, ...] = one.peer.getsockname() if one.peer else (None, None)
        return (
            one.kind in want.states
            and want.local_address in (None, host)
            and want.local_port in (None, port)
            and want.remote_address in (None, remote[0])
            and want.remote_port in (None, remote[1])
            and want.listener in (None, one.listener)
        )

    def _choose(self, wants: list[api.ImportCriteria]) -> list[tuple[int, Dormant]]:
        chosen: list[tuple[int, Dormant]] = []
        for index, want in enumerate(wants):
            free = [
                d for d in self.listed if self._match(d, want) and all(d is not c for _unused, c in chosen)
            ]
            free.sort(key=lambda d: d.kind not in want.preferred)
            if free:
                chosen.append((index, free[0]))
        return chosen[:126]

    def _import(self, one: socket.socket, request: api.ImportRequest, _fds: list[int]) -> None:
        if self.refusal:
            return self._refuse(one, self.refusal)
        if self.break_at == "silent":
            with self._changed:
                self._changed.wait_for(lambda: self._stopping)
            return None
        timeout = None if request.timeout_ms < 0 else request.timeout_ms / 1000
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._choose(request.requests), timeout)
            chosen = [] if self._stopping else self._choose(request.requests)
            for _unused, dormant in chosen:
                dormant.claimed = True
        if self._stopping:
            raise EOFError
        items, contexts = [], []
        for index, dormant in chosen:
            if dormant.context is not None:
                contexts.append(os.memfd_create("context", os.MFD_CLOEXEC))
                os.write(contexts[-1], dormant.context)
            local = endpoint(dormant.name or dormant.socket.getsockname())
            remote = endpoint(dormant.peer.getsockname()) if dormant.peer else None
            items.append(
                {
                    "request": index,
                    "family": "inet6" if "[" in local else "inet",
                    "local": local,
                    "remote": remote,
                    "origin": local,
                    "context": dormant.context is not None,
                    "record": self._record(
                        migration_id=str(dormant.migration_id),
                        direction="import",
                        kind=dormant.kind,
                        listener=dormant.listener and str(dormant.listener),
                    ),
                }
            )
        handed = [dormant for _unused, dormant in chosen]
        fds = [dormant.socket.fileno() for dormant in handed] + contexts
        again = False
        try:
            again = self._hand_out(one, {"ok": True, "fds": len(fds), "imported": items}, fds, handed)
        finally:
            for fd in contexts:
                os.close(fd)
            with self._changed:  # what was not taken is put back
                for dormant in handed:
                    dormant.claimed = dormant.taken
                self._changed.notify_all()
        if again:
            self._import(one, request, [])
        return None

    def _hand_out(
        self, one: socket.socket, answer: dict[str, Any], fds: list[int], handed: list[Dormant]
    ) -> bool:
        """Whether the import waits again."""
        self._send(one, answer, fds, api.ImportResponse)
        if handed:
            line, _unused = next(self._lines(one), (b"", []))
            if not line:
                raise EOFError
            return self._taken(one, api.parse_request(line), handed)
        return False

    def _taken(self, one: socket.socket, request: api.TakenRequest, handed: list[Dormant]) -> bool:
        self.requests.append(request)
        if self.break_at == "taken":
            raise EOFError
        if self.deciding is not None:
            while not self.deciding.wait(0.01):
                if select.select([one], [], [], 0)[0]:
                    raise EOFError
        if self.undone or self.undecided:
            for dormant in handed:
                dormant.taken = True  # as dead as taken
                dormant.socket.close()
            again = self.undone > 0
            self.undone -= again
            self._send(one, {"ok": True, "live": [], "failed": [], "waiting": again}, [], api.TakenResponse)
            return again
        live: list[str] = []
        failed: list[dict[str, Any]] = []
        for dormant in handed:
            if dormant.migration_id not in request.migrations:
                continue
            if self.activation_refusal and not failed:
                why = api.Why.of(self.activation_refusal).model_dump(mode="json")
                failed.append({"migration_id": str(dormant.migration_id), "refusal": why})
                continue
            dormant.activate()
            dormant.socket.close()
            live.append(str(dormant.migration_id))
        if self.break_at == "live":
            raise EOFError
        self._send(one, {"ok": True, "live": live, "failed": failed}, [], api.TakenResponse)
        return False

    def _export(self, one: socket.socket, request: api.ExportRequest, fds: list[int]) -> None:
        if self.refusal:
            for fd in fds:
                os.close(fd)
            return self._refuse(one, self.refusal)
        sockets = [item for item in request.sockets if item.descriptor]
        self.inodes += [os.fstat(fd).st_ino for fd in fds[: len(sockets)]]
        for fd in fds[len(sockets) :]:
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 14 == 14
            self.contexts.append(os.pread(fd, 1 << 21, 0))
        for fd in fds:
            os.close(fd)
        if self.break_at in ("unbegun", "mute"):
            return self._stall(one)
        outcome = {"outcome": "planned" if request.dry_run else "moved", **self.outcomes}
        records = []
        for item in request.sockets:
            identity = item.migration_id or uuid4()
            record = self._record(
                migration_id=str(identity), kind="connected", mode="forward", blackout_us=900, **outcome
            )
            self.records[identity] = record
            records.append(record)
        if self.break_at == "live":
            raise EOFError
        if self.break_at == "late":
            return self._stall(one)
        half = len(records) // 2  # a list may come in several lines
        self._send(one, {"ok": True, "more": True, "migrations": records[:half]}, [], api.ExportResponse)
        return self._send(one, {"ok": True, "migrations": records[half:]}, [], api.ExportResponse)

    def _stall(self, one: socket.socket) -> None:
        """Answer nothing; a client that gives up cancels what has not been decided."""
        while one.recv(1 << 16):
            pass
        raise EOFError

    def _info(self, one: socket.socket, request: api.InfoRequest, _fds: list[int]) -> None:
        if self.break_at == "mute":
            self._stall(one)
        found = [self.records[i] for i in request.migration_ids if i in self.records]
        self._send(one, {"ok": True, "migrations": found}, [], api.InfoResponse)

    def _reload(self, one: socket.socket, _request: api.ReloadRequest, _fds: list[int]) -> None:
        self._send(one, {"ok": True, "changed": ["policy"], "restart_needed": []}, [], api.ReloadResponse)

    def _list(self, one: socket.socket, _request: api.ListRequest, _fds: list[int]) -> None:
        for more in (True, True, False):
            self._send(one, {"ok": True, "more": more, "redirects": []}, [], api.ListResponse)
