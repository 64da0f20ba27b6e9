# SPDX-License-Identifier: MIT
"""Failures that no busy machine excuses: a law of docs/architecture.md was broken. There is no second try.

``scripts/test`` names a file in ``SOCKMI_BROKEN_LAWS``: the names of such tests are added to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = "SOCKMI_BROKEN_LAWS"
_FAILED = pytest.StashKey[bool]()


class LawBroken(AssertionError):
    """The peer has seen something, bytes are lost or changed, or nobody or two have the connection."""


@contextlib.contextmanager
def law() -> Iterator[None]:
    """An assertion that fails within is such a failure."""
    try:
        yield
    except LawBroken:
        raise
    except AssertionError as error:
        raise LawBroken(*error.args) from error


def clean(verdict: Any) -> None:
    """What a `lab.capture.Capture` has seen on the wire must be clean."""
    if not verdict.clean:
        raise LawBroken(str(verdict))


def broken(error: BaseException | None) -> bool:
    """Whether a failure is, or follows from, or comes together with a broken law."""
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, LawBroken):
            return True
        left += [
            one.__cause__,
            one.__context__,
            *(one.exceptions if isinstance(one, BaseExceptionGroup) else ()),
        ]
    return False


def pytest_exception_interact(node: Any, call: Any) -> None:
    """Tell whoever might try once more.

    What a fixture finds at the end of a test that has failed may only follow from that.
    """
    path = os.environ.get(FILE)
    if not path or call.excinfo is None:
        return
    if broken(call.excinfo.value) and not (call.when == "teardown" and node.stash.get(_FAILED, False)):
        with Path(path).open("a") as names:
            names.write(f"{node.nodeid}\n")
    node.stash[_FAILED] = True
