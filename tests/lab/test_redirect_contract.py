# SPDX-License-Identifier: MIT
"""Every redirect keeps the contract of sockmi.redirect.base, with real connections that are really moved."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Inbound, Mode, Outbound, Redirect
from sockmi.redirect.forward import Forward
from sockmi.redirect.icmp import IcmpError, IcmpInjector, IcmpRelay
from sockmi.redirect.iptables import Iptables, unusable
from sockmi.redirect.nat import Nat
from sockmi.redirect.routes import apart
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables
from sockmi.redirect.takeover import Takeover
from tests.lab import redirect_lab as lab_of
from tests.lab.raw_segments import segment
from tests.lab.redirect_lab import Capture, Host, Lab, Talker, ends, until

LEGACY = "iptables-legacy"
MODES = [
    Mode.FORWARD,
    Mode.NAT,
    Mode.TAKEOVER,
    pytest.param(
        Mode.IPTABLES, marks=pytest.mark.skipif(bool(unusable(LEGACY)), reason=str(unusable(LEGACY)))
    ),
]
VERSIONS = [4, 6]
MAKE: dict[Mode, Callable[[Tables], Redirect]] = {
    Mode.FORWARD: Forward,
    Mode.NAT: Nat,
    Mode.TAKEOVER: Takeover,
    Mode.IPTABLES: lambda tables: Iptables(tables, LEGACY),
}


class Site:
    """The same mode on every host of a lab."""

    def __init__(self, lab: Lab, mode: Mode) -> None:
        self.lab, self.mode = lab, mode
        self.redirects: dict[str, Redirect] = {}

    def on(self, host: Host) -> Redirect:
        with host.inside():
            if host.name not in self.redirects:
                self.redirects[host.name] = MAKE[self.mode](host.tables)
                self.redirects[host.name].setup()
        return self.redirects[host.name]

    def restart(self, host: Host) -> Redirect:
        """A new daemon: nothing in memory, setup over live tables."""
        old = self.redirects.get(host.name)
        if isinstance(old, Iptables):
            old.close()
        with host.inside():
            host.restart()
            self.redirects[host.name] = MAKE[self.mode](host.tables)
            self.redirects[host.name].setup()
        return self.redirects[host.name]

    def outbound(self, host: Host) -> list[Outbound]:
        with host.inside():
            return self.on(host).outbound()

    def inbound(self, host: Host) -> list[Inbound]:
        with host.inside():
            return self.on(host).inbound()

    def teardown(self) -> None:
        """Uninstall everywhere, and see that nothing is left."""
        for name, redirect in self.redirects.items():
            host = self.lab.hosts[name]
            with host.inside():
                redirect.teardown()
            assert_clean(host)


def assert_clean(host: Host) -> None:
    tables = "\n".join(line for line in host.nft("list", "tables").splitlines() if "fw" not in line)
    assert tables == ""
    for version in ("-4", "-6"):
        rules = lab_of.run("ip", version, "-n", host.namespace, "rule")
        assert "7780" not in rules and "fwmark" not in rules
        routes = lab_of.run("ip", version, "-n", host.namespace, "route", "show", "table", "all")
        assert "7780" not in routes and "proto 83" not in routes
    if not unusable(LEGACY):
        for program in ("iptables-legacy-save", "ip6tables-legacy-save"):
            assert "sockmi" not in lab_of.run("ip", "netns", "exec", host.namespace, program)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def wide_lab() -> Iterator[Lab]:
    with Lab(with_d=True) as made:
        yield made


class Connection:
    """A connection from the peer to ``a``'s service address, that can be moved from host to host."""

    def __init__(self, site: Site, version: int, peer: Host | None = None, talk: bool = True) -> None:
        lab = site.lab
        self.site, self.version = site, version
        self.peer_host = peer or lab.peer
        address = lab_of.service_address(version)
        width = 24 if version == 4 else 64
        if address not in lab.a.ip("addr"):
            lab.a.ip("addr", "add", f"{address}/{width}", "dev", "eth0", *(["nodad"] if version == 6 else []))
        self.capture = Capture(self.peer_host)
        self.peer_sock, self.sock = lab_of.connect(self.peer_host, lab.a, version, address)
        self.at, self.home = lab.a, ends(self.sock)
        self.path = [lab.a]
        self.peer = Talker(self.peer_sock) if talk else None
        self.owner = Talker(self.sock) if talk else None
        if talk:
            self.progress()

    @property
    def tuple(self) -> FourTuple:
        return ends(self.sock)

    def placed(self, host: Host) -> Endpoint:
        """Where the copy lives on ``host``."""
        if self.site.mode in (Mode.FORWARD, Mode.TAKEOVER) or host is self.path[0]:
            return self.home.local
        return Endpoint(ip_address(host.address(self.version)), 20000 + self.home.local.port % 10000)

    def importer(self, host: Host) -> Endpoint:
        """``Outbound.importer`` for a move to ``host``."""
        if self.site.mode in (Mode.FORWARD, Mode.TAKEOVER):
            return Endpoint(ip_address(host.address(self.version)), self.home.local.port)
        return self.placed(host)

    def move(self, to: Host) -> None:
        """The steps of a migration that concern the redirect, in their order."""
        source, target = self.site.on(self.at), self.site.on(to)
        if self.owner:
            self.owner.pause()
        old, local = self.tuple, self.placed(to)
        new = FourTuple(local, old.remote)
        with to.inside():
            to.tables.hold([new], 10)
        with self.at.inside():
            self.at.tables.hold([old], 10)
            image = lab_of.dump(self.sock)
            source.send_away([Outbound(old, self.importer(to))])
            self.sock.close()
        with to.inside():
            self.sock = lab_of.restore(image, local)
            target.admit([Inbound(new, self.home.local)])
        if self.owner:
            lab_of.wake(self.sock, image)
            self.owner.resume(self.sock)
        else:
            lab_of.wake(self.sock, image)
        self.at = to

    def collapse(self, middle: Host) -> None:
        """After a second hop: home sends straight to the holder, ``middle`` forgets."""
        home = self.path[0]
        if self.at is not home:
            with home.inside():
                self.site.on(home).reroute([Outbound(self.home, self.importer(self.at))])
        there = FourTuple(self.placed(middle), self.home.remote)
        with middle.inside():
            self.site.on(middle).expire([there], 0.2)

    def progress(self, count: int = 20000) -> None:
        """Both directions advance by ``count`` bytes from now."""
        assert self.peer and self.owner
        peer, owner = self.peer, self.owner
        goal = peer.received + count, owner.received + count

        def done() -> bool:
            peer.check()
            owner.check()
            return peer.received >= goal[0] and owner.received >= goal[1]

        until(done, f"{count} bytes both ways over {self.site.mode}, IPv{self.version}", 20)

    def finish(self) -> None:
        """Nothing was lost, added or seen by the peer."""
        if self.peer and self.owner:
            self.owner.pause()
            self.peer.pause()
        assert (self.capture.resets, self.capture.fins) == (0, 0)
        # While an address is on its way, its old host may rightly tell the peer of its new one.
        assert self.capture.redirects == 0 or self.site.mode is Mode.TAKEOVER
        assert self.capture.segments > 0
        self.capture.close()

    def close(self) -> None:
        for talker in (self.peer, self.owner):
            if talker:
                talker._stop.set()
        self.peer_sock.close()
        self.sock.close()
        self.capture.close()


