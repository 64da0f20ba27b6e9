# SPDX-License-Identifier: MIT
"""The licence of each part: REUSE.toml, the files' own headers, LICENSE and packages say the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
HEADER = re.compile(r"^\W{0,8}(?:dnl )?SPDX-License-Identifier: ([\w. -]+?)(?: \*/)?$", re.MULTILINE)
# Names that the kernel uses for the same.
NAMES = {"GPL-2.0": "GPL-2.0-only", "GPL-2.0 WITH Linux-syscall-note": "GPL-2.0-only WITH Linux-syscall-note"}
HEADER_BYTES = 600
SOURCES = {".c", ".h", ".py", ".sh", ".bash"}


def files() -> list[Path]:
    """Those that are, or would be, in the repository."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [Path(name) for name in done.stdout.split("\0") if name]
    return [name for name in names if (PROJECT / name).is_file() and name.parts[0] != "LICENSES"]


@cache
def annotations() -> list[tuple[list[re.Pattern[str]], str]]:
    """Path patterns and licence of each annotation."""
    parsed = tomllib.loads((PROJECT / "REUSE.toml").read_text())["annotations"]
    return [
        ([_pattern(one) for one in entry["path"]], str(entry["SPDX-License-Identifier"])) for entry in parsed
    ]


def _pattern(glob: str) -> re.Pattern[str]:
    """``**`` is anything, ``*`` anything but a slash (reuse.software, 3.3)."""
    parts = re.split(r"(\*\*|\*)", glob)
    return re.compile("".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts))


def licence_of(name: Path) -> str | None:
    """What REUSE.toml says: the last annotation that has the path."""
    found = [licence for paths, licence in annotations() if any(one.fullmatch(str(name)) for one in paths)]
    return found[-1] if found else None


def header_of(name: Path) -> str | None:
    """What the file itself says in its head."""
    found = HEADER.search((PROJECT / name).read_bytes()[:HEADER_BYTES].decode(errors="replace"))
    return NAMES.get(found[1], found[1]) if found else None


def test_every_file_has_a_licence() -> None:
    assert len(files()) > 400
    assert not [str(name) for name in files() if licence_of(name) is None]


def test_headers_say_the_same() -> None:
    said = {str(name): (header_of(name), licence_of(name)) for name in files()}
    assert sum(header is not None for header, _unused in said.values()) > 300
    assert not {name: both for name, both in said.items() if both[0] not in (None, both[1])}


def test_every_source_has_a_header() -> None:
    def is_source(name: Path) -> bool:
        content = (PROJECT / name).read_bytes()
        return bool(content.strip()) and (name.suffix in SOURCES or content.startswith(b"#!"))

    assert not [str(name) for name in files() if is_source(name) and header_of(name) is None]


def test_every_annotation_is_of_something() -> None:
    names = [str(name) for name in files()]
    for paths, _licence in annotations():
        assert not [one.pattern for one in paths if not any(one.fullmatch(name) for name in names)]


def test_the_texts_are_those_that_are_needed() -> None:
    texts = {path.stem for path in (PROJECT / "LICENSES").iterdir()}
    used = {word for _paths, licence in annotations() for word in re.split(r" OR | WITH ", licence)}
    assert used == texts
    overview = (PROJECT / "LICENSE").read_text()
    assert all(f"LICENSES/{text}.txt" in overview for text in texts)


def test_the_overview_names_every_part() -> None:
    """Below the licence's name: all paths of those but MIT, and all folders of MIT."""
    parts = (PROJECT / "LICENSE").read_text().split("\n\n")[1:]
    for entry in tomllib.loads((PROJECT / "REUSE.toml").read_text())["annotations"]:
        licence = entry["SPDX-License-Identifier"]
        [part] = [one for one in parts if f"    {licence.split(' ')[0]}" in one]
        for path in entry["path"]:
            named = path.partition("*")[0].rstrip("._") if licence != "MIT" else path.partition("**")[0]
            if licence == "MIT" and (path.startswith(".") or not path.endswith("/**")):
                continue
            assert named.removesuffix("Kbuild") in part, path


def test_packages_say_the_same() -> None:
    project = tomllib.loads((PROJECT / "daemon/pyproject.toml").read_text())["project"]
    assert project["license"]["text"] == licence_of(Path("daemon/setup.py"))
    collection = yaml.safe_load((PROJECT / "galaxy.yml").read_text())
    assert licence_of(Path("plugins/modules/info.py")) in collection["license"]
    for meta in (PROJECT / "roles").glob("*/meta/main.yml"):
        said = yaml.safe_load(meta.read_text())["galaxy_info"]["license"]
        assert said == licence_of(meta.relative_to(PROJECT))
    for source in [*(PROJECT / "kmod").glob("*.c"), *(PROJECT / "tests/kmod/planted").glob("*.c")]:
        assert set(re.findall(r'MODULE_LICENSE\("([^"]+)"\)', source.read_text())) <= {"GPL"}
