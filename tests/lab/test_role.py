# SPDX-License-Identifier: MIT
"""The tasks of the role, on a host of their own without systemd: what they leave, refuse and remove."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collection import PROJECT
from tests.lab.role_host import FOLDERS, RoleHost, apparmor
from tests.lab.scenario import until

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
KEY = secrets.token_hex(32)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host on which nothing of SockMi is."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        yield made


def test_a_prefix_that_is_not_its_own_is_refused(host: RoleHost) -> None:
    host.sh("mkdir /opt/theirs; touch /opt/theirs/keep /opt/theirs/data")
    refused = {
        "/opt/": "'/opt/', a folder of the system's",
        "/usr/../var/lib": "a folder of the system's",
        "/bin": "a folder of the system's",
        "/run/sockmi": "a folder of the system's",
        "/opt/theirs": "'/opt/theirs', where something else is: data, keep",
    }
    before = host.sh(f"find {host.scratch}/upper | sort")
    for said, answer in zip(refused.values(), looked_at(host, *refused), strict=True):
        assert said in answer
    [answer] = host.cases([(("uninstall",), {"sockmi_prefix": "opt/theirs"})])
    assert "'opt/theirs'; give an absolute path" in answer
    assert host.sh(f"find {host.scratch}/upper | sort") == before


def test_an_own_prefix_is_taken(host: RoleHost) -> None:
    host.sh("mkdir -p /opt/empty/lost+found")
    host.release("/opt/held")
    host.sh("touch /opt/held/note")
    for answer in looked_at(host, "/opt/empty", "/opt/held"):
        assert "systemd does not run there" in answer  # all is looked at
        assert "sockmi_prefix is" not in answer


def looked_at(host: RoleHost, *prefixes: str) -> list[str]:
    """What the role says of each before it begins."""
    return host.cases([(("preflight",), {"sockmi_prefix": one, "sockmi_group_key": KEY}) for one in prefixes])


def test_uninstall_finds_where_it_was_installed(host: RoleHost) -> None:
    """With another prefix than the unit's its redirects stayed in the kernel, its releases on the disk."""
    host.release("/opt/elsewhere")
    code, output, _changed = host.tasks(
        "gather", "host", "configure", sockmi_prefix="/opt/elsewhere", sockmi_group_key=KEY
    )
    assert code == 0, output
    host.sh("nft add table inet sockmi; ln -s /opt/elsewhere/current/bin/sockmi /usr/local/bin/sockmi")
    host.sh("ln -s /opt/sockmi/current/bin/sockmid /usr/local/sbin/sockmid")  # of somebody else
    code, output, predicted = host.tasks("uninstall", check=True)
    assert code == 0, output
    assert "table inet sockmi" in host.sh("nft list tables; ls /opt/elsewhere/current/bin/sockmid")
    code, output, changed = host.tasks("uninstall")
    assert code == 0, output
    assert predicted == changed > 2
    host.sh("rm /usr/local/sbin/sockmid")  # which was not its own
    left = host.sh(f"nft list tables; find {' '.join(FOLDERS)} -xdev -name '*sockmi*'; ls /opt")
    assert "sockmi" not in left
    assert "elsewhere" not in left
    code, output, changed = host.tasks("uninstall")
    assert (code, changed) == (0, 0), output


def test_uninstall_that_was_cut_off_finds_the_rest(host: RoleHost) -> None:
    """Where it was installed is known as long as something is there; a folder cannot be removed at first."""
    host.release("/opt/elsewhere")
    code, output, _changed = host.tasks(
        "gather", "host", "configure", sockmi_prefix="/opt/elsewhere", sockmi_group_key=KEY
    )
    assert code == 0, output
    host.sh("mount --bind /opt/elsewhere/releases /opt/elsewhere/releases")
    code, output, _changed = host.tasks("uninstall")
    assert code != 0, output
    host.sh("umount /opt/elsewhere/releases")
    code, output, _changed = host.tasks("uninstall")
    assert code == 0, output
    left = host.sh(f"find {' '.join(FOLDERS)} -xdev -name '*sockmi*'; find /opt -name elsewhere")
    assert (left, host.tasks("uninstall")[2]) == ("", 0)


def test_uninstall_leaves_what_is_not_its_own(host: RoleHost) -> None:
    """Of an installation into a folder that others use, as earlier releases allowed."""
    host.sh("mkdir /opt/shared; touch /opt/shared/keep")
    host.release("/opt/shared")
    unasked = dict.fromkeys(["sockmi_firewall", "sockmi_stream_port"], "{{ of_nobody }}")
    code, output, changed = host.tasks("uninstall", **unasked)
    assert (code, changed > 0) == (0, True), output
    assert host.sh("ls /opt/shared") == "keep\n"


