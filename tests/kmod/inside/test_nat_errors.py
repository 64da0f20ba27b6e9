# SPDX-License-Identifier: MIT
"""ICMP errors are translated both ways: path MTU by real streams, and single crafted errors, byte by byte."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import Flag, Flow, held, redirect, translate
from tests.kmod.nat_lab import Triangle, live, quiet, triangle
from tests.kmod.nat_wire import ICMP, ICMP6, TCP, Got, Tap, error, network, quoted, read_error, segment, send
from tests.lab.redirect_lab import Host, connect, until

PEER_PORT, HOME_PORT, AWAY_PORT = 50000, 80, 40001
SMALL = {4: 1000, 6: 1280}


def narrow(host: Host, target: str, device: str, mtu: int) -> None:
    """From ``host`` to ``target`` only so much fits; the link itself takes more."""
    bits = 128 if ":" in target else 32
    host.ip("route", "replace", f"{target}/{bits}", "dev", device, "mtu", str(mtu))


def learned(host: Host, target: str) -> int:
    """The path MTU that a host knows for a target; 0: none but its link's."""
    words = host.ip("route", "get", target).split()
    return int(words[words.index("mtu") + 1]) if "mtu" in words else 0


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_between_exporter_and_importer(version: int) -> None:
    with triangle(version) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a, largest=20000) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, AWAY_PORT)
            moving.progress()
            narrow(lab.a, lab.b.address(version), "eth0", SMALL[version])
            until(lambda: moving.peer.check() or learned(lab.peer, lab.a.address(version)) == SMALL[version],
                  "the peer learns the smaller MTU")  # fmt: skip
            moving.progress(200_000)
            quiet(moving)
            assert of.nat(lab.a).one(moving.ends).errors > 0
            assert learned(lab.peer, lab.b.address(version)) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_between_importer_and_peer(version: int) -> None:
    with triangle(version, with_d=True) as of:
        lab = of.lab
        lab.r.ip("link", "set", "eth1", "mtu", "1500")
        lab.d.ip("link", "set", "eth0", "mtu", "1500")
        with live(of, lab.d, lab.a, largest=20000) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, AWAY_PORT)
            moving.progress()
            assert of.nat(lab.a).one(moving.ends).errors == 0
            narrow(lab.r, lab.d.address(version), "eth1", SMALL[version])
            until(lambda: moving.server.check() or learned(lab.b, lab.d.address(version)) == SMALL[version],
                  "the importer learns the smaller MTU")  # fmt: skip
            moving.progress(200_000)
            quiet(moving)
            assert of.nat(lab.a).one(moving.ends).errors > 0


class Still:
    """Rules without a connection, for packets made by hand."""

    def __init__(self, of: Triangle) -> None:
        self.of = of
        lab, version = of.lab, of.version

        def end(host: Host, port: int) -> Endpoint:
            return Endpoint(ip_address(host.address(version)), port)

        self.peer, self.home, self.away = (
            end(lab.peer, PEER_PORT),
            end(lab.a, HOME_PORT),
            end(lab.b, AWAY_PORT),
        )
        self.ends = FourTuple(self.home, self.peer)

    def message(self, what: tuple[int, int, int], quote: bytes, sender: Host, dest: Endpoint) -> bytes:
        source = ip_address(sender.address(self.of.version)).packed
        return error(what, quote, source, dest.address.packed)


@pytest.fixture(scope="module")
def stills() -> Iterator[Callable[[int], Still]]:
    """One for each IP version, made when first asked for."""
    made: dict[int, Still] = {}
    with contextlib.ExitStack() as stack:

        def get(version: int) -> Still:
            if version not in made:
                made[version] = Still(stack.enter_context(triangle(version)))
                lab = made[version].of.lab
                for pair in (
                    (lab.c, lab.a),
                    (lab.a, lab.b),
                    (lab.b, lab.peer),
                    (lab.c, lab.peer),
                    (lab.a, lab.peer),
                ):
                    for sock in connect(*pair, version):  # neighbours that know each other lose no packet
                        sock.close()
            it = made[version]
            lab = it.of.lab
            # Fresh flows, so that counters begin at zero.
            for host, flow in ((lab.a, redirect(it.ends, it.away)), (lab.b, translate(it.away, it.ends))):
                it.of.nat(host).flush()
                it.of.nat(host).add(flow)
            return it

        yield get


KINDS = [
    pytest.param(4, (3, 4, 1400), id="4-frag-needed"),
    pytest.param(4, (3, 1, 0), id="4-host-unreachable"),
    pytest.param(4, (3, 13, 0), id="4-prohibited"),
    pytest.param(4, (11, 0, 0), id="4-time-exceeded"),
    pytest.param(4, (12, 0, 0x08000000), id="4-parameter"),
    pytest.param(6, (1, 0, 0), id="6-no-route"),
    pytest.param(6, (1, 4, 0), id="6-port-unreachable"),
    pytest.param(6, (2, 0, 1400), id="6-too-big"),
    pytest.param(6, (3, 0, 0), id="6-time-exceeded"),
    pytest.param(6, (4, 1, 6), id="6-parameter"),
]


