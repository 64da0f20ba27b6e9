# SPDX-License-Identifier: MIT
"""The collection as Ansible finds it: linked from the checkout, or installed from its tarball."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
LINKED = PROJECT / ".build/collections"

# Programs of the newest ansible-core that the collection knows, and of the oldest (the fixture `core`).
NEWEST = Path(sys.executable).parent
OLDEST = PROJECT / ".build/oldest-core/bin"
programs = NEWEST


def program(name: str) -> Path:
    """One of Ansible's programs, with the ansible-core whose turn it is."""
    return programs / name


def oldest_core() -> str:
    """The oldest ansible-core that is allowed: what others say of it follows from meta/runtime.yml."""
    asked: str = yaml.safe_load((PROJECT / "meta/runtime.yml").read_text())["requires_ansible"]
    return asked.removeprefix(">=").removesuffix(".0")


def root(installed: Path | None) -> Path:
    """The collection's own folder, in a folder of installed collections; None: the checkout."""
    return installed / "ansible_collections/sockmi/appliance" if installed else PROJECT


def linked() -> Path:
    """The folder of collections that has the checkout as sockmi.appliance."""
    link = root(LINKED)
    if not link.is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../../../..")
    return LINKED


def sources() -> list[str]:
    """The files that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (PROJECT / name).exists()]


def install(folder: Path, beside: Iterable[str] = ()) -> Path:
    """Build a tarball of the sources, and install it; the folder of collections.

    ``beside``: files that lie around in the checkout when it is built.
    """
    source = folder / "source"
    source.mkdir()
    archive = folder / "source.tar"
    with tarfile.open(archive, "w") as made:
        for name in sources():
            made.add(PROJECT / name, name, recursive=False)
    with tarfile.open(archive) as made:
        made.extractall(source)  # noqa: S202 - made above
    for name in beside:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("not for others")
    there = folder / "there"
    there.mkdir()
    (there / "ansible.cfg").touch()
    done = run(there, "ansible-galaxy", "collection", "build", source, "--output-path", folder)
    assert done.returncode == 0, done.stderr
    [tarball] = folder.glob("sockmi-appliance-*.tar.gz")
    words = ["collection", "install", tarball, "--collections-path", there, "--offline"]
    done = run(there, "ansible-galaxy", *words)
    assert done.returncode == 0, done.stderr
    return there


def run(
    installed: Path | None, name: str, *words: str | Path, timeout_s: float = 110
) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs on the installed collection, far from the checkout; None: on that."""
    folder = installed or linked()
    settings = {
        "ANSIBLE_COLLECTIONS_PATH": str(folder),
        "ANSIBLE_CONFIG": str((installed or PROJECT) / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
    }
    return subprocess.run(
        [program(name), *words],
        cwd=installed or PROJECT,
        env=os.environ | settings,
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
