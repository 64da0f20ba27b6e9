# SPDX-License-Identifier: MIT
"""What is said about moves is what happened: records, metrics, log, history, answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.host import Host
from lab.labs import Lab
from sockmi.journal import Change, Journal
from tests.lab.scenario import ask, daemons, status, until
from tests.lab.terminal import Client, Scene


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    """Servers and clients of one test."""
    one = Scene(lab)
    yield one
    one.close()


def metrics(host: Host) -> dict[tuple[str, ...], float]:
    def fetch() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", 9780, timeout=10)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()

    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(host.python(fetch))
        for sample in family.samples
    }


def export(host: Host, *sockets: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    answers = ask(host, "export", sockets=list(sockets), **fields)
    return [one for answer in answers for one in answer["migrations"]]


def at(scene: Scene, client: Client, migration: UUID) -> dict[str, Any]:
    pid, fd = scene.descriptor_of(client)
    return {"pid": pid, "fd": fd, "migration_id": str(migration)}


def history(host: Host, **fields: Any) -> dict[str, dict[str, Any]]:
    answers = ask(host, "history", **fields)
    return {one["migration_id"]: one for answer in answers for one in answer["migrations"]}


def test_a_batch_that_was_moved_in_part_is_asked_for_again(lab: Lab, scene: Scene) -> None:
    """What has moved is answered with its record, which stays as it was; the rest is moved."""
    a = lab.host("a")
    with daemons(lab, "ab"):
        scene.server("a", 5310)
        first, second = scene.client("a", 5310), scene.client("a", 5310)
        ids = uuid4(), uuid4()
        sockets = [at(scene, one, migration) for one, migration in zip((first, second), ids, strict=True)]
        refused = export(a, sockets[1], to="10.77.1.99", timeout_s=0.3)
        assert [one["outcome"] for one in refused] == ["refused"]
        [moved] = export(a, sockets[0], to="b")
        assert moved["outcome"] == "moved"
        before = history(a)[str(ids[0])]
        again, now = export(a, *sockets, to="b")
        assert (again["outcome"], again["ended_at"], again["batch_id"]) == (
            "moved", moved["ended_at"], moved["batch_id"],
        )  # fmt: skip
        assert (now["outcome"], now["refusal"]) == ("moved", None)
        found = history(a)
        assert found[str(ids[0])] == before
        # Tried again, it is a record of its own: nothing of the refusal is left.
        assert (found[str(ids[1])]["outcome"], found[str(ids[1])]["refusal"]) == ("moved", None)
        assert found[str(ids[1])]["started_at"] > refused[0]["started_at"]


def test_queues_are_what_the_image_has(lab: Lab, scene: Scene) -> None:
    """A peer that does not read: what is in flight and what was never sent are told apart."""
    a = lab.host("a")
    with daemons(lab, "ab"):
        scene.server("a", 5311)
        client = scene.client("a", 5311)
        client.connection.setblocking(False)
        try:
            for _turn in range(400):
                client.connection.send(bytes(65536))
                time.sleep(0.002)
        except BlockingIOError:
            pass
        pid, fd = scene.descriptor_of(client)
        words = ("--pid", pid, "--fd", fd)
        until(lambda: scene.rows("a", *words)[0]["send_queue_bytes"] > 0)
        time.sleep(0.5)
        os.kill(pid, signal.SIGSTOP)  # what it has sent and not sent stays as it is
        [row] = scene.rows("a", *words)
        [record] = export(a, {"pid": pid, "fd": fd}, to="b")
        os.kill(pid, signal.SIGCONT)
        assert record["outcome"] == "moved", record
        assert record["unsent_bytes"] > 0, record
        assert record["sent_bytes"] + record["unsent_bytes"] == row["send_queue_bytes"]
        assert record["receive_queue_bytes"] == row["receive_queue_bytes"] > 0
        assert history(a)[record["migration_id"]]["unsent_bytes"] == record["unsent_bytes"]
        [answer] = ask(lab.host("b"), "info", migration_ids=[record["migration_id"]])
        [came] = answer["migrations"]
        sizes = ("sent_bytes", "unsent_bytes", "receive_queue_bytes", "image_bytes")
        assert [came[name] for name in sizes] == [record[name] for name in sizes]


def test_steps_and_metrics(lab: Lab, scene: Scene) -> None:
    """How far each has come; and each metric changes as it should."""
    a, b = lab.host("a"), lab.host("b")
    with daemons(lab, "ab"):
        scene.server("a", 5312)
        clients = [scene.client("a", 5312) for _turn in range(3)]
        urgent = scene.client("a", 5312)
        urgent.connection.send(b"!", socket.MSG_OOB)
        steps = []
        [record] = export(a, at(scene, urgent, uuid4()), to="b")
        steps.append((record["outcome"], record["step"]))
        [record] = export(a, at(scene, clients[0], uuid4()), to="10.77.1.99", timeout_s=0.3)
        steps.append((record["outcome"], record["step"]))
        assert steps == [("refused", "selected"), ("refused", "requested")]
        assert record["user_id"] == 0

        listed = metrics(b)[("sockmi_import_list_length", "connected")]  # of earlier tests
        assert metrics(b)[("sockmi_import_requests_waiting",)] == 0
        moved = export(a, *(at(scene, one, uuid4()) for one in clients[:2]), to="b")
        assert [(one["outcome"], one["step"]) for one in moved] == [("moved", "active")] * 2
        at_a, at_b = metrics(a), metrics(b)
        shipped = sum(one["image_bytes"] for one in moved)
        assert at_a[("sockmi_image_bytes_total", "export")] == shipped > 0
        assert at_b[("sockmi_image_bytes_total", "import")] == shipped
        assert at_b[("sockmi_import_list_length", "connected")] == listed + 2
        assert at_a[("sockmi_refusals_total", "urgent-data")] == 1
        assert at_a[("sockmi_migrations_total", "export", "repair", "refused")] == 2

        importer = scene.program("b", "import", "--port", 5312, "--count", 3, "--exec", "cat")
        until(lambda: metrics(b)[("sockmi_import_list_length", "connected")] == listed)
        until(lambda: metrics(b)[("sockmi_import_requests_waiting",)] == 1)
        until(lambda: metrics(b)[("sockmi_migrations_total", "import", "repair", "moved")] == 2)
        importer.kill()
        until(lambda: metrics(b)[("sockmi_import_requests_waiting",)] == 0)


def test_each_move_is_logged(lab: Lab, scene: Scene) -> None:
    """On both sides, with fields; under systemd with priorities."""
    a, b = lab.host("a"), lab.host("b")
    for host in (a, b):
        (host.run_dir / "daemon.log").unlink(missing_ok=True)

    def lines(host: Host) -> list[dict[str, Any]]:
        text = (host.run_dir / "daemon.log").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return [line for line in found if line["logger"] == "sockmi.moves"]

    with daemons(lab, "ab", log_format="json"):
        scene.server("a", 5313)
        client, other = scene.client("a", 5313), scene.client("a", 5313)
        importer = scene.program("b", "import", "--port", 5313, "--exec", "cat")
        scene.waiting("b")
        [record] = export(a, at(scene, client, uuid4()), to="b")
        assert client.say("there") == "there"
        [refused] = export(a, at(scene, other, uuid4()), to="10.77.1.99", timeout_s=0.3)
        until(lambda: len(lines(a)) == 2 and len(lines(b)) == 1)
        told = {line["migration_id"]: line for line in [*lines(a)]}
        line = told[record["migration_id"]]
        assert (line["step"], line["level"], line["priority"]) == ("active", "info", 6)
        assert line["connection"] == f"{record['local']} - {record['remote']}"
        assert "moved" in line["message"] and "to b" in line["message"]
        line = told[refused["migration_id"]]
        assert line["step"] == "requested" and "no-offer" in line["message"]
        [line] = lines(b)
        assert line["migration_id"] == record["migration_id"] and "from a" in line["message"]
        importer.kill()


def test_history_of_100000(lab: Lab) -> None:
    """The daemon answers, and tells its manager that it lives, while somebody reads the whole history."""
    host = lab.host("c")
    with daemons(lab, "c") as running:
        running["c"].stop()
        journal = Journal(host.state_dir / "journal.db")
        content = {
            "direction": "export", "kind": "connected", "state": "ESTABLISHED", "from": "c", "to": "b",
            "local": "10.77.1.13:80", "started_at": "2026-11-23T12:00:00+00:00", "outcome": "moved",
            "fidelity": {"carried": ["receive-queue", "options"], "approximated": [], "reset": ["rtt"]},
        }  # fmt: skip
        for _turn in range(100):
            ids = [uuid4() for _turn in range(1000)]
            audit = [(one, "export", {"migration_id": str(one), **content}) for one in ids]
            journal.write(Change(audit=audit))
        journal.fold()
        journal.close()
        path = host.run_dir / "notify.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(path))
            manager.setblocking(False)
            environment = host.environment | {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"}
            command = [sys.executable, "-m", "sockmi.service", "--config", str(running["c"].config_file)]
            with running["c"].log_file.open("ab") as log:
                running["c"].process = host.popen(command, env=environment, stdout=log, stderr=log)
            until(running["c"].answers)
            reader = reader_of_all(host)
            started = time.monotonic()
            alive: list[float] = [started]
            slowest = silent = 0.0
            while reader.poll() is None:
                began = time.monotonic()
                status(host)
                slowest = max(slowest, time.monotonic() - began)
                while True:
                    try:
                        if b"WATCHDOG=1" in manager.recv(4096):
                            alive.append(time.monotonic())
                            silent = max(silent, alive[-1] - alive[-2])
                    except BlockingIOError:
                        break
                time.sleep(0.02)
            assert reader.stdout is not None
            assert int(reader.stdout.read()) == 100_000
            took = time.monotonic() - started
            assert len(alive) > 3
            assert max(slowest, silent) < took / 3, (
                f"status {slowest:.2f} s, silent {silent:.2f} s of {took:.2f} s"
            )


def reader_of_all(host: Host) -> Any:
    """A program that reads the whole history, and one that matches nothing, and counts."""
    program = (
        "import sys; from sockmi.client import Control\n"
        "with Control(sys.argv[1], timeout_s=120) as control:\n"
        "    count = sum(len(one['migrations']) for one in control.call('history', limit=1000000))\n"
        "    none = [one for one in control.call('history', host='nobody')]\n"
        "    assert none[-1]['migrations'] == []\n"
        "print(count)\n"
    )
    return host.popen(
        [sys.executable, "-c", program, str(host.control_socket)], stdout=subprocess.PIPE, text=True
    )
