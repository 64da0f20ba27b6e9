# SPDX-License-Identifier: MIT
"""Listed connections are given to the program that listens for them, if that is wanted (imports.deliver)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from uuid import UUID

from sockmi.importing.copies import Copy
from sockmi.importing.images import unreadable
from sockmi.importing.life import Life
from sockmi.importing.listed import AGAIN_S
from sockmi.importing.stock import Stock
from sockmi.placing import Placing
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell
from sockmi.spool import SpoolError

_log = logging.getLogger(__name__)

_AGAIN_MAX_S = 2.0  # what nobody accepts is tried again, ever less often


class Delivery:
    """See the module docstring; only the kernel module can do it."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        placing: Placing,
        stock: Stock,
        *,
        life: Life,
        offer: Callable[[UUID], None],
    ) -> None:
        """``offer``: see whether somebody waits for it, else deliver it."""
        self._shell = shell
        self._redirecting = redirecting
        self._placing = placing
        self._copies = stock.copies
        self._images = stock.images
        self._lists = stock.lists
        self._life = life
        self._offer = offer

    def obstacle(self, copy: Copy) -> Refusal | None:
        """Why it would stay in the list, if nothing may and connections can be delivered; else None."""
        limits = self._shell.config.imports
        if limits.queue_without_waiting or not limits.deliver or copy.tuple is None:
            return None
        if self._lists.waits_for(copy.candidate):
            return None
        device = self._placing.device_to(copy.tuple.remote.address)
        return self._shell.engine.deliver(
            copy.image, copy.placement, device, copy.candidate.uid, only_ask=True
        )

    def deliver(self, copy: Copy) -> None:
        """To its program; as long as there is none it stays listed, and is tried again.

        The hold is lifted when it is delivered, since before there is no socket that could answer. What it
        sends before that comes to nothing, and is sent again.
        """
        shell, migration = self._shell, copy.candidate.migration_id
        if not shell.config.imports.deliver or copy.tuple is None or self._lists.claimed(migration):
            return
        if copy.again is not None:
            copy.again.cancel()
        refusal: Refusal | None
        try:
            image = self._images.read(copy)
            self._copies.place_anew(copy)
            device = self._placing.device_to(copy.tuple.remote.address)
            refusal = shell.engine.deliver(image, copy.placement, device, copy.candidate.uid)
        except (KeyError, SpoolError, OSError) as error:
            refusal = Refusal(Code.IMAGE, unreadable(error))
        if refusal is not None:
            if not copy.complained:
                _log.warning("%s is not delivered yet: %s", copy.tuple, refusal)
                copy.complained = True
            copy.again_s = min(max(2 * copy.again_s, AGAIN_S), _AGAIN_MAX_S)
            copy.again = shell.loop.call_later(copy.again_s, self._offer, migration)
            return
        self._lists.remove(migration)
        shell.held.want([copy.tuple])
        if copy.holding is not None:
            self._redirecting.admit([copy.holding])
        shell.held.deliver(shell.held.take([copy.tuple]))
        _log.info("%s is delivered to the program that listens for it", copy.tuple)
        self._life.settle([copy])
