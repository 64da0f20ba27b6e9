# SPDX-License-Identifier: MIT
"""Where peers are is asked of the kernel once for all, and judged as this host sees it."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from sockmi import peers as module
from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind, Needs, SocketFacts
from sockmi.peers import Peers
from sockmi.protocol.records import Place
from sockmi.redirect.base import Mode
from sockmi.redirect.lookup import Ends, Hop, Own, hops, is_segment, own_addresses
from sockmi.redirect.routes import RTN_LOCAL, RTN_UNICAST
from sockmi.refusal import Code, Refusal

LOCAL, VIRTUAL = ip_address("192.0.2.1"), ip_address("203.0.113.7")
IMPORTER = ip_address("192.0.2.2")
LAN, INSIDE, PPP, SECOND = 2, 3, 4, 5
OWN = {LOCAL: Own(LAN, 24), VIRTUAL: Own(INSIDE, 32)}
ROUTES = {
    "127.0.0.1": Hop(RTN_LOCAL, 1, True),
    "192.0.2.1": Hop(RTN_LOCAL, 1, True),
    "192.0.2.2": Hop(RTN_UNICAST, LAN, True),
    "192.0.2.9": Hop(RTN_UNICAST, SECOND, True),  # of two devices in one network
    "198.51.100.1": Hop(RTN_UNICAST, LAN, False),
    "198.51.100.2": Hop(RTN_UNICAST, INSIDE, False),
    "172.30.0.2": Hop(RTN_UNICAST, INSIDE, True),
    "172.31.0.2": Hop(RTN_UNICAST, PPP, True),
}


class Kernel:
    """Answers by ``ROUTES``; what it was asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[Ends]] = []
        patch.setattr(module, "hops", self._hops)
        patch.setattr(module, "own_addresses", lambda: OWN)
        patch.setattr(module, "is_segment", lambda device: device != PPP)

    def _hops(self, ends: Sequence[Ends]) -> list[Hop | None]:
        self.asked.append(list(ends))
        return [ROUTES.get(str(remote)) for _local, remote in ends]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def facts(
    remote: str, local: str = str(LOCAL), refusal: Refusal | None = None, port: int = 80
) -> SocketFacts:
    ends = Endpoint(ip_address(local), port), Endpoint(ip_address(remote), 4000)
    return SocketFacts(1, 1, Kind.CONNECTED, "ESTABLISHED", 2, *ends, 0, 0, Needs(), refusal)


def why(peers: Peers, one: SocketFacts) -> str:
    [seen] = peers.judge([one])
    assert seen.refusal is None or seen.refusal.code is Code.NO_REDIRECT
    return seen.refusal.message if seen.refusal else ""


@pytest.mark.parametrize(
    ("remote", "local", "said"),
    [
        ("127.0.0.1", "127.0.0.1", "is this host itself"),
        ("192.0.2.1", "192.0.2.1", "is this host itself"),
        ("172.30.0.2", "192.0.2.1", "behind this host"),
        ("172.30.0.2", "203.0.113.7", ""),
        ("172.31.0.2", "192.0.2.1", ""),
        ("192.0.2.9", "192.0.2.1", ""),
        ("192.0.2.2", "192.0.2.1", ""),
        ("198.51.100.1", "192.0.2.1", ""),
        ("198.51.100.2", "192.0.2.1", ""),
        ("198.51.100.9", "192.0.2.1", ""),
    ],
)
def test_preflight(kernel: Kernel, remote: str, local: str, said: str) -> None:
    found = why(Peers([Mode.FORWARD, Mode.NAT]), facts(remote, local))
    assert said in found and bool(said) is bool(found)


def test_takeover_leaves_a_peer_of_this_host_its_address(kernel: Kernel) -> None:
    service = str(VIRTUAL)
    assert not why(Peers([Mode.TAKEOVER]), facts("192.0.2.1", service))
    assert why(Peers([Mode.TAKEOVER]), facts("192.0.2.1"))
    assert why(Peers([Mode.TAKEOVER]), facts("127.0.0.1", "127.0.0.1"))
    assert why(Peers([Mode.FORWARD, Mode.TAKEOVER]), facts("192.0.2.1", service)), "forward goes first"


