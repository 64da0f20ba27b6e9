# SPDX-License-Identifier: MIT
"""The request `drain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sockmi import api
from sockmi.control import Client
from sockmi.draining import Drain
from sockmi.importing.copies import Copy
from sockmi.logins import logins
from sockmi.operations.sockets import Sockets
from sockmi.parts import Parts
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found, names_owner

# A little longer than an application may take that does not answer; then it is listed.
_ARRIVAL_MAX_S = 6.0
_LOOK_AGAIN_S = 0.02
_LOOK_BEGINS_S = 0.001


class Drains:
    """Drains that go on, one of a client at a time."""

    def __init__(self, daemon: Parts, sockets: Sockets) -> None:
        self._daemon = daemon
        self._sockets = sockets
        self.going: dict[Client, Drain] = {}

    def gone(self, client: Client) -> None:
        """The client has hung up: its drain ends."""
        if (drain := self.going.pop(client, None)) is not None:
            drain.cancel()

    def drain(self, client: Client, request: api.DrainRequest, descriptors: list[int]) -> None:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "This daemon is stopping; try again when it runs.")
        target = self._daemon.members.target(request.to)
        if client in self.going:
            raise Refusal(Code.BAD_REQUEST, "This connection drains already; use another one.")

        def report(response: dict[str, Any]) -> None:
            client.respond(response)
            if not response["more"]:
                self.going.pop(client, None)

        def fail(error: Exception) -> None:
            self.going.pop(client, None)
            with client.answering(request):
                raise error

        own = logins(client.pid) if request.filter.pid is None else frozenset()
        drain = Drain(self._daemon, request, target, report, fail, logins=own)
        self._look(client, request, drain.start, time.monotonic() + _ARRIVAL_MAX_S)
        self.going[client] = drain
        if target[0] is not None and not request.dry_run:
            # Not at once: the thread that looks would wait for it, instead of running beside it.
            self._daemon.loop.call_later(_LOOK_BEGINS_S, self._daemon.expect, target[0])

    def _look(
        self,
        client: Client,
        request: api.DrainRequest,
        start: Callable[[list[Found], list[Copy]], None],
        until_s: float,
    ) -> None:
        """What is on its way to an application is in no list, and has no life in a process: it is waited for.

        ``start`` gets what processes have, and what has not arrived ``until_s`` (time.monotonic()).
        """
        onward, timed_out = self._daemon.importing.onward, time.monotonic() >= until_s
        arriving = onward.arriving(request.filter)

        def again() -> None:
            if client in self.going and not client.closed:
                with client.answering(request):
                    self._look(client, request, start, until_s)

        def found(rows: list[Found]) -> None:
            if client.closed:
                return
            # Those not here any more may have got their owner after it was looked for.
            left = [copy for copy in arriving if not onward.find(copy.migration)]
            if left and not timed_out:
                again()
                return
            seen = {(row.socket.local, row.socket.remote) for row in rows}
            late = [copy for copy in left if (copy.placement.local, copy.candidate.remote) not in seen]
            start(rows, [] if names_owner(request.filter) else late)

        if timed_out or all(onward.find(copy.migration) for copy in arriving):
            self._sockets.find(client, request, found, failed=lambda: self.going.pop(client, None))
        else:
            self._daemon.loop.call_later(_LOOK_AGAIN_S, again)
