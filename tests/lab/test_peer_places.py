# SPDX-License-Identifier: MIT
"""Peers that are not just somewhere in the network: what no redirect serves is refused before any freeze.

They are processes of the importer or of the exporter, or behind one of them, as in a container.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lab import namespaces
from lab.host import Host
from lab.labs import Lab
from sockmi.client import ImportRequest, import_socket
from tests.lab.matrix_lab import Bench, Case, Held, bench, copy_of, exchange, moved, verdict
from tests.lab.mode_lab import give_service, needs_legacy, scene, take_service
from tests.lab.scenario import ask, daemons

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

INSIDE = {4: ("172.30.0.1", "172.30.0.2", "172.30.0.0/24"), 6: ("fd30::1", "fd30::2", "fd30::/64")}
IMPORTER, EXPORTER, BEHIND = "is the importer itself", "is this host itself", "is a neighbour by inside"
#: Why the peer's place keeps a connection from moving, by IP version; None: it moves, and goes on.
SERVED: dict[str, dict[str, dict[int, str | None]]] = {
    "forward": {
        "b": {4: IMPORTER, 6: None},
        "a": {4: EXPORTER, 6: EXPORTER},
        "behind a": {4: BEHIND, 6: BEHIND},
    },
    "takeover": {"b": {4: None, 6: None}, "a": {4: None, 6: None}, "behind a": {4: BEHIND, 6: BEHIND}},
    "iptables": {
        "b": {4: IMPORTER, 6: IMPORTER},
        "a": {4: EXPORTER, 6: EXPORTER},
        "behind a": {4: BEHIND, 6: BEHIND},
    },
}
SERVED["nat"] = SERVED["forward"]


@contextmanager
def container(host: Host, others: tuple[Host, ...] = ()) -> Iterator[Callable[[int], socket.socket]]:
    """A host behind ``host``, which routes; makes its sockets. The ``others`` know the way to it."""
    name = f"{host.namespace}-c"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        host.run(["ip", "link", "add", "inside", "type", "veth", "peer", "name", "eth0", "netns", name])
        host.run(["ip", "link", "set", "inside", "up"])
        with namespaces.entered(name):
            subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
        for version, (ours, theirs, network) in INSIDE.items():
            nodad = ["nodad"] if version == 6 else []
            host.run(["ip", "addr", "add", f"{ours}/{network[-2:]}", "dev", "inside", *nodad])
            with namespaces.entered(name):
                for words in (
                    ["addr", "add", f"{theirs}/{network[-2:]}", "dev", "eth0", *nodad],
                    [f"-{version}", "route", "add", "default", "via", ours],
                ):
                    subprocess.run(["ip", *words], check=True)
            for other in others:
                other.run(["ip", "route", "add", network, "via", host.address(version)])

        def made(version: int) -> socket.socket:
            with namespaces.entered(name):
                return socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)

        yield made
    finally:
        host.run(["ip", "link", "delete", "inside"], check=False)
        for other in others:
            for version in INSIDE:
                other.run(["ip", f"-{version}", "route", "flush", INSIDE[version][2]], check=False)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def connected(it: Bench, peer: socket.socket, version: int, address: str = "") -> Case:
    """A connection of ``peer``, wherever that is, with a."""
    port, kind = it.port(), f"v{version}"
    address = address or it.address(kind)
    peer.settimeout(20)
    with it.listener("a", kind, port, address) as listener:
        peer.connect((address, port))
        ours, _unused = listener.accept()
    ours.settimeout(20)
    case = Case("place", kind, "ESTABLISHED", ours, port, peer, remote=peer.getsockname()[:2])
    it.cases.append(case)
    return case


def listed(it: Bench, case: Case) -> tuple[str, str] | None:
    """Why `list` says that it could not move: code and sentence."""
    wanted = {"pid": os.getpid(), "local_port": case.port, "kinds": ["connected"]}
    [row] = [row for one in ask(it.host("a"), "list", filter=wanted) for row in one["sockets"]]
    assert row["movable"] is (row["refusal"] is None)
    return (row["refusal"]["code"], row["refusal"]["message"]) if row["refusal"] else None


def planned(it: Bench, case: Case, to: str | None = "b") -> dict[str, Any]:
    """The record of a dry run."""
    wanted = {"pid": os.getpid(), "local_port": case.port, "kinds": ["connected"]}
    answers = ask(it.host("a"), "drain", filter=wanted, to=to, dry_run=True)
    [record] = [record for one in answers for record in one["migrations"]]
    return record


def goes_on(one: socket.socket, other: socket.socket) -> None:
    """Both ways."""
    exchange(one, other, 100_000)
    exchange(other, one, 100_000)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", ["forward", "nat", "takeover", pytest.param("iptables", marks=needs_legacy)])
def test_what_a_mode_cannot_serve_stays(lab: Lab, tmp_path: Path, mode: str, version: int) -> None:
    """And all else moves. List and dry run say the same before."""
    with scene(lab, mode, tmp_path) as it, container(lab.host("a"), (lab.host("b"),)) as inside:
        for place, served in SERVED[mode].items():
            peer = inside(version) if place == "behind a" else it.sock(place, f"v{version}")
            if mode == "takeover":
                take_service(lab)
                give_service(lab)
                lab.host("b").run(["ip", "neigh", "flush", "dev", "eth0"])
            if place == "a":  # else it would have the address that takeover leads away
                peer.bind((lab.host("a").address(version), 0))
            case, why = connected(it, peer, version), served[version]
            assert case.peer
            saying = listed(it, case), planned(it, case)
            [record] = it.export_actively([case.ours])
            if why is None:
                assert not saying[0] and saying[1]["outcome"] == "planned", saying
                moved([record])
                [came] = it.take([it.request(case, it.target())])
                case.ours = copy_of(came)
            else:
                outcome, code, message = verdict(record)
                assert (outcome, code) == ("refused", "no-redirect") and why in message, record
                if (place, version) != ("b", 6):  # the exporter does not know that address
                    assert verdict(saying[1]) == (outcome, code, message), saying
                # The list does not know where it would go.
                assert place == "b" or saying[0] == (code, message), saying
            goes_on(case.ours, case.peer)
            it.clear()


@pytest.mark.parametrize("modes", [["forward"], ["nat"], ["forward", "nat"]], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_who_is_behind_the_importer(lab: Lab, modes: list[str], known: bool) -> None:
    """By forward it takes a device that the importer's daemon knows as one where packets come in."""
    with ExitStack() as stack:
        behind = stack.enter_context(container(lab.host("b"), (lab.host("a"),)))
        redirect = {"modes": modes} | ({} if known else {"devices": ["eth0"]})
        both = stack.enter_context(daemons(lab, "ab", redirect=redirect))
        it = stack.enter_context(bench(lab, modes[0], both))
        stack.callback(it.clear)
        for version in (4, 6):
            case = connected(it, behind(version), version)
            assert case.peer and not listed(it, case)
            [record] = it.export_actively([case.ours])
            if modes == ["forward"] and not known:
                assert verdict(record)[:2] == ("refused", "no-redirect"), record
                assert "allow nat" in verdict(record)[2]
            else:
                moved([record])
                [came] = it.take([it.request(case, it.target())])
                case.ours = copy_of(came)
            goes_on(case.ours, case.peer)


