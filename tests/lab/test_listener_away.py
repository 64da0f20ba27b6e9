# SPDX-License-Identifier: MIT
"""A listener that has moved: who connects to where it was waits; it is neither refused nor reset.

Connections to the importer's own address are served there; those to the exporter's when the listener is back.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from lab.capture import Capture
from lab.labs import Lab
from sockmi.client import Export, ImportRequest, export_sockets, import_socket
from sockmi.journal import Record
from tests.lab.crash_lab import Cluster, cluster, journal_of
from tests.lab.scenario import ask, status, until
from tests.laws import clean

PORT = 5090
ANY = {4: "0.0.0.0", 6: "::"}  # noqa: S104
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
#: (version of the listener, its address, version of its clients)
LISTENERS = [(4, "any", 4), (4, "a", 4), (6, "any", 6), (6, "a", 6), (6, "any", 4)]
A_WHILE_S = 1.5  # a SYN is repeated after 1 s
_DEAF = """
table inet half {
  chain out {
    type filter hook output priority -400
    tcp dport 5090 tcp flags & (syn | ack) == ack drop
  }
}
"""


def listen(lab: Lab, version: int, where: str = "any", host: str = "a") -> socket.socket:
    sock = lab.host(host).socket(FAMILY[version])
    sock.settimeout(20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((ANY[version] if where == "any" else lab.host(where).address(version), PORT))
    sock.listen(7)
    return sock


def connecting(lab: Lab, version: int, to: str = "a") -> socket.socket:
    """A client whose SYN is on its way."""
    sock = lab.host("peer").socket(FAMILY[version])
    sock.setblocking(False)
    sock.connect_ex((lab.host(to).address(version), PORT))
    sock.settimeout(20)
    return sock


def connected(sock: socket.socket) -> bool:
    """Whether there is an answer; an error is raised."""
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, "refused")
    with contextlib.suppress(OSError):
        sock.getpeername()
        return True
    return False


def talk(client: socket.socket, listener: socket.socket) -> None:
    """The listener accepts the client, and they hear each other."""
    ours, _unused = listener.accept()
    with ours:
        both(client, ours)


def both(client: socket.socket, ours: socket.socket) -> None:
    """They hear each other."""
    ours.settimeout(20)
    client.sendall(b"hello")
    assert ours.recv(9) == b"hello"
    ours.sendall(b"welcome")
    assert client.recv(9) == b"welcome"


def refused(lab: Lab, version: int) -> bool:
    """Whether a answers that nobody listens."""
    with lab.host("peer").socket(FAMILY[version]) as sock:
        sock.settimeout(0.3)
        try:
            sock.connect((lab.host("a").address(version), PORT))
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    return False


def leave(lab: Lab, sock: socket.socket, source: str, target: str) -> None:
    """It moves, and waits there in the import list."""
    [record] = export_sockets([Export(sock)], target, control=lab.host(source).control_socket)
    assert record.outcome == "moved", record.message
    assert "new-connections" in record.fidelity.approximated
    sock.close()
    until(lambda: status(lab.host(target))["import_lists"]["listening"]["length"] == 1)


def take(lab: Lab, host: str) -> socket.socket:
    [came] = import_socket([ImportRequest(["listening"])], 10, control=lab.host(host).control_socket)
    assert came.socket is not None
    came.socket.settimeout(20)
    return came.socket


@contextlib.contextmanager
def scene(lab: Lab, directory: Path, crash_at: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Daemons, and a capture in which no RST may be."""
    redirect = {"devices": ["eth0"]}
    with (
        cluster(lab, "ab", crash_at, redirect=redirect, timing={"freeze_deadline_s": 5.0}) as daemons,
        Capture(lab.host("peer"), f"tcp port {PORT}", directory / "peer.pcap") as capture,
    ):
        yield daemons
    verdict = capture.check()
    clean(verdict)


@pytest.mark.parametrize(("version", "where", "client_version"), LISTENERS)
def test_who_connects_waits(lab: Lab, tmp_path: Path, version: int, where: str, client_version: int) -> None:
    """Also while the listener waits for its application, anywhere, and while no daemon runs."""
    with scene(lab, tmp_path) as daemons:
        listener = listen(lab, version, where)
        stays = connecting(lab, client_version)
        here, _unused = listener.accept()
        leave(lab, listener, "a", "b")
        clients = [connecting(lab, client_version)]
        if where == "any":
            early = connecting(lab, client_version, to="b")
        Event().wait(A_WHILE_S)
        copy = take(lab, "b")
        if where == "any":  # its own address is the importer's
            talk(early, copy)
            with connecting(lab, client_version, to="b") as served:
                talk(served, copy)
            early.close()
        daemons.daemons["a"].stop()
        clients.append(connecting(lab, client_version))
        daemons.start("a")
        daemons.ready()
        clients.append(connecting(lab, client_version))
        # What the listener had accepted before did not move, and notices nothing.
        stays.sendall(b"still here")
        assert here.recv(99) == b"still here"
        assert not any(map(connected, clients))
        leave(lab, copy, "b", "a")
        Event().wait(A_WHILE_S)
        assert not any(map(connected, clients))
        back = take(lab, "a")
        until(lambda: all(map(connected, clients)))
        by_port = {client.getsockname()[1]: client for client in clients}
        for _unused in clients:
            ours, remote = back.accept()
            with ours, by_port.pop(remote[1]) as client:
                both(client, ours)
        for sock in (stays, here, back):
            sock.close()


