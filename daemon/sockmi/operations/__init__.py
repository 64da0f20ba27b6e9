# SPDX-License-Identifier: MIT
"""The control socket's requests, each carried out by the part that it concerns (docs/control.md)."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sockmi import api
from sockmi.config import Config, ConfigError
from sockmi.control import Client
from sockmi.doctor import examine, examine_slowly
from sockmi.engine.closing import close_all
from sockmi.operations.drains import Drains
from sockmi.operations.exports import Exports
from sockmi.operations.records import Records
from sockmi.operations.sockets import Sockets
from sockmi.operations.status import status
from sockmi.operations.tables import Tables
from sockmi.parts import Parts
from sockmi.refusal import Code, Refusal


class Operations:
    """Handles the requests of the control socket."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon
        sockets = Sockets(daemon)
        self.exports = Exports(daemon)
        self.drains = Drains(daemon, sockets)
        records = Records(daemon)
        self._handlers: dict[str, Callable[[Client, Any, list[int]], None]] = {
            "export": self.exports.export,
            "import": self._import,
            "taken": self._taken,
            "list": Tables(daemon, sockets).answer,
            "status": self._status,
            "info": records.info,
            "history": records.history,
            "drain": self.drains.drain,
            "groups": self._groups,
            "reload": self._reload,
            "doctor": self._doctor,
        }

    def request(self, client: Client, request: Any, descriptors: list[int]) -> None:
        """See control.Handler."""
        try:
            if request.op in api.ADMINISTRATOR_OPS and not client.administrator:
                raise Refusal(Code.NO_PRIVILEGE, f"{request.op} is for administrators; run it as root.")
            self._handlers[request.op](client, request, descriptors)
        finally:
            close_all(descriptors)  # but for those that a handler has taken out

    def gone(self, client: Client) -> None:
        """See control.Handler."""
        self._daemon.importing.handover.gone(client)
        self.drains.gone(client)
        self.exports.gone(client)

    def _import(self, client: Client, request: api.ImportRequest, descriptors: list[int]) -> None:
        self._daemon.importing.handover.wait(client, request)

    def _taken(self, client: Client, request: api.TakenRequest, descriptors: list[int]) -> None:
        self._daemon.importing.handover.taken(client, request)

    def _status(self, client: Client, request: api.StatusRequest, descriptors: list[int]) -> None:
        client.respond(status(self._daemon, request))

    def _groups(self, client: Client, request: api.GroupsRequest, descriptors: list[int]) -> None:
        changed = False
        if request.action is not api.GroupsAction.LIST:
            if not client.administrator:
                raise Refusal(Code.NO_PRIVILEGE, f"{request.action} is for administrators; run it as root.")
            changed = self._forget(request) if request.host_id else self._daemon.members.change(request)
        missed = [str(UUID(bytes=host)) for host in self._daemon.missed()]
        client.respond(
            api.GroupsResponse(
                id=request.id, groups=self._daemon.members.rows(), changed=changed, missed=missed
            )
        )

    def _forget(self, request: api.GroupsRequest) -> bool:
        host = UUID(request.host_id).bytes
        if host == self._daemon.identity.host_id or host in self._daemon.members.hosts():
            raise Refusal(
                Code.BAD_REQUEST,
                f"{self._daemon.members.name_of(host)} is this host, or is heard; only a host that never "
                "comes back can be forgotten.",
            )
        return self._daemon.forget(host)

    def _reload(self, client: Client, request: api.ReloadRequest, descriptors: list[int]) -> None:
        before = self._daemon.members.keyrings()
        try:
            if request.instead is None:
                changed, restart_needed = self._daemon.reload()
            else:
                new = Config.parse(request.instead, "the configuration")
                changed, restart_needed = self._daemon.config.differing(new)
        except ConfigError as error:
            raise Refusal(Code.BAD_REQUEST, f"Not reloaded, the old settings stay: {error}") from None
        after = self._daemon.members.keyrings()
        changed += [f"groups.{name}.key_file" for name in after if after[name] != before[name]]
        client.respond(api.ReloadResponse(id=request.id, changed=changed, restart_needed=restart_needed))

    def _doctor(self, client: Client, request: api.DoctorRequest, descriptors: list[int]) -> None:
        def finish(future: asyncio.Future[list[api.Check]]) -> None:
            with client.answering(request):
                checks = [*examine(self._daemon), *future.result()]
                healthy = all(check.status is not api.CheckStatus.ERROR for check in checks)
                client.respond(api.DoctorResponse(id=request.id, healthy=healthy, checks=checks))

        # What takes its time, in a thread.
        modes, silent = self._daemon.config.redirect.modes, self._daemon.members.not_connected()
        slowly = functools.partial(examine_slowly, modes, silent, self._daemon.tables.unled)
        self._daemon.loop.run_in_executor(None, slowly).add_done_callback(finish)
