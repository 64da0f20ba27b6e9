# SPDX-License-Identifier: MIT
"""The requests."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field, model_validator

from sockmi.api.fields import DESCRIPTORS_MAX, AddressText, Count, EndpointText, Model, Name, Port, Seconds
from sockmi.api.records import Direction, Outcome, SocketFilter
from sockmi.engine.base import Kind


class _Request(Model):
    id: str | int | None = None
    fds: Annotated[int, Field(ge=0, le=DESCRIPTORS_MAX)] = 0


class ExportItem(Model):
    """One socket to export.

    ``listed``: it waits in an import list of this host; the migration id of its import.
    ``descriptor``: it comes with this line; ``pid`` and ``fd`` then only say whose it is.
    Without it the daemon takes it from ``pid`` and ``fd``, for administrators only.
    ``context``: a sealed memfd comes with this line. ``migration_id``: makes it idempotent.
    ``inode``, ``received_bytes``: as ``list`` has said; it stays if it is another socket by now, or if its
    owner has read more since.
    """

    pid: Annotated[int, Field(ge=1)] | None = None
    fd: Count | None = None
    descriptor: bool = False
    context: bool = False
    migration_id: UUID | None = None
    inode: Count | None = None
    received_bytes: Count | None = None
    listed: UUID | None = None

    @model_validator(mode="after")
    def _named(self) -> ExportItem:
        if self.listed is not None:
            others = self.descriptor, self.context, self.pid is not None, self.fd is not None
            if any((*others, self.inode is not None, self.received_bytes is not None)):
                raise ValueError("listed names a socket that no process has; only migration_id goes with it")
            return self
        if not self.descriptor and (self.pid is None or self.fd is None):
            raise ValueError("a socket without a descriptor needs pid and fd")
        if self.descriptor and self.inode is not None:
            raise ValueError("inode is for a socket without a descriptor")
        return self


class ExportRequest(_Request):
    """Move sockets away; ``to``: a host's name, id or address, None for any."""

    op: Literal["export"] = "export"
    sockets: Annotated[list[ExportItem], Field(min_length=1, max_length=4096)]
    to: Name | None = None
    timeout_s: Seconds | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _counted(self) -> ExportRequest:
        needed = sum(item.descriptor + item.context for item in self.sockets)
        if needed != self.fds:
            raise ValueError(f"the sockets need {needed} descriptors, but fds is {self.fds}")
        return self


class ImportCriteria(Model):
    """What one import request wants; None matches all.

    Addresses and ports are those that the peer knows. ``preferred`` orders the choice where
    several sockets match. ``listener``: only connections that came from this listener's queue.
    """

    states: Annotated[list[Kind], Field(min_length=1)]
    preferred: list[Kind] = []
    local_address: AddressText | None = None
    local_port: Port | None = None
    remote_address: AddressText | None = None
    remote_port: Port | None = None
    listener: UUID | None = None

    @model_validator(mode="after")
    def _subset(self) -> ImportCriteria:
        stray = set(self.preferred) - set(self.states)
        if stray:
            raise ValueError(f"preferred {sorted(stray)} is not among states")
        if (self.remote_address or self.remote_port) and Kind.CONNECTED not in self.states:
            raise ValueError("only connected sockets have a remote end")
        return self


class ImportRequest(_Request):
    """Take sockets, one per entry of ``requests`` at most. ``timeout_ms`` as in poll(2)."""

    op: Literal["import"] = "import"
    requests: Annotated[list[ImportCriteria], Field(min_length=1, max_length=4096)]
    timeout_ms: Annotated[int, Field(ge=-1, le=0x7FFFFFFF)] = -1


class TakenRequest(_Request):
    """The answer to the descriptors of an import: these the client keeps."""

    op: Literal["taken"] = "taken"
    migrations: list[UUID]


class Table(StrEnum):
    """What ``list`` lists."""

    SOCKETS = "sockets"
    IMPORTS = "imports"
    REDIRECTS = "redirects"


