# SPDX-License-Identifier: MIT
"""A home leads a connection on in another mode than before: no packet meets neither, so there is no RST."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint, FourTuple
from sockmi.engine.base import Kind
from sockmi.metrics import Metrics
from sockmi.protocol.actions import Reroute
from sockmi.protocol.records import Place, Route
from sockmi.redirect.base import Mode, Redirect
from sockmi.redirect.forward import Forward
from sockmi.redirect.iptables import Iptables, unusable
from sockmi.redirect.nat import Nat
from sockmi.redirecting import Redirecting
from sockmi.shell import outbound
from tests.lab.raw_segments import segments
from tests.lab.redirect_lab import Capture, Host, Lab, until

LEGACY = "iptables-legacy"
PORT, PEER_PORT = 5151, 40151
CHANGES = 150
PAIRS = [
    pytest.param(
        first,
        second,
        marks=pytest.mark.skipif(
            Mode.IPTABLES in (first, second) and bool(unusable(LEGACY)), reason=str(unusable(LEGACY))
        ),
    )
    for first, second in itertools.combinations((Mode.FORWARD, Mode.NAT, Mode.IPTABLES), 2)
]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


class Sender:
    """Segments of a connection that nobody has, as fast as they go."""

    def __init__(self, host: Host, source: Endpoint, to: Endpoint) -> None:
        self.sent = 0
        self._host, self._tuple = host, FourTuple(source, to)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._host.inside(), segments(self._tuple) as send:
            while not self._stop.is_set():
                send()
                self.sent += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_mode_follows_another(lab: Lab, first: Mode, second: Mode, version: int) -> None:
    here, there, peer = (ip_address(host.address(version)) for host in (lab.a, lab.b, lab.peer))
    home, remote = Endpoint(here, PORT), Endpoint(peer, PEER_PORT)
    # At b nobody is there to hear them.
    lab.b.nft("add table inet deaf; add chain inet deaf in { type filter hook prerouting priority -400; }")
    lab.b.nft(f"add rule inet deaf in tcp sport {PEER_PORT} counter drop")
    with lab.a.inside():
        made: dict[Mode, Redirect] = {
            Mode.FORWARD: Forward(lab.a.tables),
            Mode.NAT: Nat(lab.a.tables),
            Mode.IPTABLES: Iptables(lab.a.tables, LEGACY),
        }
        redirects = {mode: made[mode] for mode in (first, second)}
        for redirect in redirects.values():
            redirect.setup()
        routes = {
            mode: Route(
                b"c" * 16, b"m" * 16, Kind.CONNECTED, 1, b"h" * 16, b"x" * 16,
                Place(Endpoint(there, PORT), mode), home, remote, home,
            )
            for mode in redirects
        }  # fmt: skip
        if (away := outbound(routes[first])) is not None:
            assert redirects[first].reachable(there) is None
            redirects[first].send_away([away])
        answers: list[Any] = []
        shell: Any = SimpleNamespace(
            redirects=redirects,
            dispatch=answers.append,
            journal=SimpleNamespace(write=lambda _unused: None),
            metrics=Metrics(),
        )
        redirecting = Redirecting(
            shell, {b"c" * 16: routes[first]}, {}, lambda _unused: [], Counter, lambda _unused: False
        )
        capture = Capture(lab.peer)
        sender = Sender(lab.peer, remote, home)
        try:
            until(lambda: "counter packets 0 " not in lab.b.nft("list chain inet deaf in"), "segments at b")
            for turn in range(CHANGES if Mode.IPTABLES not in redirects else CHANGES // 10):
                redirecting.reroute(Reroute((routes[(second, first)[turn % 2]],)))
        finally:
            sender.stop()
            capture.close()
        refusals = [refusal for answer in answers for _unused, _unused, refusal in answer.results if refusal]
        assert not refusals
        assert capture.resets == 0
        left = {mode: [one.tuple for one in redirect.outbound()] for mode, redirect in redirects.items()}
        now = second if len(answers) % 2 else first
        assert left == {mode: [FourTuple(home, remote)] if mode is now else [] for mode in redirects}
        for redirect in redirects.values():
            redirect.teardown()
