# SPDX-License-Identifier: MIT
"""The text of our nftables tables.

Sets and maps keep their elements when the text is loaded again: it only adds them if they are
missing, and replaces the rules, all in one transaction.

A packet of no moved connection costs four hash look-ups when it comes in (six if it is a SYN), two when
it goes out and one at ingress. The flow map yields a mark whose bits say what to do (settings.Tag), so
each connection is one element there, whatever its state. That element outlives its connection for a while;
a new one with the same ends is told from what is late of the old one by the SYN that began it (set anew).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sockmi.redirect.settings import Settings, Tag

BEGUN = "begun"  # of a SYN, for held.py
_ANEW = "15m"  # longer than anything lingers
_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
BASE_CHAINS = ("prerouting", "output", "reroute")  # of table inet
HOOK_PRIORITY = -310  # raw - 10: before connection tracking, and before others' raw rules


def _key(version: int, outgoing: bool) -> str:
    """remote address . remote port . local address . local port, as a packet has them."""
    ip = "ip" if version == 4 else "ip6"
    remote, local = ("d", "s") if outgoing else ("s", "d")
    return f"{ip} {remote}addr . tcp {remote}port . {ip} {local}addr . tcp {local}port"


def chain_of(device: str) -> str:
    """Name of a device's ingress chain; nftables names cannot hold all that device names can."""
    plain = re.fullmatch(r"[A-Za-z0-9_]+", device)
    return f"in_{device}" if plain else f"inx_{device.encode().hex()}"


