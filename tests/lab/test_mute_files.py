# SPDX-License-Identifier: MIT
"""A process has a file open whose file system answers no more: nothing of it holds the daemon up.

The file system is FUSE, served by hand as far as it takes to open one file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.host import Host
from lab.labs import Lab
from sockmi.engine.files import link_of
from tests.lab.scenario import ask, daemons, until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs FUSE (/dev/fuse)"),
    pytest.mark.timeout(60),
]

PATIENCE_S = 10
NOBODY = 65534
MORE_THREADS = 5  # of its executor, which come and stay
PROGRAM = """
import ctypes, json, os, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
device = os.open("/dev/fuse", os.O_RDWR)
where = sys.argv[1].encode()
options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"mute", where, b"fuse", 6, options):
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
INIT, LOOKUP, GETATTR, OPEN = 26, 1, 3, 14

def attributes(node):
    mode = 0o40755 if node == 1 else 0o100644
    return struct.pack("=6Q10I", node, *[0] * 5, *[0] * 3, mode, 1, *[0] * 5)

server = os.fork()
if not server:  # a process of its own: who waits for itself cannot be ended
    while True:
        request = os.read(device, 1 << 17)
        _, operation, unique, node = struct.unpack_from("=IIQQ", request)
        if operation == INIT:
            body = struct.pack("=4IHHIIHHI7I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 0, 0, 0, *[0] * 7)
        elif operation == LOOKUP:
            body = struct.pack("=4Q2I", 2, 0, 0, 0, 0, 0) + attributes(2)
        elif operation == GETATTR:
            body = struct.pack("=QII", 0, 0, 0) + attributes(node)
        else:
            body = struct.pack("=QII", 0, 0, 0)
        os.write(device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
        if operation == OPEN:
            break
    while True:
        signal.pause()
os.close(device)
print(server, flush=True)
opened = os.open(where + b"/file", os.O_RDWR)
libc.umount2(where, 2)  # nobody finds it any more; who has it open has it
ours = socket.create_connection((sys.argv[2], int(sys.argv[3])))
print(opened, ours.fileno(), flush=True)
os.setuid(int(sys.argv[5]))
for line in sys.stdin:
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.connect(sys.argv[4])
        socket.send_fds(daemon, [line.encode()], [opened] * json.loads(line)["fds"])
        print(daemon.makefile().readline().strip(), flush=True)
"""


@contextmanager
def program(host: Host, directory: Path, *words: str, uid: int = 0) -> Iterator[subprocess.Popen[str]]:
    with host.popen(
        [sys.executable, "-c", PROGRAM, str(directory), *words, str(host.control_socket), str(uid)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as process:  # fmt: skip
        assert process.stdout
        server = int(process.stdout.readline())
        try:
            yield process
        finally:
            os.kill(server, signal.SIGKILL)
            process.kill()


def test_nobody_waits_for_it(lab: Lab, tmp_path: Path) -> None:
    a, peer = lab.host("a"), lab.host("peer")
    with daemons(lab, "ab") as both, peer.socket() as listener:
        listener.bind((str(peer.address4), 0))
        listener.listen()
        address, port = listener.getsockname()[:2]
        with program(a, tmp_path, address, str(port)) as process:
            assert process.stdin and process.stdout
            mute, ours = (int(word) for word in process.stdout.readline().split())
            client = listener.accept()[0]
            sockets = [{"pid": process.pid, "fd": mute}]
            [answer] = ask(a, "export", sockets=sockets, to="b")
            [record] = answer["migrations"]
            assert record["refusal"]["code"] == "no-such-socket", record
            assert "is not a socket" in record["refusal"]["message"]
            request = {"op": "export", "id": 1, "fds": 1, "to": "b", "sockets": [{"descriptor": True}]}
            for _turn in range(3):
                process.stdin.write(json.dumps(request) + "\n")
                [record] = json.loads(process.stdout.readline())["migrations"]
                assert record["refusal"]["code"] == "not-tcp", record
            pid = both["a"].pid
            opened = [link_of(int(one.name), pid) for one in Path(f"/proc/{pid}/fd").iterdir()]
            assert not [link for link in opened if link.endswith("/file")]
            [answer] = ask(a, "export", sockets=[{"pid": process.pid, "fd": ours}], to="b")
            assert [one["outcome"] for one in answer["migrations"]] == ["moved"]
            client.close()


def test_their_number_is_bounded(lab: Lab, tmp_path: Path) -> None:
    """Each keeps a thread of the daemon: a user may have some, and others suffer nothing of it."""
    a, peer = lab.host("a"), lab.host("peer")
    request = {"op": "export", "id": 1, "fds": 1, "to": "b", "sockets": [{"descriptor": True}]}
    with daemons(lab, "ab", control_mode=0o666) as both, peer.socket() as listener:
        listener.bind((str(peer.address4), 0))
        listener.listen()
        words = (str(listener.getsockname()[0]), str(listener.getsockname()[1]))
        threads = Path(f"/proc/{both['a'].pid}/task")
        at_rest = len(list(threads.iterdir()))
        with program(a, tmp_path, *words, uid=NOBODY) as process:
            assert process.stdin and process.stdout
            _mute, ours = (int(word) for word in process.stdout.readline().split())
            answers = []
            for _turn in range(30):
                process.stdin.write(json.dumps(request) + "\n")
                answers.append(json.loads(process.stdout.readline()))
            whys = [one["migrations"][0]["refusal"] if one["ok"] else one["error"] for one in answers]
            codes = [why["code"] for why in whys]
            assert codes == ["not-tcp"] * 8 + ["bad-request"] * 22
            assert "file system (FUSE) does not answer" in whys[-1]["message"]
            assert len(list(threads.iterdir())) <= at_rest + 8 + MORE_THREADS
            process.stdin.write(json.dumps({"op": "status", "id": 2, "fds": 0}) + "\n")
            assert json.loads(process.stdout.readline())["ok"]
            [answer] = ask(a, "export", sockets=[{"pid": process.pid, "fd": ours}], to="b")
            assert [one["outcome"] for one in answer["migrations"]] == ["moved"]
        # Its server has been killed: the kernel answers in its place.
        until(lambda: len(list(threads.iterdir())) <= at_rest + MORE_THREADS)
