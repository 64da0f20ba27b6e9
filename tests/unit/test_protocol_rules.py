# SPDX-License-Identifier: MIT
"""What holds for the code of the protocol: it does no I/O, its tables are whole, its settings are checked."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import sockmi.protocol
from sockmi.protocol.context import Settings, Timers
from sockmi.protocol.describe import refresh
from sockmi.protocol.tables import TABLES, UndeclaredTransition, step

ROOT = Path(__file__).parents[2]

PURE = {
    "__future__", "abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "enum",
    "functools", "heapq", "ipaddress", "re", "struct", "typing",
    "sockmi.addresses", "sockmi.engine.base", "sockmi.frozen", "sockmi.policy", "sockmi.redirect.base",
    "sockmi.refusal",
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [*Path(sockmi.protocol.__path__[0]).glob("*.py"), ROOT / "daemon/sockmi/policy.py"],
    ids=lambda p: p.name,
)
def test_no_io_enters(path: Path) -> None:
    """The core may import only what can do no I/O, has no clock and no chance."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input", "__import__", "eval", "exec"}
        for name in names:
            assert name in PURE or name.split(".")[:2] == ["sockmi", "protocol"], (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name: str) -> None:
    """Each state has a row, every target is a state, every state is reached, some state ends it."""
    table = TABLES[name]
    states = set(type(next(iter(table))))
    reached = {target for row in table.values() for target in row.values()} | {next(iter(table))}
    assert set(table) == states == reached
    assert any(not row for row in table.values())
    with pytest.raises(UndeclaredTransition, match="is not declared"):
        step(table, next(iter(table)), "no such trigger")


def test_the_document_is_in_step() -> None:
    """After a change of a table, see sockmi/protocol/describe.py."""
    text = (ROOT / "docs/protocol.md").read_text()
    assert refresh(text) == text


def test_timers() -> None:
    timers = Timers()
    assert timers.next() is None
    timers.set("a", 5.0)
    timers.set("b", 3.0)
    timers.set("a", 1.0)
    assert timers.next() == 1.0
    timers.cancel("a")
    assert (timers.pop(2.9), timers.pop(3.0), timers.pop(9.0), timers.next()) == (None, "b", None, None)


@pytest.mark.parametrize(
    "wrong",
    [{"chunk_items": 0}, {"chunk_items": 257}, {"pipeline_depth": 9}, {"lease_s": 0}, {"retry_max_s": 0.01},
     {"offer_grace_s": -1}, {"freeze_deadline_s": float("nan")}, {"chunk_bytes": 0}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
