# SPDX-License-Identifier: MIT
"""drain.yml on a real lab: a host is emptied of live connections, and the others take their share."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from tests.lab.ansible_lab import URGENT, Controller, changed, clients
from tests.lab.scenario import Service, ask, status, until
from tests.lab.scenario import drain as drain_by_hand

pytest.importorskip("ansible")

# Answers each byte, but for a question mark; what has moved away is none of its business any more.
ANSWERS = """
import selectors, socket, sys
listener = socket.create_server(("", int(sys.argv[1])))
ready = selectors.DefaultSelector()
ready.register(listener, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in ready.select():
        if key.fileobj is listener:
            ready.register(listener.accept()[0], selectors.EVENT_READ)
            continue
        try:
            data = key.fileobj.recv(1)
        except ConnectionAbortedError:
            data = b""
        if data == b"!":
            key.fileobj.send(data)
        elif not data:
            ready.unregister(key.fileobj)
"""


def drain(controller: Controller, *flags: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run the playbook."""
    return controller.playbook("drain", *flags, **variables)


def redirects(controller: Controller, host: str) -> int:
    """How many connections have left a host."""
    [answer] = ask(controller.lab.host(host), "status")
    return int(answer["redirects_out"])


def test_drain_spreads_in_steps(
    controller: Controller, lines: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients(lines, 7)
    variables: dict[str, Any] = {
        "from": "a",
        "local_port": 7000,
        "rate": 4,
        "step_s": 1,
        "report_file": str(tmp_path / "drain.json"),
        "report_page": str(tmp_path / "drain.html"),
    }
    # Two seeds with which a set of b and c has two orders: where each goes must not follow from that.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    tried = drain(controller, "--check", "--diff", **variables)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert changed(tried) == 1
    assert "7 selected, 7 planned" in tried.stdout
    assert redirects(controller, "a") == 0
    assert not (tmp_path / "drain.json").exists()

    monkeypatch.setenv("PYTHONHASHSEED", "1")
    done = drain(controller, "--diff", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"a: [1-4] of 7 moved", done.stdout)
    assert re.search(r"a: 7 of 7 moved", done.stdout)
    shown, said = (set(re.findall(r"^[+-]10\.77.*", one.stdout, re.MULTILINE)) for one in (done, tried))
    assert len(said) == 2 * 7
    assert shown == said
    assert "7 selected, 7 moved" in done.stdout
    assert redirects(controller, "a") == 7
    report = json.loads((tmp_path / "drain.json").read_text())["hosts"]["a"]
    assert (report["moved"], report["refused"]) == (7, 0)
    shares = Counter(row["to"] for row in report["migrations"])
    assert set(shares) == {"b", "c"}
    assert min(shares.values()) >= 3
    page = (tmp_path / "drain.html").read_text()
    assert "7 of 7 connections moved" in page
    assert page.count("<tr><td>") == 7 + 2

    again = drain(controller, **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    assert changed(again) == 0
    report = json.loads((tmp_path / "drain.json").read_text())["hosts"]["a"]
    assert report["moved"] == 7  # of the run before
    lines.finish()


def test_drain_stops_and_goes_on(controller: Controller, lines: Service, tmp_path: Path) -> None:
    lab = controller.lab
    clients(lines, 2)
    variables: dict[str, Any] = {"from": "a", "process": "python*", "report_file": str(tmp_path / "d.json")}
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
            stopped = drain(controller, stop_after=1, **variables)
            assert stopped.returncode != 0
            assert "urgent-data" in stopped.stdout
            assert "(stop_after is 1)" in " ".join(stopped.stdout.split())
        program.kill()
    finished = drain(controller, stop_after=1, **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "d.json").read_text())["hosts"]["a"]
    assert (report["moved"], report["refused"]) == (2, 0)
    lines.finish()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "set it to one"),
        ({"from": "nobody"}, "no host or group"),
        ({"from": "a", "rate": 0}, "numbers above 0"),
        ({"from": "a", "stop_after": "many"}, "a whole number"),
        ({"from": "a", "port": 443}, "sockmi_port: the playbook drain has no such variable"),
        ({"from": "a", "to": "b,nobody"}, "names nobody, which a does not hear"),
        ({"from": "a,b", "to": "b"}, "names b, which a does not hear, or which is to be emptied too"),
    ],
)
def test_drain_checks_its_variables(controller: Controller, variables: dict[str, Any], told: str) -> None:
    result = drain(controller, "--check", **variables)
    assert result.returncode != 0
    assert told in " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize("called", ["address", "host_id"])
def test_nobody_is_to_take_who_is_to_be_emptied(controller: Controller, called: str) -> None:
    """By whatever name."""
    [answer] = ask(controller.lab.host("a"), "groups")
    [named] = [one[called] for one in answer["groups"][0]["members"] if one["host"] == "b"]
    wanted = named.rpartition(":")[0].strip("[]") or named.replace("-", "")
    result = drain(controller, "--check", **{"from": "a,b", "to": wanted})
    assert result.returncode != 0
    assert f"names {wanted}, which a does not hear, or which is to be emptied too" in " ".join(
        result.stdout.split()
    )


