# SPDX-License-Identifier: MIT
"""The request `drain`."""

from __future__ import annotations

from typing import Any

from sockmi import api
from sockmi.control import Client
from sockmi.draining import Drain
from sockmi.operations.sockets import Sockets
from sockmi.parts import Parts
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found


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

        def start(found: list[Found]) -> None:
            if not client.closed:
                drain.start(found)

        drain = Drain(self._daemon, request, target, report, fail)
        self._sockets.find(client, request, start, failed=lambda: self.going.pop(client, None))
        self.going[client] = drain
        if not request.dry_run:
            self._daemon.members.open_early(target[0])
