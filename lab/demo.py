# SPDX-License-Identifier: MIT
"""``make demo``: live connections move from host a to b and on to c while real clients use them.

Everything is done as an operator would: playbooks make the lab and move the connections; the
clients are curl, a line-by-line session, an idle one and a two-way stream that checks each byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lab import report
from lab.host import PROJECT, Host
from lab.labs import Lab
from lab.plan import LabError

SERVICES = {"download": 8080, "lines": 7000, "duplex": 9000}
STAY_S = 3.0
PLAYBOOKS_S = 28.0  # two of them, on a slow machine
DOWNLOAD_PACE = 1_500_000  # bytes a second
CLIENTS: dict[str, tuple[str, ...]] = {
    "curl": ("curl", "download", "--pace", str(DOWNLOAD_PACE)),
    "lines": ("lines", "lines", "--interval-s", "0.02"),
    "idle": ("idle", "lines", "--idle-s", "3600"),
    "duplex": ("duplex", "duplex", "--pace", "3000000"),
}


def say(text: str) -> None:
    """A line of progress."""
    print(f"\n\033[1m>>> {text}\033[0m" if sys.stdout.isatty() else f"\n>>> {text}", flush=True)


def playbook(name: str, **variables: object) -> None:
    """Run a playbook against the lab's inventory; raise LabError if it fails."""
    words = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventories/lab", name]
    for key, value in variables.items():
        words += ["-e", json.dumps({key: value})]
    print("$ " + " ".join(["ansible-playbook", *words[1:]]), flush=True)
    environment = {**os.environ, "ANSIBLE_DEPRECATION_WARNINGS": "false"}
    if subprocess.run(words, cwd=PROJECT, check=False, timeout=300, env=environment).returncode:
        raise LabError(f"{name} failed; what it printed above says why")


class Programs:
    """Servers and clients of the demo; all are ended with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[tuple[str, subprocess.Popen[str], IO[str]]] = []

    def start(self, host: Host, name: str, *words: str | Path) -> None:
        """Start ``python -m lab.traffic WORDS`` on a host."""
        errors = (self.directory / f"{name}.log").open("w")
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        self._running.append((name, host.python_popen("lab.traffic", *words, **options), errors))

    def wait_ready(self) -> None:
        """Every program that prints ``ready`` has done so."""
        for name, process, _unused in self._running:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise LabError(f"{name} did not start; see {self.directory / name}.log")

    def finish(self, timeout_s: float = 120.0) -> list[str]:
        """SIGTERM to all but curl, which ends by itself; what those say that did not end well."""
        complaints = []
        for name, process, _unused in self._running:
            if process.poll() is None and name != "curl":
                process.send_signal(signal.SIGTERM)
        for name, process, errors in self._running:
            try:
                output, _unused = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _unused = process.communicate()
                complaints.append(f"{name} did not end")
            errors.close()
            if process.returncode:
                complaints.append(f"{name}: exit code {process.returncode}: {output.strip()[-400:]}")
        self._running.clear()
        return complaints

    def kill(self) -> None:
        """End whatever still runs."""
        for _unused, process, errors in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()
            errors.close()


@contextlib.contextmanager
def made_lab(name: str) -> Iterator[Lab]:
    """The lab with its daemons, made and removed by the playbook."""
    playbook("playbooks/lab.yml", sockmi_lab_name=name, sockmi_lab_state="present", sockmi_lab_daemons=True)
    try:
        yield Lab(name)
    finally:
        playbook("playbooks/lab.yml", sockmi_lab_name=name, sockmi_lab_state="absent")


def run(page: Path, name: str, stay_s: float = STAY_S) -> int:
    """The whole demo in a lab of that name; 0 if every client was content and every connection moved twice.

    ``stay_s``: how long connections stay where they are.
    """
    with made_lab(name) as lab:
        work = lab.host("peer").directory / "demo"
        work.mkdir(parents=True, exist_ok=True)
        servers, clients = Programs(work), Programs(work)
        try:
            return _show(lab, work, servers, clients, page, stay_s)
        finally:
            clients.kill()
            servers.kill()


def _show(  # noqa: PLR0917 - what it shows, with what, and for how long
    lab: Lab, work: Path, servers: Programs, clients: Programs, page: Path, stay_s: float
) -> int:
    say("servers on a; on b and c the same programs wait for connections to import")
    common = ("--rendezvous", work / "contexts")
    for kind, port in SERVICES.items():
        servers.start(
            lab.host("a"),
            f"a-{kind}",
            "serve",
            kind,
            "--listen",
            str(lab.host("a").address4),
            "--port",
            str(port),
            *common,
        )
        for name in ("b", "c"):
            servers.start(
                lab.host(name), f"{name}-{kind}", "serve", kind, "--port", str(port), "--import", *common
            )
    servers.wait_ready()

    say("clients on peer: curl in a long download, a line session, an idle one, a two-way stream")
    address = str(lab.host("a").address4)
    length = ["--bytes", str(int((PLAYBOOKS_S + 4 * stay_s) * DOWNLOAD_PACE))]
    for name, (command, service, *options) in CLIENTS.items():
        options += length if name == "curl" else []
        timeline = ("--name", name, "--timeline", work / f"{name}.jsonl")
        clients.start(lab.host("peer"), name, command, address, str(SERVICES[service]), *timeline, *options)
    time.sleep(stay_s)
    for source, target in (("a", "b"), ("b", "c")):
        say(f"every connection moves from {source} to {target}")
        playbook("migrate.yml", sockmi_lab_name=lab.name, sockmi_from=source, sockmi_to=target)
        time.sleep(stay_s)

    say("what the clients saw")
    time.sleep(stay_s)
    complaints = clients.finish() + servers.finish()
    records = [record for name in ("a", "b") for record in _history(lab.host(name))]
    stories = report.load([work / f"{name}.jsonl" for name in CLIENTS], records)
    print(report.table(stories))
    page.write_text(report.page(stories))
    print(f"\nThe picture of each client's bytes over time: {page}")
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    moved = all([move.outcome for move in story.moves] == ["moved", "moved"] for story in stories)
    if not moved:
        print("FAILED: not every connection moved twice", file=sys.stderr)
    return 0 if moved and not complaints else 1


def _history(host: Host) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "sockmi.cli.main", "history", "--json", "--limit", "1000"]
    found: list[dict[str, Any]] = json.loads(host.run(words).stdout)
    return [one for one in found if one["direction"] == "export" and one["outcome"] != "planned"]


def main(words: list[str] | None = None) -> int:
    """``python3 -m lab.demo``; its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m lab.demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--page", type=Path, default=Path("demo.html"), help="where the page goes (default: demo.html)"
    )
    parser.add_argument(
        "--lab",
        default="show",  # not the one that `playbooks/lab.yml` makes by itself
        metavar="NAME",
        help="the lab to make, and to remove at the end (default: show)",
    )
    parser.add_argument(
        "--stay-s",
        type=float,
        default=STAY_S,
        metavar="SECONDS",
        help=f"how long connections stay where they are (default: {STAY_S:g})",
    )
    arguments = parser.parse_args(words)
    try:
        return run(arguments.page.resolve(), arguments.lab, arguments.stay_s)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