def test_keys_of_groups_that_it_left_go(host: RoleHost) -> None:
    host.release("/opt/sockmi")

    def configure(*names: str, check: bool = False) -> int:
        groups = [{"name": name, "port": 7780 + number} for number, name in enumerate(names)]
        code, output, changed = host.tasks(
            *("gather", "host", "configure", "forget_keys"),
            **{"check": check, "sockmi_group_key": KEY, "sockmi_groups": groups},
        )
        assert code == 0, output
        return changed

    configure("default", "blue", "red")
    host.sh("cp /etc/sockmi/blue.key /etc/sockmi/mine.key")
    by_hand = json.dumps([{"key_file": "/etc/sockmi/red.key"}])
    host.sh(f"mkdir -p /var/lib/sockmi; echo '{by_hand}' >/var/lib/sockmi/groups.json")
    predicted = configure("green", check=True)
    assert configure("green") == predicted
    assert host.sh("ls /etc/sockmi/*.key").split() == [
        f"/etc/sockmi/{name}.key" for name in ("green", "mine", "red")
    ]
    assert configure("green") == 0


# Knows one module more than the kernel has loaded, and notes what it is asked to load.
MODPROBE = """#!/bin/sh
[ "$1" = --dry-run ] || { echo "$@" >>/etc/asked; exit; }
[ "$3" = other_tables ]
"""


def test_modules_of_legacy_iptables_are_loaded(host: RoleHost, tmp_path: Path) -> None:
    """Now and at boot, while the mode is asked for, in whichever variable."""
    (tmp_path / "modprobe").write_text(MODPROBE)
    host.sh(f"install -m 755 {tmp_path}/modprobe /usr/local/bin/modprobe")
    host.sh("test -e /proc/net/ip_tables_names || exit 1")  # of this machine's kernel: nothing to do
    file = "/etc/modules-load.d/sockmi-iptables.conf"
    host.release("/opt/sockmi")

    def run(modes: dict[str, Any], *tasks: str, check: bool = False, **others: Any) -> int:
        code, output, changed = host.tasks(*tasks, check=check, sockmi_group_key=KEY, **modes, **others)
        assert code == 0, output
        return changed

    asked: dict[str, Any] = {"sockmi_redirect_modes": ["nat", "iptables"]}
    unloaded = {"__sockmi_xtables": ["ip_tables", "other_tables"]}
    predicted = run(asked, "gather", "host", check=True, **unloaded)
    assert "asked" not in host.sh(f"ls /etc; test ! -e {file}")
    assert run(asked, "gather", "host", **unloaded) == predicted
    assert host.sh(f"cat /etc/asked; grep -v '^#' {file}") == "--all other_tables\nip_tables\nother_tables\n"
    run(asked, "gather", "host")
    assert host.sh(f"cat /etc/asked; grep -v '^#' {file}") == "--all other_tables\nip_tables\nip6_tables\n"
    settings: dict[str, Any] = {"sockmi_settings": {"redirect": {"modes": ["iptables"]}}}
    assert run(settings, "gather", "host") == 0
    assert run({}, "gather", "host") == 1
    assert "sockmi" not in host.sh("ls /etc/modules-load.d")
    run(asked, "gather", "host")
    run({}, "uninstall")
    assert "sockmi" not in host.sh("ls /etc/modules-load.d")


