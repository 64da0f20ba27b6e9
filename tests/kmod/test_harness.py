# SPDX-License-Identifier: MIT
"""The harness itself: that it runs things, and that it notices every kind of bug it exists for."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guests.chroot import host_suite
from guests.errors import HarnessError
from guests.guest import Guest
from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from guests.uml.run import Inside, run_inside

PLANTED = Path(__file__).parent / "planted"

pytestmark = pytest.mark.timeout(400)  # a guest boots within seconds, but not beside six others

uml = pytest.mark.skipif(
    os.environ.get("SOCKMI_NO_UML") == "1", reason="SOCKMI_NO_UML=1: no UML kernel wanted"
)


def planted(bug: str, **more: object) -> Inside:
    """A run of the throw-away module with one of its bugs."""
    return Inside(["true"], module=PLANTED, parameters=[f"bug={bug}"], limit=60, **more)  # type: ignore[arg-type]


@uml
def test_a_command_runs_inside_and_cannot_write_outside(tmp_path: Path) -> None:
    command = f"uname -r; touch {tmp_path}/written; cat >$SOCKMI_OUT/kept </proc/sys/kernel/hostname; exit 7"
    outcome = run_inside(Inside(["sh", "-c", command], module=None, collect=["kept"], cwd=tmp_path))
    assert (outcome.code, outcome.troubles, outcome.complaints) == (7, [], [])
    assert outcome.output.startswith(b"6.1.")
    assert outcome.files["kept"] == b"uml\n"
    assert list(tmp_path.iterdir()) == []


@uml
def test_a_good_module_comes_and_goes(tmp_path: Path) -> None:
    outcome = run_inside(planted("none", cwd=tmp_path))
    assert outcome.good, outcome.tell()


def test_a_strict_build_has_sparse_look(kernel: str) -> None:
    with pytest.raises(HarnessError, match=r"mixed\.c:5:.*incorrect type in initializer"):
        DEBIAN_KERNELS[kernel].module(PLANTED / "mixed", strict=True)


@uml
@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("use-after-free", "KASAN: use-after-free in planted"),
        ("overrun", "KASAN: slab-out-of-bounds in planted"),
        ("inversion", "possible circular locking dependency"),
        ("atomic-sleep", "scheduling while atomic|sleeping function called from invalid context"),
        ("live-timer", "ODEBUG: free active"),
        ("warning", "WARNING: CPU: .* at .*planted"),
        ("panic", "Kernel panic - not syncing: planted"),
    ],
)
def test_a_planted_bug_fails_the_run(bug: str, said: str) -> None:
    outcome = run_inside(planted(bug, leaks=False))
    assert not outcome.good
    assert any(re.search(said, report.text) for report in outcome.complaints), outcome.tell()


@uml
def test_memory_that_the_module_loses_fails_the_run() -> None:
    outcome = run_inside(planted("leak"))
    assert not outcome.good
    assert 24 <= len(outcome.leaks) <= 32, outcome.tell()  # of 32; kmemleak takes stray words for pointers
    assert not outcome.complaints, outcome.tell()


@uml
def test_a_run_that_hangs_is_ended() -> None:
    outcome = run_inside(Inside(["sleep", "600"], module=None, limit=8))
    assert outcome.code == 124
    assert outcome.seconds < 20
    assert "not done after 8 s" in outcome.tell()


def test_a_guest_runs_commands_loads_a_module_and_has_the_checkout(guest: Guest, kernel: str) -> None:
    assert guest.run("uname -r").stdout.strip() == DEBIAN_KERNELS[kernel].release
    assert guest.run("cat; exit 3", data=b"x" * 300_000, check=False).stdout == "x" * 300_000
    assert guest.run("exit 3", check=False).code == 3
    with pytest.raises(HarnessError, match="ended with 4"):
        guest.run("exit 4")
    with pytest.raises(TimeoutError):
        guest.run("sleep 100", limit=2)
    guest.load(DEBIAN_KERNELS[kernel].module(PLANTED))
    assert "planted" in guest.run("lsmod").stdout
    guest.run("rmmod planted")

    python = f"{PROJECT}/.venv/bin/python"
    assert (
        "sockmi"
        in guest.run([python, "-c", "import sockmi, pytest; print(sockmi.__name__)"], cwd=PROJECT).stdout
    )


def test_a_planted_panic_is_detected(guests: Callable[..., list[Guest]], kernel: str) -> None:
    (one,) = guests(1, allowed=["planted"])
    with pytest.raises(HarnessError, match="ended while"):
        one.load(DEBIAN_KERNELS[kernel].module(PLANTED), "bug=panic")
    one.plan.allowed.clear()
    assert any("Kernel panic - not syncing: planted" in report.title for report in one.complaints())
    one.plan.allowed.append("")


def test_two_guests_hear_each_other(guests: Callable[..., list[Guest]]) -> None:
    first, second = guests(2)
    segment = first.plan.segments[0]
    for address in (segment.ipv4(2), segment.ipv6(2)):
        first.run(["ping", "-c", "2", "-W", "5", address])
    listen = (
        "import socket, struct; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 7700));"
        "s.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.77.0.1') + socket.inet_aton('%s'));"
        "print('listening', flush=True); s.settimeout(30); data, sender = s.recvfrom(100);"
        "print(data.decode(), 'from', sender[0])"
    )
    heard = second.start(["python3", "-c", listen % segment.ipv4(2)])
    heard.until_output(b"listening", 30)
    say = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.setsockopt(0, socket.IP_MULTICAST_IF, socket.inet_aton('%s'));"
        "s.sendto(b'hello', ('239.77.0.1', 7700))"
    )
    first.run(["python3", "-c", say % segment.ipv4(1)])
    assert heard.wait(30) == 0
    assert bytes(heard.stdout).decode().splitlines()[1] == f"hello from {segment.ipv4(1)}"
    first.plug(connected=False)
    assert first.run(["ping", "-c", "1", "-W", "2", segment.ipv4(2)], check=False).code != 0
    first.plug(connected=True)
    # Not at once: until the card's driver has seen the cable, neighbours are unreachable.
    first.run(f"for _ in $(seq 20); do ping -c 1 -W 2 {segment.ipv4(2)} && exit 0; sleep 0.5; done; exit 1")


@pytest.mark.slow
def test_a_killed_test_leaves_no_guest(kernel: str) -> None:
    program = (
        "from guests.guest import *; import sys, time\n"
        f"g = Guest(Plan(DEBIAN_KERNELS['{kernel}'], checkout=False)).wait()\n"
        "print(g.process, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        qemu = int(keeper.stdout.readline())
        assert Path(f"/proc/{qemu}/comm").read_text().startswith("qemu")
        keeper.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{qemu}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{qemu}").exists()


def outcomes(kernel: str, tmp_path: Path) -> dict[str, tuple[str, str]]:
    """What came of the planted cases on ``kernel``: outcome and message by name."""
    told = tmp_path / "told.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={told}"]
    cases = str(PLANTED.relative_to(PROJECT) / "cases.py")
    subprocess.run(
        [*words, "--kernel", kernel, cases], cwd=PROJECT, capture_output=True, timeout=300, check=False
    )
    found = {}
    for case in ElementTree.parse(told).iter("testcase"):  # noqa: S314
        kind, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind, text = child.tag, f"{child.get('message')}\n{child.text}"
        found[str(case.get("name")).partition("[")[0]] = (kind, text)
    return found


def judge(found: dict[str, tuple[str, str]]) -> None:
    """Each case as it should be, and none missing."""
    assert {name: kind for name, (kind, _unused) in found.items()} == {
        "test_good": "passed",
        "test_false": "failure",
        "test_warns": "failure",
        "test_warns_as_it_should": "passed",
        "test_panics": "failure",
        "test_good_after_the_panic": "passed",
        "test_skipped": "skipped",
        "test_of_another_kernel": "skipped",
    }, found
    assert "os.getpid() < 0" in found["test_false"][1]
    assert "the kernel complained" in found["test_warns"][1]
    assert "Kernel panic - not syncing: planted" in found["test_panics"][1]


@uml
def test_cases_inside_are_told_as_they_were(tmp_path: Path) -> None:
    judge(outcomes("uml-6.1-debug", tmp_path))


@pytest.mark.slow
def test_cases_in_a_guest_are_told_as_they_were(kernel: str, tmp_path: Path) -> None:
    judge(outcomes(kernel, tmp_path))


@uml
def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    program = (
        "from guests.uml.run import *\n"
        "run_inside(Inside(['sh', '-c', 'echo up; sleep 300'], module=None, limit=600), stream=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "up\n"
        session = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
        assert len(session) == 1
        keeper.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while of_session(int(session[0])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_session(int(session[0])) == []


def of_session(session: int) -> list[str]:
    """The processes of a session, that is, of an instance."""
    words = ["ps", "-o", "pid=", "-s", str(session)]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


@pytest.mark.slow
def test_kept_guests_answer_ssh_until_they_are_ended(kernel: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "guests"]
    wanted = ["--guest", f"web1={kernel}:{host_suite()}", "--guest", f"web2={kernel}:{host_suite()}"]
    subprocess.run([*command, "up", tmp_path / "vms", *wanted], cwd=PROJECT, check=True, timeout=240)
    try:
        told = json.loads((tmp_path / "vms/guests.json").read_text())
        assert [one["name"] for one in told] == ["web1", "web2"]
        for one, other in zip(told, reversed(told), strict=True):
            ssh = ["ssh", "-p", str(one["ssh_port"]), "-i", one["ssh_key"], "-o", "StrictHostKeyChecking=no"]
            ssh += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", f"root@{one['ssh_host']}"]
            there = f"hostname; uname -r; systemctl is-system-running --wait; ping -c 1 -W 10 {other['ipv4']}"
            done = subprocess.run([*ssh, there], capture_output=True, text=True, timeout=100, check=False)
            release = DEBIAN_KERNELS[kernel].release
            assert done.stdout.splitlines()[:3] == [one["name"], release, "running"], done.stderr
            assert done.returncode == 0, done.stdout
        again = subprocess.run(
            [*command, "up", tmp_path / "vms", *wanted],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (again.returncode, "has guests already" in again.stderr) == (3, True)
    finally:
        subprocess.run([*command, "down", tmp_path / "vms"], cwd=PROJECT, check=True, timeout=60)
    for one in told:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((one["ssh_host"], one["ssh_port"]), 5)