@contextlib.contextmanager
def connection(site: Site, version: int, peer: Host | None = None, talk: bool = True) -> Iterator[Connection]:
    made = Connection(site, version, peer, talk)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_two_hops_collapse(lab: Lab, mode: Mode, version: int) -> None:
    """A -> B -> C under traffic; then A leads straight to C, and B keeps nothing."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        with lab.a.inside():
            assert site.on(lab.a).reachable(ip_address(lab.b.address(version))) is None
        c.move(lab.b)
        c.progress()
        assert site.outbound(lab.a) == [Outbound(c.home, c.importer(lab.b))]
        assert site.inbound(lab.b) == [Inbound(c.tuple, c.home.local)]
        c.move(lab.c)
        c.progress()
        c.collapse(lab.b)
        assert site.outbound(lab.a) == [Outbound(c.home, c.importer(lab.c))]
        assert site.outbound(lab.b) == [] and site.inbound(lab.b) == []
        assert site.inbound(lab.c) == [Inbound(c.tuple, c.home.local)]
        c.progress()
        until(lambda: not lab.b.tables.read_flows(), "late packets are no longer dropped", 5)
        c.finish()
    site.teardown()


@pytest.mark.skipif(bool(unusable(LEGACY)), reason=str(unusable(LEGACY)))
def test_a_slow_reroute_tells_the_peer_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets go to the new importer before iptables mode is done; the kernel sends a redirect a second."""
    site = Site(lab, Mode.IPTABLES)
    with connection(site, 6) as c:
        c.move(lab.b)
        c.progress()
        c.move(lab.c)
        c.progress()
        track = Iptables._track

        def slowly(self: Iptables, *arguments: Any) -> None:
            track(self, *arguments)
            time.sleep(2)

        with monkeypatch.context() as patch:
            patch.setattr(Iptables, "_track", slowly)
            c.collapse(lab.b)
        c.progress()
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_comes_home(lab: Lab, mode: Mode, version: int) -> None:
    """A -> B -> A under traffic; admit at home does what take_back does, which may follow."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        c.move(lab.b)
        c.progress()
        c.move(lab.a)
        c.progress()
        assert site.outbound(lab.a) == []
        c.collapse(lab.b)
        with lab.b.inside():
            site.on(lab.b).evict([Inbound(FourTuple(c.placed(lab.b), c.home.remote), c.home.local)])
        c.progress()
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_undone_before_commit(lab: Lab, mode: Mode, version: int) -> None:
    """hold, send_away, take_back: the original goes on; also when each is repeated."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        redirect = site.on(lab.a)
        out = [Outbound(c.home, c.importer(lab.b))]
        site.on(lab.b)
        lab.b.tables.hold([FourTuple(c.placed(lab.b), c.home.remote)], 10)  # as while it is PREPARED
        with lab.a.inside():
            for _turn in range(2):
                lab.a.tables.hold([c.home], 5)
            for _turn in range(2):
                redirect.send_away(out)
            assert redirect.outbound() == out and lab.a.tables.held() == []
            for _turn in range(2):
                redirect.take_back([c.home])
        assert redirect.outbound() == [] and lab.a.tables.read_flows() == {}
        c.progress()
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_strict_hosts(lab: Lab, mode: Mode, version: int) -> None:
    """tcp_loose=0, rp_filter=1 and `ct state invalid drop` everywhere, on every host."""
    for host in (lab.a, lab.b, lab.c):
        harden(host)
    site = Site(lab, mode)
    with connection(site, version) as c:
        for to in (lab.b, lab.c, lab.a):
            before = c.at
            c.move(to)
            c.progress()
            if before is not lab.a:
                c.collapse(before)
        assert c.at is lab.a
        c.progress()
        c.finish()
    site.teardown()


