# SPDX-License-Identifier: MIT
"""What the role does with the daemon that runs: a stand-in for systemd starts and stops it."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collection import PROJECT
from tests.lab.role_host import RoleHost, apparmor, wheelhouse

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


def test_what_was_written_for_a_module_that_is_gone_goes(host: RoleHost) -> None:
    """Somebody has removed that by hand, so that neither its sources nor the module are there."""
    files = "/etc/modprobe.d/sockmi.conf /etc/modules-load.d/sockmi.conf"
    host.sh(f"{DOWN}; mount -t tmpfs modules /sys/module; rm -rf /usr/src/sockmi-*; touch {files}")
    code, output, predicted = host.tasks("uninstall", check=True)
    assert (code, host.sh(f"ls {files}").split()) == (0, files.split()), output
    code, output, changed = host.tasks("uninstall")
    assert (code, changed) == (0, predicted), output
    assert "sockmi" not in host.sh("ls /etc/modprobe.d /etc/modules-load.d")


@pytest.mark.usefixtures("core")
def test_force_removes_one_that_does_not_answer(host: RoleHost) -> None:
    host.sh("mkdir -p /run/sockmi")
    host.sh(f'setsid -f python3 -c "{MUTE}" >/dev/null 2>&1 </dev/null')
    host.sh("timeout 600 sh -c 'while ! [ -S /run/sockmi/control.sock ]; do sleep 0.2; done'")
    before = installed(host)
    code, output, changed = host.tasks("uninstall", sockmi_uninstall_force="false")
    assert (code, changed) == (2, 0), output
    assert "the SockMi daemon does not answer" in output
    assert (installed(host), host.asked()) == (before, [])
    code, output, _changed = host.tasks("uninstall", sockmi_uninstall_force="true")
    assert code == 0, output
    assert host.asked()[:2] == [f"disable {UNIT}", f"stop {UNIT}"]
    assert "sockmi" not in host.sh("ls /opt /etc /etc/systemd/system")


# A daemon that is down: systemd would start it at the next boot.
DOWN = f"rm /run/units/{UNIT}"


def test_a_daemon_that_is_down_stays_enabled_where_it_is_needed(host: RoleHost) -> None:
    """Connections depend on its redirects: uninstall refuses before it has done anything."""
    code, output, _changed = host.tasks("gather", "host", "configure", sockmi_group_key=KEY)
    assert code == 0, output
    program = "/opt/sockmi/releases/1.0-abc/bin/sockmid"
    host.sh(
        f"{DOWN}; rm {program}; nft add table inet sockmi;"
        f"printf '#!/bin/sh\necho 1 moved connections depend >&2; exit 1\n' >{program}; chmod +x {program}"
    )
    before = installed(host)
    for check in (True, False):
        code, output, changed = host.tasks("uninstall", check=check)
        assert (code, changed) == (2, 0), output
        assert "the redirects cannot be removed: 1 moved connections depend Nothing was changed." in output
        assert (installed(host), host.asked()) == (before, [])


# A dangling link, as after an upgrade of the distribution; a journal that is none.
BROKEN = ("rm $(readlink -f current)/bin/sockmid", "echo no journal >/var/lib/sockmi/journal.db")


@pytest.mark.parametrize("broken", BROKEN, ids=["python", "journal"])
def test_force_removes_one_that_is_broken(host: RoleHost, broken: str) -> None:
    """And without it nothing is done."""
    host.sh("mkdir -p /var/lib/sockmi /run/sockmi")
    code, output, _changed = host.tasks(
        "gather", "host", "configure", sockmi_group_key=KEY, sockmi_settings=SETTINGS
    )
    assert code == 0, output
    done = host.run(sys.executable, "-c", "from sockmi.redirect.tables import *; Tables(Settings()).setup()")
    assert done.returncode == 0, done.stderr
    host.sh(f"{DOWN}; touch /var/lib/sockmi/lock; cd /opt/sockmi; {broken}")
    before = installed(host)
    code, output, changed = host.tasks("uninstall")
    assert (code, changed) == (2, 0), output
    assert "Nothing was changed. Mend that, or cut off what depends on them with sockmi_" in output
    assert (installed(host), host.asked()) == (before, [])
    code, output, predicted = host.tasks("uninstall", check=True, sockmi_uninstall_force=True)
    assert (code, installed(host)) == (0, before), output
    code, output, changed = host.tasks("uninstall", sockmi_uninstall_force=True)
    assert (code, changed) == (0, predicted), output
    assert "sockmi" not in host.sh("nft list tables; ls /opt /etc /etc/systemd/system")


# As the role writes it, but that it can run in a namespace of its own.
SETTINGS = {"engine": "repair", "state_dir": "/var/lib/sockmi", "metrics_port": 0}
GROUPS = [{"name": "default", "interface": "lan"}]
ROLE = ("gather", "host", "daemon")


def running(host: RoleHost, **settings: Any) -> dict[str, Any]:
    """Have the daemon run as the role has configured it; the role's variables."""
    variables = {
        "sockmi_group_key": KEY,
        "sockmi_groups": GROUPS,
        "sockmi_settings": SETTINGS | settings,
        "sockmi_kernel_module": "none",
        "sockmi_sysctls": {},
        "sockmi_verify": "never",
    }
    host.sh("ip link add lan type veth peer name far; ip link set lan up; ip link set far up")
    host.sh("ip address add 192.0.2.1/24 dev lan; mkdir -p /etc/sockmi /run/sockmi /var/lib/sockmi")
    code, output, _changed = host.tasks("gather", "host", "configure", **variables)
    assert code == 0, output
    config = "/etc/sockmi/sockmi.yml"
    host.sh(f"setsid -f /opt/sockmi/current/bin/sockmid --config {config} >/var/log/sockmid 2>&1 </dev/null")
    host.sh("timeout 600 sh -c 'while ! [ -S /run/sockmi/control.sock ]; do sleep 0.2; done'")
    programs = Path(sys.executable).parent
    host.sh(f"ln -s {programs}/sockmi /opt/sockmi/current/bin; pgrep -xo sockmid >/run/units/{UNIT}")
    code, output, _changed = host.tasks(*ROLE, **variables)
    assert code == 0, output
    host.asked()
    return variables


