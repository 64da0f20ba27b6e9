# SPDX-License-Identifier: MIT
"""Network devices that come, go and come again while the daemons run, and connections that move by them."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.daemons import Daemons
from lab.host import Host
from lab.labs import Lab
from lab.plan import SWITCH, namespace_of
from sockmi.client import Export, ImportRequest, MigrationRecord, export_sockets, import_socket
from sockmi.device_news import DeviceNews
from sockmi.refusal import Code
from tests.lab.redirect_lab import run
from tests.lab.scenario import ask, captured_connection, daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT = 5091
DEVICE = "eth9"
BRIDGE = "br9"
NUMBERS = {"peer": 1, "a": 2, "b": 3}
_serial = itertools.count()


def ip(lab: Lab, name: str, *words: str) -> None:
    run("ip", "-n", namespace_of(lab.name, name), *words)


def come(lab: Lab, name: str, device: str = DEVICE) -> None:
    """The host gets a cable to the second segment, and an address there: its card is the same each time."""
    end = f"p{next(_serial)}"
    ip(lab, SWITCH, "link", "add", end, "master", BRIDGE, "type", "veth", "peer", device,
       "address", f"02:00:00:00:99:{NUMBERS[name]:02x}", "netns", namespace_of(lab.name, name))  # fmt: skip
    ip(lab, SWITCH, "link", "set", end, "up")
    ip(lab, name, "address", "add", address(name) + "/24", "dev", device)
    ip(lab, name, "link", "set", device, "up")


def go(lab: Lab, name: str, device: str = DEVICE) -> None:
    ip(lab, name, "link", "delete", device)


def address(name: str) -> str:
    return f"10.99.0.{NUMBERS[name]}"


@pytest.fixture
def segment(lab: Lab) -> Iterator[None]:
    """A second segment, to which nobody has a cable yet."""
    ip(lab, SWITCH, "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
    ip(lab, SWITCH, "link", "set", BRIDGE, "up")
    yield
    for name in NUMBERS:
        with contextlib.suppress(RuntimeError):
            go(lab, name)
    ip(lab, SWITCH, "link", "delete", BRIDGE)


@pytest.fixture
def running(lab: Lab, segment: None) -> Iterator[Daemons]:
    """Daemons of the default for ``redirect.devices``: all that fit. The second segment comes after them."""
    with daemons(lab, "ab", redirect={"modes": ["forward"]}) as made:
        for name in NUMBERS:
            come(lab, name)
        yield made


def connected(
    lab: Lab, directory: Path
) -> contextlib.AbstractContextManager[tuple[socket.socket, socket.socket]]:
    """By the second segment."""
    return captured_connection(lab, directory / "peer.pcap", address("a"), PORT, device=DEVICE)


def move(lab: Lab, sock: socket.socket, source: str, target: str) -> MigrationRecord:
    [record] = export_sockets([Export(sock)], target, control=lab.host(source).control_socket)
    return record


def moved(lab: Lab, sock: socket.socket, source: str = "a", target: str = "b") -> socket.socket:
    """Its copy at the target."""
    record = move(lab, sock, source, target)
    assert record.outcome == "moved", record.message
    assert record.mode == "forward"
    sock.close()
    return taken(lab, target)


def taken(lab: Lab, host: str) -> socket.socket:
    [came] = import_socket([ImportRequest(["connected"])], 20, control=lab.host(host).control_socket)
    assert came.socket is not None
    came.socket.settimeout(20)
    return came.socket


def talk(one: socket.socket, other: socket.socket) -> None:
    """They hear each other."""
    for here, there, said in ((one, other, b"hello"), (other, one, b"welcome")):
        here.sendall(said)
        assert there.recv(99) == said


def doctor(host: Host) -> dict[str, Any]:
    [answer] = ask(host, "doctor")
    [check] = [check for check in answer["checks"] if check["name"] == "devices"]
    return check


def well(host: Host) -> bool:
    return doctor(host)["status"] == "ok"


def all_well(lab: Lab) -> None:
    for name in "ab":
        until(lambda name=name: well(lab.host(name)))


def test_by_a_device_that_has_come_since(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    all_well(lab)
    with connected(lab, tmp_path) as (client, ours), moved(lab, ours) as copy:
        talk(client, copy)
        talk(copy, client)


def test_it_comes_again_under_a_moved_connection(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    """At the exporter, then at the importer: what the peer sends goes on as if a cable had been pulled."""
    all_well(lab)
    with connected(lab, tmp_path) as (client, ours), moved(lab, ours) as copy:
        talk(client, copy)
        for name in "ab":
            go(lab, name)
            client.sendall(b"meanwhile")
            come(lab, name)
            assert copy.recv(99) == b"meanwhile"
            talk(copy, client)
            all_well(lab)


def test_it_goes_down_and_up_again(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    all_well(lab)
    with connected(lab, tmp_path) as (client, ours), moved(lab, ours) as copy:
        for name in "ab":
            ip(lab, name, "link", "set", DEVICE, "down")
            until(lambda name=name: well(lab.host(name)))
            ip(lab, name, "link", "set", DEVICE, "up")
            all_well(lab)
            # The kernel took it away as the device went down; a socket that is bound to the device needs it.
            until(lambda name=name: f"dev {DEVICE}" in table(lab, name))
            talk(client, copy)
            talk(copy, client)


def table(lab: Lab, name: str) -> str:
    return run("ip", "-n", namespace_of(lab.name, name), "route", "show", "table", "7780")


def test_it_gets_another_name(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    all_well(lab)
    with connected(lab, tmp_path) as (client, ours), moved(lab, ours) as copy:
        for name in "ab":
            ip(lab, name, "link", "set", DEVICE, "name", "other")
            until(lambda name=name: "other" in table_of_rules(lab, name))
            all_well(lab)
            talk(client, copy)
            talk(copy, client)
        assert DEVICE not in lab.host("a").run(["nft", "list", "chains", "netdev"]).stdout
        for name in "ab":
            go(lab, name, "other")


def table_of_rules(lab: Lab, name: str) -> str:
    return run("ip", "-n", namespace_of(lab.name, name), "rule")


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_device_without_redirects_is_told_of_and_not_used(
    lab: Lab, running: Daemons, tmp_path: Path, name: str
) -> None:
    """And as soon as there is news of devices they are made again."""
    all_well(lab)
    with connected(lab, tmp_path) as (client, ours):
        lab.host(name).run(["nft", "delete", "chain", "netdev", "sockmi", f"in_{DEVICE}"])
        assert doctor(lab.host(name))["status"] == "error"
        assert DEVICE in doctor(lab.host(name))["message"]
        record = move(lab, ours, "a", "b")
        assert (record.outcome, record.code) == ("refused", Code.NO_REDIRECT), record
        talk(client, ours)
        ip(lab, name, "address", "add", "10.98.0.1/24", "dev", DEVICE)
        all_well(lab)
        until(lambda: move(lab, ours, "a", "b").outcome == "moved")
        ours.close()
        with taken(lab, "b") as copy:
            talk(client, copy)


def test_devices_of_the_configuration(lab: Lab, segment: None, tmp_path: Path) -> None:
    """One of them may go and come again; doctor says it is not there. Others are not touched."""
    for name in NUMBERS:
        come(lab, name)
    with daemons(lab, "ab", redirect={"modes": ["forward"], "devices": ["eth0", DEVICE]}):
        with connected(lab, tmp_path) as (client, ours), moved(lab, ours) as copy:
            go(lab, "a")
            until(lambda: f"no device {DEVICE}" in doctor(lab.host("a"))["message"])
            come(lab, "a")
            talk(client, copy)
            all_well(lab)
        ip(lab, "a", "link", "add", "eth8", "type", "veth", "peer", "eth7")
        ip(lab, "a", "address", "add", "10.97.0.1/24", "dev", "eth8")
        ip(lab, "a", "link", "set", "eth8", "up")
        all_well(lab)
        assert "eth8" not in lab.host("a").run(["nft", "list", "chains", "netdev"]).stdout
        go(lab, "a", "eth8")


def test_the_news(lab: Lab, segment: None) -> None:
    with lab.host("a").entered():
        news = DeviceNews()
    with contextlib.closing(news):
        assert not news.read()
        come(lab, "a")
        assert news.read()
        assert not news.read()
        changes = (
            ("link", "set", DEVICE, "down"),
            ("link", "set", DEVICE, "name", "other"),
            ("link", "set", "other", "up"),
            ("address", "add", "10.98.0.1/24", "dev", "other"),
            ("address", "delete", "10.98.0.1/24", "dev", "other"),
        )
        for words in changes:
            ip(lab, "a", *words)
            until(news.read, timeout_s=2)
        ip(lab, "a", "link", "set", "other", "txqueuelen", "500")
        ip(lab, "a", "link", "set", "other", "alias", "nothing that matters")
        assert not news.read()
        news.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(200):
            ip(lab, "a", "link", "set", "other", "alias", f"{number}")
        assert news.read(), "some of it may be lost"
        go(lab, "a", "other")
        assert news.read()
