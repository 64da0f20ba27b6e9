# SPDX-License-Identifier: MIT
"""The criteria of an import request, as the import lists match them."""

from __future__ import annotations

import functools
from ipaddress import ip_address
from uuid import UUID

from sockmi import api
from sockmi.engine.base import Kind
from sockmi.import_lists import Criteria


def criteria_of(wanted: api.ImportCriteria) -> Criteria:
    """The same."""
    return _same_criteria(
        tuple(wanted.states),
        tuple(wanted.preferred),
        wanted.local_address,
        wanted.local_port,
        wanted.remote_address,
        wanted.remote_port,
        wanted.listener,
    )


@functools.lru_cache(maxsize=1024)
def _same_criteria(  # noqa: PLR0917 - all of Criteria, in order
    states: tuple[Kind, ...],
    preferred: tuple[Kind, ...],
    local_address: str | None,
    local_port: int | None,
    remote_address: str | None,
    remote_port: int | None,
    listener: UUID | None,
) -> Criteria:
    """Applications ask for the same again and again."""
    return Criteria(
        frozenset(states),
        frozenset(preferred),
        ip_address(local_address) if local_address else None,
        local_port,
        ip_address(remote_address) if remote_address else None,
        remote_port,
        listener,
    )
