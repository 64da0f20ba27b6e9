# SPDX-License-Identifier: MIT
"""What the redirects for special cases need: addresses that can be taken over, a legacy iptables."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.host import Host
from lab.labs import Lab
from sockmi.addresses import Endpoint
from sockmi.redirect.iptables import unusable
from tests.lab.matrix_lab import Bench, bench
from tests.lab.scenario import daemons

SERVICE = {4: "10.77.1.77", 6: "fd77:1::77"}
WIDTH = {4: 24, 6: 64}
WITHOUT_LEGACY = unusable("iptables-legacy")
needs_legacy = pytest.mark.skipif(bool(WITHOUT_LEGACY), reason=str(WITHOUT_LEGACY))

_RULE = re.compile(
    r"-A sockmi_(?P<role>\w+) -s (?P<source>\S+)/\d+ -d (?P<target>\S+)/\d+ -p tcp -m tcp "
    r"--sport (?P<sport>\d+) --dport (?P<dport>\d+) -j \w+(?: --to-\w+ (?P<to>\S+))?"
)
_TO_PEER = ("home", "mute")  # roles of rules for what goes to the peer; the others, for what comes from it


def forget_other_tests(lab: Lab, hosts: str) -> None:
    """A daemon without a journal takes back what the kernel has of others' connections, and their address.

    What a mode has that is not configured now stays as well.
    """
    for name in hosts:
        for family in ("inet", "netdev"):
            lab.host(name).run(["nft", "delete", "table", family, "sockmi"], check=False)


def give_service(lab: Lab, name: str = "a") -> None:
    """One host has the service addresses, and the peer knows no other that has them."""
    for version, address in SERVICE.items():
        if not has_address(lab.host(name), address):
            extra = ["nodad"] if version == 6 else []
            lab.host(name).run(["ip", "addr", "add", f"{address}/{WIDTH[version]}", "dev", "eth0", *extra])
    lab.host("peer").run(["ip", "neigh", "flush", "dev", "eth0"])


def take_service(lab: Lab, names: str = "ab") -> None:
    """The inverse of `give_service`, wherever among these the addresses are."""
    for name in names:
        for address in SERVICE.values():
            lab.host(name).run(["ip", "addr", "flush", "dev", "eth0", "to", address], check=False)


def has_address(host: Host, address: str) -> bool:
    """Whether the kernel of a host has it."""
    return bool(host.run(["ip", "-o", "addr", "show", "to", address]).stdout)


def hardware_address(host: Host) -> str:
    """Of its device in the segment."""
    (link,) = json.loads(host.run(["ip", "-json", "link", "show", "eth0"]).stdout)
    address: str = link["address"]
    return address


def lives_at(host: Host, address: str) -> str:
    """To which hardware address a host sends what is for ``address``."""
    (entry,) = json.loads(host.run(["ip", "-json", "neigh", "show", address]).stdout)
    lladdr: str = entry["lladdr"]
    return lladdr


@contextmanager
def legacy_iptables(directory: Path) -> Iterator[None]:
    """Programs that are started in the block find the legacy one under the name ``iptables``."""
    for name in ("iptables", "ip6tables"):
        (directory / name).symlink_to(shutil.which(f"{name}-legacy") or "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        yield


@contextmanager
def scene(lab: Lab, mode: str, directory: Path) -> Iterator[Bench]:
    """Daemons of one redirect mode."""
    with ExitStack() as stack:
        if mode == "iptables":
            stack.enter_context(legacy_iptables(directory))
        if mode == "takeover":
            give_service(lab)
            stack.callback(take_service, lab)
        redirect = {"devices": ["eth0"], "modes": [mode]}
        both = stack.enter_context(daemons(lab, "ab", redirect=redirect))
        it = stack.enter_context(bench(lab, mode, both))
        it.service = SERVICE if mode == "takeover" else {}
        stack.callback(it.clear)
        yield it


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of ours for one connection; ``role`` as in sockmi.redirect.iptables, ``to``: translated to."""

    role: str
    remote: str
    to: str


def rules(host: Host) -> list[Rule]:
    """What our chains of iptables-legacy hold of connections."""
    found = []
    for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
        for line in host.run([program]).stdout.splitlines():
            if not line.startswith("-A sockmi_"):
                continue
            one = _RULE.match(line)
            assert one, line
            end = ("target", "dport") if one["role"] in _TO_PEER else ("source", "sport")
            address, port = (one[name] for name in end)
            remote = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            to = str(Endpoint.parse(one["to"]).address) if one["to"] else ""
            found.append(Rule(one["role"], remote, to))
    return found


def misled_by_rules(lab: Lab, hosts: str, home: str, where: dict[str, str]) -> list[str]:
    """What is wrong with the rules for connections: led from ``home`` to where they are."""
    there = {name: rules(lab.host(name)) for name in hosts}
    found = []
    for remote, host in where.items():
        away = host != home
        importer = lab.host(host).address(6 if remote.startswith("[") else 4)
        led = {
            role: [name for name in hosts for one in there[name] if (one.role, one.remote) == (role, remote)]
            for role in ("away", "mute", "home", "raw")
        }
        right = {role: ([home] if role in ("away", "mute") else [host]) * away for role in led}
        to = [one.to for one in there[home] if (one.role, one.remote) == ("away", remote)]
        if led != right or to != [importer] * away:
            found.append(f"{remote}: {led} to {to}, not {right} to {importer}")
    return found
