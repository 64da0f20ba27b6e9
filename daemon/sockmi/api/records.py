# SPDX-License-Identifier: MIT
"""Parts that requests and responses share: a migration's record, why something was not done, a filter."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AwareDatetime, Field

from sockmi.api.fields import Count, EndpointText, Model, Name, Port
from sockmi.engine.base import Kind
from sockmi.redirect.base import Mode
from sockmi.refusal import Code, Refusal

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
    Code.IPSEC: "ENOTSUP",
    Code.SOCKMAP: "ENOTSUP",
    Code.IN_REPAIR: "EBUSY",
    Code.ZERO_COPY: "ENOTSUP",
    Code.TOO_LARGE: "EMSGSIZE",
    Code.LINK_LOCAL: "ENOTSUP",
    Code.ALREADY_MIGRATING: "EALREADY",
    Code.NO_DESCRIPTORS: "EMFILE",
    Code.LOCKED: "EBUSY",
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
    Code.ENDED: "ENOTCONN",
}
"""What ``export_socket`` sets errno to, for each code. Other codes (of a newer daemon): EIO."""


class Why(Model):
    """Why something was not done: a code of `sockmi.refusal`, a sentence, an errno name."""

    code: Code
    message: str
    errno: str

    @classmethod
    def of(cls, refusal: Refusal) -> Why:
        """The refusal with its errno."""
        return cls(code=refusal.code, message=refusal.message, errno=ERRNO[refusal.code])


class FidelityReport(Model):
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


class MigrationRecord(Model):
    """One migration as this host's journal knows it.

    ``local`` and ``remote`` are as the exporter's socket had them; ``remote`` is None unless
    connected. ``from_`` and ``to`` (in JSON ``from`` and ``to``) are host names; ``to`` is
    None until chosen. ``blackout_us`` is the freeze as this host measured it, ``engine`` is this
    host's (None: an older daemon did it). ``outcome`` is
    None while the migration is under way; ``refusal`` says why it is not ``moved``. ``user_id``: who
    asked for the export. ``listed``: when it had moved it waited in the importer's import list, and its peer
    hears nothing until an application takes it. Sizes are those of the image: 0 until there is one.
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
    listed: bool = False
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


class SocketFilter(Model):
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
