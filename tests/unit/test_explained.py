# SPDX-License-Identifier: MIT
"""docs/operations.md has every error and its mend: codes, findings of doctor, and sentences."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sockmi.refusal import Code
from tests import sentences

PROJECT = Path(__file__).resolve().parents[2]


def rows(heading: str, first: str) -> list[tuple[str, str, str]]:
    """The rows of the table below ``heading`` whose first column is called ``first``, three columns each."""
    text = (PROJECT / "docs/operations.md").read_text()
    section = text.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    table = section.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    found = re.findall(r"^\| (`.+?) \| (?:(.+?) \| )?(.+?) \|$", table, re.MULTILINE)
    assert found
    return found


def test_every_refusal() -> None:
    explained = rows("Why a socket", "code")
    assert [code for code, _why, _mend in explained] == [f"`{code.value}`" for code in Code]
    assert all(len(why) > 10 and len(mend) > 10 for _code, why, mend in explained)


def test_every_obstacle_to_the_module() -> None:
    """In operations.md, and in what the Ansible module documents."""
    documented = (PROJECT / "plugins/modules/kmod.py").read_text()
    source = "".join(path.read_text() for path in (PROJECT / "plugins/module_utils").glob("*.py"))
    codes = set(re.findall(r'Obstacle\(\s*"([a-z-]+)"', source))
    codes |= {
        f"no-{program}"
        for program, package in re.findall(r'\("(\w+)", "(\w+)"\)', source)
        if program == package
    }
    codes |= {f"{action}-failed" for action in re.findall(r'_change\("(\w+)"', source)}
    assert {code.strip("`") for code, _why, _mend in rows("Why the kernel module", "code")} == codes
    assert all(f"V({code})" in documented for code in codes)


def test_every_finding_of_doctor() -> None:
    source = (PROJECT / "daemon/sockmi/doctor.py").read_text()
    found = set(re.findall(r'_bad\(\s*"([a-z ]+)"', source))
    explained = [name.strip("`") for name, _why, _mend in rows("What `sockmi doctor`", "check")]
    assert sorted(explained) == sorted(found)


@pytest.mark.parametrize(
    ("heading", "first", "said"),
    [
        ("If `sockmid` does not start", "it says", sentences.of_daemon),
        ("What commands and programs are told", "it says", sentences.of_clients),
        ("What Ansible says", "a module says", sentences.of_modules),
        ("What Ansible says", "the role or a playbook says", sentences.of_plays),
        ("What Ansible says", "a program of the role says", sentences.of_tools),
    ],
)
def test_every_sentence(heading: str, first: str, said: Callable[[], set[str]]) -> None:
    """Each has a row that quotes a part of it, and each quoted part is of a sentence."""
    explained = rows(heading, first)
    parts = [part for quoted, _unused, _mend in explained for part in re.findall(r"`([^`]+)`", quoted)]
    whole = {sentence.replace("`", ".") for sentence in said()}
    assert len(whole) > 10
    assert not [sentence for sentence in whole if not any(part in sentence for part in parts)]
    assert not [part for part in parts if not any(part in sentence for sentence in whole)]
    assert all(len(mend) > 5 for _quoted, _unused, mend in explained)
