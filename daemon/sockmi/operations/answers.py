# SPDX-License-Identifier: MIT
"""How what is long is answered: by as many lines as it takes, since a line has its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def respond_pages(
    client: Client,
    request: api.ListRequest,
    table: str,
    pages: Iterator[list[T]],
    make: Callable[[list[T], Callable[[list[Any] | Exception], None]], None] = lambda page, say: say(page),
) -> None:
    """One page a line, made and sent when the client has read the one before.

    ``make`` makes rows of a page, at once or later, and says them, or what has failed.
    """

    def begin(page: list[T]) -> None:
        with client.answering(request):
            make(page, say)

    def say(rows: list[Any] | Exception) -> None:
        with client.answering(request):
            if isinstance(rows, Exception):
                raise rows
            following = next(pages, None)
            response = api.ListResponse(id=request.id, more=following is not None)
            client.respond(response.model_copy(update={table: rows}))
            if following is not None:
                client.when_read(lambda: begin(following))

    begin(next(pages, []))
