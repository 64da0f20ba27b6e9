# SPDX-License-Identifier: MIT
"""Kernels that the module's source is not for: it says so instead of being built for them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

COMPAT = Path(__file__).parents[2] / "kmod" / "compat.h"


def preprocessed(
    tmp_path: Path, major: int, minor: int, *definitions: str
) -> subprocess.CompletedProcess[str]:
    """compat.h as for that kernel, of whose headers it sees the version alone."""
    for name in re.findall(r"^#include <(.*)>", COMPAT.read_text(), re.MULTILINE):
        header = tmp_path / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.touch()
    (tmp_path / "linux" / "version.h").write_text(
        "#define IS_ENABLED(option) 1\n"
        "#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
        f"#define LINUX_VERSION_CODE KERNEL_VERSION({major}, {minor}, 0)\n"
    )
    return subprocess.run(
        ["gcc", "-E", "-nostdinc", "-I", str(tmp_path), *definitions, "-o", "/dev/null", str(COMPAT)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("major", "minor"), [(6, 1), (6, 12), (7, 2), (7, 255)])
def test_known_kernels_are_built_for(tmp_path: Path, major: int, minor: int) -> None:
    done = preprocessed(tmp_path, major, minor)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("major", "minor", "said"), [(8, 0, "does not know this kernel's TCP"), (6, 0, "needs Linux 6.1")]
)
def test_others_are_refused(tmp_path: Path, major: int, minor: int, said: str) -> None:
    done = preprocessed(tmp_path, major, minor)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_port_to_an_unknown_kernel_can_be_begun(tmp_path: Path) -> None:
    assert preprocessed(tmp_path, 8, 0, "-DSOCKMI_UNKNOWN_KERNEL").returncode == 0


def test_what_differs_between_versions_is_in_one_header() -> None:
    """Others ask for their own macros and the kernel's configuration alone."""
    asked: set[str] = set()
    for file in (*COMPAT.parent.glob("*.c"), *COMPAT.parent.glob("*.h")):
        text = file.read_text()
        if file != COMPAT:
            assert "LINUX_VERSION_CODE" not in text, file.name
            asked |= set(re.findall(r"^#(?:if|elif|ifdef|ifndef)\b(.*)", text, re.MULTILINE))
    names = {name for condition in asked for name in re.findall(r"[A-Z][A-Z0-9_]+", condition)}
    own = {name for name in names if name.startswith(("SOCKMI_", "CONFIG_"))}
    assert names - own == {"IS_ENABLED", "TRACE_HEADER_MULTI_READ"}
