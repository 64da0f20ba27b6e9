# SPDX-License-Identifier: MIT
"""What the daemon does not load, as it would stay in memory for good; and what stands in for it."""

from __future__ import annotations

import subprocess
import sys

UNUSED = (
    "http.server",
    "importlib.metadata",
    "prometheus_client.exposition",
    "pyroute2",
    "sockmi.redirect.iptables",
    "unittest",
    "urllib.request",
    "yaml.cyaml",
    "yaml.dumper",
    "zipfile",
    "zoneinfo",
)


def run(program: str) -> str:
    """Its output, in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", program], check=True, text=True, capture_output=True, timeout=60
    ).stdout


def test_the_daemon_loads_nothing_that_it_does_not_use() -> None:
    """A module that was put in place unread has no names of its own."""
    loaded = run(
        "import sys, sockmi.service\n"
        "print(*(name for name, module in sys.modules.items()\n"
        "        if any(not one.startswith('__') for one in vars(module))))"
    ).split()
    assert "sockmi.service" in loaded
    assert not [name for name in loaded if any(name == one or name.startswith(f"{one}.") for one in UNUSED)]


def test_what_is_unread_is_read_when_somebody_asks() -> None:
    assert run(
        "import sockmi.service, importlib.metadata\n"
        "print(len(importlib.metadata.entry_points()) > 0, importlib.metadata.version('pydantic'))\n"
    ).startswith("True 2.")
