# SPDX-License-Identifier: MIT
"""Whole daemons with the kernel engine, and beside some with the other: hosts are network namespaces."""

from __future__ import annotations

import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from guests.paths import PROJECT
from lab.capture import Capture, Trouble
from lab.daemons import daemon_config
from lab.labs import Lab
from sockmi.client import (
    Export,
    Imported,
    ImportRequest,
    MigrationRecord,
    export_socket,
    export_sockets,
    import_socket,
)
from sockmi.engine.base import Fidelity
from tests.lab.mode_lab import SERVICE, give_service, legacy_iptables, needs_legacy, take_service
from tests.lab.scenario import ask, daemons, drain, service, status, until, wait_for_members
from tests.lab.test_engine_states import receive
from tests.lab.test_migration import CLIENTS, pause

NUMBER = struct.Struct("!Q")
LINES = ("lines", "--interval-s", "0.05", "--silence-s", "60")
# Three moves of daemons in an emulated machine take their time.
PATIENT = {
    "lines": LINES,
    "download": ("curl", "--bytes", "9000000", "--pace", "300000"),
    "duplex": ("duplex", "--pace", "100000"),
}

# A daemon takes 10 s to start, where the processor is emulated.
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
NAT = {"devices": ["eth0"], "modes": ["nat"]}


