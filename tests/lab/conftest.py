"""Labs for tests. Each has a name of its own, and is removed whatever happens."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import Lab

PROJECT = Path(__file__).resolve().parents[2]

_serial = itertools.count()


@pytest.fixture
def lab_name() -> Callable[[], str]:
    """Makes a name that no other lab of this machine has."""
    return lambda: f"t{os.getpid()}-{next(_serial)}"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab for the tests of one module."""
    with Lab(f"t{os.getpid()}-{next(_serial)}") as made:
        yield made


@pytest.fixture(scope="session")
def enterable() -> Callable[[Path], None]:
    """Lets users that are not root into a folder of pytest's, however deep it lies."""

    def let_in(folder: Path) -> None:
        for part in (folder, *folder.parents):
            if part == Path(tempfile.gettempdir()):
                return
            part.chmod(0o755)

    return let_in


@pytest.fixture(scope="session")
def ansible() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of ansible-core on the checkout: ``ansible("ansible-playbook", ...)``."""
    link = PROJECT / ".build/collections/ansible_collections/sockmi/appliance"
    if not link.is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../../../..")
    environment = os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}

    def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
        return subprocess.run(
            command, cwd=PROJECT, env=environment, text=True, capture_output=True, timeout=100, check=False
        )

    return run
