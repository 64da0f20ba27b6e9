# SPDX-License-Identifier: MIT
"""Make the network of a lab: namespaces, a bridge, links, addresses, routes, sysctls (pyroute2)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import namespaces
from lab.plan import HOSTS, SWITCH, HostPlan, LabError, Link, namespace_of, namespaces_of

_BEFORE_LINKS = {
    # Addresses are usable at once: no duplicate address detection, no router discovery.
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    # A server that forwards, as redirects need it, and never advises its neighbours of a shorter way.
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}
_FORWARDING = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
_SWITCH = {"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"}
# A switch has no firewall; only where the kernel has one for bridges.
_SWITCH_OPTIONAL = {"net/bridge/bridge-nf-call-iptables": "0", "net/bridge/bridge-nf-call-ip6tables": "0"}


def build(lab: str) -> None:
    """Make all namespaces of ``lab`` and connect them; returns when they reach each other."""
    for namespace in namespaces_of(lab):
        namespaces.create(namespace)
    switch = namespace_of(lab, SWITCH)
    _sysctl(switch, _SWITCH)
    with contextlib.suppress(FileNotFoundError):
        _sysctl(switch, _SWITCH_OPTIONAL)
    for plan in HOSTS.values():
        _sysctl(namespace_of(lab, plan.name), _BEFORE_LINKS)
    with _netlink(switch) as ip:
        _make_switch(ip, lab)
    # The router has no switch to the far side: one cable to d.
    with _netlink(namespace_of(lab, "router")) as ip:
        far_end = {"ifname": "eth0", "net_ns_fd": namespace_of(lab, "d")}
        ip.link("add", ifname="eth1", kind="veth", peer=far_end)
    for plan in HOSTS.values():
        namespace = namespace_of(lab, plan.name)
        with _netlink(namespace) as ip:
            _configure(ip, plan)
        if plan.daemon or plan.name == "router":
            _sysctl(namespace, _FORWARDING)
    _wait_for_carrier(lab)


def demolish(lab: str) -> bool:
    """End the lab's processes and remove its namespaces, however far it was built; True if there was any."""
    namespaces.end_processes(namespaces_of(lab))
    removed = [namespaces.remove(namespace) for namespace in namespaces_of(lab)]
    return any(removed)


@contextlib.contextmanager
def _netlink(namespace: str) -> Iterator[Any]:
    """Netlink of a namespace, where the block is run; by itself `IPRoute` starts a process to get there."""
    # 0.1 s to load, which hundreds of programs in labs do without.
    from pyroute2 import IPRoute

    with namespaces.entered(namespace), IPRoute() as ip:
        yield ip


def _make_switch(ip: Any, lab: str) -> None:
    # Without snooping the bridge floods multicast to all ports: no querier is needed.
    ip.link("add", ifname="br0", kind="bridge", br_mcast_snooping=0, br_stp_state=0)
    bridge = _index(ip, "br0")
    ip.link("set", index=bridge, state="up")
    for plan in HOSTS.values():
        for link in plan.links:
            if link.segment == "segment":
                peer = {"ifname": link.device, "net_ns_fd": namespace_of(lab, plan.name)}
                ip.link("add", ifname=plan.name, kind="veth", peer=peer)
                ip.link("set", index=_index(ip, plan.name), master=bridge, state="up")


def _configure(ip: Any, plan: HostPlan) -> None:
    ip.link("set", index=_index(ip, "lo"), state="up")
    for link in plan.links:
        index = _index(ip, link.device)
        ip.link("set", index=index, mtu=link.mtu_bytes, state="up")
        _address(ip, index, link)
    if plan.gateway4:
        ip.route("add", dst="default", gateway=plan.gateway4)
        ip.route("add", dst="default", gateway=plan.gateway6, oif=_index(ip, "eth0"))


def _address(ip: Any, index: int, link: Link) -> None:
    for interface in (link.address4, link.address6):
        extra = {} if interface.version == 4 else {"flags": 0x02}  # IFA_F_NODAD
        ip.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen, **extra)


def _index(ip: Any, device: str) -> int:
    found = ip.link_lookup(ifname=device)
    if not found:
        raise LabError(f"interface {device} was made but is gone; does another program manage it?")
    return int(found[0])


def _sysctl(namespace: str, values: dict[str, str]) -> None:
    # /proc/sys/net shows the namespace of the thread that opens it.
    with namespaces.entered(namespace):
        for key, value in values.items():
            (Path("/proc/sys") / key).write_text(value)


def _wait_for_carrier(lab: str, timeout_s: float = 5.0) -> None:
    """Until every cable is plugged in: the kernel reports that from a worker (linkwatch)."""
    deadline = time.monotonic() + timeout_s
    ends = [(SWITCH, plan.name) for plan in HOSTS.values() if plan.links[0].segment == "segment"]
    ends += [(plan.name, link.device) for plan in HOSTS.values() for link in plan.links]
    for host, device in ends:
        namespace = namespace_of(lab, host)
        with _netlink(namespace) as ip:
            while _operstate(ip, device) != "UP":
                if time.monotonic() > deadline:
                    raise LabError(f"{namespace}: {device} did not come up within {timeout_s:.0f} s")
                time.sleep(0.01)


def _operstate(ip: Any, device: str) -> str:
    with contextlib.suppress(IndexError):
        return str(ip.link("get", ifname=device)[0].get_attr("IFLA_OPERSTATE"))
    return "missing"