def test_the_daemons_apparmor_profile(host: RoleHost, tmp_path: Path) -> None:
    """Written for the prefix and the Python, loaded, and removed with all that the parser has made of it."""
    place, loaded = "/etc/apparmor.d/sockmid", "cat /sys/kernel/security/apparmor/profiles"
    host.release("/opt/elsewhere")
    (tmp_path / "python").write_text("#!/bin/sh\necho cp312 /opt/python\n")
    host.sh(f"mkdir -p /opt/python/bin; install -m 755 {tmp_path}/python /opt/python/bin/python3")
    where: dict[str, Any] = {"sockmi_prefix": "/opt/elsewhere", "sockmi_python": "/opt/python/bin/python3"}

    def run(*tasks: str, check: bool = False, **variables: Any) -> int:
        code, output, changed = host.tasks(*tasks, check=check, **variables)
        assert code == 0, output
        return changed

    assert run("gather", "apparmor", **where) == 0  # there is none
    apparmor(host, tmp_path)
    host.sh("mv /usr/local/sbin/apparmor_parser /run")
    assert run("gather", "apparmor", **where) == 0  # nobody could load it
    host.sh("mv /run/apparmor_parser /usr/local/sbin")
    for never in (False, "false"):
        assert run("gather", "apparmor", **where | {"sockmi_apparmor": never}) == 0
    predicted = run("gather", "apparmor", check=True, **where)
    assert "sockmid (" not in host.sh(f"{loaded}; test ! -e {place}")
    assert run("gather", "apparmor", **where) == predicted == 2
    assert "sockmid (enforce)\n" in host.sh(loaded)
    written = host.sh(f"cat {place}")
    assert "\n@{sockmi_prefix}=/opt/elsewhere\n@{sockmi_python}=/usr /usr/local /opt/python\n" in written
    assert run("gather", "apparmor", **where) == 0
    host.sh("sed -i '/^sockmid (/d' /sys/kernel/security/apparmor/profiles")  # as aa-teardown does
    assert run("gather", "apparmor", **where) == 1
    for tasks, variables in ((("gather", "apparmor"), {"sockmi_apparmor": False}), (("uninstall",), {})):
        run("gather", "apparmor", **where)
        assert run(*tasks, check=True, **where | variables) == run(*tasks, **where | variables) > 0
        assert host.sh(loaded) == "sockmid-other (enforce)\n"
        assert (
            host.sh("find /etc/apparmor.d /var/cache/apparmor -name sockmid")
            == "/etc/apparmor.d/local/sockmid\n"
        )


# As a router says it (RFC 4861, 4.2): for 1800 s by this way.
ADVERTISING = """
import socket, struct
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as router:
    router.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"far")
    router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    router.sendto(struct.pack("!BxxxBBHII", 134, 64, 0, 1800, 0, 0), ("ff02::1%far", 0))
"""
FORWARDING = "/proc/sys/net/ipv6/conf/all/forwarding"


def test_a_route_of_router_advertisements_stays(host: RoleHost, tmp_path: Path) -> None:
    """The kernel forgets it when it begins to forward; Ansible may have come by it."""
    (tmp_path / "router.py").write_text(ADVERTISING)
    host.sh(
        "ip link add lan type veth peer name far;"
        "for one in lan far; do ip link set $one addrgenmode eui64; ip link set $one up; done;"
        "echo 2 >/proc/sys/net/ipv6/conf/far/accept_ra"
    )
    until(lambda: "tentative" not in (there := host.sh("ip -6 address show")) and there.count("fe80:") == 2)
    host.sh(f"{sys.executable} {tmp_path}/router.py")
    route = "ip -6 route show default dev lan"
    until(lambda: "proto ra" in host.sh(route))
    wanted = {"net.ipv6.conf.all.forwarding": 1}
    code, output, predicted = host.tasks("gather", "host", "settings", check=True, sockmi_sysctls=wanted)
    assert (code, host.sh(f"cat {FORWARDING}")) == (0, "0\n"), output
    code, output, changed = host.tasks("gather", "host", "settings", sockmi_sysctls=wanted)
    assert (code, changed, host.sh(f"cat {FORWARDING}")) == (0, predicted, "1\n"), output
    assert "proto ra" in host.sh(route)
    assert "net/ipv6/conf/lan/accept_ra = 2" in host.sh("cat /etc/sysctl.d/60-sockmi.conf")
    code, output, changed = host.tasks("gather", "host", "settings", sockmi_sysctls=wanted)
    assert (code, changed) == (0, 0), output
    code, output, _changed = host.tasks("uninstall")
    assert code == 0, output
    assert host.sh(f"cat {FORWARDING} /proc/sys/net/ipv6/conf/lan/accept_ra") == "0\n1\n"


