# SPDX-License-Identifier: MIT
"""Daemons under the AppArmor profile that the role installs, with no more capabilities than their unit has.

Whatever the profile denies fails the test that met it. For kernels without AppArmor there is
tests/kmod/test_apparmor.py, which runs these in guests.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.daemons import METRICS_PORT, Daemon, Daemons
from lab.host import PROJECT, Host
from lab.plan import PATIENCE, LabError
from lab.record import ROOT
from sockmi.client import Export, Imported, ImportRequest, export_sockets, import_socket
from tests.lab.mode_lab import SERVICE, give_service, legacy_iptables, needs_legacy, take_service
from tests.lab.scenario import ask, daemons, drain, status, until, wait_for_members

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
WAIT_MS = Path("/sys/module/sockmi/parameters/sysctl_wait_ms")
pytestmark = [
    pytest.mark.timeout(120 * PATIENCE),
    pytest.mark.skipif(
        not (ENABLED.exists() and ENABLED.read_text() == "Y\n" and shutil.which("apparmor_parser")),
        reason="AppArmor is not enabled in this kernel, or apparmor_parser not installed",
    ),
]
NAME = "sockmid-lab"
PORT, CONTEXT = 7500, b"a session"
# The places that a lab's daemon has instead of an installed one's, with the same rights.
PLACES = f"""
  {PROJECT}/{{,daemon/,.venv/}} r,
  {PROJECT}/{{daemon,.venv}}/** r,
  {PROJECT}/{{daemon,.venv}}/**.so* mr,
  {ROOT}/*/*/etc/** r,
  owner {ROOT}/*/*/run/{{,**}} rw,
  owner {ROOT}/*/*/state/{{,**}} rwkl,
