# SPDX-License-Identifier: MIT
"""This release's engine, programs and daemon with modules of an older, a newer and a foreign interface.

The modules are today's sources with another header (guests/releases.py). Within a major everything works,
whichever is the older; of another major nothing is asked, and the daemon takes the repair engine and says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest

from guests.paths import PROJECT
from lab.daemons import Daemon
from lab.labs import Lab
from lab.plan import LabError
from sockmi.engine.choice import choose
from sockmi.engine.kernel import KernelEngine, ModuleMissing
from sockmi.engine.repair import INJECT_MARK
from tests.kmod import nat_client
from tests.kmod.inside.test_module_core import four_tuple, move, new_socket, pair, read_exactly
from tests.kmod.inside.test_module_races import rmmod
from tests.kmod.inside.test_module_sysctl import Writer
from tests.kmod.module_client import (
    ANY_UID,
    COMMIT_OWNED,
    PUBLISH,
    Claim,
    Device,
    EventType,
    ListName,
    Refused,
    Request,
    frozen,
)
from tests.lab import engine_lab as el
from tests.lab import test_engine_states as states
from tests.lab.scenario import ask, daemons, status

pytestmark = [
    pytest.mark.no_module,
    pytest.mark.releases("older", "newer", "foreign"),
    pytest.mark.timeout(300),
]

NAT = {"devices": ["eth0"], "modes": ["nat"]}
UNKNOWN_FEATURE = 1 << 31


def interface() -> tuple[int, int]:
    """Major and minor of this release."""
    header = (PROJECT / "kmod/uapi/sockmi.h").read_text()
    major, minor = (re.search(rf"ABI_{name} (\d+)", header) for name in ("MAJOR", "MINOR"))
    assert major and minor
    return int(major[1]), int(minor[1])


MAJOR, MINOR = interface()
VERSIONS = {"older": (MAJOR, 1), "newer": (MAJOR, MINOR + 1), "foreign": (MAJOR + 1, MINOR)}


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest) -> Iterator[str]:
    """The module of that release is loaded; it can be unloaded afterwards."""
    name = str(request.param)
    subprocess.run(["insmod", os.environ[f"SOCKMI_KO_{name.upper()}"]], check=True, timeout=60)
    yield name
    assert rmmod() == 0


same_major = pytest.mark.parametrize("release", ["older", "newer"], indirect=True, scope="module")
another_major = pytest.mark.parametrize("release", ["foreign"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def segment() -> Iterator[el.Lab]:
    with el.lab() as it:
        yield it


def moves(segment: el.Lab, engines: el.Pair) -> None:
    """A connection from one host to the other: bytes that wait in its queues, then traffic, and its end."""
    case = states.make_case(segment, "v4", "ESTABLISHED", True)
    copy, _unused = states.move(segment, engines, case.ours, case.port)
    segment.unhold("peer", case.port, "deaf")
    states.finish(segment, case, copy, "ESTABLISHED")


def said(daemon: Daemon) -> str:
    """Its log, since its last start."""
    return daemon.log_file.read_text().rpartition("sockmi.engine.choice: ")[2]


# ---- Of the same major ----


@same_major
def test_the_engine_moves_a_connection(segment: el.Lab, release: str) -> None:
    with contextlib.closing(KernelEngine()) as engine:
        assert engine.version == "{}.{}".format(*VERSIONS[release])
        moves(segment, el.Pair(engine, engine))


@same_major
def test_the_engine_moves_a_listener(segment: el.Lab, release: str) -> None:
    with contextlib.closing(KernelEngine()) as engine:
        states.test_listener_with_children(segment, el.Pair(engine, engine), "v6")


@same_major
def test_the_owner_is_looked_for_if_the_module_can(segment: el.Lab, release: str) -> None:
    """COMMIT of what its owner has closed: refused by a module that looks; the older one is not asked."""
    segment.switch("a")
    ours, peer = segment.pair("v4", segment.port())
    with contextlib.closing(KernelEngine()) as engine, segment.host("a"):
        inode = os.fstat(ours.fileno()).st_ino
        assert engine.stop([inode], [], 1.0) == [None]
        (captured,) = engine.capture([ours.fileno()], 5.0)
        (refused,) = engine.release([ours.fileno()], [captured.image], owned=True)  # type: ignore[union-attr]
        assert (refused is None) == (release == "older")
        engine.resume([inode])
    with Device() as device:
        claim = device.claim(new_socket("ipv4"))
        freeze = device.freeze(claim)
        if release == "older":  # and would not understand it
            with pytest.raises(Refused) as caught:
                device.commit(freeze, COMMIT_OWNED)
            assert caught.value.errno == errno.EINVAL
        device.commit(freeze)
    ours.close()
    peer.close()


@same_major
def test_a_program_moves_a_connection(release: str) -> None:
    """By the calls themselves, of which each struct is another one's in the newer module."""
    with Device() as device:
        hello = device.hello()
        assert (hello.abi_major, hello.abi_minor) == VERSIONS[release]
        assert bool(hello.features & UNKNOWN_FEATURE) == (release == "newer")
        ours, peer = pair()
        copy = move(device, ours, "ipv4", 0)
        peer.sendall(b"there")
        assert read_exactly(copy, 5) == b"there"
        # And on, through the list.
        with frozen(device, copy) as (freeze, image):
            device.commit(freeze)
        entry = device.list_add(image, flags=ANY_UID | PUBLISH)
        again = new_socket("ipv4")
        count, (request,) = device.take(Request(fd=again.fileno(), list=ListName.CONNECTED))
        assert (count, request.result, request.id) == (1, 1, entry.id)
        again.sendall(b"back")
        assert read_exactly(peer, 4) == b"back"
    with nat_client.opened() as nat:
        flows = [nat_client.held(four_tuple(sock)) for sock in (again, peer)]
        nat.add(*flows)
        assert {(one.local, one.remote) for one in nat.list()} == {(one.local, one.remote) for one in flows}
        nat.remove(*flows)


