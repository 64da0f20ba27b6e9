# SPDX-License-Identifier: MIT
"""The Python API: import and export live TCP sockets through this host's daemon.

    import sockmi

    record = sockmi.export_socket(connection, to="b", context=session)      # on host a
    [arrived] = sockmi.import_socket(sockmi.ImportRequest(["connected"]))   # on host b
    arrived.socket.sendall(...)

Asyncio forms are in `sockmi.aio`. The protocol is docs/control.md; what it takes to import or to
export is written once, as generators that do no waiting (`importing`, `exporting`), and driven by
`Control` here and by its like in `sockmi.aio`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from uuid import UUID, uuid4

from sockmi.addresses import Endpoint
from sockmi.engine.base import Fidelity, Kind
from sockmi.engine.duplicate import pidfd_getfd

CONTROL_PATH = "/run/sockmi/control.sock"
LINE_BYTES_MAX = 1 << 20
DESCRIPTORS_MAX = 253
CONTEXT_BYTES_MAX = 1 << 20
REQUESTS_MAX = 4096

_GRACE_S = 2.0  # how much later than asked the daemon may answer
_RECONNECT_S = 10.0  # how long to look for a daemon that restarts, to learn an outcome
_RECONNECT_PAUSE_S = 0.05
_TCP_REPAIR = 19  # include/uapi/linux/tcp.h
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SockMiError(OSError):
    """A call failed; ``errno`` and ``strerror`` as in C, ``code`` is the refusal code or ""."""

    def __init__(self, errnum: int, message: str, code: str = "") -> None:
        super().__init__(errnum, message)
        self.code = code


class MigrationError(SockMiError):
    """An export was refused, undone or failed; ``record`` says all that is known."""

    def __init__(self, errnum: int, message: str, code: str, record: MigrationRecord) -> None:
        super().__init__(errnum, message, code)
        self.record = record


class _Broken(SockMiError):
    """The daemon went away in the middle."""

    def __init__(self, message: str = "The SockMi daemon closed the connection; see its log.") -> None:
        super().__init__(errno.ECONNRESET, message)


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """One migration; see "The migration record" in docs/control.md.

    ``source`` and ``target`` are the hosts' names (``from`` and ``to`` in JSON); ``outcome`` is moved,
    refused, aborted, failed, planned, or None while under way; ``code`` and ``message`` say why not moved.
    """

    migration_id: UUID
    batch_id: UUID | None
    kind: Kind | None
    state: str | None
    local: Endpoint | None
    remote: Endpoint | None
    source: str
    target: str | None
    started_at: datetime
    step: str
    outcome: str | None
    code: str
    message: str
    errno: int
    blackout_us: int | None
    receive_queue_bytes: int
    sent_bytes: int
    unsent_bytes: int
    context_bytes: int
    mode: str | None
    hop: int
    listener: UUID | None
    fidelity: Fidelity

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> MigrationRecord:
        """The record in a response. Raises SockMiError (EPROTO) if it is not one."""
        why = record.get("refusal") or {}
        try:
            return cls(
                migration_id=UUID(record["migration_id"]),
                batch_id=_uuid(record.get("batch_id")),
                kind=Kind(record["kind"]) if record.get("kind") else None,
                state=record.get("state"),
                local=_endpoint(record.get("local")),
                remote=_endpoint(record.get("remote")),
                source=record["from"],
                target=record.get("to"),
                started_at=datetime.fromisoformat(record["started_at"]),
                step=record.get("step", "selected"),
                outcome=record.get("outcome"),
                code=why.get("code", ""),
                message=why.get("message", ""),
                errno=_errno(why.get("errno")) if why else 0,
                blackout_us=record.get("blackout_us"),
                receive_queue_bytes=record.get("receive_queue_bytes", 0),
                sent_bytes=record.get("sent_bytes", 0),
                unsent_bytes=record.get("unsent_bytes", 0),
                context_bytes=record.get("context_bytes", 0),
                mode=record.get("mode"),
                hop=record.get("hop", 0),
                listener=_uuid(record.get("listener")),
                fidelity=Fidelity(**(record.get("fidelity") or {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _strange(f"a record is wrong: {error!r}") from None

    @property
    def succeeded(self) -> bool:
        """Whether it moved, or a dry run found no obstacle."""
        return self.outcome in ("moved", "planned")


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import: one socket in one of ``states`` that matches every criterion given.

    Addresses and ports are those that the peer knows; None matches all. ``preferred`` states
    are taken first. ``listener``: only connections from the accept queue of this migrated
    listener. ``replace``: an unconnected TCP socket (or descriptor) whose descriptor the
    imported socket shall take over in place; without it a new socket object is made.
    """

    states: Collection[Kind | str] = tuple(Kind)
    preferred: Collection[Kind | str] = ()
    local_address: str | None = None
    local_port: int | None = None
    remote_address: str | None = None
    remote_port: int | None = None
    listener: UUID | None = None
    replace: socket.socket | int | None = None

    def __post_init__(self) -> None:
        for name in ("states", "preferred"):
            given = getattr(self, name)
            try:
                kinds = tuple(Kind(one) for one in ([given] if isinstance(given, str) else given))
            except ValueError as error:
                raise ValueError(f"{name}: {error}; use bound, listening, connected") from None
            object.__setattr__(self, name, kinds)
        if not self.states:
            raise ValueError("states is empty: give at least one of bound, listening, connected")
        if not set(self.preferred) <= set(self.states):
            raise ValueError("preferred must be among states")
        if (self.remote_address or self.remote_port) and Kind.CONNECTED not in self.states:
            raise ValueError("only connected sockets have a remote end")

    def _criteria(self) -> dict[str, Any]:
        return {
            "states": list(self.states),
            "preferred": list(self.preferred),
            "local_address": self.local_address,
            "local_port": self.local_port,
            "remote_address": self.remote_address,
            "remote_port": self.remote_port,
            "listener": self.listener and str(self.listener),
        }


