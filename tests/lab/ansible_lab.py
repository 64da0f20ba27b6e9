# SPDX-License-Identifier: MIT
"""Ansible on a lab: the controller from the checkout or an installed collection, and what its tests share."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab import Lab
from tests import collection, returned
from tests.lab.scenario import Service

PROJECT = Path(__file__).resolve().parents[2]
HEADER = re.compile(r"^(?P<host>\S+) \| (?P<status>[A-Z!]+) => (?P<json>\{.*)", re.MULTILINE | re.DOTALL)

# Accepts one connection, and leaves an urgent byte pending on it: such a socket cannot be carried.
URGENT = """
import select, socket, sys
listener = socket.create_server(("", int(sys.argv[1])))
print("ready", flush=True)
connection, _ = listener.accept()
select.select([], [], [connection])
print("urgent", flush=True)
sys.stdin.read()
"""


class Controller:
    """Runs Ansible on the lab: from the checkout, or from a folder of installed collections."""

    def __init__(self, lab: Lab, installed: Path | None = None) -> None:
        self.lab = lab
        self.installed = installed
        self.inventory = collection.root(installed) / "inventories/lab"

    def command(self, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of Ansible's programs."""
        result = collection.run(
            self.installed, program, *words, "-e", f"sockmi_lab_name={self.lab.name}", "-i", self.inventory
        )
        assert "Traceback" not in result.stdout + result.stderr
        return result

    def module(self, host: str, module: str, *flags: str, **options: Any) -> dict[str, Any]:
        """Run a module ad hoc; its result, with what ``--diff`` printed as ``shown``."""
        words = [host, "-m", f"sockmi.appliance.{module}"]
        words += ["-a", json.dumps(options)] if options else []
        result = self.command("ansible", *words, *flags)
        found = HEADER.search(result.stdout)
        assert found, result.stdout + result.stderr
        content: dict[str, Any] = json.loads(found["json"])
        failed = "FAILED" in found["status"]
        # What is returned is what the documentation says, whatever was asked.
        assert not returned.differences(module, {**content, "failed": failed})
        assert (result.returncode != 0) == failed
        return {**content, "failed": failed, "shown": result.stdout[: found.start()].strip()}

    def migrate(self, *flags: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run the playbook migrate."""
        return self.playbook("migrate", *flags, **variables)

    def playbook(self, name: str, *flags: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run a playbook by its name; ``variables`` without their prefix."""
        extra = json.dumps({f"sockmi_{key}": value for key, value in variables.items()})
        called = f"sockmi.appliance.{name}" if self.installed else f"{name}.yml"
        return self.command("ansible-playbook", called, "-e", extra, *flags)


def daemons(lab: Lab, action: str, *words: str) -> dict[str, Any]:
    """``python -m lab daemons``; its JSON."""
    result = subprocess.run(
        [sys.executable, "-m", "lab", "daemons", action, "--lab", lab.name, "--json", *words],
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'daemon'}"},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert result.returncode in ((0, 3) if action == "status" else (0,)), result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def clients(running: Service, count: int) -> None:
    """So many clients, connected."""
    for _turn in range(count):
        running.client("lines", "--interval-s", "0.05")
    running.connected(count)


def changed(result: subprocess.CompletedProcess[str], host: str = "a") -> int:
    """The host's ``changed`` in the recap."""
    found = re.search(rf"^{host} .*changed=(\d+)", result.stdout, re.MULTILINE)
    assert found, result.stdout + result.stderr
    return int(found[1])
