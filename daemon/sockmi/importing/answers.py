# SPDX-License-Identifier: MIT
"""The lines of an import that are sent while a connection waits: not validated, as that takes time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from uuid import UUID

from sockmi import api
from sockmi.image import Family
from sockmi.importing.copies import Copy
from sockmi.refusal import Refusal
from sockmi.shell import whole_record


def imported_item(copy: Copy, request: int, *, context: bool) -> dict[str, Any]:
    """One of `api.ImportedItem`. ``request``: the index of the criteria that it satisfies."""
    return {
        "request": request,
        "family": "inet6" if copy.facts.family is Family.INET6 else "inet",
        "local": str(copy.placement.local) if copy.placement.local else None,
        "remote": str(copy.candidate.remote) if copy.candidate.remote else None,
        "origin": str(copy.candidate.local) if copy.candidate.local else None,
        "context": context,
        "record": whole_record(copy.record),
    }


def import_response(
    request_id: str | int | None, items: Collection[dict[str, Any]], descriptors: int
) -> dict[str, Any]:
    """`api.ImportResponse`, with so many descriptors."""
    return {"id": request_id, "ok": True, "more": False, "fds": descriptors, "imported": items}


def taken_response(
    request_id: str | int | None, live: Iterable[Copy], failed: Mapping[UUID, Refusal]
) -> dict[str, Any]:
    """`api.TakenResponse`."""
    return {
        "id": request_id,
        "ok": True,
        "more": False,
        "fds": 0,
        "live": [copy.candidate.migration_id for copy in live],
        "failed": [
            {"migration_id": one, "refusal": api.Why.of(refusal).model_dump()}
            for one, refusal in failed.items()
        ],
        "waiting": False,
    }


def context_file(content: bytes) -> int:
    """A sealed memory file, so that the receiver can trust its size."""
    descriptor = os.memfd_create("sockmi-context", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
