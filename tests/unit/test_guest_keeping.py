# SPDX-License-Identifier: MIT
"""How long kept guests stay, and what is said where there are none. No guest runs here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guests import commands, keeper
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


def test_user_of_a_guest() -> None:
    first, second = commands.wanted(["vm1=6.1", "vm2=6.12"], ["vm2=admin"])
    assert (first.user, second.user) == ("root", "admin")
    with pytest.raises(HarnessError, match="--user vm3=admin: give GUEST=NAME; there are vm1"):
        commands.wanted(["vm1=6.1"], ["vm3=admin"])


def test_kind_of_a_guest() -> None:
    quick, plain, builder = (
        commands.guest(f"vm1=6.12{rest}", 1) for rest in (":bookworm:quick", "", ":trixie:dkms")
    )
    assert (quick.suite, quick.kind) == ("bookworm", "quick")
    assert (plain.suite, plain.kind) == ("trixie", "")
    assert (builder.suite, builder.kind) == ("trixie", "dkms")
    with pytest.raises(HarnessError, match="no kind 'fast'; there are quick, module, dkms"):
        commands.guest("vm1=6.12::fast", 1)
    with pytest.raises(HarnessError, match=r"bookworm has no headers of 6\.12"):
        commands.guest("vm1=6.12:bookworm:dkms", 1)