def _family(settings: Settings, version: int) -> str:
    address = "ipv4_addr" if version == 4 else "ipv6_addr"
    ip = "ip" if version == 4 else "ip6"
    v = version
    conn = f"{address} . inet_service . {address} . inet_service"
    table = f"inet {settings.table}"
    words = 32 if version == 4 else 128

    def mark(tag: Tag) -> str:
        return f"{settings.marked(tag):#x}"

    into, out = _key(version, False), _key(version, True)
    port = "meta mark & 0xffff map @ports"
    chains = (
        "in",
        "away",
        "syn",
        "unmoved",
        "did_in",
        "ended_in",
        "local_in",
        "begun_in",
        "begun_here",
        "nat_out",
        "nat_in",
        "out",
        "did_out",
        "ended_out",
        "nat_src",
    )
    begun = f'log prefix "{BEGUN}" group {settings.log_group} queue-threshold 1'
    lines = [
        f"add set {table} hold{v} {{ type {conn}; flags timeout; }}",
        f"add set {table} quiet{v} {{ type {conn}; }}",
        f"add set {table} hold_syn{v} {{ type {address} . inet_service; flags timeout; }}",
        f"add set {table} hold_port{v} {{ type inet_service; flags timeout; }}",
        f"add set {table} away{v} {{ type {address} . inet_service; }}",
        f"add set {table} away_port{v} {{ type inet_service; }}",
        f"add set {table} led{v} {{ type {conn}; }}",
        f"add set {table} anew{v} {{ type {conn}; flags dynamic, timeout; timeout {_ANEW}; }}",
        f"add map {table} flow{v} {{ type {conn} : mark; flags timeout; }}",
        f"add map {table} addr{v} {{ type {conn} : {address}; }}",
        f"add map {table} given{v} {{ type {address} : mark; }}",
        f"add set {table} alias{v} {{ type {address}; }}",
        f"add set {table} importers{v} {{ typeof @th,192,{words}; }}",
        *(f"add chain {table} {chain}{v}" for chain in chains),
        *(f"flush chain {table} {chain}{v}" for chain in chains),
    ]
    rules = (
        ("in", f"{into} @hold{v} log group {settings.log_group} queue-threshold 1 drop"),
        ("in", f"meta mark set {into} map @flow{v} goto did_in{v}"),
        ("in", f"goto unmoved{v}"),
        ("unmoved", f"meta mark {mark(Tag.SUSPECT)} meta mark set 0"),
        ("unmoved", f"{ip} daddr . tcp dport @away{v} jump away{v}"),
        ("unmoved", f"tcp dport @away_port{v} jump away{v}"),
        # What iptables' own rules lead on has no flow, and no socket here.
        ("away", f"{into} @led{v} return"),
        # Connections that have not moved with their listener have a socket here, and so has who listens anew.
        ("away", "socket transparent { 0, 1 } return"),
        ("away", "fib daddr type local drop"),
        ("unmoved", f"{_SYN} goto syn{v}"),
        ("syn", f"{ip} daddr . tcp dport @hold_syn{v} drop"),
        ("syn", f"tcp dport @hold_port{v} drop"),
        (
            "did_in",
            f"meta mark & 0xffff0000 vmap {{ {mark(Tag.MOVED)} : drop, {mark(Tag.LOCAL)} : goto local_in{v}, "
            f"{mark(Tag.NAT_OUT)} : goto nat_out{v}, {mark(Tag.NAT_IN)} : goto nat_in{v}, "
            f"{mark(Tag.ENDED)} : goto ended_in{v} }}",
        ),
        ("ended_in", f"{_SYN} update @anew{v} {{ {into} }} meta mark set 0 goto unmoved{v}"),  # noqa: S608
        ("ended_in", f"{into} @anew{v} meta mark set 0 goto unmoved{v}"),
        ("ended_in", "drop"),
        # A socket of a connection that came here answers a SYN itself; if there is none, or TIME-WAIT,
        # which is no full socket, the daemon sees to it that the connection's home can answer. Who listens
        # here at all addresses is not meant, unless this host has the connection's address.
        ("begun_in", "socket wildcard 0 return"),
        ("begun_in", begun),
        ("begun_in", "drop"),
        ("begun_here", "socket wildcard { 0, 1 } return"),
        ("begun_here", begun),
        ("begun_here", "socket transparent { 0, 1 } return"),
        ("begun_here", "drop"),
        ("local_in", f"{_SYN} fib daddr type local jump begun_here{v}"),
        ("local_in", f"{_SYN} fib daddr type != local jump begun_in{v}"),
        ("local_in", "notrack accept"),  # the mark stays: the ip rule delivers by it
        ("nat_in", f"{_SYN} jump begun_in{v}"),
        ("nat_in", "meta mark set 0 notrack accept"),
        (
            "nat_out",
            f"{ip} daddr set {into} map @addr{v} tcp dport set {port} meta mark set 0 notrack accept",
        ),
        ("nat_out", "drop"),
        ("out", f"{out} @hold{v} drop"),
        ("out", f"tcp flags & (rst | ack) == rst {out} @quiet{v} drop"),
        ("out", f"meta mark set {out} map @flow{v} goto did_out{v}"),
        ("out", f"meta mark {mark(Tag.SUSPECT)} meta mark set 0"),
        (
            "did_out",
            f"meta mark & 0xffff0000 vmap {{ {mark(Tag.MOVED)} : drop, "
            f"{mark(Tag.LOCAL)} : goto own_mark, "
            f"{mark(Tag.NAT_OUT)} : drop, {mark(Tag.NAT_IN)} : goto nat_src{v}, "
            f"{mark(Tag.ENDED)} : goto ended_out{v} }}",
        ),
        ("ended_out", f"{_SYN} update @anew{v} {{ {out} }} goto new_mark"),
        ("ended_out", f"{out} @anew{v} goto new_mark"),
        ("ended_out", "drop"),
        ("nat_src", f"{ip} saddr set {out} map @addr{v} tcp sport set {port} goto own_mark"),
        ("nat_src", "drop"),
    )
    return "\n".join((*lines, *(f"add rule {table} {chain}{v} {rule}" for chain, rule in rules)))


