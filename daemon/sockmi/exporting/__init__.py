# SPDX-License-Identifier: MIT
"""The exporter's half of the shell: sockets that leave this host. Each step stands beside its inverse.

- `admission`: what is asked for is looked at, and put to the core or refused; cancel.
- `descriptors`: ours of what is frozen; before and after it the owner alone has the socket.
- `freezer`: owners stop and packets are held, or all goes on as before. It owns the holds of exports.
- `reachability`: whether packets can be led to an importer.
- `committer`: a chunk is given away, or taken back; `decisions` are what the journal has of that.
- `listeners`: who connects to a listener that leaves, and what waits in its queue.
- `exports`: all that is under way, and how it ended; `batches`: who waits to be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sockmi.addresses import FourTuple
from sockmi.diag import Found
from sockmi.exporting.admission import Admission, FindHolders
from sockmi.exporting.batches import Batches
from sockmi.exporting.committer import Committer
from sockmi.exporting.decisions import Decisions
from sockmi.exporting.descriptors import Descriptors
from sockmi.exporting.export import Export, Selected
from sockmi.exporting.exports import Exports
from sockmi.exporting.freezer import Freezer
from sockmi.exporting.listeners import Listeners
from sockmi.exporting.reachability import Reachability
from sockmi.importing.onward import Onward
from sockmi.looking import Look
from sockmi.protocol import actions
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell

__all__ = ["Export", "Exporting", "Selected"]


class Exporting:
    """The parts of this half, put together; see the package's docstring."""

    def __init__(
        self,
        shell: Shell,
        redirecting: Redirecting,
        *,
        look: Look,
        find_holders: FindHolders,
        find: Callable[[FourTuple], Found | None],
        destroy: Callable[[FourTuple, int], bool],
        onward: Onward,
    ) -> None:
        """``look`` looks at sockets, ``find_holders`` finds their processes, and what is against stopping
        them; later. ``find``: this kernel's socket of a connection. ``destroy`` ends one, whoever has it;
        False if this kernel cannot. ``onward``: what waits in the import lists.
        """
        self.batches = Batches()
        self.exports = Exports(shell, self.batches)
        self.admission = Admission(
            shell,
            redirecting,
            self.exports,
            self.batches,
            look=look,
            find_holders=find_holders,
            onward=onward,
        )
        self.descriptors = Descriptors(shell.engine.owners, find)
        self.reachability = Reachability(shell)
        self.freezer = Freezer(shell, self.exports, self.descriptors, onward, self.reachability)
        self.listeners = Listeners(shell, redirecting, self.exports, self.batches, destroy)
        self.decisions = Decisions(shell, redirecting, self.listeners.queues)
        self.committer = Committer(
            shell,
            redirecting,
            exports=self.exports,
            freezer=self.freezer,
            descriptors=self.descriptors,
            listeners=self.listeners,
            decisions=self.decisions,
            onward=onward,
        )

    def carry_out(self) -> dict[type, Callable[[Any], None]]:
        """Which part carries out which action of the core."""
        return {
            actions.Freeze: self.freezer.freeze,
            actions.Thaw: self.freezer.thaw,
            actions.Commit: self.committer.commit,
            actions.LetGo: self.committer.let_go,
            actions.ForgetDecision: self.decisions.forget,
            actions.Report: self.exports.report,
            actions.BatchDone: self._batch_done,
        }

    def _batch_done(self, action: actions.BatchDone) -> None:
        """Every migration of the batch has its outcome."""
        self.listeners.batch_done(action.batch)
        self.batches.close(action.batch)
