# SPDX-License-Identifier: MIT
"""`sockmi` against real daemons: every command, every bad argument, JSON and exit status."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from lab.daemons import Daemons, write_secret
from lab.labs import Lab
from sockmi import api
from sockmi.cli.arguments import EPILOG, build_parser
from sockmi.client import ImportRequest, import_socket
from sockmi.version import VERSION
from tests.lab.cgroup import unit
from tests.lab.scenario import daemons, until
from tests.lab.terminal import Result, Scene, elapsed, ended, listener, run, run_as

OK, NOT_DONE, USAGE, NO_DAEMON, NOTHING = 0, 1, 2, 3, 4
NOBODY = 65534


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Daemons]:
    """Daemons on a and b, which everybody may talk to."""
    with daemons(lab, "ab", control_mode=0o666) as both:
        yield both


@pytest.fixture
def scene(lab: Lab, running: Daemons) -> Iterator[Scene]:
    one = Scene(lab)
    try:
        yield one
    finally:
        one.close()


def as_model(model: Any, value: Any) -> Any:
    """``value`` as the control socket's model: no field is unknown, none is missing, each of its type."""
    return TypeAdapter(model).validate_json(json.dumps(value))


def the_error(result: Result, status: int, *words: str) -> None:
    """A clear message on standard error, and the status."""
    assert result.status == status, result
    assert result.err.startswith("sockmi"), result
    for word in words:
        assert word in result.err, result


# -- export and import


@pytest.mark.parametrize("version", [4, 6])
def test_cat_continues_a_line_session(scene: Scene, lab: Lab, version: int) -> None:
    """The owner on a knows nothing; `cat`, which knows nothing either, goes on at b."""
    a, b = lab.host("a"), lab.host("b")
    scene.server("a", 5100, version=version)
    client = scene.client("a", 5100, version)
    importer = scene.program("b", "import", "--port", 5100, "--json", "--exec", "cat")
    scene.waiting("b")
    pid, fd = scene.descriptor_of(client)
    done = run("export", "--pid", pid, "--fd", fd, "--to", "b", "--json", host=a)
    assert done.status == OK, done
    [record] = as_model(list[api.MigrationRecord], done.json)
    assert (record.outcome, record.to, record.pid, record.fd) == ("moved", "b", pid, fd)
    for number in range(20):
        assert client.say(f"line {number}") == f"line {number}"
    [moved] = [row for row in scene.rows("a", "redirects") if row["remote"] == client.local]
    assert as_model(api.RedirectRow, moved).direction == "export"
    [came] = [row for row in scene.rows("b", "redirects") if row["remote"] == client.local]
    assert as_model(api.RedirectRow, came).direction == "import"
    assert moved["mode"] in run("list", "redirects", host=a).out
    client.connection.shutdown(socket.SHUT_WR)
    result = ended(importer)
    assert result.status == OK, result
    [line] = result.out.splitlines()
    told = json.loads(line)
    assert told["migration_id"] == str(record.migration_id)
    assert (told["remote"], told["from"], told["kind"]) == (client.local, "a", "connected")
    # The same story in both histories, and nothing of it lost in print.
    for host, direction in ((a, "export"), (b, "import")):
        found = run("history", "--direction", direction, "--outcome", "moved", "--json", host=host)
        records = as_model(list[api.MigrationRecord], found.json)
        assert record.migration_id in [one.migration_id for one in records]
        assert client.local in run("history", "--direction", direction, host=host).out


def test_the_command_is_told_what_it_got(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5101)
    client = scene.client("a", 5101)
    script = 'echo "$SOCKMI_LOCAL $SOCKMI_REMOTE $SOCKMI_MIGRATION_ID"; read line; exit 7'
    importer = scene.program("b", "import", "--local-port", 5101, "--exec", "sh", "-c", script)
    scene.waiting("b")
    pid, fd = scene.descriptor_of(client)
    shown = run("export", "--pid", pid, "--fd", fd, host=lab.host("a"))
    assert shown.status == OK
    assert "moved" in shown.out and client.local in shown.out
    local, remote, migration = client.hear().split()
    assert local == f"{lab.host('a').address4}:5101"
    assert remote == client.local
    assert len(migration) == 36
    client.connection.sendall(b"bye\n")
    result = ended(importer)
    the_error(result, NOT_DONE, "1 of 1 commands failed")
    assert f"connected {local} <-> {remote} from a" in result.out


def test_import_several(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5102)
    clients = [scene.client("a", 5102) for _turn in range(3)]
    importer = scene.program("b", "import", "--port", 5102, "--count", 3, "--exec", "cat")
    scene.waiting("b")
    moved = run("drain", "--port", 5102, "--kind", "connected", "--to", "b", host=lab.host("a"))
    assert moved.status == OK, moved
    for client in clients:
        assert client.say("hello") == "hello"
        client.connection.shutdown(socket.SHUT_WR)
    result = ended(importer)
    assert result.status == OK, result
    assert len(result.out.splitlines()) == 3


def test_fewer_come_than_were_wanted(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5103)
    client = scene.client("a", 5103)
    importer = scene.program("b", "import", "--port", 5103, "--count", 2, "--timeout", 3, "--exec", "true")
    scene.waiting("b")
    assert run("drain", "--port", 5103, "--kind", "connected", "--to", "b", host=lab.host("a")).status == OK
    assert client.connection.recv(1) == b""  # `true` has closed it
    the_error(ended(importer), NOTHING, "1 came in time")


@pytest.mark.parametrize("timeout_s", [0, 0.3])
def test_import_times_out(lab: Lab, running: Daemons, timeout_s: float) -> None:
    started = time.monotonic()
    result = run("import", "--port", 5999, "--timeout", timeout_s, host=lab.host("b"))
    the_error(result, NOTHING, "nothing came in time")
    assert timeout_s <= elapsed(started) < timeout_s + 5


