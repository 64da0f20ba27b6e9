# SPDX-License-Identifier: MIT
"""What the role does with the daemon that runs: a stand-in for systemd starts and stops it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.role_host import RoleHost

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
KEY = secrets.token_hex(32)
UNIT = "sockmid.service"
# The module, as the kernel shows it, with one user.
LOADED = "mount -t tmpfs modules /sys/module; mkdir /sys/module/sockmi; echo 1 >/sys/module/sockmi/refcnt"
# Listens at the control socket, and never answers.
MUTE = (
    "import socket, time; s = socket.socket(socket.AF_UNIX);"
    "s.bind('/run/sockmi/control.sock'); s.listen(); time.sleep(900)"
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host with a release in use, and its unit, which runs."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        made.release("/opt/sockmi")
        made.systemd(UNIT)
        yield made


def installed(host: RoleHost) -> str:
    """All that uninstall would remove."""
    return host.sh(
        f"find {host.scratch}/upper -printf '%p %s %T@\\n' | sort; nft list ruleset; ls /etc/systemd/system"
    )


def test_what_keeps_the_module_keeps_all(host: RoleHost) -> None:
    """Uninstall refuses before it has stopped the daemon."""
    code, output, _changed = host.tasks("gather", "host", "configure", sockmi_group_key=KEY)
    assert code == 0, output
    host.sh(f"rm /run/units/{UNIT}; nft add table inet sockmi; {LOADED}")
    before = installed(host)
    for check in (True, False):
        code, output, changed = host.tasks("uninstall", check=check)
        assert (code, changed) == (2, 0), output
        assert "the kernel module cannot be removed: The module is in use: 1 users" in output
        assert (installed(host), host.asked()) == (before, [])


def test_force_removes_one_that_does_not_answer(host: RoleHost) -> None:
    host.sh("mkdir -p /run/sockmi")
    host.sh(f'setsid -f python3 -c "{MUTE}" >/dev/null 2>&1 </dev/null')
    host.sh("timeout 60 sh -c 'while ! [ -S /run/sockmi/control.sock ]; do sleep 0.2; done'")
    before = installed(host)
    code, output, changed = host.tasks("uninstall", sockmi_uninstall_force="false")
    assert (code, changed) == (2, 0), output
    assert "the SockMi daemon does not answer" in output
    assert (installed(host), host.asked()) == (before, [])
    code, output, _changed = host.tasks("uninstall", sockmi_uninstall_force="true")
    assert code == 0, output
    assert host.asked()[:2] == [f"disable {UNIT}", f"stop {UNIT}"]
    assert "sockmi" not in host.sh("ls /opt /etc /etc/systemd/system")