def harden(host: Host) -> None:
    host.nft(
        "-f",
        "-",
        text="""
        table inet fw {
            chain incoming { type filter hook input priority 0; policy accept; ct state invalid drop; }
            chain through { type filter hook forward priority 0; policy accept; ct state invalid drop; }
            chain outgoing { type filter hook output priority 0; policy accept; ct state invalid drop; }
        }""",
    )
    host.sysctl("net/netfilter/nf_conntrack_tcp_loose", 0)
    for device in ("all", "default", "eth0"):
        host.sysctl(f"net/ipv4/conf/{device}/rp_filter", 1)
        host.sysctl(f"net/ipv4/conf/{device}/src_valid_mark", 1)


@pytest.mark.skipif(bool(unusable(LEGACY)), reason=str(unusable(LEGACY)))
@pytest.mark.parametrize("version", VERSIONS)
def test_iptables_after_a_flush(lab: Lab, version: int) -> None:
    """Who flushes conntrack on strict hosts interrupts; a daemon that starts makes the entries anew."""
    for host in (lab.a, lab.b):
        harden(host)
    site = Site(lab, Mode.IPTABLES)
    with connection(site, version) as c:
        c.move(lab.b)
        c.progress()
        assert c.peer
        for host in (lab.a, lab.b):
            with host.inside():
                apart(lambda _unused: flush(version))
        time.sleep(0.2)
        before = c.peer.received
        time.sleep(0.5)
        assert c.peer.received == before
        for host in (lab.a, lab.b):
            site.restart(host)
        c.progress()
        c.finish()
    site.teardown()


