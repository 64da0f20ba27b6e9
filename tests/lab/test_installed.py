# SPDX-License-Identifier: MIT
"""The collection that its tarball installs moves real connections: by playbooks, and by a module ad hoc."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import collection
from tests.lab.ansible_lab import Controller, changed, clients
from tests.lab.scenario import Service

pytest.importorskip("ansible")
pytestmark = pytest.mark.timeout(400)  # five runs of Ansible


@pytest.fixture(scope="module")
def installed(controller: Controller, tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """The lab's controller, which knows nothing of the checkout."""
    return Controller(controller.lab, collection.install(tmp_path_factory.mktemp("collection")))


@pytest.mark.usefixtures("core")
def test_connections_move(installed: Controller, lines: Service, tmp_path: Path) -> None:
    """From a to b by migrate, from b to c by drain, and one more by the module."""
    clients(lines, 2)
    file = tmp_path / "report.json"
    moved = installed.migrate("--diff", **{"from": "a", "to": "b", "report_file": str(file)})
    assert (moved.returncode, changed(moved)) == (0, 1), moved.stdout + moved.stderr
    assert "2 selected, 2 moved" in moved.stdout
    assert json.loads(file.read_text())["hosts"]["a"]["moved"] == 2
    one = installed.module("b", "export", "--check", process="python*", count=1, to="c")
    assert (one["changed"], one["moved"], one["migrations"][0]["outcome"]) == (True, 1, "planned")
    one = installed.module("b", "export", process="python*", count=1, to="c")
    assert (one["changed"], one["moved"]) == (True, 1), one
    page = tmp_path / "drain.html"
    drained = installed.playbook("drain", **{"from": "b", "to": "c", "report_page": str(page)})
    assert drained.returncode == 0, drained.stdout + drained.stderr
    assert "1 selected, 1 moved" in drained.stdout
    assert "1 of 1 connections moved" in page.read_text()
    lines.finish()