def inet(settings: Settings) -> str:
    """Holds, flow maps and translation, for both families."""
    table = f"inet {settings.table}"
    inject, passing = (f"{settings.marked(tag):#x}" for tag in (Tag.INJECT, Tag.PASS))
    base = {"prerouting": "in", "output": "out"}
    injected = {"prerouting": "notrack accept", "output": "goto injected"}
    lines = [
        f"add table {table}",
        f"add map {table} ports {{ type mark : inet_service; }}",
        # With timeouts, of which it has none, it is a hash table; else the kernel would have a list of them.
        f"add set {table} own_ports {{ type inet_service; flags timeout; }}",
    ]
    # The flow map has had the mark; what goes out gets back the one of its socket (SO_MARK), if it has one.
    lines += [
        f"add chain {table} own_mark",
        f"flush chain {table} own_mark",
        f"add rule {table} own_mark meta mark set socket mark notrack accept",
        f"add rule {table} own_mark meta mark set 0 notrack accept",
        f"add chain {table} new_mark",
        f"flush chain {table} new_mark",
        f"add rule {table} new_mark meta mark set socket mark accept",
        f"add rule {table} new_mark meta mark set 0 accept",
        # Whatever the routes say, what is injected stays here.
        f"add chain {table} injected",
        f"flush chain {table} injected",
        f'add rule {table} injected oifname != "lo" drop',
        f"add rule {table} injected notrack accept",
    ]
    lines += [_family(settings, version) for version in (4, 6)]
    for hook, chain in base.items():
        lines += [
            f"add chain {table} {hook} "
            f"{{ type filter hook {hook} priority {HOOK_PRIORITY}; policy accept; }}",
            f"flush chain {table} {hook}",
            f"add rule {table} {hook} meta mark {inject} {injected[hook]}",
            f"add rule {table} {hook} meta l4proto tcp meta nfproto vmap "
            f"{{ ipv4 : goto {chain}4, ipv6 : goto {chain}6 }}",
        ]
    # What this host itself says of packets whose destination it has translated: ICMP errors show the
    # importer's address, which the peer does not know, so they are led to our own daemon (redirect/icmp.py);
    # ICMP redirects would tell the peer about the importer. The offsets are those of the importer's
    # address in the quoted packet or, for ICMPv6, in the redirect itself.
    lines += [
        f"add chain {table} reroute {{ type route hook output priority mangle; policy accept; }}",
        f"flush chain {table} reroute",
        # A chain of its own: beside the type nft 1.1 lists this as "icmpv6 daddr", which it cannot read
        # again, and the ruleset that an administrator has saved would not load.
        f"add chain {table} redirect6",
        f"flush chain {table} redirect6",
        f"add rule {table} redirect6 @th,192,128 @importers6 drop",
        f"add rule {table} reroute meta mark {passing} accept",
        f"add rule {table} reroute icmp type redirect @th,192,32 @importers4 drop",
        f"add rule {table} reroute icmpv6 type nd-redirect jump redirect6",
        f"add rule {table} reroute icmp type destination-unreachable @th,192,32 @importers4 "
        f"fib daddr type != local meta mark set {inject}",
        f"add rule {table} reroute icmpv6 type {{ destination-unreachable, packet-too-big }} "
        f"@th,256,128 @importers6 fib daddr type != local meta mark set {inject}",
    ]
    return "\n".join(lines) + "\n"


def netdev(settings: Settings, devices: Sequence[str]) -> str:
    """Forwarding at ingress: one chain for each device, and a packet leaves by the device it came by.

    Only frames that are addressed to this host and carry no VLAN tag of another device.
    """
    table = f"netdev {settings.table}"
    lines = [f"add table {table}"]
    for version, address in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        conn = f"{address} . inet_service . {address} . inet_service"
        lines.append(f"add map {table} next{version} {{ type {conn} : {address}; }}")
    for device in devices:
        chain = chain_of(device)
        lines += [
            f'add chain {table} {chain} {{ type filter hook ingress device "{device}" '
            f"priority {HOOK_PRIORITY}; policy accept; }}",
            f"flush chain {table} {chain}",
        ]
        for version, ip in ((4, "ip"), (6, "ip6")) if settings.forward else ():
            lines.append(
                f"add rule {table} {chain} meta pkttype host ether type {ip} "
                f'fwd {ip} to {_key(version, False)} map @next{version} device "{device}"'
            )
    return "\n".join(lines) + "\n"


def gone(settings: Settings) -> str:
    """Remove both tables, also if they are not there."""
    tables = (f"inet {settings.table}", f"netdev {settings.table}")
    return "".join(f"add table {table}\ndelete table {table}\n" for table in tables)