def flush(version: int) -> None:
    """All of conntrack's entries of one family."""
    with NFCTSocket(nfgen_family=2 if version == 4 else 10) as conntrack:
        conntrack.flush()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_outlives_daemons(lab: Lab, mode: Mode, version: int) -> None:
    """New daemons on both hosts set up over live tables, again and again, while bytes flow."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        c.move(lab.b)
        c.progress()
        for _turn in range(4):
            for host in (lab.a, lab.b):
                site.restart(host)
        c.progress()
        assert site.outbound(lab.a) == [Outbound(c.home, c.importer(lab.b))]
        assert site.inbound(lab.b) == [Inbound(c.tuple, c.home.local)]
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_its_listener_has_moved_too(lab: Lab, mode: Mode, version: int) -> None:
    """What comes to where that was is dropped in silence, but not what is led on; nor by a daemon's heir."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        c.move(lab.b)
        anywhere = ip_address("0.0.0.0" if version == 4 else "::")  # noqa: S104 (inside a namespace)
        listeners = [c.home.local, Endpoint(anywhere, c.home.local.port)]
        lab.a.tables.miss_listeners(listeners)
        c.progress()
        site.restart(lab.a)
        c.progress()
        c.move(lab.c)  # b misses none, and leads it on
        c.progress()
        c.collapse(lab.b)
        c.progress()
        c.move(lab.a)
        c.progress()
        assert "elements" not in lab.a.nft("list", "set", "inet", "sockmi", f"led{version}")
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_late_packet(lab: Lab, mode: Mode, version: int) -> None:
    """After expire() a late segment is neither answered nor sent on for linger_s; then nothing is left."""
    site = Site(lab, mode)
    linger_s = 0.6
    with connection(site, version) as c:
        c.move(lab.b)
        c.progress()
        c.owner.pause()  # type: ignore[union-attr]
        c.peer.pause()  # type: ignore[union-attr]
        with lab.b.inside():
            lab.b.tables.hold([c.tuple], 20)  # the end of the connection is not the subject here
        with lab.peer.inside():
            lab_of.dump(c.peer_sock)
            c.peer_sock.close()
        if mode is Mode.TAKEOVER:  # of a peer that has not heard of the address's new host
            with lab.a.inside():
                mac = lab.a.tables.routes.hardware_address("eth0")
            to = (str(c.home.local.address), "lladdr", mac.hex(":"), "dev", "eth0")
            lab.peer.ip("neigh", "replace", *to, "nud", "permanent")
            for _turn in range(5):  # before expire() it is as silent
                segment(lab.peer, FourTuple(c.home.remote, c.home.local))
        lab.b.nft(
            "-f", "-", text=f"""table inet fw {{
                counter sent_on {{ }}
                chain in {{ type filter hook prerouting priority -400
                    tcp dport {{ {c.home.local.port}, {c.tuple.local.port} }} counter name sent_on
                }}
            }}"""
        )  # fmt: skip

        def noticed() -> int:
            """RSTs to the peer, and segments that have come to b."""
            said = lab.b.nft("list", "counter", "inet", "fw", "sent_on")
            return c.capture.resets + int(said.split("packets ")[1].split()[0])

        def late() -> int:
            segment(lab.peer, FourTuple(c.home.remote, c.home.local))
            time.sleep(0.02)
            return noticed()

        with lab.a.inside():
            site.on(lab.a).expire([c.home], linger_s)
        expired_at = time.monotonic()
        assert site.outbound(lab.a) == []
        while time.monotonic() < expired_at + linger_s * 0.6:
            assert late() == 0 or time.monotonic() > expired_at + linger_s
        # The kernel's own timeout ends the silence, so the silence was ours.
        until(late, "a late segment is answered, or goes to the address's host", 5)
        assert time.monotonic() > expired_at + linger_s * 0.9
        assert bool(c.capture.resets) is (mode is not Mode.TAKEOVER)
        until(lambda: lab.a.tables.read_flows() == {}, "nothing is left", 5)
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("caller", ["peer", "a"])
def test_its_ports_come_again(lab: Lab, mode: Mode, version: int, caller: str) -> None:
    """A connection that has ended elsewhere bars no new one with the same ends, whoever begins it.

    Late segments of the old one are still met with silence, also when that happens a second time.
    """
    if caller == "peer":  # as it has called before: conntrack does not like it if they change their parts
        harden(lab.a)
    site = Site(lab, mode)
    with connection(site, version, talk=False) as c:
        c.move(lab.b)
        with lab.peer.inside():
            lab_of.dump(c.peer_sock)
            c.peer_sock.close()
        with lab.b.inside():
            lab_of.dump(c.sock)
            c.sock.close()
            site.on(lab.b).evict([Inbound(FourTuple(c.placed(lab.b), c.home.remote), c.home.local)])
        if mode is Mode.TAKEOVER:  # the address comes back, but not for this connection
            lab.b.ip("addr", "flush", "dev", "eth0", "to", str(c.home.local.address))
        for _turn in range(2):
            with lab.a.inside():
                site.on(lab.a).expire([c.home], 120)
                if mode is Mode.TAKEOVER and not lab.a.ip("addr", "show", "to", str(c.home.local.address)):
                    extra = ("nodad",) if version == 6 else ()
                    address = f"{c.home.local.address}/{24 if version == 4 else 64}"
                    lab.a.ip("addr", "add", address, "dev", "eth0", *extra)
                    lab.peer.ip("neigh", "flush", "dev", "eth0")
            before = c.capture.resets
            for _segment in range(3):
                segment(lab.peer, FourTuple(c.home.remote, c.home.local))
            time.sleep(0.1)
            assert c.capture.resets == before
            one, other = (lab.peer, lab.a) if caller == "peer" else (lab.a, lab.peer)
            local, remote = (
                (c.home.remote, c.home.local) if caller == "peer" else (c.home.local, c.home.remote)
            )
            began = time.monotonic()
            again = call(one, local, other, remote)
            assert time.monotonic() - began < 0.9  # a SYN is repeated after 1 s
            for sender, receiver in (again, reversed(again)):
                sender.sendall(b"anew" * 1000)
                assert len(receiver.recv(4000, socket.MSG_WAITALL)) == 4000
            peers, ours = again if caller == "peer" else reversed(again)
            # The peer sends the RST, and no TIME-WAIT is left.
            peers.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peers.close()
            with ours, pytest.raises(ConnectionResetError):
                ours.recv(1)
        with lab.a.inside():
            site.on(lab.a).take_back([c.home])
    site.teardown()


