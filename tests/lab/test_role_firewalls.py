# SPDX-License-Identifier: MIT
"""The role with ufw and with firewalld, the real ones, on a host of namespaces: what it opens and closes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.role_host import RoleHost
from tests.lab.scenario import until

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
KEY = secrets.token_hex(32)
SOURCES = ["192.0.2.0/24", "2001:db8::1"]
# As its postinst does; and an operator who lets SSH in.
UFW = """
mkdir -p /etc/sockmi
cp /usr/share/ufw/iptables/*.rules /usr/share/ufw/ufw.conf /etc/ufw
ufw --force enable
ufw allow 22/tcp comment 'not sockmi'
"""
# With a D-Bus of its own.
FIREWALLD = """
mkdir -p /run/dbus /etc/sockmi
dbus-daemon --session --address=unix:path=/run/dbus/system_bus_socket --fork --nopidfile >/dev/null 2>&1
firewalld --nopid </dev/null >/dev/null 2>&1
"""
# Of the operator: what stays, and what goes with the next reload, as a session through port 2222 would.
OPERATORS = """
firewall-cmd --permanent --zone=internal --add-port=2222/tcp
firewall-cmd --permanent \\
	--add-rich-rule='rule family="ipv4" source address="192.0.2.9" port port="7781" protocol="tcp" drop'
firewall-cmd --permanent --remove-service=dhcpv6-client
firewall-cmd --add-port=2222/tcp
nft add table inet theirs
nft 'add chain inet theirs input { type filter hook input priority 0; }'
nft 'add rule inet theirs input tcp dport 22 accept'
"""
# A route to the members leads through wan, which is in no zone of its own.
INTERFACES = """
ip link add lan type veth peer name wan
ip link set lan up
ip link set wan up
ip route add 198.51.100.0/24 dev wan
firewall-cmd --permanent --zone=internal --add-interface=lan
firewall-cmd --zone=internal --add-interface=lan
"""
ZONES = ("firewall-cmd --list-all-zones", "firewall-cmd --permanent --list-all-zones")
OFFLINE = "firewall-offline-cmd --list-all-zones"
STARTING_MAX_S = 30


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host without a firewall."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        yield made


@pytest.fixture
def ufw(host: RoleHost) -> RoleHost:
    """With ufw, which lets nothing in but what the operator wants."""
    host.unpack("ufw")
    host.sh(UFW)
    return host


@pytest.fixture
def firewalld(host: RoleHost) -> RoleHost:
    """With firewalld, and an operator who has changed some of its rules."""
    host.unpack("firewalld")
    host.sh(FIREWALLD)
    until(lambda: runs(host), STARTING_MAX_S)
    host.sh(OPERATORS)
    return host


def runs(host: RoleHost) -> bool:
    """Whether firewalld does."""
    return host.run("firewall-cmd", "--state").stdout == "running\n"


def firewall(host: RoleHost, **variables: Any) -> int:
    """A run of the role's part; how many tasks changed something."""
    code, output, changed = host.tasks("gather", "firewall", **variables)
    assert code == 0, output
    return changed


def closes_what_is_open_no_more(
    host: RoleHost, rules: Callable[[RoleHost], list[str]], wanted: list[str]
) -> None:
    """With others it is as predicted, and nothing the second time."""
    before = rules(host)
    predicted = firewall(host, sockmi_stream_port=7444, check=True)
    assert rules(host) == before
    assert firewall(host, sockmi_stream_port=7444) == predicted > 0
    assert rules(host) == wanted
    assert firewall(host, sockmi_stream_port=7444) == 0


def ufw_rules(host: RoleHost) -> list[str]:
    """Those that were added, but the operator's, which must be there."""
    added = host.sh("ufw show added").splitlines()[1:]
    [operators] = [one for one in added if "22/tcp" in one]
    assert operators.endswith("comment 'not sockmi'")
    return sorted(one for one in added if one != operators)


def firewalld_rules(host: RoleHost, zone: str = "public") -> list[str]:
    """Those of the role in a zone, which are the same now and after a restart."""
    now, later = (
        sorted(one for one in host.sh(each).splitlines() if one and '"192.0.2.9"' not in one)
        for each in (
            f"firewall-cmd --zone={zone} --list-rich-rules",
            f"firewall-cmd --permanent --zone={zone} --list-rich-rules",
        )
    )
    assert now == later
    return now


def test_ufw_lets_in_what_the_role_names_and_no_more(ufw: RoleHost) -> None:
    assert firewall(ufw, sockmi_firewall_sources=SOURCES) > 0
    assert ufw_rules(ufw) == [
        f"ufw allow from {source} to any port {port} proto {protocol} comment 'sockmi'"
        for source in SOURCES
        for port, protocol in ((7780, "udp"), (7781, "tcp"))
    ]
    live = ufw.sh("iptables -S ufw-user-input; ip6tables -S ufw6-user-input")
    assert "-A ufw-user-input -s 192.0.2.0/24 -p tcp -m tcp --dport 7781 -j ACCEPT" in live
    assert "-A ufw6-user-input -s 2001:db8::1/128 -p udp -m udp --dport 7780 -j ACCEPT" in live
    closes_what_is_open_no_more(
        ufw, ufw_rules, ["ufw allow 7444/tcp comment 'sockmi'", "ufw allow 7780/udp comment 'sockmi'"]
    )
    assert firewall(ufw, sockmi_firewall="nftables") > 0
    assert ufw_rules(ufw) == []


def test_ufw_knows_what_it_was_given_again(ufw: RoleHost) -> None:
    """However it was written."""
    sources = ["192.0.2.11/32", "10.0.0.5/24", "2001:DB8::1", "2001:db8:1::5/64", "::ffff:10.0.0.1", "::/0"]
    assert firewall(ufw, sockmi_firewall_sources=sources) > 0
    assert len(ufw_rules(ufw)) == 2 * len(sources)
    assert firewall(ufw, sockmi_firewall_sources=sources) == 0


def test_uninstall_closes_in_a_ufw_that_is_not_in_use(ufw: RoleHost) -> None:
    """Whatever is chosen then: what it would open when it is enabled again."""
    assert firewall(ufw) > 0
    ufw.sh("ufw --force disable")
    assert "sockmi" in " ".join(ufw_rules(ufw))
    code, output, predicted = ufw.tasks("uninstall", sockmi_firewall="nftables", check=True)
    assert code == 0, output
    code, output, changed = ufw.tasks("uninstall", sockmi_firewall="nftables")
    assert (code, changed) == (0, predicted), output
    assert ufw_rules(ufw) == []


def test_a_base_that_was_flushed_is_loaded_again(host: RoleHost) -> None:
    host.systemd()
    host.sh("mkdir /etc/sockmi")
    assert firewall(host) > 0
    before = host.sh("nft list ruleset")
    assert "chain forward" in before
    assert firewall(host) == 0
    host.sh("nft flush ruleset")
    assert firewall(host, check=True) == 1
    assert firewall(host) == 1
    assert host.sh("nft list ruleset") == before
    host.sh("nft flush ruleset")
    code, output, _changed = host.tasks("uninstall")
    assert code == 0, output


def test_a_firewall_that_is_not_there_is_refused(host: RoleHost) -> None:
    host.sh("mkdir -p /run/systemd/system")
    said = host.cases([(("preflight",), {"sockmi_group_key": KEY, "sockmi_firewall": "ufw"})])
    assert "sockmi_firewall is ufw, but that is not installed there" in said[0]


def test_firewalld_lets_in_what_the_role_names_and_no_more(firewalld: RoleHost) -> None:
    before = [firewalld.sh(each) for each in (*ZONES, "nft list ruleset")]
    assert "2222" in before[0]
    assert firewall(firewalld, sockmi_firewall_sources=SOURCES) > 0
    assert firewalld_rules(firewalld) == [
        f'rule priority="7780" family="{family}" source address="{source}" '
        f'port port="{port}" protocol="{protocol}" accept'
        for family, source in zip(("ipv4", "ipv6"), SOURCES, strict=True)
        for port, protocol in ((7780, "udp"), (7781, "tcp"))
    ]
    live = firewalld.sh("nft list table inet firewalld")
    assert "ip saddr 192.0.2.0/24 tcp dport 7781 accept" in live
    assert "ip6 saddr 2001:db8::1 udp dport 7780 accept" in live
    closes_what_is_open_no_more(
        firewalld,
        firewalld_rules,
        [
            'rule priority="7780" port port="7444" protocol="tcp" accept',
            'rule priority="7780" port port="7780" protocol="udp" accept',
        ],
    )
    # And what is the operator's has stayed as it was, now and after a restart.
    assert firewall(firewalld, sockmi_firewall="nftables") > 0
    assert [firewalld.sh(each) for each in (*ZONES, "nft list ruleset")] == before


def test_firewalld_lets_in_where_the_group_is(firewalld: RoleHost) -> None:
    """In the zone of the interface that a group names, or by which its members are reached."""
    firewalld.sh(INTERFACES)
    groups = [
        {"name": "inside", "interface": "lan"},
        {"name": "outside", "port": 7790, "members": ["198.51.100.7", "198.51.100.8:7790"]},
    ]

    def opened(zone: str) -> list[str]:
        return [one.split('"')[3] for one in firewalld_rules(firewalld, zone)]

    assert firewall(firewalld, sockmi_groups=groups, check=True) > 0
    assert firewall(firewalld, sockmi_groups=groups) > 0
    assert (opened("internal"), opened("public")) == (["7780", "7781"], ["7781", "7790"])
    assert firewall(firewalld, sockmi_groups=groups) == 0
    for more in ("", "--permanent "):
        firewalld.sh(f"firewall-cmd {more}--zone=dmz --change-interface=wan")
    assert firewall(firewalld, sockmi_groups=groups) > 0
    assert (opened("internal"), opened("dmz"), opened("public")) == (["7780", "7781"], ["7781", "7790"], [])
    assert firewall(firewalld, sockmi_groups=groups) == 0


def test_uninstall_closes_in_a_firewalld_that_does_not_run(firewalld: RoleHost) -> None:
    """What it would open with its next start."""
    before = firewalld.sh(OFFLINE)
    assert firewall(firewalld) > 0
    firewalld.sh("pkill -x firewalld")
    until(lambda: not runs(firewalld))
    assert "7780" in firewalld.sh(OFFLINE)
    code, output, predicted = firewalld.tasks("uninstall", check=True)
    assert (code, "7780" in firewalld.sh(OFFLINE)) == (0, True), output
    code, output, changed = firewalld.tasks("uninstall")
    assert (code, changed) == (0, predicted), output
    assert firewalld.sh(OFFLINE) == before
    assert firewalld.tasks("uninstall")[2] == 0
