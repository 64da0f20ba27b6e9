# SPDX-License-Identifier: MIT
"""A host for the role's tasks: folders, network and processes of its own, the rest is this machine's.

There is no systemd in it: units are written, enabled and removed, but nothing is started (SYSTEMD_OFFLINE).
What needs a running daemon is tested on virtual machines (molecule/).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import collection

# Changed by the role: what is written there stays in the namespace.
FOLDERS = ("/etc", "/opt", "/usr/local", "/usr/src", "/var/lib")
SETTING_UP = """
set -e
mount -t tmpfs scratch "$1"
for folder in /etc /opt /usr/local /usr/src /var/lib; do
	mkdir -p "$1/upper$folder" "$1/work$folder"
	mount -t overlay -o "lowerdir=$folder,upperdir=$1/upper$folder,workdir=$1/work$folder" overlay "$folder"
done
mount -t tmpfs run /run
ip link set lo up
echo ready
exec sleep infinity
"""


class RoleHost:
    """Such a host; a context manager."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._process = subprocess.Popen(
            [
                *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", SETTING_UP, "role-host", str(scratch)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare complains when its child is killed
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        [self._inside] = children

    def __enter__(self) -> RoleHost:
        return self

    def __exit__(self, *_unused: object) -> None:
        os.kill(int(self._inside), signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def run(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """A command in it."""
        enter = ["nsenter", f"--target={self._inside}", "--mount", "--net", "--pid", "--"]
        return subprocess.run(
            [*enter, *map(str, words)], text=True, capture_output=True, check=False, timeout=300, **more
        )

    def sh(self, script: str) -> str:
        """What a shell script says; it must not fail."""
        done = self.run("sh", "-c", f"set -e; {script}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tasks(self, *tasks: str, check: bool = False, **variables: Any) -> tuple[int, str, int]:
        """Run files of the role's tasks; code, output as one line, and how many changed something."""
        play = [
            {
                "hosts": "localhost",
                "connection": "local",
                "gather_facts": False,
                "tasks": [
                    {
                        "ansible.builtin.include_role": {
                            "name": "sockmi.appliance.sockmi",
                            "tasks_from": one,
                        }
                    }
                    for one in tasks
                ],
            }
        ]
        file = Path(f"{self.scratch}.yml")
        file.write_text(json.dumps(play))
        settings = {
            "ANSIBLE_COLLECTIONS_PATH": str(collection.linked()),
            "ANSIBLE_CONFIG": str(collection.PROJECT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCAL_TEMP": f"{self.scratch}/ansible",
            "SYSTEMD_OFFLINE": "1",
        }
        words = ["--check"] if check else []
        words += ["-e", json.dumps(variables | {"ansible_python_interpreter": sys.executable})]
        program = Path(sys.executable).with_name("ansible-playbook")
        done = self.run(program, "-i", "localhost,", file, *words, env=os.environ | settings)
        said = " ".join((done.stdout + done.stderr).split())
        changed = int(said.rpartition("changed=")[2].split()[0]) if "changed=" in said else 0
        return done.returncode, said, changed

    def release(self, prefix: str) -> None:
        """A release in use below ``prefix``, whose programs are those of the tests, and the unit for it."""
        there = f"{prefix}/releases/1.0-abc"
        self.sh(
            f"mkdir -p {there}/bin; touch {there}/complete; echo 1.0-abc >{there}/release;"
            f"ln -s {Path(sys.executable).with_name('sockmid')} {there}/bin/sockmid;"
            f"ln -sfn releases/1.0-abc {prefix}/current;"
            f"cd {collection.PROJECT}/daemon/systemd;"
            f"sed s,/opt/sockmi/bin/,{prefix}/current/bin/, sockmid.service"
            " >/etc/systemd/system/sockmid.service"
        )