def call(one: Host, local: Endpoint, other: Host, remote: Endpoint) -> tuple[socket.socket, socket.socket]:
    """A connection between these ends: the caller's socket, and the one that has been accepted."""
    family = socket.AF_INET if local.version == 4 else socket.AF_INET6
    with other.inside(), socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(remote.address), remote.port))
        listener.listen()
        listener.settimeout(5)
        with one.inside():
            sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(local.address), local.port))
        sock.settimeout(5)
        sock.connect((str(remote.address), remote.port))
        accepted, _unused = listener.accept()
        accepted.settimeout(5)
    return sock, accepted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_the_applications_mark_stays(lab: Lab, mode: Mode, version: int) -> None:
    """Packets leave a copy's host with the SO_MARK that its application has set, whatever our rules use."""
    site = Site(lab, mode)
    with connection(site, version) as c:
        c.move(lab.b)
        lab.b.nft(
            "-f", "-", text="""table inet fw {
                counter marked { }
                counter others { }
                chain out { type filter hook output priority 0
                    meta l4proto tcp meta mark 0x1234abcd counter name marked
                    meta l4proto tcp meta mark != 0x1234abcd counter name others
                }
            }"""
        )  # fmt: skip

        def count(name: str) -> int:
            return int(lab.b.nft("list", "counter", "inet", "fw", name).split("packets ")[1].split()[0])

        c.progress()
        assert count("marked") == 0 < count("others")
        assert c.owner
        c.owner.sock.setsockopt(socket.SOL_SOCKET, 36, 0x1234ABCD)  # SO_MARK
        until(lambda: count("marked"), "marked packets")
        before = count("others")
        c.progress()
        assert count("marked") > 5 and count("others") == before
        c.finish()
    site.teardown()


