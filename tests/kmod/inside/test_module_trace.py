# SPDX-License-Identifier: MIT
"""Tracepoints: each step of a move is told, whatever came of it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod.inside.test_module_core import held, new_socket, pair, read_exactly, wait_for
from tests.kmod.module_client import ANY_UID, Device, ListName, Refusal, Refused, Request, frozen

TRACING = Path("/sys/kernel/tracing")
EVENTS = (
    "claim", "unclaim", "freeze", "thaw", "commit", "restore", "activate", "discard", "deliver",
    "list_add", "publish", "remove", "import", "sysctl", "nat_hand_on",
)  # fmt: skip
LINE = re.compile(r": sockmi_(\w+): (.*)$", re.MULTILINE)

Told = Callable[[], list[tuple[str, dict[str, int]]]]


@pytest.fixture(scope="module")
def tracing() -> Iterator[Path]:
    """The kernel's trace, with our events on."""
    if not (TRACING / "trace").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=False)
    if not (TRACING / "trace").exists():
        pytest.skip("this kernel is built without tracing")
    (TRACING / "events/sockmi/enable").write_text("1")
    yield TRACING
    (TRACING / "events/sockmi/enable").write_text("0")


@pytest.fixture
def told(tracing: Path) -> Told:
    """What was told since the test began: (step, fields)."""
    (tracing / "trace").write_text("")

    def read() -> list[tuple[str, dict[str, int]]]:
        found = []
        for step, text in LINE.findall((tracing / "trace").read_text()):
            fields = dict(part.split("=") for part in text.split())
            found.append((step, {name: int(value) for name, value in fields.items()}))
        return found

    return read


def test_there_is_one_for_each_step(tracing: Path) -> None:
    there = {entry.name for entry in (tracing / "events/sockmi").iterdir() if entry.is_dir()}
    assert there == {f"sockmi_{name}" for name in EVENTS}


def test_a_move_is_told_step_by_step(told: Told) -> None:
    ours, peer = pair()
    ports = {
        "family": socket.AF_INET,
        "sport": ours.getsockname()[1],
        "dport": peer.getsockname()[1],
        "state": 1,
    }
    with Device() as device:
        copy = new_socket("ipv4")
        with held(ours), frozen(device, ours) as (freeze, image):
            device.commit(freeze)
            dormant = device.restore(copy, image, flags=0)
            device.decide("activate", dormant.id)
    steps = told()
    assert [step for step, _unused in steps] == [
        "claim",
        "freeze",
        "commit",
        "restore",
        "activate",
        "unclaim",
    ]
    told_of = dict(steps)
    for step in ("claim", "freeze", "restore", "activate"):
        assert {name: told_of[step][name] for name in ports} == ports, step
    for step, fields in steps:
        assert (fields["result"], fields["refusal"]) == (0, 0), step
    assert told_of["freeze"]["bytes"] == told_of["restore"]["bytes"] == len(image)
    assert {told_of[step]["id"] for step in ("claim", "freeze", "commit", "unclaim")} == {freeze.id}
    assert told_of["restore"]["id"] == told_of["activate"]["id"] == dormant.id
    assert told_of["commit"]["bytes"] > 0, "microseconds frozen"


def test_what_fails_is_told_with_its_reason(told: Told) -> None:
    ours, peer = pair()
    with Device() as device:
        with pytest.raises(Refused):
            device.claim(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        claim = device.claim(ours)
        freeze = device.freeze(claim, deadline_ms=50)
        wait_for(lambda: any(step == "thaw" for step, _unused in told()))
        with pytest.raises(Refused):
            device.commit(freeze)
        freeze = device.freeze(claim)
        image = device.image(freeze)
        with pytest.raises(Refused):
            device.restore(new_socket("ipv4"), image)
        with pytest.raises(Refused):
            device.restore(new_socket("ipv4"), image[:-4])
        device.abort(freeze)
        device.release(claim)
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"
    steps = [(step, fields["result"], fields["refusal"]) for step, fields in told()]
    assert steps[0] == ("claim", -errno.EOPNOTSUPP, Refusal.NOT_TCP)
    assert ("thaw", -errno.ETIMEDOUT, 0) in steps, "the deadline"
    assert ("thaw", 0, 0) in steps, "the abort"
    assert ("restore", -errno.EADDRINUSE, Refusal.TUPLE_TAKEN) in steps
    assert ("restore", -errno.EBADMSG, Refusal.IMAGE) in steps
    assert [result for step, result, _unused in steps if step == "freeze"] == [0, 0]


def test_the_lists_and_the_sysctl_are_told(told: Told) -> None:
    ours, _peer = pair()
    with Device() as device, held(ours):
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        added = device.list_add(image, flags=ANY_UID)
        device.decide("publish", added.id)
        copy = new_socket("ipv4")
        assert device.take(Request(fd=copy.fileno(), list=ListName.CONNECTED))[0] == 1
        again = device.list_add(image, flags=ANY_UID)
        device.decide("remove", again.id)
        with pytest.raises(Refused):
            device.decide("remove", again.id)
        with frozen(device, copy) as (freeze, _unused):
            device.commit(freeze)
        dormant = device.restore(copy, image, flags=0)
        device.decide("discard", dormant.id)
    with contextlib.suppress(OSError):
        Path("/proc/sys/sockmi/export").write_text(f"pid={os.getpid()} fd=999")
    steps = [(step, fields["id"], fields["result"]) for step, fields in told()]
    assert ("list_add", added.id, 0) in steps
    assert ("publish", added.id, 0) in steps
    assert ("import", added.id, 0) in steps
    assert ("remove", again.id, 0) in steps
    assert ("remove", again.id, -errno.ENOENT) in steps
    assert [step for step, _unused, _unused in steps].count("discard") == 1
    assert ("sysctl", 0, -errno.EBADF) in steps