@dataclass(frozen=True, slots=True)
class Imported:
    """A socket that now lives here.

    ``request``: index of the request it satisfies. ``socket``: None if it replaced a descriptor in
    place. ``fd``: its descriptor. ``local`` and ``remote`` are its own ends, ``origin`` is the
    local end as the peer knows it. ``context``: what the exporter's application sent along.
    """

    request: int
    socket: socket.socket | None
    fd: int
    kind: Kind
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None
    context: bytes
    record: MigrationRecord


@dataclass(frozen=True, slots=True)
class Export:
    """One socket to export: a socket or descriptor, of this process or of ``pid``."""

    socket: socket.socket | int
    pid: int | None = None
    context: bytes | bytearray | memoryview = b""
    migration_id: UUID = field(default_factory=uuid4)


# ---------------------------------------------------------------- what drivers are asked to do


@dataclass(frozen=True, slots=True)
class Send:
    """Send this message with these descriptors."""

    message: dict[str, Any]
    fds: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive a message and its descriptors; ``firm``: a cancellation comes too late now."""

    firm: bool = False


def importing(
    requests: Sequence[ImportRequest], timeout_ms: int
) -> Generator[Send | Receive, Any, list[Imported]]:
    """An import. Descriptors given with ``replace`` are untouched until their successors live."""
    targets = [_target(request.replace) for request in requests]
    named = [target for target in targets if target is not None]
    if not 1 <= len(requests) <= REQUESTS_MAX:
        raise SockMiError(errno.EINVAL, f"{len(requests)} import requests: give 1 to {REQUESTS_MAX}")
    if len(set(named)) != len(named):
        raise SockMiError(errno.EINVAL, "two import requests replace the same descriptor")
    criteria = [request._criteria() for request in requests]
    yield Send({"op": "import", "requests": criteria, "timeout_ms": timeout_ms})
    answer, fds = yield Receive()
    undelivered = set(fds)
    try:
        _check(answer)
        arrivals = _arrivals(answer, fds, requests, targets)
        if not arrivals:
            return []
        for arrival in arrivals:
            if arrival.target is not None:
                _copy_blocking(arrival.target, arrival.fd)
        live, failure = yield from _taking(arrivals)
        # From here on nothing may be lost: the sockets are live.
        result = []
        for arrival in arrivals:
            if arrival.record.migration_id in live:
                undelivered.discard(arrival.fd)
                result.append(arrival.deliver())
        if not result:
            raise failure
        return result
    finally:
        for fd in undelivered:
            os.close(fd)


@dataclass(slots=True)
class _Arrival:
    request: int
    target: int | None
    fd: int
    kind: Kind
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None
    context: bytes
    record: MigrationRecord

    def is_live(self) -> bool:
        """Whether it came to life although the daemon could not say so."""
        with _view(self.fd) as view:
            if self.kind is Kind.LISTENING:
                return view.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
            return view.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == 0

    def deliver(self) -> Imported:
        """Put it in the place of the descriptor it replaces, or into a socket object."""
        made, fd = None, self.fd
        if self.target is not None and _replace(self.fd, self.target):
            fd = self.target
        else:
            made = socket.socket(fileno=self.fd)
        return Imported(
            request=self.request,
            socket=made,
            fd=fd,
            kind=self.kind,
            local=self.local,
            remote=self.remote,
            origin=self.origin,
            context=self.context,
            record=self.record,
        )


def _arrivals(
    answer: dict[str, Any],
    fds: Sequence[int],
    requests: Sequence[ImportRequest],
    targets: Sequence[int | None],
) -> list[_Arrival]:
    items = answer.get("imported")
    if not isinstance(items, list):
        raise _strange("it has no list of sockets")
    if sum(1 + bool(item.get("context")) for item in items) != len(fds):
        raise _strange(f"{len(items)} sockets came with {len(fds)} descriptors")
    contexts = iter(fds[len(items) :])
    arrivals: list[_Arrival] = []
    for item, fd in zip(items, fds, strict=False):
        try:
            index = int(item["request"])
            arrival = _Arrival(
                index,
                targets[index] if index >= 0 else targets[len(targets)],
                fd,
                Kind(item["record"]["kind"]),
                _endpoint(item["local"]),
                _endpoint(item["remote"]),
                _endpoint(item["origin"]),
                _read_context(next(contexts)) if item.get("context") else b"",
                MigrationRecord.from_json(item["record"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise _strange(f"an imported socket is wrong: {error!r}") from None
        if arrival.kind not in requests[index].states or any(one.request == index for one in arrivals):
            raise _strange("a socket came that was not asked for")
        arrivals.append(arrival)
    return arrivals


def _taking(
    arrivals: Sequence[_Arrival],
) -> Generator[Send | Receive, Any, tuple[set[UUID], SockMiError]]:
    try:
        yield Send({"op": "taken", "migrations": [str(one.record.migration_id) for one in arrivals]})
        answer, fds = yield Receive(firm=True)
        for fd in fds:
            os.close(fd)
        _check(answer)
        live = {UUID(one) for one in answer["live"]}
        why = answer["failed"][0]["refusal"] if answer.get("failed") else {}
    except (SockMiError, KeyError, TypeError, ValueError) as error:
        live = {one.record.migration_id for one in arrivals if one.is_live()}
        return live, error if isinstance(error, SockMiError) else _strange(repr(error))
    return live, _refused(why)


def exporting(
    exports: Sequence[Export], to: str | None, timeout_s: float | None, dry_run: bool
) -> Generator[Send | Receive, Any, list[MigrationRecord]]:
    """An export of sockets, in one request: at most `DESCRIPTORS_MAX` with their contexts."""
    with contextlib.ExitStack() as duplicates:
        sockets, contexts, items = [], [], []
        for export in exports:
            sockets.append(_duplicate(export))
            duplicates.callback(_close, sockets[-1])
            if len(export.context):
                contexts.append(_seal_context(export.context))
                duplicates.callback(_close, contexts[-1])
            items.append(
                {
                    "pid": export.pid or os.getpid(),
                    "fd": _fileno(export.socket),
                    "descriptor": True,
                    "context": bool(len(export.context)),
                    "migration_id": str(export.migration_id),
                }
            )
        fds = [*sockets, *contexts]
        if not 1 <= len(fds) <= DESCRIPTORS_MAX:
            raise SockMiError(
                errno.EINVAL, f"{len(fds)} descriptors: 1 to {DESCRIPTORS_MAX} fit in one export"
            )
        yield Send(
            {
                "op": "export",
                "fds": len(fds),
                "sockets": items,
                "to": to,
                "timeout_s": timeout_s,
                "dry_run": dry_run,
            },
            fds,
        )
        # Here the duplicates are closed: the daemon must not find us among the sockets' owners.
    records = yield from _records()
    if [one.migration_id for one in records] != [one.migration_id for one in exports]:
        raise _strange("its records are not those of the sockets")
    return records


def asking(ids: Sequence[UUID], wait_s: float) -> Generator[Send | Receive, Any, list[MigrationRecord]]:
    """What became of these migrations; unknown ones are left out."""
    yield Send({"op": "info", "migration_ids": [str(one) for one in ids], "wait_s": wait_s})
    return (yield from _records())


def _records() -> Generator[Send | Receive, Any, list[MigrationRecord]]:
    records: list[MigrationRecord] = []
    more = True
    while more:
        answer, fds = yield Receive()
        for fd in fds:
            os.close(fd)
        _check(answer)
        records += map(MigrationRecord.from_json, answer.get("migrations", ()))
        more = bool(answer.get("more"))
    return records


def answered(exports: Sequence[Export], known: Sequence[MigrationRecord]) -> list[MigrationRecord] | None:
    """The records of exports whose connection broke; None while some are under way.

    Raises SockMiError (ECONNRESET) if the daemon never began one of them.
    """
    by_id = {record.migration_id: record for record in known}
    if any(record.outcome is None for record in known):
        return None
    missing = [one.migration_id for one in exports if one.migration_id not in by_id]
    if missing:
        raise SockMiError(
            errno.ECONNRESET,
            f"The SockMi daemon went away before it began {len(missing)} of {len(exports)} exports; "
            "their sockets are as they were.",
        )
    return [by_id[one.migration_id] for one in exports]


def concluded(record: MigrationRecord) -> MigrationRecord:
    """``record`` if it succeeded; raises MigrationError otherwise."""
    if not record.succeeded:
        raise MigrationError(record.errno or errno.EIO, record.message, record.code, record)
    return record


# ---------------------------------------------------------------- lines and descriptors


class Lines:
    """Received bytes and descriptors, cut into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._searched = 0
        self._fds: deque[int] = deque()

    def receive(self, connection: socket.socket) -> None:
        """Read what is there; raises BlockingIOError, or SockMiError at the end."""
        space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = connection.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            raise _Broken from None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise SockMiError(errno.EMFILE, "Not all descriptors that the daemon sent could be received.")
        if not data:
            raise _Broken
        self._bytes += data

    def next(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, None if it is not yet complete."""
        end = self._bytes.find(b"\n", self._searched)
        if (len(self._bytes) if end < 0 else end) >= LINE_BYTES_MAX:
            raise _strange("it is longer than a line may be")
        if end < 0:
            self._searched = len(self._bytes)
            return None
        line = bytes(self._bytes[:end])
        del self._bytes[: end + 1]
        self._searched = 0
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise _strange("it is no JSON object")
        count = message.get("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise _strange(f"it says {count!r} descriptors, {len(self._fds)} came")
        return message, [self._fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close descriptors that nobody took."""
        while self._fds:
            os.close(self._fds.popleft())


def encode(send: Send) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """Line and ancillary data of a message. Raises SockMiError (EMSGSIZE)."""
    line = json.dumps(send.message, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise SockMiError(errno.EMSGSIZE, "The request is longer than a line of the control socket may be.")
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", send.fds).tobytes())
    return line, [rights] if send.fds else []


def control_path(control: str | os.PathLike[str] | None) -> str:
    """Path of the control socket: the argument, ``$SOCKMI_CONTROL``, or the default."""
    return os.fspath(control) if control else os.environ.get("SOCKMI_CONTROL") or CONTROL_PATH


def connection_error(path: str, error: OSError) -> SockMiError:
    """What to tell when the daemon cannot be reached."""
    return SockMiError(
        error.errno or errno.EIO,
        f"{path}: {error.strerror or error}. Is the SockMi daemon running, and may you use it?",
    )


class Control:
    """A connection to the daemon, for one thread; a context manager.

    ``call`` is for all that has no function of its own: list, status, history, drain ...
    Closing the connection cancels what is under way on it.
    """

    def __init__(self, control: str | os.PathLike[str] | None = None, timeout_s: float | None = None) -> None:
        """Connect. Raises SockMiError (ENOENT, ECONNREFUSED, EACCES ...)."""
        path = control_path(control)
        self._lines = Lines()
        self._deadline: float | None = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connection.settimeout(timeout_s)
            self._connection.connect(path)
        except OSError as error:
            self._connection.close()
            raise connection_error(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()
        self._lines.close()

    def call(self, op: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Send a request; yield the response's lines. Raises SockMiError for an error response."""
        self._send(Send({"op": op, **fields}))
        more = True
        while more:
            answer, fds = self._receive()
            for fd in fds:
                os.close(fd)
            _check(answer)
            more = bool(answer.get("more"))
            yield answer

    def run(self, exchange: Generator[Send | Receive, Any, Any], timeout_s: float | None = None) -> Any:
        """Drive a generator to its end; gives up ``timeout_s`` (and a little) after the start."""
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s + _GRACE_S
        with contextlib.closing(exchange):
            try:
                step = next(exchange)
                while True:
                    try:
                        result = None
                        if isinstance(step, Send):
                            self._send(step)
                        else:
                            result = self._receive(step.firm)
                    except SockMiError as error:
                        step = exchange.throw(error)
                    else:
                        step = exchange.send(result)
            except StopIteration as end:
                return end.value

    def _wait(self, firm: bool = False) -> None:
        left = None
        if self._deadline is not None and not firm:
            left = max(self._deadline - time.monotonic(), 0.001)
        self._connection.settimeout(left)

    def _send(self, send: Send) -> None:
        line, rights = encode(send)
        self._wait()
        try:
            sent = self._connection.sendmsg([line], rights, socket.MSG_NOSIGNAL)
            while sent < len(line):
                sent += self._connection.send(line[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise _silent() from None
        except ConnectionError:
            raise _Broken from None
        except OSError as error:
            raise SockMiError(error.errno or errno.EIO, f"sending to the SockMi daemon: {error}") from None

    def _receive(self, firm: bool = False) -> tuple[dict[str, Any], list[int]]:
        while (message := self._lines.next()) is None:
            self._wait(firm)
            try:
                self._lines.receive(self._connection)
            except TimeoutError:
                raise _silent() from None
        return message


# ---------------------------------------------------------------- the calls


def import_socket(
    requests: ImportRequest | Sequence[ImportRequest],
    timeout_s: float | None = None,
    *,
    control: str | os.PathLike[str] | None = None,
) -> list[Imported]:
    """Wait until at least one request can be satisfied, and import as many as can be.

    ``timeout_s``: None for ever, 0 not at all; then the list is empty. Raises SockMiError;
    then nothing was imported and descriptors to be replaced are as they were.
    """
    given = [requests] if isinstance(requests, ImportRequest) else list(requests)
    with Control(control, timeout_s=None if timeout_s is None else timeout_s + _GRACE_S) as connection:
        result: list[Imported] = connection.run(importing(given, milliseconds(timeout_s)), timeout_s)
        return result


def export_sockets(
    exports: Sequence[Export],
    to: str | None = None,
    *,
    timeout_s: float | None = None,
    dry_run: bool = False,
    control: str | os.PathLike[str] | None = None,
) -> list[MigrationRecord]:
    """Move sockets in one batch; a record for each, in order, also of those refused.

    ``to``: address, name or id of the importing host; None: any. If the daemon goes away in
    the middle its successor is asked for the outcome.
    """
    try:
        with Control(control) as connection:
            result: list[MigrationRecord] = connection.run(
                exporting(exports, to, timeout_s, dry_run), timeout_s
            )
            return result
    except _Broken:
        return _learn(exports, control)


def _learn(exports: Sequence[Export], control: str | os.PathLike[str] | None) -> list[MigrationRecord]:
    deadline = time.monotonic() + _RECONNECT_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            with Control(control) as connection:
                known = connection.run(asking([one.migration_id for one in exports], left), left)
        except SockMiError as error:
            if error.code or error.errno not in (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT):
                raise
        else:
            if (records := answered(exports, known)) is not None:
                return records
        time.sleep(_RECONNECT_PAUSE_S)
    raise unknown_outcome()


def unknown_outcome() -> SockMiError:
    """The daemon went away in the middle of an export and does not come back."""
    return SockMiError(
        errno.ECONNRESET,
        "The SockMi daemon went away and does not come back; whether the socket has moved is not known. "
        "Ask `sockmi history` when it runs again.",
    )


def export_socket(
    sock: socket.socket | int,
    *,
    pid: int | None = None,
    to: str | None = None,
    context: bytes | bytearray | memoryview = b"",
    timeout_s: float | None = None,
    dry_run: bool = False,
    migration_id: UUID | None = None,
    control: str | os.PathLike[str] | None = None,
) -> MigrationRecord:
    """Move one socket: ``sock`` of this process, or descriptor ``sock`` of process ``pid``.

    Raises MigrationError if it has not moved, SockMiError if the daemon could not be asked.
    After it moved, ``sock`` is a dead descriptor, still to be closed.
    """
    export = Export(sock, pid, context, migration_id or uuid4())
    [record] = export_sockets([export], to, timeout_s=timeout_s, dry_run=dry_run, control=control)
    return concluded(record)


# ---------------------------------------------------------------- small parts


def milliseconds(timeout_s: float | None) -> int:
    """Seconds as poll(2) counts; None is for ever."""
    if timeout_s is None:
        return -1
    if not 0 <= timeout_s < float("inf"):
        raise SockMiError(errno.EINVAL, f"timeout_s is {timeout_s}: give seconds from 0, or None for ever")
    return min(round(timeout_s * 1000), 0x7FFFFFFF)


def _uuid(text: str | None) -> UUID | None:
    return UUID(text) if text else None


def _endpoint(text: str | None) -> Endpoint | None:
    return Endpoint.parse(text) if text else None


def _errno(name: str | None) -> int:
    return int(getattr(errno, name or "", errno.EIO))


def _strange(what: str) -> SockMiError:
    return SockMiError(errno.EPROTO, f"The SockMi daemon's answer is not as specified: {what}.")


def _silent() -> SockMiError:
    return SockMiError(errno.ETIMEDOUT, "The SockMi daemon does not answer; see its log.")


def _refused(why: dict[str, Any]) -> SockMiError:
    return SockMiError(
        _errno(why.get("errno")),
        str(why.get("message", "The socket could not be activated.")),
        str(why.get("code", "internal")),
    )


def _check(answer: dict[str, Any]) -> None:
    if answer.get("ok") is True:
        return
    error = answer.get("error")
    if not isinstance(error, dict) or not {"code", "message"} <= set(error):
        raise _strange("it has neither ok nor an error")
    raise _refused(error)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _fileno(sock: socket.socket | int) -> int:
    fd = sock if isinstance(sock, int) else sock.fileno()
    if fd < 0:
        raise SockMiError(errno.EBADF, "The socket is closed.")
    return fd


def _view(fd: int) -> socket.socket:
    """A socket object for a duplicate of ``fd``."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _replace(fd: int, target: int) -> bool:
    """Put ``fd`` in the place of ``target``, which keeps its close-on-exec flag; False if that fails."""
    while True:
        try:
            os.dup2(fd, target, inheritable=os.get_inheritable(target))
        except OSError as error:
            if error.errno == errno.EBUSY:  # another thread is opening this number
                continue
            return False
        os.close(fd)
        return True


def _copy_blocking(source: int, to: int) -> None:
    try:
        os.set_blocking(to, os.get_blocking(source))
    except OSError as error:
        raise SockMiError(error.errno or errno.EIO, f"Descriptor {source}: {error.strerror}") from None


def _protocol(fd: int, what: str) -> None:
    try:
        with _view(fd) as view:
            protocol = view.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    except OSError as error:
        raise SockMiError(error.errno or errno.EIO, f"{what}: {error.strerror}") from None
    if protocol != socket.IPPROTO_TCP:
        raise SockMiError(errno.EPROTOTYPE, f"{what} is not a TCP socket.")


def _target(replace: socket.socket | int | None) -> int | None:
    if replace is None:
        return None
    fd = _fileno(replace)
    _protocol(fd, f"descriptor {fd} to be replaced")
    with _view(fd) as view:
        state = view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state != 7:  # TCP_CLOSE
        raise SockMiError(errno.EISCONN, f"Descriptor {fd} is connected or listening; give a new socket.")
    if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        raise SockMiError(errno.EMFILE, f"Descriptor {fd} is beyond RLIMIT_NOFILE.")
    return fd


def _duplicate(export: Export) -> int:
    fd = _fileno(export.socket)
    what = f"Descriptor {fd}" + (f" of process {export.pid}" if export.pid else "")
    if export.pid is not None and export.pid <= 0:
        raise SockMiError(errno.EINVAL, f"pid is {export.pid}: give a process's id, or None for this process")
    try:
        if export.pid in (None, os.getpid()):
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        else:
            copy = pidfd_getfd(export.pid or 0, fd)
    except OSError as error:
        hint = ": you may not trace that process" if error.errno == errno.EPERM else f": {error.strerror}"
        raise SockMiError(error.errno or errno.EIO, what + hint) from None
    try:
        _protocol(copy, what)
    except SockMiError:
        os.close(copy)
        raise
    return copy


def _seal_context(context: bytes | bytearray | memoryview) -> int:
    view = memoryview(context).cast("B")
    if len(view) > CONTEXT_BYTES_MAX:
        raise SockMiError(
            errno.EMSGSIZE, f"The context has {len(view)} bytes; at most {CONTEXT_BYTES_MAX} travel."
        )
    fd = os.memfd_create("sockmi-context", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _read_context(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > CONTEXT_BYTES_MAX:
        raise _strange(f"a context of {size} bytes")
    content = os.pread(fd, size, 0)
    if len(content) != size:
        raise _strange("a context cannot be read")
    return content