# --- ICMP --------------------------------------------------------------------------------------


@contextlib.contextmanager
def relaying(
    lab: Lab, site: Site, exporter: Host, importers: Sequence[Host]
) -> Iterator[list[tuple[str, bool]]]:
    """What the daemons do with ICMP errors; yields what was done: (importer's name, was injected)."""
    done: list[tuple[str, bool]] = []
    injectors = {}
    for host in importers:
        with host.inside():
            injectors[host.name] = IcmpInjector(host.tables)

    def ship(outbound: Outbound, error: IcmpError) -> None:
        for host in importers:
            if outbound.importer.address == ip_address(host.address(error.version)):
                with host.inside():
                    again = IcmpError.from_bytes(error.to_bytes())
                    done.append((host.name, injectors[host.name].inject(again)))

    def known_as(ends: FourTuple) -> Endpoint | None:
        away = site.on(exporter).outbound()
        return {FourTuple(one.tuple.remote, one.importer): one.tuple.local for one in away}.get(ends)

    with exporter.inside():
        relay = IcmpRelay(exporter.tables, known_as, ship)
    stop = threading.Event()

    def loop() -> None:
        with exporter.inside():
            while not stop.is_set():
                if relay.work():
                    done.append(("relayed", True))
                time.sleep(0.002)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(5)
        relay.close()
        for injector in injectors.values():
            injector.close()


def bulk(sender: socket.socket, receiver: socket.socket, count: int, timeout_s: float) -> int:
    """Bytes that arrived of ``count``, in order and unharmed, before the time was over."""
    sent = got = 0
    sender.setblocking(False)
    receiver.setblocking(False)
    end = time.monotonic() + timeout_s
    while got < count and time.monotonic() < end:
        moved = 0
        with contextlib.suppress(BlockingIOError):
            if sent < count:
                moved = sender.send(lab_of.pattern(sent, min(65536, count - sent)))
                sent += moved
        with contextlib.suppress(BlockingIOError):
            data = receiver.recv(1 << 17)
            assert data == lab_of.pattern(got, len(data)) and data
            got += len(data)
            moved += len(data)
        if not moved:
            time.sleep(0.001)
    return got


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_path_mtu_reaches_the_copy(wide_lab: Lab, mode: Mode, version: int) -> None:
    """A router between importer and peer cannot send on what the copy sends, and says so to A."""
    lab = wide_lab
    lab.d.ip("link", "set", "eth0", "mtu", "1500")  # so that the handshake agrees on full segments
    for host in (lab.a, lab.b):  # what an earlier test has taught them
        host.ip("-4", "route", "flush", "cache")
        host.ip("-6", "route", "flush", "cache")
    site = Site(lab, mode)
    with connection(site, version, peer=lab.d, talk=False) as c:
        c.move(lab.b)
        count = 1_000_000
        with relaying(lab, site, lab.a, [lab.b]) as done:
            assert bulk(c.sock, c.peer_sock, count, 15) == count
            if mode in (Mode.FORWARD, Mode.NAT):  # else conntrack, or the segment itself, does it
                until(lambda: ("b", True) in done, "the copy has it, and that is noted")
                assert ("b", False) not in done
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.NAT])
def test_without_relay_it_would_stall(wide_lab: Lab, mode: Mode, version: int) -> None:
    """The test above sees what it says it sees."""
    lab = wide_lab
    lab.d.ip("link", "set", "eth0", "mtu", "1500")
    site = Site(lab, mode)
    with connection(site, version, peer=lab.d, talk=False) as c:
        c.move(lab.b)
        assert bulk(c.sock, c.peer_sock, 1_000_000, 1.5) < 1_000_000


