# SPDX-License-Identifier: MIT
"""What the role finds out, and says, before it touches anything."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.role_host import RoleHost

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
KEY = secrets.token_hex(32)
# As of a kernel that Secure Boot has started.
LOCKED_DOWN = """
mount -t tmpfs security /sys/kernel/security
echo 'none [integrity] confidentiality' >/sys/kernel/security/lockdown
"""
# No package of the archive is known, and no kernel's headers are installed.
WITHOUT_ARCHIVE = """
mount -t tmpfs lists /var/lib/apt/lists; mount -t tmpfs cache /var/cache/apt
sed -i 's/^Package: linux-headers-/&not-/' /var/lib/dpkg/status
"""
# What the role finds out, with its defaults.
PROBING = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: sockmi.appliance.sockmi, tasks_from: gather, public: true}
    - ansible.builtin.copy: {content: "{{ __sockmi_probe | to_json }}", dest: /run/probe.json, mode: "0600"}
"""
# A stranger at the daemon's UDP port, and one of this host alone, who is in nobody's way.
STRANGER = (
    "import socket, time; all = socket.socket(type=socket.SOCK_DGRAM); all.bind(('', 7780));"
    "own = socket.create_server(('127.0.0.1', 7781)); time.sleep(900)"
)
UBUNTU = 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\nPRETTY_NAME="Ubuntu 24.04.2 LTS"\n'
ROCKY = 'ID=rocky\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.5"\nPRETTY_NAME="Rocky Linux 9.5"\n'


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host on which nothing of SockMi is, and, as far as the role looks, systemd runs."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        made.sh("mkdir -p /run/systemd/system")
        yield made


def untouched(host: RoleHost) -> str:
    """All that may have been changed."""
    return host.sh(f"find {host.scratch}/upper -printf '%p %s %T@\\n' | sort; sysctl net.ipv4.ip_forward")


def test_a_kernel_that_takes_no_module(host: RoleHost) -> None:
    """One that is required is refused at once; without it, that is said at once."""
    host.sh(LOCKED_DOWN)
    before = untouched(host)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY, sockmi_kernel_module="required")
    assert code != 0
    assert "no kernel module: Secure Boot is on, so the kernel loads only modules whose signer's" in said
    assert (changed, untouched(host)) == (0, before)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY)
    assert (code, changed) == (0, 0), said
    assert "moves sockets by TCP_REPAIR (engine repair): Secure Boot is on, so" in said
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY, sockmi_kernel_module="none")
    assert (code, changed, "Secure Boot" in said) == (0, 0, False), said


def test_headers_that_are_not_to_be_had(host: RoleHost) -> None:
    """Before the packages are installed that come before them."""
    host.sh(WITHOUT_ARCHIVE)
    before = untouched(host)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY, sockmi_kernel_module="required")
    kernel = host.sh("uname -r").strip()
    assert code != 0
    assert f"there are no headers of Linux {kernel}, and apt knows no package linux-headers-{kernel};" in said
    assert (changed, untouched(host)) == (0, before)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY)
    assert (code, changed) == (0, 0), said
    assert re.search(rf"without [^:]*linux-headers-{re.escape(kernel)}[^:]* the kernel module is not", said)


def test_capabilities_that_not_even_root_has(host: RoleHost) -> None:
    host.under = ["setpriv", "--bounding-set", "-net_raw,-sys_ptrace"]
    before = untouched(host)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY)
    assert code != 0
    assert "Root has no CAP_NET_RAW, CAP_SYS_PTRACE there, as in an unprivileged container" in said
    assert (changed, untouched(host)) == (0, before)


def test_a_kernel_without_legacy_iptables(host: RoleHost) -> None:
    """Where the mode is asked for."""
    before = untouched(host)
    absent = {"__sockmi_xtables": ["no_such_tables"]}
    code, said, changed = host.tasks(
        "preflight", sockmi_group_key=KEY, sockmi_redirect_modes=["nat", "iptables"], **absent
    )
    assert code != 0
    assert "has no module no_such_tables, without which there is no redirect mode iptables; leave" in said
    assert (changed, untouched(host)) == (0, before)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY, **absent)
    assert (code, changed) == (0, 0), said


BY_IPTABLES: dict[str, Any] = {"sockmi_group_key": KEY, "sockmi_redirect_modes": ["nat", "iptables"]}


def test_an_iptables_that_others_may_use(host: RoleHost) -> None:
    """It is refused where it is the one of nf_tables, and left as it is."""
    host.sh("update-alternatives --set iptables /usr/sbin/iptables-nft")
    before = untouched(host)
    code, said, changed = host.tasks("preflight", **BY_IPTABLES)
    assert code != 0
    assert re.search(r"There iptables is v1\S+ \(nf_tables\), which does not see the rules of", said)
    assert (changed, untouched(host)) == (0, before)
    code, said, changed = host.tasks("preflight", sockmi_group_key=KEY)
    assert (code, changed) == (0, 0), said
    host.sh("update-alternatives --set iptables /usr/sbin/iptables-legacy")
    code, said, changed = host.tasks("preflight", **BY_IPTABLES)
    assert (code, changed) == (0, 0), said


