# SPDX-License-Identifier: MIT
"""The modules and migrate.yml, run by Ansible on a real lab with real daemons and clients."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab import Lab, record
from lab.host import Host
from lab.plan import DAEMON_HOSTS
from lab.traffic.pattern import Pattern
from sockmi import api
from tests.lab.ansible_lab import URGENT, Controller, changed, clients, daemons
from tests.lab.cgroup import unit
from tests.lab.scenario import Service, ask, service, status, until, wait_for_members

pytest.importorskip("ansible")

PROJECT = Path(__file__).resolve().parents[2]
ID = "2b5cf3a1-50a7-4a06-8f1b-5a4f60f3c9d7"
SLOW_CLIENTS, QUEUED_BYTES = 4, 1 << 20
DOWNLOAD_BYTES = 64 << 20  # more than a send buffer and a receive buffer can grow to hold
# ---------------------------------------------------------------- daemons of the lab


def test_daemons_stay_and_share_a_key(controller: Controller) -> None:
    lab = controller.lab
    first = daemons(lab, "status")
    again = daemons(lab, "up")
    assert again["changed"] is False
    assert [row["pid"] for row in again["hosts"]] == [row["pid"] for row in first["hosts"]]
    # Nobody's children any more, in sessions of their own.
    for row in first["hosts"]:
        assert record.start_ticks(row["pid"])
        assert os.getsid(row["pid"]) == row["pid"]
    assert daemons(lab, "up", "--hosts", "d", "--check")["changed"] is True
    assert daemons(lab, "status", "--hosts", "d")["hosts"][0]["pid"] is None


def test_daemons_come_back(lab_name: Callable[[], str]) -> None:
    """Killed, or with another key: it is mended, and only that."""
    with Lab(lab_name()) as made:
        before = daemons(made, "up", "--hosts", "a,b")["hosts"]
        os.kill(before[0]["pid"], 9)
        until(lambda: not record.start_ticks(before[0]["pid"]))
        after = daemons(made, "up", "--hosts", "a,b")["hosts"]
        assert [row["changed"] for row in after] == [True, False]
        assert after[1]["pid"] == before[1]["pid"]
        (made.host("b").etc_dir / "group.key").write_text("00" * 32)
        assert [row["changed"] for row in daemons(made, "up", "--hosts", "a,b")["hosts"]] == [False, True]
        wait_for_members(made, "ab")
        assert daemons(made, "down", "--hosts", "b", "--check")["changed"] is True
        assert daemons(made, "down")["changed"] is True
        assert daemons(made, "down")["changed"] is False
        daemons(made, "up", "--hosts", "a")
    assert not made.host("a").control_socket.exists()


def test_daemons_errors(lab: Lab) -> None:
    for words, message in (
        (["--lab", "no-such-lab"], "is not up; make it first"),
        (["--lab", lab.name, "--hosts", "a,peer"], "no daemon can run on 'peer'; choose among a, b, c, d"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "lab", "daemons", "up", *words],
            cwd=PROJECT, text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (result.returncode, message in result.stderr) == (1, True), result.stderr


def test_lab_playbook_starts_daemons(lab_name: Callable[[], str]) -> None:
    name = lab_name()
    made = Lab(name, persistent=True)
    controller = Controller(made)

    def play(*words: str) -> int:
        result = controller.command("ansible-playbook", "playbooks/lab.yml", *words)
        assert result.returncode == 0, result.stdout + result.stderr
        return changed(result, "localhost")

    try:
        assert play("--check") == 2
        assert play() == 2
        assert all(row["pid"] for row in daemons(made, "status")["hosts"])
        assert play() == 0
        assert play("--check") == 0
        assert play("-e", "sockmi_lab_state=absent") == 1
        assert not (record.ROOT / name).exists()
    finally:
        made.down()


# ---------------------------------------------------------------- modules


@pytest.mark.usefixtures("core")
def test_info(controller: Controller, lines: Service) -> None:
    clients(lines, 1)
    facts = controller.module("a", "info", "--check", gather_subset=["all"], local_port=lines.port)
    assert facts["changed"] is False
    assert facts["daemon"]["host"] == "a"
    assert {member["host"] for member in facts["groups"][0]["members"]} == {"b", "c"}
    assert sorted(row["kind"] for row in facts["sockets"]) == ["connected", "listening"]
    assert {row["pid"] for row in facts["sockets"]} == {lines.processes["a"].pid}
    assert {"imports", "redirects", "history"} < set(facts)
    # Real rows have exactly the documented fields (tests/unit/test_modules.py compares the models).
    assert set(facts["sockets"][0]) == set(api.SocketRow.model_fields)
    only = controller.module("a", "info", gather_subset=["imports"])
    assert not {"daemon", "groups", "sockets"} & set(only)
    lines.finish()


def test_export_predicts_and_is_idempotent(controller: Controller, lines: Service) -> None:
    """One socket, by pid and fd: predicted, moved, and asked for again under its migration id."""
    clients(lines, 1)
    [row] = controller.module("a", "info", gather_subset=["sockets"], local_port=7000, kinds=["connected"])[
        "sockets"
    ]
    options = {"pid": row["pid"], "fd": row["fd"], "to": "b", "migration_id": ID}
    planned = controller.module("a", "export", "--check", "--diff", **options)
    moved = controller.module("a", "export", "--diff", **options)
    assert (planned["changed"], planned["moved"], planned["refused"]) == (True, 1, 0)
    assert (moved["changed"], moved["moved"], moved["refused"]) == (True, 1, 0)
    assert planned["migrations"][0]["outcome"] == "planned"
    assert planned["shown"] == moved["shown"]
    assert f"-{row['local']} - {row['remote']}: a" in moved["shown"]
    assert f"+{row['local']} - {row['remote']}: b" in moved["shown"]
    [done] = moved["migrations"]
    assert (done["outcome"], done["from"], done["to"], done["migration_id"]) == ("moved", "a", "b", ID)
    assert {"migration_id", "from", "fidelity"} < set(done)
    for flags in ([], ["--check"]):
        again = controller.module("a", "export", "--diff", *flags, **options)
        assert (again["changed"], again["moved"], again["shown"]) == (False, 1, "")
        assert again["migrations"][0]["ended_at"] == done["ended_at"]
    # Without an id it is asked to move a socket that is no more.
    gone = controller.module("a", "export", pid=row["pid"], fd=row["fd"], to="b")
    assert (gone["failed"], gone["changed"]) == (True, False)
    lines.finish()


def test_export_in_the_background(controller: Controller, lines: Service) -> None:
    """As an async task: what is asked for later has the records of the moves."""
    clients(lines, 1)
    words = ["a", "-m", "sockmi.appliance.export", "-a", "local_port=7000 to=b", "-B", "60", "-P", "1"]
    done = controller.command("ansible", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout[done.stdout.rindex("=> ") + 3 :])
    assert (result["finished"], result["changed"], result["moved"]) == (1, True, 1)
    assert [one["to"] for one in result["migrations"]] == ["b"]
    lines.finish()


def test_export_by_filter(controller: Controller, lines: Service) -> None:
    clients(lines, 3)
    pid = lines.processes["a"].pid
    one = controller.module("a", "export", process="python*", local_port=7000, count=1, to="10.77.1.12")
    rest = controller.module("a", "export", pid=pid, remote_address="10.77.1.0/24", to="b")
    none = controller.module("a", "export", pid=pid, states=["ESTABLISHED"], to="b")
    assert [(result["changed"], result["moved"]) for result in (one, rest, none)] == [
        (True, 1),
        (True, 2),
        (False, 0),
    ]
    assert {row["to"] for row in one["migrations"] + rest["migrations"]} == {"b"}
    lines.finish()


def test_export_by_unit_and_state(controller: Controller, lines: Service) -> None:
    """A filter that fits nothing moves nothing, and one that fits some leaves the others."""
    clients(lines, 2)
    with unit() as group:
        (group / "cgroup.procs").write_text(str(lines.processes["a"].pid))
        results = [
            controller.module("a", "export", to="b", unit=name, states=[state])
            for name, state in (
                ("smt-other.service", "ESTABLISHED"),
                (group.name, "CLOSE-WAIT"),
                ("smt-*.service", "ESTABLISHED"),
            )
        ]
    assert [(one["changed"], one["moved"]) for one in results] == [(False, 0), (False, 0), (True, 2)]
    lines.finish()


def test_export_fails_and_says_why(controller: Controller, lines: Service) -> None:
    clients(lines, 1)
    target = controller.module("a", "export", local_port=7000, to="nobody")
    assert (target["failed"], target["code"], target["changed"]) == (True, "no-such-host", False)
    assert "'nobody'; heard: b, c" in target["msg"]
    silent = controller.module("a", "export", local_port=7000, to="10.77.1.99", timeout=1)
    assert (silent["failed"], silent["refused"]) == (True, 1)
    assert "1 of 1 sockets did not move" in silent["msg"]
    allowed = controller.module(
        "a", "export", local_port=7000, to="10.77.1.99", timeout=1, allow_refused=True
    )
    assert (allowed["changed"], allowed["moved"], allowed["refused"]) == (False, 0, 1)
    assert allowed["migrations"][0]["refusal"]["message"]
    wrong = controller.module("a", "export", local_port="http")
    assert "local_port" in wrong["msg"]
    down = controller.module("d", "info")
    assert f"{controller.lab.host('d').control_socket}: No such file" in down["msg"]
    assert "Start it" in down["msg"]
    lines.finish()


@pytest.mark.usefixtures("core")
def test_group(controller: Controller, tmp_path: Path) -> None:
    """Joined on a and b; the members hear each other; check mode and diff tell what the run does."""
    key = "0123456789abcdef" * 4
    options: dict[str, Any] = {"name": "web", "address": "239.7.7.7", "port": 7007, "interface": "eth0"}
    for host in "ab":
        options |= {"key": key, "key_file": str(tmp_path / f"{host}.key")}
        planned = controller.module(host, "group", "--check", "--diff", **options)
        done = controller.module(host, "group", "--diff", **options)
        assert (
            (planned["changed"], planned["shown"])
            == (done["changed"], done["shown"])
            == (True, done["shown"])
        )
        assert key not in done["shown"] + json.dumps(done)
        assert ask(controller.lab.host(host), "groups")[0]["groups"][1]["name"] == "web"
    again = controller.module("b", "group", "--diff", **options, members_min=1, wait_s=20)
    assert (again["changed"], again["key_changed"], again["shown"]) == (False, False, "")
    assert [member["host"] for member in again["group"]["members"]] == ["a"]
    lonely = controller.module("a", "group", name="web", members_min=2, wait_s=0.5)
    assert "1 of 2 other members heard" in lonely["msg"]
    # Another key: it is in the group again, and hears nobody.
    options |= {"key": key[::-1], "members_min": 1, "wait_s": 0.5}
    other = controller.module("b", "group", **options)
    assert (other["failed"], other["changed"], other["key_changed"]) == (True, True, True)
    for host in "ab":
        assert controller.module(host, "group", name="web", state="absent")["changed"] is True
        assert controller.module(host, "group", name="web", state="absent")["changed"] is False


def test_group_is_not_cut_off_if_it_cannot_be_joined(controller: Controller, tmp_path: Path) -> None:
    """Another key is neither in the file then nor in use; check mode tells what can be seen before."""
    group: dict[str, Any] = {"name": "kept", "address": "239.7.7.9", "port": 7009, "interface": "eth0"}
    key = "0123456789abcdef" * 4
    file = tmp_path / "kept.key"
    file.touch(0o600)
    file.write_text(key)
    here, there = (controller.lab.host(name) for name in "ba")
    for host in (here, there):
        ask(host, "groups", action="join", key_file=str(file), **group)
    other = {**group, "key_file": str(file), "key": key[::-1]}
    here.run(["ip", "link", "add", "d0", "type", "veth", "peer", "name", "d1"])
    here.run(["ip", "link", "set", "d0", "up"])
    try:
        for flags in (["--check"], []):
            unseen = controller.module("b", "group", *flags, **{**other, "interface": "d0"})
            assert (unseen["failed"], unseen["changed"]) == (True, False)
            assert "joined on d0: Cannot assign requested address" in unseen["msg"]
        with here.socket(kind=socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 7009))  # which nobody sees as long as the group itself has the port
            refused = controller.module("b", "group", **{**other, "interface": "lo"})
        assert "with the former settings again" in refused["msg"]
        assert (refused["failed"], refused["changed"], refused["key_changed"]) == (True, False, False)
        assert file.read_text() == key

        def heard() -> list[str]:
            [row] = [one for one in ask(here, "groups")[0]["groups"] if one["name"] == "kept"]
            assert row["interface"] == "eth0"
            return [member["host"] for member in row["members"]]

        until(lambda: heard() == ["a"])
    finally:
        here.run(["ip", "link", "del", "d0"])
        for host in (here, there):
            ask(host, "groups", action="leave", name="kept")


def test_a_group_of_the_configuration(controller: Controller) -> None:
    """It gets another key, and its own again: it stands in the configuration all the time."""
    key_file = controller.lab.host("b").etc_dir / "group.key"
    ours = key_file.read_text().strip()
    try:
        for key, heard in ((ours[::-1], 0), (ours, 2)):
            options = {"name": "lab", "key": key, "key_file": str(key_file), "members_min": heard}
            done = controller.module("b", "group", **options, wait_s=20)
            assert (done["changed"], done["key_changed"]) == (True, True), done
            assert done["group"]["configured"] is True
    finally:
        key_file.write_text(ours + "\n")
        ask(controller.lab.host("b"), "reload")


# ---------------------------------------------------------------- migrate.yml


def test_migrate(controller: Controller, lines: Service, tmp_path: Path) -> None:
    """All connections, a to b to c: predicted, moved, reported; and a second run changes nothing."""
    clients(lines, 2)
    file = tmp_path / "report.json"
    check = controller.migrate("--check", "--diff", **{"from": "a", "to": "b", "report_file": str(file)})
    assert (check.returncode, changed(check), file.exists()) == (0, 1, False), check.stdout
    assert "2 selected, 2 planned" in check.stdout
    moved = controller.migrate("--diff", **{"from": "a", "to": "b", "report_file": str(file)})
    assert (moved.returncode, changed(moved)) == (0, 1), moved.stdout
    assert "2 selected, 2 moved" in moved.stdout
    differences = [
        [line for line in result.stdout.splitlines() if re.match(r"[+-]10\.77", line)]
        for result in (check, moved)
    ]
    assert len(differences[0]) == 4
    assert differences[0] == differences[1]
    report = json.loads(file.read_text())
    assert (report["to"], report["hosts"]["a"]["moved"]) == ("b", 2)
    assert {row["outcome"] for row in report["hosts"]["a"]["migrations"]} == {"moved"}
    until(lambda: status(controller.lab.host("b"))["import_lists"]["connected"]["length"] == 0)
    on = controller.migrate(**{"from": "b", "to": "c", "process": "python*"})
    assert (on.returncode, changed(on, "b")) == (0, 1), on.stdout
    again = controller.migrate(**{"from": "a,b", "to": "c", "serial": 1})
    assert (again.returncode, changed(again, "a"), changed(again, "b")) == (0, 0, 0), again.stdout
    assert again.stdout.count("PLAY [Move live connections]") == 2
    lines.finish()


def test_migrate_with_slow_clients(controller: Controller, tmp_path: Path) -> None:
    """Who reads slowly has megabytes queued on the exporter: they move, and every byte arrives."""
    lab, fast = controller.lab, threading.Event()
    with (
        service(lab, "download", "abc", tmp_path) as running,
        ThreadPoolExecutor(SLOW_CLIENTS) as pool,
    ):
        server = lab.host("a").address(4), running.port
        try:
            downloads = [
                pool.submit(download_slowly, lab.host("peer"), server, seed, fast)
                for seed in range(SLOW_CLIENTS)
            ]
            until(lambda: all(queued >= QUEUED_BYTES for queued in send_queues(lab, "a", running.port)))
            moved = controller.migrate(**{"from": "a", "to": "b", "local_port": running.port})
            assert f"{SLOW_CLIENTS} selected, {SLOW_CLIENTS} moved" in moved.stdout, moved.stdout
            assert all(queued >= QUEUED_BYTES / 2 for queued in send_queues(lab, "b", running.port))
        finally:
            fast.set()
        for seed, download in enumerate(downloads):
            assert download.result(30) == Pattern(seed, "download").sha256(DOWNLOAD_BYTES)
        running.finish()


def send_queues(lab: Lab, host: str, port: int) -> list[int]:
    """What is queued at each of the slow clients' connections; bytes."""
    wanted = {"local_port": port, "kinds": ["connected"]}
    rows = [row for answer in ask(lab.host(host), "list", filter=wanted) for row in answer["sockets"]]
    return [row["send_queue_bytes"] for row in rows] if len(rows) == SLOW_CLIENTS else [0]


