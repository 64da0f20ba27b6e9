# SPDX-License-Identifier: MIT
"""Every state over the redirects for special cases, takeover and iptables; and what only they do."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from lab.labs import Lab
from tests.lab.crash_lab import cluster
from tests.lab.matrix_lab import (
    KINDS,
    PATIENCE_S,
    TCP,
    Bench,
    Case,
    Held,
    bench,
    copy_of,
    exchange,
    moved,
    state,
    verdict,
)
from tests.lab.matrix_states import (
    WAYS,
    move_a_listener_with_its_queue,
    move_all_states,
    move_without_a_connection,
)
from tests.lab.mode_lab import (
    SERVICE,
    WIDTH,
    forget_other_tests,
    give_service,
    legacy_iptables,
    needs_legacy,
    scene,
)
from tests.lab.scenario import daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USER_TIMEOUT_S = 3.0


def pairs(it: Bench, version: int, address: str, count: int) -> list[Case]:
    """Connections of the peer to an address of host a."""
    port, kind = it.port(), f"v{version}"
    cases = []
    with it.listener("a", kind, port, address) as listener:
        for _turn in range(count):
            peer = it.sock("peer", kind)
            peer.connect((address, port))
            ours, _unused = listener.accept()
            ours.settimeout(20)
            case = Case("service", kind, "ESTABLISHED", ours, port, peer, remote=peer.getsockname()[:2])
            cases.append(case)
            it.cases.append(case)
    return cases


@pytest.mark.parametrize("version", [4, 6])
def test_takeover(lab: Lab, tmp_path: Path, version: int) -> None:
    """A service address of a moves with all its connections; b has and announces it then."""
    address, width = SERVICE[version], WIDTH[version]
    extra = ["nodad"] if version == 6 else []
    lab.host("a").run(["ip", "addr", "add", f"{address}/{width}", "dev", "eth0", *extra])
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, "takeover", both) as it,
        it.watched(tmp_path),
    ):
        cases = pairs(it, version, address, 3)
        for case in cases:
            assert case.peer
            exchange(case.ours, case.peer, 50_000)
        try:
            # One alone is refused before it is frozen: it would take the address from the others.
            [record] = it.export_actively([cases[0].ours])
            assert (record.outcome, record.code) == ("refused", "redirect"), record
            assert "is not in the batch; move or close it too" in record.message
            for case in cases:
                assert case.peer
                exchange(case.ours, case.peer, 5000)
            records = it.export_actively([case.ours for case in cases])
            moved(records)
            assert {record.mode for record in records} == {"takeover"}
            assert (
                f"inet{'6' if version == 6 else ''} {address}/"
                not in lab.host("a").run(["ip", "addr"]).stdout
            )
            imported = it.take([it.request(case, it.target(), address=address) for case in cases])
            assert f" {address}/" in lab.host("b").run(["ip", "addr"]).stdout
            for case, one in zip(cases, imported, strict=True):
                copy = copy_of(one)
                assert copy.getsockname()[0] == address
                it.finish(case, copy)
                copy.close()
        finally:
            it.clear()
    for name in "ab":  # the alias goes only with its last connection, and b's is in TIME-WAIT
        lab.host(name).run(["ip", "addr", "flush", "dev", "eth0", "to", address], check=False)


def test_takeover_is_not_spread(lab: Lab) -> None:
    """Two hosts offer, and the policy gives each a half: all connections of the address go to one of them."""
    address = SERVICE[4]
    lab.host("a").run(["ip", "addr", "add", f"{address}/{WIDTH[4]}", "dev", "eth0"])
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    with (
        daemons(lab, "abc", redirect=redirect, policy="weighted") as three,
        bench(lab, "takeover", three) as it,
    ):
        cases = pairs(it, 4, address, 4)
        try:
            records = it.export_passively([(os.getpid(), case.fd) for case in cases], to=None)
            moved(records)
            [importer] = {record["to"] for record in records}
            wanted = [it.request(case, it.target(importer), address=address) for case in cases]
            for case, one in zip(cases, it.take(wanted, importer), strict=True):
                copy = copy_of(one)
                it.finish(case, copy)
                copy.close()
        finally:
            it.clear("abc")
    for name in "abc":
        lab.host(name).run(["ip", "addr", "flush", "dev", "eth0", "to", address], check=False)


def test_takeover_moves_all_or_none(lab: Lab) -> None:
    """One connection ends in the freeze, by its user timeout: the address and the others stay at a."""
    address, a = SERVICE[4], lab.host("a")
    forget_other_tests(lab, "ab")
    a.run(["ip", "addr", "add", f"{address}/{WIDTH[4]}", "dev", "eth0"])
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    timing = {"freeze_deadline_s": 5.0}
    with (
        cluster(lab, "ab", {"a": "commit.journalled:1:STOP"}, redirect=redirect, timing=timing) as daemons,
        bench(lab, "takeover", daemons.daemons) as it,
    ):
        cases = pairs(it, 4, address, 3)
        ending, *others = cases
        try:
            it.deafen([ending.port])
            ending.ours.setsockopt(TCP, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_S * 1000))
            ending.ours.sendall(b"unheard")
            with Held(it, *cases) as held:
                moving = held.move(timeout_s=PATIENCE_S)
                daemons.stopped("a")
                assert address not in a.run(["ip", "addr"]).stdout
                Event().wait(USER_TIMEOUT_S + 0.5)
                daemons.signal("a", signal.SIGCONT)
                assert {verdict(one)[:2] for one in moving.result()} == {("aborted", "changed")}
                held.back()
            it.deafen([ending.port], deaf=False)
            assert address in a.run(["ip", "addr"]).stdout
            assert state(ending.ours) == "CLOSED"
            for case in others:
                assert case.peer
                case.ours.settimeout(PATIENCE_S)
                exchange(case.ours, case.peer, 5000)
                exchange(case.peer, case.ours, 5000)
        finally:
            it.clear()
            for name in "ab":
                lab.host(name).run(["ip", "addr", "flush", "dev", "eth0", "to", address], check=False)


@pytest.mark.parametrize("how", ["restart", "crash"])
@pytest.mark.parametrize("version", [4, 6])
def test_takeover_and_a_restart(lab: Lab, version: int, how: str) -> None:
    """The address comes back as it was, with the route of its network, though another daemon gave it up.

    ``crash``: that one was killed when the address had just left, and the move is undone.
    """
    address, width = SERVICE[version], WIDTH[version]
    extra = ["nodad"] if version == 6 else []
    a = lab.host("a")
    forget_other_tests(lab, "ab")
    a.run(["ip", "addr", "add", f"{address}/{width}", "dev", "eth0", *extra])
    command = ["ip", "-o", f"-{version}", "addr", "show", "to", address]
    routes = a.run(["ip", f"-{version}", "route"]).stdout
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    crash_at = {"a": "commit.led-away"} if how == "crash" else {}
    try:
        with (
            cluster(lab, "ab", crash_at, redirect=redirect, timing={"freeze_deadline_s": 5.0}) as daemons,
            bench(lab, "takeover", daemons.daemons) as it,
        ):
            [case] = pairs(it, version, address, 1)
            assert case.peer
            if how == "crash":
                with Held(it, case) as held:
                    move = held.begin()
                    daemons.died("a")
                    move.close()
                    assert address not in a.run(command).stdout
                    daemons.start("a")
                    until(lambda: address in a.run(command).stdout)
                    held.back()
                    case.ours.settimeout(PATIENCE_S)
            else:
                moved(it.export_actively([case.ours]))
                [came] = it.take([it.request(case, it.target(), address=address)])
                assert address not in a.run(command).stdout
                daemons.daemons["a"].restart()
                daemons.ready()
                moved(it.export_actively([copy_of(came)], to="a", source="b"))
                [came] = it.take([it.request(case, a.socket().detach(), address=address)], host="a")
                case.ours = copy_of(came)
            assert f" {address}/{width} " in a.run(command).stdout
            assert a.run(["ip", f"-{version}", "route"]).stdout == routes
            exchange(case.ours, case.peer, 50_000)
            exchange(case.peer, case.ours, 50_000)
            case.close()
    finally:
        for name in "ab":
            for each in (width, {4: 32, 6: 128}[version]):
                lab.host(name).run(["ip", "addr", "del", f"{address}/{each}", "dev", "eth0"], check=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_state_by_takeover(lab: Lab, tmp_path: Path, way: str, kind: str) -> None:
    """All connections of the address are in one batch, whatever their state."""
    give_service(lab)
    redirect = {"devices": ["eth0"], "modes": ["takeover"]}
    try:
        with (
            daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
            bench(lab, "takeover", both) as it,
        ):
            it.service = SERVICE
            try:
                move_all_states(it, tmp_path, way, kind)
            finally:
                it.clear()
    finally:
        for name in "ab":
            for address in SERVICE.values():
                lab.host(name).run(["ip", "addr", "flush", "dev", "eth0", "to", address], check=False)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Daemons for which ``iptables`` is the legacy one."""
    with legacy_iptables(tmp_path_factory.mktemp("bin")):
        yield


