# SPDX-License-Identifier: MIT
"""The Ansible module `kmod` with a real kernel: what keeps it from loading and from unloading."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from sockmi.addresses import Endpoint, FourTuple
from tests import collection, returned
from tests.kmod import forked, nat_client
from tests.kmod.inside.test_module_core import four_tuple, pair, wait_for
from tests.kmod.inside.test_module_races import LIBC
from tests.kmod.module_client import ANY_UID, PUBLISH, Device, Forget, frozen
from tests.lab.redirect_lab import run

# What the last two tests switch on, no kernel switches off again.
pytestmark = [pytest.mark.no_module, pytest.mark.alone]

LOADED = Path("/sys/module/sockmi")
CLONE_NEWNET = 0x40000000
KEPT = [Path("/etc/modprobe.d/sockmi.conf"), Path("/etc/modules-load.d/sockmi.conf")]
SIGNED_ONLY = Path("/sys/module/module/parameters/sig_enforce")
FLOW = FourTuple(Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("192.0.2.2"), 1024))
# It is asked only what is installed: nothing is built here.
DKMS = """#!/bin/sh
echo "sockmi/1.0, $(uname -r), $(uname -m): installed"
"""
# Keeps one unit, whose process has the device open.
SYSTEMCTL = """#!/bin/sh
main=${0%/*}/main
echo "$*" >>"${0%/*}/asked"
case $1 in
show) cat "$main" 2>/dev/null || echo 0 ;;
stop) kill "$(cat "$main")"; while [ -e "/proc/$(cat "$main")/fd/3" ]; do sleep 0.01; done; rm "$main" ;;
start)
	if [ -c /dev/sockmi ]; then exec 3<>/dev/sockmi; else exec 3</dev/null; fi
	sleep 600 >/dev/null 2>&1 & echo $! >"$main" ;;
esac
"""
UNIT = "sockmid.service"
REPLACED = ["parameters", f"stop {UNIT}", "unload", "load", f"start {UNIT}"]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The module where modprobe finds it, as DKMS puts it there."""
    folder = Path("/lib/modules", os.uname().release, "updates/dkms")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.environ["SOCKMI_KO"], folder / "sockmi.ko")
    subprocess.run(["depmod"], check=True, timeout=60)
    yield
    if LOADED.is_dir():
        subprocess.run(["rmmod", "sockmi"], check=True, timeout=60)


@pytest.fixture
def kmod(tmp_path: Path) -> Any:
    """Runs the module as a target does; its result."""
    dkms = tmp_path / "dkms"
    dkms.write_text(DKMS)
    dkms.chmod(0o755)
    link = tmp_path / "ansible_collections/sockmi/appliance"
    link.parent.mkdir(parents=True)
    link.symlink_to(collection.root(None))

    def run(state: str, **options: Any) -> dict[str, Any]:
        flags = {"_ansible_check_mode": options.pop("check", False)}
        options = {"at_boot": False, **options}
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.sockmi.appliance.plugins.modules.kmod"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {"state": state, **options, **flags}}),
            env=os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert not returned.differences("kmod", result)
        return result

    return run


class Daemon:
    """The unit that has the device open, of which the module may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "systemctl").write_text(SYSTEMCTL)
        (folder / "systemctl").chmod(0o755)

    def systemctl(self, verb: str) -> None:
        """As an operator would."""
        subprocess.run([self.folder / "systemctl", verb, UNIT], check=True, timeout=60)

    @property
    def process(self) -> str:
        """Its process id; "" if it is stopped."""
        main = self.folder / "main"
        return main.read_text().strip() if main.exists() else ""

    @property
    def asked(self) -> set[str]:
        """Verbs that were asked for since the last look."""
        file = self.folder / "asked"
        verbs = {line.split()[0] for line in file.read_text().splitlines()}
        file.unlink()
        return verbs


@pytest.fixture
def daemon(kmod: Any, tmp_path: Path) -> Iterator[Daemon]:
    """It runs, and has the module open that was loaded for it."""
    daemon = Daemon(tmp_path)
    kmod("loaded", parameters={"list_max": "100,100,100"})
    daemon.systemctl("start")
    yield daemon
    if daemon.process:
        daemon.systemctl("stop")
    kmod("unloaded", force=True)


def limits() -> str:
    """Of the lists, as loaded."""
    return (LOADED / "parameters/list_max").read_text().strip()


def obstacle(result: dict[str, Any]) -> str:
    """The code of the one obstacle, whose words are the message."""
    assert result["failed"] is True
    [row] = result["obstacles"]
    assert row["mend"] in result["msg"]
    return str(row["code"])


def test_loaded_once(kmod: Any) -> None:
    assert kmod("loaded", check=True)["actions"] == ["load"]
    assert not LOADED.is_dir()
    assert (kmod("loaded")["actions"], LOADED.is_dir()) == (["load"], True)
    assert kmod("loaded")["changed"] is False


def test_in_use(kmod: Any) -> None:
    """An open device keeps it, and its process is named; a redirect keeps it when all have closed it."""
    with contextlib.closing(nat_client.Nat()) as nat:
        for check, force in itertools.product((False, True), repeat=2):
            refused = kmod("unloaded", check=check, force=force)
            assert obstacle(refused) == "in-use"
            name = Path("/proc/self/comm").read_text().strip()
            assert f"{name} ({os.getpid()})" in refused["msg"]
        nat.add(nat_client.held(FLOW, nat_client.Flag.MUTE))
        assert obstacle(kmod("unloaded", force=True)) == "in-use"  # and the flow is still there:
    assert obstacle(kmod("unloaded")) == "in-use"
    assert obstacle(kmod("absent")) == "in-use"
    assert LOADED.is_dir()
    predicted = kmod("unloaded", force=True, check=True)
    assert (predicted["actions"], LOADED.is_dir()) == (["drop redirects", "unload"], True)
    forced = kmod("unloaded", force=True)
    assert (forced["actions"], LOADED.is_dir()) == (["drop redirects", "unload"], False)
    assert kmod("unloaded")["changed"] is False


def test_absent_refuses_before_it_removes(kmod: Any) -> None:
    """What is in use stays whole: loaded at boot with its parameters, and nothing is said to have changed."""
    kmod("loaded", at_boot=True, parameters={"list_max": "100,100,100"})
    try:
        with nat_client.opened():
            for check in (True, False):
                refused = kmod("absent", check=check)
                assert obstacle(refused) == "in-use"
                assert (refused["changed"], refused["actions"]) == (False, [])
        assert all(file.exists() for file in KEPT)
        assert kmod("unloaded", at_boot=True, parameters={})["actions"] == ["unload", "parameters"]
    finally:
        for file in KEPT:
            file.unlink(missing_ok=True)


def test_force_reaches_all_namespaces_and_the_lists(kmod: Any) -> None:
    """A flow in a namespace whose process has ended, and an image that waits for an application."""
    kmod("loaded")
    namespace = "forced"
    subprocess.run(["ip", "netns", "add", namespace], check=True, timeout=60)
    try:
        add = "from tests.kmod.inside.test_kmod_obstacles import FLOW, nat_client; nat = nat_client.Nat(); "
        add += "nat.add(nat_client.held(FLOW, nat_client.Flag.MUTE))"
        subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", add], check=True, timeout=60)
        assert obstacle(kmod("unloaded")) == "in-use"
        with Device() as device:
            ours, _peer = pair()
            with frozen(device, ours) as (freeze, image):
                device.abort(freeze)
            device.list_add(image, flags=ANY_UID | PUBLISH)
        assert obstacle(kmod("unloaded")) == "in-use"
        assert LOADED.is_dir()
        forced = kmod("unloaded", force=True)
        assert (forced["actions"], LOADED.is_dir()) == (["drop redirects", "unload"], False)
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], check=True, timeout=60)


def keep_a_packet(parent: socket.socket) -> None:
    """By a hold without an end, in a namespace of our own, where conntrack is at work."""
    assert not LIBC.unshare(CLONE_NEWNET)
    run("ip", "link", "set", "lo", "up")
    run("nft", "table ip t { chain in { type filter hook prerouting priority 0; ct state new counter; }; }")
    ours, peer = pair()
    for one in (ours, peer):  # nobody would acknowledge their FINs, and they would keep the namespace
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    nat = nat_client.Nat()
    nat.add(nat_client.held(four_tuple(ours)))
    peer.sendall(b"x")
    wait_for(lambda: nat.one(four_tuple(ours)).kept > 0)
    parent.sendall(b"x")
    parent.recv(1)


@pytest.mark.kernels("6.*", "7.*")  # where conntrack is a module
def test_a_namespace_ends_though_a_hold_has_packets_that_conntrack_knows(kmod: Any) -> None:
    """Conntrack waits for them without end, and before the module's turn comes: it was loaded later."""
    kmod("loaded")
    assert not Path("/sys/module/nf_conntrack").exists(), "nothing would be shown"
    child, talk = forked.start(keep_a_packet, 30)
    try:
        assert talk.recv(1) == b"x"
        assert obstacle(kmod("unloaded")) == "in-use"
    finally:
        forked.end(child, talk)
    wait_for(lambda: (LOADED / "refcnt").read_text() == "0\n", 30)
    assert kmod("unloaded")["actions"] == ["unload"]


@pytest.mark.parametrize("what", ["flow", "entry"])
def test_each_keeps_it_and_only_an_administrator_can_drop_it(kmod: Any, what: str) -> None:
    """Root of a user's own namespaces cannot cut off the host's connections."""
    kmod("loaded")
    with contextlib.closing(nat_client.Nat()) as nat, Device() as device:
        if what == "flow":
            nat.add(nat_client.held(FLOW, nat_client.Flag.MUTE))
        else:
            ours, _peer = pair()
            with frozen(device, ours) as (freeze, image):
                device.abort(freeze)
            device.list_add(image, flags=ANY_UID | PUBLISH)
    assert obstacle(kmod("unloaded")) == "in-use"
    call = "from tests.kmod.module_client import Device, Forget; Device(slots=0).call('forget', Forget())"
    refused = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-c", call],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode
    assert "Operation not permitted" in refused.stderr
    assert obstacle(kmod("unloaded")) == "in-use"
    with Device(slots=0) as device:
        gone = device.call("forget", Forget())
    assert (gone.flows, gone.entries) == ((1, 0) if what == "flow" else (0, 1))
    assert kmod("unloaded")["changed"] is True


def test_other_parameters_wait_for_the_next_load(kmod: Any) -> None:
    """Those that only loading sets: said, and not done, while something depends on the module."""
    kmod("loaded", parameters={"list_max": "100,100,100"})
    with nat_client.opened():
        waits = kmod("loaded", parameters={"list_max": "200,200,200"})
    assert waits["reload_needed"] is True
    assert "in use" in str(waits["warnings"])
    assert (LOADED / "parameters/list_max").read_text().strip() == "100,100,100"
    kmod("loaded", parameters={"list_max": "200,200,200"})
    assert (LOADED / "parameters/list_max").read_text().strip() == "200,200,200"
    assert kmod("unloaded")["changed"] is True


def test_no_parameters_are_the_defaults(kmod: Any) -> None:
    """Told for as long as it is in use, and then loaded; what can be set is set at once."""
    kmod("loaded", parameters={"list_max": "5,5,5", "freeze_max_ms": "100"})
    with nat_client.opened():
        for actions in (["set freeze_max_ms=5000", "parameters"], []):
            waits = kmod("loaded", parameters={})
            assert (waits["reload_needed"], waits["actions"], limits()) == (True, actions, "5,5,5")
    assert kmod("loaded", parameters={})["reload_needed"] is False
    assert limits() == "64,64,1024"
    for wrong in ({"freez_max_ms": "100"}, {"list_max": "abc"}):
        for check in (True, False):
            refused = kmod("loaded", check=check, parameters=wrong)
            assert (refused["failed"], refused["changed"], KEPT[0].exists()) == (True, False, False)
    assert kmod("unloaded")["changed"] is True


def test_the_lists_maxima_are_the_parameter_s(kmod: Any) -> None:
    """In each network namespace, until its own sysctls say otherwise."""
    kmod("loaded", parameters={"list_max": "1,2,3"})
    files = [f"/proc/sys/sockmi/max_{name}" for name in ("bound", "listening", "connected")]
    assert [Path(file).read_text() for file in files] == ["1\n", "2\n", "3\n"]
    Path(files[0]).write_text("7")
    other = subprocess.check_output(["unshare", "-n", "cat", *files], text=True)
    assert other.split() == ["1", "2", "3"]
    assert Path(files[0]).read_text() == "7\n"
    assert kmod("unloaded")["changed"] is True


def test_loaded_by_hand(kmod: Any) -> None:
    """What was loaded from elsewhere, so that modprobe does not know it, is unloaded all the same."""
    file = Path("/lib/modules", os.uname().release, "updates/dkms/sockmi.ko")
    subprocess.run(["insmod", file], check=True, timeout=60)
    file.unlink()
    subprocess.run(["depmod"], check=True, timeout=60)
    try:
        unloaded = kmod("unloaded")
        assert (unloaded["actions"], LOADED.is_dir()) == (["unload"], False)
    finally:
        shutil.copy(os.environ["SOCKMI_KO"], file)
        subprocess.run(["depmod"], check=True, timeout=60)


def test_the_daemon_stops_for_another(kmod: Any, daemon: Daemon) -> None:
    """If it alone keeps the module from being replaced, and it may be stopped. Check mode predicts it."""
    before = daemon.process
    wanted = {"parameters": {"list_max": "300,300,300"}, "stop_unit": UNIT}
    predicted = kmod("loaded", check=True, **wanted)
    assert (predicted["actions"], predicted["reload_needed"], predicted["loaded"]) == (REPLACED, False, True)
    assert (daemon.process, limits(), daemon.asked & {"stop"}) == (before, "100,100,100", set())
    replaced = kmod("loaded", **wanted)
    assert (replaced["actions"], replaced["reload_needed"]) == (REPLACED, False)
    assert (limits(), replaced["users"]) == ("300,300,300", 1)
    assert daemon.process not in ("", before)
    again = kmod("loaded", **wanted)
    assert (again["changed"], again["actions"]) == (False, [])


def test_the_daemon_goes_on_if_that_is_no_use(kmod: Any, daemon: Daemon) -> None:
    """Something else depends on the module: another program with the device open, or a redirect."""
    before = daemon.process
    wanted = {"parameters": {"list_max": "300,300,300"}, "stop_unit": UNIT}
    with contextlib.closing(nat_client.Nat()) as nat:
        for check in (True, False):
            waits = kmod("loaded", check=check, **wanted)
            assert waits["reload_needed"] is True
            assert obstacle(kmod("unloaded", check=check, stop_unit=UNIT, force=True)) == "in-use"
        nat.add(nat_client.held(FLOW, nat_client.Flag.MUTE))
    for check in (True, False):
        assert kmod("loaded", check=check, **wanted)["reload_needed"] is True
        assert obstacle(kmod("unloaded", check=check, stop_unit=UNIT)) == "in-use"
    assert (daemon.process, limits()) == (before, "100,100,100")
    assert daemon.asked & {"stop", "start"} == {"start"}  # by the fixture
    unload = {"stop_unit": UNIT, "force": True}
    actions = [f"stop {UNIT}", "drop redirects", "unload"]
    assert kmod("unloaded", check=True, **unload)["actions"] == actions
    assert daemon.process == before
    assert kmod("unloaded", **unload)["actions"] == actions
    assert (daemon.process, LOADED.is_dir()) == ("", False)


def test_the_daemon_runs_again_if_it_cannot_be_loaded(kmod: Any, daemon: Daemon) -> None:
    before = daemon.process
    failed = kmod("loaded", parameters={"list_max": "1,2,3,4,5"}, stop_unit=UNIT)
    assert obstacle(failed) == "load-failed"
    done = [f"stop {UNIT}", "unload", "load", f"start {UNIT}"]  # with the former parameters
    assert (failed["changed"], failed["actions"]) == (True, done)
    assert daemon.process not in ("", before)
    assert limits() == "100,100,100"
    assert "list_max=100,100,100" in KEPT[0].read_text()
    daemon.systemctl("stop")
    kmod("unloaded", parameters={})


def test_the_daemon_stays_stopped_without_it(kmod: Any, daemon: Daemon) -> None:
    """Unloaded, or predicted for a play that stops the daemon before."""
    predicted = kmod("unloaded", check=True, stop_unit=UNIT)
    assert (predicted["actions"], predicted["loaded"]) == ([f"stop {UNIT}", "unload"], False)
    assert LOADED.is_dir() and daemon.process
    done = kmod("unloaded", stop_unit=UNIT)
    assert (done["actions"], LOADED.is_dir(), daemon.process) == ([f"stop {UNIT}", "unload"], False, "")


def test_no_unit(kmod: Any) -> None:
    assert "stop_unit is 'a b'; give" in kmod("loaded", stop_unit="a b")["msg"]


@pytest.mark.kernels("6.*", "7.*")  # a User-Mode-Linux kernel checks no signatures
def test_secure_boot(kmod: Any) -> None:
    """With signatures enforced, as Secure Boot has it, it says how to enroll the key."""
    SIGNED_ONLY.write_text("1")
    refused = kmod("loaded")
    assert obstacle(refused) == "secure-boot"
    assert "mokutil --import" in refused["msg"]
    assert not LOADED.is_dir()
    assert subprocess.run(["modprobe", "sockmi"], check=False, capture_output=True, timeout=60).returncode


def test_modules_disabled(kmod: Any) -> None:
    Path("/proc/sys/kernel/modules_disabled").write_text("1")
    refused = kmod("loaded")
    assert obstacle(refused) == "modules-disabled"
    assert "reboot" in refused["msg"]
