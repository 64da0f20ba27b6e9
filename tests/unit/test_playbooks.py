# SPDX-License-Identifier: MIT
"""The playbooks drain and migrate: where they stop, and what their reports say then."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import collection
from tests.unit.moody_daemon import Daemon

pytest.importorskip("ansible")

REPORT = "report.json"


def _known(name: str) -> set[str]:
    shared = yaml.safe_load((collection.PROJECT / "playbooks/vars/variables.yml").read_text())
    [own] = [
        play["vars"]["__sockmi_own"]
        for play in yaml.safe_load((collection.PROJECT / f"playbooks/{name}.yml").read_text())
        if play["name"] == "Variables"
    ]
    assert not set(own) & set(shared["__sockmi_both"])
    return {*own, *shared["__sockmi_both"]}


@pytest.mark.parametrize(
    ("name", "more"),
    [("migrate", {"vars/serial.yml"}), ("drain", {"vars/serial.yml", "tasks/drain_step.yml"})],
)
def test_every_variable_is_known(name: str, more: set[str]) -> None:
    """A playbook knows what it asks for, and nothing else: what it does not ask for is refused."""
    folder = collection.PROJECT / "playbooks"
    asked: set[str] = set()
    for file in (f"{name}.yml", *more):
        lines = (folder / file).read_text().splitlines()
        text = "\n".join(line for line in lines if not re.match(r"\s*#|\s*__sockmi_own:", line))
        asked |= set(re.findall(r"(?<![\w.])sockmi_[a-z_]+\b", text))
    assert asked - {"sockmi_from_is_not_set"} == _known(name)


def test_variables_of_inventories_are_known_to_all() -> None:
    """Those of the role, by its specification, and of the lab."""
    shared = yaml.safe_load((collection.PROJECT / "playbooks/vars/variables.yml").read_text())
    role = yaml.safe_load((collection.PROJECT / "roles/sockmi/vars/main.yml").read_text())
    lab = set(
        re.findall(r"(?<!\w)sockmi_lab_[a-z_]+", (collection.PROJECT / "playbooks/lab.yml").read_text())
    )
    assert set(shared["__sockmi_of_labs"]) == set(role["__sockmi_of_labs"]) == lab


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("drain", {"count": 1}),
        ("drain", {"allow_refused": True}),
        ("migrate", {"rate": 4}),
        ("migrate", {"stop_after": 1}),
        ("migrate", {"hosts": "a"}),
        ("migrate", {"prot": 1}),
    ],
)
def test_a_variable_of_another_playbook_is_refused(
    playbook: Callable[[int], Playbook], name: str, wrong: dict[str, Any]
) -> None:
    made = playbook(2)
    code, output = made.run(name, to="b", wait_s=60, **wrong)  # wait_s is the role's, as inventories have it
    assert code != 0
    [variable] = wrong
    assert f"sockmi_{variable}: the playbook {name} has no such variable" in output
    assert f", sockmi_{variable}" not in output
    assert len(made.daemon.rows) == 2


def test_a_variable_of_a_play_is_refused_too(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(2)
    other = made.folder / "mine.yml"
    other.write_text(
        "- import_playbook: sockmi.appliance.migrate\n"
        "  vars: {sockmi_from: a, sockmi_to: b, sockmi_local_prot: 7000}\n"
    )
    code, output = made.play(other)
    assert code != 0
    assert "sockmi_local_prot: the playbook migrate has no such variable" in output
    assert len(made.daemon.rows) == 2


class Playbook:
    """A playbook for the host ``a``, with a daemon of ``count`` sockets; a drain takes four a second."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.daemon = Daemon(folder / "control.sock", count)
        self.environment: dict[str, str] = {}
        self.hosts()

    def hosts(self, connection: str = "local", *others: str) -> None:
        """Write the inventory; nobody is at home on ``others``."""
        settings = {"ansible_connection": connection, "ansible_python_interpreter": sys.executable}
        hosts = {"a": settings, **{one: {"ansible_host": "192.0.2.1"} for one in others}}
        (self.folder / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts}}))

    def begin(self, name: str = "drain", *flags: str, **variables: Any) -> subprocess.Popen[str]:
        """Start it."""
        pace = {"rate": 4, "step_s": 1} if name == "drain" else {}
        extra = {"from": "a", "report_file": REPORT, **pace, **variables}
        words = json.dumps({f"sockmi_{key}": value for key, value in extra.items()})
        return self._start(f"sockmi.appliance.{name}", "-e", words, *flags)

    def _start(self, *words: str | Path) -> subprocess.Popen[str]:
        environment = {
            "SOCKMI_CONTROL": str(self.daemon.path),
            "ANSIBLE_COLLECTIONS_PATH": str(collection.linked()),
            "ANSIBLE_CONFIG": str(collection.PROJECT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            **self.environment,
        }
        return subprocess.Popen(
            [
                collection.program("ansible-playbook"),
                *("-i", self.folder / "hosts.yml"),
                *words,
            ],
            cwd=self.folder,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, name: str = "drain", *flags: str, **variables: Any) -> tuple[int, str]:
        """Code and output, as one line."""
        return self._end(self.begin(name, *flags, **variables))

    def play(self, file: Path) -> tuple[int, str]:
        """The same of a playbook of the user's."""
        return self._end(self._start(file))

    def _end(self, begun: subprocess.Popen[str]) -> tuple[int, str]:
        with begun as process:
            output, _unused = process.communicate(timeout=300)
        return process.returncode, " ".join(output.split())

    def kill(self) -> None:
        """All processes of it, known by their environment: its workers are sessions of their own."""
        ours = f"SOCKMI_CONTROL={self.daemon.path}\0".encode()
        left = True
        while left:
            left = False
            for found in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if ours in found.read_bytes():
                        os.kill(int(found.parent.name), signal.SIGKILL)
                        left = True

    def report(self) -> dict[str, Any]:
        """Of the host."""
        content: dict[str, Any] = json.loads((self.folder / REPORT).read_text())["hosts"]["a"]
        return content


@pytest.fixture
def playbook(tmp_path: Path) -> Iterator[Callable[[int], Playbook]]:
    """Makes one."""
    made: list[Playbook] = []

    def make(count: int) -> Playbook:
        made.append(Playbook(tmp_path, count))
        return made[-1]

    yield make
    for one in made:
        one.daemon.close()


def test_it_stops_at_the_threshold(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(20)
    made.daemon.say = lambda number, _target: "port-taken" if number == 2 else None
    code, output = made.run(stop_after=1)
    assert code != 0
    assert "a: 1 of 20 moved, 1 did not; stopped" in output
    assert "Stopped: 1 of 2 sockets did not move (stop_after is 1), 19 are left. port-taken (1)" in output
    assert len(made.daemon.rows) == 19
    report = made.report()
    assert (report["moved"], report["refused"], report["left"]) == (1, 1, 19)


def test_a_service_that_goes_on_accepting_is_told(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(2)
    made.daemon.listed = lambda: made.daemon.add(1000 + len(made.daemon.requests))
    code, output = made.run(rate=20, step_s=0.1, to=["b"])
    assert code != 0
    assert "sockets are left, as more have come than were moved" in output
    assert made.report()["left"] == len(made.daemon.rows)


def test_a_daemon_that_is_gone_leaves_a_report(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(9)

    def gone() -> None:
        if len(made.daemon.moves) >= 4:
            made.daemon.path.unlink(missing_ok=True)

    made.daemon.listed = gone
    code, output = made.run(to="b,c")
    assert code != 0
    assert "control.sock: No such file or directory" in output
    assert "4 selected, 4 moved" in output
    assert (made.report()["moved"], len(made.daemon.rows)) == (4, 5)


@pytest.mark.timeout(600)  # three runs
def test_killed_and_run_again_everything_is_told_once(playbook: Callable[[int], Playbook]) -> None:
    """Killed in the middle, however slow the machine is: what would be more than four waits until then."""
    made = playbook(10)
    killed = threading.Event()

    def say(_number: int, _target: str | None) -> None:
        if len(made.daemon.moves) >= 4 and not killed.is_set():
            killed.wait()
            sys.exit()  # of the thread, and so of the request: who asked has gone

    made.daemon.say = say
    with made.begin() as process:
        try:
            while not (made.folder / REPORT).exists():
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            made.kill()
            process.communicate()
            killed.set()
    before = made.report()
    assert 0 < before["moved"] <= 4 == len(made.daemon.moves)
    code, output = made.run()
    assert code == 0, output
    after = made.report()
    assert after["left"] == 0
    ids = [one["migration_id"] for one in after["migrations"]]
    assert len(set(ids)) == len(ids) == after["moved"] == 10 - 4 + before["moved"]
    assert {one["migration_id"] for one in before["migrations"]} < set(ids)
    assert not made.daemon.rows
    assert len(made.daemon.moves) == 10

    (made.folder / REPORT).write_text("{}")
    made.daemon.add(13)
    code, output = made.run()
    assert (code, len(made.daemon.rows)) == (2, 1)
    assert "report.json is no report of an earlier run, and nothing was moved" in output


def test_a_move_that_fails_in_the_middle_is_reported(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(501)  # more than go in one request
    made.daemon.say = lambda _number, _target: ValueError("no-such-host") if made.daemon.moves[499:] else None
    code, output = made.run("migrate", to="b")
    assert code != 0
    assert "It said no-such-host." in output
    assert "500 selected, 500 moved" in output
    assert made.report()["moved"] == 500


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("ends", [True, False])
def test_no_restart_while_something_is_being_moved(playbook: Callable[[int], Playbook], ends: bool) -> None:
    """The role waits for what is under way, and does not go on if it does not end."""
    made = playbook(0)
    asked = itertools.count()
    made.daemon.under_way = lambda: int(not ends or next(asked) < 2)
    role = {"name": "sockmi.appliance.sockmi", "tasks_from": "wait"}
    tasks = [{"ansible.builtin.include_role": role}, {"ansible.builtin.debug": {"msg": "restarted"}}]
    play = {
        "hosts": "all",
        "gather_facts": False,
        "tasks": tasks,
        "vars": {"sockmi_wait_s": 60 if ends else 4},
    }
    (made.folder / "play.yml").write_text(json.dumps([play]))
    code, output = made.play(made.folder / "play.yml")
    assert (code == 0, "msg: restarted" in output) == (ends, ends), output
    assert ("Wait until nothing is being moved" in output, next(asked)) == (True, 3 if ends else 0)
    told = "a: 1 migrations are under way after sockmi_wait_s (4 s), and a restart would undo them;"
    assert (told in output) != ends


@pytest.mark.parametrize("name", ["migrate", "drain"])
@pytest.mark.parametrize("where", ["nowhere/report.json", "hosts.yml/report.json", ".", "/proc/report.json"])
def test_a_report_that_cannot_be_written_is_told_before(
    playbook: Callable[[int], Playbook], name: str, where: str
) -> None:
    made = playbook(2)
    code, output = made.run(name, to="b", report_file=where)
    assert code != 0
    assert "could not be written, and nothing was moved" in output
    assert (len(made.daemon.rows), made.daemon.moves) == (2, [])


def test_a_page_that_cannot_be_written_is_told_before(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(2)
    code, output = made.run(to="b", report_page="nowhere/page.html")
    assert code != 0
    assert "nowhere/page.html could not be written, and nothing was moved" in output
    assert len(made.daemon.rows) == 2


def test_a_report_is_where_the_caller_is(playbook: Callable[[int], Playbook]) -> None:
    """Not beside the playbook, which may be in a folder of the system's."""
    made = playbook(1)
    code, output = made.run("migrate", to="b")
    assert code == 0, output
    assert made.report()["moved"] == 1
    assert not (collection.PROJECT / "playbooks" / REPORT).exists()


def test_a_limit_leaves_hosts_out(playbook: Callable[[int], Playbook]) -> None:
    """Those that are left out are asked for nothing, and take what the others give away."""
    made = playbook(3)
    made.hosts("local", "absent")
    code, output = made.run("drain", "--limit", "a,localhost", **{"from": "all"})
    assert code == 0, output
    assert made.report()["moved"] == 3


# The local one, until the file is there.
FALLIBLE = """
from pathlib import Path
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import local
DOCUMENTATION = local.DOCUMENTATION.replace("name: local", "name: fallible")
class Connection(local.Connection):
    transport = "fallible"
    def exec_command(self, *words, **more):
        if Path("{lost}").exists():
            raise AnsibleConnectionFailure("the host is lost")
        return super().exec_command(*words, **more)
"""


def test_a_host_that_is_lost_leaves_report_and_page(playbook: Callable[[int], Playbook]) -> None:
    """And what to do is told, for all that it cannot be reached any more."""
    made = playbook(9)
    lost = made.folder / "lost"
    (made.folder / "fallible.py").write_text(FALLIBLE.replace("{lost}", str(lost)))
    made.environment["ANSIBLE_CONNECTION_PLUGINS"] = str(made.folder)
    made.hosts("fallible")
    made.daemon.listed = lambda: lost.touch() if len(made.daemon.moves) >= 4 else None
    code, output = made.run(report_page="page.html")
    assert code != 0
    assert "4 selected, 4 moved" in output
    assert "the host is lost. What its last step has moved is in `sockmi history` there. Each is" in output
    assert made.report()["moved"] == 4
    assert "4 of 4 connections moved" in (made.folder / "page.html").read_text()


def test_a_report_that_breaks_in_the_middle_keeps_nothing_back(playbook: Callable[[int], Playbook]) -> None:
    """It stops, and what has moved is told all the same."""
    made = playbook(9)
    reports = made.folder / "reports"
    reports.mkdir()

    def gone() -> None:
        if len(made.daemon.moves) >= 4 and reports.exists():
            reports.rename(made.folder / "elsewhere")

    made.daemon.listed = gone
    code, output = made.run(report_file="reports/report.json")
    assert code != 0
    assert "4 selected, 4 moved" in output
    assert "reports/report.json could not be written" in output
    assert len(made.daemon.moves) == 4


def test_hosts_go_on_together() -> None:
    """Whatever strategy an ansible.cfg has: some tasks are done once for all, or by all before the next."""
    for name in ("drain", "migrate", "install", "uninstall"):
        for play in yaml.safe_load((collection.PROJECT / f"playbooks/{name}.yml").read_text()):
            alone = "localhost" in play["hosts"]
            assert alone or play["strategy"] == "ansible.builtin.linear", (name, play["name"])


def test_a_page_that_breaks_in_the_middle_is_told(playbook: Callable[[int], Playbook]) -> None:
    made = playbook(1)
    pages = made.folder / "pages"
    pages.mkdir()
    made.daemon.listed = lambda: pages.rmdir() if pages.exists() else None
    code, output = made.run(report_page="pages/page.html")
    assert code != 0
    assert "1 selected, 1 moved" in output
    assert "pages/page.html could not be written: " in output
    assert "Mend the cause and run it again" in output