@pytest.mark.usefixtures("core")
def test_what_cannot_be_reloaded_is_restarted(host: RoleHost) -> None:
    """And check mode says so; what can be is no restart."""
    variables = running(host)
    assert host.tasks(*ROLE, **variables)[::2] == (0, 0)
    live = variables | {"sockmi_settings": SETTINGS | {"policy": "weighted"}}
    other = variables | {"sockmi_settings": SETTINGS | {"policy": "weighted", "metrics_port": 9781}}
    for wanted, asked in ((live, []), (other, [f"restart {UNIT}"])):
        code, output, predicted = host.tasks(*ROLE, check=True, **wanted)
        assert (code, host.asked()) == (0, []), output
        code, output, changed = host.tasks(*ROLE, **wanted)
        assert (code, host.asked()) == (0, asked), output
        assert predicted == changed == 2, output


def test_why_it_did_not_reload_is_told(host: RoleHost) -> None:
    """And its ports are its own: only of another program they are taken."""
    variables = running(host)
    taken = "The daemon's ports are taken: tcp/7781 by sockmid ("
    asked = [(("preflight",), variables)]
    assert taken not in host.cases(asked)[0]
    host.sh(f"mv /run/units/{UNIT} /run/pid; touch /run/units/{UNIT}")
    assert taken in host.cases(asked)[0]
    host.sh(f"mv /run/pid /run/units/{UNIT}")
    host.sh("chmod 644 /etc/sockmi/default.key")
    done = host.tasks("gather", "reload", **variables)
    assert done[0] != 0
    assert "sockmid runs with its former settings: " in done[1]
    assert "lets others read it" in done[1]


def test_what_cannot_be_restarted_runs_again_as_it_did(host: RoleHost) -> None:
    """Settings with which it does not start are no reason for none to run; nor is a key left behind."""
    variables = running(host)
    kept = "cat /etc/sockmi/*; cat /etc/systemd/system/sockmid.service"
    before = host.sh(kept)
    wanted = variables | {
        "sockmi_group_key": secrets.token_hex(32),
        "sockmi_groups": [*GROUPS, {"name": "blue", "interface": "lan", "port": 7790}],
        "sockmi_settings": SETTINGS | {"metrics_port": 9781},
    }
    host.sh("echo '! grep -q 9781 /etc/sockmi/sockmi.yml' >/run/refuses")
    code, output, _changed = host.tasks(*ROLE, **wanted)
    assert code != 0
    told = "sockmid did not start; with its former configuration it runs again. Unable to restart service"
    assert told in output
    assert (host.sh(kept), host.asked()) == (before, [f"restart {UNIT}", "daemon-reload", f"start {UNIT}"])
    host.sh("echo false >/run/refuses")
    code, output, _changed = host.tasks(*ROLE, **wanted)
    assert "sockmid did not start; with its former configuration it does not start either: Unable" in output


