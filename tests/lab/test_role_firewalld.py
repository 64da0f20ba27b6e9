# SPDX-License-Identifier: MIT
"""The role with firewalld, the real one, on a host of namespaces with a D-Bus of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.role_host import RoleHost

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
STARTING = """
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
ZONES = ("firewall-cmd --list-all-zones", "firewall-cmd --permanent --list-all-zones")
STARTING_MAX_S = 30


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host with firewalld, and an operator who has changed some of its rules."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        made.unpack("firewalld")
        made.sh(STARTING)
        deadline = time.monotonic() + STARTING_MAX_S
        while made.run("firewall-cmd", "--state").stdout != "running\n":
            assert time.monotonic() < deadline, made.sh("cat /var/log/firewalld")
            time.sleep(0.2)
        made.sh(OPERATORS)
        yield made


def rules(host: RoleHost) -> list[str]:
    """Those of the role in the default zone, which are the same now and after a restart."""
    now, later = (
        sorted(one for one in host.sh(f"{each} --list-rich-rules").splitlines() if '"192.0.2.9"' not in one)
        for each in ("firewall-cmd", "firewall-cmd --permanent")
    )
    assert now == later
    return now


def firewall(host: RoleHost, **variables: Any) -> int:
    """A run of the role's part; how many tasks changed something."""
    code, output, changed = host.tasks("gather", "firewall", **variables)
    assert code == 0, output
    return changed


def test_firewalld_lets_in_what_the_role_names_and_no_more(host: RoleHost) -> None:
    before = [host.sh(each) for each in (*ZONES, "nft list ruleset")]
    assert "2222" in before[0]
    assert firewall(host, sockmi_firewall_sources=["192.0.2.0/24", "2001:db8::1"]) > 0
    assert rules(host) == [
        f'rule priority="7780" family="{family}" source address="{source}" '
        f'port port="{port}" protocol="{protocol}" accept'
        for family, source in (("ipv4", "192.0.2.0/24"), ("ipv6", "2001:db8::1"))
        for port, protocol in ((7780, "udp"), (7781, "tcp"))
    ]
    live = host.sh("nft list table inet firewalld")
    assert "ip saddr 192.0.2.0/24 tcp dport 7781 accept" in live
    assert "ip6 saddr 2001:db8::1 udp dport 7780 accept" in live
    # Others; what is open no more goes.
    there = rules(host)
    predicted = firewall(host, sockmi_stream_port=7444, check=True)
    assert rules(host) == there
    assert firewall(host, sockmi_stream_port=7444) == predicted > 0
    assert rules(host) == [
        'rule priority="7780" port port="7444" protocol="tcp" accept',
        'rule priority="7780" port port="7780" protocol="udp" accept',
    ]
    assert firewall(host, sockmi_stream_port=7444) == 0
    # And what is the operator's has stayed as it was, now and after a restart.
    assert firewall(host, sockmi_firewall="nftables") > 0
    assert [host.sh(each) for each in (*ZONES, "nft list ruleset")] == before
