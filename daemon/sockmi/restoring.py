# SPDX-License-Identifier: MIT
"""Our nftables tables are made again when somebody has flushed the ruleset, and all that was in them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from sockmi.redirect.tables import Tables
from sockmi.shell import Loop

_log = logging.getLogger(__name__)

_PAUSE_S = 1.0
_OFTEN = 5  # who removes them again and again is not raced
_OFTEN_S = 10.0


class Restoring:
    """``heard`` is for the event loop, when ``tables.news`` has some; ``look``: some may be unheard."""

    def __init__(self, loop: Loop, tables: Tables, restore: Callable[[], None]) -> None:
        """``restore``: makes the tables, and in them whatever this host needs."""
        self._loop = loop
        self._tables = tables
        self._restore = restore
        self._made_at: deque[float] = deque(maxlen=_OFTEN)
        self._is_waiting = False
        self._is_restoring = False
        self._is_due = False  # the tables may be there, and what was in them not
        self._thread = threading.get_ident()

    def heard(self) -> None:
        """Somebody has changed nftables."""
        self._tables.news.read()
        self.look()

    def look(self) -> None:
        """Restore what is not there. As long as it is not, no RST passes."""
        if self._is_waiting or (not self._is_due and self._is_whole()):
            return
        if len(self._made_at) == _OFTEN and time.monotonic() < self._made_at[0] + _OFTEN_S:
            self._tables.shield()
            self._look_in(_PAUSE_S)
            return
        try:
            self._make()
        except Exception:
            _log.exception(
                "the nftables tables are gone and cannot be made again; once more in %g s", _PAUSE_S
            )
            self._look_in(_PAUSE_S)

    def now(self) -> bool:
        """Something has found them gone before that was heard; whether they are there by now."""
        if self._is_restoring or threading.get_ident() != self._thread or self._is_whole():
            return False
        self._make()
        return True

    def _make(self) -> None:
        began = time.monotonic()
        self._tables.shield()
        self._is_restoring = self._is_due = True
        try:
            self._restore()
        finally:
            self._is_restoring = False
            self._made_at.append(time.monotonic())
        self._is_due = False
        self._tables.unshield()
        took_ms = round((time.monotonic() - began) * 1000)
        _log.warning("somebody has removed the nftables tables; they are there again, after %d ms", took_ms)

    def _look_in(self, delay_s: float) -> None:
        self._is_waiting = True
        self._loop.call_later(delay_s, self._look_again)

    def _look_again(self) -> None:
        self._is_waiting = False
        self.look()

    def _is_whole(self) -> bool:
        try:
            return self._tables.is_whole()
        except OSError:
            _log.exception("the nftables tables cannot be looked at")
            return True
