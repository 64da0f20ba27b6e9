# SPDX-License-Identifier: MIT
"""Ports that connect() is not to choose: net.ipv4.ip_local_reserved_ports, which is for IPv6 as well.

A connection that has been led away still has its port here, though no socket says so: a new one to the
same peer would get no answer. What the administrator has reserved stays reserved.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_READ_BYTES = 1 << 19  # all ports, as the kernel begins anew with every read
_WRITE_BYTES = 4000  # of more than a page the kernel takes the beginning


def parse(text: str) -> set[int]:
    """``80,1024-1030`` as numbers."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _unused, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def render(ports: Iterable[int]) -> list[str]:
    """The inverse of ``parse``, in parts."""
    spans: list[list[int]] = []
    for port in sorted(ports):
        if spans and port == spans[-1][1] + 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return [str(first) if first == last else f"{first}-{last}" for first, last in spans]


def reserved() -> set[int]:
    """What the kernel leaves out now."""
    descriptor = os.open(_RESERVED, os.O_RDONLY)
    try:
        return parse(os.read(descriptor, _READ_BYTES).decode())
    finally:
        os.close(descriptor)


def reserve(ports: Iterable[int]) -> None:
    """Leave out these, and no others."""
    descriptor = os.open(_RESERVED, os.O_WRONLY)
    try:
        text = ""
        for part in render(ports):
            if len(text) + len(part) > _WRITE_BYTES:
                os.write(descriptor, text.encode())  # what is written later to the same descriptor is added
                text = ""
            text += f"{',' if text else ''}{part}"
        os.write(descriptor, f"{text}\n".encode())
    finally:
        os.close(descriptor)


def chosen(wanted: Collection[int], ours: Collection[int]) -> set[int]:
    """Those of ``wanted`` that connect() could choose; at most half of all, and first those of ``ours``."""
    first, last = map(int, _RANGE.read_text().split())
    within = sorted((port for port in wanted if first <= port <= last), key=lambda port: port not in ours)
    return set(within[: (last - first + 1) // 2])
