# SPDX-License-Identifier: MIT
"""The control socket's requests and responses: the one definition that the daemon uses.

The specification for people, and for clients without pydantic, is ``docs/control.md``; a test
validates its examples against these models. Requests are strict: an unknown field is an
error, so that no option is ignored in silence. Clients ignore unknown fields of responses.
"""

from __future__ import annotations

import json
from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import model_validator as _model_validator

from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

API_VERSION = 1
"""Grows when a request or response changes in a way that old clients cannot ignore."""

LINE_BYTES_MAX = 1 << 20
"""Longest line, its newline included."""

DESCRIPTORS_MAX = 253
"""Most descriptors with one line: SCM_MAX_FD of ``include/net/scm.h``."""

CONTEXT_BYTES_MAX = 1 << 20
"""Longest application context."""

ERRNO: dict[Code, str] = {
    Code.NOT_TCP: "EPROTOTYPE",
    Code.NO_SUCH_SOCKET: "EBADF",
    Code.NO_PRIVILEGE: "EPERM",
    Code.STATE: "ENOTSUP",
    Code.URGENT_DATA: "ENOTSUP",
    Code.ULP: "ENOTSUP",
    Code.MPTCP: "ENOTSUP",
    Code.TCP_MD5: "ENOTSUP",
    Code.TCP_AO: "ENOTSUP",
    Code.SOCKMAP: "ENOTSUP",
    Code.IN_REPAIR: "EBUSY",
    Code.ZERO_COPY: "ENOTSUP",
    Code.TOO_LARGE: "EMSGSIZE",
    Code.LINK_LOCAL: "ENOTSUP",
    Code.ALREADY_MIGRATING: "EALREADY",
    Code.NO_DESCRIPTORS: "EMFILE",
    Code.OWNER_TRACED: "EBUSY",
    Code.OWNER_IO_URING: "ENOTSUP",
    Code.OWNER_UNSTOPPABLE: "EBUSY",
    Code.OWNER_IS_DAEMON: "ENOTSUP",
    Code.CHANGED: "EAGAIN",
    Code.FREEZE_DEADLINE: "EAGAIN",
    Code.NO_OFFER: "EHOSTUNREACH",
    Code.NO_SUCH_HOST: "ENOENT",
    Code.LIST_FULL: "ENOBUFS",
    Code.PORT_TAKEN: "EADDRINUSE",
    Code.TUPLE_TAKEN: "EADDRINUSE",
    Code.WINDOW_SCALE: "ENOTSUP",
    Code.TIMESTAMP_UNIT: "ENOTSUP",
    Code.IMAGE: "EBADMSG",
    Code.RESTORE: "EREMOTEIO",
    Code.NO_REDIRECT: "ENETUNREACH",
    Code.REDIRECT: "EREMOTEIO",
    Code.PEER_LOST: "EHOSTDOWN",
    Code.SHUTTING_DOWN: "ESHUTDOWN",
    Code.TIMEOUT: "ETIMEDOUT",
    Code.BAD_REQUEST: "EINVAL",
    Code.INTERNAL: "EIO",
}
"""What ``export_socket`` sets errno to, for each code. Other codes (of a newer daemon): EIO."""


def _endpoint(text: str) -> str:
    return str(Endpoint.parse(text))


def _address(text: str) -> str:
    return str(ip_address(text))


EndpointText = Annotated[str, AfterValidator(_endpoint)]
"""``192.0.2.1:80`` or ``[2001:db8::1]:80``."""

AddressText = Annotated[str, AfterValidator(_address)]
"""``192.0.2.1`` or ``2001:db8::1``."""

Port = Annotated[int, Field(ge=1, le=0xFFFF)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=255)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


# ---------------------------------------------------------------- shared parts


class Why(_Model):
    """Why something was not done: a code of `sockmi.refusal`, a sentence, an errno name."""

    code: Code
    message: str
    errno: str

    @classmethod
    def of(cls, refusal: Refusal) -> Why:
        """The refusal with its errno."""
        return cls(code=refusal.code, message=refusal.message, errno=ERRNO[refusal.code])


class FidelityReport(_Model):
    """Names of the parts of the state that were carried, approximated, or reset to a default."""

    carried: list[str] = []
    approximated: list[str] = []
    reset: list[str] = []


class Direction(StrEnum):
    """Which side of the migration this host is."""

    EXPORT = "export"
    IMPORT = "import"


class Step(StrEnum):
    """How far a migration has come, as this host knows (docs/architecture.md)."""

    SELECTED = "selected"
    REQUESTED = "requested"
    FROZEN = "frozen"
    PREPARED = "prepared"
    COMMITTED = "committed"
    ACTIVE = "active"


