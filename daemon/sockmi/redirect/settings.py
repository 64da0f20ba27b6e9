# SPDX-License-Identifier: MIT
"""What a host's administrator can choose about the redirects' tables, marks and rules."""

from __future__ import annotations

import re
from enum import IntEnum

from sockmi.frozen import frozen

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,30}")


class Tag(IntEnum):
    """What is done with a connection's packets; bits 16..19 of the mark that the flow map gives them.

    The low 16 bits carry a port (NAT_OUT, NAT_IN) or which mode made the entry (MOVED, LOCAL, ENDED).
    """

    MOVED = 1
    """Left this host: drop what still comes in or would go out."""
    LOCAL = 2
    """Came to this host and keeps its address: not tracked, delivered locally."""
    NAT_OUT = 3
    """Left this host by translation: destination rewritten, our own stack mute."""
    NAT_IN = 4
    """Came to this host by translation: not tracked, source rewritten on the way out."""
    INJECT = 5
    """A segment or an ICMP error that the daemon made: past the hold, delivered locally."""
    PASS = 6
    """An ICMP error that the daemon sends on: not caught a second time."""
    ENDED = 7
    """Left this host and has ended: what is late is dropped, but a SYN begins a new connection here."""
    SUSPECT = 8
    """A RST that our tables have not seen; see guard.py."""


@frozen
class Settings:
    """Names and numbers; two daemons on one host need different ones of all but ``devices``.

    ``table``: name of our nftables tables, family inet and netdev.
    ``mark``: our packet marks are ``mark`` to ``mark + 0xfffff``, so its low 20 bits are zero.
    ``route_table``, ``rule_priority``: of the ip rules that deliver imported connections locally.
    ``log_group``: the NFLOG group to which the hold logs what it drops (see held.py).
    ``devices``: where peers' packets arrive; empty means every Ethernet-like device that
    is up and has an address.
    ``forward``: whether packets are led on at the device, for which the kernel needs nft's fwd.
    """

    table: str = "sockmi"
    mark: int = 0x53400000
    route_table: int = 7780
    rule_priority: int = 77
    devices: tuple[str, ...] = ()
    log_group: int = 7783
    forward: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.table):
            raise ValueError(f"table name {self.table!r}: use up to 31 letters, digits and _, a letter first")
        if self.mark & 0xFFFFF or not 0 < self.mark <= 0xFFF00000:
            raise ValueError(f"mark {self.mark:#x}: the low 20 bits must be zero, and the others not all")
        if not 1 <= self.route_table <= 0xFFFFFFFF or self.route_table in range(253, 256):
            raise ValueError(f"route_table {self.route_table}: 253..255 are the kernel's own; choose another")
        if not 1 <= self.log_group <= 0xFFFF:
            raise ValueError(f"log_group {self.log_group}: must be in 1..65535")
        if not 1 <= self.rule_priority <= 32765:
            raise ValueError(
                f"rule_priority {self.rule_priority}: must be in 1..32765, before the main table"
            )

    def marked(self, tag: Tag, low: int = 0) -> int:
        """The whole mark of ``tag`` with ``low`` (0..65535) in its low bits."""
        return self.mark | tag << 16 | low

    @property
    def inject_mark(self) -> int:
        """SO_MARK for packets made by the daemon that this host itself must receive, hold or not."""
        return self.marked(Tag.INJECT)
