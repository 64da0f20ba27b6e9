# SPDX-License-Identifier: MIT
"""Where a daemon can be told to die, and what a restart must know of the sockets that a decision closes."""

from __future__ import annotations

import json
import re
import signal
from ipaddress import ip_address
from pathlib import Path

import pytest

import sockmi
from sockmi import crashpoints
from sockmi.addresses import Endpoint
from sockmi.durable import Handed, Original, read_handed, read_original, write_handed, write_original
from sockmi.engine.base import Kind
from sockmi.protocol.records import Holding, Place
from sockmi.redirect.base import Mode

SOURCES = Path(sockmi.__file__).parent


def test_parse() -> None:
    assert crashpoints.parse("commit.done") == [("commit.done", 1, signal.SIGKILL)]
    assert crashpoints.parse("freeze.held:3:STOP,hand.sent") == [
        ("freeze.held", 3, signal.SIGSTOP),
        ("hand.sent", 1, signal.SIGKILL),
    ]


@pytest.mark.parametrize("text", ["nowhere", "", "commit.done:0", "commit.done:x", "commit.done:1:NOSUCH"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=crashpoints.VARIABLE):
        crashpoints.parse(text)


def test_every_point_is_reached_somewhere_and_known() -> None:
    sources = [*SOURCES.rglob("*.py"), *(SOURCES.parent / "libsockmi/engine").glob("*.c")]
    used = [name for path in sources for name in re.findall(r'reached\("([^"]+)"\)', path.read_text())]
    assert sorted(used) == sorted(crashpoints.POINTS)


@pytest.mark.parametrize("imported", [False, True])
def test_originals_are_read_as_they_were_written(imported: bool) -> None:
    local, remote = Endpoint(ip_address("192.0.2.1"), 7), Endpoint(ip_address("192.0.2.2"), 8)
    holding = Holding(
        b"c" * 16, b"m" * 16, Kind.CONNECTED, 1, b"h" * 16, b"e" * 16,
        Place(local, Mode.NAT), local, remote, local,
    )  # fmt: skip
    original = Original(
        b"n" * 16, b"c" * 16, 2, Kind.CONNECTED, 17, 1 << 40, local, remote, holding if imported else None
    )
    assert read_original(json.loads(json.dumps(write_original(original)))) == original


def test_what_is_handed_is_read_as_it_was_written() -> None:
    handed = Handed(Kind.LISTENING, 17, 1 << 40)
    assert read_handed(json.loads(json.dumps(write_handed(handed)))) == handed