def test_the_kernel_is_asked_once_for_all(kernel: Kernel) -> None:
    peers = Peers([Mode.FORWARD])
    many = [facts("192.0.2.2", port=port) for port in range(1, 500)] + [
        facts("127.0.0.1"),
        facts("127.0.0.1"),
    ]
    seen = peers.judge(many)
    assert [bool(one.refusal) for one in seen] == [False] * 499 + [True] * 2
    assert len(kernel.asked) == 1 and len(kernel.asked[0]) == 2
    place = Place(Endpoint(IMPORTER, 80), Mode.FORWARD)
    assert peers.obstacles([(one.tuple, place) for one in seen])[:499] == [None] * 499
    assert len(kernel.asked) == 1, "by then all is known"


def test_what_is_refused_already_is_not_asked_about(kernel: Kernel) -> None:
    refused = facts("127.0.0.1", refusal=Refusal(Code.STATE, "not now"))
    assert Peers([Mode.FORWARD]).judge([refused]) == [refused]
    assert kernel.asked in ([], [[]])


@pytest.mark.parametrize(
    ("remote", "mode", "importer", "said"),
    [
        ("192.0.2.9", Mode.FORWARD, "192.0.2.2", "behind this host"),
        ("172.30.0.2", Mode.NAT, "192.0.2.2", "behind this host"),
        ("172.30.0.2", Mode.NAT, "172.30.0.2", None),
        ("198.51.100.2", Mode.FORWARD, "192.0.2.2", None),
        ("172.31.0.2", Mode.NAT, "192.0.2.2", None),
        ("192.0.2.1", Mode.NAT, "192.0.2.2", "is this host itself"),
        ("192.0.2.1", Mode.TAKEOVER, "192.0.2.2", None),
        ("198.51.100.1", Mode.NAT, "192.0.2.1", "both have the address 192.0.2.1"),
    ],
)
def test_before_the_freeze(kernel: Kernel, remote: str, mode: Mode, importer: str, said: str | None) -> None:
    place = Place(Endpoint(ip_address(importer), 80), mode)
    [found] = Peers([mode]).obstacles([(facts(remote, str(VIRTUAL)).tuple, place)])
    assert found is said or (said and found and said in found)


def test_what_its_home_leads_here_may_have_its_peer_anywhere(kernel: Kernel) -> None:
    peers = Peers([Mode.FORWARD])
    peers.led_here = lambda _connection: True
    assert not why(peers, facts("192.0.2.1"))
    place = Place(Endpoint(IMPORTER, 80), Mode.FORWARD)
    assert peers.obstacles([(facts("192.0.2.1").tuple, place)]) == [None]


def test_the_importer_s_own_address(kernel: Kernel) -> None:
    mine, other = facts("192.0.2.2"), facts("198.51.100.1")
    refused, good = Peers([Mode.NAT]).judge_importer([mine, other], [IMPORTER])
    assert refused.refusal and "is the importer itself" in refused.refusal.message and good is other
    assert Peers([Mode.NAT, Mode.TAKEOVER]).judge_importer([mine], [IMPORTER]) == [mine]
    over_ipv6 = facts("2001:db8::2", "2001:db8::1")
    assert Peers([Mode.NAT]).judge_importer([over_ipv6], [ip_address("2001:db8::2")]) == [over_ipv6]


def test_neighbours(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "if_indextoname", lambda device: f"device{device}")
    peers = Peers([Mode.FORWARD])
    devices = [peers.neighbour_by(ip_address(one)) for one in ROUTES]
    assert devices == [None, None, "device2", "device5", None, None, "device3", None]
    assert peers.here([ip_address(one) for one in ROUTES]) == {ip_address("127.0.0.1"), LOCAL}


def test_what_the_kernel_does_not_tell_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_ends: object) -> list[Hop | None]:
        raise TimeoutError

    monkeypatch.setattr(module, "hops", silent)
    peers = Peers([Mode.FORWARD])
    assert not why(peers, facts("127.0.0.1"))
    assert peers.obstacles([(facts("127.0.0.1").tuple, Place(Endpoint(IMPORTER, 80), Mode.FORWARD))]) == [
        None
    ]


def test_the_kernel_itself() -> None:
    """Thousands of questions, in order; this host's addresses, and its loopback device."""
    loopback, nobody = ip_address("127.0.0.1"), ip_address("255.255.255.254")
    assert hops([]) == []
    found = hops([(None, loopback if turn % 2 else nobody) for turn in range(2001)])
    assert [bool(hop and hop.kind == RTN_LOCAL) for hop in found] == [bool(turn % 2) for turn in range(2001)]
    assert own_addresses()[loopback] == Own(1, 8)
    assert not is_segment(1) and not is_segment(1 << 30)
    [stranger] = hops([(ip_address("192.0.2.77"), loopback)])
    assert stranger is None, "from an address that is not this host's"