@pytest.mark.parametrize("version", VERSIONS)
def test_importer_behind_narrow_router(wide_lab: Lab, version: int) -> None:
    """nat: the peer's full segments do not fit the way to d; the exporter tells the peer in its own terms."""
    lab = wide_lab
    site = Site(lab, Mode.NAT)
    with connection(site, version, talk=False) as c:
        redirect = site.on(lab.a)
        to = ip_address(lab.d.address(version))
        with lab.a.inside():
            assert redirect.reachable(to) is None
            assert isinstance(redirect, Nat)
            until(lambda: redirect.path_mtu._mtu(to) == lab_of.NARROW_MTU, "the path is known", 5)
            assert Forward(lab.a.tables).reachable(to) == (
                f"{to} is behind router {lab.r.address(version)}, not on a segment of this host; use nat"
            )
        c.move(lab.d)
        with relaying(lab, site, lab.a, [lab.d]) as done:
            assert bulk(c.peer_sock, c.sock, 1_000_000, 15) == 1_000_000
            assert bulk(c.sock, c.peer_sock, 1_000_000, 15) == 1_000_000
            until(lambda: ("relayed", True) in done, "that is noted")
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
def test_relay_leaves_others_alone(lab: Lab, version: int) -> None:
    """Errors about unknown connections are neither shipped nor sent on; forged ones are not injected."""
    site = Site(lab, Mode.NAT)
    site.on(lab.a)
    site.on(lab.b)
    a, b, peer = (Endpoint(ip_address(h.address(version)), 999) for h in (lab.a, lab.b, lab.peer))
    kind = (3, 4) if version == 4 else (2, 0)
    error = IcmpError(*kind, 1400, peer.address, FourTuple(a, peer), 1)
    from sockmi.redirect.icmp import _RawSender, build

    with relaying(lab, site, lab.a, [lab.b]) as done:
        with lab.peer.inside():
            sender = _RawSender(0)
            for _turn in range(10):
                sender.send(build(error), a.address)
            sender.close()
        with lab.b.inside():
            injector = IcmpInjector(lab.b.tables)
            assert injector.inject(IcmpError(*kind, 1400, peer.address, FourTuple(b, peer), 1)) is False
            injector.close()
        time.sleep(0.1)
        assert done == []
    site.teardown()


# --- the hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_hold_is_lifted_by_the_kernel(lab: Lab, version: int) -> None:
    """Nothing passes while the hold is there, whatever the first timeout was, and it ends when it should."""
    site = Site(lab, Mode.FORWARD)
    timeout_s = 2.0
    with connection(site, version) as c:
        site.on(lab.a)
        assert c.peer and c.owner
        peer, owner = c.peer, c.owner

        def stands_still(for_s: float) -> bool:
            """Whether nothing comes to either end; what was in the receive queues is read first."""
            time.sleep(0.3)
            before = peer.received, owner.received, c.capture.segments
            time.sleep(for_s)
            return before == (peer.received, owner.received, c.capture.segments)

        lab.a.tables.hold([c.home], 60)
        held_at = time.monotonic()
        lab.a.tables.hold([c.home], timeout_s)  # the later one holds
        assert stands_still(0.7) or time.monotonic() > held_at + timeout_s
        until(lambda: lab.a.tables.held() == [], "the kernel lifts it", 10)
        assert time.monotonic() > held_at + timeout_s - 0.02  # a tick of the kernel's clock, and some
        c.progress()
        lab.a.tables.hold([c.home], 0.1)
        lab.a.tables.hold([c.home], None)
        assert stands_still(0.5) and lab.a.tables.held() == [c.home]
        lab.a.tables.unhold([c.home])
        c.progress()
        c.finish()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wildcard", [False, True])
def test_hold_listeners(lab: Lab, version: int, wildcard: bool) -> None:
    """A held listener's SYNs are dropped, and only those to its own address."""
    site = Site(lab, Mode.FORWARD)
    site.on(lab.a)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    any_address = "0.0.0.0" if version == 4 else "::"  # noqa: S104 (inside a namespace)
    with lab.a.inside():
        listener = socket.create_server((any_address, 0), family=family)
    port = listener.getsockname()[1]
    address = ip_address(any_address if wildcard else lab.a.address(version))
    lab.a.tables.hold_listeners([Endpoint(address, port)], 30)

    def attempt(to: str) -> bool:
        with lab.peer.inside(), socket.socket(family) as client:
            client.settimeout(0.3)
            try:
                client.connect((to, port))
            except TimeoutError:
                return False
            return True

    lab.a.ip("addr", "add", f"{lab_of.service_address(version)}/{24 if version == 4 else 64}", "dev", "eth0")
    until(lambda: "tentative" not in lab.a.ip("addr"), "address is usable")
    assert attempt(lab.a.address(version)) is False
    assert attempt(lab_of.service_address(version)) is not wildcard
    lab.a.tables.unhold_listeners([Endpoint(address, port)])
    assert attempt(lab.a.address(version)) is True
    listener.close()
    site.teardown()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.NAT])
