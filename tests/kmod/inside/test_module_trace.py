# SPDX-License-Identifier: MIT
"""Tracepoints: each step of a move is told, whatever came of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kmod import nat_client
from tests.kmod.inside.test_module_core import four_tuple, held, new_socket, pair, read_exactly, wait_for
from tests.kmod.module_client import (
    ANY_UID,
    ORDINALS,
    PUBLISH,
    Device,
    Forget,
    ListName,
    Refusal,
    Refused,
    Request,
    frozen,
    number,
)

TRACING = Path("/sys/kernel/tracing")
EVENTS = (
    "call", "claim", "unclaim", "freeze", "thaw", "commit", "abort", "release", "restore", "activate",
    "discard", "deliver", "list_add", "publish", "remove", "import", "sysctl", "serve", "answer", "forget",
    "nat_change", "nat_flush", "nat_hand_on",
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

    return lambda: [one for one in lines(tracing) if one[0] != "call"]


def lines(tracing: Path) -> list[tuple[str, dict[str, int]]]:
    found = []
    for step, text in LINE.findall((tracing / "trace").read_text()):
        fields = dict(part.split("=") for part in text.split())
        found.append((step, {name: int(value) for name, value in fields.items()}))
    return found


def test_there_is_one_for_each_step(tracing: Path) -> None:
    there = {entry.name for entry in (tracing / "events/sockmi").iterdir() if entry.is_dir()}
    assert there == {f"sockmi_{name}" for name in EVENTS}


@pytest.mark.parametrize("name", sorted(ORDINALS))
def test_every_call_is_told_though_it_does_not_come_to_its_step(tracing: Path, name: str) -> None:
    ordinal, kind = ORDINALS[name]
    wrong = kind.from_buffer_copy(b"\xff" * ctypes.sizeof(kind))
    with Device(slots=0) as device:
        (tracing / "trace").write_text("")
        with pytest.raises(OSError, match=r"Errno") as caught:
            fcntl.ioctl(device.fd, number(name), wrong)
        [call] = [fields for step, fields in lines(tracing) if step == "call"]
    assert (call["id"], call["bytes"]) == (ordinal, ctypes.sizeof(kind))
    assert call["result"] == -(caught.value.errno or 0)


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
    steps = [(step, fields) for step, fields in told() if step != "nat_change"]  # the test's own hold
    assert [step for step, _unused in steps] == [
        "claim",
        "freeze",
        "commit",
        "restore",
        "activate",
        "unclaim",
        "release",
    ]
    told_of = dict(steps)
    for step in ("claim", "freeze", "restore", "activate"):
        assert {name: told_of[step][name] for name in ports} == ports, step
    for step, fields in steps:
        assert (fields["result"], fields["refusal"]) == (0, 0), step
    assert told_of["freeze"]["bytes"] == told_of["restore"]["bytes"] == len(image)
    assert {told_of[step]["id"] for step in ("claim", "freeze", "commit", "unclaim", "release")} == {
        freeze.id
    }
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


def test_what_the_lists_and_the_daemon_refuse_is_told(told: Told) -> None:
    """Each of their steps has the other outcome too."""
    ours, peer = pair()
    with Device() as device, held(ours):
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        with pytest.raises(Refused):
            device.list_add(image[:-4])
        added = device.list_add(image, flags=ANY_UID | PUBLISH)
        with pytest.raises(Refused):
            device.decide("publish", added.id)
        used = new_socket("ipv4")
        used.bind(("127.0.0.1", 0))
        assert device.take(Request(fd=used.fileno(), list=ListName.CONNECTED))[0] == 0
        copy = new_socket("ipv4")
        assert device.take(Request(fd=copy.fileno(), list=ListName.CONNECTED))[0] == 1
        device.serve()
        writer = subprocess.Popen(
            ["sysctl", "-qw", f"sockmi.export=pid={os.getpid()} fd={copy.fileno()}"], stderr=subprocess.PIPE
        )
        (event,) = device.events()
        device.decide("release", event.id)
        device.answer(event.id, 0, "moved")
        assert writer.communicate(timeout=30)[1] == b""
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"
    steps = [(step, fields["id"], fields["result"], fields["refusal"]) for step, fields in told()]
    assert ("list_add", 0, -errno.EBADMSG, Refusal.IMAGE) in steps
    assert ("publish", added.id, -errno.EBUSY, 0) in steps
    assert ("import", added.id, -errno.EISCONN, Refusal.TARGET) in steps
    assert ("import", added.id, 0, 0) in steps
    assert ("sysctl", event.id, 0, 0) in steps
    assert ("answer", event.id, 0, 0) in steps


def test_decisions_that_come_too_late_are_told(told: Told) -> None:
    ours, _peer = pair()
    with Device() as device:
        claim = device.claim(ours)
        freeze = device.freeze(claim, deadline_ms=50)
        wait_for(lambda: any(step == "thaw" for step, _unused in told()))
        with pytest.raises(Refused):
            device.abort(freeze)
        again = device.freeze(claim)
        with pytest.raises(Refused):
            device.abort(freeze)
        device.abort(again)
        device.release(claim)
        for name in ("commit", "abort", "release", "activate", "discard"):
            with pytest.raises(Refused):
                device.decide(name, claim.id)
        with pytest.raises(Refused):
            device.freeze(claim)
    steps = [(step, fields["id"], fields["result"]) for step, fields in told()]
    assert [step for step in steps if step[0] == "abort"] == [
        ("abort", claim.id, -errno.ETIMEDOUT),
        ("abort", claim.id, -errno.ESTALE),
        ("abort", claim.id, 0),
        ("abort", claim.id, -errno.ENOENT),
    ]
    assert ("release", claim.id, 0) in steps
    for name in ("commit", "release", "activate", "discard", "freeze"):
        assert (name, claim.id, -errno.ENOENT) in steps, name


def test_a_delivery_is_told(told: Told) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    peer = socket.create_connection(listener.getsockname())
    ours, _unused = listener.accept()
    with Device() as device, held(ours):
        with frozen(device, ours) as (freeze, image):
            device.commit(freeze)
        device.deliver(image)
        listener.close()
        peer.close()
        with pytest.raises(Refused):
            device.deliver(image)
    steps = [
        (fields["id"], fields["bytes"], fields["result"]) for step, fields in told() if step == "deliver"
    ]
    assert steps[0] == (1, len(image), 0)
    assert steps[1][1:] == (len(image), -errno.ECONNREFUSED)


def test_the_daemon_s_part_and_the_nat_helper_s_are_told(told: Told) -> None:
    ours, _peer = pair()
    with Device(slots=0) as device, Device(slots=0) as other:
        device.serve()
        with pytest.raises(Refused):
            other.serve()
        with pytest.raises(Refused):
            device.answer(77, errno.EIO, "nobody has asked")
    flow, nat = nat_client.held(four_tuple(ours)), nat_client.Nat()
    nat.set(flow)
    with pytest.raises(OSError) as caught:
        nat.add(flow)
    assert caught.value.errno == errno.EEXIST
    assert nat.flush(nat_client.Flag.HOLD) == 1
    nat.close()
    with Device(slots=0) as device:
        device.call("forget", Forget())
    steps = [(step, fields["id"], fields["bytes"], fields["result"]) for step, fields in told()]
    assert "forget" in {step for step, *_unused in steps}
    assert ("serve", 0, 0, 0) in steps
    assert ("serve", 0, 0, -errno.EBUSY) in steps
    assert ("answer", 77, errno.EIO, -errno.ENOENT) in steps
    add, set_, hold = 1, 3, int(nat_client.Flag.HOLD)
    assert ("nat_change", set_, 1, 0) in steps
    assert ("nat_change", add, 0, -errno.EEXIST) in steps
    assert ("nat_flush", hold, 1, 0) in steps
