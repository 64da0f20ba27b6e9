# SPDX-License-Identifier: MIT
"""Legacy iptables rules of one IP version, in a process of its own.

libxtables keeps the target extensions (DNAT, SNAT) of only the first IP version that a process asks
for, and ends the process when it is unhappy; so each version gets a worker, and the daemon neither
waits for python-iptables to load nor can be ended by it. JSON lines: a request
``[method, arguments...]`` on standard input, ``{"result": ...}`` or ``{"error": text}`` back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from typing import Any

import iptc

# role of a chain: the table and the built-in chain from which it is reached
HOOKS = {
    "away": ("nat", "PREROUTING"),
    "home": ("nat", "POSTROUTING"),
    "raw": ("raw", "PREROUTING"),
    "mute": ("filter", "OUTPUT"),
}

Ends = list[Any]  # source address, source port, destination address, destination port


class Rules:
    """Our chains, one for each role, and a rule for each connection in them."""

    def __init__(self, version: int, prefix: str) -> None:
        self._version, self._prefix = version, prefix

    def _chain(self, role: str) -> Any:
        """The chain of ``role`` as the kernel has it now; nothing is written before ``table.commit()``."""
        table = (iptc.Table if self._version == 4 else iptc.Table6)(HOOKS[role][0])
        table.autocommit = False
        table.refresh()
        return iptc.Chain(table, self._prefix + role)

    def _rule(self, target: str, ends: Ends | None = None, options: dict[str, str] | None = None) -> Any:
        rule = iptc.Rule() if self._version == 4 else iptc.Rule6()
        if ends is not None:
            rule.protocol = "tcp"
            rule.src, rule.dst = ends[0], ends[2]
            match = rule.create_match("tcp")
            match.sport, match.dport = str(ends[1]), str(ends[3])
        rule.target = iptc.Target(rule, target)
        for name, value in (options or {}).items():
            setattr(rule.target, name, value)
        return rule

    def install(self) -> None:
        """Make the chains and the jumps to them; what is there stays."""
        for role, (_unused, hook_name) in HOOKS.items():
            chain = self._chain(role)
            if not chain.table.is_chain(chain.name):
                chain.table.create_chain(chain.name)
            hook = iptc.Chain(chain.table, hook_name)
            if not _jumps(hook, chain.name):
                hook.insert_rule(self._rule(chain.name))
            _commit(chain.table)

    def uninstall(self) -> None:
        """The inverse of ``install``, with all rules."""
        for role, (_unused, hook_name) in HOOKS.items():
            chain = self._chain(role)
            if not chain.table.is_chain(chain.name):
                continue
            hook = iptc.Chain(chain.table, hook_name)
            for jump in _jumps(hook, chain.name):
                hook.delete_rule(jump)
            chain.flush()
            chain.table.delete_chain(chain.name)
            _commit(chain.table)

    def edit(self, role: str, remove: list[Ends], add: list[tuple[Ends, str, dict[str, str]]]) -> None:
        """In one transaction: remove the rules of connections, then append (ends, target, options)."""
        gone = {tuple(each) for each in remove}
        chain = self._chain(role)
        found = [rule for rule in chain.rules if tuple(_ends(rule)) in gone]
        if not found and not add:
            return
        for rule in found:
            chain.delete_rule(rule)
        for ends, target, options in add:
            chain.append_rule(self._rule(target, ends, options))
        _commit(chain.table)

    def rules(self, role: str) -> list[tuple[Ends, str]]:
        """(ends, where to or where from) of each rule of ``role`` (away or home)."""
        chain = self._chain(role)
        if not chain.table.is_chain(chain.name):
            return []
        option = "to_destination" if role == "away" else "to_source"
        return [(_ends(rule), getattr(rule.target, option)) for rule in chain.rules]


def _jumps(hook: Any, name: str) -> list[Any]:
    return [rule for rule in hook.rules if rule.target and rule.target.name == name]


def _commit(table: Any) -> None:
    table.commit()
    table.refresh()


def _ends(rule: Any) -> Ends:
    source, destination = (str(ip_network(text).network_address) for text in (rule.src, rule.dst))
    match = rule.matches[0]
    return [source, int(match.sport), destination, int(match.dport)]


def main(arguments: Sequence[str]) -> None:
    """``version prefix``: serve until standard input ends."""
    rules = Rules(int(arguments[0]), arguments[1])
    methods: dict[str, Callable[..., Any]] = {
        each.__name__: each for each in (rules.install, rules.uninstall, rules.edit, rules.rules)
    }
    for line in sys.stdin:
        method, *rest = json.loads(line)
        try:
            answer = {"result": methods[method](*rest)}
        except Exception as error:  # the caller reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
