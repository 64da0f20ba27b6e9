# SPDX-License-Identifier: MIT
"""Drives the protocol core: events in, actions out, carried out in order.

The answers to actions are events again: they wait until all actions of the event before are carried out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from sockmi.protocol.actions import Action
from sockmi.protocol.core import Core
from sockmi.protocol.events import Event
from sockmi.shell import unknown

_log = logging.getLogger(__name__)


class Driver:
    """Owns the events that wait, and the core's timer.

    ``carry_out``: who carries out which action. ``failure``: what nobody expected; nothing is carried out
    after it, and the loop is stopped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, core: Core) -> None:
        self._loop = loop
        self._core = core
        self.carry_out: dict[type, Callable[[Any], None]] = {}
        self.failure: Exception | None = None
        self._events: deque[Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None

    def dispatch(self, event: Event) -> None:
        """Feed an event to the core and carry out what it answers, in order."""
        self._events.append(event)
        if not self._draining:
            self._drain(list)

    def carry_out_late(self, work: Callable[[], None]) -> None:
        """Carry out what an action asked for earlier, and had to wait."""

        def begin() -> list[Action]:
            work()
            return []

        self._drain(begin)

    def _drain(self, begin: Callable[[], list[Action]]) -> None:
        """Carry out actions, then handle what events there are, and their actions, until nothing is left."""
        if self.failure is not None:
            return
        self._draining = True
        try:
            self._perform(begin())
            while self._events:
                self._perform(self._core.handle(self._events.popleft(), time.monotonic()))
        except Exception as error:
            _log.critical("this was not to be expected; the daemon ends, to begin anew", exc_info=True)
            self.failure = error
            self._loop.stop()
        finally:
            self._draining = False
        self._set_timer()

    def _perform(self, todo: list[Action]) -> None:
        for action in todo:
            carry_out = self.carry_out.get(type(action))
            if carry_out is None:
                raise unknown(action)
            carry_out(action)

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline()
        if self._timer is not None:
            if deadline is not None and abs(self._timer.when() - deadline) < 1e-6:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            # asyncio's clock is time.monotonic too.
            self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._drain(lambda: self._core.handle_timer(time.monotonic()))
