# SPDX-License-Identifier: MIT
"""The collection as others get it: built into a tarball, installed from there, its parts found by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import collection

pytest.importorskip("ansible")


# What a checkout may have that is nobody else's.
BESIDE = [
    *(f"inventories/{name}/hosts.yml" for name in ("mine", "production", "ex", "example2", "la")),
    *("inventories/lab-of-mine/hosts.yml", "inventories/hosts.ini", "inventories/example/host_vars/web1.yml"),
    *("inventories/example/group_vars/all/vault.yml", "inventories/example/.vault_pass"),
    *("playbooks/group_vars/all.yml", "host_vars/web1/vault.yml", "group_vars/sockmi.yml"),
    *(".vault_pass", ".vault-password", "vault_pass.txt", "vault-password", "password.txt", ".env", ".netrc"),
    *("group.key", "server.pem", "id_ed25519", "keys/id_rsa", ".ssh/id_rsa", ".idea/workspace.xml"),
    *("report.json", "reports/drain.json", "drain.html", "ansible.log", "install.retry", "trace.pcap"),
    *("wheelhouse/manifest.json", "wheelhouse/sockmi-0.1.0-cp311-x86_64.tar", "daemon/build/lib/x.py"),
]


# What the tarball has at its top: galaxy.yml names what is left out, so what is new would get in unseen.
TOP = {
    *("CHANGELOG.md", "CHANGELOG.rst", "FILES.json", "LICENSE", "LICENSES", "MANIFEST.json", "Makefile"),
    *("README.md", "REUSE.toml", "ansible.cfg", "bench", "changelogs", "completions", "daemon", "docs"),
    *("drain.yml", "guests", "install.yml", "inventories", "kmod", "lab", "meta", "migrate.yml", "molecule"),
    *("playbooks", "plugins", "pyproject.toml", "requirements.txt", "roles", "scripts", "tests"),
    "uninstall.yml",
}
TEXT_MAX_BYTES = 256 << 10  # FILES.json is the largest


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of collections with what the tarball installs."""
    return collection.install(tmp_path_factory.mktemp("collection"), BESIDE)


