# SPDX-License-Identifier: MIT
"""A table that nobody else can flush: without our others it lets no RST in or out.

`nft flush ruleset` takes our tables from one packet to the next; the daemon hears of it later. This one has
an owner, the netlink socket that made it: the kernel spares it when others flush (since Linux 5.12), and
removes it when that socket is closed. It marks each RST that has no mark, before our tables see it; they
take the mark away; and drops what still has it afterwards. So where they are whole it does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct

from sockmi.redirect import nft_messages as nft
from sockmi.redirect.ruleset import HOOK_PRIORITY
from sockmi.redirect.settings import Settings, Tag

_HOOKS = {"in": nft.PREROUTING, "out": nft.OUTPUT}
_ERROR = struct.Struct("=IHHIIi")  # struct nlmsghdr, and what struct nlmsgerr begins with
_NLMSG_ERROR = 2


class Guard:
    """There from ``raise_`` to ``lower``, or as long as this process lives.

    In the network namespace of the thread that raises it.
    """

    def __init__(self, settings: Settings) -> None:
        self._mark = settings.marked(Tag.SUSPECT)
        self._name = f"{settings.table}_guard"
        self._socket: socket.socket | None = None

    @property
    def is_up(self) -> bool:
        """Whether the kernel has it."""
        return self._socket is not None

    def raise_(self) -> None:
        """Make it, when our tables are there. OSError if the kernel cannot, or another daemon has one."""
        if self._socket is not None:
            return
        nft.send(nft.transaction([nft.delete_table(self._name)]))  # a saved one, loaded without its owner
        with contextlib.ExitStack() as undone:
            sock = undone.enter_context(nft.opened())
            sock.bind((0, 0))
            sock.send(self._made())
            if number := _answer(sock.recv(4096)):
                raise OSError(number, f"table inet {self._name}: {os.strerror(number)}")
            self._socket = sock
            undone.pop_all()

    def lower(self) -> None:
        """The inverse of ``raise_``; before our tables go, for the sake of all other connections."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _made(self) -> bytes:
        suspect = [*nft.is_rst(), *nft.is_marked(0), *nft.set_mark(self._mark)]
        left = [*nft.is_marked(self._mark), *nft.drop()]
        messages = [nft.new_table(self._name, nft.OWNED)]
        for hook_name, hook in _HOOKS.items():
            for chain, step, rule in (("suspect", -1, suspect), ("left", 1, left)):
                name = f"{chain}_{hook_name}"
                messages.append(nft.new_chain(self._name, name, hook, HOOK_PRIORITY + step))
                messages.append(nft.new_rule(self._name, name, *rule))
        return nft.transaction(messages)


def _answer(data: bytes) -> int:
    """The errno that the kernel says in a message of type NLMSG_ERROR; 0: done."""
    _length, kind, *_unused, error = _ERROR.unpack_from(data)
    return -error if kind == _NLMSG_ERROR else errno.EPROTO