def only(found: list[Got], kind: int) -> Got:
    wanted = [each for each in found if each.kind == kind and each.ends.remote.port != 0]
    assert len(wanted) == 1, found
    return wanted[0]


@pytest.mark.parametrize("tcp_bytes", [8, 17, 18, 20, 1020])
@pytest.mark.parametrize(("version", "what"), KINDS)
def test_inward(
    stills: Callable[[int], Still], version: int, what: tuple[int, int, int], tcp_bytes: int
) -> None:
    """Somebody reports on what the importer sent under the exporter's name."""
    it = stills(version)
    lab = it.of.lab
    tap = Tap(lab.b)
    quote = quoted(it.home, it.peer, tcp_bytes)
    message = it.message(what, quote, lab.c, it.home)
    send(lab.c, ICMP if version == 4 else ICMP6, lab.a.address(version), message)
    got = only(tap.errors(), what[0])
    tap.close()
    assert (got.kind, got.code, got.info) == what
    assert got.dest == it.away.address.packed
    assert got.ends == FourTuple(it.away, it.peer)
    assert got.right
    assert len(got.quote) == len(quote)
    assert it.of.nat(lab.a).one(it.ends).errors == 1


@pytest.mark.parametrize("way", ["through-exporter", "from-importer"])
@pytest.mark.parametrize("tcp_bytes", [8, 18, 1020])
@pytest.mark.parametrize(("version", "what"), KINDS)
def test_outward(
    stills: Callable[[int], Still], version: int, what: tuple[int, int, int], tcp_bytes: int, way: str
) -> None:
    """Somebody reports on what the peer sent, as it was after the exporter's hands."""
    it = stills(version)
    lab = it.of.lab
    tap = Tap(lab.peer)
    quote = quoted(it.peer, it.away, tcp_bytes)
    sender = lab.b
    if way == "through-exporter":
        sender = lab.c
        bits = 32 if version == 4 else 128
        lab.c.ip("route", "replace", f"{lab.peer.address(version)}/{bits}", "via", lab.a.address(version))
    message = it.message(what, quote, sender, it.peer)
    send(sender, ICMP if version == 4 else ICMP6, lab.peer.address(version), message)
    got = only(tap.errors(), what[0])
    tap.close()
    assert (got.kind, got.code, got.info) == what
    assert got.ends == FourTuple(it.peer, it.home)
    assert got.right
    assert len(got.quote) == len(quote)
    if way == "from-importer":
        assert got.source == it.home.address.packed
        assert it.of.nat(lab.b).one(FourTuple(it.away, it.peer)).errors == 1
    else:
        assert got.source == ip_address(lab.c.address(version)).packed
        assert it.of.nat(lab.a).one(it.ends).errors == 1


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_others_pass_as_they_are(stills: Callable[[int], Still], version: int) -> None:
    it = stills(version)
    lab = it.of.lab
    other = Endpoint(it.home.address, HOME_PORT + 1)
    kind = 3 if version == 4 else 1
    tap_a, tap_b = Tap(lab.a), Tap(lab.b)
    message = it.message((kind, 1, 0), quoted(other, it.peer, 20), lab.c, other)
    send(lab.c, ICMP if version == 4 else ICMP6, lab.a.address(version), message)
    got = only(tap_a.errors(), kind)
    assert got.ends == FourTuple(other, it.peer) and got.right
    assert not [each for each in tap_b.errors(0.1) if each.kind == kind]
    assert it.of.nat(lab.a).one(it.ends).errors == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_held_flow_hears_no_errors(stills: Callable[[int], Still], version: int) -> None:
    it = stills(version)
    lab = it.of.lab
    it.of.nat(lab.a).replace(held(it.ends))
    kind = 3 if version == 4 else 1
    tap = Tap(lab.b)
    message = it.message((kind, 1, 0), quoted(it.home, it.peer, 20), lab.c, it.home)
    send(lab.c, ICMP if version == 4 else ICMP6, lab.a.address(version), message)
    assert not [each for each in tap.errors() if each.kind == kind]
    assert it.of.nat(lab.a).one(it.ends).held == 1


@contextlib.contextmanager
def advising(version: int) -> Iterator[Triangle]:
    """The exporter forwards out of the interface that it received on, which makes it send ICMP redirects."""
    with triangle(version) as of:
        for device in ("all", "eth0"):
            of.lab.a.sysctl(f"net/ipv4/conf/{device}/send_redirects", 1)
        # Those of IPv6 come from the link-local address, which is looked for in vain at first.
        until(lambda: not of.lab.a.ip("-6", "addr", "show", "tentative"), "a link-local address")
        yield of


