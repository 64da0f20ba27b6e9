# SPDX-License-Identifier: MIT
"""What operations, drains and the doctor need of the daemon; `sockmi.service.Daemon` is one of these."""

from __future__ import annotations

import asyncio
from typing import Protocol

from sockmi.config import Config
from sockmi.exporting import Exporting
from sockmi.importing import Importing
from sockmi.journal import Journal
from sockmi.members import Members
from sockmi.metrics import Metrics
from sockmi.protocol.records import HostId
from sockmi.redirect.tables import Tables
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell
from sockmi.transport.identity import Identity


class Parts(Protocol):
    """Named as in the daemon; see there."""

    version: str
    config: Config
    host_name: str
    identity: Identity
    started_at: float
    stopping: bool
    loop: asyncio.AbstractEventLoop
    shell: Shell
    journal: Journal
    tables: Tables
    metrics: Metrics
    members: Members
    exporting: Exporting
    importing: Importing
    redirecting: Redirecting
    why_engine: str

    def expect(self, host: HostId) -> None:
        """Something will soon go to this host: the stream to it is there by then, if it can be had."""

    def missed(self) -> list[HostId]:
        """Hosts that are not heard, though something waits for them or is led to them."""

    def forget(self, host: HostId) -> bool:
        """It will never come back (events.Forget); False if nothing has waited for it."""

    def reload(self) -> tuple[list[str], list[str]]:
        """Read the configuration again: (settings changed, settings that need a restart)."""
