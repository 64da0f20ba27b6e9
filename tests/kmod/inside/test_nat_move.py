# SPDX-License-Identifier: MIT
"""A live stream moves between hosts by the NAT helper alone: every byte, no RST, no FIN, beside conntrack."""

from __future__ import annotations

import re
import socket
import struct
import subprocess

import pytest

from sockmi.addresses import FourTuple
from tests.kmod.nat_client import Flag, Flow, Seen
from tests.kmod.nat_lab import Moving, live, offloads, quiet, triangle
from tests.lab.redirect_lab import Host, run, until

IMPORTER_PORT = 40001
SLOW_6 = pytest.param(6, marks=pytest.mark.slow)  # a stateful firewall in an emulated guest takes its time

STATEFUL = """
table inet guard {
  chain input {
    type filter hook input priority filter; policy drop;
    iif lo accept
    meta l4proto ipv6-icmp accept
    meta l4proto icmp accept
    ct state invalid counter drop comment "invalid"
    ct state established,related counter accept comment "known"
    ct state untracked counter accept comment "untracked"
    counter drop comment "other"
  }
}
"""
FORWARDS_UNTRACKED = """
table inet guard {
  chain forward {
    type filter hook forward priority filter; policy drop;
    meta l4proto ipv6-icmp accept
    ct state untracked counter accept comment "untracked"
    counter drop comment "other"
  }
  chain output {
    type filter hook output priority filter;
    meta l4proto tcp ct state invalid counter comment "invalid"
  }
}
"""


def counter(host: Host, name: str) -> int:
    """Packets that the rule with this comment has seen, in the host's firewall."""
    found = re.findall(rf'packets (\d+) .*comment "{name}"', host.nft("list", "table", "inet", "guard"))
    assert len(found) == 1, name
    return int(found[0])


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "software"])
@pytest.mark.parametrize("version", [4, 6])
def test_stream_moves(version: int, offload: bool) -> None:
    with triangle(version) as of:
        lab = of.lab
        for host in lab.hosts.values():
            offloads(host, offload)
        with live(of, lab.peer, lab.a, largest=20000) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress(200_000)
            quiet(moving)
            there = of.nat(lab.a).one(moving.ends)
            assert there.flags == Flag.REDIRECT | Flag.MUTE and there.to == moving.here
            assert there.packets > 10 and there.bytes > 200_000
            here = of.nat(lab.b).one(FourTuple(moving.here, moving.ends.remote))
            assert here.flags == Flag.TRANSLATE and here.to == moving.ends.local
            assert here.packets > 10 and here.bytes > 200_000 and here.muted == 0


@pytest.mark.parametrize("version", [4, 6])
def test_on_to_a_third_host_and_home(version: int) -> None:
    with triangle(version) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress()
            moving.move(lab.b, lab.c, IMPORTER_PORT + 1)
            moving.progress()
            chain = of.nat(lab.b).one(FourTuple(of.nat(lab.a).one(moving.ends).to, moving.ends.remote))
            assert chain.flags == Flag.REDIRECT | Flag.MUTE and chain.packets > 0
            moving.move(lab.c, lab.a, moving.ends.local.port)
            moving.progress()
            assert of.nat(lab.a).list() == []
            quiet(moving)


@pytest.mark.parametrize("version", [4, SLOW_6])
def test_beside_conntrack(version: int) -> None:
    with triangle(version) as of:
        lab = of.lab
        lab.b.nft("-f", "-", text=STATEFUL)
        lab.a.nft("-f", "-", text=FORWARDS_UNTRACKED)
        with live(of, lab.peer, lab.a) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress()
            quiet(moving)
            assert counter(lab.b, "known") > 0
            assert (counter(lab.b, "invalid"), counter(lab.b, "untracked"), counter(lab.b, "other")) == (
                0,
                0,
                0,
            )
            assert counter(lab.a, "untracked") > 0
            assert (counter(lab.a, "invalid"), counter(lab.a, "other")) == (0, 0)


@pytest.mark.parametrize("way", ["untracked", "injected"])
@pytest.mark.parametrize("version", [4, SLOW_6])
def test_beside_strict_conntrack(version: int, way: str) -> None:
    with triangle(version) as of:
        lab = of.lab
        lab.b.nft("-f", "-", text=STATEFUL)
        lab.a.nft("-f", "-", text=FORWARDS_UNTRACKED)
        for host in (lab.a, lab.b):
            host.sysctl("net/netfilter/nf_conntrack_tcp_loose", 0)
        with live(of, lab.peer, lab.a) as moving:
            moving.progress()
            if way == "injected":
                remote = moving.ends.remote
                entry = (
                    f"-I -p tcp --state ESTABLISHED -u ASSURED,SEEN_REPLY -t 600 -s {lab.b.address(version)} "
                    f"-d {remote.address} --sport {IMPORTER_PORT} --dport {remote.port}"
                )
                run("ip", "netns", "exec", lab.b.namespace, "conntrack", *entry.split())
            moving.move(lab.a, lab.b, IMPORTER_PORT, Flag.UNTRACKED if way == "untracked" else Flag(0))
            moving.progress()
            quiet(moving)
            assert (counter(lab.b, "invalid"), counter(lab.b, "other")) == (0, 0)
            assert (counter(lab.b, "untracked") > 0) == (way == "untracked")
            assert (counter(lab.b, "known") > 0) == (way == "injected")
            assert (counter(lab.a, "invalid"), counter(lab.a, "other")) == (0, 0)