@pytest.fixture(scope="module")
def by_iptables(lab: Lab, legacy: None) -> Iterator[Bench]:
    """Daemons that redirect by the paper's own rules."""
    redirect = {"devices": ["eth0"], "modes": ["iptables"]}
    with (
        daemons(lab, "ab", redirect=redirect, timing={"freeze_deadline_s": 5.0}) as both,
        bench(lab, "iptables", both) as it,
    ):
        yield it


@needs_legacy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_state_by_iptables(by_iptables: Bench, tmp_path: Path, way: str, kind: str) -> None:
    """The paper's own rules, on hosts whose iptables is the legacy one."""
    try:
        move_all_states(by_iptables, tmp_path, way, kind)
    finally:
        by_iptables.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["takeover", pytest.param("iptables", marks=needs_legacy)])
def test_without_a_connection(lab: Lab, tmp_path: Path, mode: str, way: str, kind: str) -> None:
    """Nothing is led anywhere, and so the address stays where it is; but each is what it was."""
    with scene(lab, mode, tmp_path) as it:
        move_without_a_connection(it, tmp_path, way, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["takeover", pytest.param("iptables", marks=needs_legacy)])
def test_a_listener_with_its_queue(lab: Lab, tmp_path: Path, mode: str, way: str, kind: str) -> None:
    with scene(lab, mode, tmp_path) as it:
        move_a_listener_with_its_queue(it, tmp_path, way, kind)
