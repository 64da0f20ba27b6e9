# SPDX-License-Identifier: MIT
"""A table that drops every RST, in and out: while our tables, and all that was in them, are made again.

A peer's packet that meets neither a socket nor our rules is answered by RST, which ends a connection that
lives elsewhere.
"""

from __future__ import annotations

from sockmi.redirect import nft_messages as nft

_HOOKS = {"in": nft.PREROUTING, "out": nft.OUTPUT}
_PRIORITY = -400  # NF_IP_PRI_CONNTRACK_DEFRAG: before whatever could let it pass


def raised(table: str) -> bytes:
    """The transaction that makes it; it may be there."""
    name = _name(table)
    messages = [nft.new_table(name)]
    for chain, hook in _HOOKS.items():
        messages.append(nft.new_chain(name, chain, hook, _PRIORITY))
        messages.append(nft.flush_chain(name, chain))
        messages.append(nft.new_rule(name, chain, *nft.is_rst(), *nft.drop()))
    return nft.transaction(messages)


def lowered(table: str) -> bytes:
    """The transaction that removes it; the kernel refuses if it is not there."""
    return nft.transaction([nft.delete_table(_name(table))])


def _name(table: str) -> str:
    return f"{table}_shield"
