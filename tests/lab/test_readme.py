# SPDX-License-Identifier: MIT
"""The README's commands, as they stand: run in a lab, or looked at where they need more than this machine.

Put in place of what is an example in them: the lab's name, a process and a descriptor, a password.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lab.host import PROJECT
from lab.labs import Lab
from sockmi.cli.arguments import build_parser
from tests.lab.ansible_lab import Controller
from tests.lab.role_host import RoleHost
from tests.lab.scenario import daemons, until
from tests.lab.terminal import Scene, ended, run

pytest.importorskip("ansible")
pytestmark = pytest.mark.timeout(400)

README = (PROJECT / "README.md").read_text()
# What is not run, and why; nothing else may be left out.
LEFT_OUT = {
    "make": "the whole of this repository's tests and its demo; tests/lab/test_demo.py runs that",
    "sysctl": "the kernel module's; tests/kmod/inside/test_sysctl_daemons.py asks for exports that way",
    "export": "of the shell",
    "python3": "installs into /opt, from a package index; the tests' own environment stands there",
    "/opt/sockmi/bin/pip": "likewise",
}


def blocks(language: str = "") -> list[str]:
    """The fenced blocks of a language; "": of commands."""
    parts = README.split("```")[1::2]
    return [part.partition("\n")[2] for part in parts if part.partition("\n")[0] == language]


def commands() -> list[list[str]]:
    """Each command's words, without its comment."""
    drawing = "peer   "
    lines = [line for block in blocks() if drawing not in block for line in block.splitlines()]
    parts = [part for line in lines for part in line.partition("#")[0].split("&&")]
    return [words for part in parts if (words := shlex.split(part))]


def inline(program: str) -> list[str]:
    """The commands of a program within the text."""
    return re.findall(rf"`({program} [^`]+)`", "".join(README.split("```")[::2]))


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    """Daemons on a and b, and a server on a with clients."""
    with daemons(lab, "ab"):
        one = Scene(lab)
        try:
            yield one
        finally:
            one.close()


def test_every_command_is_tried_here_or_left_out_for_a_reason() -> None:
    by_hand = {"cp", "mkdir", "sockmid", "systemctl"}
    known = {"ansible", "ansible-playbook", "python", "sockmi", *by_hand, *LEFT_OUT}
    assert len(commands()) > 20
    assert {words[0] for words in commands()} == known
    options = {
        name
        for action in build_parser()._subparsers._group_actions
        for name in action.choices or {}  # type: ignore[union-attr]
    }
    assert {words[1] for words in commands() if words[0] == "sockmi"} <= options
    for words in commands():
        if words[0] == "make":
            assert (
                subprocess.run(
                    ["make", "-n", *words[1:]], cwd=PROJECT, check=False, capture_output=True
                ).returncode
                == 0
            )


def test_moves_by_hand(scene: Scene, lab: Lab, tmp_path: Path) -> None:
    """`list`, `export`, `drain`, `import --exec`: two connections leave a; their clients notice nothing."""
    a = lab.host("a")
    [listing, export, drain] = [words[1:] for words in commands() if words[:1] == ["sockmi"]][:3]
    [imports] = [words[1:] for words in commands() if words[:2] == ["sockmi", "import"]]
    scene.server("a", 5100, name="nginx")
    clients = [scene.client("a", 5100) for _turn in range(2)]
    handler = tmp_path / "handle-connection"
    handler.write_text("#!/bin/sh\nexec cat\n")
    handler.chmod(handler.stat().st_mode | stat.S_IXUSR)
    words = [str(handler) if word == f"./{handler.name}" else word for word in imports]
    importers = [scene.program("b", *words) for _client in clients]
    scene.waiting("b", len(clients))
    assert clients[0].local in run(*listing, host=a).out
    pid, fd = scene.descriptor_of(clients[0])
    named = {"510": str(pid), "5": str(fd)}
    assert run(*[named.get(word, word) for word in export], host=a).status == 0
    assert run(*drain, host=a).status == 0
    assert [one.say("there") for one in clients] == ["there"] * 2
    assert not scene.rows("a", "--kind", "connected")
    for client in clients:
        client.connection.close()
    assert [ended(importer).status for importer in importers] == [0, 0]


def test_in_a_lab_by_ansible(lab_name: Callable[[], str]) -> None:
    """Made, a connection moved in it, and removed again, with what runs there."""
    made = Lab(lab_name(), persistent=True)
    controller = Controller(made)
    plays = {"ansible-playbook": controller.command, "python": partial(in_lab, made)}
    steps = [words for words in commands() if words[0] in plays and "inventories/mine" not in words]
    assert len(steps) == 6
    try:
        said = []
        for words in steps:
            done = plays[words[0]](*words)
            assert done.returncode == 0, done.stdout + done.stderr
            said.append(done.stdout)
        assert "1 selected, 1 moved" in said[3]
        assert f"{made.host('peer').address4}:" in said[4]
        assert made.missing()
    finally:
        made.down()


