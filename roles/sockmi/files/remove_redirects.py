# SPDX-License-Identifier: GPL-3.0-or-later
"""Removes what SockMi's redirects have in the kernel, by name, when no release is left that could.

Only what is as the daemon makes it goes: its nftables tables, known by their maps, its ip rules and routes,
and of net.ipv4.ip_local_reserved_ports the ports that its table says it has put there. Chains of the mode
`iptables`, and addresses that `takeover` has brought, stay. The argument is the daemon's configuration; with
--check nothing is removed. Prints what is, or would be, as JSON. Python 3.8 and later.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

MAPS = {"inet": {"flow4", "flow6"}, "netdev": {"next4", "next6"}}
PROTOCOL = "83"  # of the daemon's routes
RESERVED = "/proc/sys/net/ipv4/ip_local_reserved_ports"
READ_BYTES, WRITE_BYTES = 1 << 19, 4000  # of all ports at once, of a page at most: as the kernel has it
DEFAULTS = {"table": "sockmi", "route_table": "7780", "rule_priority": "77"}


def run(*words):
    """What a command says; "" if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def names(path):
    """How the configuration calls the table, and which numbers it gives to route table and rules."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        text = ""
    block = re.search(r"^redirect:\n((?:[ #].*\n|\n)*)", text + "\n", re.M)
    found = re.findall(r"^ +(\w+): *[\"']?(\w+)", block[1] if block else "", re.M)
    return {**DEFAULTS, **{name: value for name, value in found if name in DEFAULTS}}


def ours(named):
    """Commands that remove what is there."""
    found = []
    for family, wanted in MAPS.items():
        maps = json.loads(run("nft", "-j", "list", "maps", family) or '{"nftables": []}')["nftables"]
        there = {one["map"]["name"] for one in maps if one.get("map", {}).get("table") == named["table"]}
        if wanted <= there:
            found.append(["nft", "delete", "table", family, named["table"]])
    for version in ("-4", "-6"):
        for line in run("ip", "-N", version, "rule", "list").splitlines():
            rule = re.fullmatch(r"(\d+):\s+from all fwmark (\S+) iif (\S+) lookup (\d+)\s*", line)
            if rule and (rule[1], rule[4]) == (named["rule_priority"], named["route_table"]):
                match = ["priority", rule[1], "fwmark", rule[2], "iif", rule[3], "table", rule[4]]
                found.append(["ip", version, "rule", "delete", *match])
        for table in (named["route_table"], "main"):
            routes = ["table", table, "proto", PROTOCOL]
            if run("ip", version, "route", "show", *routes).strip():
                found.append(["ip", version, "route", "flush", *routes])
    return found


def reserved():
    """The ports that the kernel gives to nobody unasked."""
    descriptor = os.open(RESERVED, os.O_RDONLY)
    text = os.read(descriptor, READ_BYTES).decode()
    os.close(descriptor)
    found = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _unused, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def reserve(ports):
    """Have it leave out these, and no others."""
    spans = []
    for port in sorted(ports):
        if spans and port == spans[-1][1] + 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    parts = [f"{first}-{last}" for first, last in spans]
    descriptor = os.open(RESERVED, os.O_WRONLY)
    size = WRITE_BYTES // len("65535-65535,")
    for start in range(0, max(len(parts), 1), size):  # what is written later to the same one is added
        os.write(descriptor, ",".join(parts[start : start + size]).encode() + b"\n")
    os.close(descriptor)


def led_away(named):
    """Of these the ports that the daemon has put there, by what it notes in its table."""
    said = run("nft", "-j", "list", "set", "inet", named["table"], "own_ports")
    sets = [one["set"] for one in json.loads(said or '{"nftables": []}')["nftables"] if "set" in one]
    noted = {port for one in sets for port in one.get("elem", []) if isinstance(port, int)}
    return noted & reserved() if noted else set()


def main():
    """The command."""
    named = names(Path(sys.argv[1]))
    commands = ours(named)
    tables = any(words[:4] == ["nft", "delete", "table", "inet"] for words in commands)
    ports = led_away(named) if tables else set()  # while the table is there, which says so
    if ports and "--check" not in sys.argv:
        try:
            reserve(reserved() - ports)
        except OSError as error:
            sys.exit(f"{RESERVED}: {error.strerror}; do it by hand, and run uninstall again")
    if "--check" not in sys.argv:
        for words in commands:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip()
                sys.exit(f"{' '.join(words)} failed: {said}; do it by hand, and run uninstall again")
    released = [f"ports that are reserved no more: {', '.join(map(str, sorted(ports)))}"] if ports else []
    print(json.dumps(released + [" ".join(words) for words in commands]))


main()
