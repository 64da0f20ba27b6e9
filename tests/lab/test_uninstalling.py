# SPDX-License-Identifier: MIT
"""`sockmid --remove-redirects`: nothing of the redirects is left, and nothing is cut off by accident."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.daemons import daemon_config
from lab.host import Host
from lab.labs import Lab
from sockmi.redirect.iptables import unusable
from tests.lab.crash_lab import Cluster, cluster
from tests.lab.scenario import ask, drain, service, until

LEGACY = shutil.which("iptables-legacy-save") or ""


def remove(host: Host, *words: str) -> tuple[int, str, str]:
    """Status, output and what it complains about."""
    config = host.etc_dir / "sockmi.yml"
    command = [sys.executable, "-m", "sockmi.service", "--config", config, "--remove-redirects", *words]
    done = host.run(command, check=False, timeout_s=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def left(host: Host) -> list[str]:
    """What is of the redirects in a host's kernel, but for the guard, which goes with the daemon."""
    said = host.run(["nft", "list", "tables"]).stdout
    for family in ("-4", "-6"):
        said += host.run(["ip", family, "rule"]).stdout
        said += host.run(["ip", "-N", family, "route", "show", "table", "all"]).stdout
        if LEGACY:
            program = LEGACY if family == "-4" else LEGACY.replace("iptables", "ip6tables")
            said += host.run([program]).stdout
    words = (" sockmi", "sockmi_", "7780", "proto 83")
    lines = said.replace("table inet sockmi_guard\n", "").splitlines()
    return sorted(line for line in lines if any(word in line for word in words))


def stop(daemons: Cluster, host: str) -> None:
    """As an operator would."""
    assert daemons.daemons[host].stop() == 0


@pytest.mark.parametrize("modes", [["forward", "nat", "takeover"], ["iptables"]], ids="-".join)
def test_nothing_is_left(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modes: list[str]) -> None:
    """Not of earlier configurations either; and not while the daemon runs."""
    if modes == ["iptables"]:
        if why := unusable("iptables-legacy"):
            pytest.skip(why)
        for name in ("iptables", "ip6tables"):
            (tmp_path / name).symlink_to(shutil.which(f"{name}-legacy") or "")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    a = lab.host("a")
    redirect: dict[str, Any] = {"devices": ["eth0"], "modes": modes}
    with cluster(lab, "ab", redirect=redirect) as daemons:
        until(lambda: len(left(a)) >= 5)
        before = left(a)
        status, _unused, why = remove(a)
        assert status == 1 and "another daemon uses this state; stop it" in why
        assert left(a) == before
        stop(daemons, "a")
        assert left(a) == before
        text = daemons.daemons["a"].config_file.read_text()
        daemons.daemons["a"].config_file.write_text(text.replace("- takeover", ""))
        assert remove(a, "--check") == (0, "can be removed", "")
        assert left(a) == before
        a.run(["nft", "add", "table", "inet", "sockmi_shield"])  # of one that was killed as it made all again
        assert remove(a) == (0, "removed", "")
        assert left(a) == []
        assert remove(a) == (0, "removed", "")  # once more is no error
        daemons.start("a")
        assert left(a) == before
        stop(daemons, "a")
        remove(a)


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "journal-lost"])
def test_what_is_needed_stays(lab: Lab, tmp_path: Path, journal: bool) -> None:
    """Both hosts of a moved connection refuse, naming it; it goes on. Then it is cut off by force."""
    redirect = {"devices": ["eth0"], "modes": ["forward"]}
    with cluster(lab, "ab", redirect=redirect) as daemons, service(lab, "lines", "ab", tmp_path) as serving:
        serving.client("lines", "--interval-s", "0.005", "--silence-s", "30")
        serving.connected(1)
        until(lambda: drain(lab.host("a"), "b", local_port=serving.port)[0]["outcome"] == "moved")
        until(lambda: ask(lab.host("a"), "list", table="redirects")[-1]["redirects"] != [])
        stop(daemons, "a")
        if not journal:
            for path in lab.host("a").state_dir.glob("journal.db*"):
                path.rename(tmp_path / path.name)
        before = left(lab.host("a"))
        said = "can be removed; 1 connections would be cut off"
        assert remove(lab.host("a"), "--check", "--force") == (0, said, "")
        foretold = remove(lab.host("a"), "--check")
        status, _unused, why = remove(lab.host("a"))
        assert foretold == (1, "", why)
        assert status == 1
        assert f"1 moved connections depend on this host's redirects: {lab.host('a').address4}:7000" in why
        assert "--force" in why and "(left)" in why
        assert left(lab.host("a")) == before
        flows = lab.host("a").run(["nft", "list", "map", "inet", "sockmi", "flow4"]).stdout
        assert f"{lab.host('peer').address4} . " in flows
        for path in tmp_path.glob("journal.db*"):
            path.rename(lab.host("a").state_dir / path.name)
        daemons.start("a")
        [client] = serving.clients  # servers do not like it that their daemon stops
        client.terminate()
        output, _unused = client.communicate(timeout=30)
        assert client.returncode == 0, output
        stop(daemons, "b")
        stop(daemons, "a")
        # The connection has just ended: its entries linger.
        status, said, _unused = remove(lab.host("a"), "--force")
        assert status == 0 and said.startswith("removed")
        assert left(lab.host("a")) == []


def test_a_look_makes_nothing(lab: Lab, tmp_path: Path) -> None:
    """On a host on which no daemon has run yet."""
    host, state = lab.host("a"), tmp_path / "state"
    (host.etc_dir / "sockmi.yml").write_text(yaml.safe_dump(daemon_config(host) | {"state_dir": str(state)}))
    assert remove(host, "--check") == (0, "can be removed", "")
    assert not state.exists()


def test_force_alone_is_an_error(lab: Lab) -> None:
    config = lab.host("a").etc_dir / "sockmi.yml"
    command = [sys.executable, "-m", "sockmi.service", "--config", config, "--force"]
    done = lab.host("a").run(command, check=False)
    assert done.returncode == 2 and "--force goes with --remove-redirects" in done.stderr
