# SPDX-License-Identifier: MIT
"""The role `install`: its variables as documented, its programs on old Pythons, no key in the open."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sockmi.transport.keyring import KeyFileError, Keyring
from tests import collection

pytest.importorskip("ansible")

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles/sockmi"
KEY = "0123456789abcdef" * 4


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROLE / name).read_text())


def _tasks(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for item in items:
        found.append(item)
        for part in ("block", "rescue", "always"):
            found += _tasks(item.get(part, []))
    return found


def test_the_role_is_found_under_its_name() -> None:
    """`install` for users; the tasks are of the role `sockmi`, after which the variables are named."""
    users = PROJECT / "roles/install"
    assert (users / "meta/argument_specs.yml").resolve() == ROLE / "meta/argument_specs.yml"
    assert (users / "meta/main.yml").read_text() == (ROLE / "meta/main.yml").read_text()
    entries = yaml.safe_load((users / "meta/argument_specs.yml").read_text())["argument_specs"]
    for entry in entries:
        [task] = yaml.safe_load((users / f"tasks/{entry}.yml").read_text())
        role = task["ansible.builtin.import_role"]
        assert (role["name"], role.get("tasks_from", "main")) == ("sockmi.appliance.sockmi", entry)


def test_argument_specs_equal_the_defaults() -> None:
    defaults = _yaml("defaults/main.yml")
    specs = _yaml("meta/argument_specs.yml")["argument_specs"]
    options = specs["main"]["options"]
    assert {name for name, option in options.items() if not option.get("required")} == set(defaults)
    for name, value in defaults.items():
        assert options[name]["default"] == value, name
    for name, option in specs["uninstall"]["options"].items():
        assert option["default"] == defaults[name], name


def test_variables_have_the_prefix() -> None:
    own = {
        *_yaml("defaults/main.yml"),
        *_yaml("meta/argument_specs.yml")["argument_specs"]["main"]["options"],
    }
    assert all(name.startswith("sockmi_") for name in own)
    assert all(name.startswith("__sockmi_") for name in _yaml("vars/main.yml"))
    for file in [*ROLE.glob("tasks/*.yml"), *ROLE.glob("handlers/*.yml")]:
        for task in _tasks(yaml.safe_load(file.read_text())):
            names = [task["register"]] if "register" in task else []
            names += list(task.get("vars", {}))
            names += [name for name in task.get("ansible.builtin.set_fact", {}) if name != "cacheable"]
            assert all(name.startswith("__sockmi_") for name in names), (file.name, names)


def test_no_task_takes_the_name_of_a_variable() -> None:
    """What a task registers would hide the variable from those after it."""
    registered = {
        task.get("register")
        for file in ROLE.glob("tasks/*.yml")
        for task in _tasks(yaml.safe_load(file.read_text()))
    }
    assert registered & {*_yaml("vars/main.yml"), *_yaml("defaults/main.yml")} == set()


def test_tasks_that_see_a_key_are_not_logged() -> None:
    seen = 0
    for file in ROLE.glob("tasks/*.yml"):
        for task in _tasks(yaml.safe_load(file.read_text())):
            plain = {name: value for name, value in task.items() if name not in ("block", "rescue", "always")}
            if any(
                word in json.dumps(plain)
                for word in ("item.key | default", "group.key |", "sockmi_group_key |")
            ):
                assert task.get("no_log") is True, (file.name, task["name"])
                seen += 1
    assert seen >= 2
    options = _yaml("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert options["sockmi_group_key"]["no_log"] is True
    assert options["sockmi_groups"]["options"]["key"]["no_log"] is True


# A task of each part, and the tags with which it is run.
TAGGED = {
    "Check that SockMi can run there": {"install", "configure", "kmod"},
    "Build the wheelhouse": {"install", "kmod"},
    "Build and load it": {"install", "kmod"},
    "Unpack it into a Python environment of its own": {"install"},
    "Set the kernel's settings at boot": {"install", "configure"},
    "Write the rules": {"install", "configure"},
    "Write the configuration": {"install", "configure"},
    "Restart the daemon": {"install", "configure"},
    "Restore the kernel's settings": {"uninstall"},
}


def listed(tag: str) -> list[str]:
    """The tasks that a tag chooses, in order."""
    playbook = PROJECT / ("uninstall.yml" if tag == "uninstall" else "install.yml")
    program = Path(sys.executable).with_name("ansible-playbook")
    words = ["-i", "web1,", "-e", "sockmi_hosts=web1", playbook, "--list-tasks", "--tags", tag]
    environment = os.environ | {"ANSIBLE_COLLECTIONS_PATH": str(collection.linked()), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, check=True, cwd=PROJECT, env=environment
    )
    return re.findall(r"sockmi : (.*?)\tTAGS: ", done.stdout)


@pytest.mark.parametrize("tag", ["install", "configure", "kmod", "uninstall"])
def test_a_tag_chooses_parts(tag: str) -> None:
    assert set(listed(tag)) & set(TAGGED) == {name for name, tags in TAGGED.items() if tag in tags}


def test_the_guard_is_there_before_forwarding_and_until_after_it() -> None:
    """Or a run that fails between leaves a host that forwards for all."""
    guard, forwarding = "Load them at boot, and now", "Set the kernel's settings at boot"
    there = [one for one in listed("install") if one in (guard, forwarding, "Set them now")]
    assert there == [guard, forwarding, "Set them now"]
    forwarding = "Do not set them at boot any more"
    there = [
        one
        for one in listed("uninstall")
        if one in ("Restore the kernel's settings", forwarding, "Unload the firewall base")
    ]
    assert there == ["Restore the kernel's settings", forwarding, "Unload the firewall base"]


# A value that each variable must not have, and what is said of it before any host is asked.
WRONG: list[tuple[str, Any, str]] = [
    ("group_key", "", "the key of the group default is not set, or not 64 hexadecimal digits"),
    ("group_key", KEY[:-1], "the key of the group default is not set, or not 64 hexadecimal digits"),
    ("groups", [{"name": "x", "key": KEY, "port": "many"}], "sockmi_groups"),
    ("groups", [{"port": 7780}], "missing required arguments: name found in sockmi_groups"),
    ("groups", [{"name": "x", "prot": 7780}], "sockmi_groups.prot"),
    ("groups", [], "sockmi_groups has the names ''; give at least one group"),
    ("groups", [{"name": "../x"}], "sockmi_groups has the names '../x'"),
    ("groups", [{"name": "x"}, {"name": "x"}], "sockmi_groups has the names 'x', 'x'"),
    ("groups", [{"name": "x", "port": 0}], "ports of sockmi_groups are 7781, 0; give 1 to 65535"),
    ("stream_port", "many", "sockmi_stream_port"),
    ("stream_port", 65536, "sockmi_stream_port and the ports of sockmi_groups are 65536, 7780"),
    ("stream_port", 22, "sockmi_stream_port is 22, the port by which Ansible comes"),
    ("group_key", [KEY], "the key of the group default is no text; put a number in quotes"),
    ("group_key", 10**63, "the key of the group default is no text; put a number in quotes"),
    ("groups", "name=x", "sockmi_groups: give a list or mapping, not text"),
    ("groups", ["name=x"], "sockmi_groups: give a list or mapping, not text"),
    ("groups", [{"name": "x", "members": "192.0.2.1"}], "members of sockmi_groups: give a list"),
    ("firewall_sources", "192.0.2.1", "sockmi_firewall_sources: give a list or mapping, not text"),
    ("sysctls", '{"net.ipv4.ip_forward": 1}', "sockmi_sysctls: give a list or mapping, not text"),
    ("settings", '{"engine": "repair"}', "sockmi_settings: give a list or mapping, not text"),
    ("kernel_module_parameters", "debug=1", "sockmi_kernel_module_parameters: give a list or mapping"),
    ("redirect_modes", "nat", "sockmi_redirect_modes: give a list or mapping, not text"),
    ("redirect_modes", ["nat", "teleport"], "sockmi_redirect_modes must be one or more of"),
    ("settings", "timing", "sockmi_settings"),
    ("kernel_module", "maybe", "sockmi_kernel_module must be one of: auto, required, none"),
    ("kernel_module_parameters", "fast", "sockmi_kernel_module_parameters"),
    ("prefix", "opt/sockmi", "sockmi_prefix is 'opt/sockmi'; give an absolute path without spaces"),
    ("prefix", "~/sockmi", "sockmi_prefix is '~/sockmi'; give an absolute path"),
    ("prefix", "/opt/sock mi", "sockmi_prefix is '/opt/sock mi'; give an absolute path without spaces"),
    ("prefix", "/opt/100%", "sockmi_prefix is '/opt/100%'; give an absolute path without spaces"),
    ("packages", "perhaps", "sockmi_packages"),
    ("apparmor", "perhaps", "sockmi_apparmor must be one of: auto, true, false"),
    ("c_library", "perhaps", "sockmi_c_library"),
    ("sysctls", "net.ipv4.ip_forward", "sockmi_sysctls"),
    ("sysctls", {"net.ipv4.ip_forward": None}, "sockmi_sysctls has net.ipv4.ip_forward without a value"),
    ("sysctls", {"net.ipv4.tcp_rmem": [4096, 1]}, "sockmi_sysctls has net.ipv4.tcp_rmem without a value"),
    ("sysctls", {"kernel.x": "1\nkernel.y=2"}, "sockmi_sysctls has kernel.x without a value"),
    ("firewall", "iptables", "sockmi_firewall must be one of: auto, nftables, firewalld, ufw, none"),
    ("group_key", "0" * 64, "the key of the group default is not random; make one with"),
    ("group_key", f"{KEY}\n{KEY.upper()}", "the key of the group default is there twice; make one"),
    ("groups", [{"name": "a"}, {"name": "b", "key": "x"}], "the key of the group b is not set, or not 64"),
    ("firewall_sources", ["192.0.2.300"], "sockmi_firewall_sources has '192.0.2.300'; give addresses"),
    ("firewall_sources", ["192.0.2.0/33"], "sockmi_firewall_sources has '192.0.2.0/33'; give addresses"),
    ("firewall_sources", ["2001:db8::/129"], "sockmi_firewall_sources has '2001:db8::/129'; give"),
    (
        "firewall_sources",
        ["192.0.2.1", "web2"],
        "sockmi_firewall_sources has '192.0.2.1', 'web2'; give addresses",
    ),
    ("wheelhouse_build", "perhaps", "sockmi_wheelhouse_build"),
    ("verify", "sometimes", "sockmi_verify must be one of: changed, always, never"),
    ("members_min", -1, "sockmi_wait_s is 60 and sockmi_members_min -1; give at least 1 and 0"),
    ("wait_s", 0, "sockmi_wait_s is 0 and sockmi_members_min 0; give at least 1 and 0"),
    ("wait_s", "long", "sockmi_wait_s"),
    ("uninstall_force", "perhaps", "sockmi_uninstall_force"),
    ("group_kye", KEY, "sockmi_group_kye: the role has no such variable"),
]
ANY_TEXT = {"sockmi_host_name", "sockmi_python", "sockmi_wheelhouse"}  # see tests/lab/test_role_variables.py


def test_wrong_values_are_named_before_any_host_is_asked(tmp_path: Path) -> None:
    """And show no key. There are no such hosts."""
    (tmp_path / "install.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  roles: [{role: " + str(PROJECT / "roles/install") + "}]\n"
    )
    hosts = {f"case{number}": {f"sockmi_{name}": value} for number, (name, value, _said) in enumerate(WRONG)}
    inventory = {"all": {"hosts": hosts, "vars": {"sockmi_group_key": KEY, "ansible_host": "192.0.2.1"}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            *("-i", tmp_path / "hosts.yml", "--forks", "4", "-vvv", tmp_path / "install.yml"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
        env=os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
    )
    assert done.returncode == 2, done.stderr
    assert KEY not in done.stdout + done.stderr
    failures: dict[str, str] = {}
    for host, rest in re.findall(r"^(?:fatal|failed): \[(case\d+)\](.*?\n\})", done.stdout, re.M | re.S):
        failures[host] = failures.get(host, "") + rest.replace('\\"', '"')
    for number, (name, value, said) in enumerate(WRONG):
        assert said in failures[f"case{number}"], (name, value)
    assert "UNREACHABLE" not in done.stdout
    options = set(_yaml("meta/argument_specs.yml")["argument_specs"]["main"]["options"])
    assert options - {f"sockmi_{name}" for name, _value, _said in WRONG} == ANY_TEXT


def filtered(name: str) -> Callable[[str], str | None]:
    """A filter of the collection."""
    found: dict[str, Callable[[str], str | None]] = runpy.run_path(str(PROJECT / f"plugins/filter/{name}.py"))
    return found[name]


OTHER = base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    "keys",
    [
        *(KEY, KEY.upper(), OTHER, f"{KEY}\n\n# a comment\n {OTHER} # one more", "00" * 32),
        *("deadbeef" * 8, f"{KEY}\n{KEY.upper()}", f"{OTHER}\n{OTHER}", "", "# none", KEY[:-2]),
        *(KEY[:-1] + "g", OTHER[:-1], f"{KEY} {OTHER}"),
        *("\n".join(f"{KEY[:-2]}{number:02x}" for number in range(count)) for count in (8, 9)),
    ],
)
def test_keys_are_refused_that_the_daemon_would_refuse(keys: str, tmp_path: Path) -> None:
    """Before they are on a host, where it would not start with them."""
    file = tmp_path / "group.key"
    file.touch(0o600)
    file.write_text(keys + "\n")
    fault = filtered("key_fault")(keys)
    if fault == "":
        Keyring.load(file)
    else:
        assert fault and keys not in fault.split()
        with pytest.raises(KeyFileError):
            Keyring.load(file)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("192.0.2.11/32", "192.0.2.11"),
        ("10.0.0.5/24", "10.0.0.0/24"),
        ("2001:DB8::1", "2001:db8::1"),
        ("2001:db8:0:0::5/64", "2001:db8::/64"),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.1"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        *(
            (wrong, None)
            for wrong in ("010.0.0.5", "192.0.2.300", "10.0.0.0/33", "fe80::1%lan", "::/129", "web2", "")
        ),
    ],
)
def test_sources_are_as_firewalls_write_them(given: str, written: str | None) -> None:
    assert filtered("network")(given) == written


@pytest.mark.parametrize("name", ["probe.py", "links.py", "install_release.py"])
def test_programs_for_the_host_know_old_pythons(name: str) -> None:
    ast.parse((ROLE / "files" / name).read_text(), feature_version=(3, 8))


def test_links_are_made_changed_and_removed(tmp_path: Path) -> None:
    program = (ROLE / "files/links.py").read_text()
    (tmp_path / "old").symlink_to("/ours/current/old")
    (tmp_path / "changed").symlink_to("/former/current/bin/changed")
    (tmp_path / "theirs").symlink_to("/oursalike/theirs")
    (tmp_path / "file").write_text("somebody's")
    new, old, changed, theirs, file = (
        str(tmp_path / name) for name in ("deep/new", "old", "changed", "theirs", "file")
    )
    wanted = {new: "/ours/current/new", old: None, changed: "/ours/current/changed", theirs: None, file: None}

    def run(*flags: str) -> list[str]:
        record = str(tmp_path / "etc/made")
        question = json.dumps({"links": wanted, "own": ["/ours", "/former/"], "made": record})
        command = [sys.executable, "-I", "-c", program, question, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said: list[str] = json.loads(done.stdout)
        return said

    assert run("--check") == [new, old, changed]
    assert (tmp_path / "old").is_symlink()
    assert run() == [new, old, changed]
    assert run() == []
    assert str((tmp_path / "deep/new").readlink()) == "/ours/current/new"
    assert str((tmp_path / "changed").readlink()) == "/ours/current/changed"
    assert not (tmp_path / "old").is_symlink()
    # What is not ours stays, and nothing changes where one is wanted.
    assert str((tmp_path / "theirs").readlink()) == "/oursalike/theirs"
    for foreign in (theirs, file):
        wanted |= {new: "/ours/current/other", foreign: "/ours/current/theirs"}
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run()
        assert f"{foreign} is there, and no link of ours" in failed.value.stderr
        wanted[foreign] = None
    assert str((tmp_path / "deep/new").readlink()) == "/ours/current/new"
    assert str((tmp_path / "theirs").readlink()) == "/oursalike/theirs"
    assert (tmp_path / "file").read_text() == "somebody's"
    # Folders that were made for links go with the last of them, but with nobody else's file in them.
    (tmp_path / "kept").mkdir()
    more = [str(tmp_path / name) for name in ("kept/new", "deep/down/new", "other/new")]
    wanted |= dict.fromkeys(more, "/ours/current/new")
    run()
    (tmp_path / "other/theirs").touch()
    wanted |= dict.fromkeys([new, *more])
    run()
    assert not (tmp_path / "deep").exists()
    assert [list((tmp_path / name).iterdir()) for name in ("kept", "other")] == [
        [],
        [tmp_path / "other/theirs"],
    ]


QUESTION = {"pythons": {}, "sysctls": {}, "prefix": "/nowhere", "units": []}


@pytest.mark.parametrize(
    ("name", "damaged", "said"),
    [
        (
            "links.py",
            lambda folder: [
                json.dumps({"links": {"/proc/none/link": "/x"}, "own": [], "made": str(folder / "made")})
            ],
            "/proc/none: No such file",
        ),
        (
            "install_release.py",
            lambda folder: [folder / "none.tar", folder / "new"],
            "none.tar: No such file",
        ),
        ("install_release.py", lambda folder: [damage(folder), folder / "new"], "bundle.tar is damaged"),
        ("install_release.py", lambda folder: [damage(folder), "/proc/none"], "/proc/none: No such file"),
        (
            "probe.py",
            lambda folder: [json.dumps({**QUESTION, "before": str(damage(folder))})],
            "bundle.tar is damaged",
        ),
    ],
)
def test_programs_for_the_host_fail_with_a_sentence(
    name: str, damaged: Callable[[Path], list[str | Path]], said: str, tmp_path: Path
) -> None:
    program = (ROLE / "files" / name).read_text()
    command = [sys.executable, "-I", "-c", program, *damaged(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def damage(folder: Path) -> Path:
    """A file that is nothing."""
    (folder / "bundle.tar").write_bytes(b"\0damaged" * 100)
    return folder / "bundle.tar"


class Bundle:
    """A bundle with one wheel, and what is made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheel = folder / "content/wheels/tiny-1.0-py3-none-any.whl"
        self.wheel.parent.mkdir(parents=True)
        with zipfile.ZipFile(self.wheel, "w") as wheel:
            wheel.writestr("tiny.py", "def main():\n    print('tiny runs')\n")
            wheel.writestr("tiny-1.0.data/scripts/script", "#!python\nimport tiny\ntiny.main()\n")
            wheel.writestr("tiny-1.0.dist-info/entry_points.txt", "[console_scripts]\ntiny = tiny:main\n")
            wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
        self.require(hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        (folder / "content/release").write_text("1.0-abc\n")
        self.release = folder / "releases/1.0-abc"

    def require(self, checksum: str) -> None:
        (self.folder / "content/requirements.txt").write_text(f"tiny==1.0 --hash=sha256:{checksum}\n")

    def install(self) -> subprocess.CompletedProcess[str]:
        bundle = self.folder / "bundle.tar"
        with tarfile.open(bundle, "w") as archive:
            archive.add(self.folder / "content", ".")
        program = (ROLE / "files/install_release.py").read_text()
        return subprocess.run(
            [sys.executable, "-I", "-c", program, bundle, self.release],
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_bundle_becomes_an_environment(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    done = bundle.install()
    assert done.returncode == 0, done.stderr
    for command in ("tiny", "script"):
        said = subprocess.run([bundle.release / "bin" / command], capture_output=True, text=True, check=True)
        assert said.stdout == "tiny runs\n"
    assert (bundle.release / "complete").exists()
    assert not (bundle.release / "wheels").exists()
    assert not (tmp_path / "bundle.tar").exists()


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.require("0" * 64)
    done = bundle.install()
    assert done.returncode == 1
    assert "is not the wheel that requirements.txt names" in done.stderr
    assert not (bundle.release / "complete").exists()


@pytest.mark.parametrize("name", ["install", "uninstall", "drain"])
def test_playbooks_are_there_twice(name: str) -> None:
    [play] = yaml.safe_load((PROJECT / f"{name}.yml").read_text())
    assert play["ansible.builtin.import_playbook"] == f"playbooks/{name}.yml"


def test_the_example_inventory_says_how_to_make_a_key() -> None:
    folder = PROJECT / "inventories/example"
    assert (folder / "group_vars/sockmi/vault.yml").read_text().startswith("$ANSIBLE_VAULT;")
    hosts = yaml.safe_load((folder / "hosts.yml").read_text())
    assert len(hosts["all"]["children"]["sockmi"]["children"]["web"]["hosts"]) == 3
    command = [str(Path(sys.executable).with_name("ansible-inventory")), "-i", str(folder), "--list"]
    command += ["--vault-password-file", "/dev/stdin"]
    listed = subprocess.run(
        command, input="example", capture_output=True, text=True, check=False, timeout=100
    )
    assert listed.returncode == 0, listed.stderr
    variables = json.loads(listed.stdout)["_meta"]["hostvars"]["web1"]
    assert len(variables["vault_sockmi_group_key"]) == 64
    assert "ansible-vault encrypt" in (folder / "README.md").read_text()
