# SPDX-License-Identifier: MIT
"""The capture checker: silent about what is in order, and it finds each planted fault."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import dpkt  # type: ignore[import-untyped]
import pytest

from lab import Lab, LabError
from lab.capture import Capture, Segment, Trouble, judge
from lab.traffic.clients import DuplexClient
from lab.traffic.duplex import Duplex, Terms
from lab.traffic.handover import Rendezvous
from lab.traffic.server import Server, listen

PEER, SERVER = ("10.0.0.1", 40000), ("10.0.0.2", 80)
SYN, FIN, RST, ACK = dpkt.tcp.TH_SYN, dpkt.tcp.TH_FIN, dpkt.tcp.TH_RST, dpkt.tcp.TH_ACK


class Trace:
    """Writes the segments of a connection as the peer sees them; numbers count from 0."""

    def __init__(self, peer_first: int = 1000, server_first: int = 5000) -> None:
        self.first = {PEER: peer_first, SERVER: server_first}
        self.next = {PEER: 0, SERVER: 0}
        self.at_s = 0.0
        self.segments: list[Segment] = []

    def send(  # noqa: PLR0917
        self,
        source: tuple[str, int],
        length: int = 0,
        flags: int = ACK,
        sequence: int | None = None,
        acknowledgment: int | None = None,
        sack: tuple[tuple[int, int], ...] = (),
        later_s: float = 0.001,
    ) -> None:
        """The next segment of ``source``, or one with given numbers."""
        target = SERVER if source == PEER else PEER
        begin = self.next[source] if sequence is None else sequence
        end = begin + length + bool(flags & (SYN | FIN))
        self.next[source] = max(self.next[source], end)
        known = self.next[target] if acknowledgment is None else acknowledgment
        self.at_s += later_s
        self.segments.append(
            Segment(
                self.at_s,
                source,
                target,
                (self.first[source] + begin) % 2**32,
                (self.first[target] + known) % 2**32 if flags & ACK else 0,
                flags,
                length,
                tuple(
                    ((self.first[target] + left) % 2**32, (self.first[target] + right) % 2**32)
                    for left, right in sack
                ),
            )
        )

    def open(self) -> None:
        """The handshake."""
        self.send(PEER, flags=SYN)
        self.send(SERVER, flags=SYN | ACK)
        self.send(PEER)

    def talk(self, rounds: int = 20) -> None:
        """Data both ways, each segment acknowledged by the next of the other side."""
        for number in range(rounds):
            self.send(PEER, 100 + number)
            self.send(SERVER, 200 + number)
        self.send(PEER)
        self.send(SERVER)

    def close(self) -> None:
        """FIN from both."""
        self.send(PEER, flags=FIN | ACK)
        self.send(SERVER, flags=FIN | ACK)
        self.send(PEER)


@pytest.fixture(params=[(1000, 5000), (2**32 - 700, 2**32 - 1), (2**31 - 50, 2**31 - 3)])
def trace(request: pytest.FixtureRequest) -> Trace:
    """An open connection that has talked; its numbers wrap in mid-way, or not."""
    made = Trace(*request.param)
    made.open()
    made.talk()
    return made


def troubles(trace: Trace, **options: object) -> set[Trouble]:
    return {finding.trouble for finding in judge(trace.segments, **options).findings}  # type: ignore[arg-type]


def test_clean(trace: Trace) -> None:
    trace.close()
    verdict = judge(trace.segments)
    assert verdict.clean, str(verdict)
    assert (verdict.connections, verdict.retransmissions) == (1, 0)


def test_clean_from_the_middle(trace: Trace) -> None:
    for begin in range(len(trace.segments)):
        verdict = judge(trace.segments[begin:])
        assert verdict.clean, (begin, str(verdict))


def test_retransmission_reordering_and_keepalive_are_no_fault(trace: Trace) -> None:
    at = trace.next[SERVER]
    trace.send(SERVER, 100, sequence=at + 100)
    trace.send(PEER, acknowledgment=at, sack=((at + 100, at + 200),))
    trace.send(SERVER, 100, sequence=at)
    trace.send(SERVER, 150, sequence=at + 50)
    trace.send(PEER, sack=((at + 50, at + 200),))  # D-SACK
    trace.send(SERVER, 0, sequence=at + 199)
    trace.send(PEER)
    trace.send(PEER, acknowledgment=at + 100, later_s=0)  # overtaken by the one before
    verdict = judge(trace.segments)
    assert verdict.clean, str(verdict)
    assert verdict.retransmissions == 1


@pytest.mark.parametrize("source", [PEER, SERVER])
def test_reset(trace: Trace, source: tuple[str, int]) -> None:
    trace.send(source, flags=RST | ACK)
    assert troubles(trace) == {Trouble.RST}
    assert troubles(trace, rst_from=[source[0]]) == set()
    assert troubles(trace, allow=[Trouble.RST]) == set()


def test_reset_of_what_is_over(trace: Trace) -> None:
    """A FIN that is sent twice is acknowledged twice; the second time nobody is there."""
    trace.close()
    trace.send(SERVER, flags=FIN | ACK, sequence=trace.next[SERVER] - 1)
    trace.send(PEER)
    trace.send(SERVER, flags=RST)
    assert troubles(trace) == set()
    del trace.segments[-4:]  # all after the server's first FIN
    trace.send(SERVER, flags=RST)
    assert troubles(trace) == {Trouble.RST}


def test_unexpected_fin(trace: Trace) -> None:
    trace.send(SERVER, flags=FIN | ACK)
    assert troubles(trace, fin_from=[PEER[0]]) == {Trouble.FIN}
    assert troubles(trace, fin_from=[]) == {Trouble.FIN}
    assert troubles(trace) == set()


def test_fin_that_moves(trace: Trace) -> None:
    at = trace.next[SERVER]
    trace.send(SERVER, flags=FIN | ACK)
    trace.send(SERVER, 10, sequence=at + 1)
    assert troubles(trace) == {Trouble.FIN_MOVED}
    trace.segments.pop()
    trace.send(SERVER, 10, sequence=at, flags=FIN | ACK)
    assert Trouble.FIN_MOVED in troubles(trace)


def test_every_missing_data_segment_is_a_hole(trace: Trace) -> None:
    data = [at for at, segment in enumerate(trace.segments) if segment.length]
    for at in data:
        found = {one.trouble for one in judge(trace.segments[:at] + trace.segments[at + 1 :]).findings}
        assert found & {Trouble.HOLE, Trouble.ACK_UNSENT}, at


def test_skipped_bytes(trace: Trace) -> None:
    trace.send(SERVER, 100, sequence=trace.next[SERVER] + 1)
    assert troubles(trace) == {Trouble.HOLE}


def test_acknowledges_what_was_never_sent(trace: Trace) -> None:
    trace.send(SERVER, acknowledgment=trace.next[PEER] + 1)
    assert troubles(trace) == {Trouble.ACK_UNSENT}


def test_acknowledgement_that_goes_back(trace: Trace) -> None:
    trace.send(SERVER, acknowledgment=trace.next[PEER] - 10, later_s=0.5)
    assert troubles(trace) == {Trouble.ACK_BACK}


@pytest.mark.parametrize(("window", "back"), [(100, False), (99, True), (50, True), (0, False)])
@pytest.mark.parametrize("scale", [None, 2])
def test_window_that_is_taken_back(trace: Trace, window: int, back: bool, scale: int | None) -> None:
    """Memory may run out, and segments overtake each other; a scale must have been seen."""
    trace.send(SERVER)
    trace.send(SERVER, later_s=0.5)
    seen = [replace(one, window=100, scale=scale if one.flags & SYN else None) for one in trace.segments]
    seen[-1] = replace(seen[-1], window=window)
    assert {one.trouble for one in judge(seen).findings} == ({Trouble.WINDOW_BACK} if back else set())
    assert judge([one for one in seen if not one.flags & SYN]).clean
    assert judge(seen, reordering_s=1).clean
    assert judge(seen, observers={SERVER[0]}).clean


@pytest.mark.parametrize("left", [(), ((60, 100),), ((20, 60),)])
def test_reneging(trace: Trace, left: tuple[tuple[int, int], ...]) -> None:
    at = trace.next[PEER]
    trace.send(PEER, 100, sequence=at + 20, later_s=0.001)
    trace.send(SERVER, acknowledgment=at, sack=((at + 20, at + 100),))
    trace.send(SERVER, acknowledgment=at, sack=tuple((at + a, at + b) for a, b in left))
    assert Trouble.SACK_RENEGED in troubles(trace, allow=[Trouble.HOLE])


def test_growing_selective_acknowledgement_is_no_reneging(trace: Trace) -> None:
    at = trace.next[PEER]
    trace.send(PEER, 300, sequence=at)
    trace.send(SERVER, acknowledgment=at, sack=((at + 20, at + 100),))
    trace.send(SERVER, acknowledgment=at, sack=((at + 150, at + 200), (at + 20, at + 100)))
    trace.send(SERVER, acknowledgment=at, sack=((at + 20, at + 200),))
    trace.send(SERVER, acknowledgment=at, sack=((at + 250, at + 300), (at + 20, at + 200)))
    trace.send(SERVER)
    assert troubles(trace) == set()


def test_second_syn(trace: Trace) -> None:
    first = trace.segments[0]
    trace.segments.append(replace(first, at_s=9.0))  # the same again: an old duplicate
    assert troubles(trace) == set()
    trace.segments.append(replace(first, at_s=9.1, sequence=(first.sequence + 77) % 2**32))
    assert troubles(trace) == {Trouble.RESTARTED}


def test_nothing_is_a_finding() -> None:
    assert [finding.trouble for finding in judge([]).findings] == [Trouble.NOTHING]


def test_random_traffic_with_one_segment_lost() -> None:
    chance = random.Random(7)  # noqa: S311
    for _turn in range(20):
        trace = Trace(chance.getrandbits(32), chance.getrandbits(32))
        trace.open()
        for _turn in range(50):
            trace.send(chance.choice([PEER, SERVER]), chance.choice([0, 1, 1448, 65000]))
        trace.send(PEER)
        trace.send(SERVER)
        assert judge(trace.segments).clean
        data = [segment for segment in trace.segments if segment.length]
        if data:
            trace.segments.remove(chance.choice(data))
            assert not judge(trace.segments).clean


# ---------------------------------------------------------------- on the wire


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(f"t{os.getpid()}-capture") as made:
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_real_traffic_is_clean(lab: Lab, version: int) -> None:
    a, peer = lab.host("a"), lab.host("peer")
    server = Server(Duplex, a.python(listen, "::", 5000 + version), Rendezvous(a.run_dir / "rendezvous"))
    thread = server.in_thread()
    try:
        with Capture(peer, f"tcp port {5000 + version}") as capture:
            client = DuplexClient((a.address(version), 5000 + version), Terms(1, 3_000_000, 3_000_000))
            result = peer.python(client.run)
            assert result.ok, result.error
        verdict = capture.check(fin_from=[peer.address(version), a.address(version)])
        assert verdict.clean, str(verdict)
        assert verdict.segments > 100
        assert Trouble.FIN in {finding.trouble for finding in capture.check(fin_from=[]).findings}
    finally:
        server.stop()
        thread.join()


@pytest.mark.parametrize("version", [4, 6])
def test_real_reset_is_found(lab: Lab, version: int) -> None:
    a, peer = lab.host("a"), lab.host("peer")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with a.socket(family) as listener, peer.socket(family) as client:
        listener.bind((a.address(version), 5010))
        listener.listen()
        with Capture(peer, "tcp port 5010") as capture:
            client.connect((a.address(version), 5010))
            accepted, _unused = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        verdict = capture.check()
    assert [finding.trouble for finding in verdict.findings] == [Trouble.RST]
    assert f"from {'[' if version == 6 else ''}{a.address(version)}" in verdict.findings[0].message


def test_two_captures_at_once(lab: Lab) -> None:
    a = lab.host("a")
    paths = [a.run_dir / f"{number}.pcap" for number in range(2)]
    with Capture(a, "tcp", paths[0]) as one, Capture(a, "tcp port 1", paths[1]) as two:
        threading.Event().wait(0.01)
    assert {finding.trouble for finding in one.check().findings} == {Trouble.NOTHING}
    assert {finding.trouble for finding in two.check().findings} == {Trouble.NOTHING}


def test_capture_that_cannot_start(lab: Lab) -> None:
    with pytest.raises(LabError, match="does not record"):
        Capture(lab.host("a"), "no such filter").start()
    with pytest.raises(LabError, match="does not record"):
        Capture(lab.host("a"), "tcp", device="nothing0").start()
