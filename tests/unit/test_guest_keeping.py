# SPDX-License-Identifier: MIT
"""How long kept guests stay, and what is said where there are none. No guest runs here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guests import keeper
from guests.errors import HarnessError
from guests.monitor import ask


def test_guests_stay_no_longer_than_their_owner() -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        over = keeper.Stay(hours=1, owner=owner.pid).over()
        assert not over()
        owner.kill()
    assert over()
    with pytest.raises(HarnessError, match=f"no process {owner.pid}"):
        keeper.Stay(hours=1, owner=owner.pid).over()


def test_zombie_owns_nothing() -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        over = keeper.Stay(hours=1, owner=owner.pid).over()
        owner.kill()
        while Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert over()


def test_guests_stay_no_longer_than_their_hours() -> None:
    assert keeper.Stay(hours=0).over()()
    assert not keeper.Stay(hours=1).over()()


def test_no_guests_is_said(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="has no guests"):
        keeper.machines(tmp_path)


def test_no_machine_is_said(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no machine answers"):
        ask(tmp_path / "monitor", "stop")