def in_lab(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m lab exec HOST -- COMMAND``; behind ``&`` it goes on, listening or connected."""
    python, module, name, verb, host, *rest = words
    assert (python, module, name, verb, rest[0]) == ("python", "-m", "lab", "exec", "--")
    command = [sys.executable, module, name, verb, "--lab", lab.name, host, *rest]
    environment = os.environ | {"PATH": f"{PROJECT}/.venv/bin:{os.environ['PATH']}"}
    if rest[-1] != "&":
        return subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
    subprocess.Popen(
        command[:-1], cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL
    )  # ends with its lab
    state = "listening" if host == "a" else "established"
    until(lambda: ":5100" in str(lab.host("a").run(["ss", "-tnH", "state", state]).stdout))
    return subprocess.CompletedProcess(command, 0, "", "")


def test_on_hosts_of_your_own(tmp_path: Path) -> None:
    """The example's key is encrypted: each command asks for the password, and then knows hosts and key."""
    shutil.copytree(PROJECT / "inventories/example", tmp_path / "mine")
    (tmp_path / "password").write_text("example\n")
    ours = [words for words in commands() if "inventories/mine" in words and words[0] != "cp"]
    assert len(ours) >= 4
    for words in ours:
        assert "--ask-vault-pass" in words, words
        given = {"inventories/mine": str(tmp_path / "mine")}
        rest = [given.get(word, word) for word in words[1:] if word != "--ask-vault-pass"]
        rest += ["--vault-password-file", str(tmp_path / "password"), "--list-hosts"]
        done = subprocess.run(
            [PROJECT / ".venv/bin" / words[0], *rest],
            cwd=PROJECT, capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert (done.returncode, "web1" in done.stdout or "sockmi_from" in str(words)) == (0, True), (
            done.stderr
        )


def test_as_a_collection(tmp_path: Path) -> None:
    """Built here, installed elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {
        "PATH": f"{PROJECT}/.venv/bin:{os.environ['PATH']}",
        "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"),
    }
    told = "/tmp"  # noqa: S108 - as it says
    steps = [step.replace(told, str(tmp_path)) for step in inline("ansible-galaxy")]
    assert len(steps) == 2
    for step, folder in zip(steps, (PROJECT, tmp_path / "elsewhere"), strict=True):
        done = subprocess.run(
            ["sh", "-c", step], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "collections/ansible_collections/sockmi/appliance/playbooks/install.yml").exists()


def test_by_hand_on_a_host(tmp_path: Path) -> None:
    """From the first step to the last, on a host with an eth0. systemd's part is done as its unit says."""
    [block] = [one for one in blocks() if "/opt/sockmi" in one]
    steps = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert "/opt/sockmi/bin/pip install ./daemon" in steps[0] and steps[-1] == "sockmi doctor"
    path = "export PATH=/opt/sockmi/bin:$PATH SYSTEMD_OFFLINE=1"
    with RoleHost(tmp_path) as host:
        host.sh(
            f"ln -s {PROJECT}/.venv /opt/sockmi; ip link add eth0 type veth peer segment;"
            "ip link set eth0 up; ip link set segment up; ip address add 192.0.2.11/24 dev eth0"
        )
        for step in steps[1:-1]:
            host.sh(f"cd {PROJECT}; {path}; {step.replace(' --now', '')}")
        assert host.sh("stat -c '%a %U' /etc/sockmi/group.key") == "600 root\n"
        assert host.sh("ls /etc/systemd/system/multi-user.target.wants").split().count("sockmid.service") == 1
        unit = host.sh("cat /etc/systemd/system/sockmid.service")
        [start] = re.findall(r"^ExecStart=(.*)", unit, re.MULTILINE)
        folders = dict(re.findall(r"^(\w+)Directory=(\w+)", unit, re.MULTILINE))
        host.sh(f"mkdir -p /run/{folders['Runtime']}; mkdir -p -m 700 /var/lib/{folders['State']}")
        host.sh(f"{start} >/var/log/sockmid 2>&1 &")
        until(lambda: "is ready" in host.sh("cat /var/log/sockmid"), 60)
        found = json.loads(host.run("/opt/sockmi/bin/sockmi", "doctor", "--json").stdout)["checks"]
        errors = {one["name"]: one["message"] for one in found if one["status"] == "error"}
        assert errors == {"group": "No other daemon has been heard."}  # as there is none


def test_python_and_c_can_be_compiled(tmp_path: Path) -> None:
    [python] = blocks("python")
    compile(python, "README.md", "exec")
    [code] = blocks("c")
    source = tmp_path / "example.c"
    head = "#include <err.h>\n#include <netinet/in.h>\n#include <sockmi.h>\nint main(void)\n{\n"
    source.write_text(f"{head}{code}return 0;\n}}\n")
    [install] = [" ".join(words) for words in commands() if words[:2] == ["make", "-C"]]
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as host:
        host.sh(f"cd {PROJECT}; {install}")
        host.sh(f"cd {tmp_path}; cc -Wall -Werror example.c $(pkg-config --cflags --libs sockmi)")
        done = host.run(tmp_path / "a.out")
    # It finds its library, which finds no daemon.
    assert (done.returncode, done.stderr) == (1, "a.out: import: No such file or directory\n")
