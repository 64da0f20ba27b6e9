# SPDX-License-Identifier: MIT
"""How what is long is answered: by as many lines as it takes, since a line has its limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from sockmi import api
from sockmi.control import Client

T = TypeVar("T")

ROWS_PER_LINE = 200


def respond_records(
    client: Client,
    request_id: str | int | None,
    response: type[api.ExportResponse | api.InfoResponse | api.HistoryResponse],
    records: list[api.MigrationRecord],
) -> None:
    """As many lines as it takes: a line has its limit."""
    for start in range(0, max(1, len(records)), ROWS_PER_LINE):
        more = start + ROWS_PER_LINE < len(records)
        client.respond(response(id=request_id, more=more, migrations=records[start : start + ROWS_PER_LINE]))


def pages(rows: Sequence[T]) -> Iterator[list[T]]:
    return (list(rows[at : at + ROWS_PER_LINE]) for at in range(0, len(rows), ROWS_PER_LINE))


def respond_pages(client: Client, request: api.ListRequest, table: str, pages: Iterator[list[Any]]) -> None:
    """One page a line, made and sent when the client has read the one before."""

    def send(rows: list[Any]) -> None:
        with client.answering(request):
            following = next(pages, None)
            response = api.ListResponse(id=request.id, more=following is not None)
            client.respond(response.model_copy(update={table: rows}))
            if following is not None:
                client.when_read(lambda: send(following))

    send(next(pages, []))
