# SPDX-License-Identifier: MIT
"""Whole daemons with the kernel engine, and beside some with the other: hosts are network namespaces."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.paths import PROJECT
from lab.daemons import daemon_config
from lab.labs import Lab
from tests.lab.scenario import ask, daemons, drain, service, status, until
from tests.lab.test_migration import CLIENTS, pause

LINES = ("lines", "--interval-s", "0.05", "--silence-s", "60")

pytestmark = pytest.mark.timeout(900)  # a daemon takes 10 s to start, where the processor is emulated
NAT = {"devices": ["eth0"], "modes": ["nat"]}


@pytest.fixture(scope="module")
def lab(kernel: str) -> Iterator[Lab]:
    with Lab(f"k{kernel.replace('.', '')}") as made:
        yield made


def test_hops_between_engines(lab: Lab, tmp_path: Path) -> None:
    hops(lab, tmp_path, "nat", "lines", 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kind", "version"),
    [("nat", "duplex", 6), ("takeover", "download", 4), ("iptables", "duplex", 4)],
)
def test_hops_by_other_redirects(lab: Lab, tmp_path: Path, mode: str, kind: str, version: int) -> None:
    hops(lab, tmp_path, mode, kind, version)


@pytest.mark.slow
@pytest.mark.kernels("6.1", "6.12", "7.2")  # the User-Mode-Linux kernels have no nft fwd
def test_hops_by_forward(lab: Lab, tmp_path: Path) -> None:
    hops(lab, tmp_path, "forward", "lines", 4)


def hops(lab: Lab, tmp_path: Path, mode: str, kind: str, version: int) -> None:
    """kernel -> kernel -> repair -> kernel under load: every byte, and no RST on the wire."""
    engines = {"c": "repair"}  # the others find the module
    with (
        daemons(lab, "abc", engines=engines, redirect={"devices": ["eth0"], "modes": [mode]}),
        service(lab, kind, "abc", tmp_path, version=version) as serving,
    ):
        assert [status(lab.host(name))["engine"] for name in "abc"] == ["kernel", "kernel", "repair"]
        for _ in range(2):
            serving.client(*(LINES if kind == "lines" else CLIENTS[kind]))
        serving.connected(2)
        for source, target in ("ab", "bc", "ca"):
            pause()
            records = serving.move(source, target)
            assert {record["mode"] for record in records} == {mode}
            for record in records:
                assert record["engine"] == ("repair" if source == "c" else "kernel")
                told = record["fidelity"]
                lost = "path-model" in told["reset"]
                assert lost == ("c" in (source, target)), told
                assert lost or "path-model" in told["carried"]
        pause()
        serving.finish()


def test_active_with_context(lab: Lab, tmp_path: Path) -> None:
    """The server hands its sessions over itself, by the library, which knows of no engine."""
    targets = {"a": "b", "b": "a"}
    with (
        daemons(lab, "ab", redirect=NAT),
        service(lab, "lines", "ab", tmp_path, active_targets=targets) as serving,
    ):
        serving.client(*LINES)
        serving.connected(1)
        for source, target in ("ab", "ba"):
            pause()
            serving.move_actively(source, target)
        pause()
        serving.finish()


def test_c_library_on_both_sides(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """export_socket() and import_socket() of libsockmi: their callers know of no engine."""
    monkeypatch.setenv("SOCKMI_CLIENT_LIBRARY", str(PROJECT / "daemon/libsockmi/build/libsockmi.so.0"))
    program = [sys.executable, str(PROJECT / "tests/lab/endpoint.py")]
    running: list[subprocess.Popen[str]] = []

    def start(host: str, *words: str) -> subprocess.Popen[str]:
        process = lab.host(host).popen(
            [*program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def ended(process: subprocess.Popen[str]) -> int:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return int(output)

    try:
        with daemons(lab, "ab", redirect=NAT):
            server = start("a", "listen", "--port", "7100", "--to", "b", "--c")
            client = start("peer", "connect", "--address", str(lab.host("a").address4), "--port", "7100")
            heir = start("b", "import", "--c")
            pause()
            server.send_signal(signal.SIGUSR1)
            before = ended(server)
            pause(1.0)
            heir.send_signal(signal.SIGTERM)
            assert ended(heir) > before > 10
            client.send_signal(signal.SIGTERM)
            assert ended(client) > before
            for name in "ab":
                assert status(lab.host(name))["engine"] == "kernel"
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_listed_until_an_application_comes(lab: Lab, tmp_path: Path) -> None:
    """A copy that waits for longer than the module keeps one dormant is an image, and then made anew."""
    with daemons(lab, "ab", redirect=NAT), service(lab, "lines", "a", tmp_path) as first:
        first.client(*LINES)
        first.connected(1)
        [record] = drain(lab.host("a"), "b", local_port=7000)
        assert record["outcome"] == "moved", record
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 1
        with service(lab, "lines", "b", tmp_path):
            until(lambda: status(lab.host("b"))["import_lists"]["connected"]["length"] == 0)
            pause(1.0)
            first.finish()


def test_nobody_offers(lab: Lab, tmp_path: Path) -> None:
    """What is not taken goes on as if nothing had happened; also when it is asked for while it is frozen."""
    with daemons(lab, "a", redirect=NAT), service(lab, "lines", "a", tmp_path) as serving:
        serving.client(*LINES)
        serving.connected(1)
        [answer] = ask(lab.host("a"), "list", filter={"local_port": 7000, "kinds": ["connected"]})
        [row] = answer["sockets"]
        socket = {"pid": row["pid"], "fd": row["fd"]}
        [done] = ask(lab.host("a"), "export", sockets=[socket], timeout_s=0.5)
        [record] = done["migrations"]
        assert (record["outcome"], record["refusal"]["code"]) == ("refused", "no-offer")
        pause()
        serving.finish()


def test_doctor_says_which(lab: Lab) -> None:
    with daemons(lab, "ab", engines={"b": "repair"}, redirect=NAT):
        found = {}
        for name in "ab":
            [answer] = ask(lab.host(name), "doctor")
            [found[name]] = [one for one in answer["checks"] if one["name"] == "engine"]
    assert [one["status"] for one in found.values()] == ["ok", "ok"]
    assert found["a"]["message"].startswith("kernel") and found["b"]["message"].startswith("repair")


def test_what_is_asked_for_and_absent(lab: Lab) -> None:
    """Where the module is, both can be asked for; the unit tests have the other case."""
    host = lab.host("a")
    assert daemon_config(host).get("engine") is None
    for engine in ("kernel", "repair", "auto"):
        with daemons(lab, "a", engines={"a": engine}, redirect=NAT):
            assert status(host)["engine"] == {"auto": "kernel"}.get(engine, engine)
