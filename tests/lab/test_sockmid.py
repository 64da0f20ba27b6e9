# SPDX-License-Identifier: MIT
"""`sockmid`: every kind of bad start, reload, key rotation, metrics, logs, capabilities, its unit."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lab.daemons import Daemon, Daemons, daemon_config, key_file, write_secret
from lab.host import Host
from lab.labs import Lab
from sockmi import api
from sockmi.client import Imported, ImportRequest, import_socket
from sockmi.engine.base import Kind
from sockmi.journal import Journal
from sockmi.version import VERSION
from tests.lab.matrix_lab import Keeper
from tests.lab.scenario import ask, daemons, status, until, wait_for_members
from tests.lab.terminal import Result, Scene, ended, run

PROJECT = Path(__file__).resolve().parents[2]
UNIT = PROJECT / "daemon/systemd/sockmid.service"
KEY = "0123456789abcdef" * 4


@pytest.fixture
def host(lab: Lab) -> Iterator[Host]:
    """Host c, with a key and nothing of an earlier test."""
    one = lab.host("c")
    for directory in (one.etc_dir, one.state_dir, one.run_dir):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    write_secret(key_file(one), KEY)
    yield one


def sockmid(host: Host, *words: object, timeout_s: float = 30) -> Result:
    """Run the daemon to its end, which must come by itself."""
    command = [sys.executable, "-m", "sockmi.service", *map(str, words)]
    result = host.run(command, check=False, timeout_s=timeout_s)
    assert "Traceback" not in result.stderr, result.stderr
    return Result(result.returncode, result.stdout, result.stderr)


def written(host: Host, text: str | None = None, **changes: Any) -> Path:
    """A configuration file: the lab's with changes, or any text."""
    path = host.etc_dir / "sockmi.yml"
    path.write_text(yaml.safe_dump(daemon_config(host) | changes) if text is None else text)
    return path


def group_of(host: Host, **changes: Any) -> list[dict[str, Any]]:
    """The lab's group with changes."""
    return [daemon_config(host)["groups"][0] | changes]


def fails(host: Host, *words: str, config: Path | None = None) -> str:
    """The daemon ends with status 1 and one clear line, which names the words; that line."""
    result = sockmid(host, "--config", config or written(host))
    assert result.status == 1, result
    lines = [line for line in result.err.splitlines() if not re.match(r"^\d{4}-", line)]
    assert len(lines) == 1 and lines[0].startswith("sockmid: "), result.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


# -- the configuration

