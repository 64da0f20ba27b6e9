# SPDX-License-Identifier: MIT
"""The semantic patches of the kernel's source find nothing in the module, and would find something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guests.inside_pytest import UML_KERNELS
from guests.packages import need
from guests.paths import PROJECT

PLANTED = "\nvoid sockmi_planted(void *p)\n{\n\tif (p)\n\t\tkfree(p);\n}\n"

pytestmark = [pytest.mark.kernels("uml-*"), pytest.mark.timeout(900)]


@pytest.fixture
def scripts(kernel: str) -> Path:
    """Of the kernel's source; some semantic patches are in OCaml."""
    need(("coccinelle", "ocaml"))
    return UML_KERNELS[kernel].unpacked() / "scripts"


def coccicheck(scripts: Path, kmod: Path, one: str = "") -> subprocess.CompletedProcess[str]:
    """``make coccicheck``, with all semantic patches or one."""
    words = ["make", "-C", kmod, "coccicheck", f"COCCICHECK={scripts}/coccicheck"]
    words += [f"COCCI={scripts}/coccinelle/{one}"] if one else []
    nice = ["nice", "-n", "19", *words]
    return subprocess.run(nice, capture_output=True, text=True, check=False, timeout=800)


def test_nothing_is_found(scripts: Path) -> None:
    done = coccicheck(scripts, PROJECT / "kmod")
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(list((scripts / "coccinelle").rglob("*.cocci")))
    assert count > 50
    assert f"coccicheck: {count} semantic patches, nothing found\n" in done.stdout


@pytest.mark.parametrize("name", ["list.c", "kunit/list.c", "../daemon/libsockmi/engine/image.c"])
def test_a_planted_mistake_is_found(scripts: Path, tmp_path: Path, name: str) -> None:
    for part in ("kmod", "daemon/libsockmi/engine"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.o", "*.so"))
    one = "free/ifnullfree.cocci"
    assert coccicheck(scripts, tmp_path / "kmod", one).returncode == 0
    with (tmp_path / "kmod" / name).open("a") as file:
        file.write(PLANTED)
    done = coccicheck(scripts, tmp_path / "kmod", one)
    assert done.returncode != 0
    assert f"{Path(name).name}:" in done.stdout and "NULL check before" in done.stdout
