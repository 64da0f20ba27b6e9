# SPDX-License-Identifier: MIT
"""A host whose kernel was told to do without IPv6: the daemon leaves it out, and serves IPv4."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from guests.guest import Guest
from guests.paths import PROJECT

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
CONFIG = {
    "groups": [{"name": "default", "key_file": "/etc/sockmi/group.key", "interface": "eth0"}],
    "redirect": {"modes": ["forward", "nat"]},
}
_SERVED = """
mkdir -p /run/sockmi /var/lib/sockmi
python -m sockmi.service --config /etc/sockmi/sockmi.yml &
trap 'kill $!; wait' EXIT
for second in $(seq 100); do [ -S /run/sockmi/control.sock ] && break; sleep 1; done
python -m sockmi.cli.main status || exit 3
python -m sockmi.cli.main groups || exit 3
python -m sockmi.cli.main doctor | grep 'ok *nftables' || exit 3
ip rule | grep -q 'iif eth0 lookup 7780'
"""


def test_the_daemon_serves_ipv4(guests: Callable[..., list[Guest]]) -> None:
    (guest,) = guests(1, memory=512, boot=["ipv6.disable=1"])
    assert guest.run("test -e /proc/net/if_inet6", check=False).code
    guest.put("/etc/sockmi/group.key", b"ab01cd23ef456789" * 4, 0o600)
    guest.put("/etc/sockmi/sockmi.yml", yaml.safe_dump(CONFIG).encode())
    where = {"PATH": f"{PROJECT}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": f"{PROJECT}/daemon"}
    device = "ip link show eth0 >/dev/null 2>&1 || ip link add eth0 type dummy; "
    guest.run(f"{device} ip addr replace 192.0.2.1/24 dev eth0; ip link set eth0 up")
    done = guest.run(["sh", "-c", _SERVED], cwd=PROJECT, env=where, check=False, limit=400)
    assert done.code == 0, done.stdout[-3000:] + done.stderr[-3000:]