@contextlib.contextmanager
def by_other_names(controller: Controller, folder: Path) -> Iterator[Controller]:
    """An inventory that calls a, b and c web1, web2 and web3; web1's namespace has a name of its own."""
    lab = controller.lab
    inventory: dict[str, Any] = {}
    for name, host in zip(("web1", "web2", "web3"), "abc", strict=True):
        inventory[name] = {
            "ansible_connection": "sockmi.appliance.netns",
            "ansible_netns": f"sml-{lab.name}-{host}",
            "ansible_netns_environment": {"SOCKMI_CONTROL": str(lab.host(host).control_socket)},
            "ansible_python_interpreter": sys.executable,
        }
    own = f"sml-{lab.name}-web1"
    inventory["web1"]["ansible_netns"] = own
    (folder / "hosts.yml").write_text(json.dumps({"all": {"hosts": inventory}}))
    made = Controller(lab)
    made.inventory = folder / "hosts.yml"
    name_again(lab, own)
    try:
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", own], check=True)


def name_again(lab: Lab, name: str) -> None:
    """One more name for the namespace of the host a."""
    place = Path("/run/netns", name)
    place.touch()
    subprocess.run(["mount", "--bind", f"/run/netns/sml-{lab.name}-a", place], check=True)


def report_of(file: Path, host: str) -> dict[str, Any]:
    """What a report says of a host; nothing twice."""
    content: dict[str, Any] = json.loads(file.read_text())["hosts"][host]
    ids = [one["migration_id"] for one in content["migrations"]]
    assert len(set(ids)) == len(ids)
    return content


def test_hosts_one_after_the_other(controller: Controller, lines: Service, tmp_path: Path) -> None:
    """Nobody takes what another one gives away, whatever the inventory calls them; each record is there once.

    The first becomes unreachable in the middle: what has moved is told, and a later run goes on.
    """
    clients(lines, 6)
    file = tmp_path / "drain.json"
    variables: dict[str, Any] = {
        "from": "web1,web2",
        "local_port": 7000,
        "step_s": 1,
        "report_file": str(file),
    }
    drain_by_hand(controller.lab.host("a"), "b", local_port=7000, remote_port=last_port(controller))
    with by_other_names(controller, tmp_path) as named, ThreadPoolExecutor() as pool:
        running = pool.submit(drain, named, rate=1, **variables)
        until(file.exists, 60)
        own = f"sml-{controller.lab.name}-web1"
        subprocess.run(["ip", "netns", "del", own], check=True)
        lost = running.result()
        name_again(controller.lab, own)
        assert lost.returncode != 0
        assert f"There is no network namespace '{own}'" in " ".join(lost.stdout.split())
        before = report_of(file, "web1")["moved"]
        assert 0 < before < 5
        assert re.search(rf"{before} selected, {before} moved", lost.stdout)
        done = drain(named, rate=50, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [report_of(file, host)["moved"] for host in ("web1", "web2")] == [5, 1]
    records = [one for host in ("web1", "web2") for one in report_of(file, host)["migrations"]]
    assert {one["to"] for one in records} == {"c"}
    lines.finish()


def last_port(controller: Controller) -> int:
    """The peer's port of one of the connections."""
    wanted = {"local_port": 7000, "kinds": ["connected"]}
    rows = [
        row for answer in ask(controller.lab.host("a"), "list", filter=wanted) for row in answer["sockets"]
    ]
    return int(rows[-1]["remote"].rpartition(":")[2])


def test_only_quiet_connections(controller: Controller) -> None:
    """The one whose request has been answered goes; the other stays, and is told."""
    lab = controller.lab
    program = lab.host("a").popen([sys.executable, "-c", ANSWERS, "7998"], stdout=subprocess.PIPE, text=True)
    peer = lab.host("peer")
    with program, contextlib.ExitStack() as stack, peer.socket() as quiet, peer.socket() as waiting:
        stack.callback(program.kill)
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        for connection, request in ((quiet, b"!"), (waiting, b"?")):
            connection.connect((lab.host("a").address(4), 7998))
            time.sleep(0.1)  # TCP knows when data came and went, but no better than the clock's tick
            connection.send(request)
        assert quiet.recv(9) == b"!"
        result = controller.module("a", "drain", local_port=7998, idle_s=0.5, to=["b"])
        assert (result["failed"], result["moved"], result["refused"], result["left"]) == (True, 1, 0, 1)
        assert "that were not quiet for 0.5 s: 1." in result["msg"]
        [moved] = result["migrations"]
        assert moved["remote"].endswith(f":{quiet.getsockname()[1]}")
        emptied = drain(controller, **{"from": "b", "to": "a", "local_port": 1})
        assert emptied.returncode == 0, emptied.stdout
        assert "b: 1 sockets stay in its import lists" in " ".join(emptied.stdout.split())
        emptied = drain(controller, **{"from": "b", "to": "a"})
        assert emptied.returncode == 0, emptied.stdout
        assert "stay in its import lists" not in emptied.stdout
        assert status(lab.host("b"))["import_lists"]["connected"]["length"] == 0
        for connection in (quiet, waiting):  # nobody imports it: a reset is its end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: status(lab.host("a"))["import_lists"]["connected"]["length"] == 0)


def test_drain_says_when_nobody_is_left(controller: Controller) -> None:
    result = drain(controller, **{"from": "a,b,c", "serial": 3})
    assert result.returncode != 0
    assert "hears no other daemon" in result.stdout


def test_what_leaves_in_the_middle_gets_nothing_more(controller: Controller, lines: Service) -> None:
    clients(lines, 6)
    before = redirects(controller, "a")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(drain, controller, **{"from": "a", "local_port": 7000, "rate": 2, "step_s": 1})
        until(lambda: redirects(controller, "a") > before, 60)
        [answer] = ask(controller.lab.host("c"), "groups")
        for group in answer["groups"]:
            ask(controller.lab.host("c"), "groups", action="leave", name=group["name"], force=True)
        done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "c gets nothing more" in " ".join((done.stdout + done.stderr).split())
    assert "6 selected, 6 moved" in done.stdout
    lines.finish()
