# SPDX-License-Identifier: MIT
"""Somebody flushes the ruleset: the daemon makes its tables, and all that was in them, again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.daemons import Daemons
from lab.host import Host
from lab.labs import Lab
from sockmi.addresses import Endpoint, FourTuple
from sockmi.client import Export, ImportRequest, export_sockets, import_socket
from sockmi.redirect import nft_messages, shield
from sockmi.redirect.guard import Guard
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables
from tests.lab.crash_lab import TIMING, cluster
from tests.lab.matrix_lab import Keeper, bench, copy_of, exchange
from tests.lab.scenario import ask, captured_connection, daemons, status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT = 5092
SERVICE = {4: "10.77.1.77", 6: "fd77:1::77"}  # an address that takeover can take
WAYS = [
    ["flush", "ruleset"],
    ["delete", "table", "inet", "sockmi"],
    ["delete", "table", "netdev", "sockmi"],
    ["flush", "table", "inet", "sockmi"],
]


@pytest.fixture
def lab(lab_name: Callable[[], str]) -> Iterator[Lab]:
    """One for each test: what an earlier one has moved would end meanwhile."""
    with Lab(lab_name()) as made:
        yield made


def ruleset(host: Host) -> list[str]:
    """All that matters, whatever the order of elements.

    Not what ends by itself, nor to whom packets were translated ever.
    """
    text = host.run(["nft", "list", "ruleset"]).stdout.replace("elements =", "\n")
    found = (re.sub(r"[{},]", "", line).strip() for line in re.split(r"\n|,", text))
    return sorted(line for line in found if line and "expires" not in line and not line.startswith("0x"))


def removed(host: Host, words: list[str]) -> None:
    """Remove it when nothing is on its way, and wait until everything is as before."""
    time.sleep(0.1)  # an acknowledgement waits 40 ms; untranslated, the peer would answer it by RST
    before = ruleset(host)
    host.run(["nft", *words])
    try:
        until(lambda: ruleset(host) == before, timeout_s=5)
    except AssertionError:
        now = Counter(ruleset(host))
        raise AssertionError(f"gone: {Counter(before) - now}, new: {now - Counter(before)}") from None
    [answer] = ask(host, "doctor")
    assert {check["status"] for check in answer["checks"] if check["name"] in ("nftables", "devices")} == {
        "ok"
    }


@contextlib.contextmanager
def running(lab: Lab, mode: str, hosts: str = "ab") -> Iterator[Daemons]:
    with daemons(lab, hosts, redirect={"modes": [mode], "devices": ["eth0"]}) as made:
        yield made


def connected(
    lab: Lab, directory: Path, version: int = 4, address: str = "", but: str = ""
) -> contextlib.AbstractContextManager[tuple[socket.socket, socket.socket]]:
    address = address or lab.host("a").address(version)
    return captured_connection(lab, directory / "peer.pcap", address, PORT, but=but)


def leave(lab: Lab, sock: socket.socket, source: str, target: str) -> None:
    """It moves, and waits there."""
    [record] = export_sockets([Export(sock)], target, control=lab.host(source).control_socket)
    assert record.outcome == "moved", record.message
    sock.close()


def take(lab: Lab, host: str, kind: str = "connected") -> socket.socket:
    [came] = import_socket([ImportRequest([kind])], 20, control=lab.host(host).control_socket)
    assert came.socket is not None
    came.socket.settimeout(20)
    until(lambda: not status(lab.host(host))["import_lists"][kind]["length"])
    return came.socket


def talk(one: socket.socket, other: socket.socket) -> None:
    """They hear each other."""
    for here, there, said in ((one, other, b"hello"), (other, one, b"welcome")):
        here.sendall(said)
        assert there.recv(99) == said


@pytest.mark.parametrize(("mode", "version"), [("forward", 4), ("forward", 6), ("nat", 4), ("nat", 6)])
def test_a_connection_that_has_moved(lab: Lab, tmp_path: Path, mode: str, version: int) -> None:
    """And moves home again."""
    with running(lab, mode), connected(lab, tmp_path, version) as (client, ours):
        leave(lab, ours, "a", "b")
        with take(lab, "b") as copy:
            for name in "ab":
                for words in WAYS:
                    removed(lab.host(name), words)
                    talk(client, copy)
                    talk(copy, client)
            leave(lab, copy, "b", "a")
        with take(lab, "a") as back:
            for name in "ab":
                removed(lab.host(name), WAYS[0])
                talk(client, back)


@pytest.mark.parametrize("flushed", ["a", "b"])
@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_while_the_daemon_cannot_know(lab: Lab, tmp_path: Path, mode: str, flushed: str) -> None:
    """Busy both ways, and nobody makes the tables again for a second: nothing is lost, nobody is reset.

    What nat's importer sends under its own name meanwhile the peer does not know, and says so to no effect.
    """
    but = lab.host("b").address(4) if (mode, flushed) == ("nat", "b") else ""
    with running(lab, mode) as made, connected(lab, tmp_path, but=but) as (client, ours):
        leave(lab, ours, "a", "b")
        with take(lab, "b") as copy:
            talk(client, copy)
            os.kill(made[flushed].pid, signal.SIGSTOP)
            try:
                lab.host(flushed).run(["nft", "flush", "ruleset"])
                client.sendall(b"x" * 5000)
                copy.sendall(b"y" * 5000)
                time.sleep(1)
            finally:
                os.kill(made[flushed].pid, signal.SIGCONT)
            for end, sent in ((copy, b"x"), (client, b"y")):
                got = b""
                while len(got) < 5000:
                    got += end.recv(5000)
                assert got == sent * 5000
            talk(copy, client)


def test_an_address_that_has_moved(lab: Lab, tmp_path: Path) -> None:
    """It is where it was, and comes home as it was, with its prefix length."""

    def had(name: str) -> str:
        return lab.host(name).run(["ip", "-o", "address"]).stdout

    lab.host("a").run(["ip", "address", "add", SERVICE[4] + "/20", "dev", "eth0"])
    try:
        with running(lab, "takeover"), connected(lab, tmp_path, 4, SERVICE[4]) as (client, ours):
            leave(lab, ours, "a", "b")
            with take(lab, "b") as copy:
                for name in "ab":
                    removed(lab.host(name), WAYS[0])
                    talk(client, copy)
                    assert SERVICE[4] in had("b") and SERVICE[4] not in had("a")
                leave(lab, copy, "b", "a")
            with take(lab, "a") as back:
                talk(client, back)
                assert SERVICE[4] + "/20" in had("a") and SERVICE[4] not in had("b")
    finally:
        lab.host("a").run(["ip", "address", "delete", SERVICE[4] + "/20", "dev", "eth0"], check=False)


def test_what_waits_for_its_application(lab: Lab, tmp_path: Path) -> None:
    """It is held, and what its peer has sent meanwhile is not lost."""
    with running(lab, "forward"), connected(lab, tmp_path) as (client, ours):
        leave(lab, ours, "a", "b")
        removed(lab.host("b"), WAYS[0])
        client.sendall(b"before")
        removed(lab.host("a"), WAYS[0])
        with take(lab, "b") as copy:
            assert copy.recv(99) == b"before"
            talk(client, copy)


def test_a_listener_that_has_moved(lab: Lab, tmp_path: Path) -> None:
    """Who connects to where it was is not refused."""
    with running(lab, "forward"), lab.host("a").socket() as listener, lab.host("peer").socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((lab.host("a").address(4), PORT))
        listener.listen()
        leave(lab, listener, "a", "b")
        removed(lab.host("a"), WAYS[0])
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.connect((lab.host("a").address(4), PORT))
        take(lab, "b", "listening").close()


def saved_of(host: Host) -> str:
    """All but the guard."""
    return "".join(
        host.run(["nft", "list", "table", family, "sockmi"]).stdout for family in ("inet", "netdev")
    )


def test_a_ruleset_that_was_saved(lab: Lab, tmp_path: Path) -> None:
    """In one transaction: the tables are there, and what is in them is of another day.

    With the guard, which has an owner, the kernel refuses it, and all is as it was.
    """
    with running(lab, "forward"), connected(lab, tmp_path) as (client, ours):
        before = ruleset(lab.host("a"))
        whole = lab.host("a").run(["nft", "list", "ruleset"]).stdout
        refused = lab.host("a").run(["nft", "-f", "-"], input="flush ruleset\n" + whole, check=False)
        assert "sockmi_guard" in refused.stderr
        assert ruleset(lab.host("a")) == before
        saved = {name: saved_of(lab.host(name)) for name in "ab"}
        leave(lab, ours, "a", "b")
        with take(lab, "b") as copy:
            for name in "ab":
                host = lab.host(name)
                before = ruleset(host)
                host.run(["nft", "-f", "-"], input="flush ruleset\n" + saved[name])
                until(lambda host=host, before=before: ruleset(host) == before)
                talk(client, copy)
            now = {name: saved_of(lab.host(name)) for name in "ab"}
            leave(lab, copy, "b", "a")
            with take(lab, "a") as back:
                for name in "ab":
                    lab.host(name).run(["nft", "-f", "-"], input="flush ruleset\n" + now[name])
                until(
                    lambda: (
                        ruleset(lab.host("b")) != sorted(now["b"]) and "next4" in str(ruleset(lab.host("a")))
                    )
                )
                talk(client, back)
                talk(back, client)


def test_in_the_middle_of_a_commit(lab: Lab, tmp_path: Path) -> None:
    """One of two has ended by then. What takes it back finds the tables gone; the other has no route yet."""
    crash_at = {"a": "commit.led-away:1:STOP"}
    with (
        cluster(lab, "ab", crash_at, redirect={"modes": ["forward"]}) as daemons,
        bench(lab, "forward", daemons.daemons) as it,
        it.watched(tmp_path),
    ):
        moves, ends = it.pair("v4", PORT), it.pair("v4", PORT)
        with Keeper([moves.fd]), Keeper([ends.fd]) as owner:
            moves.ours.close()
            ends.ours.close()
            drain = daemons.drain("a", "b", PORT)
            daemons.stopped("a")
            lab.host("a").run(["nft", "flush", "ruleset"])
            os.kill(owner.pid, signal.SIGKILL)
            stat = Path(f"/proc/{owner.pid}/stat")  # who traces it hears of its end first
            until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
            daemons.signal("a", signal.SIGCONT)
            assert [one["outcome"] for one in drain.ended() or []] == ["moved"], "what has ended is none"
        copy = copy_of(it.take([it.request(moves)])[0])
        time.sleep(TIMING["freeze_deadline_s"] + 1.5)  # what holds the frozen has ended
        assert moves.peer is not None and ends.peer is not None
        exchange(copy, moves.peer, 20_000)
        exchange(moves.peer, copy, 20_000)
        copy.close()
        assert moves.peer.recv(1) == ends.peer.recv(1) == b""
        it.clear()


def test_others_tables_are_their_own(lab: Lab) -> None:
    """Who changes them has the daemon look, and no more."""
    with running(lab, "forward") as made:
        host = lab.host("a")
        told = made["a"].log(9999).count("somebody has removed the nftables tables")
        host.run(["nft", "add", "table", "inet", "theirs"])
        host.run(["nft", "delete", "table", "inet", "theirs"])
        removed(host, WAYS[0])
        assert made["a"].log(9999).count("somebody has removed the nftables tables") == told + 1
        assert "shield" not in str(ruleset(host))


@pytest.fixture
def tables(lab: Lab) -> Iterator[Tables]:
    with lab.host("c").entered():
        made = Tables(Settings(table="flushed"))
        made.setup("test")
        yield made
        made.teardown("test")
        made.close()


def heard(tables: Tables) -> bool:
    try:
        return bool(tables.news.socket.recv(65536))
    except BlockingIOError:
        return False


def test_the_news(lab: Lab, tables: Tables) -> None:
    """Of others' transactions one message each; none of our own, which cost no more than without."""
    tables.news.read()
    here, there = Endpoint.parse("192.0.2.1:80"), Endpoint.parse("192.0.2.2:4000")
    tables.hold([FourTuple(here, there)], None)
    assert not heard(tables)
    assert tables.maybe_unheard
    assert tables.is_whole()
    assert not tables.maybe_unheard
    lab.host("c").run(["nft", "add table inet theirs; add chain inet theirs some; delete table inet theirs"])
    assert heard(tables)
    assert not heard(tables)
    assert tables.is_whole()
    lab.host("c").run(
        ["nft", "delete", "element", "inet", "flushed", "hold4", "{ 192.0.2.2 . 4000 . 192.0.2.1 . 80 }"]
    )
    assert tables.is_whole(), "elements are not looked at"
    lab.host("c").run(["nft", "flush", "table", "inet", "flushed"])
    assert not tables.is_whole()
    tables.rebuild()
    assert tables.is_whole()


