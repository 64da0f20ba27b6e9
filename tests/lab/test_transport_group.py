# SPDX-License-Identifier: MIT
"""Groups between real processes in network namespaces: multicast, lists, attacks, partitions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sockmi.transport.keyring import generate
from tests.lab import transport_node as lab

MULTICAST = {4: "239.77.83.1", 6: "ff05::7783"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture(name="net")
def _net() -> Iterator[lab.Segment]:
    with lab.segment("a", "b", "c", "x") as net:
        yield net


class Nodes:
    """Starts nodes and ends them."""

    def __init__(self, net: lab.Segment, directory: Path, stack: ExitStack) -> None:
        self.net, self.directory, self.stack = net, directory, stack
        self.key_file = directory / "group.key"
        self.keyring = generate(self.key_file)

    def start(
        self, name: str, *, host: str | None = None, key_file: Path | None = None, **group: object
    ) -> lab.Node:
        settings = {"multicast": MULTICAST[4], "interface": "eth0", **group}
        if settings.get("members"):
            settings["multicast"] = None
        node = lab.Node(
            self.net[host or name], name, self.directory / name, key_file or self.key_file, **settings
        )
        self.stack.enter_context(node)
        node.wait("started")
        return node


@pytest.fixture(name="nodes")
def _nodes(net: lab.Segment, tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(net, tmp_path, stack)


def everybody_hears_everybody(*nodes: lab.Node) -> None:
    """Members know each other; multicast reaches all, unicast one, streams open."""
    for one in nodes:
        one.knows(*(other for other in nodes if other is not one))
    for one in nodes:
        one.do("send", text=f"to all from {one.name}")
        for other in nodes:
            if other is not one:
                other.wait("datagram", host=one.id, text=f"to all from {one.name}")
    first, second = nodes[:2]
    first.do("send", text="to one", to=second.id)
    second.wait("datagram", host=first.id, text="to one")
    first.do("open", to=second.id)
    first.wait("open", host=second.id)
    first.do("stream", to=second.id, text="by stream")
    second.wait("stream", host=first.id, text="by stream")


@pytest.mark.parametrize("version", [4, 6])
def test_multicast(net: lab.Segment, nodes: Nodes, version: int) -> None:
    started = [nodes.start(name, multicast=MULTICAST[version]) for name in "abc"]
    everybody_hears_everybody(*started)
    status = started[0].status()
    assert status["names"] == ["b", "c"]
    assert all(net.address("b", version) in text for text in status["endpoints"][started[1].id])
    joined = lab.run("ip", "-n", net["a"], "maddress", "show", "dev", "eth0")
    assert MULTICAST[version] in joined
    started[0].do("close")
    started[0].wait("closed")
    started[1].wait("left", host=started[0].id, reason="it said farewell")
    assert MULTICAST[version] not in lab.run("ip", "-n", net["a"], "maddress", "show", "dev", "eth0")


def test_link_local_group(nodes: Nodes) -> None:
    everybody_hears_everybody(*(nodes.start(name, multicast="ff02::7783") for name in "ab"))


@pytest.mark.parametrize("version", [4, 6])
def test_list(net: lab.Segment, nodes: Nodes, version: int) -> None:
    addresses = [net.address(name, version) for name in "abc"]
    members = [f"[{one}]:7780" if version == 6 else f"{one}:7780" for one in addresses]
    everybody_hears_everybody(*(nodes.start(name, members=members, interface=None) for name in "abc"))


def test_a_list_that_only_one_side_has(net: lab.Segment, nodes: Nodes) -> None:
    """A host that the others do not list joins by announcing itself."""
    known = [f"{net.address('a')}:7780"]
    everybody_hears_everybody(nodes.start("a", members=known), nodes.start("b", members=known))


def test_groups_do_not_meet(nodes: Nodes) -> None:
    """Two groups by address, two by port, all with one key, on the same hosts."""
    settings: list[dict[str, Any]] = [
        {"multicast": "239.77.83.1"},
        {"multicast": "239.77.83.2", "unicast_port": 7790},
        {"multicast": "239.77.83.1", "port": 7781},
    ]
    pairs = [
        [nodes.start(f"{name}{number}", host=name, **group) for name in "ab"]
        for number, group in enumerate(settings)
    ]
    for first, second in pairs:
        first.knows(second)
        second.knows(first)
        first.do("send", text="ours")
        assert second.wait("datagram")["host"] == first.id


def test_several_daemons_on_one_host(nodes: Nodes) -> None:
    everybody_hears_everybody(*(nodes.start(f"a{number}", host="a", unicast_port=0) for number in range(3)))


def test_port_taken_and_no_interface_are_clear_errors(net: lab.Segment, nodes: Nodes) -> None:
    nodes.start("a")
    with lab.Node(
        net["a"],
        "second",
        nodes.directory / "second",
        nodes.key_file,
        multicast=MULTICAST[4],
        interface="eth0",
    ) as second:
        text = second.wait("error")["text"]
        assert "239.77.83.1:7780 on eth0: Address already in use" in text and "is the port free" in text
    with lab.Node(
        net["b"], "none", nodes.directory / "none", nodes.key_file, multicast=MULTICAST[4], interface="eth9"
    ) as none:
        assert "is the interface up" in none.wait("error")["text"]


def test_without_the_key(nodes: Nodes, tmp_path: Path) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    generate(tmp_path / "wrong.key")
    c = nodes.start("c", key_file=tmp_path / "wrong.key")
    a.knows(b)
    a.until(lambda status: status["seal"].get("unknown_key", 0) >= 2)
    c.until(lambda status: status["seal"].get("unknown_key", 0) >= 2)
    assert not c.status()["members"] and a.status()["members"] == [b.id]


def test_rotating_the_key(nodes: Nodes) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    a.knows(b)
    b.knows(a)
    old, new = nodes.keyring.keys[0].hex(), os.urandom(32).hex()
    for step, content in enumerate((f"{old}\n{new}\n", f"{new}\n{old}\n", f"{new}\n")):
        nodes.key_file.write_text(content)
        for one, other in ((a, b), (b, a)):
            one.do("rekey")
            one.wait("rekeyed")
            one.do("send", text=f"step {step}")
            other.wait("datagram", text=f"step {step}")
            other.do("send", text=f"back {step}")
            one.wait("datagram", text=f"back {step}")
    assert not [event for event in a.events + b.events if event["event"] == "left"]


def test_restart_and_crash(nodes: Nodes) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    a.knows(b)
    a.do("open", to=b.id)
    a.wait("open", host=b.id)
    host = b.id
    b.kill()
    a.wait("lost", host=host)
    b.start()
    assert b.id == host
    a.wait("trusted", host=host)
    b.knows(a)
    a.do("open", to=host)
    a.wait("open", host=host)
    b.kill()
    assert a.wait("left", host=host)["reason"].startswith("not heard for")
    assert a.status()["members"] == []


def test_a_member_with_a_stream_does_not_expire(net: lab.Segment, nodes: Nodes) -> None:
    """UDP is cut, TCP is not: the member stays, and so does its stream."""
    a, b = nodes.start("a"), nodes.start("b")
    everybody_hears_everybody(a, b)
    lab.run(
        "ip",
        "netns",
        "exec",
        net["a"],
        "nft",
        "add table inet t; add chain inet t i { type filter hook input priority 0; }",
    )
    lab.run("ip", "netns", "exec", net["a"], "nft", "add rule inet t i udp dport 7780 drop")
    heard = a.status()["seal"]["hellos"]
    time.sleep(2.5)  # more than the expiry of 1.5 s
    assert a.status()["members"] == [b.id] and a.status()["seal"]["hellos"] <= heard + 1
    b.kill()
    a.wait("left", host=b.id)


def test_partition_and_recovery(net: lab.Segment, nodes: Nodes) -> None:
    a, b, c = (nodes.start(name) for name in "abc")
    everybody_hears_everybody(a, b, c)
    net.cable("a", "down")
    started = time.monotonic()
    a.wait("lost", host=b.id)
    noticed_s = time.monotonic() - started
    a.until(lambda status: not status["members"])
    b.knows(c)
    net.cable("a", "up")
    everybody_hears_everybody(a, b, c)
    assert noticed_s < 6


def test_interface_that_is_removed_and_made_again(net: lab.Segment, nodes: Nodes) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    everybody_hears_everybody(a, b)
    net.unplug("a")
    b.wait("left", host=a.id)
    net.plug("a")
    everybody_hears_everybody(a, b)


class TestAttack:
    def test_recordings_of_earlier_sessions(self, net: lab.Segment, nodes: Nodes) -> None:
        """All that the group has ever said, repeated to it before and after both sides have restarted."""
        attacker = lab.Attacker(net["x"], MULTICAST[4], 7780)
        a, b = nodes.start("a"), nodes.start("b")
        a.knows(b)
        b.knows(a)
        for number in range(5):
            a.do("send", text=f"move {number}")
            b.wait("datagram", text=f"move {number}")
        recording = attacker.record(10)
        for _turn in range(3):
            for datagram in recording:
                attacker.say(datagram)
                attacker.say(datagram, (net.address("b"), 7780))
        b.until(lambda status: status["seal"].get("replayed", 0) >= 10)
        b.kill()
        b.start()
        b.knows(a)
        a.kill()
        for datagram in recording:
            attacker.say(datagram)
        a.start()
        a.knows(b)
        before = b.status()["seal"]
        for _turn in range(3):
            for datagram in recording:
                attacker.say(datagram)
        b.until(lambda status: sum(status["seal"].values()) >= sum(before.values()) + 10)
        moves = [event for event in b.events if event["event"] == "datagram"]
        assert [event["text"] for event in moves] == [f"move {number}" for number in range(5)]
        answers = attacker.answers()  # challenges, which it cannot meet
        assert len(answers) <= 64 and all(len(answer) < 120 for answer in answers)
        for answer in answers:
            attacker.say(answer, (net.address("a"), 7780))
            attacker.say(answer, (net.address("b"), 7780))
        everybody_hears_everybody(a, b)
        attacker.close()

    def test_flood_of_garbage_and_forgeries(self, net: lab.Segment, nodes: Nodes) -> None:
        """20,000 datagrams of all kinds: the members' own get through, and nothing else does."""
        attacker = lab.Attacker(net["x"], MULTICAST[4], 7780)
        a, b = nodes.start("a"), nodes.start("b")
        a.knows(b)
        b.knows(a)
        (hello,) = attacker.record(1)
        memory = Path(f"/proc/{b.process.pid}/statm").read_text
        before_pages = int(memory().split()[1])
        started = time.monotonic()
        for number in range(20000):
            kind = number % 5
            forged = (
                os.urandom(number % 1500),
                hello[:9] + os.urandom(24) + hello[33:],
                hello[:-1] + bytes([hello[-1] ^ 1]),
                hello[: number % len(hello)],
                hello + bytes(1200),
            )[kind]
            attacker.say(forged, None if number % 2 else (net.address("b"), 7780))
        flood_s = time.monotonic() - started
        a.do("send", text="through")
        deadline = time.monotonic() + 5
        while True:  # datagrams may be lost in a flood; the protocol repeats them too
            a.do("send", text="through")
            try:
                b.wait("datagram", 0.3, text="through")
                break
            except AssertionError:
                assert time.monotonic() < deadline, "nothing gets through"
        status = b.status()
        assert status["members"] == [a.id] and status["seal"]["sessions"] == 1
        assert status["seal"]["size"] > 100 and status["seal"]["forged"] > 10
        assert int(memory().split()[1]) - before_pages < 1000  # 4 MB
        assert not attacker.answers()
        print(f"\n  flood: 20,000 datagrams in {flood_s:.2f} s")
        attacker.close()


def test_speed_is_printed(nodes: Nodes, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        nodes.start("a", announce_interval_s=5.0, expiry_s=60.0),
        nodes.start("b", announce_interval_s=5.0, expiry_s=60.0),
    )
    a.knows(b)
    b.knows(a)
    a.do("open", to=b.id)
    a.wait("open", host=b.id)
    lines = []
    for channel in ("datagram", "stream"):
        for size in (64, 1000):
            a.do("round_trips", to=b.id, count=1000, size=size, channel=channel)
            event = a.wait("round_trips", 30)
            lines.append(
                f"{channel} of {size} bytes there and back: median {event['median_us']:.0f} us, "
                f"p99 {event['p99_us']:.0f} us"
            )
    for chunk_kib in (16, 1024, 32768):
        a.do("throughput", to=b.id, mib=128, chunk_kib=chunk_kib)
        try:
            seconds = a.wait("throughput", 60)["seconds"]
        except AssertionError as error:
            if "silent for" in str(error):
                pytest.skip("the machine stalled for more than a second: no speed to print")
            raise
        lines.append(f"stream, messages of {chunk_kib} KiB: {128 * 1.048576 / seconds:.0f} MB/s")
    with capsys.disabled():
        print("\n  " + "\n  ".join(lines))
