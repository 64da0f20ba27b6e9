# SPDX-License-Identifier: MIT
"""``sockmid --check``: the file, and what it names on this host; nothing is started or made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sockmi.redirect import iptables
from sockmi.service import main
from sockmi.transport.keyring import generate

KEY = "ab01cd23ef456789" * 4


def check(folder: Path, capsys: pytest.CaptureFixture[str], **options: object) -> tuple[int, str, str]:
    """Status and what is said."""
    group = {"name": "default", "key_file": str(folder / "group.key"), "interface": "lo"}
    content = {"groups": [group | options.pop("group", {})], "state_dir": str(folder / "state")}  # type: ignore[operator]
    file = folder / "sockmi.yml"
    file.write_text(yaml.safe_dump(content | options))
    status = main(["--config", str(file), "--check"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path / "group.key")
    status, said, wrong = check(tmp_path, capsys, engine="repair")
    assert (status, wrong) == (0, "")
    assert said.startswith(f"{tmp_path}/sockmi.yml: good\ngroup default: 1 key in {tmp_path}/group.key\n")
    assert "would not start" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"group.key", "sockmi.yml"}


def test_what_is_not_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is good all the same: the role checks it before it makes the rest."""
    status, said, wrong = check(tmp_path, capsys, group={"interface": "nowhere0"})
    assert (status, wrong) == (0, "")
    head = "but sockmid would not start now: group default: "
    assert f"{head}{tmp_path}/group.key: No such file or directory; make a key" in said
    assert f"{head}there is no interface nowhere0\n" in said


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("short", 0o600, "line 1: not a key"),
        (KEY[:-2], 0o600, "line 1: not a key; expected 32 bytes"),
        (f"{KEY}\n{KEY}", 0o600, "the same key twice"),
        (KEY, 0o644, "lets others read it"),
    ],
)
def test_a_key_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, mode: int, words: str
) -> None:
    (tmp_path / "group.key").write_text(content)
    (tmp_path / "group.key").chmod(mode)
    status, said, wrong = check(tmp_path, capsys)
    assert (status, said) == (1, "")
    assert words in wrong
    assert KEY not in wrong


def test_a_state_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path / "group.key")
    (tmp_path / "state").touch()
    status, _said, wrong = check(tmp_path, capsys)
    assert status == 1
    assert f"state_dir: {tmp_path}/state is no folder" in wrong


def test_an_engine_without_its_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/sockmi").exists():
        pytest.skip("the module is loaded")
    generate(tmp_path / "group.key")
    status, said, _wrong = check(tmp_path, capsys, engine="kernel")
    assert status == 0
    assert "but sockmid would not start now: engine: kernel is asked for, but /dev/sockmi" in said


def test_legacy_iptables_that_the_kernel_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where that mode is asked for."""
    generate(tmp_path / "group.key")
    monkeypatch.setattr(iptables, "unusable", lambda: None)
    monkeypatch.setattr(iptables, "_NET", tmp_path)
    for modes, told in ((["nat"], False), (["nat", "iptables"], True)):
        status, said, _wrong = check(tmp_path, capsys, engine="repair", redirect={"modes": modes})
        assert status == 0
        head = "but sockmid would not start now: redirect mode iptables: the kernel has not loaded "
        assert (f"{head}ip_tables and ip6_tables; `modprobe -a ip_tables ip6_tables`" in said) == told
