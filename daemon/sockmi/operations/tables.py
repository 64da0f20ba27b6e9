# SPDX-License-Identifier: MIT
"""The request `list`: sockets, what waits in the import lists, redirects."""

from __future__ import annotations

from uuid import UUID

from sockmi import api
from sockmi.control import Client
from sockmi.operations.answers import pages, respond_pages
from sockmi.operations.sockets import Sockets
from sockmi.parts import Parts
from sockmi.selection import check_filter
from sockmi.shell import inbound, outbound


class Tables:
    """What `list` shows."""

    def __init__(self, daemon: Parts, sockets: Sockets) -> None:
        self._daemon = daemon
        self._sockets = sockets

    def answer(self, client: Client, request: api.ListRequest, descriptors: list[int]) -> None:
        if request.table is api.Table.SOCKETS:
            self._sockets.find(
                client,
                request,
                lambda found: respond_pages(client, request, "sockets", pages(found), self._sockets.rows),
                only_uid=None if client.administrator else client.uid,
            )
        elif request.table is api.Table.IMPORTS:
            check_filter(request.filter)
            respond_pages(client, request, "imports", pages(self._import_rows(request.filter)))
        else:
            respond_pages(client, request, "redirects", pages(self._redirect_rows()))

    def _import_rows(self, wanted: api.SocketFilter) -> list[api.ImportRow]:
        rows = []
        for copy in self._daemon.importing.onward.select(wanted):
            candidate = copy.candidate
            rows.append(
                api.ImportRow(
                    migration_id=candidate.migration_id,
                    kind=candidate.kind,
                    state=copy.arrival.item.state,
                    local=str(copy.placement.local) if copy.placement.local else None,
                    remote=str(candidate.remote) if candidate.remote else None,
                    origin=str(candidate.local) if candidate.local else None,
                    from_=copy.record["from"],
                    listener=candidate.listener,
                    waiting_since=copy.since,
                    context_bytes=copy.facts.context_bytes,
                    image_bytes=copy.record["image_bytes"],
                )
            )
        return rows

    def _redirect_rows(self) -> list[api.RedirectRow]:
        rows = []
        for route in self._daemon.redirecting.routes.values():
            if (away := outbound(route)) and route.place.mode:
                rows.append(
                    api.RedirectRow(
                        migration_id=UUID(bytes=route.migration),
                        direction=api.Direction.EXPORT,
                        mode=route.place.mode,
                        local=str(away.tuple.local),
                        remote=str(away.tuple.remote),
                        other=str(away.importer),
                        hop=route.hop,
                        since=None,
                    )
                )
        for holding in self._daemon.redirecting.holdings.values():
            if (came := inbound(holding)) and holding.place.mode:
                rows.append(
                    api.RedirectRow(
                        migration_id=UUID(bytes=holding.migration),
                        direction=api.Direction.IMPORT,
                        mode=holding.place.mode,
                        local=str(came.tuple.local),
                        remote=str(came.tuple.remote),
                        other=str(came.origin),
                        hop=holding.hop,
                        since=None,
                    )
                )
        return rows
