"""The collection as others get it: built into a tarball, installed from there, its parts found by name."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("ansible")

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of collections with what the tarball installs, from files that git knows."""
    folder = tmp_path_factory.mktemp("collection")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    archive = folder / "source.tar"
    with tarfile.open(archive, "w") as made:
        for name in listed.stdout.decode().split("\0"):
            if name and (PROJECT / name).exists():
                made.add(PROJECT / name, name, recursive=False)
    with tarfile.open(archive) as made:
        made.extractall(source)  # noqa: S202 - made above
    (folder / "there").mkdir()
    (folder / "there/ansible.cfg").touch()
    done = run(folder / "there", "ansible-galaxy", "collection", "build", source, "--output-path", folder)
    assert done.returncode == 0, done.stderr
    [tarball] = folder.glob("sockmi-appliance-*.tar.gz")
    words = ["collection", "install", tarball, "--collections-path", folder / "there", "--offline"]
    done = run(folder / "there", "ansible-galaxy", *words)
    assert done.returncode == 0, done.stderr
    return folder / "there"


def run(installed: Path, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs with the installed collection alone, far from the checkout."""
    return subprocess.run(
        [Path(sys.executable).with_name(program), *words],
        cwd=installed,
        env=os.environ
        | {"ANSIBLE_COLLECTIONS_PATH": str(installed), "ANSIBLE_CONFIG": str(installed / "ansible.cfg")},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )


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


def test_the_role_is_documented_under_its_name(installed: Path) -> None:
    done = run(installed, "ansible-doc", "-t", "role", "sockmi.appliance.install")
    assert done.returncode == 0, done.stderr
    assert "sockmi_group_key" in done.stdout


def test_what_the_role_carries_is_in_it(installed: Path) -> None:
    root = installed / "ansible_collections/sockmi/appliance"
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