def test_another_host_takes_what_the_first_cannot(lab: Lab) -> None:
    with daemons(lab, "abc") as three, bench(lab, "forward", three) as it:
        for _turn in range(4):  # whom the policy would choose first
            case = connected(it, it.sock("b", "v4"), 4)
            assert case.peer
            with Held(it, case) as held:
                [record] = held.move(to=None).result()
            assert verdict(record)[0] == "moved" and record["to"] == "c", record
            [came] = it.take([it.request(case, it.target("c"))], "c")
            case.ours = copy_of(came)
            goes_on(case.ours, case.peer)
            it.clear("abc")


def test_what_is_led_to_its_peer_s_host_can_leave_it(lab: Lab) -> None:
    """Its packets come from its home, also those of a process beside it."""
    with daemons(lab, "abc") as three, bench(lab, "forward", three) as it:
        case = connected(it, it.sock("b", "v6"), 6)
        assert case.peer
        for source, target in ("ab", "bc", "cb", "ba"):
            moved(it.export_actively([case.ours], to=target, source=source))
            [came] = it.take([it.request(case, it.target(target))], target)
            case.ours = copy_of(came)
            goes_on(case.ours, case.peer)
        it.clear("abc")


@pytest.mark.parametrize("version", [4, 6])
def test_the_host_s_address_in_a_container_s_network(lab: Lab, version: int) -> None:
    """That it is not the importer's network is known when it has offered: before the freeze."""
    with daemons(lab, "ab") as both, bench(lab, "forward", both) as it, container(lab.host("a")) as inside:
        case = connected(it, inside(version), version, INSIDE[version][0])
        [record] = it.export_actively([case.ours])
        assert verdict(record)[:2] == ("refused", "no-redirect") and BEHIND in verdict(record)[2], record
        assert case.peer
        goes_on(case.ours, case.peer)
        it.clear()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_within_the_host(lab: Lab, address: str) -> None:
    """A connection stays, and all say so; who listens there can move, and listens there again."""
    version = 6 if ":" in address else 4
    with daemons(lab, "ab") as both, bench(lab, "forward", both) as it:
        case = connected(it, it.sock("a", f"v{version}"), version, address)
        assert case.peer
        with Held(it, case) as held:
            [record] = held.move().result()
            held.back()
        case.ours.settimeout(20)
        outcome, code, message = verdict(record)
        assert (outcome, code) == ("refused", "no-redirect") and EXPORTER in message, record
        assert listed(it, case) == (code, message)
        assert verdict(planned(it, case, None)) == (outcome, code, message)
        goes_on(case.ours, case.peer)

        listener = it.listener("a", f"v{version}", it.port(), address)
        moved(it.export_actively([listener]))
        [came] = import_socket(ImportRequest(["listening"]), 10, control=lab.host("b").control_socket)
        with copy_of(came) as there, it.sock("b", f"v{version}") as client:
            assert there.getsockname()[0] == address
            client.connect(there.getsockname()[:2])
        it.clear()


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_a_service_s_address_that_both_hosts_have(lab: Lab, mode: str) -> None:
    service = "10.77.9.9"
    redirect = {"devices": ["eth0"], "modes": [mode]}
    with daemons(lab, "ab", redirect=redirect) as both, bench(lab, mode, both) as it:
        try:
            for name in "ab":
                lab.host(name).run(["ip", "addr", "add", f"{service}/32", "dev", "lo"])
            lab.host("peer").run(["ip", "route", "add", service, "via", str(lab.host("a").address4)])
            case = connected(it, it.sock("peer", "v4"), 4, service)
            [record] = it.export_actively([case.ours])
            assert verdict(record)[:2] == ("refused", "no-redirect"), record
            assert re.search(f"both have the address {service}", verdict(record)[2]), record
            assert case.peer
            goes_on(case.ours, case.peer)
            it.clear()
        finally:
            for name in "ab":
                lab.host(name).run(["ip", "addr", "flush", "dev", "lo", "to", service], check=False)
            lab.host("peer").run(["ip", "route", "flush", service], check=False)