@pytest.mark.parametrize("version", [4, 6])
def test_a_handshake_that_is_half_done(lab: Lab, tmp_path: Path, version: int) -> None:
    """Its connection cannot come to be; it is not reset either."""
    with scene(lab, tmp_path) as daemons:
        listener = listen(lab, version)
        lab.host("peer").run(["nft", "-f", "-"], input=_DEAF)
        client = connecting(lab, version)
        until(lambda: connected(client))
        leave(lab, listener, "a", "b")
        copy = take(lab, "b")
        assert "5090" not in lab.host("a").run(["ss", "-Htn", "state", "syn-recv"]).stdout
        lab.host("peer").run(["nft", "delete", "table", "inet", "half"])
        client.sendall(b"anybody there?")
        Event().wait(A_WHILE_S)
        daemons.daemons["a"].restart()
        Event().wait(A_WHILE_S)
        assert connected(client)
        copy.close()
    client.close()


@pytest.mark.parametrize(("version", "where", "client_version"), LISTENERS)
def test_it_is_only_missed_while_it_lives(lab: Lab, version: int, where: str, client_version: int) -> None:
    """When it has ended, a says again that nobody listens there; who listens anew is served at once."""
    # Its end is seen at the latest when it is looked at.
    timing = {"freeze_deadline_s": 5.0, "audit_interval_s": 1.0}
    with cluster(lab, "ab", redirect={"devices": ["eth0"]}, timing=timing):
        until(lambda: refused(lab, client_version))  # what a test before has left may linger
        leave(lab, listen(lab, version, where), "a", "b")
        copy = take(lab, "b")
        assert not refused(lab, client_version)
        with listen(lab, client_version) as other, connecting(lab, client_version) as client:
            talk(client, other)
        copy.close()
        until(lambda: refused(lab, client_version))


@pytest.mark.parametrize("point", ["commit.led-away", "commit.journalled"])
def test_the_exporter_dies_meanwhile(lab: Lab, tmp_path: Path, point: str) -> None:
    """The listener goes on where it was: it is answered there."""
    with scene(lab, tmp_path, {"a": point}) as daemons, listen(lab, 4) as listener:
        with ThreadPoolExecutor() as pool:
            moving = pool.submit(
                export_sockets, [Export(listener)], "b", control=lab.host("a").control_socket
            )
            daemons.died("a")
            with contextlib.suppress(OSError):
                moving.result()
        daemons.start("a")
        with connecting(lab, 4) as client:
            talk(client, listener)
        said = lab.host("a").run(["nft", "list", "table", "inet", "sockmi"]).stdout
        assert f"{PORT}" not in said
        daemons.ready()

        def undone() -> bool:
            with journal_of(lab.host("b")) as journal:
                return not journal.records(Record.PREPARED)

        until(undone)  # b has asked, and been told
        leave(lab, listener, "a", "b")
        take(lab, "b").close()
        until(lambda: ask(lab.host("a"), "status")[0]["redirects_out"] == 0)


@pytest.mark.parametrize("version", [4, 6])
def test_takeover_brings_its_address(lab: Lab, tmp_path: Path, version: int) -> None:
    """The address follows with its connections; then the listener on it hears who connects."""
    address, width = {4: ("10.77.1.78", 24), 6: ("fd77:1::78", 64)}[version]
    extra = ["nodad"] if version == 6 else []
    lab.host("a").run(["ip", "addr", "add", f"{address}/{width}", "dev", "eth0", *extra])
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    try:
        with (
            cluster(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}),
            Capture(lab.host("peer"), f"tcp port {PORT}", tmp_path / "peer.pcap") as capture,
            lab.host("a").socket(FAMILY[version]) as listener,
            lab.host("peer").socket(FAMILY[version]) as first,
            lab.host("peer").socket(FAMILY[version]) as second,
        ):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, PORT))
            listener.listen()
            first.settimeout(20)
            first.connect((address, PORT))
            ours, _unused = listener.accept()
            leave(lab, listener, "a", "b")
            second.setblocking(False)
            second.connect_ex((address, PORT))
            Event().wait(0.2)
            assert not connected(second)
            [record] = export_sockets([Export(ours)], "b", control=lab.host("a").control_socket)
            assert (record.outcome, record.mode) == ("moved", "takeover"), record.message
            ours.close()
            copy = take(lab, "b")
            [came] = import_socket([ImportRequest(["connected"])], 10, control=lab.host("b").control_socket)
            assert came.socket is not None
            both(first, came.socket)
            second.settimeout(20)
            until(lambda: connected(second))
            talk(second, copy)
            came.socket.close()
            copy.close()
        verdict = capture.check()
        clean(verdict)
    finally:
        for name in "ab":
            for each in (width, {4: 32, 6: 128}[version]):
                lab.host(name).run(["ip", "addr", "del", f"{address}/{each}", "dev", "eth0"], check=False)
