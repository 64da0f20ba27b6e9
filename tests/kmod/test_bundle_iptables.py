# SPDX-License-Identifier: MIT
"""Redirect mode iptables of a release that the role installs, on Debian 12 and 13 with their Pythons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.guest import Guest
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from tests.kmod.bundle import install, made

pytestmark = [pytest.mark.timeout(2400), pytest.mark.slow]
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
CONFIG = {
    "groups": [{"name": "default", "key_file": "/etc/sockmi/group.key", "interface": "eth0"}],
    "redirect": {"modes": ["iptables"]},
}


@pytest.mark.kernels("6.1", "6.12")
def test_it_works_there(guests: Callable[..., list[Guest]], kernel: str, tmp_path: Path) -> None:
    """Whatever Python the wheelhouse was built with; confined, beside a compiler, and with no network."""
    suite = DEBIAN_KERNELS[kernel].suite
    bundle, name = made(tmp_path, PYTHONS[suite])
    (guest,) = guests(1, suite=suite, systemd=True, packages=["apparmor"], memory=512, checkout=False)
    there = install(guest, bundle, name, CONFIG)
    # What the role does on a host that had no iptables.
    guest.run("for one in iptables ip6tables; do update-alternatives --set $one /usr/sbin/$one-legacy; done")
    guest.run("modprobe -a ip_tables ip6_tables")
    guest.put("/etc/apparmor.d/sockmid", (PROJECT / "daemon/apparmor/sockmid").read_bytes())
    # On hosts that build the kernel module there are programs in which ctypes looks for libraries.
    for program in ("gcc", "ld"):
        guest.put(f"/usr/bin/{program}", b"#!/bin/sh\nexit 1\n", 0o755)
    guest.run("echo 0 >/proc/sys/kernel/printk_ratelimit; apparmor_parser --replace /etc/apparmor.d/sockmid")
    guest.run("systemctl daemon-reload; systemctl start sockmid", limit=400)
    for program in ("iptables", "ip6tables"):
        for table, role in (("nat", "away"), ("nat", "home"), ("raw", "raw"), ("filter", "mute")):
            rules = guest.run([program, "-t", table, "-S"]).stdout
            assert f"-N sockmi_{role}\n" in rules
            assert f"-j sockmi_{role}\n" in rules
    doctor = guest.run([f"{there}/bin/sockmi", "doctor", "--json"], check=False, limit=200).stdout
    [found] = [one for one in json.loads(doctor)["checks"] if one["name"] == "iptables"]
    assert found["status"] == "ok", found
    said = guest.run("dmesg").stdout.splitlines()
    denied = [line for line in said if 'apparmor="DENIED"' in line]
    assert not denied, "\n".join(denied)
    guest.run("systemctl is-active sockmid && systemctl stop sockmid", limit=100)
