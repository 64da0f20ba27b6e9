# SPDX-License-Identifier: MIT
"""The collection as others get it: built into a tarball, installed from there, its parts found by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import collection

pytest.importorskip("ansible")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of collections with what the tarball installs."""
    return collection.install(tmp_path_factory.mktemp("collection"))


def run(installed: Path, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs with the installed collection alone, far from the checkout."""
    return collection.run(installed, program, *words)


@pytest.mark.parametrize("name", ["migrate", "drain", "install", "uninstall"])
def test_playbooks_run_from_the_installed_collection(installed: Path, name: str) -> None:
    done = run(
        installed, "ansible-playbook", f"sockmi.appliance.{name}", "--syntax-check", "-i", "localhost,"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_playbook_of_it_does_its_work(installed: Path) -> None:
    done = run(installed, "ansible-playbook", "sockmi.appliance.migrate", "-i", "web1,")
    assert done.returncode != 0
    assert "sockmi_from is ''" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["migrate", "drain"])
def test_a_playbook_of_it_knows_the_variables_of_the_role(installed: Path, name: str) -> None:
    words = [
        f"sockmi.appliance.{name}",
        "-i",
        "web1,",
        "-e",
        "sockmi_from=web1",
        "-e",
        "sockmi_members_min=2",
    ]
    done = run(installed, "ansible-playbook", *words, "-e", "sockmi_port=443")
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert f"sockmi_port: the playbook {name} has no such variable" in said


def test_the_role_says_that_it_has_no_key(installed: Path) -> None:
    words = ["sockmi.appliance.install", "-i", "web1,", "-e", "sockmi_hosts=web1"]
    done = run(installed, "ansible-playbook", *words)
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "the key of the group default is not set" in said
    assert "make one with `openssl rand -hex 32`, keep it in a vault, and set sockmi_group_key" in said


@pytest.mark.parametrize(
    ("name", "wrong", "ok"),
    [
        ("install", "sockmi_prefx", "sockmi_lab_name"),
        ("install", "sockmi_host", "sockmi_stream_port"),
        ("uninstall", "sockmi_uninstal_force", "sockmi_members_min"),
        ("uninstall", "sockmi_from", "sockmi_serial"),
    ],
)
def test_a_variable_that_the_role_has_not_is_refused(installed: Path, name: str, wrong: str, ok: str) -> None:
    """Before any host is asked, of which there is none."""
    words = [f"sockmi.appliance.{name}", "-i", "web1,", "-e", "sockmi_hosts=web1"]
    done = run(installed, "ansible-playbook", *words, "-e", f"{wrong}=1", "-e", f"{ok}=1")
    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert f"web1: {wrong}: the role has no such variable. It has sockmi_c_library," in said
    assert "Nothing was changed" in said


def test_the_role_is_documented_under_its_name(installed: Path) -> None:
    done = run(installed, "ansible-doc", "-t", "role", "sockmi.appliance.install")
    assert done.returncode == 0, done.stderr
    assert "sockmi_group_key" in done.stdout


def test_what_the_role_carries_is_in_it(installed: Path) -> None:
    root = collection.root(installed)
    assert (root / "roles/install/tasks/main.yml").exists()
    for name in ("scripts/wheelhouse", "kmod/dkms.conf", "daemon/pyproject.toml", "docs/man/sockmi.1"):
        assert (root / name).exists(), name
    done = subprocess.run(
        [sys.executable, root / "scripts/wheelhouse", installed / "house", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"changed": true' in done.stdout
