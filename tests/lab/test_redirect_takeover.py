# SPDX-License-Identifier: MIT
"""What only takeover has: who else uses the address, announcements; and iptables' refusals."""

from __future__ import annotations

import errno
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint
from sockmi.redirect.announce import BURST, frame
from sockmi.redirect.base import Inbound, Outbound
from sockmi.redirect.iptables import Iptables, unusable
from sockmi.redirect.takeover import Takeover
from tests.lab.redirect_lab import Host, Lab, connect, ends, service_address, until

VERSIONS = [4, 6]


class Clock:
    """A scheduler that is told when."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, delay_s: float, call: Callable[[], None]) -> Clock:
        self.calls.append((delay_s, call))
        return self

    def cancel(self) -> None:
        self.calls.clear()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        for version, width in ((4, 24), (6, 64)):
            made.a.ip("addr", "add", f"{service_address(version)}/{width}", "dev", "eth0")
        until(lambda: "tentative" not in made.a.ip("addr"), "addresses are usable")
        yield made


def frames(host: Host) -> socket.socket:
    with host.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sock.settimeout(0.3)
    return sock


def count(sock: socket.socket, wanted: bytes) -> int:
    found = 0
    try:
        while True:
            found += sock.recv(200) == wanted
    except TimeoutError:
        return found


@pytest.mark.parametrize("version", VERSIONS)
def test_others_on_the_address_are_named(lab: Lab, version: int) -> None:
    address = service_address(version)
    with lab.a.inside():
        takeover = Takeover(lab.a.tables, Clock())
        takeover.setup()
        listener = socket.create_server(
            (address, 0), family=socket.AF_INET if version == 4 else socket.AF_INET6
        )
    one, two = connect(lab.peer, lab.a, version, address), connect(lab.peer, lab.a, version, address)
    mine, other = ends(one[1]), ends(two[1])
    with lab.a.inside():
        at = listener.getsockname()[1]
        reasons = takeover.conflicts([mine])
        assert any(f"connection {other} is not in the batch" in each for each in reasons)
        assert any(f":{at} is not in the batch; move or close it too" in each for each in reasons)
        assert len(reasons) == 2
        to = ip_address(lab.b.address(version))
        out = [Outbound(mine, Endpoint(to, mine.local.port))]
        with pytest.raises(OSError, match=r"takeover: connection .* is not in the batch"):
            takeover.send_away(out)
        assert takeover.outbound() == [] and address in lab.a.ip("addr")
        assert takeover.conflicts([mine, other], [Endpoint(ip_address(address), at)]) == []
        own = ends(connect(lab.peer, lab.a, version)[1])
        assert takeover.reachable(to) is None
        assert (
            "is not an address of this host"
            in takeover.conflicts([type(mine)(Endpoint(to, 1), mine.remote)])[0]
        )
        assert own.local.address != mine.local.address
        takeover.teardown()
    for sock in (*one, *two, listener):
        sock.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_primary_and_only_addresses_stay(lab: Lab, version: int) -> None:
    with lab.a.inside():
        takeover = Takeover(lab.a.tables, Clock())
        takeover.setup()
        client, served = connect(lab.peer, lab.a, version)
        t = ends(served)
        reasons = takeover.conflicts([t])
        if version == 4:
            assert len(reasons) == 1 and "promote_secondaries=1" in reasons[0]
        lab.a.ip("addr", "del", f"{service_address(version)}/{24 if version == 4 else 64}", "dev", "eth0")
        reasons = takeover.conflicts([t])
        assert len(reasons) == 1 and "is the only address of eth0" in reasons[0]
        takeover.teardown()
    client.close()
    served.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_announced_at_once_and_again(lab: Lab, version: int) -> None:
    address = ip_address(service_address(version))
    clock = Clock()
    with lab.b.inside():
        takeover = Takeover(lab.b.tables, clock)
        takeover.setup()
        mac = lab.b.tables.routes.hardware_address("eth0")
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)
    heard = frames(lab.peer)
    with lab.b.inside():
        takeover.admit([Inbound(t, t.local)])
    assert count(heard, frame(address, mac)) == BURST
    ((delay_s, call),) = clock.calls
    assert delay_s == 5.0
    call()
    assert count(heard, frame(address, mac)) == BURST
    call()
    assert count(heard, frame(address, mac)) == 0
    neighbour = lab.peer.ip("neigh", "show", str(address))
    assert mac.hex(":") in neighbour
    assert str(address) in lab.b.ip("addr")
    with lab.b.inside():
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" not in lab.b.ip("addr", "show", "dev", "eth0")
        takeover.teardown()
    for sock in (client, served, heard):
        sock.close()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["back", "undone"])
def test_an_address_returns_as_it_was_after_a_restart(lab: Lab, version: int, how: str) -> None:
    """With its prefix length, and so with the route of its network; on the device where it was."""
    address = ip_address(service_address(version))
    width = 24 if version == 4 else 64
    before = lab.a.ip("-o", "addr", "show", "to", str(address))
    assert f"{address}/{width}" in before and "eth0" in before
    routes = lab.a.ip(f"-{version}", "route", "show")
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)
    with lab.a.inside():
        takeover = Takeover(lab.a.tables, Clock())
        takeover.setup()
        takeover.send_away([Outbound(t, Endpoint(ip_address(lab.b.address(version)), t.local.port))])
        assert f"{address}/" not in lab.a.ip("addr")
        again = Takeover(lab.a.restart(), Clock())
        again.setup()
        # More of the same address may follow, and it does not matter that it has gone.
        assert again.obstacle([t]) is None
        again.send_away([Outbound(t, Endpoint(ip_address(lab.b.address(version)), t.local.port))])
        if how == "back":
            again.admit([Inbound(t, t.local)])
        else:
            again.take_back([t])
        now = lab.a.ip("-o", "addr", "show", "to", str(address))
        assert f"{address}/{width}" in now and "eth0" in now
        assert lab.a.ip(f"-{version}", "route", "show") == routes
        # It is here again: what is known of its absence is gone, and it does not go with its connection.
        assert again.conflicts([t], [t.local]) == []
        again.evict([Inbound(t, t.local)])
        assert f"{address}/{width}" in lab.a.ip("addr")
        again.teardown()
    client.close()
    served.close()


def serve(host: Host, version: int, address: str) -> socket.socket:
    """A listener on an address of a host."""
    with host.inside():
        return socket.create_server((address, 0), family=socket.AF_INET if version == 4 else socket.AF_INET6)


def reach(peer: Host, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """(the peer's end, the server's end) of a new connection to it."""
    with peer.inside():
        client = socket.socket(listener.family)
    client.settimeout(10)
    client.connect(listener.getsockname()[:2])
    return client, listener.accept()[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_alias_that_is_used_stays(lab: Lab, version: int) -> None:
    """By a listener that has followed, by connections that it has got: until an end finds it unused."""
    address = ip_address(service_address(version))
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)
    other = replace(t, remote=replace(t.remote, port=t.remote.port ^ 1))
    with lab.a.inside():
        giving = Takeover(lab.a.tables, Clock())
        giving.setup()
        giving.send_away([Outbound(t, Endpoint(ip_address(lab.b.address(version)), t.local.port))])
    with lab.b.inside():
        takeover = Takeover(lab.b.tables, Clock())
        takeover.setup()
        takeover.admit([Inbound(t, t.local)])
        listener = serve(lab.b, version, str(address))
        native = reach(lab.peer, listener)
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" in lab.b.ip("addr"), "the listener uses it"
        listener.close()
        takeover.admit([Inbound(t, t.local)])
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" in lab.b.ip("addr"), "a connection uses it"
        native[0].sendall(b"x")
        assert native[1].recv(1) == b"x"
        native[0].close()
        native[1].close()
        again = Takeover(lab.b.restart(), Clock())
        again.setup()
        again.admit([Inbound(other, other.local)])
        again.evict([Inbound(other, other.local)])
        assert f"{address}/" not in lab.b.ip("addr")
        again.teardown()
    for sock in (client, served):
        sock.close()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["there", "there and back", "brought by others"])
def test_an_address_of_this_host_stays(lab: Lab, version: int, how: str) -> None:
    """Though it has the prefix length of an alias, as keepalived's have."""
    address, own = ip_address(service_address(version)), ip_address(lab.b.address(version))
    width = address.max_prefixlen
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)
    with lab.b.inside():
        takeover = Takeover(lab.b.tables, Clock())
        takeover.setup()
        if how == "brought by others":  # it has been an alias before
            takeover.admit([Inbound(t, t.local)])
            takeover.send_away([Outbound(t, Endpoint(own, t.local.port))])
        lab.b.ip("addr", "add", f"{address}/{width}", "dev", "eth0", *(["nodad"] if version == 6 else []))
        if how == "there and back":
            takeover.send_away([Outbound(t, Endpoint(own, t.local.port))])
            assert f"{address}/" not in lab.b.ip("addr")
        takeover.admit([Inbound(t, t.local)])
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" in lab.b.ip("addr")
        takeover.teardown()
    for sock in (client, served):
        sock.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_an_alias_that_comes_again_is_one(lab: Lab, version: int) -> None:
    address, own = ip_address(service_address(version)), ip_address(lab.b.address(version))
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)
    with lab.b.inside():
        takeover = Takeover(lab.b.tables, Clock())
        takeover.setup()
        takeover.admit([Inbound(t, t.local)])
        takeover.send_away([Outbound(t, Endpoint(own, t.local.port))])
        assert f"{address}/" not in lab.b.ip("addr")
        takeover.admit([Inbound(t, t.local)])
        assert f"{address}/" in lab.b.ip("addr")
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" not in lab.b.ip("addr")
        takeover.teardown()
    for sock in (client, served):
        sock.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_an_alias_that_could_not_be_removed_is_still_one(
    lab: Lab, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, own = ip_address(service_address(version)), ip_address(lab.b.address(version))
    client, served = connect(lab.peer, lab.a, version, str(address))
    t = ends(served)

    def fails(_address: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with lab.b.inside():
        takeover = Takeover(lab.b.tables, Clock())
        takeover.setup()
        takeover.admit([Inbound(t, t.local)])
        with monkeypatch.context() as broken:
            broken.setattr(lab.b.tables.routes, "remove_address", fails)
            with pytest.raises(OSError, match="no memory"):
                takeover.send_away([Outbound(t, Endpoint(own, t.local.port))])
        takeover.take_back([t])
        takeover.admit([Inbound(t, t.local)])
        takeover.evict([Inbound(t, t.local)])
        assert f"{address}/" not in lab.b.ip("addr")
        takeover.teardown()
    for sock in (client, served):
        sock.close()


def test_iptables_refuses_nf_tables(lab: Lab, tmp_path: Path) -> None:
    fake = tmp_path / "iptables"
    fake.write_text("#!/bin/sh\necho 'iptables v1.8.9 (nf_tables)'\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    assert "does not see legacy rules; use redirect mode nat" in str(unusable(str(fake)))
    assert "is not installed" in str(unusable(str(tmp_path / "none")))
    with lab.a.inside(), pytest.raises(OSError, match=r"redirect mode iptables: .*\(nf_tables\)"):
        Iptables(lab.a.tables, str(fake)).setup()
    assert lab.a.nft("list", "tables") == ""
