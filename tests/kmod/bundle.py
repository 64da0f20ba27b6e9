# SPDX-License-Identifier: MIT
"""A release in a guest, as the role puts it there: a bundle of the wheelhouse, and the daemon's own unit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from guests.guest import Guest
from guests.paths import PROJECT

RELEASES = "/opt/sockmi/releases"


def made(folder: Path, python: str) -> tuple[Path, str]:
    """The bundle for a Python such as ``3.11``, and its release's name; built with this machine's Python."""
    words = [sys.executable, PROJECT / "scripts/wheelhouse", folder, "--python", python]
    subprocess.run(words, check=True, capture_output=True, timeout=900)
    [bundle] = json.loads((folder / "manifest.json").read_text())["bundles"].values()
    return folder / bundle["file"], bundle["release"]


def install(guest: Guest, bundle: Path, name: str, config: dict[str, Any]) -> str:
    """Unpack it, and write unit, key and configuration; where it is in the guest."""
    guest.put(f"{RELEASES}/new.tar", bundle.read_bytes())
    unpacking = (PROJECT / "roles/sockmi/files/install_release.py").read_text()
    there = f"{RELEASES}/{name}"
    guest.run(["python3", "-I", "-c", unpacking, f"{RELEASES}/new.tar", there], limit=900)
    guest.run(["ln", "-s", there, "/opt/sockmi/current"])
    unit = (PROJECT / "daemon/systemd/sockmid.service").read_text()
    unit = unit.replace("/opt/sockmi/", "/opt/sockmi/current/")
    guest.put("/etc/systemd/system/sockmid.service", unit.encode())
    guest.put("/etc/sockmi/group.key", b"ab01cd23ef456789" * 4, 0o600)
    guest.put("/etc/sockmi/sockmi.yml", yaml.safe_dump(config).encode())
    return there
