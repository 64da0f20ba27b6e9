# SPDX-License-Identifier: MIT
"""An unmodified nginx drains its idle connections to another, which accepts them as if they were new."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.paths import PROJECT
from lab.host import Host
from lab.labs import Lab
from lab.plan import PATIENCE
from tests.lab.scenario import daemons, drain, status, until

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
REDIRECT = {"devices": ["eth0"], "modes": ["nat"]}
PORT, CONNECTIONS, REQUESTS = 8080, 10, 60
NGINX = """
daemon off;
master_process on;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log off;
    keepalive_timeout 3600;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {port}{options};
        location / {{ return 200 "{name}\\n"; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(host: Host, directory: Path, options: str = "") -> Iterator[None]:
    """As its package has it, but for where it keeps its files; its answers are the host's name."""
    own = directory / f"nginx-{host.name}"
    own.mkdir(exist_ok=True)
    file = own / "nginx.conf"
    file.write_text(NGINX.format(directory=own, port=PORT, options=options, name=host.name))
    command = ["/usr/sbin/nginx", "-e", own / "start.log", "-c", file]
    process = host.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: bool(host.run(["ss", "-Hltn", f"sport = :{PORT}"]).stdout.strip()))
        yield
    finally:
        process.terminate()
        process.wait(30)


def moved(host: Host, idle_s: float) -> Counter[str]:
    """Outcomes of one drain of what is idle."""
    return Counter(record["outcome"] for record in drain(host, "b", local_port=PORT, idle_s=idle_s))


def length(host: Host) -> int:
    return int(status(host)["import_lists"]["connected"]["length"])


def clients(lab: Lab, connections: int, pause_s: float) -> subprocess.Popen[str]:
    program = [sys.executable, PROJECT / "tests/lab/keepalive.py"]
    words = [str(lab.host("a").address4), str(PORT), str(connections), str(pause_s)]
    return lab.host("peer").popen(
        [*program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _unused = process.communicate("", timeout=30 * PATIENCE)
    told: dict[str, Any] = json.loads(output)
    assert told["errors"] == []
    return told


def drained(host: Host, count: int) -> Counter[str]:
    """Outcomes of drains of what is idle, until ``count`` have moved."""
    outcomes: Counter[str] = Counter()

    def all_moved() -> bool:
        outcomes.update(moved(host, 0.2))
        return outcomes["moved"] >= count

    until(all_moved)
    return outcomes


def test_idle_connections_of_nginx_drain_to_another(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    url = f"http://{a.address4}:{PORT}/[1-{REQUESTS}]"
    curl = ["curl", "-s", "--rate", "60/m", "-w", "%{http_code} %{num_connects} ", url]
    with (
        daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}),
        nginx(a, tmp_path),
        nginx(b, tmp_path),
    ):
        browsers = clients(lab, CONNECTIONS, 1.0)
        curls = peer.popen(curl, stdout=subprocess.PIPE, text=True)
        time.sleep(3)
        outcomes = drained(a, CONNECTIONS + 1)
        until(lambda: length(b) == 0)
        time.sleep(5)
        told = ended(browsers)
        lines, _unused = curls.communicate(timeout=30 * PATIENCE)
        assert outcomes["moved"] == CONNECTIONS + 1, outcomes
        assert told["last"] == {"b": CONNECTIONS}, told
        assert told["answers"]["a"] and told["answers"]["b"] >= CONNECTIONS
        # One connection for all of curl's requests, each of them answered, by one server and then the other.
        words = lines.split()
        assert words[1::3] == ["200"] * REQUESTS
        assert words[2::3] == ["1"] + ["0"] * (REQUESTS - 1)
        assert sorted(words[0::3]) == words[0::3] and set(words[0::3]) == {"a", "b"}


def test_what_nobody_listens_for_waits_in_the_list(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    a, b = lab.host("a"), lab.host("b")
    with daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}), nginx(a, tmp_path):
        browsers = clients(lab, 3, 2.0)
        time.sleep(1)
        drained(a, 3)
        assert length(b) == 3
        with nginx(b, tmp_path, " deferred reuseport"):
            until(lambda: length(b) == 0)
            time.sleep(5)
            assert ended(browsers)["last"] == {"b": 3}


def test_a_listener_at_a_device_gets_what_comes_by_it(lab: Lab) -> None:
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    with (
        daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}),
        a.socket() as before,
        b.socket() as after,
        peer.socket() as client,
    ):
        before.bind((a.address(4), 0))
        port = before.getsockname()[1]
        after.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        after.bind(("", port))
        for each in (before, after, client):
            each.settimeout(60 * PATIENCE)
        before.listen()
        after.listen()
        client.connect(before.getsockname())
        ours, _unused = before.accept()
        with ours:
            [record] = drain(a, "b", local_port=port, kinds=["connected"])
        assert record["outcome"] == "moved", record
        heir, name = after.accept()
        with heir:
            assert name == client.getsockname()
            heir.sendall(b"hello")
            assert client.recv(5, socket.MSG_WAITALL) == b"hello"
            client.sendall(b"welcome")
            assert heir.recv(7, socket.MSG_WAITALL) == b"welcome"


def test_a_busy_connection_is_not_idle(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}), nginx(lab.host("a"), tmp_path):
        browsers = clients(lab, 2, 0.2)
        time.sleep(2)
        for _turn in range(5):
            assert not moved(lab.host("a"), 20.0)
        ended(browsers)