"""
# Owners of sockets that are confined themselves: one as Debian's are, and one that nobody may trace.
OWNERS = """
abi <abi/3.0>,
include <tunables/global>
profile sockmi-owner {
  include <abstractions/base>
  capability,
  network,
  signal,
  /** mrix,
}
profile sockmi-untraced {
  capability,
  network,
  signal,
  /** mrix,
}
"""
OWNER = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
connection, _ = listener.accept()
print(connection.fileno(), flush=True)
sys.stdin.readline()
"""
# Each in a process of its own, as the daemon's user, with all that the unit leaves it.
FORBIDDEN = {
    "the passwords": "open('/etc/shadow')",
    "homes": "os.listdir('/root')",
    "others' state": "open('/var/lib/other', 'w')",
    "the host's configuration": "open('/etc/hosts', 'a')",
    "the unit": "open('/etc/systemd/system/sockmid.service', 'w')",
    "its own program": f"open('{PROJECT}/daemon/other', 'w')",
    "its own profile": "open('/sys/kernel/security/apparmor/.replace', 'w')",
    "memory of others": "open('/proc/1/mem', 'rb').read(1)",
    "a shell": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "a module": "os.execv('/sbin/modprobe', ['modprobe', '-n', 'loop'])",
    "a kernel setting": "open('/proc/sys/kernel/core_pattern', 'w')",
    "a mount": "done(ctypes.CDLL(None, use_errno=True).mount(b'none', b'/mnt', b'tmpfs', 0, None))",
    "a signal": "os.kill(1, signal.SIGHUP)",
    "Bluetooth": "socket.socket(socket.AF_BLUETOOTH, socket.SOCK_RAW, 1)",
}
FORBIDDING = """
import ctypes, os, signal, socket, sys
def done(failed):
    if failed:
        raise OSError(ctypes.get_errno(), "")
try:
    {}
except PermissionError:
    print("no")
"""


def parser(*words: str, text: str) -> None:
    """Run apparmor_parser on a profile."""
    subprocess.run(["apparmor_parser", *words, "--skip-cache"], input=text, text=True, check=True)


def denials() -> list[str]:
    """What the kernel's log has of them."""
    said = subprocess.run(["dmesg", "--notime"], capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if 'apparmor="DENIED"' in line and f'profile="{NAME}"' in line]


def confining() -> list[str]:
    """Words that have the program after them run as systemd runs it by the unit."""
    unit = (PROJECT / "daemon/systemd/sockmid.service").read_text()
    assert "\nAppArmorProfile=-sockmid\n" in unit
    [granted] = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    only = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in granted.split())])
    dropped = ["setpriv", "--bounding-set", only, "--inh-caps", only, "--no-new-privs"]
    return [*dropped, "aa-exec", "-p", NAME, "--"]


@pytest.fixture(scope="module", autouse=True)
def confined() -> Iterator[None]:
    """Every daemon that a lab's host starts. The profile has another name: an installed one stays."""
    text = (PROJECT / "daemon/apparmor/sockmid").read_text()
    assert text.count("\nprofile sockmid ") == text.count("include if exists <local/sockmid>\n") == 1
    text = text.replace("\nprofile sockmid ", f"\nprofile {NAME} ")
    text = text.replace("  include if exists <local/sockmid>\n", PLACES)
    popen, words = Host.popen, confining()

    def start(host: Host, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        daemon = [*words, *command] if "sockmi.service" in command else command
        return popen(host, daemon, **options)

    limit = Path("/proc/sys/kernel/printk_ratelimit")
    limited = limit.read_text()
    limit.write_text("0\n")  # or the log leaves some out
    for one in (text, OWNERS):
        parser("--replace", text=one)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Host, "popen", start)
            yield
    finally:
        for one in (text, OWNERS):
            parser("--remove", text=one)
        limit.write_text(limited)


@pytest.fixture(autouse=True)
def denied(confined: None) -> Iterator[list[str]]:
    """What a test expects to be denied; nothing else may be."""
    expected: list[str] = []
    before = len(denials())
    yield expected
    found = denials()[before:]
    unexpected = [line for line in found if not any(one in line for one in expected)]
    assert not unexpected, "\n".join(unexpected)


@pytest.mark.parametrize("mode", ["forward", "nat", "takeover", pytest.param("iptables", marks=needs_legacy)])
def test_connections_move_by_each_redirect(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Away, home and away: from the kernel engine, if it can be had, to the other, and back.

    Each move is asked for in another way. With redirects in use one daemon dies, both start anew and are
    asked all that they can tell; at the end the redirects are removed.
    """
    a, b = lab.host("a"), lab.host("b")
    with contextlib.ExitStack() as stack:
        if mode == "iptables":
            stack.enter_context(legacy_iptables(tmp_path))
        if mode == "takeover":
            give_service(lab)
            stack.callback(take_service, lab)
        running = stack.enter_context(patient(lab, "ab", mode, b="repair"))
        pairs = [stack.enter_context(connected(lab, mode, version)) for version in (4, 6)]
        move(pairs, a, b, exported)
        running["a"].kill()
        for name in "ab":
            running[name].restart()
        wait_for_members(lab, "ab")
        talk(pairs)
        for host in (a, b):
            for request in ("doctor", "list", "history", "groups", "reload"):
                ask(host, request)
            assert host.python(metrics).count(b"sockmi_migrations_total")
            assert set(labels(running[host.name])) == {f"{NAME} (enforce)\n"}
        move(pairs, b, a, drained)
        talk(pairs)
        move(pairs, a, b, by_sysctl if status(a)["engine"] == "kernel" else exported)
        talk(pairs)
        for host in (a, b):
            assert running[host.name].stop() == 0
            words = [*confining(), sys.executable, "-m", "sockmi.service", "--remove-redirects", "--config"]
            for more, code in (([], 1), (["--force"], 0)):
                done = host.run([*words, running[host.name].config_file, *more], check=False, timeout_s=60)
                assert done.returncode == code, done.stderr
            shutil.rmtree(host.state_dir)  # what it knows of the redirects
            host.state_dir.mkdir()


@pytest.mark.skipif(not shutil.which("iptables-nft"), reason="iptables-nft is not installed")
def test_iptables_that_are_not_legacy(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are run, and refused for what they say."""
    (tmp_path / "iptables").symlink_to(shutil.which("iptables-nft") or "")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (
        pytest.raises(LabError, match="does not see legacy rules"),
        patient(lab, "a", "iptables"),
    ):
        pass


@pytest.mark.parametrize("engines", [{}, {"a": "repair", "b": "repair"}], ids=["any", "repair"])
def test_a_listener_moves_with_its_queue(lab: Lab, engines: dict[str, str]) -> None:
    """The keeper that accepts what waits there is confined, too."""
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    with (
        patient(lab, "ab", "nat", **engines),
        a.python(socket.create_server, (a.address(4), PORT)) as listener,
        peer.socket() as client,
    ):
        client.settimeout(60)
        client.connect(listener.getsockname())
        client.sendall(b"waits")
        with taken(b, "listening", "connected") as came:
            [record] = export_sockets([Export(listener)], "b", control=a.control_socket, timeout_s=60)
            assert record.outcome == "moved", record
        [connection] = [one.socket for one in came if one.socket and one.kind == "connected"]
        assert connection.recv(99) == b"waits"
        for one in came:
            assert one.socket is not None
            one.socket.close()


@pytest.mark.parametrize("profile", ["sockmi-owner", "sockmi-untraced"])
def test_owners_that_are_confined_themselves(lab: Lab, profile: str) -> None:
    """They move if their profile lets them be traced, as abstractions/base does; else they are refused."""
    a, peer = lab.host("a"), lab.host("peer")
    with patient(lab, "ab", "nat", a="repair"):
        words = ["aa-exec", "-p", profile, "--", sys.executable, "-c", OWNER, a.address(4), "7700"]
        owner = a.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            client = peer.socket()
            until(lambda: client.connect_ex((a.address(4), 7700)) == 0, 60)
            assert owner.stdout is not None
            fd = int(owner.stdout.readline())
            answers = ask(a, "export", sockets=[{"pid": owner.pid, "fd": fd}], to="b")
            [record] = answers[-1]["migrations"]
            if profile == "sockmi-owner":
                assert record["outcome"] == "moved", record
            else:
                assert (record["outcome"], record["refusal"]["code"]) == ("refused", "no-privilege"), record
        finally:
            owner.kill()
            owner.wait()
            client.close()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_it_must_not(what: str, denied: list[str]) -> None:
    denied += [f'profile="{NAME}"']
    before = len(denials())
    done = subprocess.run(
        [*confining(), sys.executable, "-c", FORBIDDING.format(FORBIDDEN[what])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.stdout == "no\n", done.stderr
    assert len(denials()) > before or what == "a module"  # which is denied without a word


def patient(lab: Lab, hosts: str, mode: str, **engines: str) -> contextlib.AbstractContextManager[Daemons]:
    """Daemons that take their time, where processors are emulated and others want them too."""
    timing = {"negotiation_timeout_s": 60.0, "lease_s": 300.0}
    return daemons(
        lab, hosts, engines=engines, redirect={"devices": ["eth0"], "modes": [mode]}, timing=timing
    )


@dataclass
class Pair:
    """Both ends of a connection of this process."""

    ours: socket.socket
    client: socket.socket


@contextlib.contextmanager
def connected(lab: Lab, mode: str, version: int) -> Iterator[Pair]:
    """Of host a with the peer."""
    a, family = lab.host("a"), {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    address = SERVICE[version] if mode == "takeover" else a.address(version)
    with (
        a.python(socket.create_server, (address, PORT), family=family) as listener,
        lab.host("peer").socket(family) as client,
    ):
        client.settimeout(60)
        client.connect(listener.getsockname()[:2])
        pair = Pair(listener.accept()[0], client)
        try:
            yield pair
        finally:
            pair.ours.close()


def talk(pairs: Sequence[Pair]) -> None:
    """Both ways."""
    for pair in pairs:
        for one, other in ((pair.ours, pair.client), (pair.client, pair.ours)):
            one.sendall(b"is heard")
            assert other.recv(99) == b"is heard"


@contextlib.contextmanager
def taken(host: Host, *kinds: str) -> Iterator[list[Imported]]:
    """What the block moves there; this process is the application there, too."""
    came: list[Imported] = []
    wanted = [ImportRequest([kind]) for kind in kinds]

    def take() -> None:
        while len(came) < len(kinds):
            came.extend(import_socket(wanted, 300, control=host.control_socket))

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    until(lambda: status(host)["import_lists"][kinds[-1]]["waiting"] > 0)
    yield came
    taker.join(300)
    assert len(came) == len(kinds)


def move(pairs: Sequence[Pair], source: Host, target: Host, how: Callable[..., None]) -> None:
    """With what the client has said meanwhile."""
    for pair in pairs:
        pair.client.sendall(b"on its way")
    with taken(target, *["connected"] * len(pairs)) as came:
        how([pair.ours for pair in pairs], source, target)
    arrived = {one.socket.getpeername(): one for one in came if one.socket}
    for pair in pairs:
        pair.ours.close()
        one = arrived[pair.client.getsockname()]
        assert one.socket is not None
        assert one.context == (CONTEXT if how is exported else b"")
        pair.ours = one.socket
        pair.ours.settimeout(60)
        assert pair.ours.recv(99) == b"on its way"


def exported(ours: Sequence[socket.socket], source: Host, target: Host) -> None:
    """By their application."""
    exports = [Export(one, context=CONTEXT) for one in ours]
    records = export_sockets(exports, target.name, control=source.control_socket, timeout_s=60)
    assert {record.outcome for record in records} == {"moved"}, records


def drained(ours: Sequence[socket.socket], source: Host, target: Host) -> None:
    """By the daemon, whatever their application does."""
    records = drain(source, target.name, local_port=PORT)
    assert [record["outcome"] for record in records] == ["moved"] * len(ours), records


def by_sysctl(ours: Sequence[socket.socket], source: Host, target: Host) -> None:
    """One by one."""
    before = WAIT_MS.read_text()
    WAIT_MS.write_text("60000")
    try:
        for one in ours:
            command = f"pid={os.getpid()} fd={one.fileno()} to={target.address4}"
            source.run(["sysctl", "-w", f"sockmi.export={command}"], timeout_s=90)
    finally:
        WAIT_MS.write_text(before)


def metrics() -> bytes:
    """What the daemon of this thread's host counts."""
    with urllib.request.urlopen(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=60) as answer:
        return bytes(answer.read())


def labels(daemon: Daemon) -> Iterator[str]:
    """What confines the daemon and its workers."""
    for pid in (daemon.pid, *daemon.children()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one has ended
            yield Path(f"/proc/{pid}/attr/current").read_text()