def others_pass(lab: Lab) -> None:
    """A new connection of c's talks."""
    address = lab.host("c").address(4), PORT + 1
    with lab.host("peer").socket() as client, lab.host("c").socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        client.settimeout(20)
        client.connect(address)
        ours, _unused = listener.accept()
        with ours:
            talk(client, ours)


def is_refused(lab: Lab, caller: str = "peer", called: str = "c") -> bool:
    """Whether the caller hears that nobody listens there, or hears nothing."""
    with lab.host(caller).socket() as sock:
        sock.settimeout(0.5)
        number: int = sock.connect_ex((lab.host(called).address(4), PORT + 2))
    return number == errno.ECONNREFUSED


def test_the_shield(lab: Lab, tables: Tables) -> None:
    """It lets everything pass but RSTs."""
    with lab.host("c").entered():
        nft_messages.send(shield.raised("flushed"))
    others_pass(lab)
    assert not is_refused(lab)
    with lab.host("c").entered():
        nft_messages.send(shield.lowered("flushed"))
    assert is_refused(lab)


def test_the_guard(lab: Lab, tables: Tables) -> None:
    """Without our other tables it lets everything pass but RSTs, in and out; with them it does nothing."""
    host = lab.host("c")
    host.run(["nft", "add", "table", "inet", "flushed_guard"])
    with host.entered():
        tables.guard.raise_()
    assert tables.guard.is_up
    for words in (["flush", "ruleset"], ["delete", "table", "inet", "flushed"]):
        assert is_refused(lab) and is_refused(lab, "c", "peer")
        host.run(["nft", *words])
        others_pass(lab)
        assert not is_refused(lab) and not is_refused(lab, "c", "peer")
        tables.rebuild()
    others_pass(lab)
    denied = host.run(["nft", "delete", "table", "inet", "flushed_guard"], check=False)
    assert "Operation not permitted" in denied.stderr
    tables.teardown("test")
    assert not host.run(["nft", "list", "ruleset"]).stdout
    assert is_refused(lab) and is_refused(lab, "c", "peer")


