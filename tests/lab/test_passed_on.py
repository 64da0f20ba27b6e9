# SPDX-License-Identifier: MIT
"""A descriptor that is passed on between the request and the freeze: whose socket is it, and is it closed?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from lab.host import Host
from lab.labs import Lab
from sockmi.engine.base import Kind
from sockmi.engine.owners import Owners
from sockmi.exporting.descriptors import Descriptors
from tests.lab.scenario import ask, daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PORT = 7778
BOUND_PORT = 7779
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])
NOBODY = 65534

# A user asks for the export of his connection, and then passes it to a process of root.
GIVES = f"""
import os, socket, sys
root, user = socket.socketpair()
if os.fork() == 0:
    root.close()
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
    mine = socket.create_connection((sys.argv[1], {PORT}))
    daemon = socket.socket(socket.AF_UNIX)
    daemon.connect(sys.argv[2])
    item = f'"pid":{{os.getpid()}},"fd":{{mine.fileno()}},"descriptor":true'
    request = '{{"op":"export","id":1,"fds":1,"timeout_s":20,"to":"b","sockets":[{{' + item + "}}]}}\\n"
    socket.send_fds(daemon, [request.encode()], [mine.fileno()])
    print("asked", flush=True)
    sys.stdin.readline()
    socket.send_fds(user, [b"x"], [mine.fileno()])
    if sys.argv[3] == "closes":
        mine.close()
    user.recv(1)
    print("passed", flush=True)
    print(daemon.makefile().readline().strip(), flush=True)
    os._exit(0)
user.close()
root_has = socket.socket(fileno=socket.recv_fds(root, 1, 1)[1][0])
root.send(b"y")
os.wait()
root_has.send(b"of root")
"""

# Passes its connection to itself: between the two lines nobody has it.
SENDS = f"""
import socket, sys
listener = socket.create_server((sys.argv[1], {PORT}))
print("ready", flush=True)
mine = listener.accept()[0]
listener.close()
print("accepted", flush=True)
here, there = socket.socketpair()
sys.stdin.readline()
socket.send_fds(here, [b"x"], [mine.fileno()])
mine.close()
print("on its way", flush=True)
sys.stdin.readline()
socket.socket(fileno=socket.recv_fds(there, 1, 1)[1][0]).send(b"still here")
sys.stdin.readline()
"""

# The same with a socket that is only bound.
SENDS_BOUND = f"""
import socket, sys
mine = socket.socket()
mine.bind((sys.argv[1], {BOUND_PORT}))
print("ready", flush=True)
here, there = socket.socketpair()
sys.stdin.readline()
socket.send_fds(here, [b"x"], [mine.fileno()])
mine.close()
print("on its way", flush=True)
sys.stdin.readline()
print(socket.socket(fileno=socket.recv_fds(there, 1, 1)[1][0]).getsockname()[1], flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def program(host: Host, text: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """One that is told to go on by lines, and says how far it is."""
    with host.popen(
        [sys.executable, "-c", text, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")


@contextlib.contextmanager
def no_importer(pid: int) -> Iterator[None]:
    """The only one sleeps meanwhile: what is asked for waits."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def waits(host: Host) -> bool:
    """Whether what was asked for has passed all that is looked at before it is frozen."""
    [answer] = ask(host, "info")
    return [one["step"] for one in answer["migrations"]] == ["requested"]


@pytest.mark.parametrize("own", ["closes", "keeps"])
def test_what_root_has_got_is_not_a_users_to_move(lab: Lab, own: str) -> None:
    with daemons(lab, "ab", control_mode=0o666) as running, lab.host("peer").socket() as listener:
        host, peer = lab.host("a"), lab.host("peer")
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((peer.address(4), PORT))
        listener.listen()
        assert running["b"].pid is not None
        words = [peer.address(4), str(host.control_socket), own]
        with no_importer(running["b"].pid), program(host, GIVES, *words) as process:
            assert says(process) == "asked"
            until(lambda: waits(host))
            go_on(process)
            assert says(process) == "passed"
            os.kill(running["b"].pid, signal.SIGCONT)
            [record] = json.loads(says(process))["migrations"]
            assert (record["outcome"], record["refusal"]["code"]) == ("refused", "no-privilege")
            assert record["step"] == "requested"
            with listener.accept()[0] as connection:
                connection.settimeout(10)
                assert connection.recv(100) == b"of root"


def test_what_nobody_has_for_a_moment_is_not_closed(lab: Lab) -> None:
    with daemons(lab, "ab") as running, lab.host("peer").socket() as client, ThreadPoolExecutor(1) as thread:
        host = lab.host("a")
        assert running["b"].pid is not None
        with program(host, SENDS, host.address(4)) as process:
            assert says(process) == "ready"
            client.connect((host.address(4), PORT))
            client.settimeout(10)
            assert says(process) == "accepted"
            wanted = {"local_port": PORT, "kinds": ["connected"]}
            with no_importer(running["b"].pid):
                drain = thread.submit(lambda: ask(host, "drain", filter=wanted, to="b", timeout_s=20))
                until(lambda: waits(host))
                go_on(process)
                assert says(process) == "on its way"
            lines = drain.result(40)
            progress = lines[-1]["progress"]
            assert (progress["selected"], progress["closed"], progress["refused"] + progress["aborted"]) == (
                1,
                0,
                1,
            )
            [record] = [one for line in lines for one in line["migrations"]]
            assert record["refusal"]["code"] == "changed"
            go_on(process)
            assert client.recv(100) == b"still here"


@pytest.mark.parametrize("kind", [Kind.LISTENING, Kind.BOUND])
def test_one_without_a_peer_that_nobody_has_for_a_moment_is_known(kind: Kind) -> None:
    here, there = socket.socketpair()
    with here, there, socket.socket() as passed:
        passed.bind(("127.0.0.1", 0))
        if kind is Kind.LISTENING:
            passed.listen()
        elif KERNEL < (6, 8):
            pytest.skip("before Linux 6.8 the kernel lists no socket that is only bound")
        lost = SimpleNamespace(inode=os.fstat(passed.fileno()).st_ino, kind=kind, tuple=None)
        socket.send_fds(here, [b"x"], [passed.fileno()])
        passed.close()
        descriptors = Descriptors(Owners(), lambda _unused: None)
        assert descriptors.passed_on([lost]) == [True]
        os.close(socket.recv_fds(there, 1, 1)[1][0])
        assert descriptors.passed_on([lost]) == [False]


@pytest.mark.skipif(KERNEL < (6, 8), reason="before Linux 6.8 the kernel lists no socket that is only bound")
def test_a_bound_one_that_is_on_its_way_is_not_closed(lab: Lab) -> None:
    with daemons(lab, "ab") as running, ThreadPoolExecutor(1) as thread:
        host = lab.host("a")
        assert running["b"].pid is not None
        with program(host, SENDS_BOUND, host.address(4)) as process:
            assert says(process) == "ready"
            wanted = {"local_port": BOUND_PORT, "kinds": ["bound"]}
            with no_importer(running["b"].pid):
                drain = thread.submit(lambda: ask(host, "drain", filter=wanted, to="b", timeout_s=20))
                until(lambda: waits(host))
                go_on(process)
                assert says(process) == "on its way"
            lines = drain.result(40)
            progress = lines[-1]["progress"]
            assert (progress["selected"], progress["closed"]) == (1, 0)
            [record] = [one for line in lines for one in line["migrations"]]
            assert record["refusal"]["code"] == "changed"
            go_on(process)
            assert says(process) == str(BOUND_PORT)
