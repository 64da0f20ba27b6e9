# SPDX-License-Identifier: MIT
"""The daemon's log in the systemd journal: entries with fields, and what becomes of those not taken."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

from sockmi import logs
from sockmi.movelog import MoveLog

RECORD = {
    "direction": "export",
    "outcome": "moved",
    "local": "192.0.2.1:80",
    "remote": "192.0.2.9:4000",
    "to": "b",
    "migration_id": "7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01",
    "step": "active",
    "ended_at": "2026-01-01T00:00:00.000Z",
}


@pytest.fixture
def stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """Standard error as systemd connects it: JOURNAL_STREAM names it, and no terminal is there."""
    before = logging.getLogger().handlers[:]
    level = logging.getLogger("sockmi").level
    with (tmp_path / "stderr").open("w+") as file:
        status = os.fstat(file.fileno())
        monkeypatch.setattr(logs, "sys", SimpleNamespace(stderr=file))  # pytest has the real one
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        yield file
    logging.getLogger().handlers[:] = before
    logging.getLogger("sockmi").setLevel(level)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Stands in for journald: a socket where its is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(str(tmp_path / "socket"))
        here.settimeout(5)
        monkeypatch.setattr(logs, "_JOURNAL", tmp_path / "socket")
        yield here


def configure(log_format: str = "text") -> None:
    """As sockmid does."""
    settings: Any = SimpleNamespace(log_format=log_format, log_level="info")
    logs.configure(settings)


def entry(datagram: bytes) -> dict[str, str]:
    """The fields of an entry, read as systemd.io/JOURNAL_NATIVE_PROTOCOL has them."""
    found = {}
    while datagram:
        line, _newline, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            [length] = struct.unpack_from("<Q", datagram)
            value, datagram = datagram[8 : 8 + length], datagram[8 + length + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_a_move_has_fields(stderr: TextIO, journal: socket.socket) -> None:
    """What `journalctl MIGRATION_ID=...` finds."""
    configure()
    moves = MoveLog()
    moves.append(dict(RECORD))
    moves.write(calm=True)
    told = entry(journal.recv(65536))
    text = "INFO sockmi.moves: export of 192.0.2.1:80 - 192.0.2.9:4000 to b: moved ["
    assert told.pop("MESSAGE").startswith(text)
    assert told == {
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "sockmid",
        "LOGGER": "sockmi.moves",
        "MIGRATION_ID": RECORD["migration_id"],
        "CONNECTION": "192.0.2.1:80 - 192.0.2.9:4000",
        "STEP": "active",
        "ENDED_AT": RECORD["ended_at"],
    }
    assert Path(stderr.name).read_text() == ""


def test_a_traceback_is_one_entry(stderr: TextIO, journal: socket.socket) -> None:
    configure()
    try:
        raise ValueError("wrong\nin two lines")
    except ValueError:
        logging.getLogger("sockmi.test").exception("it failed")
    told = entry(journal.recv(65536))
    first, *_between, last = told["MESSAGE"].splitlines()
    assert (first, last) == ("ERROR sockmi.test: it failed", "in two lines")
    assert (told["PRIORITY"], told["LOGGER"]) == ("3", "sockmi.test")
    assert Path(stderr.name).read_text() == ""


def test_what_the_journal_does_not_take_is_not_lost(stderr: TextIO, journal: socket.socket) -> None:
    """It reads nothing for a while, gets what is too large, and goes away: all of that is in the stream."""
    configure()
    log = logging.getLogger("sockmi.test")
    sent = 0
    while not Path(stderr.name).read_text():
        log.warning("number %d", sent)
        sent += 1
        assert sent < 10_000
    taken = [entry(journal.recv(65536))["MESSAGE"] for _turn in range(sent - 1)]
    assert taken == [f"WARNING sockmi.test: number {number}" for number in range(sent - 1)]
    log.error("large %s", "x" * (8 << 20))
    journal.close()
    log.error("alone\ntwice")
    lost, large, *alone = Path(stderr.name).read_text().splitlines()
    assert lost == f"<4>WARNING sockmi.test: number {sent - 1}"
    assert large.startswith("<3>ERROR sockmi.test: large xxx")
    assert alone == ["<3>ERROR sockmi.test: alone", "<3>twice"]


@pytest.mark.parametrize(("log_format", "begins"), [("json", "{"), ("text", "20")])
def test_elsewhere_it_is_the_stream_alone(
    stderr: TextIO, journal: socket.socket, monkeypatch: pytest.MonkeyPatch, log_format: str, begins: str
) -> None:
    """With JSON also under systemd; text, where standard error is not the journal."""
    if log_format == "text":
        monkeypatch.delenv("JOURNAL_STREAM")
    configure(log_format)
    logging.getLogger("sockmi.test").warning("here")
    assert Path(stderr.name).read_text().startswith(begins)
    journal.setblocking(False)
    with pytest.raises(BlockingIOError):
        journal.recv(1)
