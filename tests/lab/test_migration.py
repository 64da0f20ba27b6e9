# SPDX-License-Identifier: MIT
"""Whole migrations: real daemons, servers and clients; every byte checked, the wire recorded."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.capture import Capture, judge, read_pcap
from lab.labs import Lab
from tests.lab import crash_lab
from tests.lab.crash_lab import cluster, flowing, proved
from tests.lab.matrix_lab import Later
from tests.lab.mode_lab import (
    SERVICE,
    forget_other_tests,
    give_service,
    legacy_iptables,
    needs_legacy,
    take_service,
)
from tests.lab.scenario import Service, ask, daemons, drain, service, status, until
from tests.laws import clean

CLIENTS = {
    "duplex": ("duplex", "--pace", "4000000"),
    "lines": ("lines", "--interval-s", "0.005"),
    "download": ("curl", "--bytes", "12000000", "--pace", "3000000"),
}


def pause(seconds: float = 0.3) -> None:
    """Let traffic flow: that much of it is part of the test."""
    threading.Event().wait(seconds)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", list(CLIENTS))
@pytest.mark.parametrize("mode", ["forward", "nat"])
def test_passive_over_hops(lab: Lab, tmp_path: Path, kind: str, version: int, mode: str) -> None:
    """a -> b -> c -> a under load, two clients; at the end nothing is left."""
    with (
        daemons(lab, "abc", redirect={"devices": ["eth0"], "modes": [mode]}),
        service(lab, kind, "abc", tmp_path, version=version) as serving,
    ):
        for _turn in range(2):
            serving.client(*CLIENTS[kind])
        serving.connected(2)
        for source, target in ("ab", "bc", "ca"):
            pause()
            records = serving.move(source, target)
            assert {record["mode"] for record in records} == {mode}
        pause()
        serving.finish()
        for name in "bc":
            until(lambda name=name: status(lab.host(name))["redirects_out"] == 0, 30)


@pytest.mark.parametrize("path", ["abc", "aba"])
@pytest.mark.parametrize("mode", ["takeover", pytest.param("iptables", marks=needs_legacy)])
def test_over_hops_by_the_other_redirects(lab: Lab, tmp_path: Path, mode: str, path: str) -> None:
    """Under two-way load, two connections over IPv4 and two over IPv6; at the end nothing is left."""
    redirect = {"devices": ["eth0"], "modes": [mode]}
    address = SERVICE if mode == "takeover" else {}
    forget_other_tests(lab, "abc")
    with ExitStack() as stack:
        if mode == "iptables":
            stack.enter_context(legacy_iptables(tmp_path))
        else:
            give_service(lab)
            stack.callback(take_service, lab, "abc")
        running = stack.enter_context(cluster(lab, "abc", redirect=redirect))
        serving = stack.enter_context(crash_lab.service(running, "duplex", "abc", tmp_path, at=address))
        serving.clients(2)
        for source, target in itertools.pairwise(path):
            flowing(serving)
            serving.move(source, target)
        proved(running, serving, path[-1])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", list(CLIENTS))
def test_active_with_context(lab: Lab, tmp_path: Path, kind: str, version: int) -> None:
    """The server hands its sessions over itself."""
    with (
        daemons(lab, "ab"),
        service(lab, kind, "ab", tmp_path, version=version, active_targets={"a": "b", "b": "a"}) as serving,
    ):
        for _turn in range(2):
            serving.client(*CLIENTS[kind])
        serving.connected(2)
        for source, target in ("ab", "ba"):
            pause()
            serving.move_actively(source, target)
        pause()
        serving.finish()


def test_behind_a_router_with_a_smaller_mtu(lab: Lab, tmp_path: Path) -> None:
    """a -> d: no multicast, another segment, path MTU 1400."""
    with daemons(lab, "ad", unicast=True), service(lab, "duplex", "ad", tmp_path) as serving:
        serving.client(*CLIENTS["duplex"])
        serving.connected(1)
        pause()
        [record] = serving.move("a", "d")
        assert record["mode"] == "nat"
        pause(1.0)
        serving.finish()


@pytest.mark.parametrize("path", ["abda", "adba"])
@pytest.mark.parametrize("version", [4, 6])
def test_over_hops_of_several_redirects(lab: Lab, tmp_path: Path, version: int, path: str) -> None:
    """Within the segment and across the router, and home again, under two-way load."""
    with (
        daemons(lab, "abd", unicast=True),
        service(lab, "duplex", "abd", tmp_path, version=version) as serving,
    ):
        for _turn in range(2):
            serving.client(*CLIENTS["duplex"])
        serving.connected(2)
        modes = []
        for source, target in itertools.pairwise(path):
            pause()
            records = serving.move(source, target)
            assert {record["outcome"] for record in records} == {"moved"}, records
            modes += {record["mode"] for record in records}
        assert modes == (["forward", "nat", "nat"] if path == "abda" else ["nat"] * 3)
        pause(1.0)
        serving.finish()


@pytest.mark.parametrize("way", ["active", "passive"])
@pytest.mark.parametrize("version", [4, 6])
def test_both_ends_at_once(lab: Lab, tmp_path: Path, version: int, way: str) -> None:
    """The server's end moves from a to b while the client's end moves from c to d, behind the router.

    Neither end stays to be the witness, but all that is sent still comes by the hosts where they were: at a
    what is for the server, at c what is for the client.
    """
    a, c = lab.host("a").address(version), lab.host("c").address(version)
    family = "ip6" if version == 6 else "ip"

    def start(host: str, *words: str) -> subprocess.Popen[str]:
        program = [sys.executable, str(Path(__file__).with_name("endpoint.py")), *words]
        process = lab.host(host).popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def said(process: subprocess.Popen[str]) -> list[str]:
        output, _unused = process.communicate(timeout=30)
        assert process.returncode == 0, output
        return output.splitlines()

    def taken(host: str, process: subprocess.Popen[str], to: str) -> None:
        [socket] = [
            row
            for answer in ask(lab.host(host), "list", filter={"pid": process.pid, "kinds": ["connected"]})
            for row in answer["sockets"]
        ]
        pair = {"pid": socket["pid"], "fd": socket["fd"]}
        [done] = ask(lab.host(host), "export", sockets=[pair], to=to)
        assert done["migrations"][0]["outcome"] == "moved", done

    running: list[subprocess.Popen[str]] = []
    try:
        served = f"tcp and {family} dst host {a} and dst port 7100"
        heard = f"tcp and {family} dst host {c} and src port 7100"
        to_server = Capture(lab.host("a"), served, tmp_path / "a.pcap", inbound=True)
        to_client = Capture(lab.host("c"), heard, tmp_path / "c.pcap", inbound=True)
        with daemons(lab, "abcd", unicast=True), to_server, to_client:
            server = start("a", "listen", "--address", a, "--port", "7100", "--to", "b")
            client = start("c", "connect", "--address", a, "--port", "7100", "--to", "d")
            heirs = [start("b", "import"), start("d", "import")]
            pause()
            if way == "active":
                for process in (server, client):
                    process.send_signal(signal.SIGUSR1)
            else:
                moves = [Later(taken, "a", server, "b"), Later(taken, "c", client, "d")]
                for move in moves:
                    move.result(30)
            ends = [said(process) for process in (server, client)]
            before = [int(lines[-1]) for lines in ends]
            if way == "passive":  # their contexts have not come with the connections
                for heir, (context, _unused) in zip(heirs, ends, strict=True):
                    assert heir.stdin
                    heir.stdin.write(f"{context}\n")
                    heir.stdin.flush()
            pause(1.0)
            ended_at = time.time()  # later they end, by FIN or RST
            for capture in (to_server, to_client):
                capture.stop()
                assert not capture.dropped
            for heir in heirs:
                heir.send_signal(signal.SIGTERM)
            after = [int(said(heir)[-1]) for heir in heirs]
            assert min(before) > 10
            assert min(after) > max(before) + 10
        seen = [*read_pcap(to_server.path), *read_pcap(to_client.path)]
        assert {segment.target[0] for segment in seen} == {a, c}
        verdict = judge(
            sorted((one for one in seen if one.at_s < ended_at), key=lambda one: one.at_s), fin_from=()
        )
        clean(verdict)
        assert verdict.connections == 1 and verdict.segments > max(before) + 10
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_nobody_offers(lab: Lab, tmp_path: Path) -> None:
    """Without a target that takes it the connection goes on as if nothing had happened."""
    with daemons(lab, "a"), service(lab, "lines", "a", tmp_path) as serving:
        serving.client(*CLIENTS["lines"])
        serving.connected(1)
        [answer] = ask(lab.host("a"), "list", filter={"local_port": 7000, "kinds": ["connected"]})
        [row] = answer["sockets"]
        [done] = ask(lab.host("a"), "export", sockets=[{"pid": row["pid"], "fd": row["fd"]}], timeout_s=0.5)
        [record] = done["migrations"]
        assert record["outcome"] == "refused"
        assert record["refusal"]["code"] == "no-offer"
        pause()
        serving.finish()


def test_full_list_declines(lab: Lab, tmp_path: Path) -> None:
    with (
        daemons(lab, "ab", imports={"max_connected": 0}),
        service(lab, "lines", "a", tmp_path) as serving,
    ):
        serving.client(*CLIENTS["lines"])
        serving.connected(1)
        [record] = [one for one in drain_with_timeout(lab, 0.5) if one["outcome"]]
        assert record["refusal"]["code"] == "no-offer"
        serving.finish()


def drain_with_timeout(lab: Lab, timeout_s: float) -> list[dict[str, object]]:
    answers = ask(
        lab.host("a"), "drain", filter={"local_port": 7000, "kinds": ["connected"]}, timeout_s=timeout_s
    )
    return [record for answer in answers for record in answer["migrations"]]


def test_listed_until_an_application_comes(lab: Lab, tmp_path: Path) -> None:
    """Nobody waits at b: the connection stays in the import list, silent, and is then taken."""
    with daemons(lab, "ab"), service(lab, "lines", "a", tmp_path) as first:
        first.client("lines", "--interval-s", "0.005", "--silence-s", "30")
        first.connected(1)
        [record] = drain(lab.host("a"), "b", local_port=7000)
        assert record["outcome"] == "moved"
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 1
        second = Service(lab, "lines", "b", tmp_path)
        try:
            second.start()
            until(lambda: status(lab.host("b"))["import_lists"]["connected"]["length"] == 0)
            pause(1.0)
            first.finish()
        finally:
            second.kill()
