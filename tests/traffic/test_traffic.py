# SPDX-License-Identifier: MIT
"""The traffic: clean when the network is, and no planted fault goes unnoticed. Over loopback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.host import PROJECT
from lab.traffic import timeline
from lab.traffic.clients import CurlClient, DuplexClient, IdleClient, LineClient, Result
from lab.traffic.download import Download
from lab.traffic.duplex import Duplex, Terms
from lab.traffic.handover import Handed, Importer, Rendezvous, endpoint_text
from lab.traffic.lines import Lines
from lab.traffic.pattern import BLOCK_BYTES, Corruption, Pattern
from lab.traffic.server import KINDS, Server, listen
from lab.traffic.session import Session

HOSTS = {4: "127.0.0.1", 6: "::1"}


@contextlib.contextmanager
def serving(
    kind: type[Session], directory: Path, host: str = "127.0.0.1", port: int | None = 0
) -> Iterator[Server]:
    """A running server; with ``port`` None it does not listen."""
    listener = None if port is None else listen(host, port)
    server = Server(kind, listener, Rendezvous(directory))
    thread = server.in_thread()
    try:
        yield server
    finally:
        server.stop()
        thread.join(5)
        assert not thread.is_alive()


def end_of(server: Server) -> tuple[str, int]:
    """Where it listens."""
    assert server._listener is not None
    name = server._listener.getsockname()
    return name[0], name[1]


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def client_of(kind: type[Session], remote: tuple[str, int], **options: Any) -> Any:
    """A client that takes about half a second if it is not disturbed."""
    if kind is Duplex:
        return DuplexClient(
            remote, Terms(5, 400_000, 500_000, 1_000_000), pace=800_000, silence_s=5, **options
        )
    if kind is Lines:
        return LineClient(remote, lines=60, interval_s=0.008, silence_s=5, **options)
    digest = Pattern(6, "download").sha256(500_000)
    return CurlClient(remote, 500_000, digest, seed=6, pace=1_000_000, silence_s=5, **options)


# ---------------------------------------------------------------- the pattern


def test_pattern_is_the_same_however_it_is_read() -> None:
    pattern = Pattern(1, "x")
    whole = pattern.read(0, 3 * BLOCK_BYTES)
    chance = random.Random(1)  # noqa: S311
    for _turn in range(200):
        begin, end = sorted(chance.randrange(len(whole)) for _turn in range(2))
        assert pattern.read(begin, end - begin) == whole[begin:end]
        pattern.check(begin, whole[begin:end])
    assert Pattern(2, "x").read(0, 64) != Pattern(1, "x").read(0, 64) != Pattern(1, "y").read(0, 64)


def test_pattern_finds_every_fault() -> None:
    pattern = Pattern(1, "x")
    data = pattern.read(100, 1000)
    for at in range(0, 1000, 37):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(Corruption, match=f"byte {100 + at} is"):
            pattern.check(100, bytes(changed))
    with pytest.raises(Corruption, match="10 bytes later"):
        pattern.check(100, data[10:])
    with pytest.raises(Corruption, match="10 bytes earlier"):
        pattern.check(110, data)


# ---------------------------------------------------------------- undisturbed


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", KINDS.values())
def test_clean(kind: type[Session], version: int, tmp_path: Path) -> None:
    with serving(kind, tmp_path / "r", HOSTS[version]) as server:
        client = client_of(kind, end_of(server), timeline=tmp_path / "timeline")
        result: Result = client.run()
        assert result.ok, result.error
        until(lambda: server.counts.finished == 1)
        assert server.counts.failures == []
    track = timeline.read(tmp_path / "timeline")
    assert track.ok
    assert track.points[-1][1:] == (result.sent, result.received)
    assert track.longest_gap_us == result.longest_gap_us > 0
    assert track.local.startswith("[::1]:" if version == 6 else "127.0.0.1:")
    assert track.points == sorted(track.points)


def test_endless_until_stopped(tmp_path: Path) -> None:
    with serving(Duplex, tmp_path) as server:
        client = DuplexClient(end_of(server), Terms(9))
        threading.Timer(0.3, client.stop).start()
        result = client.run()
        assert result.ok, result.error
        assert min(result.sent, result.received) > 1_000_000
        until(lambda: server.counts.finished == 1)


def test_idle(tmp_path: Path) -> None:
    with serving(Lines, tmp_path) as server:
        result = IdleClient(end_of(server), idle_s=0.2).run()
        assert result.ok, result.error
        assert result.longest_gap_us > 200_000


def test_many_at_once(tmp_path: Path) -> None:
    with serving(Duplex, tmp_path) as server:
        results: list[Result] = []

        def one(seed: int) -> None:
            results.append(DuplexClient(end_of(server), Terms(seed, 100_000, 100_000)).run())

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.error for result in results] == [""] * 20
        until(lambda: server.counts.finished == 20)


# ---------------------------------------------------------------- planted faults

FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "flip": lambda byte: bytes([byte[0] ^ 0x10]),
    "drop": lambda _unused: b"",
    "double": lambda byte: byte * 2,
}


class Relay:
    """Between a client and a server; spoils the byte at ``at`` of one direction, or ends or resets there."""

    def __init__(self, target: tuple[str, int], to_client: bool, at: int, fault: str) -> None:
        self.target, self.to_client, self.at, self.fault = target, to_client, at, fault
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.end = self.listener.getsockname()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client, _unused = self.listener.accept()
        self.listener.close()
        server = socket.create_connection(self.target)
        with client, server:
            pairs = ((client, server, not self.to_client), (server, client, self.to_client))
            threads = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in pairs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _pump(self, source: socket.socket, target: socket.socket, spoil: bool) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                here = self.at - count
                count += len(data)
                if spoil and 0 <= here < len(data):
                    if self.fault == "end":
                        target.sendall(data[:here])
                        break
                    if self.fault == "reset":
                        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        target.shutdown(socket.SHUT_RD)  # wakes the other thread, which holds it open
                        target.close()
                        source.close()
                        return
                    data = data[:here] + FAULTS[self.fault](data[here : here + 1]) + data[here + 1 :]
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("fault", [*FAULTS, "end", "reset"])
@pytest.mark.parametrize(
    ("kind", "to_client", "at"),
    [
        (Duplex, True, 0),
        (Duplex, True, 123_456),
        (Duplex, True, 500_015),  # the last byte of the trailer
        (Duplex, False, 11),  # in the header: the seed
        (Duplex, False, 200_000),
        (Lines, True, 500),
        (Lines, False, 500),
        (Download, True, 300_000),
        (Download, True, 500_070),
    ],
)
def test_planted_fault_is_found(
    kind: type[Session], to_client: bool, at: int, fault: str, tmp_path: Path
) -> None:
    with serving(kind, tmp_path / "r") as server:
        relay = Relay(end_of(server), to_client, at, fault)
        options: dict[str, Any] = {"timeline": tmp_path / "timeline"}
        client = client_of(kind, relay.end, **options)
        client.silence_s = 1.0
        result: Result = client.run()
        if result.ok:
            until(lambda: bool(server.counts.failures))
        track = timeline.read(tmp_path / "timeline")
        assert track.ok == result.ok
        assert track.error == result.error


# ---------------------------------------------------------------- handing over


@pytest.mark.parametrize("kind", KINDS.values())
def test_handed_over_with_context_again_and_again(kind: type[Session], tmp_path: Path) -> None:
    with (
        serving(kind, tmp_path / "r") as first,
        serving(kind, tmp_path / "r", port=None) as second,
    ):
        client = client_of(kind, end_of(first))
        results: list[Result] = []
        running = threading.Thread(target=lambda: results.append(client.run()))
        running.start()
        until(lambda: first.counts.accepted == 1)
        here, there, hops = first, second, 0
        while running.is_alive():

            def export(handed: Sequence[Handed], to: Server = there) -> list[str]:
                for connection, context in handed:
                    to.adopt(connection.dup(), context)
                return [""] * len(handed)

            before = here.counts.moved_away
            here.hand_over(export)
            until(lambda now=here, count=before: now.counts.moved_away > count or not running.is_alive())  # type: ignore[misc]
            here, there, hops = there, here, hops + 1
            time.sleep(0.01)
        assert results[0].ok, results[0].error
        assert hops > 5
        assert first.counts.failures == second.counts.failures == []


class Taken(socket.socket):
    """A descriptor whose connection can be taken away, as a passive export does it."""

    taken = False

    def recv(self, *arguments: Any) -> bytes:
        self._guard()
        return super().recv(*arguments)

    def send(self, *arguments: Any) -> int:
        self._guard()
        return super().send(*arguments)

    def _guard(self) -> None:
        if self.taken:
            raise OSError(errno.ECONNABORTED, "taken")


@pytest.mark.parametrize("kind", KINDS.values())
def test_taken_away_and_found_by_rendezvous(kind: type[Session], tmp_path: Path) -> None:
    arrivals: list[Handed] = []

    def wait(_timeout_s: float) -> list[Handed]:
        time.sleep(0.001)
        taken, arrivals[:] = arrivals[:], []
        return taken

    with (
        serving(kind, tmp_path / "r", port=None) as first,
        serving(kind, tmp_path / "r", port=None) as second,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        importer = Importer(wait, second.rendezvous, second.adopt, second.failed)
        client = client_of(kind, listener.getsockname())
        results: list[Result] = []
        running = threading.Thread(target=lambda: results.append(client.run()))
        running.start()
        connection = Taken(fileno=listener.accept()[0].detach())
        first.adopt(connection, b"")
        time.sleep(0.1)
        duplicate = socket.socket(fileno=connection.dup().detach())
        connection.taken = True
        arrivals.append((duplicate, b""))
        running.join(15)
        importer.stop()
        assert results[0].ok, results[0].error
        assert first.counts.moved_away == 1
        assert second.counts.adopted == 1
        assert first.counts.failures == second.counts.failures == []
        assert list((tmp_path / "r").iterdir()) == []


def test_refused_hand_over_goes_on(tmp_path: Path) -> None:
    with serving(Duplex, tmp_path) as server:
        client = client_of(Duplex, end_of(server))
        threading.Timer(
            0.1, lambda: server.hand_over(lambda handed: ["no-offer: nobody"] * len(handed))
        ).start()
        result = client.run()
        assert result.ok, result.error
        until(lambda: server.counts.finished == 1)
        assert len(server.counts.failures) == 1
        assert "no-offer: nobody" in server.counts.failures[0]


def test_importer_survives_what_cannot_be_adopted(tmp_path: Path) -> None:
    failures: list[str] = []
    left, right = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = socket.create_connection(listener.getsockname())
        accepted = listener.accept()[0]
    calls: Iterator[OSError | list[Handed]] = iter(
        [OSError(errno.ECONNREFUSED, "no daemon"), [(left, b"")], [(accepted, b"context")]]
    )

    def wait(_timeout_s: float) -> list[Handed]:
        answer: OSError | list[Handed] = next(calls, [])
        if isinstance(answer, OSError):
            raise answer
        time.sleep(0.001)
        return answer

    delivered: list[Handed] = []
    importer = Importer(wait, Rendezvous(tmp_path), lambda *handed: delivered.append(handed), failures.append)
    until(lambda: len(delivered) == 1)
    importer.stop()
    assert "no daemon" in failures[0]
    assert len(failures) == 2
    for opened in (left, right, connection, accepted):
        opened.close()


def test_rendezvous(tmp_path: Path) -> None:
    place = Rendezvous(tmp_path / "r")
    with pytest.raises(TimeoutError, match="no context for"):
        place.take("10.0.0.1:5", timeout_s=0.01)
    threading.Timer(0.05, place.put, ("10.0.0.1:5", b"state")).start()
    assert place.take("10.0.0.1:5", timeout_s=5) == b"state"
    place.put("[::1]:5", b"old")
    place.forget("[::1]:5")
    with pytest.raises(TimeoutError):
        place.take("[::1]:5", timeout_s=0)


@pytest.mark.parametrize("context", [b"{}", b"not json", b'{"kind": "lines", "sent": 0, "received": 0}'])
def test_bad_context_is_refused(context: bytes, tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right, serving(Duplex, tmp_path, port=None) as server:
        server.adopt(left, context)
        until(lambda: bool(server.counts.failures))
        assert "cannot go on" in server.counts.failures[0]
        assert server.counts.adopted == 0


def test_endpoint_text() -> None:
    assert endpoint_text(("::ffff:10.0.0.1", 5, 0, 0)) == "10.0.0.1:5"
    assert endpoint_text(("fd77::1", 5, 0, 0)) == "[fd77::1]:5"


# ---------------------------------------------------------------- the HTTP server and the line server


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /download HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /download?bytes=many HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /download?bytes=-1 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 9000, b"431"),
        (b"GET /download?bytes=0 HTTP/1.1\r\n\r\n", b"200"),
    ],
)
def test_http_answers(request_: bytes, status: bytes, tmp_path: Path) -> None:
    with serving(Download, tmp_path) as server, socket.create_connection(end_of(server), 5) as connection:
        connection.sendall(request_)
        answer = b""
        while data := connection.recv(4096):
            answer += data
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert server.counts.failures == []


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"hello\n", b"error: begin with NAME and your name\n"),
        (b"NAME x\n" + b"y" * 5000, b"hello x\nerror: this line is too long\n"),
        (b"NAME x\none\ntwo\nQUIT\nthree\n", b"hello x\nx 1 one\nx 2 two\nbye x 2\n"),
    ],
)
def test_line_answers(said: bytes, answer: bytes, tmp_path: Path) -> None:
    with serving(Lines, tmp_path) as server, socket.create_connection(end_of(server), 5) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ConnectionResetError):  # what was not read is reset
            while data := connection.recv(4096):
                heard += data
        assert heard == answer


# ---------------------------------------------------------------- the command line


def traffic(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """``python -m lab.traffic``."""
    command = [sys.executable, "-m", "lab.traffic", *map(str, words)]
    options |= {"env": os.environ | {"PYTHONPATH": f"{PROJECT / 'daemon'}"}}
    return subprocess.Popen(
        command, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_programs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = traffic("serve", "duplex", "--listen", "127.0.0.1", "--port", port, "--rendezvous", tmp_path)
    with server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            client = traffic("duplex", "127.0.0.1", port, "--timeline", tmp_path / "timeline")
            with client:
                until(lambda: (tmp_path / "timeline").exists() and (tmp_path / "timeline").stat().st_size > 0)
                time.sleep(0.3)
                client.send_signal(signal.SIGTERM)
                out, _unused = client.communicate(timeout=20)
            assert client.returncode == 0, out
            assert json.loads(out)["received"] > 0
            server.send_signal(signal.SIGTERM)
            out, _unused = server.communicate(timeout=20)
            assert server.returncode == 0
            assert json.loads(out)["finished"] == 1
        finally:
            server.kill()


def test_adopted_descriptor(tmp_path: Path) -> None:
    context = tmp_path / "context"
    state = {"kind": "lines", "sent": 0, "received": 0, "incoming": "", "outgoing": "", "ending": False}
    context.write_text(json.dumps(state | {"name": "alice", "count": 41}))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname(), 5)
        right = listener.accept()[0]
    fd = right.fileno()
    words: list[str | Path] = [
        "serve",
        "lines",
        "--port",
        "1",
        "--rendezvous",
        tmp_path,
        "--adopt",
        str(fd),
        "--context",
        context,
    ]
    with left, traffic(*words, pass_fds=[fd]) as server:
        right.close()
        left.sendall(b"answer\n")
        assert left.recv(100) == b"alice 42 answer\n"
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "required"),
        (["serve", "nothing", "--port", "1", "--rendezvous", "r"], 2, "invalid choice"),
        (["duplex", "127.0.0.1", "-1"], 2, ""),
        (
            ["serve", "lines", "--listen", "192.0.2.77", "--port", "5", "--rendezvous", "DIR"],
            1,
            "192.0.2.77 port 5",
        ),
    ],
)
def test_bad_usage(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    program = traffic(*(str(tmp_path) if word == "DIR" else word for word in words))
    _unused, errors = program.communicate(timeout=20)
    assert program.returncode == code, errors
    assert message in errors
    assert "Traceback" not in errors


def test_client_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = LineClient(("127.0.0.1", port)).run()
    assert "ConnectionRefused" in result.error


# ---------------------------------------------------------------- timelines


def test_timeline_keeps_both_ends_of_gaps(tmp_path: Path) -> None:
    line = timeline.Timeline(tmp_path / "t", "kind", "name")
    line.connected("1.1.1.1:1", "2.2.2.2:2")
    for count in range(1, 2000):
        line.progress(count, count)
    time.sleep(0.05)
    line.progress(1999, 2000)
    line.progress(1999, 2001)
    line.finish()
    track = timeline.read(tmp_path / "t")
    assert 50_000 <= line.longest_gap_us < 5_000_000
    assert abs(track.gap_us(track.started_at, track.ended_at or 0) - line.longest_gap_us) <= 2
    assert track.points[-1][1:] == (1999, 2001)
    assert len(track.points) < 1000


def test_timeline_of_a_killed_client(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text('{"kind":"k","name":"n","started_at":1,"started_ns":5}\n{"local":"a","remo')
    track = timeline.read(path)
    assert (track.ok, track.error) == (False, "the client did not end")


@pytest.mark.parametrize(
    "text",
    ["", "x", '{"a": 1}\n{"b": 2}\n', '{"kind":"k","name":"n","started_at":1,"started_ns":5}\n[]\n{}\n'],
)
def test_not_a_timeline(text: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError, match="t"):
        timeline.read(tmp_path / "t")


def test_it_runs_where_nothing_else_of_this_project_is(tmp_path: Path) -> None:
    """As on the machines of Molecule: from an archive of its own."""
    archive = tmp_path / "traffic.zip"
    packer = PROJECT / "molecule/resources/files/pack_traffic.py"
    subprocess.run([sys.executable, packer, archive], check=True, timeout=30)
    words, alone = [sys.executable, "-S", "-m", "lab.traffic", "--help"], {"PYTHONPATH": str(archive)}
    done = subprocess.run(
        words, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
