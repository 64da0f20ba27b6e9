# SPDX-License-Identifier: MIT
"""What the fields of requests and responses are made of, and the limits of a line."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sockmi.addresses import Endpoint, parse_address

API_VERSION = 1
"""Grows when a request or response changes in a way that old clients cannot ignore."""

LINE_BYTES_MAX = 1 << 20
"""Longest line, its newline included."""

DESCRIPTORS_MAX = 253
"""Most descriptors with one line: SCM_MAX_FD of ``include/net/scm.h``."""

CONTEXT_BYTES_MAX = 1 << 20
"""Longest application context."""


def _endpoint(text: str) -> str:
    return str(Endpoint.parse(text))


def _address(text: str) -> str:
    return str(parse_address(text))


EndpointText = Annotated[str, AfterValidator(_endpoint)]
"""``192.0.2.1:80`` or ``[2001:db8::1]:80``."""

AddressText = Annotated[str, AfterValidator(_address)]
"""``192.0.2.1`` or ``2001:db8::1``; ``::ffff:192.0.2.1`` is the former."""

Port = Annotated[int, Field(ge=1, le=0xFFFF)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=255)]


class Model(BaseModel):
    """Strict: an unknown field is an error, so that no option is ignored in silence."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, defer_build=True
    )
