# SPDX-License-Identifier: MIT
"""The role with ufw, the real one: unpacked from its package onto a host of namespaces, and enabled there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.role_host import RoleHost

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
# As its postinst does.
SETTING_UP = """
mkdir -p /etc/sockmi
cp /usr/share/ufw/iptables/*.rules /usr/share/ufw/ufw.conf /etc/ufw
ufw --force enable
ufw allow 22/tcp comment 'not sockmi'
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host with ufw, which lets nothing in but what the operator wants."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        made.unpack("ufw")
        made.sh(SETTING_UP)
        yield made


def rules(host: RoleHost) -> list[str]:
    """Those that were added, but the operator's, which must be there."""
    added = host.sh("ufw show added").splitlines()[1:]
    [operators] = [one for one in added if "22/tcp" in one]
    assert operators.endswith("comment 'not sockmi'")
    return sorted(one for one in added if one != operators)


def firewall(host: RoleHost, **variables: Any) -> int:
    """A run of the role's part; how many tasks changed something."""
    code, output, changed = host.tasks("gather", "firewall", **variables)
    assert code == 0, output
    return changed


def test_ufw_lets_in_what_the_role_names_and_no_more(host: RoleHost) -> None:
    assert firewall(host, sockmi_firewall_sources=["192.0.2.0/24", "2001:db8::1"]) > 0
    assert rules(host) == [
        "ufw allow from 192.0.2.0/24 to any port 7780 proto udp comment 'sockmi'",
        "ufw allow from 192.0.2.0/24 to any port 7781 proto tcp comment 'sockmi'",
        "ufw allow from 2001:db8::1 to any port 7780 proto udp comment 'sockmi'",
        "ufw allow from 2001:db8::1 to any port 7781 proto tcp comment 'sockmi'",
    ]
    live = host.sh("iptables -S ufw-user-input; ip6tables -S ufw6-user-input")
    assert "-A ufw-user-input -s 192.0.2.0/24 -p tcp -m tcp --dport 7781 -j ACCEPT" in live
    assert "-A ufw6-user-input -s 2001:db8::1/128 -p udp -m udp --dport 7780 -j ACCEPT" in live
    # Others; what is open no more goes.
    before = rules(host)
    predicted = firewall(host, sockmi_stream_port=7444, check=True)
    assert rules(host) == before
    assert firewall(host, sockmi_stream_port=7444) == predicted > 0
    assert rules(host) == ["ufw allow 7444/tcp comment 'sockmi'", "ufw allow 7780/udp comment 'sockmi'"]
    assert firewall(host, sockmi_stream_port=7444) == 0
    assert firewall(host, sockmi_firewall="nftables") > 0
    assert rules(host) == []
