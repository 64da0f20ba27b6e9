# SPDX-License-Identifier: MIT
"""What a connection had not sent, and its FIN, arrive whatever dies while its copy comes to life.

The peer does not read before the move and the crash are over, so that most of what was written cannot
have been sent. Whoever gets the connection on b, in the first call that succeeds, says one thing more.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from lab.capture import Capture
from lab.labs import Lab
from tests.lab.client_callers import ROOT
from tests.lab.crash_lab import Cluster, cluster, elements
from tests.lab.scenario import status, until
from tests.laws import clean

pytestmark = pytest.mark.timeout(120)

TIMEOUT_S = 20.0
PORT = 7500
LAST_WORD = b"the end"
#: Writes until nothing goes any more, closes its half if it is told to, and waits.
SERVER = """
import hashlib, socket, sys
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
connection, _ = listener.accept()
listener.close()
connection.settimeout(0.5)
sum, count, part = hashlib.sha256(), 0, 0
try:
    while True:
        data = b"%08d" % part * 512
        sent = connection.send(data)
        sum.update(data[:sent])
        count, part = count + sent, part + 1
except TimeoutError:
    pass
if sys.argv[2] == "closed":
    connection.shutdown(socket.SHUT_WR)
print(count, sum.hexdigest(), flush=True)
sys.stdin.read()
"""
#: Imports, again after an error, and says its last word if it may still speak.
CLIENT = """
import socket, sys, time
from tests.lab.client_callers import CALLERS
form, closed = CALLERS[sys.argv[1]](), sys.argv[2] == "closed"
print("ready", flush=True)
until = time.monotonic() + 30
while True:
    target = socket.socket(int(sys.argv[3]))
    try:
        [got] = form.take([{"fd": target.fileno(), "states": ["connected"]}], 20)
        break
    except OSError as error:
        assert time.monotonic() < until, error
        time.sleep(0.1)
connection = socket.socket(fileno=got.fd)
if connection.fileno() == target.fileno():
    target.detach()
print("taken", flush=True)
if not closed:
    connection.settimeout(20)
    connection.sendall(b"the end")
    connection.shutdown(socket.SHUT_WR)
sys.stdin.read()
"""


@dataclass(slots=True)
class Talk:
    """A connection whose peer has not read yet."""

    peer: socket.socket
    count: int
    sum: str
    client: subprocess.Popen[str]

    def heard(self, last: bytes) -> None:
        """The peer reads to the end: all that was written on a, then ``last``."""
        sum_, count, rest = hashlib.sha256(), 0, b""
        while data := self.peer.recv(1 << 16):
            mine = data[: self.count - count]
            sum_.update(mine)
            count += len(mine)
            rest += data[len(mine) :]
        assert (count, sum_.hexdigest(), rest) == (self.count, self.sum, last)


def said(stream: IO[str] | None) -> str:
    """One line of a program."""
    assert stream is not None
    return stream.readline()


@contextlib.contextmanager
def talk(lab: Lab, directory: Path, version: int, form: str, half: str) -> Iterator[Talk]:
    """Server on a, client on b, and the wire, which must show nothing wrong."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    importing = [sys.executable, "-c", CLIENT, form, half, str(int(family))]
    with (
        Capture(lab.host("peer"), f"tcp port {PORT}", directory / "peer.pcap") as capture,
        lab.host("a").popen([sys.executable, "-c", SERVER, str(PORT), half], **pipes) as server,
        lab.host("b").popen(importing, cwd=ROOT, **pipes) as client,
        lab.host("peer").socket(family) as peer,
    ):
        try:
            assert said(server.stdout) == said(client.stdout) == "ready\n"
            peer.settimeout(TIMEOUT_S)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            peer.connect((lab.host("a").address(version), PORT))
            count, sum_ = said(server.stdout).split()
            until(lambda: status(lab.host("b"))["import_lists"]["connected"]["waiting"] == 1)
            yield Talk(peer, int(count), sum_, client)
        finally:
            server.kill()
            client.kill()
    verdict = capture.check()
    clean(verdict)


def dies(daemons: Cluster) -> None:
    """Drain a; b's daemon is killed, and comes back."""
    daemons.drain("a", "b", PORT)
    daemons.died("b")
    daemons.restart_dead()


@pytest.mark.parametrize("half", ["open", "closed"])
@pytest.mark.parametrize(("form", "version"), [("C", 4), ("Python", 6)])
@pytest.mark.parametrize("point", ["restore.open", "alive.hearing", "alive.begun", "taken.activated"])
def test_the_importer_dies(  # noqa: PLR0917
    lab: Lab, tmp_path: Path, point: str, form: str, half: str, version: int
) -> None:
    """Wherever in restore and activation: the peer gets every byte, and the FIN after them."""
    with (
        cluster(lab, "ab", {"b": point}) as daemons,
        talk(lab, tmp_path, version, form, half) as connection,
    ):
        dies(daemons)
        if point == "restore.open":  # nothing was promised, and nothing remains of the copy
            records = [one for drain in daemons.drains for one in drain.ended() or ()]
            # If b was back before the batch's time was over, it has been asked once more, and has it.
            if not any(one["outcome"] == "moved" for one in records):
                assert not [one for one in elements(lab.host("b")) if one.name == "hold"]
                daemons.drain("a", "b", PORT).ended()
        assert said(connection.client.stdout) == "taken\n"
        connection.heard(b"" if half == "closed" else LAST_WORD)