@same_major
def test_events_are_read(release: str) -> None:
    """A record of read() is the same in all releases: its size is in no ioctl's number."""
    ours, _peer = pair()
    with Device() as device:
        device.serve()
        with Writer(ours) as writer:
            (event,) = device.events()
            assert (event.type, event.owner_fd) == (EventType.EXPORT_REQUEST, ours.fileno())
            device.release(Claim(id=event.id))
            device.answer(event.id, 0, "done")
    assert writer.error == 0


@same_major
def test_the_daemon_uses_it(lab: Lab, release: str) -> None:
    """What an older module cannot do is left out, and told."""
    version = "{}.{}".format(*VERSIONS[release])
    with daemons(lab, "a", redirect=NAT) as running:
        assert status(lab.host("a"))["engine"] == "kernel"
        [answer] = ask(lab.host("a"), "doctor")
        [found] = [one for one in answer["checks"] if one["name"] == "engine"]
        assert (found["status"], version in found["message"]) == ("ok", True), found
        log = said(running["a"])
    serves = "serves the sysctl sockmi.export now" in log
    assert serves == (release == "newer")
    assert serves != ("is not served: the loaded module is older than this daemon" in log)


# ---- Of another major ----


@another_major
def test_another_major_does_nothing(release: str) -> None:
    with Device(slots=0, greet=False) as device:
        with pytest.raises(Refused) as caught:
            device.hello()
        assert caught.value.errno == errno.EPROTONOSUPPORT
        assert (caught.value.argument.abi_major, caught.value.argument.abi_minor) == VERSIONS["foreign"]
        with pytest.raises(Refused) as caught:
            device.claim(socket.socket())
        assert caught.value.errno == errno.EPROTO


@another_major
def test_another_major_leaves_the_repair_engine(segment: el.Lab, release: str) -> None:
    engine, why = choose("auto", INJECT_MARK)
    assert engine.name == "repair"
    major, minor = VERSIONS["foreign"]
    assert re.fullmatch(
        rf"the loaded module speaks /dev/sockmi {major}\.{minor} with images \d+\.\d+, "
        rf"and this daemon {MAJOR} with images \d+; install a module and a daemon of the same release",
        why,
    )
    with pytest.raises(ModuleMissing) as caught:
        choose("kernel", INJECT_MARK)
    assert str(caught.value) == why
    moves(segment, el.Pair(engine, engine))


@another_major
def test_the_daemon_falls_back_and_says_so(lab: Lab, release: str) -> None:
    host = lab.host("a")
    why = "the loaded module speaks /dev/sockmi {}.{} with images".format(*VERSIONS["foreign"])
    with daemons(lab, "a", redirect=NAT) as running:
        assert status(host)["engine"] == "repair"
        [answer] = ask(host, "doctor")
        [found] = [one for one in answer["checks"] if one["name"] == "engine"]
        assert (
            found["status"] == "warning" and f"repair, though a module is loaded: {why}" in found["message"]
        )
        assert f"engine repair, as {why}" in said(running["a"])
    refused = pytest.raises(LabError, match="engine: kernel is asked for, but the loaded module speaks")
    with refused, daemons(lab, "a", engines={"a": "kernel"}, redirect=NAT):
        pass
