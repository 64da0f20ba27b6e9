# SPDX-License-Identifier: GPL-3.0-or-later
"""Removes what SockMi's redirects have in the kernel, by name, when no release is left that could.

Only what is as the daemon makes it goes: its nftables tables, known by their maps, its ip rules and routes.
Chains of the mode `iptables`, and addresses that `takeover` has brought, stay. The argument is the daemon's
configuration; with --check nothing is removed. Prints what is, or would be, as JSON. Python 3.8 and later.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

MAPS = {"inet": {"flow4", "flow6"}, "netdev": {"next4", "next6"}}
PROTOCOL = "83"  # of the daemon's routes
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


def main():
    """The command."""
    commands = ours(names(Path(sys.argv[1])))
    if "--check" not in sys.argv:
        for words in commands:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip()
                sys.exit(f"{' '.join(words)} failed: {said}; do it by hand, and run uninstall again")
    print(json.dumps([" ".join(words) for words in commands]))


main()
