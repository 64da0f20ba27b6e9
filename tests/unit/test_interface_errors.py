# SPDX-License-Identifier: MIT
"""kmod/uapi/sockmi.h specifies the device: it names every error that the module's source gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KMOD = Path(__file__).parents[2] / "kmod"
INTERFACE = (KMOD / "uapi/sockmi.h").read_text()
#: What functions of the kernel gave, looked at and turned into another; and of options that a host lacks.
INNER = {"ENFILE", "ENOPROTOOPT", "ENODEV"}


def errors() -> list[str]:
    """Of all files that are the module's own, but for the codec, which gives classes."""
    source = "".join(file.read_text() for file in sorted(KMOD.glob("*.c")))
    return sorted(set(re.findall(r"-(E[A-Z0-9]+)\b", source)) - INNER)


def test_the_source_is_read() -> None:
    assert len(errors()) > 25
    assert {"ESTALE", "EDQUOT", "ENXIO"} < set(errors())


@pytest.mark.parametrize("name", errors())
def test_every_error_is_specified(name: str) -> None:
    assert re.search(rf"-{name}\b", INTERFACE)
