# SPDX-License-Identifier: MIT
"""Every redirect, actively and passively: streams of all states move in one batch, in mid-flow.

In three states both ends may still send, or one of them; in the others one end has closed, and what it had
queued is being drained.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lab.capture import Trouble
from lab.labs import Lab
from sockmi.client import Export, export_sockets
from tests.lab.matrix_lab import KINDS, Bench, Case, Keeper, Later, copy_of, moved, receive, same, state
from tests.lab.mode_lab import WITHOUT_LEGACY, scene
from tests.lab.scenario import until
from tests.lab.test_matrix_traffic import STATES, End, Stream, go_on_and_end

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(240)]

#: Redirects, and what is moved in one batch; iptables is slow.
CASES = [(mode, KINDS) for mode in ("forward", "nat", "takeover")] + [("iptables", (kind,)) for kind in KINDS]
DRAINED = ("FIN-WAIT-1", "CLOSING", "LAST-ACK")
BEFORE_BYTES = 60_000
AFTER_BYTES = 200_000
QUEUED_BYTES = 1_000_000  # of all together more than a chunk has otherwise
ANSWER_BYTES = 40_000  # less than a receive buffer: nobody reads it before the move
PEER_BUFFER_BYTES = 1 << 16
DRAIN_BYTES, DRAIN_PAUSE_S = 8_000, 0.005
SO_SNDBUFFORCE = 32


@dataclass(slots=True)
class Streaming:
    """A connection on which both ends send, or one that has not closed; ``owner``: our end of it."""

    case: Case
    owner: End
    theirs: End
    stop: threading.Event = field(default_factory=threading.Event)
    peer_runs: Later | None = None

    @classmethod
    def begin(cls, it: Bench, kind: str, wanted: str) -> Streaming:
        ours_out = None if wanted == "FIN-WAIT-2" else Stream("ours")
        peer_out = None if wanted == "CLOSE-WAIT" else Stream("peer")
        one = cls(it.make(kind, wanted, queued=False), End(ours_out, peer_out), End(peer_out, ours_out))
        assert one.case.peer
        one.peer_runs = Later(one.theirs.run, one.case.peer, lambda _unused: not one.stop.is_set())
        return one

    def end(self, copy: socket.socket, sent: int, got: int) -> None:
        """It goes on from there."""
        assert self.case.peer
        heir = End(self.owner.out, self.owner.into, sent, got)
        go_on_and_end(self.case.state, self.case.peer, copy, self.theirs, heir, self._stop_peer, AFTER_BYTES)

    def _stop_peer(self) -> None:
        self.stop.set()
        assert self.peer_runs
        self.peer_runs.result()


@dataclass(slots=True)
class Draining:
    """A connection that we have closed with much in its queue: the peer reads half of it before the move."""

    case: Case
    go: threading.Event = field(default_factory=threading.Event)
    reading: Later | None = None
    answering: Later | None = None

    @classmethod
    def begin(cls, it: Bench, kind: str, wanted: str) -> Draining:
        one = cls(it.pair(kind))
        case, peer, ours = one.case, one.case.peer, one.case.ours
        assert peer
        case.state = wanted
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PEER_BUFFER_BYTES)
        case.to_us, case.to_peer = os.urandom(ANSWER_BYTES), os.urandom(QUEUED_BYTES)
        if wanted == "LAST-ACK":
            peer.sendall(case.to_us)
            peer.shutdown(socket.SHUT_WR)
            until(lambda: state(ours) == "CLOSE-WAIT")
        ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * QUEUED_BYTES)
        one.reading = Later(one._read, peer)
        ours.sendall(case.to_peer)
        ours.shutdown(socket.SHUT_WR)
        if wanted != "LAST-ACK":
            one.answering = Later(one._answer, peer, wanted == "CLOSING")
        until(lambda: state(ours) == wanted)
        return one

    def _read(self, peer: socket.socket) -> bytes:
        data = bytearray()
        while part := peer.recv(DRAIN_BYTES):
            data += part
            if len(data) > QUEUED_BYTES // 2:
                assert self.go.wait(60)
            else:
                time.sleep(DRAIN_PAUSE_S)
        return bytes(data)

    def _answer(self, peer: socket.socket, close: bool) -> None:
        for start in range(0, ANSWER_BYTES, DRAIN_BYTES):
            peer.sendall(self.case.to_us[start : start + DRAIN_BYTES])
            if not close:
                time.sleep(DRAIN_PAUSE_S)
        if close:
            peer.shutdown(socket.SHUT_WR)

    def end(self, copy: socket.socket) -> None:
        """All of both queues arrives."""
        peer = self.case.peer
        assert self.reading and peer
        self.go.set()
        same(receive(copy, ANSWER_BYTES), self.case.to_us, "what the peer had sent")
        same(self.reading.result(60), self.case.to_peer, "send queue")
        if self.answering:
            self.answering.result()
        if self.case.state == "FIN-WAIT-1":
            peer.shutdown(socket.SHUT_WR)
        assert copy.recv(1) == b""
        until(lambda: state(copy) == "CLOSED" and state(peer) == "CLOSED")


def run(ends: Mapping[socket.socket, End], enough_bytes: int | None) -> list[tuple[int, int]]:
    """Own them all until so much is done on each, or (None) all are taken; how far each has come."""
    left = dict(ends)
    for sock in left:
        sock.setblocking(False)
    while left and (
        enough_bytes is None or min(max(end.sent, end.got) for end in left.values()) < enough_bytes
    ):
        reading = [sock for sock, end in left.items() if end.into]
        writing = [sock for sock, end in left.items() if end.out]
        ready = select.select(reading, writing, [], 0.2)
        for sock in {*ready[0], *ready[1]}:
            end = left[sock]
            try:
                if sock in ready[0] and end.into:
                    data = sock.recv(1 << 14)
                    assert data, "the stream ends early"
                    same(data, end.into.whole(end.got, len(data)), f"at byte {end.got}")
                    end.got += len(data)
                if sock in ready[1] and end.out:
                    end.sent += sock.send(end.out.at(end.sent, 1 + end.sent % 7919))
            except BlockingIOError:
                continue
            except OSError:
                if enough_bytes is not None:
                    raise
                del left[sock]
    return [(end.sent, end.got) for end in ends.values()]


def owner_of(
    it: Bench, way: str, streams: Sequence[Streaming], cases: Sequence[Case]
) -> tuple[list[Any], list[tuple[int, int]]]:
    """Another process has them all; the records of its move, and how far its streams have come."""
    ends = {one.case.ours: one.owner for one in streams}
    sockets = [case.ours for case in cases]
    control = it.host("a").control_socket

    def work() -> Any:
        if way == "passive":
            return run(ends, None)
        progress = run(ends, BEFORE_BYTES)
        records = export_sockets([Export(sock) for sock in sockets], "b", control=control)
        return [(one.outcome, one.state, one.mode, one.message) for one in records], progress

    with Keeper([case.fd for case in cases], work) as keeper:
        pairs = [(keeper.pid, case.fd) for case in cases]
        for sock in sockets:
            sock.close()
        if way == "active":
            records, progress = keeper.result(60)
            return records, progress
        until(lambda: all(max(one.theirs.sent, one.theirs.got) > BEFORE_BYTES for one in streams))
        done = it.export_passively(pairs)
        moved(done)
        progress = keeper.result(60)
        return [(one["outcome"], one["state"], one["mode"], "") for one in done], progress


@pytest.mark.parametrize("way", ["active", "passive"])
@pytest.mark.parametrize(("mode", "kinds"), CASES, ids=["-".join((mode, *kinds)) for mode, kinds in CASES])
def test_streams(lab: Lab, tmp_path: Path, mode: str, kinds: tuple[str, ...], way: str) -> None:
    if mode == "iptables" and WITHOUT_LEGACY:
        pytest.skip(str(WITHOUT_LEGACY))
    with scene(lab, mode, tmp_path) as it, it.watched(tmp_path, allow=[Trouble.SACK_RENEGED]):
        draining = [Draining.begin(it, kind, wanted) for kind in kinds for wanted in DRAINED]
        streams = [Streaming.begin(it, kind, wanted) for kind in kinds for wanted in STATES]
        cases = [one.case for one in (*draining, *streams)]
        records, progress = owner_of(it, way, streams, cases)
        assert [one[:3] for one in records] == [("moved", case.state, mode) for case in cases], records
        copies = [copy_of(one) for one in it.take([it.request(case, it.target()) for case in cases])]
        for drain, copy in zip(draining, copies, strict=False):
            drain.end(copy)
        for stream, copy, (sent, got) in zip(streams, copies[len(draining) :], progress, strict=True):
            stream.end(copy, sent, got)
        for copy in copies:
            copy.close()
