"""drain.yml on a real lab: a host is emptied of live connections, and the others take their share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.lab.ansible_lab import URGENT, Controller, changed, clients
from tests.lab.scenario import Service, ask

pytest.importorskip("ansible")


def drain(controller: Controller, *flags: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run the playbook."""
    return controller.playbook("drain", *flags, **variables)


def redirects(controller: Controller, host: str) -> int:
    """How many connections have left a host."""
    [answer] = ask(controller.lab.host(host), "status")
    return int(answer["redirects_out"])


def test_drain_spreads_in_steps(controller: Controller, lines: Service, tmp_path: Path) -> None:
    clients(lines, 7)
    variables: dict[str, Any] = {
        "from": "a",
        "local_port": 7000,
        "rate": 4,
        "step_s": 1,
        "report_file": str(tmp_path / "drain.json"),
        "report_page": str(tmp_path / "drain.html"),
    }
    tried = drain(controller, "--check", "--diff", **variables)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert changed(tried) == 1
    assert "7 selected, 7 planned" in tried.stdout
    assert redirects(controller, "a") == 0
    assert not (tmp_path / "drain.json").exists()

    done = drain(controller, "--diff", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"a: 4 of 7 moved", done.stdout)
    assert re.search(r"a: 7 of 7 moved", done.stdout)
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
            assert "stopped after sockmi_stop_after=1" in " ".join(stopped.stdout.split())
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
    ],
)
def test_drain_checks_its_variables(controller: Controller, variables: dict[str, Any], told: str) -> None:
    result = drain(controller, **variables)
    assert result.returncode != 0
    assert told in " ".join((result.stdout + result.stderr).split())


def test_drain_says_when_nobody_is_left(controller: Controller) -> None:
    result = drain(controller, **{"from": "a,b,c", "serial": 3})
    assert result.returncode != 0
    assert "hears no other daemon" in result.stdout
