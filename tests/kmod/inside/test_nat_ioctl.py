# SPDX-License-Identifier: MIT
"""The NAT helper's calls: what they answer, what they refuse, and what outlives them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests.kmod.nat_client import (
    CHANGE,
    CHANGE_ARG,
    DEVICE,
    FLUSH,
    FLUSH_ARG,
    LIST,
    READ_ARG,
    WHOLE,
    Action,
    BatchError,
    Flag,
    Flow,
    Nat,
    held,
    opened,
    redirect,
)  # fmt: skip
from tests.kmod.nat_lab import triangle
from tests.lab.redirect_lab import run, until

HOME = Endpoint(IPv4Address("192.0.2.1"), 80)
AWAY = Endpoint(IPv4Address("192.0.2.2"), 4000)
HOME6 = Endpoint(IPv6Address("2001:db8::1"), 80)
AWAY6 = Endpoint(IPv6Address("2001:db8::2"), 4000)
REFCNT = Path("/sys/module/sockmi/refcnt")


def peer(number: int, version: int = 4) -> Endpoint:
    """One of 2^28 peers."""
    host, port = number >> 14, 1024 + (number & 0x3FFF)
    if version == 4:
        return Endpoint(IPv4Address((10 << 24) + host + 1), port)
    return Endpoint(IPv6Address((0x20010DB8 << 96) + host + 16), port)


def ends(number: int, version: int = 4) -> FourTuple:
    return FourTuple(HOME if version == 4 else HOME6, peer(number, version))


def moved(number: int, version: int = 4) -> Flow:
    to = AWAY if version == 4 else AWAY6
    return redirect(ends(number, version), to)


@pytest.fixture
def nat() -> Iterator[Nat]:
    with opened() as made:
        yield made


def refused(nat: Nat, flow: Flow, action: Action = Action.ADD) -> int:
    """The errno of a change that must fail and change nothing."""
    before = nat.list()
    with pytest.raises(BatchError) as failure:
        nat.change(action, flow)
    assert failure.value.done == 0
    assert nat.list() == before
    return failure.value.errno or 0


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_written_is_read(nat: Nat, version: int) -> None:
    tag = bytes(range(16))
    to = AWAY if version == 4 else AWAY6
    flows = [
        Flow(ends(1, version).local, peer(1, version), Flag.HOLD | Flag.MUTE, tag=tag),
        Flow(ends(2, version).local, peer(2, version), Flag.REDIRECT | Flag.MUTE, to, tag=tag),
        Flow(ends(3, version).local, peer(3, version), Flag.TRANSLATE | Flag.UNTRACKED, to),
        Flow(ends(4, version).local, None, Flag.HOLD),
    ]
    nat.add(*flows)
    assert nat.list() == flows == nat.read(*flows)
    assert nat.total() == 4
    assert [flow.id for flow in nat.list()] == sorted(flow.id for flow in nat.list())
    nat.remove(*flows[:2])
    assert nat.list() == flows[2:]
    with pytest.raises(BatchError) as failure:
        nat.read(flows[3], flows[0])
    assert (failure.value.errno, failure.value.done) == (errno.ENOENT, 1)


def test_add_replace_set_remove(nat: Nat) -> None:
    assert refused(nat, moved(1), Action.REPLACE) == errno.ENOENT
    assert refused(nat, moved(1), Action.REMOVE) == errno.ENOENT
    nat.add(held(ends(1)))
    ident = nat.one(ends(1)).id
    assert refused(nat, moved(1)) == errno.EEXIST
    nat.replace(moved(1))
    assert nat.one(ends(1)) == moved(1) and nat.one(ends(1)).id == ident
    nat.set(held(ends(1)))
    nat.set(moved(2))
    assert nat.list() == [held(ends(1)), moved(2)]
    nat.remove(moved(1))
    nat.add(moved(1))
    assert nat.one(ends(1)).id > ident


def test_a_batch_stops_at_the_first_failure(nat: Nat) -> None:
    with pytest.raises(BatchError) as failure:
        nat.add(moved(1), moved(2), moved(1), moved(3))
    assert (failure.value.errno, failure.value.done) == (errno.EEXIST, 2)
    assert nat.list() == [moved(1), moved(2)]


def test_one_address_towards_a_peer_is_one_flows(nat: Nat) -> None:
    other = FourTuple(Endpoint(HOME.address, 81), peer(1))
    nat.add(moved(1))
    assert refused(nat, redirect(other, AWAY)) == errno.EADDRINUSE
    nat.add(redirect(other, Endpoint(AWAY.address, 4001)))
    assert refused(nat, redirect(other, AWAY), Action.REPLACE) == errno.EADDRINUSE
    nat.replace(redirect(ends(1), Endpoint(AWAY.address, 4002)))
    nat.replace(redirect(other, AWAY))
    nat.replace(held(other))
    nat.add(redirect(FourTuple(Endpoint(HOME.address, 82), peer(1)), AWAY))
    third = FourTuple(Endpoint(AWAY.address, 83), peer(1))
    nat.add(Flow(third.local, third.remote, Flag.TRANSLATE, AWAY))
    fourth = FourTuple(Endpoint(AWAY.address, 84), peer(1))
    assert refused(nat, Flow(fourth.local, fourth.remote, Flag.TRANSLATE, AWAY)) == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("flow", "number"),
    [
        (Flow(HOME, peer(1), Flag(0)), errno.EINVAL),
        (Flow(HOME, peer(1), Flag(64)), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.REDIRECT | Flag.TRANSLATE, AWAY), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.REDIRECT), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.REDIRECT, HOME), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.HOLD, AWAY), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.MUTE, hold_ms=1), errno.EINVAL),
        (Flow(HOME, None, Flag.HOLD | Flag.MUTE), errno.EINVAL),
        (Flow(HOME, None, Flag.REDIRECT, AWAY), errno.EINVAL),
        (Flow(Endpoint(HOME.address, 0), peer(1), Flag.HOLD), errno.EINVAL),
        (Flow(HOME, Endpoint(peer(1).address, 0), Flag.HOLD), errno.EINVAL),
        (Flow(HOME, peer(1), Flag.REDIRECT, Endpoint(AWAY.address, 0)), errno.EINVAL),
        (Flow(HOME, peer(1, 6), Flag.HOLD), errno.EAFNOSUPPORT),
        (Flow(HOME6, peer(1), Flag.HOLD), errno.EAFNOSUPPORT),
        (Flow(HOME, peer(1), Flag.REDIRECT, AWAY6), errno.EAFNOSUPPORT),
        (Flow(HOME, peer(1), Flag.REDIRECT, Endpoint(IPv4Address("127.0.0.1"), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME, peer(1), Flag.REDIRECT, Endpoint(IPv4Address("224.0.0.1"), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME, peer(1), Flag.REDIRECT, Endpoint(IPv4Address(2**32 - 1), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME6, peer(1, 6), Flag.REDIRECT, Endpoint(IPv6Address("::1"), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME6, peer(1, 6), Flag.TRANSLATE, Endpoint(IPv6Address("fe80::1"), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME6, peer(1, 6), Flag.TRANSLATE, Endpoint(IPv6Address("ff02::1"), 1)), errno.EADDRNOTAVAIL),
        (Flow(HOME6, Endpoint(IPv6Address("fe80::1"), 1), Flag.REDIRECT, AWAY6), errno.EADDRNOTAVAIL),
    ],
)  # fmt: skip
def test_nonsense_is_refused(nat: Nat, flow: Flow, number: int) -> None:
    assert refused(nat, flow) == number


def test_sizes_of_records(nat: Nat) -> None:
    record = moved(1).pack()

    def change(data: bytes, flow_bytes: int, count: int = 1, action: int = Action.ADD) -> int:
        try:
            nat.change_packed(action, data, count, flow_bytes)
        except BatchError as failure:
            return failure.errno or 0
        return 0

    assert change(record, 79) == errno.EINVAL
    assert change(record, 4097) == errno.EINVAL
    assert change(record, len(record), 65537) == errno.EINVAL
    assert change(record, len(record), 1, 0) == errno.EINVAL
    assert change(record, len(record), 1, 5) == errno.EINVAL
    assert change(record + b"\0" * 7 + b"\1", len(record) + 8) == errno.E2BIG
    assert nat.list() == []
    assert change(record[:80], 80) == 0  # an older program's record
    assert change(moved(2).pack() + bytes(8), len(record) + 8) == 0  # a newer one's, with nothing new in it
    assert nat.list() == [moved(1), moved(2)]
    assert change(b"", len(record), 0) == 0
    _unused, back = nat.failing_call(LIST, READ_ARG.pack(8, 1, WHOLE.size, 0, 0, 0))
    assert nat.failing_call(LIST, READ_ARG.pack(8, 1, WHOLE.size, 0, 0, 0))[0] == errno.EFAULT
    assert READ_ARG.unpack(back)[1] == 0
    assert nat.failing_call(CHANGE, CHANGE_ARG.pack(8, 1, WHOLE.size, Action.ADD, 0))[0] == errno.EFAULT


def test_sizes_of_arguments(nat: Nat) -> None:
    nat.add(moved(1))
    longer = FLUSH_ARG.pack(0, 0) + bytes(8)
    assert nat.failing_call(FLUSH, longer[:-1] + b"\1")[0] == errno.E2BIG
    assert nat.total() == 1
    assert nat.failing_call(FLUSH, struct.pack("=I", Flag.HOLD))[0] == 0
    assert nat.total() == 1
    error, back = nat.failing_call(FLUSH, longer)
    assert (error, struct.unpack("=II", back[:8])) == (0, (0, 1))
    assert nat.failing_call(FLUSH, FLUSH_ARG.pack(1 << 20, 0))[0] == errno.EINVAL
    assert nat.failing_call(0x5F, FLUSH_ARG.pack(0, 0))[0] == errno.ENOTTY


def test_flush_by_flags(nat: Nat) -> None:
    nat.add(held(ends(1), Flag.HOLD), held(ends(2), Flag.MUTE), moved(3), held(ends(4), Flag.UNTRACKED))
    assert nat.flush(Flag.HOLD | Flag.UNTRACKED) == 2
    assert nat.list() == [held(ends(2), Flag.MUTE), moved(3)]
    assert nat.flush() == 2 and nat.flush() == 0


def test_a_list_in_pages_survives_changes(nat: Nat) -> None:
    nat.add(*(moved(i) for i in range(50)))
    pages = nat.pages(7)
    got = list(next(pages))
    nat.remove(*(moved(i) for i in range(5, 20)))
    nat.add(moved(100))
    for page in pages:
        got += page
    assert got == [moved(i) for i in (*range(7), *range(20, 50), 100)]


def test_namespaces_are_apart(nat: Nat) -> None:
    with triangle(4) as of:
        nat.add(moved(1))
        other = of.nat(of.lab.a)
        assert other.list() == []
        other.add(moved(1), moved(2))
        assert nat.list() == [moved(1)]


def test_without_the_capability() -> None:
    """The call counts, not who opened the device."""
    with opened() as nat:
        nat.add(moved(1))
        child = os.fork()
        if not child:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            errors = {
                nat.failing_call(LIST, READ_ARG.pack(0, 0, WHOLE.size, 0, 0, 0))[0],
                nat.failing_call(FLUSH, FLUSH_ARG.pack(0, 0))[0],
                nat.failing_call(CHANGE, CHANGE_ARG.pack(0, 0, WHOLE.size, Action.ADD, 0))[0],
            }
            os._exit(0 if errors == {errno.EPERM} else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert nat.list() == [moved(1)]


def test_user_namespace_rules_its_own() -> None:
    script = (
        "from tests.kmod.inside.test_nat_ioctl import *; n = Nat(); n.add(moved(1)); "
        "assert n.list() == [moved(1)]; n.close(); print('mine')"
    )
    mode = Path(DEVICE).stat().st_mode
    Path(DEVICE).chmod(0o666)
    try:
        with opened() as nat:
            nat.add(moved(7))
            words = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "-Urn"]
            words += [os.sys.executable, "-c", script]
            environment = os.environ | {"PYTHONPATH": ":".join(os.sys.path), "HOME": "/"}
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
            assert done.stdout == "mine\n", done.stderr
            assert nat.list() == [moved(7)]
    finally:
        Path(DEVICE).chmod(mode)


def at_rest() -> int:
    """The module's users, when the namespaces of earlier tests have gone: the kernel does that by and by."""
    count, since = int(REFCNT.read_text()), time.monotonic()
    while time.monotonic() < since + 1:
        if (now := int(REFCNT.read_text())) != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)
    return count


