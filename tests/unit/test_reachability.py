# SPDX-License-Identifier: MIT
"""Whether an importer can be reached is asked once, early, and whoever needs it meanwhile waits for that."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint
from sockmi.exporting import reachability
from sockmi.exporting.reachability import Reachability
from sockmi.protocol.records import Place
from sockmi.redirect.base import Mode

IMPORTER = ip_address("192.0.2.2")
PLACE = Place(Endpoint(IMPORTER, 80), Mode.FORWARD)
WAIT_S = 20


class Redirect:
    """Counts who asks, and lets them wait."""

    def __init__(self, answer: str | OSError | None) -> None:
        self.asked = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._answer = answer

    def reachable(self, importer: Any) -> str | None:
        assert importer == IMPORTER
        self.asked += 1
        self.begun.set()
        assert self.go_on.wait(WAIT_S)
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer


def made(redirect: Redirect, pool: ThreadPoolExecutor) -> Reachability:
    config = SimpleNamespace(redirect=SimpleNamespace(modes=[Mode.FORWARD, Mode.NAT]))
    loop = SimpleNamespace(run_in_executor=lambda _unused, work, *args: pool.submit(work, *args))
    shell: Any = SimpleNamespace(config=config, loop=loop, redirects={Mode.FORWARD: redirect})
    return Reachability(shell)


def test_who_needs_it_meanwhile_waits_for_the_answer() -> None:
    redirect = Redirect("no route")
    with ThreadPoolExecutor() as pool:
        asked = made(redirect, pool)
        asked.foresee(IMPORTER)
        assert redirect.begun.wait(WAIT_S)
        freeze = pool.submit(asked.obstacle, PLACE)
        redirect.go_on.set()
        assert freeze.result(WAIT_S) == "no route"
        asked.foresee(IMPORTER)
    assert redirect.asked == 1


def test_it_is_asked_again_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    redirect = Redirect(None)
    redirect.go_on.set()
    with ThreadPoolExecutor() as pool:
        asked = made(redirect, pool)
        assert asked.obstacle(PLACE) is None and asked.obstacle(PLACE) is None
        assert redirect.asked == 1
        later = reachability.time.monotonic() + reachability._TTL_S + 1
        monkeypatch.setattr(reachability, "time", SimpleNamespace(monotonic=lambda: later))
        assert asked.obstacle(PLACE) is None
    assert redirect.asked == 2


def test_what_cannot_be_asked_is_told_by_the_freeze_alone() -> None:
    redirect = Redirect(OSError("no netlink"))
    redirect.go_on.set()
    with ThreadPoolExecutor() as pool:
        asked = made(redirect, pool)
        asked.foresee(IMPORTER)
        with pytest.raises(OSError, match="no netlink"):
            asked.obstacle(PLACE)


def test_what_is_not_led_away_needs_no_way() -> None:
    asked = made(Redirect(None), ThreadPoolExecutor())
    assert asked.obstacle(Place()) is None
