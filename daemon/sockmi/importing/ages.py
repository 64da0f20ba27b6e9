# SPDX-License-Identifier: MIT
"""How long copies have waited for an application: a warning of the old, an end of the too old."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time

from sockmi.engine.base import Kind
from sockmi.importing.copies import Copy
from sockmi.importing.life import Life
from sockmi.importing.listed import Listed
from sockmi.importing.stock import Stock
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

_TOO_OLD = Refusal(Code.TIMEOUT, "No application took it within imports.listed_max_s; it was ended.")


class Ages:
    """Look at them now and then."""

    def __init__(self, shell: Shell, stock: Stock, listed: Listed, life: Life) -> None:
        self._shell = shell
        self._copies = stock.copies
        self._lists = stock.lists
        self._listed = listed
        self._life = life

    def look(self) -> None:
        """Warn of what has waited for long, and end what has waited for too long, if that is wanted."""
        limits, now = self._shell.config.imports, time.monotonic()
        oldest = dict.fromkeys(Kind, 0.0)
        for candidate in list(self._lists.listed()):
            if self._lists.is_lent(candidate.migration_id):
                continue
            copy = self._copies[candidate.migration_id.bytes]
            age_s = now - copy.listed_at
            oldest[candidate.kind] = max(oldest[candidate.kind], age_s)
            if limits.listed_max_s and age_s >= limits.listed_max_s:
                self._give_up(copy)
            elif limits.listed_warn_s and age_s >= limits.listed_warn_s and not copy.warned:
                copy.warned = True
                _log.warning(
                    "%s has waited for an application for %.0f s; import it (`sockmi import`), or "
                    "set imports.listed_max_s",
                    copy.tuple or copy.candidate.local or candidate.migration_id,
                    age_s,
                )
        for kind in Kind:
            self._shell.metrics.oldest.labels(kind=kind).set(oldest[kind])

    def _give_up(self, copy: Copy) -> None:
        """Nobody wants it: its peer is told by a RST, from a copy that lives for that moment only."""
        migration = copy.candidate.migration_id
        if copy.tuple is None:
            self._listed.end(copy, _TOO_OLD)
            return
        if self._lists.claimed(migration) is not None or not self._listed.wake(copy):
            return
        if self._life.begin([copy]):
            return  # it is listed again
        with socket.socket(fileno=os.dup(copy.fd)) as lived:
            lived.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(copy.fd)
        copy.fd = -1
        self._lists.put(copy.candidate)
        self._listed.end(copy, _TOO_OLD)
