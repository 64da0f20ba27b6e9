# SPDX-License-Identifier: MIT
"""Every refusal that the kernel module's interface has is told to the user in words, not as a number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sockmi.engine.results import Result, refusal_of
from sockmi.refusal import Code

PROJECT = Path(__file__).parents[2]
INTERFACE = (PROJECT / "kmod/uapi/sockmi.h").read_text()
REFUSALS = {
    name: int(number) for name, number in re.findall(r"SOCKMI_REFUSAL_(\w+) = (\d+),(?!.*never)", INTERFACE)
}
#: These become results of the engines' own (test_engine.py and test_refusals.py give them).
AS_RESULTS = set(
    re.findall(r"case SOCKMI_REFUSAL_(\w+):", (PROJECT / "daemon/libsockmi/engine/device.c").read_text())
)


def told(number: int) -> tuple[Code, str]:
    """What becomes of the module's refusal ``number``."""
    refusal = refusal_of((Result.REFUSED, 0, 0, number))
    return refusal.code, refusal.message


def test_the_interface_is_read() -> None:
    assert len(REFUSALS) > 30
    assert len(AS_RESULTS) > 8
    assert set(REFUSALS) > AS_RESULTS


@pytest.mark.parametrize("name", sorted(set(REFUSALS) - AS_RESULTS))
def test_every_refusal_has_words(name: str) -> None:
    assert told(REFUSALS[name])[1] != told(999)[1].replace("999", str(REFUSALS[name]))


def test_a_number_of_a_later_module_is_told_as_it_is() -> None:
    assert told(999) == (Code.INTERNAL, "the kernel module refuses it (999)")
