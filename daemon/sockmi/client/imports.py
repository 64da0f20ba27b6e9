# SPDX-License-Identifier: MIT
"""An import: requests, what comes, and its passage to the caller's descriptors."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sockmi.addresses import Endpoint
from sockmi.client.descriptors import (
    check_protocol,
    copy_blocking,
    fileno,
    option,
    read_context,
    replace,
    tcp_state,
)
from sockmi.client.errors import SockMiError, check, refused, strange
from sockmi.client.link import Link
from sockmi.client.records import MigrationRecord, endpoint
from sockmi.engine.base import Kind
from sockmi.frozen import frozen

REQUESTS_MAX = 4096

_TCP_REPAIR = 19  # include/uapi/linux/tcp.h
_TCP_CLOSE = 7


@frozen
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
        """What is any is left out: `REQUESTS_MAX` of them shall fit into a line."""
        given = {
            "states": list(self.states),
            "preferred": list(self.preferred) or None,
            "local_address": self.local_address,
            "local_port": self.local_port,
            "remote_address": self.remote_address,
            "remote_port": self.remote_port,
            "listener": self.listener and str(self.listener),
        }
        return {name: value for name, value in given.items() if value is not None}


@frozen
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


@frozen
class _Place:
    """A caller's descriptor that is to be replaced, and what it referred to when the call began."""

    fd: int
    inode: int

    @classmethod
    def of(cls, given: socket.socket | int) -> _Place:
        """Raises SockMiError unless it is an unconnected TCP socket."""
        fd = fileno(given)
        check_protocol(fd, f"descriptor {fd} to be replaced")
        if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
            raise SockMiError(errno.EMFILE, f"Descriptor {fd} is beyond RLIMIT_NOFILE.")
        place = cls(fd, os.fstat(fd).st_ino)
        place.check()
        return place

    def check(self) -> None:
        """Raise SockMiError if another thread has connected it, or opened something else in its place."""
        try:
            inode = os.fstat(self.fd).st_ino
        except OSError as error:
            raise SockMiError(error.errno or errno.EIO, f"Descriptor {self.fd}: {error.strerror}") from None
        if inode != self.inode:
            raise SockMiError(errno.EBADF, f"Descriptor {self.fd} is another one by now.")
        if tcp_state(self.fd) != _TCP_CLOSE:
            raise SockMiError(
                errno.EISCONN, f"Descriptor {self.fd} is connected or listening; give a new socket."
            )

    def take(self, fd: int) -> bool:
        """Put ``fd`` there; False if that fails, or would take something else away."""
        try:
            self.check()
        except SockMiError:
            return False
        return replace(fd, self.fd)


async def import_on(
    links: type[Link],
    requests: ImportRequest | Sequence[ImportRequest],
    timeout_s: float | None,
    control: str | os.PathLike[str] | None,
) -> list[Imported]:
    """An import on a link of its own."""
    given = [requests] if isinstance(requests, ImportRequest) else list(requests)
    async with await links.open(control, timeout_s) as link:
        return await importing(link, given, timeout_s)


async def importing(link: Link, requests: Sequence[ImportRequest], timeout_s: float | None) -> list[Imported]:
    """An import. Descriptors given with ``replace`` are untouched until their successors live."""
    timeout_ms = _milliseconds(timeout_s)
    targets = [None if request.replace is None else _Place.of(request.replace) for request in requests]
    named = [target.fd for target in targets if target is not None]
    if not 1 <= len(requests) <= REQUESTS_MAX:
        raise SockMiError(errno.EINVAL, f"{len(requests)} import requests: give 1 to {REQUESTS_MAX}")
    if len(set(named)) != len(named):
        raise SockMiError(errno.EINVAL, "two import requests replace the same descriptor")
    criteria = [request._criteria() for request in requests]
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    link.allow(timeout_s)
    await link.send({"op": "import", "requests": criteria, "timeout_ms": timeout_ms})
    while True:
        link.allow(None if until_s is None else max(0.0, until_s - time.monotonic()))
        result, waiting = await _once(link, requests, targets)
        if not waiting:
            return result


