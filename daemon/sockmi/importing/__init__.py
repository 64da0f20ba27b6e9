# SPDX-License-Identifier: MIT
"""The importer's half of the shell: sockets that come to this host. Each step stands beside its inverse.

A copy is dormant (in repair, its tuple held) until its application has the descriptor and says so.
Until then its image is in the spool, so that whatever dies, the copy can be made again.

- `reservations`: a place for each socket that is announced, or none any more; `early` holds.
- `preparer`: copies are made, dormant, and promised; or done away with, silently.
- `activation`: they are ours: to their applications, or into the lists.
- `handover`: applications wait, are sent descriptors, and say what they keep. It owns who waits and what
  is on its way.
- `listed`: copies that no application has: put away as images, made again; `delivery` gives them to programs
  that listen, `ages` ends those that waited for too long, `onward` lets them leave again.
- `life`: out of repair, and the end of all that this daemon keeps of a copy.
- `resumption`: after a restart.
- `stock`: the `copies` that are here, their `images` in the spool, the lists, the `room` for more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from sockmi.early_holds import EarlyHolds
from sockmi.importing.activation import Activation
from sockmi.importing.ages import Ages
from sockmi.importing.delivery import Delivery
from sockmi.importing.handover import Handover
from sockmi.importing.life import Life
from sockmi.importing.listed import Listed
from sockmi.importing.onward import Onward
from sockmi.importing.preparer import Preparer
from sockmi.importing.reservations import Reservations
from sockmi.importing.resumption import Resumption
from sockmi.importing.stock import Stock
from sockmi.placing import Placing
from sockmi.protocol import actions
from sockmi.protocol.context import Capacity
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell


class Importing:
    """The parts of this half, put together; see the package's docstring."""

    def __init__(
        self,
        shell: Shell,
        placing: Placing,
        capacity: Capacity,
        redirecting: Redirecting,
    ) -> None:
        self.early = early = EarlyHolds(shell, redirecting, placing)
        self.stock = stock = Stock(shell, placing, capacity)
        self.reservations = Reservations(shell, redirecting, placing, early)
        self.listed = Listed(shell, redirecting, stock, self._offer)
        self.life = Life(shell, redirecting, stock, self.listed)
        self.delivery = Delivery(shell, redirecting, placing, stock, life=self.life, offer=self._offer)
        self.ages = Ages(shell, stock, self.listed, self.life)
        self.handover = Handover(shell, stock, self.listed, self.life, self.delivery)
        self.preparer = Preparer(
            shell,
            redirecting,
            placing,
            stock=stock,
            early=early,
            delivery=self.delivery,
            handover=self.handover,
        )
        self.activation = Activation(shell, redirecting, stock, self.listed, self.handover)
        self.onward = Onward(shell, redirecting, stock, self.listed, self.handover.sent)
        self.resumption = Resumption(shell, redirecting, placing, stock, self.listed)

    def carry_out(self) -> dict[type, Callable[[Any], None]]:
        """Which part carries out which action of the core."""
        return {
            actions.Reserve: self.reservations.reserve,
            actions.Unreserve: self.reservations.unreserve,
            actions.Prepare: self.preparer.prepare,
            actions.Discard: self.preparer.discard,
            actions.Activate: self.activation.activate,
        }

    def _offer(self, migration: UUID) -> None:
        """The only way up: who waits is known to a part that stands on those that list."""
        self.handover.offer(migration)