def run(installed: Path, program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's programs with the installed collection alone, far from the checkout."""
    return collection.run(installed, program, *words)


@pytest.mark.usefixtures("core")
def test_playbooks_run_from_the_installed_collection(installed: Path) -> None:
    playbooks = {path.stem for path in (collection.root(installed) / "playbooks").glob("*.yml")}
    assert playbooks == {"migrate", "drain", "install", "uninstall", "lab"}
    names = [f"sockmi.appliance.{name}" for name in playbooks]
    done = run(installed, "ansible-playbook", *names, "--syntax-check", "-i", "localhost,")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("playbook: ") == len(playbooks)


def test_it_has_the_sources_and_nothing_that_lies_beside_them(installed: Path) -> None:
    root = collection.root(installed)
    found = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    wanted = {name for name in collection.sources() if not re.search(r"(^|/)\.", name)}
    assert found - wanted == {"FILES.json", "MANIFEST.json"}
    assert wanted - found == {"galaxy.yml"}


def test_only_what_belongs_there_is_in_it(installed: Path) -> None:
    """At its top, and nowhere anything but text: what is built, recorded or packed is not."""
    root = collection.root(installed)
    files = [path for path in root.rglob("*") if not path.is_dir()]
    assert {path.relative_to(root).parts[0] for path in files} == TOP
    for path in files:
        if path.is_symlink():
            assert root in path.resolve().parents, path
        else:
            content = path.read_bytes()
            assert len(content) < TEXT_MAX_BYTES, path
            assert b"\0" not in content, path
            content.decode()


def test_the_oldest_core_is_told_alike() -> None:
    """And is the one that tests run with. Its oldest Python is 3.11, which the wheelhouse needs (tomllib)."""
    core = re.escape(collection.oldest_core())
    told = {
        "README.md": rf"core {core} or later",
        "requirements.txt": rf"ansible-core>={core},",
        "meta/runtime.yml": rf'requires_ansible: ">={core}.0"',
        "roles/install/meta/main.yml": rf'min_ansible_version: "{core}"',
        "roles/sockmi/meta/main.yml": rf'min_ansible_version: "{core}"',
    }
    for name, pattern in told.items():
        assert re.search(pattern, (collection.PROJECT / name).read_text()), name
    [found] = collection.OLDEST.parent.glob("lib/python3.*/site-packages/ansible_core-*.dist-info")
    assert re.match(rf"ansible_core-{core}\.\d+\.dist-info", found.name), "run `scripts/setup tests`"


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
    assert f"web1: {wrong}: the role has no such variable. It has sockmi_apparmor," in said
    assert "Nothing was changed" in said


@pytest.mark.parametrize("name", ["migrate", "drain", "install", "uninstall"])
def test_so_many_hosts_at_a_time(installed: Path, name: str) -> None:
    """A sentence, where Ansible itself has a traceback; and 0 is none, not all."""
    given = (
        {"sockmi_hosts": "all"} if name.endswith("install") else {"sockmi_from": "all", "sockmi_to": "web4"}
    )
    words = [f"sockmi.appliance.{name}", "-i", "web1,web2,"]
    for wrong in ("many", "1,2", "%", -1, 0, "0", "0%", [1, "1x"]):
        extra = json.dumps({**given, "sockmi_serial": wrong})
        done = run(installed, "ansible-playbook", *words, "-e", extra)
        said = " ".join((done.stdout + done.stderr).split())
        assert f"sockmi_serial is '{wrong}'; give a number of hosts" in said
        assert (done.returncode != 0, "Traceback" in said) == (True, False), said


@pytest.mark.parametrize("name", ["install", "uninstall"])
@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ("sockmi", []),
        ("wbe1", ["-i", "web1,", "-e", "sockmi_hosts=wbe1"]),
        ("web1", ["-i", "web1,web2,", "-e", "sockmi_hosts=web1", "--limit", "web2"]),
    ],
)
def test_a_run_on_nobody_fails(installed: Path, name: str, hosts: str, words: list[str]) -> None:
    """As one in which nothing failed it would pass for done."""
    done = run(installed, "ansible-playbook", f"sockmi.appliance.{name}", *words)
    said = f"sockmi_hosts is '{hosts}', and that is no host of this run;"
    assert (done.returncode, said in " ".join(done.stdout.split())) == (2, True), done.stdout


@pytest.mark.parametrize("name", ["install", "uninstall"])
def test_a_host_of_a_lab_is_refused(installed: Path, name: str) -> None:
    """Its files are the controller's; ansible.cfg of a checkout names the lab's inventory."""
    words = ["-i", collection.root(installed) / "inventories/lab", "-e", "sockmi_group_key=" + "f00d" * 16]
    done = run(installed, "ansible-playbook", f"sockmi.appliance.{name}", *words)
    said = " ".join(done.stdout.split())
    assert (done.returncode, said.count("is a network namespace of the controller, and")) == (2, 8), said


@pytest.mark.usefixtures("core")
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


def test_the_wheelhouse_is_where_the_caller_may_write(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the installed collection, whose folder may be the system's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    program = collection.root(installed) / "scripts/wheelhouse"
    words = [sys.executable, program, "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["folder"] == f"{tmp_path}/.cache/sockmi/wheelhouse"
    play = tmp_path / "play.yml"
    role = {"name": "sockmi.appliance.sockmi", "tasks_from": "wheelhouse"}
    task = {"ansible.builtin.include_role": role}
    play.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}]))
    python = ["-e", f"ansible_python_interpreter={sys.executable}"]
    done = run(
        installed, "ansible-playbook", "-i", "localhost,", "-c", "local", play, "--check", "-v", *python
    )
    assert done.returncode == 0, done.stdout
    assert f"{tmp_path}/.cache/sockmi/wheelhouse" in done.stdout
