# SPDX-License-Identifier: MIT
"""The process in which the daemon uses pyroute2: the same answers, and there only while it is asked."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab.daemons import Daemon
from lab.host import Host
from lab.labs import Lab
from sockmi.redirect.routes import Routes
from sockmi.redirect.routes_worker import _COMMAND, IDLE_S, RoutesWorker, _line, _typed
from sockmi.redirect.settings import Settings
from sockmi.redirect.ways import Held, Way
from tests.lab.scenario import ask, daemons, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def ours() -> list[int]:
    """Children of this process that are one."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(one) for one in found if b"routes_worker" in Path(f"/proc/{one}/cmdline").read_bytes()]


def has_one(daemon: Daemon) -> bool:
    return any("routes_worker" in one for one in daemon.children().values())


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("a")


@pytest.fixture
def routes(host: Host) -> Iterator[Routes]:
    with host.entered():
        made = Routes(Settings())
        made.worker = RoutesWorker(Settings(), idle_s=0.3)
        yield made
        made.worker.close()


def test_it_answers_as_without(routes: Routes, lab: Lab) -> None:
    here, there = Routes(Settings()), ip_address(lab.host("b").address(4))
    assert routes.path(there) == here.path(there) is not None
    assert routes.addresses() == here.addresses()
    assert routes.hardware_address("eth0") == here.hardware_address("eth0")
    assert routes.held(there) is None


def test_values_survive_the_pipe() -> None:
    """All that is asked and answered, by its type."""
    one, six = ip_address("192.0.2.1"), ip_address("2001:db8::1")
    for value in (
        Settings(devices=("eth0", "eth1"), forward=False),
        Way(1, "eth0", 1, None, six, 1500),
        Held(one, "eth0", 24, alone=True, has_dependents=False),
        frozenset({one, six}),
        b"\x00\xff",
        ["eth0"],
        None,
    ):
        came = json.loads(_line(value), object_hook=_typed)
        assert came == value and type(came) is type(value)
    with pytest.raises(TypeError, match="set has no words here"):
        _line({one})


def test_its_errors_are_errors_of_the_system(routes: Routes) -> None:
    with pytest.raises(OSError, match="no device missing; see `ip link`") as raised:
        routes.hardware_address("missing")
    assert raised.value.errno == errno.ENODEV
    with pytest.raises(OSError, match=r"netlink: Invalid argument") as raised:
        routes.add_address(ip_address("192.0.2.9"), "eth0", 77)
    assert raised.value.errno == errno.EINVAL


def test_it_stays_while_something_is_under_way(routes: Routes) -> None:
    assert routes.worker
    routes.worker.stay()
    assert not ours(), "it is not started for that"
    routes.addresses()
    [first] = ours()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        time.sleep(0.02)
        routes.worker.stay()
        assert ours() == [first]
    until(lambda: not ours())
    routes.worker.stay()


def test_it_ends_in_silence_with_who_has_asked() -> None:
    """Killed, say, before it is answered."""
    nobody, answers = os.pipe()
    os.close(nobody)
    process = subprocess.Popen(
        [*_COMMAND, "5"], stdin=subprocess.PIPE, stdout=answers, stderr=subprocess.PIPE
    )
    os.close(answers)
    _unused, complaint = process.communicate(_line(["stay"]), timeout=30)
    assert (process.returncode, complaint) == (0, b"")


def test_it_ends_when_it_is_not_asked_and_comes_back(routes: Routes) -> None:
    addresses = routes.addresses()
    [first] = ours()
    until(lambda: not ours())
    until(lambda: not Path(f"/proc/{first}").exists())  # not even a zombie
    assert routes.addresses() == addresses
    [second] = ours()
    os.kill(second, 9)
    assert routes.addresses() == addresses


_LATE = """\
import sys, time
if "sockmi.redirect.routes_worker" in sys.orig_argv:
    time.sleep(3)
"""


def test_the_daemon_goes_on_while_its_own_starts(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds on a slow host: nobody may take the daemon for dead, nor a freeze wait for it."""
    (tmp_path / "sitecustomize.py").write_text(_LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with daemons(lab, "ab") as running:
        for daemon in running.by_host.values():
            for pid in [pid for pid, words in daemon.children().items() if "routes_worker" in words]:
                os.kill(pid, signal.SIGKILL)
        conn, peer = connection(lab)
        with conn, peer, ThreadPoolExecutor(1) as pool:
            one = {"pid": os.getpid(), "fd": conn.fileno()}
            moved = pool.submit(ask, lab.host("a"), "export", sockets=[one], timeout_s=30.0)
            slowest = dict.fromkeys("ab", 0.0)
            while not moved.done():
                for name in slowest:
                    asked = time.monotonic()
                    ask(lab.host(name), "status")
                    slowest[name] = max(slowest[name], time.monotonic() - asked)
            assert '"moved"' in json.dumps(moved.result())
        assert all(has_one(one) for one in running.by_host.values()), "both have asked one"
        assert max(slowest.values()) < 1.0, slowest


def connection(lab: Lab) -> tuple[socket.socket, socket.socket]:
    """(a's end, the peer's end)"""
    host = lab.host("a")
    with host.socket() as listener:
        listener.bind((host.address(4), 0))
        listener.listen()
        peer = lab.host("peer").socket()
        peer.connect(listener.getsockname())
        return listener.accept()[0], peer


def test_a_daemon_at_rest_has_none_and_hears_of_new_addresses(lab: Lab) -> None:
    """An exporter may name the importer by an address that came a moment ago."""
    with daemons(lab, "ab") as running:
        assert has_one(running["b"])
        until(lambda: not has_one(running["b"]), timeout_s=IDLE_S + 15)
        conn, peer = connection(lab)
        with conn, peer:
            one = {"pid": os.getpid(), "fd": conn.fileno()}
            named = {"sockets": [one], "to": "192.0.2.7", "timeout_s": 1.0}
            lab.host("b").run(["ip", "addr", "add", "192.0.2.7/32", "dev", "eth0"])
            until(lambda: '"moved"' in json.dumps(ask(lab.host("a"), "export", **named)))
            assert has_one(running["b"])