def test_flows_pin_the_module_and_go_with_their_namespace() -> None:
    before = at_rest()
    with triangle(4) as of:
        with of.lab.a.inside():
            nat = Nat()
        nat.add(
            *(moved(i) for i in range(1000)), *(held(ends(2000 + i), Flag.HOLD, 60_000) for i in range(100))
        )
        nat.close()
        until(lambda: int(REFCNT.read_text()) == before + 1, "one reference for the namespace's flows")
        assert subprocess.run(["rmmod", "sockmi"], capture_output=True, check=False).returncode != 0
    until(lambda: int(REFCNT.read_text()) == before, "the end of the namespace")


def left_open() -> list[str]:
    """Descriptors of the device that an earlier test has left here: each keeps the module loaded."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that reads the folder
            if os.readlink(path) == DEVICE:  # noqa: PTH115
                found.append(path.name)
    return found


def test_the_module_goes_when_no_flow_is_left() -> None:
    assert left_open() == []
    with opened() as nat:
        nat.add(*(moved(i) for i in range(300)), held(ends(1000), Flag.HOLD, 30))
        time.sleep(0.2)
        assert nat.total() == 300
    until(lambda: int(REFCNT.read_text()) == 0, "the end of the last user", 30)
    run("rmmod", "sockmi")
    run("insmod", os.environ["SOCKMI_KO"])
    with opened() as nat:
        assert nat.list() == []


def test_many_holds_end_by_themselves(nat: Nat) -> None:
    count = 20_000
    nat.add(*(held(ends(i), Flag.HOLD, 1500 + i % 50) for i in range(count)))
    assert nat.total() <= count
    until(lambda: nat.total() == 0, "the end of all holds", 30)


def test_more_than_the_limit(nat: Nat) -> None:
    limit = Path("/sys/module/sockmi/parameters/nat_flows_max")
    before = limit.read_text()
    try:
        limit.write_text("10")
        with pytest.raises(BatchError) as failure:
            nat.add(*(moved(i) for i in range(20)))
        assert (failure.value.errno, failure.value.done) == (errno.ENOSPC, 10)
        nat.replace(held(ends(3)))
        nat.remove(moved(4))
        nat.add(moved(11))
    finally:
        limit.write_text(before)


@pytest.mark.processors(2)
def test_many_change_at_once() -> None:
    """Adding, replacing, lapsing, listing and flushing from several threads."""
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311
        nat = Nat()
        try:
            while not stop.is_set():
                chosen = [rng.randrange(200) for _turn in range(20)]
                with contextlib.suppress(BatchError):
                    match rng.randrange(5):
                        case 0:
                            nat.set(*(moved(i) for i in chosen))
                        case 1:
                            nat.set(
                                *(
                                    held(
                                        ends(i),
                                        Flag.HOLD | rng.choice([Flag.MUTE, Flag(0)]),
                                        rng.randrange(9),
                                    )
                                    for i in chosen
                                )
                            )
                        case 2:
                            nat.remove(*(moved(i) for i in chosen))
                        case 3:
                            assert len(nat.list()) <= 400
                        case 4 if rng.random() < 0.1:
                            nat.flush()
        except BaseException as failure:
            failures.append(failure)
        finally:
            nat.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    with opened() as nat:
        nat.flush()
        nat.add(moved(1))
        assert nat.list() == [moved(1)]


def test_random_arguments_do_no_harm() -> None:
    rng = random.Random(5)  # noqa: S311
    with opened() as nat:
        nat.add(*(moved(i) for i in range(20)))
        memory = bytearray(moved(1).pack() * 40)
        for _turn in range(3000):
            for _turn in range(rng.randrange(8)):
                memory[rng.randrange(len(memory))] = rng.choice([0, 0xFF, rng.randrange(256)])
            ordinal = rng.randrange(0x40, 0x46)
            argument = bytearray(rng.randbytes(rng.choice([0, 4, 8, 24, 32, 40])))
            if rng.random() < 0.7:
                with contextlib.suppress(BatchError):
                    nat.change_packed(
                        rng.randrange(6), bytes(memory), rng.randrange(40), rng.choice([152, 152, 80, 160])
                    )
            else:
                nat.failing_call(ordinal, bytes(argument))
        nat.flush()
        assert nat.total() == 0
