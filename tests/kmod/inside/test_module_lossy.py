# SPDX-License-Identifier: MIT
"""Loss, delay and reordering on the wire, by netem, while the connection is frozen, thawed and moved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tests.kmod.module_mover import HOME, Mover, extended, netem
from tests.kmod.nat_lab import Moving, live, quiet, triangle

LARGEST = 60000  # bytes of a talker's send(): many segments at once, so that they overtake each other


@contextlib.contextmanager
def rough(*words: str) -> Iterator[tuple[Mover, Moving]]:
    """A stream in both directions between ``peer`` and ``a``, on wires as netem's ``words`` have them."""
    with triangle(4) as of:
        for host in (of.lab.peer, of.lab.a, of.lab.b):
            netem(host, *words)
        mover = Mover(of)
        try:
            with live(of, of.lab.peer, of.lab.a, largest=LARGEST) as moving:
                moving.progress()
                yield mover, moving
                quiet(moving)
        finally:
            mover.close()


LOSSY = ("delay", "10ms", "3ms", "loss", "2%")


def test_frozen_and_thawed_among_losses() -> None:
    with rough(*LOSSY) as (mover, moving):
        for turn in range(40):
            mover.blink(moving, mover.of.lab.a, (0, 0.005, 0.03)[turn % 3])
            time.sleep(0.01)
        moving.progress()
        assert mover.early, "no freeze met an out-of-order queue: this test shows nothing"
        assert extended(mover.of.lab.peer, "TCPSACKReneging") == 0


def test_moved_among_losses() -> None:
    """To another host and home again, many times; nobody ever goes back on what the peer was SACKed."""
    with rough(*LOSSY) as (mover, moving):
        lab = mover.of.lab
        for turn in range(60):
            if turn >= 12 and turn % 2 == 0 and mover.early and mover.marked:
                break
            away = turn % 2 == 0
            mover.move(moving, *((lab.a, lab.b, 41000) if away else (lab.b, lab.a, HOME)))
            if turn % 4 == 3:
                moving.progress()
            else:
                time.sleep(0.1)
        moving.progress()
        assert mover.early, "no move met an out-of-order queue: this test shows nothing"
        assert mover.marked, "no move met data that the peer has SACKed: this test shows little"
        assert extended(lab.peer, "TCPSACKReneging") == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "words", [("delay", "40ms"), ("delay", "25ms", "20ms", "loss", "5%"), ("loss", "20%")]
)
def test_moved_on_worse_wires(words: tuple[str, ...]) -> None:
    with rough(*words) as (mover, moving):
        lab = mover.of.lab
        for turn in range(10):
            away = turn % 2 == 0
            mover.move(moving, *((lab.a, lab.b, 42000) if away else (lab.b, lab.a, HOME)))
            mover.blink(moving, lab.b if away else lab.a, 0.02)
            moving.progress(100)
        assert extended(lab.peer, "TCPSACKReneging") == 0
