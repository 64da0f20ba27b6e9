# SPDX-License-Identifier: MIT
"""The kernel engine stops nobody: an owner may close its connection while that is frozen, or be killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.test_ended_owner import POINTS, ended_while_frozen

# What could differ between kernels is the module's; whole daemons take an emulated guest minutes.
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.kernels("uml-6.1-debug")]


#: The last moment is the module's: the daemon has looked for the last time.
@pytest.mark.parametrize("point", [*POINTS, "commit.accepted"])
@pytest.mark.parametrize("how", ["closed", "killed", "one of two"])
def test_ended_while_it_is_frozen(lab: Lab, tmp_path: Path, how: str, point: str) -> None:
    """What another descriptor of the owner's still has is not closed, and moves."""
    ended_while_frozen(lab, tmp_path, how, point, redirect={"modes": ["nat"]})