def test_an_iptables_that_nobody_has_used(host: RoleHost, tmp_path: Path) -> None:
    """The package is named where it may not be installed, and made the legacy one where the role does it."""
    for one in ("iptables", "ip6tables"):
        host.sh(f"update-alternatives --set {one} /usr/sbin/{one}-nft")
    found = probed(host, tmp_path)
    absent = {"packages": [one for one in found["packages"] if one != "iptables"]}
    known: dict[str, Any] = {"__sockmi_probe": found | absent, "sockmi_kernel_module": "none", **BY_IPTABLES}
    code, said, changed = host.tasks("preflight", sockmi_packages=False, **known)
    assert (code, changed) == (2, 0)
    assert "lacks the packages iptables, and sockmi_packages is false" in said
    code, said, predicted = host.tasks("preflight", check=True, **known)
    assert code == 0, said
    assert "(nf_tables)" in host.sh("iptables -V")
    code, said, changed = host.tasks("preflight", **known)
    assert (code, changed) == (0, predicted), said
    for one in ("iptables", "ip6tables"):
        assert "(legacy)" in host.sh(f"{one} -V")
    known["sockmi_redirect_modes"] = ["nat"]
    code, said, changed = host.tasks("preflight", sockmi_packages=False, **known)
    assert (code, changed) == (0, 0), said


@pytest.mark.parametrize(("release", "name"), [(UBUNTU, "Ubuntu 24.04.2 LTS"), (ROCKY, "Rocky Linux 9.5")])
def test_what_is_not_proven_is_said_to_be(host: RoleHost, tmp_path: Path, release: str, name: str) -> None:
    proven = "SockMi is proven on Debian 12 and 13."
    _code, said, _changed = host.tasks("preflight", sockmi_group_key=KEY)
    assert proven not in said
    (tmp_path / "os-release").write_text(release)
    host.sh(f"rm /etc/os-release; cp {tmp_path}/os-release /etc/os-release")
    _code, said, changed = host.tasks("preflight", sockmi_group_key=KEY, sockmi_packages=False)
    assert f"{proven} {name} has variables, but nobody has tried it there." in said
    assert changed == 0


def probed(host: RoleHost, folder: Path) -> dict[str, Any]:
    """What the role finds out of a host that has all it needs."""
    (folder / "probing.yml").write_text(PROBING)
    done = host.play("-i", "localhost,", folder / "probing.yml")
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(host.sh("cat /run/probe.json"))
    return found | {"mtu": {"eth0": 1500, "tun0": 1449}, "free_mib": 201, "lacking_capabilities": []}


def test_what_is_in_the_way_is_named(host: RoleHost, tmp_path: Path) -> None:
    """Each alone, on a host that is else fit, and nothing has been done by then."""
    fit = probed(host, tmp_path)
    tunnel = {"sockmi_groups": [{"name": "default", "interface": "tun0"}]}
    asked = {"sockmi_apparmor": True}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {}, ""),
        (
            {"family": "other", "name": "Arch Linux"},
            {},
            "Arch Linux is neither of the Debian nor of the RHEL",
        ),
        ({"root": False}, {}, "The tasks do not run as root; use become"),
        ({"systemd": False}, {}, "systemd does not run there, and the daemon is a unit of it"),
        ({"kernel": "5.9.16-1-amd64"}, {}, "Linux 5.9.16-1-amd64 is too old; the daemon needs 5.10"),
        ({"ptrace_scope": "3"}, {}, "kernel.yama.ptrace_scope is 3, so no owner of a socket can be stopped"),
        ({"taken": {"tcp/7781": "nginx (8)"}}, {}, "ports are taken: tcp/7781 by nginx (8); end that"),
        ({"free_mib": 200}, {}, "/opt/sockmi has 200 MiB left; a release needs 200"),
        ({}, tunnel, "The MTU of tun0 is below 1450"),
        ({"mtu": {"tun0": 1450}}, tunnel, ""),
        ({"apparmor": {"enabled": False, "parser": None}}, {}, ""),
        (
            {"apparmor": {"enabled": False, "parser": None}},
            asked,
            "true, but the kernel does not confine by AppArmor",
        ),
        (
            {"apparmor": {"enabled": True, "parser": None}},
            asked,
            "true, but apparmor_parser is not there; install",
        ),
        ({"apparmor": {"enabled": True, "parser": "/usr/sbin/apparmor_parser"}}, asked, ""),
        ({"python": None}, {}, "has no Python 3.11, 3.12 or 3.13"),
        ({"python": {"path": "/usr/bin/python3", "tag": "cp39"}}, {}, "has no Python 3.11, 3.12 or 3.13"),
    ]
    before = untouched(host)
    own = {"sockmi_group_key": KEY, "sockmi_kernel_module": "none"}
    told = host.cases(
        [(("preflight",), own | more | {"__sockmi_probe": fit | unfit}) for unfit, more, _said in cases]
    )
    for (unfit, _more, said), answer in zip(cases, told, strict=True):
        assert said in answer, (unfit, answer)
        assert bool(said) == bool(answer), (unfit, answer)
    assert untouched(host) == before


def test_a_port_that_is_taken(host: RoleHost) -> None:
    host.sh(f'setsid -f python3 -c "{STRANGER}" >/dev/null 2>&1 </dev/null')
    host.sh("timeout 60 sh -c 'while ! ss -ltn | grep -q 7781; do sleep 0.2; done'")
    [answer] = host.cases([(("preflight",), {"sockmi_group_key": KEY, "sockmi_kernel_module": "none"})])
    assert re.search(r"The daemon's ports are taken: udp/7780 by python3\S* \([0-9]+\); end that, or", answer)


def test_packages_may_bring_a_python(host: RoleHost, tmp_path: Path) -> None:
    """Check mode does not miss one that the run would install, as on RHEL 9, whose own is 3.9."""
    old = {"python": {"path": "/usr/bin/python3", "tag": "cp39"}}
    fit = probed(host, tmp_path) | old
    for packages, code in [(fit["packages"], 2), (["kmod", "nftables"], 0)]:
        known = {"__sockmi_probe": fit | {"packages": packages}, "sockmi_kernel_module": "none"}
        rc, said, _changed = host.tasks("preflight", check=True, sockmi_group_key=KEY, **known)
        assert (rc, "has no Python 3.11" in said) == (code, code == 2), said
