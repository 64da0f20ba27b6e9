# SPDX-License-Identifier: MIT
"""The lock of the daemon's dependencies: hosts get what was locked, not what is newest."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "daemon/dependencies.lock"
SOURCES = ROOT / "daemon/sources.lock"


def pins(lock: Path = LOCK) -> dict[str, str]:
    found = re.findall(
        r"^(\S+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", lock.read_text(), re.M
    )
    return {canonicalize_name(name): version for name, version in found}


def test_it_has_what_the_daemon_asks_for() -> None:
    project = tomllib.loads((ROOT / "daemon/pyproject.toml").read_text())["project"]
    for texts, lock in (
        (project["dependencies"], LOCK),
        (project["optional-dependencies"]["iptables"], SOURCES),
    ):
        for text in texts:
            wanted = Requirement(text)
            assert wanted.specifier.contains(pins(lock)[canonicalize_name(wanted.name)]), text


@pytest.mark.parametrize("lock", [LOCK, SOURCES], ids=lambda lock: lock.stem)
def test_every_line_is_a_pin_or_a_checksum(lock: Path) -> None:
    lines = lock.read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\S+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines)
    assert len([line for line in lines if "==" in line]) == len(pins(lock))


def test_a_wheel_with_another_checksum_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = SourceFileLoader("wheelhouse", str(ROOT / "scripts/wheelhouse"))
    wheelhouse = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(wheelhouse)
    index = tmp_path / "index"
    index.mkdir()
    for name, version in pins().items():
        (index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"something else")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(wheelhouse.WheelhouseError, match="DO NOT MATCH THE HASHES"):
        wheelhouse.dependencies(Path(sys.executable), tmp_path / "got", "3.11", "x86_64")
    assert not list((tmp_path / "got").glob("*"))
    for name, version in pins(SOURCES).items():
        (index / f"{name.replace('-', '_')}-{version}.tar.gz").write_bytes(b"something else")
    with pytest.raises(wheelhouse.WheelhouseError, match="DO NOT MATCH THE HASHES"):
        wheelhouse.built(Path(sys.executable), tmp_path / "got", ["--no-build-isolation"], {})
    assert not list((tmp_path / "got").glob("*"))


def test_hosts_with_an_older_libc_load_the_c_libraries() -> None:
    """Debian 12 has glibc 2.36; wherever they were built."""
    for name in ("libsockmi-engine.so", "libsockmi.so"):
        words = ["objdump", "-T", ROOT / "daemon/libsockmi/build" / name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        needed = {tuple(map(int, one.split("."))) for one in re.findall(r"GLIBC_([\d.]+)", said)}
        assert (2, 30) < max(needed) <= (2, 36), name
