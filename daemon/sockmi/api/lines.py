# SPDX-License-Identifier: MIT
"""Requests and responses as lines of the control socket."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from sockmi.api.fields import LINE_BYTES_MAX
from sockmi.api.records import Why
from sockmi.api.requests import Request
from sockmi.api.responses import ErrorResponse
from sockmi.refusal import Code, Refusal

_REQUEST: TypeAdapter[Any] = TypeAdapter(Request)


def parse_request(line: bytes) -> Any:
    """The request in ``line`` (with or without its newline): a member of the `Request` union.

    Raises `Refusal` (BAD_REQUEST) with a sentence that names the field.
    """
    if len(line) > LINE_BYTES_MAX:
        raise Refusal(Code.BAD_REQUEST, f"The line is longer than {LINE_BYTES_MAX} bytes; split the request.")
    try:
        return _REQUEST.validate_json(line)
    except ValidationError as error:
        raise Refusal(Code.BAD_REQUEST, _sentence(error)) from None


def request_id(line: bytes) -> str | int | None:
    """The id of a line that `parse_request` refused, as far as it can be read."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"][1:] if len(first["loc"]) > 1 else first["loc"]))
    return f"{where or 'request'}: {first['msg'].removeprefix('Value error, ')}. See docs/control.md."


def line_of(message: BaseModel) -> bytes:
    """``message`` as one line. Raises ValueError if it is longer than `LINE_BYTES_MAX`."""
    line = message.model_dump_json(by_alias=True).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise ValueError(f"{type(message).__name__} of {len(line)} bytes: send the list in several lines")
    return line


def error_line(refusal: Refusal, request_id: str | int | None = None) -> bytes:
    """The error response for ``refusal``, as one line."""
    return line_of(ErrorResponse(id=request_id, error=Why.of(refusal)))
