# SPDX-License-Identifier: MIT
"""What the journal has of a copy from ACTIVATE until it lives with its application (`Record.LISTED`)."""

from __future__ import annotations

import os
from typing import Any

from sockmi import durable
from sockmi.engine.cookie import cookie_of
from sockmi.importing.copies import Copy
from sockmi.journal import Change, Record
from sockmi.protocol.records import Arrival, HostId


def keep_listed(change: Change, copy: Copy) -> None:
    """Add it to a transaction, as it is now."""
    copy.handed = handed_now(copy)
    exporter = copy.holding.exporter.hex() if copy.holding else ""
    handed = [durable.write_handed(copy.handed)] if copy.handed else []
    content = [copy.chunk, exporter, durable.write_arrival(copy.arrival), *handed]
    change.keep.append((Record.LISTED, copy.candidate.migration_id.hex, content))


def drop_listed(change: Change, copy: Copy) -> None:
    """The inverse of ``keep_listed``."""
    change.drop.append((Record.LISTED, copy.candidate.migration_id.hex))


def read_listed(content: list[Any]) -> tuple[str, HostId, Arrival, durable.Handed | None]:
    """The chunk's name, the exporter, the copy, and which socket it was being handed over as."""
    name, exporter, arrival, *handed = content
    known = durable.read_handed(handed[0]) if handed else None
    return name, bytes.fromhex(exporter), durable.read_arrival(arrival), known


def handed_now(copy: Copy) -> durable.Handed | None:
    """None: no application has it, or its connection tells which it is."""
    if copy.client is None or copy.tuple is not None:
        return None
    return durable.Handed(copy.candidate.kind, os.fstat(copy.fd).st_ino, cookie_of(copy.fd))
