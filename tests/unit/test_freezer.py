# SPDX-License-Identifier: MIT
"""What is frozen is held again when somebody has flushed the tables; what runs is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sockmi.addresses import Endpoint, FourTuple
from sockmi.config import Config
from sockmi.engine.base import Kind
from sockmi.exporting.freezer import Freezer


def export(port: int, step: str, *, stopped: bool) -> Any:
    connection = FourTuple(Endpoint.parse("192.0.2.1:80"), Endpoint.parse(f"192.0.2.2:{port}"))
    facts = SimpleNamespace(tuple=connection, kind=Kind.CONNECTED, local=connection.local)
    return SimpleNamespace(
        facts=facts, record={"step": step}, stopped=stopped, selected=SimpleNamespace(copy=None)
    )


def test_what_has_thawed_to_be_tried_again_runs() -> None:
    """Its record says how far it had come."""
    frozen, prepared = export(1, "frozen", stopped=True), export(2, "prepared", stopped=True)
    others = [export(3, "frozen", stopped=False), export(4, "requested", stopped=False)]
    others.append(export(5, "committed", stopped=True))
    held: list[FourTuple] = []
    shell: Any = SimpleNamespace(
        config=Config(),
        held=SimpleNamespace(want=lambda _unused: None),
        holds=SimpleNamespace(hold=lambda tuples, _unused: held.extend(tuples)),
    )
    exports: Any = SimpleNamespace(under_way=lambda: [frozen, prepared, *others])
    nothing: Any = None
    freezer = Freezer(shell, exports, nothing, nothing, nothing)
    assert freezer.hold_frozen() == held == [frozen.facts.tuple, prepared.facts.tuple]
