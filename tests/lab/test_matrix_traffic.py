# SPDX-License-Identifier: MIT
"""Moves under traffic: both ends send pieces of random sizes while the socket is taken from its owner."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.capture import Trouble
from lab.labs import Lab
from tests.lab.matrix_lab import KINDS, Bench, Keeper, Later, bench, copy_of, moved, same, state
from tests.lab.scenario import daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BEFORE_BYTES = 300_000  # in each direction, before the move
AFTER_BYTES = 1_000_000
PIECE_BYTES = 20_000
STATES = ("ESTABLISHED", "FIN-WAIT-2", "CLOSE-WAIT")


@pytest.fixture(scope="module", params=["forward", "nat"])
def it(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Daemons of one redirect mode."""
    redirect = {"devices": ["eth0"], "modes": [request.param]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, request.param, both) as made,
    ):
        yield made
        made.clear()


class Stream:
    """Bytes that both sides know, read from any offset."""

    def __init__(self, name: str) -> None:
        self._block = random.Random(name).randbytes(1 << 20)  # noqa: S311

    def at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on; fewer at the end of a block."""
        start = offset % len(self._block)
        return self._block[start : start + count]

    def whole(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes."""
        parts = bytearray()
        while len(parts) < count:
            parts += self.at(offset + len(parts), count - len(parts))
        return bytes(parts)


class End:
    """One end of the connection: sends its stream, and checks the other's; goes on wherever it was."""

    def __init__(self, out: Stream | None, into: Stream | None, sent: int = 0, got: int = 0) -> None:
        self.out, self.into, self.sent, self.got = out, into, sent, got

    def run(self, sock: socket.socket, go_on: Callable[[End], bool]) -> None:
        """Pieces of random sizes both ways while ``go_on`` says so; OSError when the socket is taken."""
        sock.setblocking(False)
        sizes = random.Random(self.sent)  # noqa: S311
        while go_on(self):
            readable, writable, _unused = select.select(
                [sock] if self.into else [], [sock] if self.out else [], [], 0.2
            )
            if readable and self.into:
                data = sock.recv(1 << 16)
                assert data, "the stream ends early"
                same(data, self.into.whole(self.got, len(data)), f"at byte {self.got}")
                self.got += len(data)
            if writable and self.out:
                self.sent += sock.send(self.out.at(self.sent, sizes.randrange(1, PIECE_BYTES)))

    def until_taken(self, sock: socket.socket) -> tuple[int, int]:
        """Run until the socket is gone; how far both directions have come."""
        try:
            self.run(sock, lambda _unused: True)
        except OSError:
            return self.sent, self.got
        raise AssertionError("unreachable")


def go_on_and_end(  # noqa: PLR0917 - both ends of it, and what is under way
    wanted: str,
    peer: socket.socket,
    copy: socket.socket,
    theirs: End,
    heir: End,
    stop: Callable[[], object],
    after_bytes: int = AFTER_BYTES,
) -> None:
    """Both directions go on as far as they may, all that was sent arrives, and it ends properly.

    ``stop`` ends what the peer does, and waits for that.
    """
    enough = (heir.sent + after_bytes * bool(heir.out), heir.got + after_bytes * bool(heir.into))
    heir.run(copy, lambda end: end.sent < enough[0] or end.got < enough[1])
    stop()
    # What is still on its way.
    heir.out = theirs.out = None
    heir.run(copy, lambda end: end.got < theirs.sent)
    theirs.run(peer, lambda end: end.got < heir.sent)
    assert (heir.got, theirs.got) == (theirs.sent, heir.sent)
    for sock in (copy, peer):
        sock.settimeout(20)
    if wanted != "FIN-WAIT-2":
        copy.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    if wanted != "CLOSE-WAIT":
        peer.shutdown(socket.SHUT_WR)
    assert copy.recv(1) == b""
    until(lambda: state(copy) == "CLOSED" and state(peer) == "CLOSED")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", STATES)
def test_under_traffic(it: Bench, tmp_path: Path, wanted: str, kind: str) -> None:
    """A passive move in mid-stream, byte-exact; a half-closed connection goes on in its open direction."""
    ours_out = None if wanted == "FIN-WAIT-2" else Stream("ours")
    peer_out = None if wanted == "CLOSE-WAIT" else Stream("peer")
    with it.watched(tmp_path, allow=[Trouble.SACK_RENEGED]):
        case = it.make(kind, wanted, queued=False)
        assert case.peer
        peer, theirs = case.peer, End(peer_out, ours_out)
        stop = threading.Event()
        streaming = Later(theirs.run, peer, lambda _unused: not stop.is_set())
        owner = End(ours_out, peer_out)
        with Keeper([case.fd], lambda: owner.until_taken(case.ours)) as keeper:
            pairs = [(keeper.pid, case.fd)]
            case.ours.close()
            until(lambda: max(theirs.sent, theirs.got) > BEFORE_BYTES)
            moved(it.export_passively(pairs))
            heir = End(ours_out, peer_out, *keeper.result())
        [came] = it.take([it.request(case, it.target())])
        copy = copy_of(came)
        go_on_and_end(wanted, peer, copy, theirs, heir, lambda: (stop.set(), streaming.result()))
        copy.close()
