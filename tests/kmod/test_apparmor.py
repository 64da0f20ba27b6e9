# SPDX-License-Identifier: MIT
"""The daemon's AppArmor profile, in kernels that have AppArmor: whole moves under it, with either engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from guests.guest import Guest
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from tests.kmod.bundle import install, made

pytestmark = [pytest.mark.timeout(2400), pytest.mark.slow]
CONFIG = {
    "groups": [{"name": "default", "key_file": "/etc/sockmi/group.key", "interface": "eth0"}],
    "redirect": {"modes": ["forward", "nat", "takeover"]},
}
SUITES = {"bookworm": "3.11", "trixie": "3.13"}  # AppArmor's parser and abstractions are of one, and Python


def test_what_a_confined_daemon_does_and_may_not(guests: Callable[..., list[Guest]], kernel: str) -> None:
    """The tests of tests/lab/test_confined.py, with the module: each ran, and passed."""
    (guest,) = guests(1, packages=["apparmor"], memory=1024, boot=["audit_backlog_limit=8192"])
    guest.load(DEBIAN_KERNELS[kernel].module())
    guest.run("mount -t securityfs securityfs /sys/kernel/security; modprobe -a ip_tables ip6_tables")
    # As an installed one is: it would compile itself at each start.
    guest.run(
        [".venv/bin/python", "-m", "compileall", "-q", "daemon", "lab", "tests"], cwd=PROJECT, limit=600
    )
    where = {
        "SOCKMI_INSIDE": kernel,
        "PYTHONDONTWRITEBYTECODE": "1",  # as beside an installed one, where nothing is to be written
        "PATH": f"{PROJECT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    words = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lab/test_confined.py"]
    done = guest.run(words, cwd=PROJECT, env=where, check=False, limit=2200)
    told = done.stdout.splitlines()
    assert done.code == 0, done.stdout[-8000:]
    assert "skipped" not in told[-1], told[-1]


def test_the_installed_service(guests: Callable[..., list[Guest]], kernel: str, tmp_path: Path) -> None:
    """A release as the role unpacks it, in the daemon's own unit: it and what it starts are confined."""
    suite = "bookworm" if kernel == "6.1" else "trixie"
    bundle, name = made(tmp_path, SUITES[suite])
    (guest,) = guests(1, suite=suite, systemd=True, packages=["apparmor"], memory=512, checkout=False)
    there = install(guest, bundle, name, CONFIG)
    guest.put("/etc/apparmor.d/sockmid", (PROJECT / "daemon/apparmor/sockmid").read_bytes())
    guest.run("echo 0 >/proc/sys/kernel/printk_ratelimit; apparmor_parser --replace /etc/apparmor.d/sockmid")
    for verb in ("start", "restart", "reload"):
        guest.run(f"systemctl daemon-reload; systemctl {verb} sockmid", limit=400)
    for command in ("list", "groups", "history", "doctor"):
        guest.run([f"{there}/bin/sockmi", command], check=False, limit=200)
    processes = guest.run("cat /sys/fs/cgroup/system.slice/sockmid.service/cgroup.procs").stdout.split()
    labels = {guest.run(["cat", f"/proc/{one}/attr/current"], check=False).stdout for one in processes}
    assert len(processes) > 1  # workers, too
    assert labels <= {"sockmid (enforce)\n", ""}  # one has ended
    said = guest.run("dmesg").stdout.splitlines()
    assert [line for line in said if 'apparmor="DENIED"' in line] == []
    guest.run("systemctl is-active sockmid && systemctl stop sockmid", limit=100)


@pytest.mark.parametrize("suite", SUITES)
def test_its_language(guests: Callable[..., list[Guest]], suite: str) -> None:
    """Of the parsers of both Debians; no warning but of what this kernel, or the declared ABI, has not."""
    (guest,) = guests(1, suite=suite, packages=["apparmor"], checkout=False)
    guest.run("mount -t securityfs securityfs /sys/kernel/security")
    guest.put("/etc/apparmor.d/sockmid", (PROJECT / "daemon/apparmor/sockmid").read_bytes())
    unsaid = ("abi", "rule-not-enforced", "rule-downgraded")
    strict = ["--warn=all", *(f"--warn=no-{one}" for one in unsaid), "--Werror"]
    done = guest.run(["apparmor_parser", "--replace", *strict, "/etc/apparmor.d/sockmid"])
    assert (done.stdout, done.stderr) == ("", "")
    assert "sockmid (enforce)" in guest.run("cat /sys/kernel/security/apparmor/profiles").stdout