@pytest.mark.parametrize("version", [4, 6])
def test_redirects_of_routes_are_not_passed_on(version: int) -> None:
    with advising(version) as of, live(of, of.lab.peer, of.lab.a) as moving:
        moving.progress()
        moving.move(of.lab.a, of.lab.b, AWAY_PORT)
        moving.progress(50_000)
        quiet(moving)


@pytest.mark.parametrize("version", [4, 6])
def test_other_redirects_of_routes_are(version: int) -> None:
    """The control of the test above, on a fresh host, since each sends only few of them to a peer."""
    with advising(version) as of:
        lab = of.lab
        for pair in ((lab.peer, lab.a), (lab.a, lab.c)):
            for sock in connect(*pair, version):
                sock.close()
        of.nat(lab.a).add(redirect(Still(of).ends, Still(of).away))
        bits = 32 if version == 4 else 128
        lab.peer.ip("route", "replace", f"{lab.c.address(version)}/{bits}", "via", lab.a.address(version))
        tap = Tap(lab.peer)
        ends = [Endpoint(ip_address(host.address(version)), 9) for host in (lab.peer, lab.c)]
        send(lab.peer, TCP, lab.c.address(version), segment(*ends, b"", 2))
        kinds = [(p[9], p[20]) if version == 4 else (p[6], p[40]) for p in tap.packets()]
        tap.close()
        assert ((ICMP, 5) if version == 4 else (ICMP6, 137)) in kinds


@pytest.mark.parametrize("last_first", [False, True])
def test_fragments_of_ipv4_are_put_together(stills: Callable[[int], Still], last_first: bool) -> None:
    it = stills(4)
    lab = it.of.lab
    tap = Tap(lab.b)
    payload = random.Random(3).randbytes(1000)  # noqa: S311
    tcp = segment(it.peer, it.home, payload)
    source, dest = it.peer.address.packed, it.home.address.packed
    parts = [
        network(source, dest, TCP, 512, 0x2000) + tcp[:512],
        network(source, dest, TCP, len(tcp) - 512, 512 // 8) + tcp[512:],
    ]
    for part in parts[:: -1 if last_first else 1]:
        send(lab.peer, socket.IPPROTO_RAW, lab.a.address(4), part, headers=True)
    found = [packet for packet in tap.packets() if packet[9] == TCP]
    tap.close()
    body = b"".join(
        packet[20:] for packet in sorted(found, key=lambda p: struct.unpack(">H", p[6:8])[0] & 0x1FFF)
    )
    assert body[20:] == payload
    assert struct.unpack(">HH", body[:4]) == (PEER_PORT, AWAY_PORT)
    assert {packet[16:20] for packet in found} == {it.away.address.packed}


@pytest.mark.parametrize("version", [4, 6])
def test_odd_errors_do_no_harm(stills: Callable[[int], Still], version: int) -> None:
    """Cut, mangled and nested messages: whatever comes out is well-formed, and the kernel lives."""
    rng = random.Random(version)  # noqa: S311
    it = stills(version)
    lab = it.of.lab
    kind = 3 if version == 4 else 1
    good = it.message((kind, 1, 0), quoted(it.home, it.peer, 60), lab.c, it.home)
    protocol = ICMP if version == 4 else ICMP6
    tap = Tap(lab.b)
    for _turn in range(600):
        message = bytearray(good[: rng.randint(8, len(good))])
        for _turn in range(rng.randint(0, 4)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        if rng.random() < 0.1:
            message = message[:8] + message
        send(lab.c, protocol, lab.a.address(version), bytes(message))
    for packet in tap.packets():
        read_error(packet) if len(packet) >= 96 else None
    tap.close()
    send(lab.c, protocol, lab.a.address(version), good)
    until(lambda: it.of.nat(lab.a).one(it.ends).errors > 0, "a good error among odd ones")


def test_flow_of_errors_needs_the_right_outer_address(stills: Callable[[int], Still]) -> None:
    """An error to another address of the exporter quotes a stranger's packet."""
    it = stills(4)
    lab = it.of.lab
    lab.a.ip("addr", "add", "10.9.0.77/24", "dev", "eth0")
    other = Endpoint(ip_address("10.9.0.77"), 1)
    message = it.message((3, 1, 0), quoted(it.home, it.peer, 20), lab.c, other)
    send(lab.c, ICMP, "10.9.0.77", message)
    send(lab.c, ICMP, lab.a.address(4), it.message((3, 1, 0), quoted(it.home, it.peer, 20), lab.c, it.home))
    until(lambda: it.of.nat(lab.a).one(it.ends).errors == 1, "the one error")
    assert it.of.nat(lab.a).one(Flow(it.home, it.peer, Flag(0))).errors == 1
