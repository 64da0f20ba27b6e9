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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.host import PROJECT, Host
from lab.plan import PATIENCE
from lab.record import ROOT
from sockmi.client import Export, Imported, ImportRequest, export_sockets, import_socket
from tests.lab.mode_lab import SERVICE, give_service, legacy_iptables, needs_legacy, take_service
from tests.lab.scenario import ask, daemons, status, until

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
pytestmark = [
    pytest.mark.timeout(120 * PATIENCE),
    pytest.mark.skipif(
        not (ENABLED.exists() and ENABLED.read_text() == "Y\n" and shutil.which("apparmor_parser")),
        reason="AppArmor is not enabled in this kernel, or apparmor_parser not installed",
    ),
]
NAME = "sockmid-lab"
# The places that a lab's daemon has instead of an installed one's.
PLACES = f"""
  {PROJECT}/{{,daemon/,.venv/}} r,
  {PROJECT}/{{daemon,.venv}}/** r,
  {PROJECT}/{{daemon,.venv}}/**.so* mr,
  {ROOT}/** rwkl,
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
    "others' state": "open('/var/lib/other', 'w')",
    "the host's configuration": "open('/etc/hosts', 'a')",
    "the unit": "open('/etc/systemd/system/sockmid.service', 'w')",
    "memory of others": "open('/proc/1/mem', 'rb').read(1)",
    "a shell": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "a module": "os.execv('/sbin/modprobe', ['modprobe', '-n', 'loop'])",
    "a kernel setting": "open('/proc/sys/kernel/core_pattern', 'w')",
    "a signal": "os.kill(1, signal.SIGHUP)",
    "Bluetooth": "socket.socket(socket.AF_BLUETOOTH, socket.SOCK_RAW, 1)",
}


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
    """There with a context, and home; from the kernel engine, if it can be had, to the other, and back."""
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    with contextlib.ExitStack() as stack:
        if mode == "iptables":
            stack.enter_context(legacy_iptables(tmp_path))
        if mode == "takeover":
            give_service(lab)
            stack.callback(take_service, lab)
        redirect = {"devices": ["eth0"], "modes": [mode]}
        running = stack.enter_context(daemons(lab, "ab", engines={"b": "repair"}, redirect=redirect))
        for daemon in running.by_host.values():
            label = Path(f"/proc/{daemon.pid}/attr/current").read_text()
            assert label == f"{NAME} (enforce)\n"
        listen = SERVICE[4] if mode == "takeover" else a.address(4)
        ours, client = stack.enter_context(connected(a, peer, listen))
        for source, target in ((a, b), (b, a)):
            client.sendall(b"on its way")
            ours, record = moved(ours, source, target, context=b"a session")
            assert (record.mode, record.outcome) == (mode, "moved"), record
            assert ours.recv(99) == b"on its way"
            ours.sendall(b"heard")
            assert client.recv(99) == b"heard"
        for host in (a, b):
            for request in ("doctor", "list", "history", "groups", "reload"):
                ask(host, request)
        ours.close()
        assert client.recv(1) == b""


def test_a_listener_moves_with_its_queue(lab: Lab) -> None:
    """The keeper that accepts what waits there is confined, too."""
    a, b, peer = lab.host("a"), lab.host("b"), lab.host("peer")
    with (
        daemons(lab, "ab", redirect={"devices": ["eth0"], "modes": ["nat"]}),
        a.socket() as listener,
        peer.socket() as client,
    ):
        listener.bind((a.address(4), 7600))
        listener.listen()
        client.settimeout(60)
        client.connect(listener.getsockname())
        client.sendall(b"waits")
        came: list[Imported] = []
        wanted = [ImportRequest([kind]) for kind in ("listening", "connected")]

        def take() -> None:
            while len(came) < 2:
                came.extend(import_socket(wanted, 300, control=b.control_socket))

        taker = threading.Thread(target=take)
        taker.start()
        [record] = export_sockets([Export(listener)], "b", control=a.control_socket, timeout_s=60)
        assert record.outcome == "moved", record
        taker.join(300)
        [connection] = [one.socket for one in came if one.socket and one.kind == "connected"]
        assert connection.recv(99) == b"waits"
        for one in came:
            assert one.socket is not None
            one.socket.close()


@pytest.mark.parametrize("profile", ["sockmi-owner", "sockmi-untraced"])
def test_owners_that_are_confined_themselves(lab: Lab, profile: str) -> None:
    """They move if their profile lets them be traced, as abstractions/base does; else they are refused."""
    a, peer = lab.host("a"), lab.host("peer")
    with daemons(lab, "ab", engines={"a": "repair"}, redirect={"devices": ["eth0"], "modes": ["nat"]}):
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
    program = (
        f"import os, signal, socket\ntry:\n    {FORBIDDEN[what]}\nexcept PermissionError:\n    print('no')"
    )
    done = subprocess.run(
        [*confining(), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.stdout == "no\n", done.stderr
    assert len(denials()) > before or what == "a module"  # which is denied without a word


@contextlib.contextmanager
def connected(server: Host, peer: Host, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection of this process."""
    with server.socket() as listener, peer.socket() as client:
        listener.bind((address, 7500))
        listener.listen()
        client.settimeout(60)
        client.connect(listener.getsockname())
        ours, _unused = listener.accept()
        yield ours, client


def moved(ours: socket.socket, source: Host, target: Host, context: bytes) -> tuple[socket.socket, Any]:
    """From one host's daemon to the other's, by this process, which is the owner on both."""
    came: list[Imported] = []
    there = target.control_socket
    taker = threading.Thread(
        target=lambda: came.extend(import_socket(ImportRequest(["connected"]), 300, control=there))
    )
    taker.start()
    until(lambda: status(target)["import_lists"]["connected"]["waiting"] > 0)
    [record] = export_sockets(
        [Export(ours, context=context)], target.name, control=source.control_socket, timeout_s=60
    )
    taker.join(300)
    ours.close()
    [one] = came
    assert one.socket is not None
    assert one.context == context
    one.socket.settimeout(60)
    return one.socket, record
