# SPDX-License-Identifier: MIT
"""This host's sockets, as `list` and `drain` see them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sockmi import api
from sockmi.control import Client
from sockmi.engine.base import SocketFacts
from sockmi.engine.closing import close_all
from sockmi.engine.duplicate import duplicate
from sockmi.engine.owners import obstacle_of
from sockmi.looking import look
from sockmi.parts import Parts
from sockmi.refusal import Refusal
from sockmi.selection import Found, check_filter, kind_of, select


class Sockets:
    """Looks for sockets, and says of each whether it could move."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon

    def find(
        self,
        client: Client,
        request: api.ListRequest | api.DrainRequest,
        found: Callable[[list[Found]], None],
        *,
        only_uid: int | None = None,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """Look for this host's sockets, in a thread: it looks through /proc."""
        check_filter(request.filter)

        def finish(future: asyncio.Future[list[Found]]) -> None:
            with client.answering(request):
                try:
                    found(future.result())
                except BaseException:
                    failed()
                    raise

        self._daemon.loop.run_in_executor(None, select, request.filter, only_uid).add_done_callback(finish)

    def rows(self, found: list[Found], say: Callable[[list[api.SocketRow] | Exception], None]) -> None:
        """Whether each could move; ``say`` gets them later."""
        refusals: list[Refusal | None] = [None] * len(found)
        duplicates: dict[int, int] = {}
        for index, one in enumerate(found):
            try:
                duplicates[index] = duplicate(one.holder.pid, one.holder.fd)
            except Refusal as refusal:
                refusals[index] = refusal

        def seen(facts: list[SocketFacts] | Exception) -> None:
            close_all(list(duplicates.values()))
            if isinstance(facts, Exception):
                say(facts)
                return
            for index, fact in zip(duplicates, facts, strict=True):
                refusals[index] = fact.refusal
            owners: dict[int, Refusal | None] = {}
            try:
                rows = [
                    _row(one, refusal or _owners_verdict(one, owners))
                    for one, refusal in zip(found, refusals, strict=True)
                ]
            except Exception as error:
                say(error)
                return
            say(rows)

        shell = self._daemon.shell
        look(self._daemon.loop, shell.engine, shell.peers, list(duplicates.values()), seen)


def _owners_verdict(found: Found, known: dict[int, Refusal | None]) -> Refusal | None:
    """What would keep the owners of a socket from being stopped; ``known``: of each process."""
    for holder in found.socket.holders:
        if holder.pid not in known:
            known[holder.pid] = obstacle_of(holder.pid, has_ring=holder.has_ring)
        if (refusal := known[holder.pid]) is not None:
            return refusal
    return None


def _row(found: Found, refusal: Refusal | None) -> api.SocketRow:
    listed, holder = found.socket, found.holder
    listening = listed.state == "LISTEN"
    return api.SocketRow(
        pid=holder.pid,
        fd=holder.fd,
        process=holder.name,
        unit=found.unit,
        user_id=listed.uid,
        inode=listed.inode,
        kind=kind_of(listed),
        state=listed.state,
        local=str(listed.local),
        remote=str(listed.remote) if listed.remote else None,
        receive_queue_bytes=0 if listening else listed.receive_queue,
        send_queue_bytes=0 if listening else listed.send_queue,
        received_bytes=listed.quiet.received if listed.quiet else None,
        movable=refusal is None,
        refusal=api.Why.of(refusal) if refusal else None,
    )
