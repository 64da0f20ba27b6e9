# SPDX-License-Identifier: MIT
"""Which sockets of this host a filter selects, descriptor by descriptor."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from sockmi import api
from sockmi.addresses import Endpoint, parse_network
from sockmi.engine.base import Kind, SocketFacts
from sockmi.engine.listing import Holder, ListedSocket, list_sockets
from sockmi.frozen import frozen
from sockmi.refusal import Code, Refusal


@frozen
class Found:
    """One descriptor of a socket of this host."""

    socket: ListedSocket
    holder: Holder
    unit: str | None


def select(wanted: api.SocketFilter, only_uid: int | None = None) -> list[Found]:
    """All that match; of one user's sockets alone, if ``only_uid`` is given. Takes milliseconds."""
    units: dict[int, str | None] = {}
    found = []

    def fits(one: ListedSocket) -> bool:
        by_uid = only_uid in (None, one.uid)
        return by_uid and _is_like(wanted, kind_of(one), one.state, one.local, one.remote)

    for one in list_sockets(wanted=fits, quiet=wanted.idle_s is not None):
        for holder in one.holders:
            if holder.pid not in units:
                units[holder.pid] = unit_of(holder.pid)
            unit = units[holder.pid]
            if _matches(wanted, one, holder, unit):
                found.append(Found(one, holder, unit))
    return found


def check_filter(wanted: api.SocketFilter) -> None:
    if wanted.fd is not None and wanted.pid is None:
        raise Refusal(Code.BAD_REQUEST, "A filter's fd needs its pid: processes number their own.")
    for text in (wanted.local_address, wanted.remote_address):
        try:
            _network(text or "0.0.0.0/0")
        except ValueError as error:
            raise Refusal(Code.BAD_REQUEST, f"{text!r} is no address and no network: {error}.") from None


def kind_of(listed: ListedSocket) -> Kind:
    if listed.state == "LISTEN":
        return Kind.LISTENING
    return Kind.CONNECTED if listed.remote else Kind.BOUND


def _matches(wanted: api.SocketFilter, listed: ListedSocket, holder: Holder, unit: str | None) -> bool:
    return (
        holder.fd >= 0
        and wanted.pid in (None, holder.pid)
        and wanted.fd in (None, holder.fd)
        and (wanted.idle_s is None or (listed.quiet is not None and listed.quiet.since_s >= wanted.idle_s))
        and (wanted.process is None or fnmatch.fnmatchcase(holder.name, wanted.process))
        and (wanted.unit is None or (unit is not None and fnmatch.fnmatchcase(unit, wanted.unit)))
    )


def names_owner(wanted: api.SocketFilter) -> bool:
    """Whether only what a process has can match."""
    return any(one is not None for one in (wanted.pid, wanted.fd, wanted.process, wanted.unit))


def fits_waiting(wanted: api.SocketFilter, facts: SocketFacts, waits_s: float) -> bool:
    """Whether a socket matches that no process has; ``waits_s``: for so long nothing has come to it."""
    return (
        not names_owner(wanted)
        and (wanted.idle_s is None or waits_s >= wanted.idle_s)
        and fits_any_owner(wanted, facts)
    )


def fits_any_owner(wanted: api.SocketFilter, facts: SocketFacts) -> bool:
    """Whether a socket would match that a process is about to have."""
    return _is_like(wanted, facts.kind, facts.state, facts.local, facts.remote)


def _is_like(
    wanted: api.SocketFilter, kind: Kind, state: str, local: Endpoint | None, remote: Endpoint | None
) -> bool:
    return (
        (wanted.kinds is None or kind in wanted.kinds)
        and (wanted.states is None or state in {one.upper().replace("_", "-") for one in wanted.states})
        and _is_at(local, wanted.local_address, wanted.local_port)
        and _is_at(remote, wanted.remote_address, wanted.remote_port)
    )


def _is_at(end: Endpoint | None, address: str | None, port: int | None) -> bool:
    if end is None:
        return address is None and port is None
    return port in (None, end.port) and (address is None or end.address in _network(address))


@functools.lru_cache(maxsize=64)
def _network(text: str) -> IPv4Network | IPv6Network:
    return parse_network(text)


def unit_of(pid: int) -> str | None:
    """The systemd unit of a process (the last unit in its cgroup path), or None."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            for part in reversed(line.split(":", 2)[2].split("/")):
                if part.endswith((".service", ".scope", ".socket")):
                    return part
    return None