def forget(host: Host, moving: Moving) -> None:
    """What a daemon does before a connection comes home: the host's old conntrack entry is out of date."""
    remote, local = moving.ends.remote, moving.ends.local
    deleted = 0
    for source, dest in ((remote, local), (local, remote)):  # whichever conntrack saw first
        words = f"-D -p tcp -s {source.address} -d {dest.address} --sport {source.port} --dport {dest.port}"
        command = ["ip", "netns", "exec", host.namespace, "conntrack", *words.split()]
        deleted += not subprocess.run(command, capture_output=True, check=False).returncode
    assert deleted == 1


@pytest.mark.parametrize("version", [4, SLOW_6])
def test_home_to_a_host_with_a_stateful_firewall(version: int) -> None:
    with triangle(version) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a) as moving:
            lab.a.nft("-f", "-", text=STATEFUL)
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress(50_000)
            forget(lab.a, moving)
            moving.move(lab.b, lab.a, moving.ends.local.port)
            before = counter(lab.a, "known")
            moving.progress()
            quiet(moving)
            assert counter(lab.a, "known") > before
            assert (counter(lab.a, "invalid"), counter(lab.a, "untracked")) == (0, 0)


def test_strict_conntrack_alone_would_stop_it() -> None:
    """The control of the test above: neither untracked nor known, the importer's firewall drops the peer."""
    with triangle(4) as of:
        lab = of.lab
        lab.b.nft("-f", "-", text=STATEFUL)
        lab.b.sysctl("net/netfilter/nf_conntrack_tcp_loose", 0)
        with live(of, lab.peer, lab.a) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            until(lambda: counter(lab.b, "invalid") > 0, "a packet called invalid")


@pytest.mark.parametrize("version", [4, 6])
def test_close_by_either_end_goes_through(version: int) -> None:
    with triangle(version) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a) as moving:
            moving.progress()
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress()
            server, peer = moving.server.pause(), moving.peer.pause()
            server.shutdown(1)
            peer.setblocking(True)
            peer.settimeout(10)
            while peer.recv(65536):
                pass
            peer.close()
            nat_a, nat_b = of.nat(lab.a), of.nat(lab.b)
            here = Flow(moving.here, moving.ends.remote)
            until(lambda: Seen.FIN_IN in nat_a.one(moving.ends).seen, "the peer's FIN on its way")
            assert Seen.FIN_OUT in nat_b.one(here).seen
            until(lambda: moving.capture.fins, "the FIN in the capture")
            assert (moving.capture.resets, moving.capture.fins) == (0, 1)


def begin_anew(moving: Moving) -> None:
    """A SYN of the connection's own peer and port, as of a host that was started again."""
    remote, local = moving.ends.remote, moving.ends.local
    family = "AF_INET" if local.address.version == 4 else "AF_INET6"
    script = (
        "import socket,struct;"
        f"s=socket.socket(socket.{family},socket.SOCK_RAW,6);"
        f"s.sendto(struct.pack('>HHIIBBHHH',{remote.port},{local.port},1,0,80,2,100,0,0),"
        f"('{local.address}',0))"
    )
    of = moving.of.lab.peer.namespace
    subprocess.run(["ip", "netns", "exec", of, "python3", "-c", script], check=True)


def test_peer_that_begins_anew_is_noted() -> None:
    with triangle(4) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a) as moving:
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress()
            assert Seen.SYN_IN not in of.nat(lab.a).one(moving.ends).seen
            begin_anew(moving)
            until(lambda: Seen.SYN_IN in of.nat(lab.a).one(moving.ends).seen, "the SYN")
            moving.progress()


@pytest.mark.parametrize(
    ("version", "noted"),
    [(4, Seen.SYN_IN), (4, Seen.FIN_IN), (4, Seen.RST_IN), (4, Seen.RST_OUT), (6, Seen.RST_IN)],
)
def test_a_flow_that_only_translates_notes_how_it_ends(version: int, noted: Seen) -> None:
    """The last importer has no other flow that would have packets looked at on their way in."""
    with triangle(version) as of:
        lab = of.lab
        with live(of, lab.peer, lab.a) as moving:
            moving.move(lab.a, lab.b, IMPORTER_PORT)
            moving.progress()
            server, peer = moving.server.pause(), moving.peer.pause()
            [flow] = of.nat(lab.b).list()
            assert (flow.flags, flow.seen) == (Flag.TRANSLATE, Seen(0))
            if noted == Seen.SYN_IN:
                begin_anew(moving)
            elif noted == Seen.FIN_IN:
                peer.shutdown(socket.SHUT_WR)
            else:
                end = server if noted == Seen.RST_OUT else peer
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
            until(lambda: of.nat(lab.b).one(flow).seen, "anything noted at the importer")
            assert of.nat(lab.b).one(flow).seen == noted