def test_import_joins_the_terminal(scene: Scene, lab: Lab) -> None:
    """Without --exec the connection is joined to standard input and output."""
    scene.server("a", 5104)
    client = scene.client("a", 5104)
    importer = scene.program("b", "import", "--port", 5104, "--json", stdin=subprocess.PIPE)
    scene.waiting("b")
    pid, fd = scene.descriptor_of(client)
    assert run("export", "--pid", pid, "--fd", fd, host=lab.host("a")).status == OK
    assert importer.stdin is not None and importer.stdout is not None
    importer.stdin.write("from b\n")
    importer.stdin.close()
    importer.stdin = None
    assert client.hear() == "from b"
    assert client.connection.recv(1) == b""
    client.connection.sendall(b"from the peer\n")
    client.connection.close()
    result = ended(importer)
    assert (result.status, result.out) == (OK, "from the peer\n")
    assert json.loads(result.err)["remote"].startswith(str(lab.host("peer").address4))


def test_import_is_interrupted(lab: Lab, running: Daemons, scene: Scene) -> None:
    importer = scene.program("b", "import", "--port", 5998)
    scene.waiting("b")
    importer.send_signal(signal.SIGINT)
    assert ended(importer).status == 128 + signal.SIGINT
    until(
        lambda: run("status", "--json", host=lab.host("b")).json["import_lists"]["connected"]["waiting"] == 0
    )


def test_listed_imports_wait_and_are_taken(scene: Scene, lab: Lab) -> None:
    """Exported while nobody waits: `list imports` shows it, `import` takes it."""
    scene.server("a", 5105)
    client = scene.client("a", 5105)
    assert run("list", "imports", host=lab.host("b")).status == NOTHING
    assert run("drain", "--port", 5105, "--kind", "connected", "--to", "b", host=lab.host("a")).status == OK
    [row] = as_model(list[api.ImportRow], scene.rows("b", "imports"))
    assert (row.remote, row.from_, row.kind) == (client.local, "a", "connected")
    shown = run("list", "imports", host=lab.host("b"))
    assert shown.status == OK and client.local in shown.out
    assert f"  {row.waiting_since.astimezone():%Y-%m-%d %H:%M:%S}  " in shown.out
    assert run("status", "--json", host=lab.host("b")).json["import_lists"]["connected"]["length"] == 1
    importer = scene.program(
        "b", "import", "--kind", "connected", "--local-address", lab.host("a").address4,
        "--remote-address", lab.host("peer").address4, "--exec", "cat",
    )  # fmt: skip
    assert client.say("again") == "again"
    client.connection.shutdown(socket.SHUT_WR)
    assert ended(importer).status == OK


def test_export_as_a_dry_run(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5106)
    client = scene.client("a", 5106)
    pid, fd = scene.descriptor_of(client)
    planned = run("export", "--pid", pid, "--fd", fd, "--dry-run", "--json", host=lab.host("a"))
    assert planned.status == OK
    assert (planned.json[0]["outcome"], planned.json[0]["to"]) == ("planned", "b")
    assert client.say("still here") == "still here"
    assert scene.descriptor_of(client) == (pid, fd)
    [told] = run("history", "--outcome", "planned", "--limit", 1, "--json", host=lab.host("a")).json
    assert told["hop"] == 1
    times = {
        name: planned.json[0][name] for name in ("started_at", "ended_at")
    }  # another spelling of the same
    assert {name: datetime.fromisoformat(told.pop(name)) for name in times} == {
        name: datetime.fromisoformat(text) for name, text in times.items()
    }
    assert {**told, **times} == planned.json[0]


def test_export_that_is_refused(scene: Scene, lab: Lab) -> None:
    """Before the freeze; the connection goes on, the reason is told, the status is 1."""
    scene.server("a", 5107)
    client = scene.client("a", 5107)
    pid, fd = scene.descriptor_of(client)
    client.connection.send(b"!", socket.MSG_OOB)
    until(lambda: any(row.get("refusal") for row in scene.rows("a", "--pid", pid, "--fd", fd)))
    [row] = scene.rows("a", "--pid", pid, "--fd", fd)
    assert (row["movable"], row["refusal"]["code"]) == (False, "urgent-data")
    assert "urgent-data" in run("list", "--pid", pid, host=lab.host("a")).out
    words = ("export", "--pid", pid, "--fd", fd, "--to", "b")
    refused = run(*words, "--json", host=lab.host("a"))
    assert refused.status == NOT_DONE
    assert refused.json[0]["refusal"]["code"] == "urgent-data"
    shown = run(*words, host=lab.host("a"))
    assert shown.status == NOT_DONE
    assert "urgent-data: " in shown.out
    assert client.say("and on") == "and on"


def test_export_twice(scene: Scene, lab: Lab) -> None:
    """The owner's descriptor is dead after the move."""
    scene.server("a", 5108)
    client = scene.client("a", 5108)
    importer = scene.program("b", "import", "--port", 5108, "--exec", "cat")
    scene.waiting("b")
    owner = scene.server("a", 5208)
    assert owner.poll() is None
    pid, fd = scene.descriptor_of(client)
    os.kill(pid, signal.SIGSTOP)  # so that it does not close the dead descriptor
    try:
        done = run("export", "--pid", pid, "--fd", fd, host=lab.host("a"))
        assert done.status == OK
        assert "import list" not in done.out
        again = run("export", "--pid", pid, "--fd", fd, "--timeout", 1, "--json", host=lab.host("a"))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert again.status == NOT_DONE
    assert again.json[0]["outcome"] in ("refused", "aborted"), again.out
    client.connection.shutdown(socket.SHUT_WR)
    assert ended(importer).status == OK


