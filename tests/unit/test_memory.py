# SPDX-License-Identifier: MIT
"""What the daemon does not load, or keep, as it would stay in memory for good; and what stands in for it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.movelog import MoveLog
from sockmi.protocol.record_fields import ITEM, PLACE
from sockmi.protocol.records import Item, Place
from sockmi.redirect.base import Mode

UNUSED = (
    "http.server",
    "importlib.metadata",
    "prometheus_client.exposition",
    "pyroute2",
    "sockmi.redirect.iptables",
    "unittest",
    "urllib.request",
    "yaml.cyaml",
    "yaml.dumper",
    "zipfile",
    "zoneinfo",
)


def run(program: str) -> str:
    """Its output, in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", program], check=True, text=True, capture_output=True, timeout=60
    ).stdout


def test_the_daemon_loads_nothing_that_it_does_not_use() -> None:
    """A module that was put in place unread has no names of its own."""
    loaded = run(
        "import sys, sockmi.service\n"
        "print(*(name for name, module in sys.modules.items()\n"
        "        if any(not one.startswith('__') for one in vars(module))))"
    ).split()
    assert "sockmi.service" in loaded
    assert not [name for name in loaded if any(name == one or name.startswith(f"{one}.") for one in UNUSED)]


def test_what_is_unread_is_read_when_somebody_asks() -> None:
    assert run(
        "import sockmi.service, importlib.metadata\n"
        "print(len(importlib.metadata.entry_points()) > 0, importlib.metadata.version('pydantic'))\n"
    ).startswith("True 2.")


def test_what_many_connections_have_is_kept_once() -> None:
    """A redirect lives as long as its connection, and there are thousands."""
    peers = [Endpoint.parse(f"192.0.2.9:{port}") for port in (4000, 4001)]
    read = []
    for number, peer in enumerate(peers):
        migration, out = bytes([number]) * 16, bytearray()
        service = Endpoint.parse("192.0.2.1:80")
        ITEM.put(
            out,
            Item(
                migration,
                migration,
                Kind.CONNECTED,
                "ESTABLISHED",
                service,
                peer,
                service,
                1,
                bytes(range(16)),
            ),
        )
        PLACE.put(out, Place(Endpoint.parse("192.0.2.2:80"), Mode.FORWARD))
        item, at = ITEM.get(memoryview(out), 0)
        read.append((item, PLACE.get(memoryview(out), at)[0]))
    (one, place), (other, other_place) = read
    assert one != other
    assert one.connection is one.migration
    assert (one.local, one.origin, one.home) == (service, service, bytes(range(16)))
    assert one.local is one.origin is other.local
    assert one.home is other.home
    assert place is other_place


def test_lines_of_the_log_wait_without_their_records(caplog: pytest.LogCaptureFixture) -> None:
    moves = MoveLog()
    with caplog.at_level(logging.INFO, "sockmi.moves"):
        record = {
            "direction": "import",
            "outcome": "moved",
            "migration_id": "7f0c",
            "from": "a",
            "fidelity": {},
        }
        moves.append(record)
        left = sys.getrefcount(record)
        moves.append(record)
        assert sys.getrefcount(record) == left
        assert not moves.write(calm=True)
    assert [one.getMessage() for one in caplog.records] == ["import of an unbound socket from a: moved"] * 2
