# SPDX-License-Identifier: MIT
"""The image of a socket: the reference implementation of docs/image.md.

``decode`` and ``encode`` are strict and complete; ``peek``, ``stamp``, ``with_context`` and
``with_fidelity`` are what a daemon needs on the way; ``sockmi.image.native`` is the C implementation.
"""

from __future__ import annotations

from sockmi.image.codec import decode, encode
from sockmi.image.options import Option
from sockmi.image.patch import (
    Summary,
    peek,
    queue_bytes,
    section,
    stamp,
    with_context,
    with_fidelity,
    with_section,
)
from sockmi.image.sections import FidelityName, Identity, Image, OptionValue, Place
from sockmi.image.words import (
    LIMIT_BYTES,
    ErrorClass,
    Family,
    FidelityClass,
    ImageError,
    Kind,
    Section,
    State,
)

__all__ = [
    "LIMIT_BYTES",
    "ErrorClass",
    "Family",
    "FidelityClass",
    "FidelityName",
    "Identity",
    "Image",
    "ImageError",
    "Kind",
    "Option",
    "OptionValue",
    "Place",
    "Section",
    "State",
    "Summary",
    "decode",
    "encode",
    "peek",
    "queue_bytes",
    "section",
    "stamp",
    "with_context",
    "with_fidelity",
    "with_section",
]
