# SPDX-License-Identifier: MIT
"""The migration record."""

from __future__ import annotations

import errno
from datetime import datetime
from typing import Any
from uuid import UUID

from sockmi.addresses import Endpoint
from sockmi.client.errors import SockMiError, number, strange
from sockmi.engine.base import Fidelity, Kind
from sockmi.frozen import frozen


@frozen
class MigrationRecord:
    """One migration; see "The migration record" in docs/control.md.

    ``source`` and ``target`` are the hosts' names (``from`` and ``to`` in JSON); ``outcome`` is moved,
    refused, aborted, failed, planned, or None while under way; ``code`` and ``message`` say why not moved.
    ``listed``: when it had moved it waited in the target's import list, as ``migration_id``.
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
    engine: str | None
    hop: int
    listener: UUID | None
    listed: bool
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
                local=endpoint(record.get("local")),
                remote=endpoint(record.get("remote")),
                source=record["from"],
                target=record.get("to"),
                started_at=datetime.fromisoformat(record["started_at"]),
                step=record.get("step", "selected"),
                outcome=record.get("outcome"),
                code=why.get("code", ""),
                message=why.get("message", ""),
                errno=number(why.get("errno")) if why else 0,
                blackout_us=record.get("blackout_us"),
                receive_queue_bytes=record.get("receive_queue_bytes", 0),
                sent_bytes=record.get("sent_bytes", 0),
                unsent_bytes=record.get("unsent_bytes", 0),
                context_bytes=record.get("context_bytes", 0),
                mode=record.get("mode"),
                engine=record.get("engine"),
                hop=record.get("hop", 0),
                listener=_uuid(record.get("listener")),
                listed=record.get("listed", False),
                fidelity=Fidelity(**(record.get("fidelity") or {})),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise strange(f"a record is wrong: {error!r}") from None

    @property
    def succeeded(self) -> bool:
        """Whether it moved, or a dry run found no obstacle."""
        return self.outcome in ("moved", "planned")


class MigrationError(SockMiError):
    """An export was refused, undone or failed; ``record`` says all that is known."""

    def __init__(self, errnum: int, message: str, code: str, record: MigrationRecord) -> None:
        super().__init__(errnum, message, code)
        self.record = record


def concluded(record: MigrationRecord) -> MigrationRecord:
    """``record`` if it succeeded; raises MigrationError otherwise."""
    if not record.succeeded:
        raise MigrationError(record.errno or errno.EIO, record.message, record.code, record)
    return record


def _uuid(text: str | None) -> UUID | None:
    return UUID(text) if text else None


def endpoint(text: str | None) -> Endpoint | None:
    """An endpoint in a response; None if it has none."""
    return Endpoint.parse(text) if text else None
