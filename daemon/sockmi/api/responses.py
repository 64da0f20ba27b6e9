# SPDX-License-Identifier: MIT
"""The responses."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field, model_validator

from sockmi.api.fields import (
    API_VERSION,
    DESCRIPTORS_MAX,
    AddressText,
    Count,
    EndpointText,
    Model,
    Name,
    Port,
)
from sockmi.api.records import Direction, MigrationRecord, Outcome, Why
from sockmi.engine.base import Kind
from sockmi.redirect.base import Mode


class ErrorResponse(Model):
    """The whole request failed; nothing of it is under way any more."""

    id: str | int | None = None
    ok: Literal[False] = False
    error: Why


class _Response(Model):
    id: str | int | None = None
    ok: Literal[True] = True
    more: bool = False
    fds: Annotated[int, Field(ge=0, le=DESCRIPTORS_MAX)] = 0


class ExportResponse(_Response):
    """One record per socket, in the order of the request."""

    migrations: list[MigrationRecord]


class ImportedItem(Model):
    """One socket that comes with this line, dormant.

    ``request``: index into the request's ``requests``. ``local`` and ``remote`` are the
    socket's own ends; ``origin`` is the local end as the peer knows it. ``family``: of the
    socket (an inet6 one may carry v4-mapped traffic). ``context``: a memfd comes for it.
    """

    request: Count
    family: Literal["inet", "inet6"]
    local: EndpointText | None
    remote: EndpointText | None
    origin: EndpointText | None
    context: bool
    record: MigrationRecord


class ImportResponse(_Response):
    """Empty after a timeout; otherwise descriptors of the sockets, then of the contexts."""

    imported: list[ImportedItem]

    @model_validator(mode="after")
    def _counted(self) -> ImportResponse:
        needed = sum(1 + item.context for item in self.imported)
        if needed != self.fds:
            raise ValueError(f"{len(self.imported)} sockets need {needed} descriptors, but fds is {self.fds}")
        return self


class FailedItem(Model):
    """A taken socket that could not be activated."""

    migration_id: UUID
    refusal: Why


class TakenResponse(_Response):
    """Which of the taken sockets are live, and which are not the client's after all.

    ``waiting``: all of them have been undone, and the import waits again: another answer to it follows.
    """

    live: list[UUID]
    failed: list[FailedItem] = []
    waiting: bool = False


class SocketRow(Model):
    """A socket of this host; ``refusal`` is None if it could be moved now.

    ``received_bytes``: how many have come on a quiet connection; None unless the filter has ``idle_s``.
    """

    pid: int
    fd: int
    process: str
    unit: str | None
    user_id: Count
    inode: Count
    kind: Kind
    state: str
    local: EndpointText | None
    remote: EndpointText | None
    receive_queue_bytes: Count
    send_queue_bytes: Count
    received_bytes: Count | None = None
    movable: bool
    refusal: Why | None = None


class ImportRow(Model):
    """A socket that waits in an import list for its application."""

    migration_id: UUID
    kind: Kind
    state: str
    local: EndpointText | None
    remote: EndpointText | None
    origin: EndpointText | None
    from_: Name = Field(alias="from")
    listener: UUID | None = None
    waiting_since: AwareDatetime
    context_bytes: Count
    image_bytes: Count


class RedirectRow(Model):
    """A redirect of this host: ``export`` leads packets away, ``import`` receives them."""

    migration_id: UUID | None
    direction: Direction
    mode: Mode
    local: EndpointText
    remote: EndpointText
    other: EndpointText
    hop: Count
    since: AwareDatetime | None


class ListResponse(_Response):
    """Rows of the table that was asked for; the other two are empty."""

    sockets: list[SocketRow] = []
    imports: list[ImportRow] = []
    redirects: list[RedirectRow] = []


class ListLength(Model):
    """How full one import list is, leases included, and how many requests wait for it."""

    length: Count
    maximum: Count
    waiting: Count


class StatusResponse(_Response):
    """The daemon at a glance; counters are since its start."""

    api_version: int = API_VERSION
    version: str
    host: Name
    host_id: str
    pid: int
    engine: str
    modes: list[Mode]
    uptime_s: float
    stopping: bool = False
    groups: list[Name]
    import_lists: dict[Kind, ListLength]
    migrations_under_way: Count
    redirects_out: Count
    redirects_in: Count
    outcomes: dict[Outcome, Count]


class InfoResponse(_Response):
    """The migrations that this host knows; an unknown id is left out."""

    migrations: list[MigrationRecord]


class HistoryResponse(_Response):
    """Records of the journal."""

    migrations: list[MigrationRecord]


class Progress(Model):
    """How far a drain has come; ``planned`` counts for dry runs.

    ``closed``: those of ``selected`` that had ended, or that nobody held any more, when their turn came.
    ``spared``: connections, none of ``selected``, by which who asks is logged in.
    """

    selected: Count
    moved: Count
    refused: Count
    aborted: Count
    failed: Count
    planned: Count = 0
    closed: Count = 0
    spared: Count = 0
    remaining: Count
    elapsed_s: float
    rate_per_s: float


class DrainResponse(_Response):
    """Progress, and the records that ended since the line before; the last line has no ``more``."""

    progress: Progress
    migrations: list[MigrationRecord] = []


class Member(Model):
    """Another daemon of a group, as last heard."""

    host: Name
    host_id: str
    address: EndpointText
    last_heard_s: float | None
    connected: bool
    load: float | None = None


class GroupRow(Model):
    """A group that this daemon is in."""

    name: Name
    address: AddressText | None
    port: Port
    interface: Name | None = None
    peers: list[EndpointText] = []
    configured: bool
    members: list[Member]


class GroupsResponse(_Response):
    """All groups, after the action; ``changed`` is False if there was nothing to do.

    ``missed``: ids of hosts that are not heard, though something waits for them or is led to them.
    """

    groups: list[GroupRow]
    changed: bool = False
    missed: list[str] = []


class ReloadResponse(_Response):
    """Names of the settings that changed, and of those that need a restart to take effect."""

    changed: list[str]
    restart_needed: list[str]


class CheckStatus(StrEnum):
    """Verdict of one check of ``doctor``."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Check(Model):
    """One check: what was found, and what to do about it."""

    name: Name
    status: CheckStatus
    message: str
    mend: str | None = None


class DoctorResponse(_Response):
    """``healthy`` if no check is an error."""

    healthy: bool
    checks: list[Check]


RESPONSES: dict[str, type[_Response]] = {
    "export": ExportResponse,
    "import": ImportResponse,
    "taken": TakenResponse,
    "list": ListResponse,
    "status": StatusResponse,
    "info": InfoResponse,
    "history": HistoryResponse,
    "drain": DrainResponse,
    "groups": GroupsResponse,
    "reload": ReloadResponse,
    "doctor": DoctorResponse,
}
"""The model of each op's response lines."""