# A host that takes no redirects, and forwards what comes in by lan and wan, but not by far.
HARDENED = """
for one in lan wan far; do
	ip netns add $one
	ip link add $one type veth peer name eth0 netns $one
	ip link set $one up
	ip -n $one link set eth0 up
done
ip address add 192.0.2.1/26 dev lan; ip -n lan address add 192.0.2.2/26 dev eth0
ip address add 192.0.2.65/26 dev wan; ip -n wan address add 192.0.2.66/26 dev eth0
ip address add 192.0.2.129/26 dev far; ip -n far address add 192.0.2.130/26 dev eth0
ip -n lan route add default via 192.0.2.1; ip -n wan route add default via 192.0.2.65
ip -n far route add default via 192.0.2.129
sysctl -q -w net.ipv4.conf.lan.forwarding=1 net.ipv4.conf.wan.forwarding=1
sysctl -q -w net.ipv4.conf.all.accept_redirects=0 net.ipv6.conf.lan.forwarding=1 net.ipv6.conf.wan.accept_ra=2
"""
# From far nobody gets there, from lan one does.
ACROSS = """
if ip netns exec far ping -c 1 -W 1 192.0.2.66; then exit 1; fi
ip netns exec lan ping -c 1 -W 5 192.0.2.66
"""


def sysctls(host: RoleHost) -> list[str]:
    """All of the network's that are the namespace's."""
    return sorted(
        host.sh("sysctl -a 2>/dev/null | grep '^net.ipv[46].*conf\\|^net.ipv4.ip_forward'").splitlines()
    )


def test_what_forwarding_rewrites_is_as_it_was_after_uninstall(host: RoleHost) -> None:
    """And who was forwarded before is between, and nobody else; redirects are not taken."""
    tasks = ("gather", "host", "firewall", "settings")
    host.systemd()
    host.sh(HARDENED)
    before = sysctls(host)
    host.sh(ACROSS)
    host.sh("ip link add gone type veth peer name late")
    code, output, _changed = host.tasks(*tasks)
    assert code == 0, output
    assert host.sh("sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding").split() == ["1", "1"]
    host.sh(ACROSS)
    assert "net.ipv4.conf.all.accept_redirects = 0" in sysctls(host)
    kept = host.sh("cat /etc/sockmi/before-install.json")
    host.sh("ip link delete gone; ip link add new type veth peer name other")
    code, output, changed = host.tasks(*tasks)
    assert (code, changed, host.sh("cat /etc/sockmi/before-install.json")) == (0, 0, kept), output
    code, output, predicted = host.tasks("uninstall", check=True)
    assert code == 0, output
    code, output, changed = host.tasks("uninstall")
    assert (code, changed) == (0, predicted), output
    assert host.sh("sysctl -n net.ipv4.conf.new.forwarding net.ipv6.conf.new.forwarding").split() == [
        "0",
        "0",
    ]
    host.sh("ip link delete new")
    assert sysctls(host) == before
    host.sh(ACROSS)


def test_redirects_are_not_taken_where_forwarding_is_switched_off(host: RoleHost) -> None:
    host.sh("sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.all.accept_redirects=0")
    before = sysctls(host)
    code, output, _changed = host.tasks(
        "gather", "host", "settings", sockmi_sysctls={"net.ipv4.ip_forward": 0}
    )
    assert code == 0, output
    now = host.sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.all.accept_redirects").split()
    assert now == ["0", "0"]
    code, output, _changed = host.tasks("uninstall")
    assert (code, sysctls(host)) == (0, before), output


def test_a_setting_that_forwarding_rewrites_is_what_it_is_wanted_to_be(host: RoleHost) -> None:
    wanted = {"net.ipv4.conf.all.accept_redirects": 1, "net.ipv4.ip_forward": 1}
    tasks = ("gather", "host", "settings")
    code, output, _changed = host.tasks(*tasks, sockmi_sysctls=wanted)
    assert code == 0, output
    assert host.sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.all.accept_redirects").split() == ["1", "1"]
    lines = host.sh("tail -n 2 /etc/sysctl.d/60-sockmi.conf").splitlines()
    assert lines == ["net.ipv4.ip_forward = 1", "net.ipv4.conf.all.accept_redirects = 1"]
    assert host.tasks(*tasks, sockmi_sysctls=wanted)[2] == 0


def test_a_setting_may_be_written_as_yaml_has_it(host: RoleHost) -> None:
    """On and off are 1 and 0 to the kernel."""
    wanted = {
        "net.ipv4.ip_forward": True,
        "net.ipv4.conf.lo.rp_filter": "2",
        "net.ipv4.conf.all.shared_media": False,
    }
    tasks = ("gather", "host", "firewall", "settings")
    code, output, _changed = host.tasks(*tasks, sockmi_sysctls=wanted)
    assert code == 0, output
    assert host.sh("sysctl -n " + " ".join(wanted)).split() == ["1", "2", "0"]
    assert "net.ipv4.ip_forward = 1\n" in host.sh("cat /etc/sysctl.d/60-sockmi.conf")
    assert "meta nfproto ipv4 drop" in host.sh("cat /etc/sockmi/firewall.nft")
    code, output, changed = host.tasks(*tasks, sockmi_sysctls=wanted)
    assert (code, changed) == (0, 0), output