def test_an_export_for_which_nobody_waits_says_so(scene: Scene, lab: Lab) -> None:
    """It has moved, and its peer hears nothing: that is not told as if all were well."""
    scene.server("a", 5118)
    client = scene.client("a", 5118)
    pid, fd = scene.descriptor_of(client)
    shown = run("export", "--pid", pid, "--fd", fd, "--to", "b", host=lab.host("a"))
    assert shown.status == OK
    assert "1 wait in an import list of b for an application: see `sockmi list imports` there" in shown.out
    newest = ("history", "--direction", "export", "--limit", 1)
    [record] = run(*newest, "--json", host=lab.host("a")).json
    assert record["listed"] is True
    when = datetime.fromisoformat(record["ended_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert f"\n{when}  export     connected" in run(*newest, host=lab.host("a")).out
    lists = [
        one
        for one in run("doctor", "--json", host=lab.host("b")).json["checks"]
        if one["name"] == "import lists"
    ]
    assert [one["message"] for one in lists] == ["For 1 connected sockets no application waits."]
    importer = scene.program("b", "import", "--port", 5118, "--exec", "cat")
    assert client.say("at last") == "at last"
    client.connection.shutdown(socket.SHUT_WR)
    assert ended(importer).status == OK


def test_export_of_what_is_not_there(lab: Lab, running: Daemons, scene: Scene) -> None:
    a = lab.host("a")
    owner = scene.server("a", 5109)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cases = [
        (("--pid", gone.pid, "--fd", 5), f"process {gone.pid}", "No such process"),
        (("--pid", owner.pid, "--fd", 999), "999", "Bad file descriptor"),
        (("--pid", owner.pid, "--fd", 1), "Descriptor 1", "ocket"),
    ]
    for words, *expected in cases:
        the_error(run("export", *words, host=a), NOT_DONE, *expected)
        failed = run("export", *words, "--json", host=a)
        assert failed.status == NOT_DONE
        error = failed.json
        assert error["ok"] is False and set(error["error"]) == {"code", "message", "errno"}
        assert error["error"]["errno"] in errno.errorcode.values()


def test_a_udp_socket(lab: Lab, running: Daemons) -> None:
    with lab.host("a").socket(kind=socket.SOCK_DGRAM) as datagram:
        words = ("export", "--pid", os.getpid(), "--fd", datagram.fileno())
        the_error(run(*words, host=lab.host("a")), NOT_DONE, "not a TCP socket")


@pytest.mark.parametrize(
    ("host", "words"),
    [("nowhere", ("nowhere", "heard: b")), ("a", ("this host itself",))],
)
def test_an_unknown_host(scene: Scene, lab: Lab, host: str, words: tuple[str, ...]) -> None:
    scene.server("a", 5110)
    client = scene.client("a", 5110)
    pid, fd = scene.descriptor_of(client)
    for command in (("export", "--pid", pid, "--fd", fd), ("drain", "--pid", pid)):
        the_error(run(*command, "--to", host, host=lab.host("a")), NOT_DONE, "no-such-host: ", *words)
    failed = run("drain", "--pid", pid, "--to", host, "--json", host=lab.host("a"))
    as_model(api.ErrorResponse, failed.json)
    assert client.say("here") == "here"


def test_an_address_where_nobody_is(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5111)
    client = scene.client("a", 5111)
    pid, fd = scene.descriptor_of(client)
    words = ("export", "--pid", pid, "--fd", fd, "--to", "10.77.1.99", "--timeout", 0.5)
    refused = run(*words, "--json", host=lab.host("a"))
    assert refused.status == NOT_DONE
    assert refused.json[0]["refusal"]["code"] == "no-offer"
    assert client.say("here") == "here"


def test_to_by_address_and_id(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5112)
    b = run("status", "--json", host=lab.host("b")).json
    for target in (lab.host("b").address4, b["host_id"]):
        client = scene.client("a", 5112)
        importer = scene.program("b", "import", "--port", 5112, "--exec", "cat")
        scene.waiting("b")
        pid, fd = scene.descriptor_of(client)
        done = run("export", "--pid", pid, "--fd", fd, "--to", target, "--json", host=lab.host("a"))
        assert (done.status, done.json[0]["to"]) == (OK, "b")
        client.connection.shutdown(socket.SHUT_WR)
        assert ended(importer).status == OK


# -- list, status, history, doctor


def test_a_drain_leaves_the_own_login_alone(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sshd tells of it; who names a process means it."""
    server = scene.server("a", 5131)
    mine, other = (scene.client("a", 5131) for _client in range(2))
    ends = mine.connection.getsockname(), mine.connection.getpeername()
    monkeypatch.setenv("SSH_CONNECTION", " ".join(f"{address} {port}" for address, port in ends))

    def plan(*words: object) -> str:
        """A process of its own: its environment is that which it was begun with."""
        process = scene.program("a", "drain", *words, "--kind", "connected", "--dry-run")
        return process.communicate(timeout=60)[0]

    planned = json.loads(plan("--port", 5131, "--json"))
    assert [one["remote"] for one in planned["migrations"]] == [other.local]
    assert (planned["progress"]["selected"], planned["progress"]["spared"]) == (1, 1)
    assert "1 left alone: your own login" in plan("--port", 5131)
    meant = json.loads(plan("--pid", server.pid, "--json"))
    assert (meant["progress"]["selected"], meant["progress"]["spared"]) == (2, 0)


def test_list_filters(scene: Scene, lab: Lab) -> None:
    one = scene.server("a", 5120, name="smt-alpha")
    two = scene.server("a", 5121, name="smt-beta")
    first, second = scene.client("a", 5120), scene.client("a", 5121)
    peer, address = lab.host("peer").address4, lab.host("a").address4
    everything = as_model(list[api.SocketRow], scene.rows("a"))
    mine = {row.inode for row in everything if row.pid in (one.pid, two.pid)}
    assert len(mine) == 4

    def ports(*words: object) -> list[int]:
        rows = as_model(list[api.SocketRow], scene.rows("a", *words))
        return sorted(int(row.local.rpartition(":")[2]) for row in rows if row.inode in mine)

    assert ports("--pid", one.pid) == [5120, 5120]
    assert ports("--process", "smt-*") == [5120, 5120, 5121, 5121]
    assert ports("--process", "smt-b*") == [5121, 5121]
    assert ports("--port", 5121) == ports("--local-port", 5121) == [5121, 5121]
    assert ports("--port", 5121, "--kind", "listening") == [5121]
    assert ports("--process", "smt-*", "--kind", "connected") == [5120, 5121]
    assert ports("--kind", "connected", "--kind", "listening", "--pid", one.pid) == [5120, 5120]
    assert ports("--state", "established") == ports("--state", "ESTABLISHED") == [5120, 5121]
    assert ports("--state", "LISTEN", "--state", "CLOSE_WAIT") == [5120, 5121]
    assert ports("--local-address", address) == [5120, 5121]
    assert ports("--remote-address", f"{peer}/24") == [5120, 5121]
    assert ports("--remote-port", first.local.rpartition(":")[2]) == [5120]
    assert ports("--pid", two.pid, "--fd", scene.descriptor_of(second)[1]) == [5121]
    assert ports("--process", "smt-alpha", "--port", 5121) == []
    shown = run("list", "--pid", one.pid, host=lab.host("a"))
    assert shown.status == OK
    header, *lines = shown.out.splitlines()
    assert header.split() == [
        "PID",
        "FD",
        "PROCESS",
        "STATE",
        "LOCAL",
        "REMOTE",
        "RECV-Q",
        "SEND-Q",
        "VERDICT",
    ]
    assert len(lines) == 2 and all("smt-alpha" in line for line in lines)
    none = run("list", "--port", 5997, "--json", host=lab.host("a"))
    assert (none.status, none.json) == (NOTHING, [])


def test_by_unit(scene: Scene, lab: Lab) -> None:
    """A process is in the unit that its cgroup path names, as under systemd."""
    with unit() as group:
        owner = scene.server("a", 5122)
        (group / "cgroup.procs").write_text(str(owner.pid))
        client = scene.client("a", 5122)
        rows = as_model(list[api.SocketRow], scene.rows("a", "--unit", group.name))
        assert {row.pid for row in rows} == {owner.pid}
        assert scene.rows("a", "--unit", "smt-*.service", "--kind", "connected") != []
        assert scene.rows("a", "--unit", "smt-other.service") == []
        plan = run("drain", "--unit", group.name, "--dry-run", "--json", host=lab.host("a"))
        assert (plan.status, plan.json["progress"]["planned"]) == (OK, 2)
        assert client.say("on") == "on"


def test_status(lab: Lab, running: Daemons) -> None:
    answer = run("status", "--json", host=lab.host("a"))
    assert answer.status == OK
    status = as_model(api.StatusResponse, answer.json)
    assert (status.host, status.version, status.pid) == ("a", VERSION, running["a"].pid)
    shown = run("status", host=lab.host("a"))
    assert shown.status == OK
    for word in (status.host_id, f"pid {status.pid}", "groups     lab", "connected"):
        assert word in shown.out


def test_history_filters(scene: Scene, lab: Lab) -> None:
    a = lab.host("a")
    scene.server("a", 5123)
    client = scene.client("a", 5123)
    pid, fd = scene.descriptor_of(client)
    begun = time.time()
    for _turn in range(2):
        assert run("export", "--pid", pid, "--fd", fd, "--dry-run", host=a).status == OK

    def count(*words: object) -> int:
        result = run("history", *words, "--limit", 1000, "--json", host=a)
        records = as_model(list[api.MigrationRecord], result.json)
        assert result.status == (OK if records else NOTHING)
        return sum(one.remote == client.local for one in records)

    def at(moment: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment))

    assert (
        count() == count("--outcome", "planned") == count("--outcome", "planned", "--outcome", "moved") == 2
    )
    assert count("--outcome", "failed") == count("--direction", "import") == count("--host", "nobody") == 0
    assert count("--since", at(begun - 2)) == 2
    assert count("--since", at(begun + 3600)) == count("--until", at(begun - 3600)) == 0
    assert count("--since", at(begun - 2) + "Z") == (2 if time.timezone == 0 else count())
    assert len(run("history", "--limit", 1, "--json", host=a).json) == 1
    assert client.local in run("history", "--limit", 1, host=a).out


def test_doctor(lab: Lab, running: Daemons) -> None:
    answer = run("doctor", "--json", host=lab.host("a"))
    verdict = as_model(api.DoctorResponse, answer.json)
    assert answer.status == (OK if verdict.healthy else NOT_DONE)
    assert verdict.healthy, verdict
    names = [check.name for check in verdict.checks]
    assert len(names) == len(set(names)) > 5
    shown = run("doctor", host=lab.host("a"))
    assert all(name in shown.out for name in names)


def test_doctor_finds_what_is_wrong(lab: Lab) -> None:
    """One daemon alone, with a list that is full and nat without forwarding."""
    c = lab.host("c")
    sysctl = "net.ipv4.ip_forward"
    before = c.run(["sysctl", "-n", sysctl]).stdout.strip()
    c.run(["sysctl", "-qw", f"{sysctl}=0"])
    try:
        with daemons(lab, "c", imports={"max_bound": 0}, redirect={"devices": ["eth0"], "modes": ["nat"]}):
            result = run("doctor", "--json", host=c)
            assert result.status == NOT_DONE
            checks = {check["name"]: check for check in result.json["checks"]}
            found = {name for name, check in checks.items() if check["status"] != "ok"}
            assert {"group", "import lists"} <= found
            assert all(checks[name]["mend"] for name in found)
            forwarding = c.run(["sysctl", "-n", sysctl]).stdout.strip()
            assert ("forwarding" in found) == (forwarding == "0")
            assert " -> " in run("doctor", host=c).out
    finally:
        c.run(["sysctl", "-qw", f"{sysctl}={before}"])


# -- drain


def test_drain_selects(scene: Scene, lab: Lab) -> None:
    """By process, port and address, as a dry run: what is counted is what would move."""
    a = lab.host("a")
    scene.server("a", 5130, name="smt-drained")
    clients = [scene.client("a", 5130) for _turn in range(4)]
    for words in (
        ("--process", "smt-drained", "--kind", "connected"),
        ("--port", 5130, "--kind", "connected"),
        ("--local-address", a.address4, "--port", 5130),
        ("--remote-address", lab.host("peer").address4, "--process", "smt-*"),
        ("--pid", scene.descriptor_of(clients[0])[0], "--state", "ESTABLISHED"),
    ):
        plan = run("drain", *words, "--dry-run", "--json", host=a)
        assert plan.status == OK, plan
        progress = as_model(api.Progress, plan.json["progress"])
        assert (progress.selected, progress.planned, progress.remaining) == (4, 4, 0)
        records = as_model(list[api.MigrationRecord], plan.json["migrations"])
        assert {record.outcome for record in records} == {"planned"}
        assert set(plan.json) == {"progress", "migrations", "listed"}
        assert plan.json["listed"] == 0
    shown = run("drain", "--port", 5130, "--kind", "connected", "--dry-run", host=a)
    assert "4 of 4 could be moved" in shown.out and "room for 4 on b" in shown.out
    nothing = run("drain", "--port", 5997, "--json", host=a)
    assert (nothing.status, nothing.json["progress"]["selected"]) == (NOTHING, 0)
    assert "0 of 0 moved" in run("drain", "--port", 5997, host=a).out
    assert all(client.say("on") == "on" for client in clients)


def test_drain_again(scene: Scene, lab: Lab) -> None:
    """What has moved, and its owner has not closed yet, is nothing to move: no second drain refuses it."""
    a, b = lab.host("a"), lab.host("b")
    words = ("drain", "--port", 5139, "--to", "b")
    with a.socket(socket.AF_INET) as owned:
        owned.bind(("", 5139))
        owned.listen()
        assert run(*words, host=a).out.startswith("1 of 1 moved in ")
        listed = run("list", "--port", 5139, "--json", host=a).json
        assert all((row["movable"], row["refusal"]["code"]) == (False, "ended") for row in listed)
        again = run(*words, host=a)
        # Linux lists what is bound and not connected since 6.8.
        told = f"0 of {len(listed)} moved in "
        assert (again.status, again.out.startswith(told)) == (OK if listed else NOTHING, True), again
        assert ("(1 had ended by then)" in again.out) is bool(listed)
    [came] = import_socket([ImportRequest(["listening"])], 10, control=b.control_socket)
    assert came.socket is not None
    came.socket.close()


def test_drain_at_a_rate(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5131)
    clients = [scene.client("a", 5131) for _turn in range(6)]
    importer = scene.program("b", "import", "--port", 5131, "--count", 6, "--exec", "cat")
    scene.waiting("b")
    started = time.monotonic()
    words = ("--port", 5131, "--kind", "connected", "--to", "b", "--rate", 5, "--json")
    done = run("drain", *words, host=lab.host("a"))
    assert done.status == OK, done
    assert done.json["progress"]["moved"] == 6
    assert elapsed(started) > 0.9  # 6 at 5 a second
    for client in clients:
        assert client.say("hello") == "hello"
        client.connection.shutdown(socket.SHUT_WR)
    assert ended(importer).status == OK


def test_drain_of_which_some_are_refused(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5132)
    good, bad = scene.client("a", 5132), scene.client("a", 5132)
    pid, fd = scene.descriptor_of(bad)
    bad.connection.send(b"!", socket.MSG_OOB)
    until(lambda: any(row.get("refusal") for row in scene.rows("a", "--pid", pid, "--fd", fd)))
    plan = run("drain", "--port", 5132, "--kind", "connected", "--dry-run", host=lab.host("a"))
    assert plan.status == NOT_DONE
    assert "1 of 2 could be moved" in plan.out
    assert f"{bad.local}: urgent-data: " in plan.out
    assert good.local not in plan.out


def test_drain_says_what_it_leaves_in_the_import_lists(scene: Scene, lab: Lab) -> None:
    """What was not selected: who switches the host off must know. All goes with --all, one by name."""
    scene.server("a", 5135)
    client = scene.client("a", 5135)
    moved = run("drain", "--port", 5135, "--kind", "connected", "--to", "b", host=lab.host("a"))
    assert moved.status == OK and "import lists" not in moved.out
    on_b = run("drain", "--process", "nobodys", "--to", "a", host=lab.host("b"))
    assert on_b.status == NOTHING
    assert "1 in this host's import lists stay for an application (sockmi list imports)" in on_b.out
    assert run("drain", "--process", "nobodys", "--json", host=lab.host("b")).json["listed"] == 1
    plan = run("drain", "--all", "--to", "a", "--dry-run", host=lab.host("b"))
    assert plan.status == OK and "1 of 1 could be moved" in plan.out and "import lists" not in plan.out
    all_ = run("drain", "--all", "--to", "a", "--json", host=lab.host("b"))
    assert all_.status == OK and (all_.json["listed"], all_.json["progress"]["moved"]) == (0, 1)
    assert run("list", "imports", "--port", 1, host=lab.host("a")).status == NOTHING
    [row] = scene.rows("a", "imports")
    assert row["migration_id"] in run("list", "imports", "--port", 5135, host=lab.host("a")).out
    back = run("export", "--listed", row["migration_id"], "--to", "b", host=lab.host("a"))
    assert back.status == OK and "moved" in back.out
    gone = run("export", "--listed", row["migration_id"], "--to", "b", host=lab.host("a"))
    assert gone.status == NOT_DONE and "no-such-socket" in gone.out
    importer = scene.program("b", "import", "--port", 5135, "--exec", "cat")
    assert client.say("on") == "on"
    client.connection.shutdown(socket.SHUT_WR)
    assert ended(importer).status == OK


def test_drain_with_nobody_to_take_it(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5133)
    client = scene.client("a", 5133)
    words = ("--port", 5133, "--kind", "connected", "--to", "10.77.1.99", "--timeout", 0.4)
    result = run("drain", *words, host=lab.host("a"))
    assert result.status == NOT_DONE
    assert "no-offer: " in result.out
    assert client.say("on") == "on"


def test_drain_shows_its_progress_on_a_terminal(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5134)
    for _turn in range(4):
        scene.client("a", 5134)
    master, slave = pty.openpty()
    words = ("drain", "--port", 5134, "--kind", "connected", "--dry-run", "--rate", 8)
    process = scene.program("a", *words, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while select.select([master], [], [], 20)[0]:
            try:
                got = os.read(master, 4096)
            except OSError:  # EIO: the other side is closed
                break
            if not got:
                break
            seen += got
    finally:
        os.close(master)
    assert process.stdout is not None
    assert "4 of 4 could be moved" in process.stdout.read()
    assert process.wait(20) == OK
    drawn = seen.decode().split("\r")
    assert any("[" in line and "0/4" in line for line in drawn), drawn
    assert any("4/4" in line and "#" in line for line in drawn), drawn
    assert drawn[-1].endswith("\n")


def test_no_progress_bar_without_a_terminal(scene: Scene, lab: Lab) -> None:
    scene.server("a", 5135)
    scene.client("a", 5135)
    result = run("drain", "--port", 5135, "--dry-run", host=lab.host("a"))
    assert (result.status, result.err) == (OK, "")


# -- groups, reload, key


def _join(lab: Lab, host: str, name: str, key: Path, **options: object) -> Result:
    options = {"address": "239.77.83.9", "port": 7790, "interface": "eth0"} | options
    words = [
        word for option, value in options.items() for word in (f"--{option}", value) if value is not None
    ]
    return run("groups", "join", name, "--key-file", key, *words, "--json", host=lab.host(host))


def _members(lab: Lab, host: str, name: str) -> set[str]:
    answer = run("groups", "--json", host=lab.host(host)).json
    as_model(api.GroupsResponse, answer)
    return {one["host"] for group in answer["groups"] if group["name"] == name for one in group["members"]}


def test_groups(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    key = tmp_path / "web.key"
    assert run("key", key).status == OK
    try:
        for host in "ab":
            joined = _join(lab, host, "web", key)
            assert joined.status == OK, joined
            assert as_model(api.GroupsResponse, joined.json).changed
        until(lambda: _members(lab, "a", "web") == {"b"} and _members(lab, "b", "web") == {"a"})
        assert _join(lab, "a", "web", key).json["changed"] is False
        other = run(
            "groups", "join", "web", "--key-file", key, "--address", "239.77.83.9", "--port", 7791,
            host=lab.host("a"),
        )  # fmt: skip
        the_error(other, NOT_DONE, "bad-request: ", "leave it first")
        shown = run("groups", host=lab.host("a"))
        assert "web: 239.77.83.9 port 7790 (joined by hand)" in shown.out
        assert "lab: 239.77.83.1 port 7780\n" in shown.out
    finally:
        for host in "ab":
            left = run("groups", "leave", "web", host=lab.host(host))
            assert left.status == OK
            assert "web" not in left.out
    again = run("groups", "leave", "web", "--json", host=lab.host("a"))
    assert (again.status, again.json["changed"]) == (OK, False)
    assert "nothing to do" in run("groups", "leave", "web", host=lab.host("a")).err


def test_a_joined_group_outlives_a_restart(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    key, kept = tmp_path / "web.key", lab.host("a").state_dir / "groups.json"
    run("key", key)
    try:
        assert _join(lab, "a", "web", key).status == OK
        assert _join(lab, "a", "other", key, port=7794).status == OK
        assert run("groups", "leave", "other", host=lab.host("a")).status == OK
        running["a"].restart()
        assert "web: 239.77.83.9 port 7790 (joined by hand)" in run("groups", host=lab.host("a")).out
        # It is not forgotten while it cannot be joined.
        key.chmod(0o644)
        running["a"].restart()
        assert "web" not in run("groups", host=lab.host("a")).out
        assert "group web, joined before the restart, not joined again: " in running["a"].log()
        assert "chmod 0600" in running["a"].log()
        key.chmod(0o600)
        until(lambda: "web" in run("groups", host=lab.host("a")).out, timeout_s=15)
    finally:
        run("groups", "leave", "web", host=lab.host("a"))
    running["a"].restart()
    assert "web" not in run("groups", host=lab.host("a")).out
    assert not kept.exists()
    kept.write_text('[{"name": "web", "hops": 999}]')
    running["a"].restart()
    assert run("groups", host=lab.host("a")).status == OK
    assert f"{kept}: " in running["a"].log()
    kept.unlink()


def test_a_group_of_the_configuration_is_left_by_force(lab: Lab, running: Daemons) -> None:
    """Until the daemon's next start; and who is in no group is told so."""
    refused = run("groups", "leave", "lab", host=lab.host("b"))
    the_error(refused, NOT_DONE, "bad-request: ", "stands in the configuration", "restart the daemon")
    assert "lab: " in run("groups", host=lab.host("b")).out
    try:
        left = run("groups", "leave", "lab", "--force", host=lab.host("b"))
        assert (left.status, left.out, left.err) == (OK, "", "This host is in no group.\n")
        key = lab.host("b").etc_dir / "group.key"
        [row] = _join(lab, "b", "lab", key, address="239.77.83.1", port=7780).json["groups"]
        assert row["configured"] is True
        assert run("groups", "leave", "lab", host=lab.host("b")).status == NOT_DONE
    finally:
        running["b"].restart()
    until(lambda: _members(lab, "b", "lab") == {"a"})


def test_a_port_that_another_group_has(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    key = tmp_path / "web.key"
    run("key", key)
    result = _join(lab, "a", "web", key, port=7780)
    the_error(result, NOT_DONE, "group lab of this host has port 7780; give it another port")


def test_a_group_of_peers(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    key = tmp_path / "web.key"
    run("key", key)
    try:
        for host, other in ("ab", "ba"):
            peer = f"{lab.host(other).address4}:7792"
            joined = _join(lab, host, "listed", key, peer=peer, address=None, port=7792, interface=None)
            assert joined.status == OK, joined
            [row] = [row for row in joined.json["groups"] if row["name"] == "listed"]
            assert (row["address"], row["peers"]) == (None, [peer])
        until(lambda: _members(lab, "a", "listed") == {"b"} and _members(lab, "b", "listed") == {"a"})
        assert f"listed: {lab.host('b').address4}:7792" in run("groups", host=lab.host("a")).out
    finally:
        for host in "ab":
            run("groups", "leave", "listed", host=lab.host(host))


def test_with_the_wrong_key_nobody_is_heard(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    keys = [tmp_path / "one.key", tmp_path / "two.key"]
    try:
        for host, key in zip("ab", keys, strict=True):
            run("key", key)
            assert _join(lab, host, "odd", key, port=7793).status == OK
        time.sleep(0.5)  # hosts with the same key hear each other within milliseconds
        assert _members(lab, "a", "odd") == _members(lab, "b", "odd") == set()
    finally:
        for host in "ab":
            run("groups", "leave", "odd", host=lab.host(host))


def test_groups_that_cannot_be_joined(lab: Lab, running: Daemons, tmp_path: Path) -> None:
    key, open_key, no_key = tmp_path / "good.key", tmp_path / "open.key", tmp_path / "text.key"
    run("key", key)
    run("key", open_key)
    open_key.chmod(0o644)
    write_secret(no_key, "not a key")
    cases: list[tuple[dict[str, object], tuple[str, ...]]] = [
        ({"key": tmp_path / "absent.key"}, ("absent.key", "No such file")),
        ({"key": open_key}, ("open.key", "chmod 0600")),
        ({"key": no_key}, ("text.key, line 1", "not a key")),
        ({"key": tmp_path}, ("not a regular file",)),
        ({"interface": "nonesuch0"}, ("nonesuch0", "Not joined")),
        ({"interface": "a-name-that-is-too-long"}, ("interface",)),
        ({"interface": "smt-bare"}, ("smt-bare", "has it an address")),
        ({"port": 7780, "address": "239.77.83.1"}, ("Not joined", "port")),
        ({"name": "Not A Name"}, ("name",)),
    ]
    lab.host("a").run(["ip", "link", "add", "smt-bare", "type", "veth"])
    for changes, words in cases:
        options: dict[str, Any] = {"name": "bad", "key": key} | changes
        result = _join(lab, "a", **options)
        assert result.status == NOT_DONE, (changes, result)
        as_model(api.ErrorResponse, result.json)
        the_error(result, NOT_DONE, "bad-request: ", *words)
    lab.host("a").run(["ip", "link", "delete", "smt-bare"])
    assert run("status", "--json", host=lab.host("a")).json["groups"] == ["lab"]


def test_key(tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    made = run("key", path, "--json")
    assert made.status == OK
    assert set(made.json) == {"file", "key_id"} and made.json["file"] == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    the_error(run("key", path), NOT_DONE, "exists already")
    assert path.read_bytes() == content
    the_error(run("key", tmp_path / "no" / "where.key"), NOT_DONE, "there is no folder", "make it first")
    failed = run("key", path, "--json")
    assert failed.json["error"]["errno"] == "EEXIST"
    shown = run("key", tmp_path / "other.key")
    assert shown.status == OK and "other.key" in shown.out
    assert content.decode().strip() not in shown.out


# -- who may do what


def test_another_user(scene: Scene, lab: Lab) -> None:
    """May look, and sees only his own; may not act."""
    a = lab.host("a")
    a.run_dir.chmod(0o755)
    owner = scene.server("a", 5140)
    client = scene.client("a", 5140)
    pid, fd = scene.descriptor_of(client)
    assert run_as(NOBODY, "status", "--json", host=a).json["host"] == "a"
    assert run_as(NOBODY, "doctor", host=a).status == OK
    assert run_as(NOBODY, "groups", host=a).status == OK
    assert run_as(NOBODY, "list", "--pid", owner.pid, "--json", host=a).json == []
    for words in (
        ("drain", "--pid", pid),
        ("reload",),
        ("groups", "leave", "lab"),
        ("groups", "join", "x", "--address", "239.1.1.1", "--key-file", "/x"),
    ):
        the_error(run_as(NOBODY, *words, host=a), NOT_DONE, "no-privilege: ")
    the_error(run_as(NOBODY, "export", "--pid", pid, "--fd", fd, host=a), NOT_DONE, "you may not trace")
    assert client.say("untouched") == "untouched"


def test_no_permission_to_connect(lab: Lab, running: Daemons) -> None:
    a = lab.host("a")
    a.control_socket.chmod(0o600)
    try:
        result = run_as(NOBODY, "status", "--json", host=a)
    finally:
        a.control_socket.chmod(0o666)
    the_error(result, NO_DAEMON, "Permission denied")
    assert result.json["error"] | {"message": ""} == {"code": "", "message": "", "errno": "EACCES"}


# -- no daemon

EVERY_COMMAND = (
    ("export", "--pid", str(os.getpid()), "--fd", "0"),
    ("export", "--listed", "7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01"),
    ("import",),
    ("import", "--exec", "cat"),
    ("list",),
    ("list", "imports"),
    ("list", "redirects"),
    ("status",),
    ("history",),
    ("groups",),
    ("groups", "leave", "x"),
    ("groups", "join", "x", "--address", "239.1.1.1", "--key-file", "x"),
    ("drain", "--all"),
    ("doctor",),
    ("reload",),
)


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=lambda words: "-".join(words[:2]))
def test_no_daemon(tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *rest = words
    for path in (tmp_path / "absent.sock", tmp_path, tmp_path / ("x" * 120)):
        result = run(command, "--control", path, *rest)
        the_error(result, NO_DAEMON, str(path), "Is the SockMi daemon running")
        assert result.out == ""
    if words != ("import",):
        failed = run(command, "--json", "--control", tmp_path / "absent.sock", *rest).json
        assert failed["ok"] is False and failed["error"]["errno"] == "ENOENT"


def test_a_dead_socket(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    the_error(run("status", "--control", path), NO_DAEMON, "Connection refused")
    path.unlink()
    path.write_text("a file")
    the_error(run("status", "--control", path), NO_DAEMON, "Connection refused")


def test_a_daemon_that_goes_away(tmp_path: Path) -> None:
    """It accepts, and is gone before it answers."""
    path = tmp_path / "mute.sock"
    with listener(path):
        process = subprocess.Popen(
            [sys.executable, "-m", "sockmi.cli.main", "import", "--timeout", "0.2", "--control", path],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        the_error(ended(process), NO_DAEMON, "does not answer")


def test_the_environment_names_the_daemon(
    lab: Lab, running: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOCKMI_CONTROL", str(lab.host("b").control_socket))
    assert run("status", "--json").json["host"] == "b"
    assert run("status", "--json", host=lab.host("a")).json["host"] == "a"


def test_a_reader_that_has_seen_enough(lab: Lab, running: Daemons, scene: Scene) -> None:
    """`sockmi list | head -1` is no error."""
    reader, writer = os.pipe()
    os.close(reader)
    process = scene.program("a", "status", stdout=writer)
    os.close(writer)
    _unused, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (OK, "")


# -- wrong arguments

WRONG: list[tuple[str, str]] = [
    ("", "COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("status extra", "unrecognized arguments: extra"),
    ("status --jso", "unrecognized arguments: --jso"),
    ("status --control", "expected one argument"),
    ("export", "--pid and --fd, or --listed"),
    ("export --listed 7", "'7' is no id"),
    ("export --listed 7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01 --fd 5", "leave out --pid and --fd"),
    ("export --pid 5", "--fd"),
    ("export --fd 5", "--pid"),
    ("export --pid 0 --fd 5", "'0' is not a process id (1 to"),
    ("export --pid -5 --fd 5", "'-5' is not a process id"),
    ("export --pid init --fd 5", "'init' is not a process id"),
    ("export --pid ٣ --fd 5", "is not a process id"),
    ("export --pid 99999999999999999999999 --fd 5", "is not a process id"),
    ("export --pid 1 --fd x", "'x' is not a descriptor"),
    ("export --pid 1 --fd -1", "'-1' is not a descriptor"),
    ("export --pid 1 --fd 1 --to", "--to: expected one argument"),
    ("export --pid 1 --fd 1 --timeout 0", "'0' is not a number of seconds"),
    ("export --pid 1 --fd 1 --timeout nan", "'nan' is not a number of seconds"),
    ("export --pid 1 --fd 1 --timeout inf", "'inf' is not a number of seconds"),
    ("export --pid 1 --fd 1 --timeout soon", "'soon' is not a number of seconds"),
    ("export --pid 1 --fd 1 --pid 2", "--pid: given twice"),
    ("export --pid 1 --fd 1 --timeout 1 --timeout 1", "--timeout: given twice"),
    ("import --kind sleeping", "invalid choice: 'sleeping'"),
    ("import --count 0", "'0' is not a count"),
    ("import --count 1000001", "'1000001' is not a count"),
    ("import --count 2", "--count needs --exec"),
    ("import --kind listening", "without --exec only connected"),
    ("import --exec", "--exec needs a command"),
    ("import --exec /no/such/program", "'/no/such/program' is no program"),
    ("import --kind bound --remote-port 5 --exec cat", "only connected sockets have a remote end"),
    ("import --timeout -1", "'-1' is not a number of seconds"),
    ("import --local-address 10.0.0.0/8", "'10.0.0.0/8' is no IP address"),
    ("import --port 0", "'0' is not a port (1 to 65535)"),
    ("import --port 65536", "'65536' is not a port"),
    ("import --remote-port http", "'http' is not a port"),
    ("list tables", "invalid choice: 'tables'"),
    ("list --local-address 300.1.1.1", "'300.1.1.1' is no address and no network"),
    ("list --remote-address 10.0.0.0/33", "no address and no network"),
    ("list --state UP", "'UP' is no TCP state; choose among ESTABLISHED"),
    ("list --kind any", "invalid choice: 'any'"),
    ("list --pid x", "'x' is not a process id"),
    ("list --fd 5", "--fd needs --pid"),
    ("list --port 5 --local-port 6", "given twice"),
    ("list redirects --pid 80", "not for redirects"),
    ("history --limit 0", "'0' is not a count"),
    ("history --limit many", "'many' is not a count"),
    ("history --outcome won", "invalid choice: 'won'"),
    ("history --since yesterday", "'yesterday' is no time"),
    ("history --since 2026-01-02 --until 2026-01-01", "--since is not before --until"),
    ("history --until now", "'now' is no time"),
    ("history --direction both", "invalid choice: 'both'"),
    ("history --limit 5 --limit 5", "--limit: given twice"),
    ("groups merge", "invalid choice: 'merge'"),
    ("groups list web", "takes no name"),
    ("groups list --port 5", "--port is for `groups join`"),
    ("groups join", "join needs the group's name"),
    ("groups leave", "leave needs the group's name"),
    ("groups forget b", "'b' is no id of a host"),
    ("groups leave web --key-file x", "--key-file is for `groups join`"),
    ("groups join web --key-file x --address 239.7.7.7 --force", "--force is for `groups leave`"),
    ("groups --force", "--force is for `groups leave`"),
    ("groups join web", "join needs --key-file"),
    ("groups join web --key-file x", "either --address (multicast) or --peer"),
    ("groups join web --key-file x --address 239.1.1.1 --peer 1.1.1.1:5", "either --address"),
    ("groups join web --key-file x --address 10.0.0.1", "10.0.0.1 is not multicast"),
    ("groups join web --key-file x --address x", "'x' is no IP address"),
    ("groups join web --key-file x --peer 10.0.0.1", "'10.0.0.1' is not ADDRESS:PORT"),
    ("groups join web --key-file x --peer ::1:5", "of IPv6: [ADDRESS]:PORT"),
    ("groups join web --key-file x --peer 1.1.1.1:0", "is not ADDRESS:PORT"),
    ("groups join web --key-file x --address 239.1.1.1 --port 99999", "'99999' is not a port"),
    ("drain", "say which sockets"),
    ("drain --to b", "say which sockets"),
    ("drain --fd 5", "--fd needs --pid"),
    ("drain --pid 5 --pid 6", "--pid: given twice"),
    ("drain --pid 5 --idle-s -1", "'-1' is not a number of seconds"),
    ("drain --all --pid 5", "contradict"),
    ("drain --pid 5 --rate 0", "'0' is not a number of sockets a second"),
    ("drain --pid 5 --rate fast", "'fast' is not a number"),
    ("drain --pid 5 --timeout 0", "'0' is not a number of seconds"),
    ("drain --port 80 --local-port x", "'x' is not a port"),
    ("reload now", "unrecognized arguments: now"),
    ("reload --check /none", "'/none' cannot be read: "),
    ("key", "file"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "why"), WRONG, ids=[line or "nothing" for line, _unused in WRONG])
def test_wrong_arguments(line: str, why: str) -> None:
    """Refused before any daemon is asked: there is none here."""
    result = run(*line.split())
    the_error(result, USAGE, why, "--help")
    assert result.out == ""


def test_empty_names() -> None:
    for words in (
        ("list", "--process", ""),
        ("drain", "--all", "--to", ""),
        ("drain", "--unit", "x" * 256),
        ("history", "--host", ""),
    ):
        the_error(run(*words), USAGE, "1 to 255 characters")


def test_common_options_on_either_side(lab: Lab, running: Daemons) -> None:
    """``--json`` and ``--control`` before the command mean what they mean behind it."""
    control = lab.host("a").control_socket
    for words in (
        ("--json", "--control", control, "status"),
        ("status", "--control", control, "--json"),
        ("--control", control, "status", "--json"),
        ("--control", "/nonexistent", "--json", "status", "--control", control),
    ):
        result = run(*words)
        assert result.status == OK and result.json["host"] == "a", words
    assert run("--control", "/nonexistent", "status").status == NO_DAEMON


def test_version_and_help() -> None:
    assert run("--version").out == f"sockmi {VERSION}\n"
    for command in build_parser()._subparsers._group_actions[0].choices:  # type: ignore[union-attr]
        shown = run(command, "--help")
        assert shown.status == OK and "--json" in shown.out
    assert EPILOG in run("--help").out
