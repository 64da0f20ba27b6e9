# SPDX-License-Identifier: MIT
"""What waits for the routes' worker is done in the order in which it was given."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from sockmi.awaiting_routes import AwaitingRoutes


def test_order_holds_for_what_is_given_while_another_is_done() -> None:
    """An answer to the first may bring the inverse of the second, which has not been done yet."""
    loop, done = asyncio.new_event_loop(), []
    worker: Any = SimpleNamespace(awake=False)
    worker.wake = lambda: setattr(worker, "awake", True)
    driver: Any = SimpleNamespace(carry_out_late=lambda work: work())
    waiting = AwaitingRoutes(loop, driver, worker)

    def first() -> None:
        done.append("reserve 1")
        waiting.do(lambda: done.append("unreserve 2"))

    waiting.do(first)
    waiting.do(lambda: done.append("reserve 2"))
    assert not done
    while len(done) < 3:
        loop.run_until_complete(asyncio.sleep(0.001))
    waiting.do(lambda: done.append("at once"))
    loop.close()
    assert done == ["reserve 1", "reserve 2", "unreserve 2", "at once"]
