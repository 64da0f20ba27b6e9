# SPDX-License-Identifier: MIT
"""The sysctl sockmi.export: what is written, what the writer gets, what readers see; tests are the daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi import image as images
from tests.kmod.inside.test_module_core import pair, read_exactly
from tests.kmod.module_client import Device, Event, EventType, Freeze, Refused

SYSCTL = Path("/proc/sys/sockmi")


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as made:
        yield made


def write_sysctl(text: str) -> int:
    """errno, or 0."""
    fd = os.open(SYSCTL / "export", os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)
    return 0


class Writer:
    """Writes the sysctl in a thread; ``error`` is its errno in the end."""

    def __init__(self, sock: socket.socket) -> None:
        self.command = f"pid={os.getpid()} fd={sock.fileno()}"
        self.error: int | None = None
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        self.error = write_sysctl(self.command)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_unused: object) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def reading() -> str:
    return (SYSCTL / "export").read_text().strip()


@pytest.mark.complains("sockmi.export:")
@pytest.mark.parametrize(
    "text",
    [
        " ",
        "x",
        "pid=1",
        "fd=1",
        "pid=0 fd=1",
        "pid=-1 fd=1",
        "pid=1 fd=-1",
        "pid=1 fd=1 fd=2",
        "pid=1 fd=1\nrubbish",
        "pid=1 fd=1\0rubbish",
        "pid=1 fd=1 to=",
        "pid=1 fd=1 to=1.2.3",
        "pid=1 fd=1 to=::g",
        "pid=99999999999 fd=1",
        "pid=1 fd=1 what",
        "pid=1\0fd=1",
        "pid=1 fd=1 " + "x" * 200,
    ],
)
def test_malformed_commands_are_refused(text: str) -> None:
    assert write_sysctl(text) == errno.EINVAL


@pytest.mark.complains("sockmi.export:")
def test_a_malformed_command_is_in_the_kernels_log() -> None:
    """Of many in a few seconds the kernel logs some; then again the next."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    end = time.monotonic() + 15
    told = b""
    try:
        while b"pid=1 fd=one" not in told:
            assert time.monotonic() < end, "the log does not say what was wrong"
            assert write_sysctl("pid=1 fd=one") == errno.EINVAL
            time.sleep(0.5)
            with contextlib.suppress(BlockingIOError):
                while True:
                    told += os.read(log, 8192)
    finally:
        os.close(log)
    assert b'sockmi.export: "pid=1 fd=one" is not "pid=PID fd=FD' in told


@pytest.mark.complains("sockmi.export:")
def test_without_a_daemon_the_sysctl_says_so() -> None:
    ours, _peer = pair()
    assert write_sysctl(f"pid={os.getpid()} fd={ours.fileno()}") == errno.ENOTCONN
    assert "no daemon" in (SYSCTL / "export").read_text()
    assert write_sysctl("pid=4194000 fd=1") == errno.ESRCH
    assert "no such process" in (SYSCTL / "export").read_text()
    assert write_sysctl(f"pid={os.getpid()} fd=999") == errno.EBADF


@pytest.mark.parametrize("error", [0, errno.EHOSTUNREACH])
def test_the_sysctl_exports_through_the_daemon(device: Device, error: int) -> None:
    ours, peer = pair()
    device.serve()
    with Device(slots=0) as other, pytest.raises(Refused) as caught:
        other.serve()
    assert caught.value.errno == errno.EBUSY
    results: list[int] = []
    command = f"pid={os.getpid()} fd={ours.fileno()} to=192.0.2.7"
    thread = threading.Thread(target=lambda: results.append(write_sysctl(command)))
    thread.start()
    (event,) = device.events()
    assert event.type == EventType.EXPORT_REQUEST
    assert event.pid == os.getpid()
    assert event.to.name[0] == "192.0.2.7"
    assert event.local.name == ours.getsockname()
    assert event.remote.name == peer.getsockname()
    freeze = device.call("freeze", Freeze(id=event.id))
    assert images.decode(device.image(freeze)).identity.remote.port == peer.getsockname()[1]
    device.abort(freeze)
    device.answer(event.id, error, "moved to 192.0.2.7" if not error else "nobody answers")
    thread.join(5)
    assert results == [error]
    text = (SYSCTL / "export").read_text()
    assert text.startswith(command)
    assert text.rstrip().endswith("ok moved to 192.0.2.7" if not error else "nobody answers")
    device.decide("release", event.id)


def test_a_daemon_that_dies_answers_with_an_error() -> None:
    ours, peer = pair()
    device = Device()
    device.serve()
    with Writer(ours) as writer:
        device.events()
        device.close()
    assert writer.error == errno.ECONNRESET
    assert reading() == f"{writer.command}: the daemon ended; its history tells what came of it"
    peer.sendall(b"alive")
    assert read_exactly(ours, 5) == b"alive"


@pytest.fixture
def short_wait() -> Iterator[int]:
    """The writer's patience, in ms, made short."""
    parameter = Path("/sys/module/sockmi/parameters/sysctl_wait_ms")
    before = parameter.read_text()
    parameter.write_text("300")
    yield 300
    parameter.write_text(before)


