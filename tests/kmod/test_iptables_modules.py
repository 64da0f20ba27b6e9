# SPDX-License-Identifier: MIT
"""Redirect mode iptables in the daemon's own unit, which may load no module: what it lacks, and gets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import yaml

from guests.guest import Guest
from guests.paths import PROJECT

pytestmark = pytest.mark.timeout(900)
MODULES = ("ip_tables", "ip6_tables")
CONFIG = {
    "groups": [{"name": "default", "key_file": "/etc/sockmi/group.key", "interface": "eth0"}],
    "redirect": {"modes": ["iptables"]},
    "engine": "repair",
}


def test_what_the_unit_may_not_load(guests: Callable[..., list[Guest]]) -> None:
    """It names the modules; with those of the role's file the kernel loads all else for it."""
    (guest,) = guests(1, systemd=True, memory=512)
    sockmid = f"{PROJECT}/.venv/bin/sockmid"
    unit = (PROJECT / "daemon/systemd/sockmid.service").read_text()
    assert "CAP_SYS_MODULE" not in unit
    # Started once: a test has not to wait for a service that begins again and again.
    unit = unit.replace("/opt/sockmi/bin/sockmid", sockmid).replace("Restart=always", "Restart=no")
    guest.put("/etc/systemd/system/sockmid.service", unit.encode())
    guest.put("/etc/sockmi/sockmi.yml", yaml.safe_dump(CONFIG).encode())
    guest.put("/etc/sockmi/group.key", b"ab01cd23ef456789" * 4, 0o600)
    guest.run("for one in iptables ip6tables; do update-alternatives --set $one /usr/sbin/$one-legacy; done")
    guest.run("modprobe -r iptable_filter ip_tables ip6_tables", check=False)

    def starts() -> str:
        """Nothing, or what it said instead."""
        begun = guest.run("systemctl daemon-reload; systemctl restart sockmid", check=False, limit=200)
        said = guest.run("journalctl -u sockmid -o cat --no-pager").stdout
        return "" if begun.code == 0 else re.findall(r"^sockmid: (.*)$", said, re.MULTILINE)[-1]

    assert starts() == (
        "[Errno 95] redirect mode iptables: the kernel has not loaded ip_tables and ip6_tables; `modprobe -a "
        "ip_tables ip6_tables`, at boot by a file in /etc/modules-load.d, or use redirect mode nat"
    )
    checked = guest.run([sockmid, "--check"], limit=200).stdout
    assert "but sockmid would not start now: redirect mode iptables: the kernel has not loaded" in checked
    guest.run("modprobe -a ip_tables")
    assert "the kernel has not loaded ip6_tables; `modprobe -a ip6_tables`" in starts()
    # As at boot.
    file = "\n".join(["# A comment.", *MODULES, ""])
    guest.put("/etc/modules-load.d/sockmi-iptables.conf", file.encode())
    guest.run("systemctl restart systemd-modules-load")
    assert starts() == ""
    for program in ("iptables", "ip6tables"):
        for table, role in (("nat", "away"), ("nat", "home"), ("raw", "raw"), ("filter", "mute")):
            assert f"-N sockmi_{role}" in guest.run([program, "-t", table, "-S"]).stdout
    doctor = guest.run([PROJECT / ".venv/bin/sockmi", "doctor", "--json"], check=False, limit=200).stdout
    [found] = [one for one in json.loads(doctor)["checks"] if one["name"] == "iptables"]
    assert found["status"] == "ok", found
