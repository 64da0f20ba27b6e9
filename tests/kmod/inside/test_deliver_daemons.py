# SPDX-License-Identifier: MIT
"""An unmodified nginx drains its idle connections to another, which accepts them as if they were new."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.paths import PROJECT
from lab.host import Host
from lab.labs import Lab
from lab.plan import PATIENCE
from tests.lab.scenario import daemons, drain, status, until

pytestmark = pytest.mark.timeout(900)
REDIRECT = {"devices": ["eth0"], "modes": ["nat"]}
PORT, CONNECTIONS = 8080, 20
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


@pytest.fixture(scope="module")
def lab(kernel: str) -> Iterator[Lab]:
    with Lab(f"d{kernel.replace('.', '')}") as made:
        yield made


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


def test_idle_connections_of_nginx_drain_to_another(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    seconds = 25 * PATIENCE
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    program = [sys.executable, PROJECT / "tests/lab/keepalive.py"]
    words = [str(a.address4), str(PORT), str(CONNECTIONS), str(seconds), "1.0"]
    url = f"http://{a.address4}:{PORT}/[1-{int(seconds)}]"
    curl = ["curl", "-s", "--rate", "60/m", "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\\n", url]
    with (
        daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}),
        nginx(a, tmp_path),
        nginx(b, tmp_path),
    ):
        clients = peer.popen([*program, *words], stdout=subprocess.PIPE, text=True)
        curls = peer.popen(curl, stdout=subprocess.PIPE, text=True)
        time.sleep(2 * PATIENCE)
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds / 2
        while outcomes["moved"] < CONNECTIONS + 1 and time.monotonic() < end:
            outcomes += moved(a, 0.2)
            time.sleep(0.1)
        until(lambda: length(b) == 0)
        output, _ = clients.communicate(timeout=4 * seconds)
        told = json.loads(output)
        lines, _ = curls.communicate(timeout=4 * seconds)
        assert told["errors"] == []
        assert outcomes["moved"] == CONNECTIONS + 1, outcomes
        assert told["last"] == {"b": CONNECTIONS}, told
        assert told["answers"]["a"] and told["answers"]["b"] > CONNECTIONS
        # One connection for all of curl's requests, each of them answered.
        assert Counter(lines.split("\n")[:-1]) == {"200 1": 1, "200 0": int(seconds) - 1}


def test_what_nobody_listens_for_waits_in_the_list(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    seconds = 20 * PATIENCE
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    program = [sys.executable, PROJECT / "tests/lab/keepalive.py"]
    words = [str(a.address4), str(PORT), "3", str(seconds), "2.0"]
    with daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}), nginx(a, tmp_path):
        clients = peer.popen([*program, *words], stdout=subprocess.PIPE, text=True)
        outcomes: Counter[str] = Counter()
        end = time.monotonic() + seconds / 2
        while outcomes["moved"] < 3 and time.monotonic() < end:
            outcomes += moved(a, 0.2)
            time.sleep(0.1)
        assert length(b) == 3
        with nginx(b, tmp_path, " deferred reuseport"):
            until(lambda: length(b) == 0)
            output, _ = clients.communicate(timeout=4 * seconds)
        told = json.loads(output)
        assert told["errors"] == []
        assert told["last"] == {"b": 3}


def test_a_busy_connection_is_not_idle(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    a, peer = lab.host("a"), lab.host("peer")
    program = [sys.executable, PROJECT / "tests/lab/keepalive.py"]
    words = [str(a.address4), str(PORT), "2", str(8 * PATIENCE), "0.2"]
    with daemons(lab, "ab", redirect=REDIRECT, imports={"deliver": True}), nginx(a, tmp_path):
        clients = peer.popen([*program, *words], stdout=subprocess.PIPE, text=True)
        time.sleep(2 * PATIENCE)
        for _ in range(5):
            assert not moved(a, 5.0 * PATIENCE)
        output, _ = clients.communicate(timeout=60 * PATIENCE)
        assert json.loads(output)["errors"] == []
