# SPDX-License-Identifier: MIT
"""A connection that is joined to pipes."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sockmi.cli.relay import relay

MIB = 1 << 20


@dataclass
class Joined:
    """A relay that runs: the peer's end, and what is beyond its input and output."""

    peer: socket.socket
    stdin: int
    stdout: int
    thread: threading.Thread


@pytest.fixture
def joined() -> Iterator[Joined]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as peer:
        for one in (listener, peer):  # soon full
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        peer.connect(listener.getsockname())
        here, _unused = listener.accept()
        yield from joined_to(here, peer)


def joined_to(here: socket.socket, peer: socket.socket) -> Iterator[Joined]:
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    def run() -> None:
        with here:
            relay(here, in_read, out_write)
        os.close(in_read)
        os.close(out_write)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield Joined(peer, in_write, out_read, thread)
    os.close(out_read)


def read_all(fd: int) -> bytes:
    content = b""
    while piece := os.read(fd, MIB):
        content += piece
    return content


def write_all(fd: int, content: bytes) -> None:
    while content:
        content = content[os.write(fd, content) :]
    os.close(fd)


def ends(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(60)
    return not any(thread.is_alive() for thread in threads)


def test_a_peer_that_sends_back_before_it_reads_on(joined: Joined) -> None:
    """More than it was sent: both ways are full, and go on."""
    sent = os.urandom(2 * MIB)
    got: list[bytes] = []

    def echo() -> None:
        while piece := joined.peer.recv(65536):
            joined.peer.sendall(3 * piece)
        joined.peer.shutdown(socket.SHUT_WR)

    threads = [
        threading.Thread(target=echo, daemon=True),
        threading.Thread(target=write_all, args=(joined.stdin, sent), daemon=True),
        threading.Thread(target=lambda: got.append(read_all(joined.stdout)), daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert ends(*threads, joined.thread)
    assert len(got[0]) == 3 * len(sent)


def test_a_program_behind_the_pipes_that_answers_before_it_reads_on(joined: Joined) -> None:
    sent = os.urandom(MIB)
    got: list[bytes] = []

    def program() -> None:
        while piece := os.read(joined.stdout, 65536):
            while piece:
                piece = piece[os.write(joined.stdin, piece) :]
        os.close(joined.stdin)

    def collect() -> None:
        content = b""
        while len(content) < len(sent):
            content += joined.peer.recv(MIB)
        got.append(content)
        joined.peer.shutdown(socket.SHUT_WR)

    threads = [
        threading.Thread(target=program, daemon=True),
        threading.Thread(target=collect, daemon=True),
        threading.Thread(target=joined.peer.sendall, args=(sent,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert ends(*threads, joined.thread)
    assert got == [sent]


def test_what_has_been_read_is_sent_though_the_peer_sends_no_more(joined: Joined) -> None:
    joined.peer.sendall(b"the last word")
    sent = os.urandom(60000)
    os.write(joined.stdin, sent)
    got = b""
    while len(got) < len(sent):
        got += joined.peer.recv(65536)
    joined.peer.shutdown(socket.SHUT_WR)
    assert ends(joined.thread)
    assert got == sent
    assert read_all(joined.stdout) == b"the last word"
    os.close(joined.stdin)


def test_what_has_come_is_delivered_though_the_peer_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        here, _unused = listener.accept()
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    fcntl.fcntl(out_write, fcntl.F_SETPIPE_SZ, 4096)
    broken: list[OSError] = []

    def run() -> None:
        try:
            relay(here, in_read, out_write)
        except OSError as error:
            broken.append(error)
        os.close(out_write)

    content = os.urandom(20_000)
    peer.sendall(content)
    while select.select([here], [], [], 0)[0] == []:
        pass
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    got = os.read(out_read, 4096)  # so all of it has been taken from the connection
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    os.write(in_write, b"too late")
    while select.select([in_read], [], [], 0)[0]:
        pass
    assert got + read_all(out_read) == content
    thread.join(10)
    assert broken
    here.close()
    for fd in (in_read, in_write, out_read):
        os.close(fd)