def test_injected_segment_passes_the_hold(lab: Lab, mode: Mode, version: int) -> None:
    """A segment that the daemon makes reaches a held copy, even at an address that is not this host's."""
    harden(lab.b)
    site = Site(lab, mode)
    with connection(site, version, talk=False) as c:
        c.move(lab.b)
        c.sock.setblocking(False)
        lab.b.tables.hold([c.tuple], 30)
        time.sleep(0.05)
        with lab.b.inside():
            image = lab_of.dump(c.sock)
            c.sock.setsockopt(socket.IPPROTO_TCP, 19, 0)
        receive, send = image.sequences
        turned = FourTuple(c.tuple.remote, c.tuple.local)
        mark = lab.b.tables.settings.inject_mark
        # whether TCP likes the segment is not the subject: the socket counts it
        with lab.b.inside():

            def received() -> int:
                text = lab_of.run("ip", "netns", "exec", lab.b.namespace, "ss", "-tinH")
                return int(text.split("segs_in:")[1].split()[0]) if "segs_in:" in text else 0

            before = received()
            with contextlib.suppress(PermissionError):  # what a firewall's drop looks like to a sender
                segment(lab.b, turned, b"x", sequence=receive, ack=send)
            assert received() == before  # the hold is there
            segment(lab.b, turned, b"x", mark, sequence=receive, ack=send)
            until(lambda: received() > before, "the segment reaches the socket", 3)
    site.teardown()


def test_bulk_install(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 connections in one transaction; prints what it takes (not a timed test)."""
    peer, here, there = (ip_address(h.address(4)) for h in (lab.peer, lab.a, lab.b))
    out = [
        Outbound(FourTuple(Endpoint(here, 80), Endpoint(peer, port)), Endpoint(there, port))
        for port in range(1024, 11024)
    ]
    lines = []
    for mode in (Mode.FORWARD, Mode.NAT):
        site = Site(lab, mode)
        redirect = site.on(lab.a)
        start = time.perf_counter()
        redirect.send_away(out)
        took = time.perf_counter() - start
        start = time.perf_counter()
        assert len(redirect.outbound()) == len(out)
        back = time.perf_counter() - start
        single = []
        for each in out[:200]:
            start = time.perf_counter()
            redirect.reroute([each])
            single.append(time.perf_counter() - start)
        lines.append(
            f"{mode}: 10,000 in {took * 1e3:.0f} ms ({took * 100:.1f} us each), "
            f"read back {back * 1e3:.0f} ms, one alone among them {sorted(single)[100] * 1e6:.0f} us"
        )
        start = time.perf_counter()
        redirect.take_back([each.tuple for each in out])
        lines.append(f"{mode}: 10,000 removed in {(time.perf_counter() - start) * 1e3:.0f} ms")
        assert redirect.outbound() == []
        site.teardown()
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_two_daemons_on_one_host(lab: Lab) -> None:
    """Other names, marks and route tables: neither disturbs the other."""
    other = Settings(table="second", mark=0x53500000, route_table=7781, rule_priority=78)
    site = Site(lab, Mode.FORWARD)
    site.on(lab.a)
    with lab.a.inside():
        second = Forward(Tables(other))
        second.setup()
        second.teardown()
        assert "table inet sockmi" in lab.a.nft("list", "tables")
        assert "second" not in lab.a.nft("list", "tables")
    site.teardown()


def test_unknown_device_is_named(lab: Lab) -> None:
    with lab.a.inside(), pytest.raises(OSError, match="no device nosuch0; see `ip link`"):
        Tables(Settings(devices=("eth0", "nosuch0"))).setup()
    assert_clean(lab.a)