BAD_VALUES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"groop": []}, ("groop: unknown option", "sockmi.yml(5)")),
    ({"timing": {"lease": 5}}, ("timing.lease: unknown option",)),
    ({"policy": "best"}, ("policy:", "'first', 'least-loaded' or 'weighted'")),
    ({"metrics_port": 70000}, ("metrics_port:", "70000: it must be at most 65535")),
    ({"chunk_size": 0}, ("chunk_size:", "0: it must be at least 1")),
    ({"weight": float("nan")}, ("weight:",)),
    ({"timing": {"freeze_deadline_s": 60}}, ("timing.freeze_deadline_s:", "5")),
    ({"stream": {"address": "0.0.0.0"}}, ("stream.address:", "leave it out")),  # noqa: S104
    ({"stream": {"address": "b"}}, ("stream.address: 'b' is no IP address",)),
    ({"stream": 7781}, ("stream: 7781: give options with values",)),
    ({"groups": []}, ("at least one group",)),
    ({"groups": {"name": "x"}}, ("groups:", "give a list")),
    ({"groups": [{"name": "x"}, {"name": "x"}]}, ("each name once",)),
    ({"groups": [{"name": "Big"}]}, ("groups.0.name: 'Big': up to 32 of a-z, 0-9",)),
    ({"groups": [{"address": "10.0.0.1"}]}, ("10.0.0.1 is not a multicast address", "239.0.0.0/8")),
    ({"groups": [{"members": ["b"]}]}, ("groups.0.members.0:", "ADDRESS:PORT")),
    ({"groups": [{"port": 0}]}, ("groups.0.port:",)),
    ({"redirect": {"modes": []}}, ("at least one mode",)),
    ({"redirect": {"modes": ["nat", "nat"]}}, ("each once",)),
    ({"redirect": {"modes": ["teleport"]}}, ("redirect.modes.0:", "'nat'")),
    ({"redirect": {"mark": 5}}, ("redirect.mark:",)),
    ({"host_name": "x" * 65}, ("host_name:", "64 bytes")),
    ({"host_name": 5}, ("host_name: 5: give a text; in quotes",)),
    ({"state_dir": "state"}, ("state_dir: state is relative",)),
    ({"control_mode": 0o1777}, ("control_mode: 1023: give an octal number", "as 0660")),
    ({"log_format": "xml"}, ("log_format: 'xml': give 'text' or 'json'",)),
    ({"chunk_size": "many"}, ("chunk_size: 'many': give a whole number",)),
    ({"weight": "heavy"}, ("weight: 'heavy': give a number",)),
    ({"groups": "x" * 99}, ("groups: 'xxxxxxxx", "xx ...: give a list")),
    ({5: 6}, ("5: unknown option",)),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    BAD_VALUES,
    ids=[re.sub(r"\W+", "-", str(changes))[:40] for changes, _unused in BAD_VALUES],
)
def test_bad_values(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    """In this process: what `Config.load` says is what `sockmid` prints (see the tests below)."""
    from sockmi.config import Config, ConfigError

    path = tmp_path / "sockmi.yml"
    path.write_text(yaml.safe_dump(changes))
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_several_mistakes_are_told_at_once(host: Host) -> None:
    fails(host, "policy:", "nope: unknown option", config=written(host, "policy: x\nnope: 1\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ("not usable as YAML", "line")),
        ("\tpolicy: first", ("not usable as YAML",)),
        ("- a list", ("expected a mapping", "list")),
        ("policy: first\npolicy: weighted\n", ("'policy' stands there twice", "line 2")),
        ("policy: !!python/name:os.system ''", ("not usable as YAML",)),
    ],
)
def test_files_that_are_no_configuration(host: Host, text: str, words: tuple[str, ...]) -> None:
    fails(host, str(host.etc_dir / "sockmi.yml"), *words, config=written(host, text))


def test_files_that_cannot_be_read(host: Host) -> None:
    fails(host, "No such file or directory", "--config", config=host.etc_dir / "absent.yml")
    fails(host, "Is a directory", config=host.etc_dir)
    (host.etc_dir / "bytes.yml").write_bytes(b"\xff\xfe\x00policy")
    fails(host, "not usable as YAML", config=host.etc_dir / "bytes.yml")


def test_check_and_version(host: Host) -> None:
    path = written(host)
    good = sockmid(host, "--config", path, "--check")
    assert good.status == 0
    assert good.out.startswith(f"{path}: good\ngroup lab: 1 key in ")
    assert "\nengine " in good.out
    assert "would not start" not in good.out
    bad = sockmid(host, "--config", written(host, policy="x"), "--check")
    assert bad.status == 1 and "policy:" in bad.err
    example = sockmid(host, "--config", PROJECT / "daemon/sockmi.example.yml", "--check")
    assert example.status == 0, example
    assert "would not start now: group default: /etc/sockmi/group.key: No such file" in example.out
    assert sockmid(host, "--version").out == f"sockmid {VERSION}\n"
    for word in ("--fast", "--vers"):
        wrong = sockmid(host, word)
        assert wrong.status == 2 and f"unrecognized arguments: {word}" in wrong.err


# -- keys, addresses, ports


def test_bad_keys(host: Host) -> None:
    key = key_file(host)
    key.unlink()
    fails(host, str(key), "No such file", "make a key")
    key.write_text(KEY)
    key.chmod(0o640)
    fails(host, str(key), "mode 0640", f"chmod 0600 {key}")
    key.chmod(0o600)
    os.chown(key, 65534, -1)
    fails(host, str(key), "belongs to user 65534", "chown root")
    os.chown(key, 0, -1)
    for text in ("", "# only a comment\n"):
        key.write_text(text)
        fails(host, str(key), "0 keys")
    for text in ("secret", KEY[:-2], KEY + "00"):
        key.write_text(text)
        assert text not in fails(host, f"{key}, line 1", "64 hexadecimal digits")
    key.write_text("00" * 32)
    fails(host, str(key), "not random")
    key.write_text(f"{KEY}\n{KEY}\n")
    fails(host, str(key), "same key twice")
    key.unlink()
    key.mkdir()
    fails(host, str(key), "not a regular file")


def test_a_group_without_an_interface_address(host: Host) -> None:
    host.run(["ip", "link", "add", "smt-bare", "type", "veth"])
    try:
        words = ("group 239.77.83.1:7780 on smt-bare", "has it an address")
        fails(host, *words, config=written(host, groups=group_of(host, interface="smt-bare")))
        fails(host, "nonesuch0", config=written(host, groups=group_of(host, interface="nonesuch0")))
    finally:
        host.run(["ip", "link", "delete", "smt-bare"])


def test_ports_that_are_taken(host: Host) -> None:
    address = str(host.address4)
    with host.socket() as taken:
        taken.bind((address, 7781))
        taken.listen()
        fails(host, f"cannot listen at {address}:7781", "Address already in use", "stream.port")
    with host.socket(kind=socket.SOCK_DGRAM) as taken:
        taken.bind((address, 7780))
        fails(host, "group 239.77.83.1:7780", "Address already in use")
    elsewhere = written(host, stream={"address": "10.77.1.99"})
    fails(host, "cannot listen at 10.77.1.99:7781", "stream.address", config=elsewhere)


def test_the_metrics_port_is_taken(host: Host) -> None:
    with host.socket() as taken:
        taken.bind(("127.0.0.1", 9780))
        taken.listen()
        fails(host, "Address already in use")


def test_the_control_socket_is_taken(lab: Lab, host: Host) -> None:
    with daemons(lab, "c"):
        other = host.etc_dir / "other"
        config = written(
            host,
            state_dir=str(other),
            groups=group_of(host, port=7880),
            stream={"port": 7881},
            metrics_port=0,
            redirect={"table": "other", "log_group": 7784, "devices": ["eth0"]},
        )
        fails(host, str(host.control_socket), "another daemon answers", "run_dir", config=config)
        assert status(host)["host"] == "c"  # the first one is none the worse
        config = written(host, run_dir=str(other), state_dir=str(other))
        fails(host, "NFLOG group 7783", "another daemon", config=config)


def test_a_stale_control_socket_is_no_obstacle(lab: Lab, host: Host) -> None:
    with daemons(lab, "c") as running:
        running["c"].kill()
        assert host.control_socket.exists()
        running["c"].start()
        assert status(host)["pid"] == running["c"].pid


def test_directories_that_cannot_be_used(host: Host) -> None:
    (host.etc_dir / "file").write_text("")
    path = host.etc_dir / "file" / "state"
    fails(host, str(path), "Not a directory", config=written(host, state_dir=str(path)))


def test_not_root(lab: Lab, host: Host) -> None:
    """In a forked child, so that another user needs no access to the checkout."""
    from sockmi import service

    for path in [host.etc_dir, *host.etc_dir.parents]:
        assert path.stat().st_mode & 0o001, f"{path} is closed to other users"
    config = written(host)
    config.chmod(0o644)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        code = 99
        try:
            code = service.main(["--config", str(config)])
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, said
    assert said.startswith("sockmid: ") and "needs root" in said


# -- the journal and the identity


def test_a_journal_that_is_no_database(host: Host) -> None:
    (host.state_dir / "journal.db").write_bytes(b"not a database, but long enough to be one" * 100)
    fails(host, "journal.db", "not a database", "move it away")


def test_a_journal_of_a_newer_release(host: Host) -> None:
    path = host.state_dir / "journal.db"
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    fails(host, str(path), "newer release (schema 99)", "upgrade")


def test_a_damaged_journal(host: Host) -> None:
    """The header is good, what it leads to is not."""
    path = host.state_dir / "journal.db"
    Journal(path).close()
    content = bytearray(path.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    path.write_bytes(content)
    fails(host, str(path))


def test_a_journal_without_its_tables(host: Host) -> None:
    path = host.state_dir / "journal.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=1")
    database.close()
    path.chmod(0o600)
    fails(host, str(path), "move it away")


def test_a_damaged_identity(host: Host) -> None:
    path = host.state_dir / "identity.pem"
    write_secret(path, "-----BEGIN NOTHING-----")
    fails(host, str(path), "damaged", "restore")
    path.chmod(0o644)
    fails(host, str(path), "chmod 0600")


# -- life


def test_reload(lab: Lab, host: Host) -> None:
    with daemons(lab, "c") as running:
        daemon = running["c"]
        timing = yaml.safe_load(daemon.config_file.read_text())["timing"]
        unchanged = run("reload", "--json", host=host)
        assert unchanged.status == 0
        answer = api.ReloadResponse.model_validate_json(unchanged.out)
        assert (answer.changed, answer.restart_needed) == ([], [])
        assert "changed: nothing" in run("reload", host=host).out

        written(host, policy="weighted", imports={"max_connected": 7}, metrics_port=9781, timing=timing)
        later = daemon.config_file.rename(daemon.config_file.with_suffix(".later"))
        written(host, timing=timing)
        foretold = run("reload", "--json", "--check", later, host=host).json
        assert run("reload", "--json", host=host).json["changed"] == []
        later.rename(daemon.config_file)
        changed = run("reload", "--json", host=host).json
        assert foretold == changed
        assert set(changed["changed"]) == {"policy", "imports"}
        assert changed["restart_needed"] == ["metrics_port"]
        assert status(host)["import_lists"]["connected"]["maximum"] == 7
        assert "needs a restart: metrics_port" in run("reload", host=host).out

        written(host, policy="weighted", imports={"max_connected": 8}, nope=1)
        refused = run("reload", host=host)
        assert refused.status == 1
        assert "bad-request: Not reloaded, the old settings stay" in refused.err
        assert "nope: unknown option" in refused.err
        assert status(host)["import_lists"]["connected"]["maximum"] == 7

        written(host, imports={"max_connected": 9})
        os.kill(daemon.pid, signal.SIGHUP)
        until(lambda: status(host)["import_lists"]["connected"]["maximum"] == 9)
        until(lambda: "reloaded: " in daemon.log())
        written(host, "a: [")
        os.kill(daemon.pid, signal.SIGHUP)
        until(lambda: "not reloaded: " in daemon.log())
        assert status(host)["import_lists"]["connected"]["maximum"] == 9


def test_the_key_is_changed_while_they_run(lab: Lab) -> None:
    """New key last, then first, then alone: they hear each other all the time."""
    hosts = [lab.host("a"), lab.host("b")]
    with daemons(lab, "ab") as running:
        old, new = key_file(hosts[0]).read_text().strip(), KEY

        def heard() -> bool:
            rows = [run("groups", "--json", host=one).json["groups"][0]["members"] for one in hosts]
            return [[member["host"] for member in row] for row in rows] == [["b"], ["a"]]

        for keys in (f"{old}\n{new}", f"{new}\n{old}"):
            for one in hosts:
                write_secret(key_file(one), keys)
                changed = run("reload", "--json", host=one)
                assert changed.json["changed"] == ["groups.lab.key_file"], changed
                until(heard)
        for name in "ab":  # the old one goes, by SIGHUP this time
            write_secret(key_file(lab.host(name)), new)
            os.kill(running[name].pid, signal.SIGHUP)
            until(lambda name=name: "reloaded: " in running[name].log())
        until(heard)
        assert run("reload", "--json", host=hosts[0]).json["changed"] == []
        key_file(hosts[0]).write_text("nonsense")
        refused = run("reload", host=hosts[0])
        assert refused.status == 1 and "not a key" in refused.err
        assert heard()


def test_stops_cleanly(lab: Lab, host: Host) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        daemon = Daemon(host, daemon_config(host))
        daemon.start()
        assert daemon.process is not None
        status(host)  # its loop runs
        daemon.process.send_signal(number)
        assert daemon.process.wait(15) == 0, daemon.log()
        assert not host.control_socket.exists()
        assert "Traceback" not in daemon.log()


def test_systemd_is_told(host: Host) -> None:
    """READY, WATCHDOG, RELOADING and STOPPING, as sd_notify(3) has them."""
    path = host.run_dir / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(15)
        environment = host.environment | {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000"}
        command = [sys.executable, "-m", "sockmi.service", "--config", str(written(host))]
        process = host.popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:

            def wait_for(word: str) -> str:
                while True:
                    message = manager.recv(4096).decode()
                    if word in message:
                        return message

            wait_for("READY=1")
            wait_for("WATCHDOG=1")
            wait_for("WATCHDOG=1")
            process.send_signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in wait_for("RELOADING=1")
            wait_for("READY=1")
            process.send_signal(signal.SIGTERM)
            wait_for("STOPPING=1")
            assert process.wait(15) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


# -- metrics and logs


def _metrics(host: Host) -> dict[tuple[str, ...], float]:
    def fetch() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", 9780, timeout=10)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()

    found = {}
    for family in text_string_to_metric_families(host.python(fetch)):
        assert family.name.startswith("sockmi_") and family.documentation
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found[(sample.name, *sample.labels.values())] = sample.value
    return found


def test_metrics(lab: Lab) -> None:
    """Two moves, a refusal: what is counted is what happened."""
    scene = Scene(lab)
    a, b = lab.host("a"), lab.host("b")
    try:
        with daemons(lab, "ab"):
            assert _metrics(a)[("sockmi_group_members", "lab")] == 1
            scene.server("a", 5200)
            clients = [scene.client("a", 5200) for _turn in range(2)]
            importer = scene.program("b", "import", "--port", 5200, "--count", 2, "--exec", "cat")
            scene.waiting("b")
            assert run("drain", "--port", 5200, "--kind", "connected", "--to", "b", host=a).status == 0
            third = scene.client("a", 5200)
            pid, fd = scene.descriptor_of(third)
            nowhere = ("--to", "10.77.1.99", "--timeout", 0.3)
            assert run("export", "--pid", pid, "--fd", fd, *nowhere, host=a).status == 1
            at_a, at_b = _metrics(a), _metrics(b)
            assert at_a[("sockmi_migrations_total", "export", "repair", "moved")] == 2
            assert at_a[("sockmi_migrations_total", "export", "repair", "refused")] == 1
            assert at_a[("sockmi_refusals_total", "no-offer")] == 1
            assert at_b[("sockmi_migrations_total", "import", "repair", "moved")] == 2
            assert at_a[("sockmi_freeze_seconds_count",)] == 2
            assert 0 < at_a[("sockmi_freeze_seconds_sum",)] < 2
            assert at_a[("sockmi_redirects", "export")] == 2
            assert at_b[("sockmi_redirects", "import")] == 2
            for client in clients:
                client.connection.shutdown(socket.SHUT_WR)
            assert ended(importer).status == 0
            until(lambda: _metrics(a)[("sockmi_redirects", "export")] == 0, 30)
    finally:
        scene.close()


def test_a_drain_opens_its_stream_while_it_looks(lab: Lab) -> None:
    """To the host that was named, before it is known what goes; who only asks what would go opens none."""

    def connected() -> bool:
        [answer] = ask(lab.host("a"), "groups")
        return bool(answer["groups"][0]["members"][0]["connected"])

    with daemons(lab, "ab"):
        for dry_run in (True, False):
            *_unused, answer = ask(lab.host("a"), "drain", filter={"local_port": 1}, to="b", dry_run=dry_run)
            assert answer["progress"]["selected"] == 0
            if dry_run:
                time.sleep(0.2)
                assert not connected()
        until(connected)


def test_json_logs(lab: Lab) -> None:
    """Every line is one JSON object, from the start to the end, also those of failures."""
    scene = Scene(lab)
    host = lab.host("a")
    log = host.run_dir / "daemon.log"
    log.unlink(missing_ok=True)
    try:
        with daemons(lab, "ab", log_format="json"):
            scene.server("a", 5201)
            scene.client("a", 5201)
            assert run("drain", "--port", 5201, "--kind", "connected", "--to", "b", host=host).status == 0
            written(host, "a: [")
            os.kill(status(host)["pid"], signal.SIGHUP)
            until(lambda: "not reloaded" in log.read_text())
    finally:
        scene.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines
    for line in lines:
        assert {"time", "priority", "level", "logger", "message"} <= set(line)
        assert line["logger"].startswith("sockmi") and abs(line["time"] - time.time()) < 600
    assert {line["level"] for line in lines} >= {"info", "error"}


def test_the_journal_has_priorities(lab: Lab, host: Host) -> None:
    """Standard error is the journal's, which takes no entries: lines begin with <N>, and have no time.

    What it takes: tests/unit/test_logs.py.
    """
    path = host.run_dir / "journal.log"
    with path.open("wb") as log:
        where = os.fstat(log.fileno())
        environment = host.environment | {"JOURNAL_STREAM": f"{where.st_dev}:{where.st_ino}"}
        alone = '[ ! -d /run/systemd/journal ] || mount -t tmpfs none /run/systemd/journal; exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", alone, "sh", sys.executable, "-m", "sockmi.service"]
        process = host.popen([*command, "--config", str(written(host))], env=environment, stderr=log)
    try:
        until(lambda: "is ready" in path.read_text())
    finally:
        process.terminate()
        process.wait(15)
    lines = path.read_text().splitlines()
    assert lines and all(re.match(r"<[2-7]>[A-Z]+ ", line) for line in lines), lines


def test_doctor_hears_another_key(lab: Lab) -> None:
    """Two daemons with different keys: each is told that the other is there, and where."""
    a, b = lab.host("a"), lab.host("b")
    with Daemons(lab, "ab") as running:
        running["b"].stop()
        write_secret(key_file(b), KEY)
        running["b"].start()

        def check(host: Host) -> dict[str, Any]:
            checks = run("doctor", "--json", host=host).json["checks"]
            return dict(next(one for one in checks if one["name"] == "group key"))

        until(lambda: check(a)["status"] == "warning" and check(b)["status"] == "warning")
        assert str(b.address4) in check(a)["message"]
        assert "key file" in check(a)["mend"]


# -- the unit


def _unit() -> dict[str, str]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, so nothing here can check a unit")
    text = UNIT.read_text()
    for program in re.findall(r"^Exec\w+=(\S+)", text, re.MULTILINE):
        text = text.replace(program, "/bin/true")  # where the daemon is installed is not its affair
    text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)  # not installed either
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", copy], text=True, capture_output=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_unit_is_rated() -> None:
    """docs/security.md says how; no sandboxing gets lost unseen. Needs no systemd that runs."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, so nothing here can rate a unit")
    words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", UNIT]
    rated = subprocess.run(words, text=True, capture_output=True, timeout=60, check=True).stdout
    found = re.search(r"exposure level for sockmid.service: ([0-9.]+)", rated)
    said = re.search(r"rates the unit ([0-9.]+).*systemd (\d+)", (PROJECT / "docs/security.md").read_text())
    assert found and said
    version = subprocess.run(["systemd-analyze", "--version"], text=True, capture_output=True, check=True)
    ours = version.stdout.startswith(f"systemd {said[2]} ")
    assert float(found[1]) <= (float(said[1]) if ours else 4.9), "above that it is no longer OK"


def test_the_unit_is_never_given_up() -> None:
    """Whatever ends the daemon again and again: somebody's connection waits for it."""
    unit = _unit()
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == ("always", "0")


def test_the_units_capabilities_suffice(lab: Lab) -> None:
    """A connection of another user, on a privileged port, is moved there and back with no others."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed, so capabilities cannot be taken away")
    names = [name.removeprefix("CAP_").lower() for name in _unit()["CapabilityBoundingSet"].split()]
    only = "-all," + ",".join(f"+{name}" for name in names)
    scene = Scene(lab)
    a, b = lab.host("a"), lab.host("b")
    with daemons(lab, "ab") as running:
        try:
            for name in "ab":
                _restart_with(
                    running[name], ["setpriv", "--bounding-set", only, "--inh-caps", only, "--no-new-privs"]
                )
            until(lambda: all(run("doctor", host=one).status == 0 for one in (a, b)))
            held = running["a"].process
            assert held is not None
            bounding = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{held.pid}/status").read_text())
            assert bounding and int(bounding[1], 16).bit_count() == len(names)
            for port, user in ((5210, 65534), (80, None)):
                scene.server("a", port, user=user)
                client = scene.client("a", port)
                importer = scene.program("b", "import", "--port", port, "--exec", "cat")
                scene.waiting("b")
                pid, fd = scene.descriptor_of(client)
                done = run("export", "--pid", pid, "--fd", fd, "--to", "b", host=a)
                assert done.status == 0, done.out
                assert client.say("on") == "on"
            pid, fd = scene.descriptor_of(client, "b")
            back = scene.program("a", "import", "--port", 80, "--exec", "cat")
            scene.waiting("a")
            assert run("export", "--pid", pid, "--fd", fd, "--to", "a", host=b).status == 0
            assert client.say("home") == "home"
            client.connection.shutdown(socket.SHUT_WR)
            assert ended(back).status == 0
            importer.kill()
        finally:
            scene.close()


def test_the_units_capabilities_suffice_for_users(lab: Lab) -> None:
    """What a user's application is handed, and what waited in the queue of its listener, is the user's."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed, so capabilities cannot be taken away")
    names = [name.removeprefix("CAP_").lower() for name in _unit()["CapabilityBoundingSet"].split()]
    only = "-all," + ",".join(f"+{name}" for name in names)
    control, nobody, port = lab.host("b").control_socket, 65534, 5211
    address = lab.host("a").address(4)

    def as_nobody() -> None:
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)

    def serve() -> None:
        as_nobody()
        listener = socket.create_server((address, port))
        signal.pause()
        listener.close()

    def take() -> list[int]:
        as_nobody()
        wanted = [ImportRequest([kind], local_port=port) for kind in ("listening", "connected")]
        came: list[Imported] = []
        while len(came) < 2:
            came += import_socket(wanted, 10, control=control)
        [connection] = [one.socket for one in came if one.kind is Kind.CONNECTED and one.socket]
        connection.sendall(connection.recv(99))
        return [os.fstat(one.fd).st_uid for one in came]

    with daemons(lab, "ab", control_mode=0o666) as running, lab.host("peer").socket() as peer:
        for name in "ab":
            words = ["setpriv", "--bounding-set", only, "--inh-caps", only, "--no-new-privs"]
            _restart_with(running[name], words)
        wait_for_members(lab, "ab")
        with lab.host("a").entered():
            server = Keeper([], serve)
        with server:
            until(lambda: peer.connect_ex((address, port)) == 0)
            peer.settimeout(10)
            peer.sendall(b"hello")
            with lab.host("b").entered():
                importer = Keeper([], take)
            with importer:
                done = run("drain", "--port", port, "--kind", "listening", "--to", "b", host=lab.host("a"))
                assert done.status == 0, done.out
                assert peer.recv(99) == b"hello"
                assert importer.result() == [nobody, nobody]


def _restart_with(daemon: Daemon, prefix: list[str]) -> None:
    """Start it again under another program."""
    daemon.stop()
    command = [*prefix, sys.executable, "-m", "sockmi.service", "--config", str(daemon.config_file)]
    with daemon.log_file.open("ab") as log:
        daemon.process = daemon.host.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    until(daemon.answers)


def test_memory_at_rest(lab: Lab) -> None:
    """Of two that know each other; `make bench` has the figure. Pythons and libraries differ by some."""
    with daemons(lab, "ab") as running:
        wait_for_members(lab, "ab")
        time.sleep(1.5)  # they give back what only the start needed
        for name in "ab":
            [resident] = re.findall(
                r"VmRSS:\s+(\d+) kB", Path(f"/proc/{running[name].pid}/status").read_text()
            )
            assert int(resident) * 1024 < 70e6