def download_slowly(peer: Host, server: tuple[str, int], seed: int, fast: threading.Event) -> str:
    """The SHA-256 of what comes: at first at once, so that windows grow, then at 200 kB/s, until ``fast``."""
    digest, received, at_once = hashlib.sha256(), 0, True
    with peer.socket() as connection:
        connection.settimeout(30)
        connection.connect(server)
        connection.sendall(f"GET /download?bytes={DOWNLOAD_BYTES}&seed={seed} HTTP/1.1\r\n\r\n".encode())
        with connection.makefile("rb", buffering=0) as answer:
            while answer.readline() != b"\r\n":
                pass
        while content := connection.recv(1 << 20 if at_once else 10_000):
            digest.update(content)
            received += len(content)
            at_once = received < 3 * QUEUED_BYTES or fast.wait(0.05)
    return digest.hexdigest()


def test_migrate_stops_before_what_cannot_move(controller: Controller, lines: Service) -> None:
    """An urgent byte on one of the connections: nothing moves, unless that is allowed."""
    clients(lines, 1)
    lab = controller.lab
    program = lab.host("a").popen(
        [sys.executable, "-c", URGENT, "7999"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with lab.host("peer").socket() as connection:
            connection.connect((lab.host("a").address(4), 7999))
            connection.send(b"!", 1)  # MSG_OOB
            assert program.stdout.readline() == "urgent\n"
            refused = controller.migrate(**{"from": "a", "to": "b"})
            assert refused.returncode != 0
            for word in ("urgent-data", "1 of 2 sockets of a cannot be moved, and nothing was"):
                assert word in refused.stdout + refused.stderr
            assert status(lab.host("a"))["migrations_under_way"] == 0
            assert lines_left(lab) == 1
            allowed = controller.migrate(**{"from": "a", "to": "b", "allow_refused": True})
            assert (allowed.returncode, changed(allowed)) == (0, 1), allowed.stdout + allowed.stderr
            assert "2 selected, 1 moved, 1 refused" in allowed.stdout
            assert lines_left(lab) == 0
        program.kill()
    lines.finish()


def lines_left(lab: Lab) -> int:
    """Live connections of the line service on a."""
    wanted = {"local_port": 7000, "kinds": ["connected"], "states": ["ESTABLISHED"]}
    return sum(len(answer["sockets"]) for answer in ask(lab.host("a"), "list", filter=wanted))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "sockmi_from is '', which is no host or group"),
        ({"from": "nobody"}, "sockmi_from is 'nobody', which is no host or group"),
        ({"from": "a,b"}, "which is several hosts; set sockmi_to"),
        ({"from": "a", "timeout": "soon"}, "sockmi_timeout is 'soon'"),
        ({"from": "a", "allow_refused": "perhaps"}, "sockmi_allow_refused is 'perhaps'"),
        ({"from": "a", "local_port": 70000}, "local_port is 70000; give a number"),
        ({"from": "d"}, "Start it"),
        ({"from": "a", "unit": ""}, "unit is empty"),
        ({"from": "a", "count": 0}, "count is 0"),
        ({"from": "a", "units": "nginx.service"}, "sockmi_units: the playbook migrate has no such variable"),
        ({"from": "a", "to": "nobody"}, "sockmi_to is 'nobody', whom a does not hear; it hears b, c."),
    ],
)
def test_migrate_checks_its_variables(
    controller: Controller, variables: dict[str, Any], message: str
) -> None:
    started = time.monotonic()
    result = controller.migrate(**variables)
    assert result.returncode != 0
    assert message in " ".join((result.stdout + result.stderr).split())
    assert changed(result, "localhost") == 0
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["migrate", "drain"])
def test_a_limit_leaves_out_no_check(controller: Controller, name: str) -> None:
    result = controller.playbook(name, "--limit", "a", **{"from": "a", "units": "nginx.service"})
    assert result.returncode != 0
    assert "--limit leaves out localhost" in " ".join((result.stdout + result.stderr).split())


def test_daemon_hosts_are_those_of_the_inventory() -> None:
    text = (PROJECT / "inventories/lab/hosts.yml").read_text()
    for name in DAEMON_HOSTS:
        assert f"{name}:" in text
