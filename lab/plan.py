# SPDX-License-Identifier: MIT
"""The plan of a lab: its hosts, links and addresses. Pure: nothing here touches the system.

::

        peer     a     b     c          d
          |      |     |     |          |  MTU 1400
          +------+--+--+-----+          |
                    |                   |
                 switch ---- router ----+

Every host is a network namespace ``sml-LAB-HOST``. Labs share nothing, so that each has the
same addresses.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

NAMESPACE_PREFIX = "sml"
SEGMENT_MTU_BYTES = 1500
PATIENCE = 10 if "SOCKMI_INSIDE" in os.environ else 1
"""How much longer things may take: where the module is tested processors are emulated."""
FAR_MTU_BYTES = 1400

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,28}[a-z0-9])?")


class LabError(Exception):
    """What went wrong with a lab, where, and what to do next."""


@dataclass(frozen=True, slots=True)
class Link:
    """One interface of a host; ``segment`` is what it is plugged into."""

    device: str
    segment: str
    address4: IPv4Interface
    address6: IPv6Interface
    mtu_bytes: int


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One host; ``gateway4`` and ``gateway6`` are empty for the router itself."""

    name: str
    links: tuple[Link, ...]
    gateway4: str = ""
    gateway6: str = ""
    daemon: bool = False


def _link(device: str, net: int, host: int, mtu_bytes: int) -> Link:
    segment = {1: "segment", 2: "far"}[net]
    return Link(
        device,
        segment,
        IPv4Interface(f"10.77.{net}.{host}/24"),
        IPv6Interface(f"fd77:{net}::{host}/64"),
        mtu_bytes,
    )


def _host(name: str, net: int, host: int, *, daemon: bool) -> HostPlan:
    mtu_bytes = SEGMENT_MTU_BYTES if net == 1 else FAR_MTU_BYTES
    return HostPlan(name, (_link("eth0", net, host, mtu_bytes),), f"10.77.{net}.1", f"fd77:{net}::1", daemon)


HOSTS: dict[str, HostPlan] = {
    plan.name: plan
    for plan in (
        HostPlan("router", (_link("eth0", 1, 1, SEGMENT_MTU_BYTES), _link("eth1", 2, 1, FAR_MTU_BYTES))),
        _host("peer", 1, 10, daemon=False),
        _host("a", 1, 11, daemon=True),
        _host("b", 1, 12, daemon=True),
        _host("c", 1, 13, daemon=True),
        _host("d", 2, 14, daemon=True),
    )
}

SWITCH = "switch"
"""The namespace of the bridge, which is no host."""

DAEMON_HOSTS = tuple(plan.name for plan in HOSTS.values() if plan.daemon)


def checked_name(name: str) -> str:
    """``name`` if it can be the name of a lab; raise LabError otherwise."""
    if not _NAME.fullmatch(name):
        raise LabError(
            f"{name!r} cannot be the name of a lab: use 1 to 30 of a-z, 0-9 and '-', "
            "beginning and ending with a letter or digit"
        )
    return name


def namespace_of(lab: str, host: str) -> str:
    """Name of the namespace of ``host`` (or of the switch) in ``lab``."""
    return f"{NAMESPACE_PREFIX}-{lab}-{host}"


def namespaces_of(lab: str) -> list[str]:
    """All namespaces of ``lab``, the switch first."""
    return [namespace_of(lab, name) for name in (SWITCH, *HOSTS)]
