# SPDX-License-Identifier: MIT
"""Which processes have a socket, and a descriptor of ours for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sockmi.engine.base import Engine
from sockmi.engine.duplicate import duplicate
from sockmi.engine.owners import find_holders
from sockmi.refusal import Code, Refusal
from sockmi.starting import StartError

_log = logging.getLogger(__name__)

#: Gets the processes of each socket, and what is against stopping some of them.
Found = Callable[[dict[int, list[int]], dict[int, Refusal]], None]


class Holders:
    """Found in a thread: looking through /proc takes milliseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        self._loop = loop
        self._engine = engine

    def find(self, inodes: set[int], found: Found) -> None:
        """``found`` is called later."""
        owners = self._engine.owners

        def finish(one: asyncio.Future[dict[int, dict[int, list[int]]]]) -> None:
            try:
                holders = one.result()
                verdicts = dict(zip(holders, self._engine.obstacles(list(holders)), strict=True))
            except Exception as error:
                if not isinstance(error, OSError):
                    _log.exception("looking for the owners of %d sockets", len(inodes))
                message = f"The owners of this socket cannot be found ({error}); try again."
                found({}, dict.fromkeys(inodes, Refusal(Code.OWNER_UNSTOPPABLE, message)))
                return
            found(
                {inode: sorted(by_pid) for inode, by_pid in holders.items()},
                {inode: refusal for inode, refusal in verdicts.items() if refusal is not None},
            )

        self._loop.run_in_executor(None, owners.find, inodes).add_done_callback(finish)


def duplicates(inodes: set[int]) -> dict[int, int]:
    """A descriptor of ours for each of the sockets that some process still holds, by inode."""
    found: dict[int, int] = {}
    for inode, holders in find_holders(inodes)[0].items():
        for pid, descriptors in holders.items():
            try:
                found[inode] = duplicate(pid, descriptors[0], inode)
                break
            except Refusal as refusal:
                # What cannot be looked at for want of a descriptor must not pass for gone.
                if refusal.code is Code.NO_DESCRIPTORS:
                    raise StartError(refusal.message) from None
    return found