class ListRequest(_Request):
    """Rows of one table; ``filter`` is for sockets, and for those that wait in the import lists."""

    op: Literal["list"] = "list"
    table: Table = Table.SOCKETS
    filter: SocketFilter = SocketFilter()


class StatusRequest(_Request):
    """The state of the daemon."""

    op: Literal["status"] = "status"


class InfoRequest(_Request):
    """Migrations by id, or all under way; ``wait_s``: answer when all have an outcome, at most so late."""

    op: Literal["info"] = "info"
    migration_ids: Annotated[list[UUID], Field(max_length=4096)] = []
    wait_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0


class HistoryRequest(_Request):
    """Ended migrations of the journal, latest first."""

    op: Literal["history"] = "history"
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    outcomes: list[Outcome] | None = None
    direction: Direction | None = None
    batch_id: UUID | None = None
    host: Name | None = None
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 100


class DrainRequest(_Request):
    """Export all sockets that ``filter`` selects, with progress. For administrators."""

    op: Literal["drain"] = "drain"
    filter: SocketFilter = SocketFilter()
    to: Name | None = None
    rate_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    timeout_s: Seconds | None = None
    dry_run: bool = False


class GroupsAction(StrEnum):
    """What to do with groups."""

    LIST = "list"
    JOIN = "join"
    LEAVE = "leave"
    FORGET = "forget"


class GroupsRequest(_Request):
    """List, join or leave groups, or forget a host that never comes back. All but listing are for
    administrators.

    ``address`` is a multicast address; without it ``peers`` (``ADDRESS:PORT``) names the members.
    ``host_id``: of the host to forget. ``force``: leave a group though it stands in the configuration.
    """

    op: Literal["groups"] = "groups"
    action: GroupsAction = GroupsAction.LIST
    name: Name | None = None
    address: AddressText | None = None
    port: Port | None = None
    interface: Name | None = None
    peers: list[EndpointText] | None = None
    key_file: Name | None = None
    force: bool = False
    host_id: (
        Annotated[str, Field(pattern=r"^[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}$")] | None
    ) = None

    @model_validator(mode="after")
    def _complete(self) -> GroupsRequest:
        if (self.action is GroupsAction.FORGET) != (self.host_id is not None):
            raise ValueError("forget needs host_id, the id of the host (`sockmi groups`); nothing else does")
        if self.action in (GroupsAction.JOIN, GroupsAction.LEAVE) and self.name is None:
            raise ValueError(f"{self.action} needs the group's name")
        if self.force and self.action is not GroupsAction.LEAVE:
            raise ValueError(f"{self.action} takes no force; only leave does")
        if self.action is GroupsAction.JOIN:
            if self.key_file is None:
                raise ValueError("join needs key_file, the path of the group's key")
            if (self.address is None) == (self.peers is None):
                raise ValueError("join needs either address (multicast) or peers")
            if self.address is not None and not ip_address(self.address).is_multicast:
                raise ValueError(f"{self.address} is not a multicast address; list unicast members as peers")
        return self


class ReloadRequest(_Request):
    """Read the configuration again. For administrators."""

    op: Literal["reload"] = "reload"
    instead: str | None = Field(
        None, description="do nothing; say what would change if this text were the configuration"
    )


class DoctorRequest(_Request):
    """What would make a migration fail here, and its mend."""

    op: Literal["doctor"] = "doctor"


Request = Annotated[
    ExportRequest
    | ImportRequest
    | TakenRequest
    | ListRequest
    | StatusRequest
    | InfoRequest
    | HistoryRequest
    | DrainRequest
    | GroupsRequest
    | ReloadRequest
    | DoctorRequest,
    Field(discriminator="op"),
]
"""Any request."""

ADMINISTRATOR_OPS = frozenset({"drain", "reload"})
"""Ops for administrators only; ``groups`` is too, but for ``list``."""
