# SPDX-License-Identifier: MIT
"""Work of the loop that will ask the routes: it waits while their worker starts, and the loop does not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sockmi.driver import Driver
from sockmi.redirect.routes_worker import RoutesWorker


class AwaitingRoutes:
    """What is given here is done in order: at once, or when the worker is awake."""

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: Driver, worker: RoutesWorker) -> None:
        self._loop = loop
        self._driver = driver
        self._worker = worker
        self._waiting: deque[Callable[[], None]] = deque()
        self._waking = False

    def wake(self) -> None:
        """Have it start beside the loop, as something comes that will ask."""
        if not self._waking and not self._worker.awake:
            self._waking = True
            self._loop.run_in_executor(None, self._worker.wake).add_done_callback(self._woken)

    def do(self, work: Callable[[], None]) -> None:
        """``work``, after all that was given before."""
        self.wake()
        if self._waking or self._waiting:  # of which one may have asked for this, as it is done
            self._waiting.append(work)
        else:
            work()

    def _woken(self, waking: asyncio.Future[None]) -> None:
        """Or it cannot be started: who asks then hears why."""
        waking.exception()
        self._waking = False
        while self._waiting:
            self._driver.carry_out_late(self._waiting[0])
            self._waiting.popleft()
