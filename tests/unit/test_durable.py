# SPDX-License-Identifier: MIT
"""Every durable record comes back from the journal as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sockmi import durable
from sockmi.addresses import Endpoint
from sockmi.engine.base import BindFlag, Kind, Needs
from sockmi.journal import Change, Journal
from sockmi.protocol.events import Started
from sockmi.protocol.records import (
    Arrival,
    ChunkId,
    Decision,
    Holding,
    Item,
    Notice,
    Place,
    PreparedChunk,
    Route,
)
from sockmi.redirect.base import Mode

A, B, C = (bytes([letter]) * 16 for letter in b"abc")
LOCAL, REMOTE = Endpoint.parse("192.0.2.1:80"), Endpoint.parse("[2001:db8::2]:4000")
PLACE = Place(Endpoint.parse("192.0.2.7:81"), Mode.NAT)
ITEM = Item(
    A,
    B,
    Kind.CONNECTED,
    "ESTABLISHED",
    LOCAL,
    REMOTE,
    LOCAL,
    2,
    C,
    Needs(7, True, 900, BindFlag.V6_ONLY, True, True),
    800,
    C,
)
BARE = Item(B, A, Kind.BOUND, "CLOSED", None, None, None, 1, C)
EVERYTHING = Started(
    decisions=(Decision(ChunkId(A, 3), B, (A, C), (1,)),),
    routes=(
        Route(A, B, Kind.CONNECTED, 2, C, B, PLACE, LOCAL, REMOTE, LOCAL, C, True),
        Route(B, B, Kind.LISTENING, 1, C, B, Place(), LOCAL, None, None),
    ),
    notices=(Notice(A, 2, C, B, PLACE), Notice(A, 3, C, B, PLACE)),
    prepared=(PreparedChunk(ChunkId(C, 0), A, (Arrival(ITEM, PLACE), Arrival(BARE, Place())), (0,)),),
    holdings=(Holding(C, B, Kind.CONNECTED, 2, A, B, PLACE, LOCAL, REMOTE, LOCAL),),
)


def test_round_trip_through_a_reopened_journal(tmp_path: Path) -> None:
    every = [one for field in dataclasses.fields(EVERYTHING) for one in getattr(EVERYTHING, field.name)]
    journal = Journal(tmp_path / "journal.db")
    change = Change()
    durable.keep(change, every)
    journal.write(change)
    journal.close()
    journal = Journal(tmp_path / "journal.db")
    assert durable.started(journal) == EVERYTHING
    change = Change()
    durable.drop(change, every)
    journal.write(change)
    assert durable.started(journal) == Started()
