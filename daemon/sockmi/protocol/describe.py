# SPDX-License-Identifier: MIT
"""The parts of docs/protocol.md that are made from the tables, as Markdown. Pure.

``refresh(text)`` replaces what stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``.
To update the document after a change of a table:

    python -c "import pathlib, sockmi.protocol.describe as d; p = pathlib.Path('docs/protocol.md'); \\
        p.write_text(d.refresh(p.read_text()))"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum

from sockmi.protocol.codec import DATAGRAM_BYTES_MAX, LAYOUT, STREAM_BYTES_MAX, TYPES, VERSION
from sockmi.protocol.messages import STREAM_ONLY
from sockmi.protocol.tables import TABLES


def message_table() -> str:
    """Every message with its fields and sizes, from ``codec.LAYOUT``."""
    lines = [
        f"Version octet: {VERSION}. Datagrams: at most {DATAGRAM_BYTES_MAX} bytes; stream messages: at most "
        f"{STREAM_BYTES_MAX >> 20} MiB.",
        "",
        "| type | message | channel | fields (bytes) |",
        "|---|---|---|---|",
    ]
    for number, kind in enumerate(TYPES):
        fields = ", ".join(f"`{name}` {field.size}" for name, field in LAYOUT[kind]).replace("|", "\\|")
        channel = "stream" if kind in STREAM_ONLY else "either"
        lines.append(f"| {number} | {kind.__name__.upper()} | {channel} | {fields} |")
    return "\n".join(lines)


def diagram(table: Mapping[StrEnum, Mapping[str, StrEnum]]) -> str:
    """One state machine as a Mermaid diagram."""
    first = next(iter(table))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for state, row in table.items():
        arrows: dict[StrEnum, list[str]] = {}
        for trigger, target in row.items():
            arrows.setdefault(target, []).append(trigger)
        lines += [
            f"    {state.name} --> {target.name}: {', '.join(triggers)}"
            for target, triggers in arrows.items()
        ]
        if not row:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join([*lines, "```"])


def sections() -> dict[str, str]:
    """Every generated part, by name."""
    drawn = "\n\n".join(
        f"### {name[0].upper()}{name[1:]}\n\n{diagram(table)}" for name, table in TABLES.items()
    )
    return {"messages": message_table(), "states": drawn}


def refresh(text: str) -> str:
    """``text`` with its generated parts up to date; raise ValueError if a part has no place."""
    for name, body in sections().items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the document needs one '<!-- begin: {name} -->' ... '<!-- end: {name} -->'")
    return text