class Outcome(StrEnum):
    """How a migration ended.

    ``refused``: before the freeze; ``aborted``: undone after it; both leave the socket live at
    the exporter. ``failed``: an error after COMMIT. ``planned``: a dry run found room for it.
    """

    MOVED = "moved"
    REFUSED = "refused"
    ABORTED = "aborted"
    FAILED = "failed"
    PLANNED = "planned"


class MigrationRecord(_Model):
    """One migration as this host's journal knows it.

    ``local`` and ``remote`` are as the exporter's socket had them; ``remote`` is None unless
    connected. ``from_`` and ``to`` (in JSON ``from`` and ``to``) are host names; ``to`` is
    None until chosen. ``blackout_us`` is the freeze as this host measured it, ``engine`` is this
    host's (None: an older daemon did it). ``outcome`` is
    None while the migration is under way; ``refusal`` says why it is not ``moved``. ``user_id``: who
    asked for the export. Sizes are those of the image: 0 until there is one.
    """

    migration_id: UUID
    batch_id: UUID | None = None
    direction: Direction = Direction.EXPORT
    kind: Kind | None
    state: str | None
    local: EndpointText | None = None
    remote: EndpointText | None = None
    from_: Name = Field(alias="from")
    to: Name | None = None
    user_id: Count | None = None
    pid: int | None = None
    fd: int | None = None
    listener: UUID | None = None
    started_at: AwareDatetime
    ended_at: AwareDatetime | None = None
    step: Step = Step.SELECTED
    outcome: Outcome | None = None
    refusal: Why | None = None
    blackout_us: Count | None = None
    receive_queue_bytes: Count = 0
    sent_bytes: Count = 0
    unsent_bytes: Count = 0
    image_bytes: Count = 0
    context_bytes: Count = 0
    mode: Mode | None = None
    engine: str | None = None
    hop: Count = 0
    fidelity: FidelityReport = FidelityReport()


def record_of(content: dict[str, Any]) -> MigrationRecord:
    """A migration record as the journal keeps it."""
    return MigrationRecord.model_validate_json(json.dumps(content))


class SocketFilter(_Model):
    """Which sockets of this host; all given fields must match, none given matches all.

    ``process`` is a shell pattern for the process's name (``/proc/PID/comm``), ``unit`` one
    for its systemd unit. Addresses may be networks (``192.0.2.0/24``). ``idle_s``: connections on which
    nothing has come or gone for so long, nothing is queued, and what came last has been answered.
    """

    pid: Annotated[int, Field(ge=1)] | None = None
    fd: Count | None = None
    process: Name | None = None
    unit: Name | None = None
    kinds: list[Kind] | None = None
    states: list[str] | None = None
    local_address: Name | None = None
    local_port: Port | None = None
    remote_address: Name | None = None
    remote_port: Port | None = None
    idle_s: Annotated[float, Field(ge=0, le=1e9)] | None = None


# ---------------------------------------------------------------- requests


class _Request(_Model):
    id: str | int | None = None
    fds: Annotated[int, Field(ge=0, le=DESCRIPTORS_MAX)] = 0


class ExportItem(_Model):
    """One socket to export.

    ``descriptor``: it comes with this line; ``pid`` and ``fd`` then only say whose it is.
    Without it the daemon takes it from ``pid`` and ``fd``, for administrators only.
    ``context``: a sealed memfd comes with this line. ``migration_id``: makes it idempotent.
    """

    pid: Annotated[int, Field(ge=1)] | None = None
    fd: Count | None = None
    descriptor: bool = False
    context: bool = False
    migration_id: UUID | None = None

    @_model_validator(mode="after")
    def _named(self) -> ExportItem:
        if not self.descriptor and (self.pid is None or self.fd is None):
            raise ValueError("a socket without a descriptor needs pid and fd")
        return self


class ExportRequest(_Request):
    """Move sockets away; ``to``: a host's name, id or address, None for any."""

    op: Literal["export"] = "export"
    sockets: Annotated[list[ExportItem], Field(min_length=1)]
    to: Name | None = None
    timeout_s: Seconds | None = None
    dry_run: bool = False

    @_model_validator(mode="after")
    def _counted(self) -> ExportRequest:
        needed = sum(item.descriptor + item.context for item in self.sockets)
        if needed != self.fds:
            raise ValueError(f"the sockets need {needed} descriptors, but fds is {self.fds}")
        return self


class ImportCriteria(_Model):
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

    @_model_validator(mode="after")
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
    """Rows of one table; ``filter`` is for sockets."""

    op: Literal["list"] = "list"
    table: Table = Table.SOCKETS
    filter: SocketFilter = SocketFilter()


class StatusRequest(_Request):
    """The state of the daemon."""

    op: Literal["status"] = "status"


class InfoRequest(_Request):
    """Migrations by id, or all under way; ``wait_s``: answer when all have an outcome, at most so late."""

    op: Literal["info"] = "info"
    migration_ids: list[UUID] = []
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


