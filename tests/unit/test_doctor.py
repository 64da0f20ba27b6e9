# SPDX-License-Identifier: MIT
"""Each thing that `sockmi doctor` finds, and that it does not find it where it is not."""

from __future__ import annotations

import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi import doctor
from sockmi.addresses import Endpoint
from sockmi.api import Check, CheckStatus
from sockmi.engine import listing
from sockmi.redirect import iptables
from sockmi.redirect.base import Mode


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A /proc of a host that is well."""
    write(tmp_path, "self/status", "Name:\tsockmid\nCapEff:\t000001ffffffffff\n")
    for name in ("all", "default", "lo", "eth0"):
        conf(tmp_path, name, rp_filter=0, src_valid_mark=0)
    monkeypatch.setattr(doctor, "_PROC", tmp_path)
    yield tmp_path


def write(proc: Path, name: str, text: str) -> None:
    (proc / name).parent.mkdir(parents=True, exist_ok=True)
    (proc / name).write_text(text)


def conf(proc: Path, interface: str, **values: int) -> None:
    for name, value in values.items():
        write(proc, f"sys/net/ipv4/conf/{interface}/{name}", f"{value}\n")


def bad(check: Check, status: CheckStatus, *words: str) -> None:
    assert check.status is status, check
    assert check.mend
    for word in words:
        assert word in check.message + check.mend, check


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (2, "CAP_DAC_READ_SEARCH"),
        (10, "CAP_NET_BIND_SERVICE"),
        (12, "CAP_NET_ADMIN"),
        (13, "CAP_NET_RAW"),
        (19, "CAP_SYS_PTRACE"),
        (21, "CAP_SYS_ADMIN"),
    ],
)
def test_each_capability(proc: Path, bit: int, name: str) -> None:
    assert doctor._capabilities().status is CheckStatus.OK
    write(proc, "self/status", f"CapEff:\t{0x1FFFFFFFFFF & ~(1 << bit):016x}\n")
    bad(doctor._capabilities(), CheckStatus.ERROR, name)


def test_they_are_those_of_the_unit() -> None:
    unit = (Path(__file__).resolve().parents[2] / "daemon/systemd/sockmid.service").read_text()
    [granted] = [line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet=")]
    assert {name for name, _unused in doctor._CAPABILITIES.values()} == set(granted.split("=")[1].split())


@pytest.mark.parametrize(
    ("everywhere", "here", "found"),
    [
        ({"rp_filter": 1}, {}, True),
        ({}, {"rp_filter": 1}, True),
        ({"rp_filter": 2}, {"rp_filter": 1}, False),  # the greater one counts
        ({"rp_filter": 1, "src_valid_mark": 1}, {}, False),
        ({}, {"rp_filter": 1, "src_valid_mark": 1}, False),
        ({"rp_filter": 2}, {}, False),
    ],
)
def test_reverse_path(proc: Path, everywhere: dict[str, int], here: dict[str, int], found: bool) -> None:
    conf(proc, "all", **everywhere)
    conf(proc, "eth0", **here)
    if found:
        bad(doctor._reverse_path(), CheckStatus.WARNING, "eth0", "src_valid_mark")
    else:
        assert doctor._reverse_path().status is CheckStatus.OK


def test_iptables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(stdout="iptables v1.8.9 (nf_tables)\n")
    monkeypatch.setattr(iptables.processes, "run", lambda *_words, **_options: said)
    monkeypatch.setattr(iptables, "_NET", tmp_path)
    assert doctor._iptables([Mode.NAT]) == []
    [check] = doctor._iptables([Mode.NAT, Mode.IPTABLES])
    bad(check, CheckStatus.ERROR, "nf_tables", "iptables-legacy", "redirect.modes")
    monkeypatch.setattr(iptables.importlib.util, "find_spec", lambda name: object())
    said.stdout = "iptables v1.8.9 (legacy)\n"
    (tmp_path / "ip_tables_names").touch()
    [check] = doctor._iptables([Mode.IPTABLES])
    bad(check, CheckStatus.ERROR, "has not loaded ip6_tables;", "`modprobe -a ip6_tables`", "modules-load.d")
    (tmp_path / "ip6_tables_names").touch()
    [check] = doctor._iptables([Mode.IPTABLES])
    assert check.status is CheckStatus.OK

    def missing(*_words: Any, **_options: Any) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError

    monkeypatch.setattr(iptables.processes, "run", missing)
    [check] = doctor._iptables([Mode.IPTABLES])
    bad(check, CheckStatus.ERROR, "not installed")


def test_socket_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._socket_lists().status is CheckStatus.OK
    monkeypatch.setattr(listing, "_TCPDIAG_GETSOCK", 19)  # DCCPDIAG_GETSOCK: nobody answers that here
    bad(doctor._socket_lists(), CheckStatus.ERROR, "tcp_diag")


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1024, 1 << 20))
    bad(doctor._descriptors(), CheckStatus.WARNING, "1024", "LimitNOFILE")
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (65536, 65536))
    assert doctor._descriptors().status is CheckStatus.OK
    assert resource.RLIMIT_NOFILE == 7


def test_devices() -> None:
    def absent() -> list[str]:
        raise OSError("redirect.devices: no device eth9; see `ip link`")

    assert doctor._devices(list).status is CheckStatus.OK
    bad(doctor._devices(lambda: ["eth8", "eth9"]), CheckStatus.ERROR, "no redirects for eth8, eth9")
    bad(doctor._devices(absent), CheckStatus.ERROR, "no device eth9")


def test_streams() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_port, socket.socket() as shut_port:
        shut_port.bind(("127.0.0.1", 0))  # bound, and not listening
        good = Endpoint.parse(f"127.0.0.1:{open_port.getsockname()[1]}")
        deaf = Endpoint.parse(f"127.0.0.1:{shut_port.getsockname()[1]}")
        assert doctor._streams({}).status is CheckStatus.OK
        assert doctor._streams({"b": (deaf, good)}).status is CheckStatus.OK
        bad(doctor._streams({"b": (good,), "c": (deaf,)}), CheckStatus.ERROR, f"c ({deaf}", "stream.port")


def test_keys() -> None:
    heard: dict[str, list[tuple[str, str]]] = {}
    daemon: Any = SimpleNamespace(members=SimpleNamespace(refused_lately=lambda why: heard.get(why, [])))
    assert doctor._keys(daemon).status is CheckStatus.OK
    heard["own_id_elsewhere"] = [("web", "192.0.2.3")]
    bad(doctor._keys(daemon), CheckStatus.ERROR, "192.0.2.3", "identity.pem")
    heard["unknown_key"] = [("web", "192.0.2.4")]
    bad(doctor._keys(daemon), CheckStatus.WARNING, "192.0.2.4", "key file")