class Peer:
    """The other end: says numbers one after the other, and checks what it hears."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.said = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self) -> None:
        while not self._stop.wait(0.02):
            self.connection.sendall(NUMBER.pack(self.said))
            self.said += 1

    def silence(self) -> int:
        """End; how many numbers were said."""
        self._stop.set()
        self._thread.join(60)
        return self.said


def hear(ours: socket.socket, first: int, count: int) -> None:
    """Exactly the numbers that come next."""
    data = b""
    while len(data) < count * NUMBER.size:
        part = ours.recv(count * NUMBER.size - len(data))
        assert part
        data += part
    assert data == b"".join(NUMBER.pack(first + i) for i in range(count))


def check_fidelity(told: Fidelity, exporter: str, importer: str) -> None:
    """The path model travels whole from kernel to kernel, and the report tells when it does not."""
    assert ("path-model" in told.carried) == (exporter == importer == "kernel"), told
    assert importer == "kernel" or "path-model" in told.reset, told


def moved(lab: Lab, ours: socket.socket, source: str, target: str) -> tuple[socket.socket, MigrationRecord]:
    """From one host's daemon to the other's, by this process, which is the owner on both."""
    arrived: list[Imported] = []
    wanted = ImportRequest(["connected"])
    there = lab.host(target).control_socket
    taker = threading.Thread(target=lambda: arrived.extend(import_socket(wanted, 300, control=there)))
    taker.start()
    until(lambda: status(lab.host(target))["import_lists"]["connected"]["waiting"] > 0)
    record = export_socket(ours, to=target, timeout_s=60, control=lab.host(source).control_socket)
    taker.join(300)
    with pytest.raises(ConnectionAbortedError):
        ours.recv(1)
    ours.close()
    [one] = arrived
    assert one.socket is not None
    one.socket.settimeout(60)
    return one.socket, record


def test_between_engines(lab: Lab, tmp_path: Path) -> None:
    """kernel -> kernel, repair -> kernel, kernel -> repair, while the peer talks: every byte, no RST."""
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    with (
        Capture(peer, "tcp port 7200", tmp_path / "peer.pcap") as capture,
        daemons(lab, "ab", redirect=NAT) as running,
    ):
        assert [status(host)["engine"] for host in (a, b)] == ["kernel", "kernel"]
        with a.socket() as listener:
            listener.bind((a.address(4), 7200))
            listener.listen()
            client = peer.socket()
            client.settimeout(60)
            client.connect(listener.getsockname())
            ours, _unused = listener.accept()
        talk = Peer(client)
        heard = 0
        for source, target, engine in (("a", "b", "kernel"), ("b", "a", "repair"), ("a", "b", "kernel")):
            ours.settimeout(60)
            hear(ours, heard, 5)
            waits = secrets.token_bytes(30_000)
            ours.sendall(waits)
            ours, record = moved(lab, ours, source, target)
            assert record.engine == engine
            check_fidelity(record.fidelity, engine, status(lab.host(target))["engine"])
            assert receive(client, len(waits)) == waits
            hear(ours, heard + 5, 5)
            heard += 10
            if heard == 10:
                running["b"].config["engine"] = "repair"
                running["b"].restart()  # what it holds stays
                wait_for_members(lab, "ab")
        said = talk.silence()
        hear(ours, heard, said - heard)
        ours.close()
        assert client.recv(1) == b""
        client.close()
    verdict = capture.check(allow={Trouble.SACK_RENEGED})
    assert verdict.clean, str(verdict)


def test_urgent_data_moves_between_modules(lab: Lab) -> None:
    """To a host without the module it does not: refused by name, and it goes on. Then that has it."""
    a, peer = lab.host("a"), lab.host("peer")
    with daemons(lab, "ab", engines={"b": "repair"}, redirect=NAT) as running:
        with a.socket() as listener:
            listener.bind((a.address(4), 7300))
            listener.listen()
            client = peer.socket()
            client.connect(listener.getsockname())
            ours, _unused = listener.accept()
        client.sendall(b"before")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"after")
        until(lambda: struct.unpack_from("Q", ours.getsockopt(socket.IPPROTO_TCP, 11, 240), 128)[0] == 12)
        [record] = export_sockets([Export(ours)], "b", control=a.control_socket, timeout_s=60)
        assert (record.outcome, record.code, record.step) == ("refused", "urgent-data", "requested"), record
        running["b"].config["engine"] = "auto"
        running["b"].restart()
        wait_for_members(lab, "ab")
        copy, record = moved(lab, ours, "a", "b")
        assert "urgent-data" in record.fidelity.carried
        assert copy.recv(100) == b"before"
        copy.settimeout(None)  # with a timeout, Python would wait for POLLIN first
        assert copy.recv(1, socket.MSG_OOB) == b"!"
        assert copy.recv(100) == b"after"
        copy.close()
        client.close()


def test_hops_between_engines(lab: Lab, tmp_path: Path) -> None:
    hops(lab, tmp_path, "nat", "lines", 4)


@pytest.mark.parametrize(
    ("mode", "kind", "version"),
    [
        ("nat", "duplex", 6),
        ("takeover", "download", 4),
        pytest.param("iptables", "duplex", 4, marks=needs_legacy),
    ],
)
def test_hops_by_other_redirects(lab: Lab, tmp_path: Path, mode: str, kind: str, version: int) -> None:
    with stage(lab, tmp_path, mode):
        hops(lab, tmp_path, mode, kind, version)


@contextmanager
def stage(lab: Lab, directory: Path, mode: str) -> Iterator[None]:
    """What a mode needs of a host: an address that it can do without, or the iptables that it speaks to."""
    with ExitStack() as stack:
        if mode == "takeover":
            give_service(lab)
            stack.callback(take_service, lab, "abc")
        if mode == "iptables":
            stack.enter_context(legacy_iptables(directory))
        yield


@pytest.mark.kernels("6.1", "6.12", "7.2")  # the User-Mode-Linux kernels have no nft fwd
def test_hops_by_forward(lab: Lab, tmp_path: Path) -> None:
    hops(lab, tmp_path, "forward", "lines", 4)


def hops(lab: Lab, tmp_path: Path, mode: str, kind: str, version: int) -> None:
    """kernel -> kernel -> repair -> kernel under load: every byte, and no RST on the wire."""
    engines = {"c": "repair"}  # the others find the module
    listen = SERVICE[version] if mode == "takeover" else ""
    with (
        daemons(lab, "abc", engines=engines, redirect={"devices": ["eth0"], "modes": [mode]}),
        service(lab, kind, "abc", tmp_path, version=version, listen=listen) as serving,
    ):
        assert [status(lab.host(name))["engine"] for name in "abc"] == ["kernel", "kernel", "repair"]
        for _turn in range(2):
            serving.client(*PATIENT.get(kind, CLIENTS[kind]))
        serving.connected(2)
        for source, target in ("ab", "bc", "ca"):
            pause()
            records = serving.move(source, target)
            assert {record["mode"] for record in records} == {mode}
            for record in records:
                assert record["engine"] == ("repair" if source == "c" else "kernel")
                exporter, importer = (engines.get(name, "kernel") for name in (source, target))
                check_fidelity(Fidelity(**record["fidelity"]), exporter, importer)
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
        output, _unused = process.communicate(timeout=300)
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


@pytest.mark.parametrize("engine", ["kernel", "repair"])
def test_listed_moves_on(lab: Lab, tmp_path: Path, engine: str) -> None:
    """What the module has captured waits at b, whatever b's engine is, and is an application's at c."""
    with (
        daemons(lab, "abc", engines={"b": engine}, redirect=NAT),
        service(lab, "lines", "a", tmp_path) as first,
    ):
        first.client(*LINES)
        first.connected(1)
        for source, target in ("ab", "bc"):
            [record] = drain(lab.host(source), target, local_port=7000)
            assert (record["outcome"], record["listed"]) == ("moved", True), record
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 0
        with service(lab, "lines", "c", tmp_path):
            until(lambda: status(lab.host("c"))["import_lists"]["connected"]["length"] == 0)
            pause(1.0)
            first.finish()


def test_nobody_offers(lab: Lab, tmp_path: Path) -> None:
    """What is not taken goes on as if nothing had happened; also when it is asked for while it is frozen."""
    with daemons(lab, "a", redirect=NAT), service(lab, "lines", "a", tmp_path) as serving:
        serving.client(*LINES)
        serving.connected(1)
        [answer] = ask(lab.host("a"), "list", filter={"local_port": 7000, "kinds": ["connected"]})
        [row] = answer["sockets"]
        one = {"pid": row["pid"], "fd": row["fd"]}
        [done] = ask(lab.host("a"), "export", sockets=[one], timeout_s=0.5)
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