class GroupsRequest(_Request):
    """List, join or leave groups. Joining and leaving are for administrators.

    ``address`` is a multicast address; without it ``peers`` (``ADDRESS:PORT``) names the members.
    """

    op: Literal["groups"] = "groups"
    action: GroupsAction = GroupsAction.LIST
    name: Name | None = None
    address: AddressText | None = None
    port: Port | None = None
    interface: Name | None = None
    peers: list[EndpointText] | None = None
    key_file: Name | None = None

    @_model_validator(mode="after")
    def _complete(self) -> GroupsRequest:
        if self.action is not GroupsAction.LIST and self.name is None:
            raise ValueError(f"{self.action} needs the group's name")
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


# ---------------------------------------------------------------- responses


class ErrorResponse(_Model):
    """The whole request failed; nothing of it is under way any more."""

    id: str | int | None = None
    ok: Literal[False] = False
    error: Why


class _Response(_Model):
    id: str | int | None = None
    ok: Literal[True] = True
    more: bool = False
    fds: Annotated[int, Field(ge=0, le=DESCRIPTORS_MAX)] = 0


class ExportResponse(_Response):
    """One record per socket, in the order of the request."""

    migrations: list[MigrationRecord]


class ImportedItem(_Model):
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

    @_model_validator(mode="after")
    def _counted(self) -> ImportResponse:
        needed = sum(1 + item.context for item in self.imported)
        if needed != self.fds:
            raise ValueError(f"{len(self.imported)} sockets need {needed} descriptors, but fds is {self.fds}")
        return self


class FailedItem(_Model):
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


class SocketRow(_Model):
    """A socket of this host; ``refusal`` is None if it could be moved now."""

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
    movable: bool
    refusal: Why | None = None


class ImportRow(_Model):
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


class RedirectRow(_Model):
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


class ListLength(_Model):
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


class Progress(_Model):
    """How far a drain has come; ``planned`` counts for dry runs.

    ``closed``: those of ``selected`` that nobody held any more when their turn came.
    """

    selected: Count
    moved: Count
    refused: Count
    aborted: Count
    failed: Count
    planned: Count = 0
    closed: Count = 0
    remaining: Count
    elapsed_s: float
    rate_per_s: float


class DrainResponse(_Response):
    """Progress, and the records that ended since the line before; the last line has no ``more``."""

    progress: Progress
    migrations: list[MigrationRecord] = []


class Member(_Model):
    """Another daemon of a group, as last heard."""

    host: Name
    host_id: str
    address: EndpointText
    last_heard_s: float | None
    connected: bool
    load: float | None = None


class GroupRow(_Model):
    """A group that this daemon is in."""

    name: Name
    address: AddressText | None
    port: Port
    interface: Name | None = None
    peers: list[EndpointText] = []
    configured: bool
    members: list[Member]


class GroupsResponse(_Response):
    """All groups, after the action; ``changed`` is False if there was nothing to do."""

    groups: list[GroupRow]
    changed: bool = False


class ReloadResponse(_Response):
    """Names of the settings that changed, and of those that need a restart to take effect."""

    changed: list[str]
    restart_needed: list[str]


class CheckStatus(StrEnum):
    """Verdict of one check of ``doctor``."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Check(_Model):
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

ADMINISTRATOR_OPS = frozenset({"drain", "reload"})
"""Ops for administrators only; ``groups`` is too, but for ``list``."""

_REQUEST: TypeAdapter[Any] = TypeAdapter(Request)


def parse_request(line: bytes) -> Any:
    """The request in ``line`` (with or without its newline): a member of the `Request` union.

    Raises `Refusal` (BAD_REQUEST) with a sentence that names the field.
    """
    if len(line) > LINE_BYTES_MAX:
        raise Refusal(Code.BAD_REQUEST, f"The line is longer than {LINE_BYTES_MAX} bytes; split the request.")
    try:
        return _REQUEST.validate_json(line)
    except ValidationError as error:
        raise Refusal(Code.BAD_REQUEST, _sentence(error)) from None


def request_id(line: bytes) -> str | int | None:
    """The id of a line that `parse_request` refused, as far as it can be read."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"][1:] if len(first["loc"]) > 1 else first["loc"]))
    return f"{where or 'request'}: {first['msg'].removeprefix('Value error, ')}. See docs/control.md."


def line_of(message: BaseModel) -> bytes:
    """``message`` as one line. Raises ValueError if it is longer than `LINE_BYTES_MAX`."""
    line = message.model_dump_json(by_alias=True).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise ValueError(f"{type(message).__name__} of {len(line)} bytes: send the list in several lines")
    return line


def error_line(refusal: Refusal, request_id: str | int | None = None) -> bytes:
    """The error response for ``refusal``, as one line."""
    return line_of(ErrorResponse(id=request_id, error=Why.of(refusal)))
