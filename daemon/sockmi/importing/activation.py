# SPDX-License-Identifier: MIT
"""The exporter has decided: what was prepared here is ours."""

from __future__ import annotations

from sockmi import durable
from sockmi.crashpoints import reached
from sockmi.importing.handover import Handover
from sockmi.importing.listed import Listed
from sockmi.importing.listed_record import keep_listed
from sockmi.importing.stock import Stock
from sockmi.journal import Change, Record
from sockmi.protocol.actions import Activate
from sockmi.protocol.events import ActivateDone
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell

_LOST = Refusal(Code.IMAGE, "The importer's spool had lost its image; see the importer's log.")


class Activation:
    """See the module docstring; there is no inverse."""

    def __init__(
        self, shell: Shell, redirecting: Redirecting, stock: Stock, listed: Listed, handover: Handover
    ) -> None:
        self._shell = shell
        self._redirecting = redirecting
        self._copies = stock.copies
        self._room = stock.room
        self._listed = listed
        self._handover = handover

    def activate(self, action: Activate) -> None:
        """They are ours: to their applications, or into the import lists."""
        self._redirecting.suspend(action.returning, decided=True)
        reached("activate.suspended")
        for connection in action.returning:
            self._redirecting.drop_route(connection)
        change = Change(drop=[(Record.PREPARED, str(action.chunk))])
        change.drop.extend((Record.ROUTE, connection.hex()) for connection in action.returning)
        holdings = [holding for holding in action.holdings if holding.migration in self._copies]
        copies = [self._copies[holding.migration] for holding in holdings]
        for copy, holding in zip(copies, holdings, strict=True):
            copy.holding = holding
            copy.record["step"] = "committed"
        early = self._handover.on_their_way(copies)
        by_client = self._handover.by_client(copy for copy in copies if copy.client is None)
        going = {copy for theirs in by_client.values() for copy in theirs}
        for copy in copies:
            if copy.client is None and copy not in going:
                self._listed.put(copy)
        pending = len(early) + len(by_client)
        results = tuple(None if one.migration in self._copies else _LOST for one in action.holdings)

        def answer() -> None:
            waits = {copy.migration for copy in copies if self._listed.has(copy)}
            listed = tuple(index for index, one in enumerate(action.holdings) if one.migration in waits)
            self._shell.dispatch(ActivateDone(action.chunk, results, listed))

        def handed() -> None:
            nonlocal pending
            pending -= 1
            if pending == 0:
                answer()

        # The applications look at what they get while we write; nothing comes to life before that is done.
        for client, theirs in by_client.items():
            self._handover.hand(client, theirs, handed)
        for handing in early.values():
            handing.decided, handing.done = True, handed
        durable.keep(change, [holding for holding in holdings if holding.durable])
        for copy in copies:
            keep_listed(change, copy)
            change.audit.append((copy.candidate.migration_id, "import", {"step": "committed"}))
        self._redirecting.add_holdings(holdings)
        try:
            self._shell.journal.write(change)
        except BaseException:
            # The daemon ends; an application whose word is read before that must not be given life.
            self._handover.hold_back((*early, *by_client))
            raise
        reached("activate.journalled")
        self._handover.decided(early)
        self._copies.count("failed", results.count(_LOST))
        if not early and not by_client:
            self._room.update()
            # When what is listed has been offered: it may be delivered at once.
            self._shell.loop.call_later(0, answer)
