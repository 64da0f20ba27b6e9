# SPDX-License-Identifier: MIT
"""The lab itself: it is made whole, leaves nothing behind, and its network is what its plan says."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import HOSTS, Lab, LabError, namespaces, record
from lab.daemons import Daemon, Daemons, daemon_config
from lab.host import PROJECT
from lab.plan import FAR_MTU_BYTES, namespaces_of

Names = Callable[[], str]
Ansible = Callable[..., subprocess.CompletedProcess[str]]


def leftovers(name: str) -> list[str]:
    """What there still is of a lab."""
    left = [namespace for namespace in namespaces_of(name) if namespaces.path_of(namespace).exists()]
    return left + ([str(record.ROOT / name)] if (record.ROOT / name).exists() else [])


def gone(process: subprocess.Popen[str] | int) -> bool:
    """True if the process has ended (a zombie has)."""
    return record.start_ticks(process if isinstance(process, int) else process.pid) == 0


def test_up_and_down(lab_name: Names) -> None:
    name = lab_name()
    with Lab(name) as lab:
        assert not lab.missing()
        for host in lab.hosts.values():
            shown = json.loads(host.run(["ip", "-json", "address", "show", "up"]).stdout)
            devices = {device["ifname"]: device for device in shown}
            assert set(devices) == {"lo", *(link.device for link in host.plan.links)}
            for link in host.plan.links:
                addresses = {entry["local"]: entry for entry in devices[link.device]["addr_info"]}
                assert {str(link.address4.ip), str(link.address6.ip)} <= set(addresses)
                assert not any(entry.get("tentative") for entry in addresses.values())
                assert devices[link.device]["mtu"] == link.mtu_bytes
        assert (lab.host("a").etc_dir).is_dir()
        sleeper = lab.host("b").popen(["sleep", "600"])
        stubborn = lab.host("c").popen(
            ["sh", "-c", "trap '' TERM; echo ready; sleep 600"], stdout=subprocess.PIPE
        )
        assert stubborn.stdout is not None
        assert stubborn.stdout.readline()
        stubborn.stdout.close()
    assert sleeper.wait(5) == -signal.SIGTERM
    assert stubborn.wait(5) == -signal.SIGKILL
    assert not leftovers(name)


def test_everyone_reaches_everyone(lab: Lab) -> None:
    for source in ("peer", "a", "d"):
        for target in lab.hosts.values():
            for version in (4, 6):
                lab.host(source).run(["ping", "-c", "1", "-W", "5", target.address(version)])


def test_two_labs_are_apart(lab_name: Names) -> None:
    with Lab(lab_name()) as one, Lab(lab_name()) as two:
        port = 4711
        listeners = [made.host("a").python(socket.create_server, ("", port)) for made in (one, two)]
        for made, listener in zip((one, two), listeners, strict=True):
            address = (made.host("a").address(4), port)
            connection = made.host("peer").python(socket.create_connection, address, 5)
            listener.settimeout(5)
            accepted, _unused = listener.accept()
            connection.sendall(made.name.encode())
            assert accepted.recv(100) == made.name.encode()
            for opened in (accepted, connection, listener):
                opened.close()


def _creator(name: str) -> subprocess.Popen[str]:
    """Another process that makes a lab and starts a program in it."""
    code = (
        "import signal, sys; from lab import Lab; made = Lab(sys.argv[1]); made.up(); "
        "print(made.host('a').popen(['sleep', '600'], stdout=-3).pid, flush=True); signal.pause()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )


def test_next_start_cleans_after_a_killed_one_and_only_that(lab_name: Names) -> None:
    dead, living, persistent = lab_name(), lab_name(), lab_name()
    foreign = f"sml-{lab_name()}-a"
    namespaces.create(foreign)  # of nobody we know: not to be touched
    stays = Lab(persistent, persistent=True)
    creator = _creator(dead)
    try:
        stays.up()
        with creator, Lab(living) as ours:
            kept = ours.host("a").popen(["sleep", "600"])
            assert creator.stdout is not None
            sleeper = int(creator.stdout.readline())
            creator.kill()
            creator.wait()
            assert leftovers(dead)
            assert not gone(sleeper)
            with Lab(lab_name()):
                assert not leftovers(dead)
                assert gone(sleeper)
                assert not ours.missing()
                assert kept.poll() is None
                assert not stays.missing()
                assert namespaces.exists(foreign)
            ours.host("peer").run(["ping", "-c", "1", "-W", "5", ours.host("a").address(4)])
        kept.wait(5)
    finally:
        creator.kill()
        stays.down()
        namespaces.remove(foreign)
    assert not leftovers(persistent)


@pytest.mark.parametrize("made", [0, 1, 4, 7])
def test_killed_while_it_is_made(lab_name: Names, made: int) -> None:
    name = lab_name()
    with _creator(name) as creator:
        deadline = time.monotonic() + 20
        while len([path for path in map(namespaces.path_of, namespaces_of(name)) if path.exists()]) < made:
            assert time.monotonic() < deadline
            assert creator.poll() is None
        creator.kill()
    with Lab(lab_name()):
        assert not leftovers(name)


def test_a_lab_of_a_running_process_is_not_taken(lab_name: Names) -> None:
    name = lab_name()
    with _creator(name) as creator:
        try:
            assert creator.stdout is not None
            creator.stdout.readline()
            with pytest.raises(LabError, match=f"running process {creator.pid}"):
                Lab(name).up()
            with pytest.raises(LabError, match=f"running process {creator.pid}"):
                Lab(name).down()
            assert not Lab(name).missing()
        finally:
            creator.kill()
    assert Lab(name).down()
    assert not leftovers(name)


def test_failure_in_the_middle_leaves_nothing(lab_name: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_unused: object) -> None:
        raise RuntimeError("planted")

    name = lab_name()
    monkeypatch.setattr("lab.network._wait_for_carrier", broken)
    with pytest.raises(RuntimeError, match="planted"), Lab(name):
        pass
    assert not leftovers(name)


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a" * 31, "a/b", "../x"])
def test_bad_names(name: str) -> None:
    with pytest.raises(LabError, match="cannot be the name of a lab"):
        Lab(name)


def test_bad_host(lab: Lab) -> None:
    with pytest.raises(LabError, match="its hosts are router, peer, a, b, c, d"):
        lab.host("e")


def _lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", *words],
        cwd=PROJECT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_command_line(lab_name: Names) -> None:
    name = lab_name()
    try:
        assert _lab("status", "--lab", name).returncode == 3
        assert json.loads(_lab("up", "--lab", name, "--check", "--json").stdout)["changed"] is True
        assert not leftovers(name)
        assert json.loads(_lab("up", "--lab", name, "--json").stdout)["changed"] is True
        assert json.loads(_lab("up", "--lab", name, "--json").stdout)["changed"] is False
        sleeper = Lab(name).host("b").popen(["sleep", "600"])
        status = json.loads(_lab("status", "--lab", name, "--json").stdout)
        assert status["up"] is True
        processes = {host["host"]: host["processes"] for host in status["hosts"]}
        assert processes == {host: [sleeper.pid] if host == "b" else [] for host in HOSTS}
        assert "10.77.1.11" in _lab("status", "--lab", name).stdout
        shown = _lab("exec", "--lab", name, "a", "--", "sh", "-c", "ip -o address; exit 5")
        assert shown.returncode == 5
        assert "10.77.1.11/24" in shown.stdout
        missing = _lab("exec", "--lab", name, "a", "--", "/no/such/program")
        assert (missing.returncode, "cannot run /no/such/program" in missing.stderr) == (1, True)
        # Somebody removes a namespace: the lab is not whole, and up repairs it.
        namespaces.remove(f"sml-{name}-c")
        assert _lab("status", "--lab", name).returncode == 3
        assert json.loads(_lab("up", "--lab", name, "--json").stdout)["changed"] is True
        assert sleeper.wait(5) != 0
        assert json.loads(_lab("down", "--lab", name, "--json").stdout)["changed"] is True
        assert json.loads(_lab("down", "--lab", name, "--json").stdout)["changed"] is False
        assert not leftovers(name)
    finally:
        with contextlib.suppress(LabError):
            Lab(name, persistent=True).down()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "required"),
        (["sideways"], 2, "invalid choice"),
        (["up", "--lab", "A_"], 1, "cannot be the name of a lab"),
        (["exec", "nobody", "--", "true"], 1, "no host 'nobody'"),
        (["exec", "--lab", "no-such-lab", "a", "--", "true"], 1, "is the lab up?"),
        (["exec", "a"], 1, "say which command"),
    ],
)
def test_command_line_errors(words: list[str], code: int, message: str) -> None:
    result = _lab(*words)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


GROUPS = {4: "239.77.83.1", 6: "ff05::7783:1"}


def _join(version: int, port: int) -> socket.socket:
    """A receiver of the group, in the namespace of the calling thread."""
    index = socket.if_nametoindex("eth0")
    if version == 4:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        member = struct.pack("4s4si", socket.inet_aton(GROUPS[4]), b"\0" * 4, index)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    else:
        receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        member = socket.inet_pton(socket.AF_INET6, GROUPS[6]) + struct.pack("@I", index)
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
    receiver.bind(("", port))
    return receiver


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("sender", ["a", "b", "c"])
def test_multicast(lab: Lab, version: int, sender: str) -> None:
    with contextlib.ExitStack() as stack:
        receivers = {
            name: stack.enter_context(lab.host(name).python(_join, version, 4712))
            for name in ("a", "b", "c", "d")
            if name != sender
        }
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        source = stack.enter_context(lab.host(sender).socket(family, socket.SOCK_DGRAM))
        source.sendto(b"hello", (GROUPS[version], 4712))
        for name, receiver in receivers.items():
            # d is behind the router, which does not forward multicast.
            heard, _unused, _unused = select.select([receiver], [], [], 0.2 if name == "d" else 5)
            assert bool(heard) == (name != "d"), name
            if heard:
                data, (address, *_unused) = receiver.recvfrom(100)
                assert (data, address) == (b"hello", lab.host(sender).address(version))


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_to_d(lab: Lab, version: int) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    level, discover, mtu = (
        (socket.IPPROTO_IP, 10, 14) if version == 4 else (socket.IPPROTO_IPV6, 23, 24)
    )  # IP(V6)_MTU_DISCOVER, IP(V6)_MTU of linux/in.h, linux/in6.h
    with lab.host("peer").socket(family, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(level, discover, 2)  # PMTUDISC_DO
        sender.connect((lab.host("d").address(version), 9))
        deadline = time.monotonic() + 5
        while sender.getsockopt(level, mtu) != FAR_MTU_BYTES:
            assert time.monotonic() < deadline
            # EMSGSIZE: the router said so; ECONNREFUSED: d has no such port.
            with contextlib.suppress(OSError):
                sender.send(b"x" * 1440)
            time.sleep(0.01)
        with pytest.raises(OSError) as caught:
            sender.send(b"x" * 1440)
        assert caught.value.errno == errno.EMSGSIZE


def test_python_runs_on_the_host(lab: Lab) -> None:
    def devices() -> set[str]:
        return {name for _unused, name in socket.if_nameindex()}

    before = devices()
    assert lab.host("router").python(devices) == {"lo", "eth0", "eth1"}
    assert devices() == before
    with pytest.raises(ZeroDivisionError):
        lab.host("a").python(lambda: 1 // 0)
    with lab.host("a").entered():
        assert devices() == {"lo", "eth0"}
    assert devices() == before


def test_run_says_what_failed(lab: Lab) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        lab.host("a").run(["sh", "-c", "echo why >&2; exit 3"])
    assert caught.value.returncode == 3
    assert any("why" in note for note in caught.value.__notes__)


def test_daemon_configurations_are_valid(lab: Lab, tmp_path: Path) -> None:
    config = pytest.importorskip("sockmi.config").Config
    for name in ("a", "d"):
        host = lab.host(name)
        for members in ((), (lab.host("a"), lab.host("d"))):
            for version in (4, 6):
                model = config.model_validate(daemon_config(host, members, version))
                assert model.control_path == host.control_socket
                assert model.stream.address == ipaddress.ip_address(host.address(version))


def test_daemon_that_does_not_start(lab: Lab) -> None:
    daemon = Daemon(lab.host("a"), {"no_such_option": 1})
    with pytest.raises(LabError, match="daemon on a ended at once"):
        daemon.start()


def test_key_is_secret_and_shared(lab: Lab) -> None:
    daemons = Daemons(lab, "ab")
    files = [Path(daemon.config["groups"][0]["key_file"]) for daemon in daemons.by_host.values()]
    assert len({file.read_text() for file in files}) == 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


# ---------------------------------------------------------------- Ansible


def test_playbook_is_idempotent(ansible: Ansible, lab_name: Names) -> None:
    name = lab_name()

    def play(state: str, *more: str) -> str:
        # The daemons are those of test_ansible.py.
        extra = f"sockmi_lab_name={name} sockmi_lab_state={state} sockmi_lab_daemons=false"
        result = ansible("ansible-playbook", "playbooks/lab.yml", "-e", extra, *more)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    try:
        assert "changed=1" in play("present", "--check")
        assert not leftovers(name)
        assert "changed=1" in play("present")
        assert "changed=0" in play("present")
        assert "changed=0" in play("present", "--check")
        # The connection, while we have a lab.
        result = ansible("ansible", "lab", "-m", "ansible.builtin.ping", "-e", f"sockmi_lab_name={name}")
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("pong") == 5
        words = "ip -o -4 address show eth0 | grep -o '10[0-9.]*/'; echo \"$SOCKMI_CONTROL\"; cat"
        arguments = json.dumps({"cmd": words, "stdin": "it's  quoted"})
        result = ansible(
            "ansible", "b", "-m", "ansible.builtin.shell", "-a", arguments, "-e", f"sockmi_lab_name={name}"
        )
        for expected in ("10.77.1.12/", f"/run/sockmi-lab/{name}/b/run/control.sock", "it's  quoted"):
            assert expected in result.stdout
        assert "changed=1" in play("absent", "--check")
        assert "changed=1" in play("absent")
        assert "changed=0" in play("absent")
        assert not leftovers(name)
    finally:
        Lab(name, persistent=True).down()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("sockmi_lab_state=sideways", "set it to present or absent"),
        ("sockmi_lab_daemon=false", "sockmi_lab_daemon: the playbook lab has no such variable. It has"),
    ],
)
def test_playbook_refuses_what_it_does_not_know(ansible: Ansible, wrong: str, said: str) -> None:
    # What inventories have for the role is not its own, but known.
    words = ["-e", wrong, "-e", "sockmi_stream_port=7781"]
    result = ansible("ansible-playbook", "playbooks/lab.yml", *words)
    assert result.returncode != 0
    assert said in " ".join(result.stdout.split())


def test_connection_to_no_namespace(ansible: Ansible) -> None:
    result = ansible("ansible", "a", "-m", "ansible.builtin.ping", "-e", "sockmi_lab_name=no-such-lab")
    assert result.returncode != 0
    assert "There is no network namespace 'sml-no-such-lab-a'" in result.stdout + result.stderr


def test_connection_to_a_bad_name(ansible: Ansible) -> None:
    result = ansible("ansible", "a", "-m", "ansible.builtin.ping", "-e", "ansible_netns=../../etc")
    assert result.returncode != 0
    assert "names no network namespace" in result.stdout + result.stderr