def test_the_guard_has_gone_with_its_daemon(lab: Lab) -> None:
    """Stopped or killed, it leaves none behind, and the tables refuse as ever."""
    with running(lab, "forward", "c") as made:
        for number in (signal.SIGTERM, signal.SIGKILL):
            assert "sockmi_guard" in str(ruleset(lab.host("c")))
            os.kill(made["c"].pid, number)
            until(lambda: "sockmi_guard" not in str(ruleset(lab.host("c"))))
            assert is_refused(lab) and is_refused(lab, "c", "peer")
            made["c"].stop()
            made["c"].start()
        [answer] = ask(lab.host("c"), "doctor")
        assert [one["status"] for one in answer["checks"] if one["name"] == "nftables"] == ["ok"]


def test_a_guard_that_cannot_be(lab: Lab) -> None:
    """The daemon starts, and says what is missing."""
    with lab.host("c").entered():
        others = Guard(Settings())
        others.raise_()
    try:
        with running(lab, "forward", "c") as made:
            assert "sockmi_guard: Operation not permitted" in made["c"].log()
            [answer] = ask(lab.host("c"), "doctor")
            [check] = [one for one in answer["checks"] if one["name"] == "nftables"]
            assert check["status"] == "warning"
            assert "flushed the ruleset" in check["message"]
    finally:
        others.lower()