@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_a_service_s_address_on_a_device_of_its_own_says_nothing(lab: Lab, mode: str) -> None:
    """Its peers are neighbours by another device, as they should be."""
    service = "10.77.9.8"
    a = lab.host("a")
    redirect = {"devices": ["eth0"], "modes": [mode]}
    with daemons(lab, "ab", redirect=redirect) as both, bench(lab, mode, both) as it:
        try:
            a.run(["ip", "link", "add", "service", "type", "bridge"])
            a.run(["ip", "link", "set", "service", "up"])
            a.run(["ip", "addr", "add", f"{service}/32", "dev", "service"])
            lab.host("peer").run(["ip", "route", "add", service, "via", str(a.address4)])
            lab.host("b").run(["ip", "route", "add", service, "dev", "eth0"])
            case = connected(it, it.sock("peer", "v4"), 4, service)
            assert case.peer and not listed(it, case)
            moved(it.export_actively([case.ours]))
            [came] = it.take([it.request(case, it.target(), address=service)])
            case.ours = copy_of(came)
            goes_on(case.ours, case.peer)
            it.clear()
        finally:
            with suppress(subprocess.CalledProcessError):
                a.run(["ip", "link", "delete", "service"])
            for name in ("peer", "b"):
                lab.host(name).run(["ip", "route", "flush", service], check=False)
