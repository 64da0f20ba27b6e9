# SPDX-License-Identifier: MIT
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
from tests.lab.ansible_lab import Controller, daemons
from tests.lab.scenario import Service, service, wait_for_members

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


@pytest.fixture(scope="module")
def controller(lab: Lab) -> Iterator[Controller]:
    """Ansible, and a lab with daemons on a, b and c that know each other; none on d."""
    assert daemons(lab, "up")["changed"] is True
    wait_for_members(lab, "abc")
    yield Controller(lab)
    daemons(lab, "down")


@pytest.fixture
def lines(controller: Controller, tmp_path: Path) -> Iterator[Service]:
    """The line-by-line service on a, with its importers on b and c, under a capture that must be clean."""
    with service(controller.lab, "lines", "abc", tmp_path) as running:
        yield running