def test_it_does_not_forward_without_its_guard(host: RoleHost) -> None:
    """Where the firewall's part fails."""
    host.systemd()
    host.release("/opt/sockmi")
    host.sh(
        f"cd {host.scratch}; printf '#!/bin/sh\\necho nft: not today >&2; exit 1\\n' >nft; chmod +x nft;"
        "mount --bind nft $(command -v nft)"
    )
    words = ["-i", "localhost,", "-c", "local", "--tags", "configure", PROJECT / "install.yml"]
    done = host.play(*words, sockmi_hosts="localhost", sockmi_group_key=KEY)
    assert "nft: not today" in done.stdout, done.stdout + done.stderr
    switches = "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding; ls /etc/sysctl.d"
    assert host.sh(switches).split()[:2] == ["0", "0"]
    assert "60-sockmi.conf" not in host.sh(switches)


def test_the_firewall_base_follows_what_is_chosen(host: RoleHost) -> None:
    """With every firewall it forwards for SockMi alone, if forwarding was off; its own closes the ports."""

    def firewall(choice: str) -> tuple[int, str]:
        code, output, changed = host.tasks(
            "gather",
            *("host", "firewall", "settings"),
            sockmi_firewall=choice,
            sockmi_firewall_sources=["192.0.2.1"],
            sockmi_sysctls={"net.ipv4.ip_forward": 1},
        )
        rules = host.sh("cat /etc/sockmi/firewall.nft 2>/dev/null || true")
        assert code == 0, output
        return changed, rules

    changed, rules = firewall("nftables")
    assert changed > 0
    assert "chain input" in rules
    assert "meta nfproto ipv4 drop" in rules
    assert firewall("nftables")[0] == 0
    _changed, rules = firewall("firewalld")
    assert "chain input" not in rules
    assert "meta nfproto ipv4 drop" in rules
    changed, rules = firewall("none")
    assert (changed > 0, rules) == (True, "")
    assert "sockmi-firewall" not in host.sh("ls /etc/systemd/system")


def test_rules_that_nobody_has_loaded_are_loaded(host: RoleHost) -> None:
    """A run was cut off between their change and the restart of what loads them."""
    host.systemd()

    def firewall(source: str) -> int:
        code, output, changed = host.tasks(
            *("gather", "host", "firewall"),
            **{"sockmi_firewall": "nftables", "sockmi_firewall_sources": [source], "sockmi_sysctls": {}},
        )
        assert code == 0, output
        assert f"ip saddr != {source}" in host.sh("nft list table inet sockmi_firewall")
        return changed

    firewall("192.0.2.1")
    assert firewall("192.0.2.1") == 0
    host.sh("sed -i s/192.0.2.1/192.0.2.7/ /etc/sockmi/firewall.nft")
    assert firewall("192.0.2.7") == 1
    assert firewall("192.0.2.7") == 0


# As the role is given them: of a trial's namespaces are those of all devices.
SYSCTLS = {"net.ipv4.ip_forward": 1, "net/ipv4/conf/all/src_valid_mark": 1, "kernel.of_nothing": 1}


def test_the_test_migration_proves_a_release(host: RoleHost, tmp_path: Path) -> None:
    """A connection moves between namespaces of the host. Where it cannot, that is told; nothing is left.

    Whatever TMPDIR is there: its name may be longer than the path of a socket can be (unix(7)).
    """
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    program = (PROJECT / "roles/sockmi/files/verify.py").read_text()

    def verify(**settings: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-I", "-c", program, "200", json.dumps(settings), json.dumps(SYSCTLS)]
        return host.run(*words, env=os.environ | {"TMPDIR": str(folder)})

    done = verify(engine="repair", redirect={"modes": ["nat"]})
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert proof.pop("blackout_us") > 0
    moved = {"outcome": "moved", "engine": "repair", "mode": "nat", "bytes": (1 << 16) + (1 << 20)}
    assert proof == moved
    failed = verify(engine="repair", redirect={"modes": ["forward"], "devices": ["lo"]})
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "the connection did not move: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(folder.iterdir()) == []
    assert host.sh("find /run /tmp -maxdepth 1 -name 'sockmi-verify-*'") == ""
    assert host.sh("ip netns list") == ""