def test_the_request_says_which_socket(device: Device, short_wait: int) -> None:
    ours, _peer = pair()
    device.serve()
    with Writer(ours) as writer:
        (event,) = device.events()
        assert (event.owner_pid, event.owner_fd) == (os.getpid(), ours.fileno())
        assert event.inode == os.fstat(ours.fileno()).st_ino
        assert event.wait_ms == short_wait
        device.decide("release", event.id)
        device.answer(event.id, 0, "moved")
    assert writer.error == 0


def test_what_no_daemon_begins_is_withdrawn(device: Device, short_wait: int) -> None:
    """A timeout means that nothing was done, and that nothing will be."""
    ours, peer = pair()
    device.serve()
    with Writer(ours) as writer:
        (event,) = device.events()
    assert writer.error == errno.ETIMEDOUT
    assert reading() == f"{writer.command}: the daemon did not begin: nothing was done"
    for late in (
        lambda: device.decide("release", event.id),
        lambda: device.call("freeze", Freeze(id=event.id)),
        lambda: device.answer(event.id, 0, "moved all the same"),
    ):
        with pytest.raises(Refused) as caught:
            late()
        assert caught.value.errno == errno.ENOENT
    assert "nothing was done" in reading()
    device.release(device.claim(ours))
    peer.sendall(b"alive")
    assert read_exactly(ours, 5) == b"alive"


@pytest.mark.parametrize("begin", ["release", "freeze"])
@pytest.mark.parametrize("error", [0, errno.EHOSTUNREACH])
def test_what_the_daemon_has_begun_is_under_way(
    device: Device, short_wait: int, begin: str, error: int
) -> None:
    """The writer does not wait for ever, and is not told that it was in vain; readers learn the end."""
    ours, _peer = pair()
    device.serve()
    with Writer(ours) as writer:
        (event,) = device.events()
        if begin == "release":
            device.decide("release", event.id)
        else:
            device.call("freeze", Freeze(id=event.id))
    assert writer.error == errno.EINPROGRESS
    assert reading() == f"{writer.command}: under way; read this again"
    if begin == "freeze":
        device.decide("release", event.id)
    device.answer(event.id, error, "the end")
    assert reading() == f"{writer.command}: {'' if error else 'ok '}the end"
    with pytest.raises(Refused) as caught:
        device.answer(event.id, 0, "again")
    assert caught.value.errno == errno.ENOENT


def test_the_daemon_may_end_before_what_it_has_begun(short_wait: int) -> None:
    ours, _peer = pair()
    with Device() as device:
        device.serve()
        with Writer(ours) as writer:
            (event,) = device.events()
            device.decide("release", event.id)
    assert writer.error == errno.EINPROGRESS
    assert "the daemon ended" in reading()


@pytest.mark.parametrize("begun", [False, True])
def test_a_writer_that_is_interrupted(device: Device, *, begun: bool) -> None:
    """What was not begun is withdrawn with him, what was begun goes on."""
    ours, _peer = pair()
    device.serve()
    command = f"pid={os.getpid()} fd={ours.fileno()}"
    code = f"import os; os.write(os.open('/proc/sys/sockmi/export', os.O_WRONLY), b'{command}')"
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        (event,) = device.events()
        assert event.pid == writer.pid
        if begun:
            device.decide("release", event.id)
        writer.send_signal(signal.SIGKILL)
    if not begun:
        assert reading() == f"{command}: interrupted before the daemon began: nothing was done"
        with pytest.raises(Refused):
            device.decide("release", event.id)
        return
    assert reading() == f"{command}: under way; read this again"
    device.answer(event.id, 0, "moved")
    assert reading() == f"{command}: ok moved"


def test_several_writers_at_once(device: Device) -> None:
    pairs = [pair() for _turn in range(20)]
    device.serve()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Writer(ours)) for ours, _peer in pairs]
        events: dict[int, Event] = {}
        while len(events) < len(writers):
            events |= {one.owner_fd: one for one in device.events()}
        for at in reversed(range(len(writers))):
            event = events[pairs[at][0].fileno()]
            device.decide("release", event.id)
            device.answer(event.id, 50 + at, f"number {at}")
    assert [writer.error for writer in writers] == [50 + at for at in range(20)]


@pytest.mark.complains("sockmi.export:")
def test_a_namespace_of_its_own_does_not_suffice() -> None:
    """Root of a user namespace, in a network namespace that is its own, may write the file; no more."""
    code = """
import errno, os, sys
try:
    os.write(os.open('/proc/sys/sockmi/export', os.O_RDWR), b'pid=1 fd=0')
except OSError as error:
    print(error.errno, open('/proc/sys/sockmi/export').read().strip())
"""
    told = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", code],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert told.split(maxsplit=1)[0] == str(errno.EPERM)
    assert "pid=1 fd=0: CAP_NET_ADMIN and CAP_SYS_PTRACE are needed" in told