async def _once(
    link: Link, requests: Sequence[ImportRequest], targets: Sequence[_Place | None]
) -> tuple[list[Imported], bool]:
    """One answer, and what becomes of it; whether of nothing, and another answer will come."""
    answer, fds = await link.receive()
    undelivered = set(fds)
    try:
        check(answer)
        arrivals = _arrivals(answer, fds, requests, targets)
        if not arrivals:
            return [], False
        for arrival in arrivals:
            if arrival.target is not None:
                arrival.target.check()
                copy_blocking(arrival.target.fd, arrival.fd)
        live, failure, waiting = await _taking(link, arrivals)
        # From here on nothing may be lost: the sockets are live.
        result = []
        for arrival in arrivals:
            if arrival.record.migration_id in live:
                undelivered.discard(arrival.fd)
                result.append(arrival.deliver())
        if not result and link.interrupted is not None:
            raise link.interrupted
        if failure is not None and not result:
            raise failure
        return result, waiting
    finally:
        for fd in undelivered:
            os.close(fd)


@dataclass(slots=True)
class _Arrival:
    request: int
    target: _Place | None
    fd: int
    kind: Kind
    local: Endpoint | None
    remote: Endpoint | None
    origin: Endpoint | None
    context: bytes
    record: MigrationRecord

    def is_live(self) -> bool:
        """Whether it came to life although the daemon could not say so."""
        # A dormant copy of the kernel engine is locked until the daemon's end is complete. TCP_INFO reads the
        # state first and waits for the lock then (net/ipv4/tcp.c, tcp_get_info()): its second answer counts.
        tcp_state(self.fd)
        if self.kind is Kind.LISTENING:
            return option(self.fd, socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        if option(self.fd, socket.IPPROTO_TCP, _TCP_REPAIR):
            return False
        # Copies that the kernel engine has made end with the daemon: closed, and bound no more.
        if self.kind is Kind.CONNECTED:
            return tcp_state(self.fd) != _TCP_CLOSE
        return not (self.local and self.local.port) or self._is_bound()

    def _is_bound(self) -> bool:
        view = socket.socket(fileno=self.fd)
        try:
            return bool(view.getsockname()[1])
        finally:
            view.detach()

    def deliver(self) -> Imported:
        """Put it in the place of the descriptor it replaces, or into a socket object."""
        made, fd = None, self.fd
        if self.target is not None and self.target.take(self.fd):
            fd = self.target.fd
        else:
            made = socket.socket(fileno=self.fd)
            made.settimeout(socket.getdefaulttimeout())  # the daemon's descriptors never wait
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
    targets: Sequence[_Place | None],
) -> list[_Arrival]:
    items = answer.get("imported")
    if not isinstance(items, list):
        raise strange("it has no list of sockets")
    if sum(1 + bool(item.get("context")) for item in items) != len(fds):
        raise strange(f"{len(items)} sockets came with {len(fds)} descriptors")
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
                endpoint(item["local"]),
                endpoint(item["remote"]),
                endpoint(item["origin"]),
                read_context(next(contexts)) if item.get("context") else b"",
                MigrationRecord.from_json(item["record"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise strange(f"an imported socket is wrong: {error!r}") from None
        if arrival.kind not in requests[index].states or any(one.request == index for one in arrivals):
            raise strange("a socket came that was not asked for")
        arrivals.append(arrival)
    return arrivals


async def _taking(link: Link, arrivals: Sequence[_Arrival]) -> tuple[set[UUID], SockMiError | None, bool]:
    """Have them activated: which live, why others do not, and whether the import waits again."""
    try:
        await link.send({"op": "taken", "migrations": [str(one.record.migration_id) for one in arrivals]})
        answer, fds = await link.receive(firm=True)
        for fd in fds:
            os.close(fd)
        check(answer)
        live = {UUID(one) for one in answer["live"]}
        why = answer["failed"][0]["refusal"] if answer.get("failed") else None
    except (SockMiError, KeyError, TypeError, ValueError) as error:
        live = {one.record.migration_id for one in arrivals if one.is_live()}
        return live, error if isinstance(error, SockMiError) else strange(repr(error)), False
    return live, refused(why) if why else None, answer.get("waiting") is True


def _milliseconds(timeout_s: float | None) -> int:
    """Seconds as poll(2) counts; None is for ever."""
    if timeout_s is None:
        return -1
    if not 0 <= timeout_s < float("inf"):
        raise SockMiError(errno.EINVAL, f"timeout_s is {timeout_s}: give seconds from 0, or None for ever")
    return min(round(timeout_s * 1000), 0x7FFFFFFF)