def test_the_former_release_comes_back(host: RoleHost, tmp_path: Path) -> None:
    """With its configuration, unit, profile and keys, if the new one does not start."""
    variables = running(host)
    apparmor(host, tmp_path)
    host.sh(
        "cd /etc/apparmor.d; echo '# Former.' >sockmid; cp sockmid /var/cache/apparmor/1a2b.0;"
        "echo 'sockmid (enforce)' >>/sys/kernel/security/apparmor/profiles"
    )
    host.sh("cp -r /opt/sockmi/releases/1.0-abc /opt/sockmi/releases/2.0-def")
    host.sh("echo 2.0-def >/opt/sockmi/releases/2.0-def/release; echo >>/etc/systemd/system/sockmid.service")
    host.sh("echo '! [ $(readlink /opt/sockmi/current) = releases/2.0-def ]' >/run/refuses")
    files = "/etc/sockmi/sockmi.yml /etc/systemd/system/sockmid.service /etc/apparmor.d/sockmid"
    kept = f"cat {files} /var/cache/apparmor/*/sockmid; head /etc/sockmi/*.key"
    before = host.sh(f"{kept}; readlink /opt/sockmi/current; find /usr/local -type l | sort")
    wanted = variables | {
        "sockmi_groups": [{"name": "blue", "interface": "lan"}, {"name": "default", "port": 7790}],
        "sockmi_group_key": secrets.token_hex(32),
        "sockmi_c_library": True,
        "__sockmi_bundle": {"release": "2.0-def", "file": "none"},
    }
    code, output, _changed = host.tasks(*ROLE, **wanted)
    assert code != 0
    assert "sockmid did not start; the former release 1.0-abc runs again. Unable to restart service" in output
    assert host.sh(f"{kept}; readlink /opt/sockmi/current; find /usr/local -type l | sort") == before
    assert host.asked() == [
        *("daemon-reload", f"restart {UNIT}"),
        *("daemon-reload", f"start {UNIT}"),
    ]


OTHER = {
    "sockmi_groups": [{"name": "blue", "interface": "lan"}, {"name": "default", "port": 7790}],
    "sockmi_group_key": secrets.token_hex(32),
    "sockmi_settings": SETTINGS | {"policy": "weighted"},
}
# All that an upgrade with other variables would change.
KEPT = (
    "tail -n +1 /etc/sockmi/* /etc/systemd/system/sockmid.service; readlink /opt/sockmi/current;"
    "ls /etc/sysctl.d; sysctl net.ipv4.ip_forward; nft list tables; find /usr/local -type l | sort"
)


def test_a_release_that_proves_nothing_changes_nothing(host: RoleHost, tmp_path: Path) -> None:
    """The whole role, but that the new release is there already: of its test migration nothing comes."""
    variables = running(host)
    host.sh(
        "mount -t sysfs own /sys;"  # with the devices of its own network
        "cd /opt/sockmi/releases; cp -r 1.0-abc 2.0-def; echo 2.0-def >2.0-def/release;"
        "ln -s $(command -v false) 2.0-def/bin/python"
    )
    before = host.sh(KEPT)
    wanted = variables | {
        **OTHER,
        "sockmi_sysctls": {"net.ipv4.ip_forward": 1},
        "sockmi_firewall": "nftables",
        "sockmi_verify": "changed",
        "sockmi_wheelhouse": wheelhouse(host, tmp_path / "house"),
        "sockmi_wheelhouse_build": False,
    }
    words = ["-i", "localhost,", "-c", "local", PROJECT / "install.yml"]
    done = host.play(*words, sockmi_hosts="localhost", **wanted)
    assert "the test migration failed, and the release is not used" in done.stdout, done.stdout + done.stderr
    assert (host.sh(KEPT), host.asked()) == (before, [])


def test_a_daemon_that_may_not_be_restarted_keeps_what_it_reads(host: RoleHost, tmp_path: Path) -> None:
    """Nobody knows whether something is being moved: a later restart, of whom ever, finds what it had."""
    variables = running(host)
    apparmor(host, tmp_path)
    host.sh("cd /opt/sockmi/releases; cp -r 1.0-abc 2.0-def; mv /run/sockmi/control.sock /run/away")
    host.sh("echo >>/etc/systemd/system/sockmid.service")
    kept = f"{KEPT}; find /etc/apparmor.d; cat /sys/kernel/security/apparmor/profiles"
    before = host.sh(kept)
    bundle = {"__sockmi_bundle": {"release": "2.0-def", "file": "none"}, "sockmi_wait_s": 1}
    code, output, _changed = host.tasks(*ROLE, **variables | OTHER | bundle)
    assert code != 0
    assert (
        "the daemon was left alone, and what it reads is as it was: nobody knows how many migrations"
        in output
    )
    assert (host.sh(kept), host.asked()) == (before, [])
