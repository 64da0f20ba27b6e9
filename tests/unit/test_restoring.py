# SPDX-License-Identifier: MIT
"""Tables that somebody has removed are made again, whatever fails meanwhile, and no RST passes until then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.restoring import Restoring


class Host:
    """Tables, and a restore that fails as often as it is told; ``whole``: the tables are there."""

    def __init__(self) -> None:
        self.whole, self.filled, self.shielded = True, True, False
        self.failures = 0
        self.later: list[Callable[[], None]] = []
        loop: Any = SimpleNamespace(call_later=lambda _unused, call: self.later.append(call))
        tables: Any = SimpleNamespace(
            shield=lambda: setattr(self, "shielded", True),
            unshield=lambda: setattr(self, "shielded", False),
            is_whole=lambda: self.whole,
        )
        self.restoring = Restoring(loop, tables, self._restore)

    def _restore(self) -> None:
        self.whole = True
        if self.failures:
            self.failures -= 1
            raise OSError("no device of this host leads there")
        self.filled = True

    def flush(self) -> None:
        self.whole = self.filled = False

    def wait(self) -> None:
        (call,), self.later = self.later, []
        call()


@pytest.fixture
def host() -> Host:
    return Host()


def test_what_was_in_the_tables_is_made_again_though_the_first_try_fails(host: Host) -> None:
    """The tables are whole by then, and empty."""
    host.failures = 2
    host.flush()
    host.restoring.look()
    for _turn in range(2):
        assert host.whole and not host.filled and host.shielded
        host.wait()
    assert host.filled and not host.shielded and not host.later


def test_a_transaction_that_finds_them_gone_fails_as_the_restore_does(host: Host) -> None:
    """And whoever looks next begins anew."""
    host.failures = 1
    host.flush()
    with pytest.raises(OSError, match="no device"):
        host.restoring.now()
    assert host.shielded
    host.restoring.look()
    assert host.filled and not host.shielded


def test_who_is_not_raced_cuts_no_connection(host: Host) -> None:
    for _turn in range(5):
        host.flush()
        host.restoring.look()
        assert host.filled and not host.shielded
    host.flush()
    host.restoring.look()
    assert not host.filled and host.shielded and len(host.later) == 1
