# SPDX-License-Identifier: MIT
"""A host for the role's tasks: folders, network and processes of its own, the rest is this machine's.

There is no systemd in it: units are written, enabled and removed, but nothing is started (SYSTEMD_OFFLINE),
unless `RoleHost.systemd` stands in for it.
What needs a running daemon is tested on virtual machines (molecule/).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

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
mount -t tmpfs log /var/log
ip link set lo up
echo ready
exec sleep infinity
"""
# Programs of packages are laid over those of this machine, which stay as they are.
UNPACKING = """
for package in {packages}/*.deb; do dpkg -x $package {there}; done
for folder in bin sbin lib; do
	[ ! -d {there}/$folder ] || [ -L {there}/$folder ] || cp -r {there}/$folder/. {there}/usr/$folder
done
for folder in /usr/bin /usr/sbin /usr/share /usr/lib; do
	mkdir -p {there}$folder
	mount -t overlay -o lowerdir={there}$folder:$folder overlay $folder
done
[ ! -d {there}/etc ] || cp -r {there}/etc/. /etc
"""
# Units run while their file in /run/units is there; /run/refuses, a script, fails where one does not start.
# Of a oneshot ExecStart and ExecStop are run.
SYSTEMCTL = """#!/bin/sh
verb=$1 unit=$2 running=/run/units/$2
[ "$verb" != show ] || [ "$2" = "${2#--}" ] || unit=$4 running=/run/units/$4
oneshot() {
	grep -qs ^Type=oneshot /etc/systemd/system/$unit || return 0
	words=$(sed -n "s/^$1=//p" /etc/systemd/system/$unit)
	case $words in -*) ${words#-} 2>/dev/null || : ;; *) $words ;; esac
}
case $verb in
is-active) [ -e $running ] && echo active || { echo inactive; exit 3; } ;;
is-enabled) [ -e $running.enabled ] && echo enabled || { echo disabled; exit 1; } ;;
show)
	[ -e $running ] && [ "$2" = --property=ActiveEnterTimestampMonotonic ] && {
		up=$(sed 's/ .*//; s/[.]//' /proc/uptime)0000000 at=$(stat -c %.9Y $running | tr -d .)
		echo $(((up - $(date +%s%N) + at) / 1000))
		exit
	}
	[ "$2" = "$unit" ] || { [ -s $running ] && cat $running || echo 0; exit; }
	[ -e /etc/systemd/system/$unit ] && echo LoadState=loaded || echo LoadState=not-found
	[ -e $running ] && echo ActiveState=active || echo ActiveState=inactive ;;
*)
	echo "$*" >>/run/units/asked
	case $verb in
	start|restart)
		[ $verb = start ] || [ ! -e $running ] || oneshot ExecStop
		rm -f $running; sh /run/refuses && oneshot ExecStart && touch $running && exit
		echo 'Job failed.' >&2; exit 1 ;;
	stop) rm -f $running; oneshot ExecStop ;;
	enable) touch $running.enabled ;;
	disable) rm -f $running.enabled ;;
	esac ;;
esac
"""


class RoleHost:
    """Such a host; a context manager."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.under: list[str] = []  # words before what is run in it
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
        enter = ["nsenter", f"--target={self._inside}", "--mount", "--net", "--pid", "--", *self.under]
        return subprocess.run(
            [*enter, *map(str, words)], text=True, capture_output=True, check=False, timeout=800, **more
        )

    def sh(self, script: str) -> str:
        """What a shell script says; it must not fail."""
        done = self.run("sh", "-c", f"set -e; {script}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tasks(self, *tasks: str, check: bool = False, **variables: Any) -> tuple[int, str, int]:
        """Run files of the role's tasks; code, output as one line, and how many changed something."""
        done = self.run_tasks(*tasks, check=check, **variables)
        said = " ".join((done.stdout + done.stderr).split())
        changed = int(said.rpartition("changed=")[2].split()[0]) if "changed=" in said else 0
        return done.returncode, said, changed

    def run_tasks(
        self, *tasks: str, check: bool = False, **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        """The same, with its output as it is."""
        play = {**LOCAL, "hosts": "localhost", "tasks": _including(*tasks)}
        return self.play("-i", "localhost,", self._playbook([play]), check=check, **variables)

    def cases(
        self, cases: list[tuple[tuple[str, ...], dict[str, Any]]], hosts: Sequence[str] = ("localhost",)
    ) -> list[str]:
        """Run each case's tasks with its variables, all in one run of Ansible; with what each failed.

        ``hosts``: what Ansible takes this one for. A ``__sockmi_probe`` takes the place of what is found out.
        """
        told = {"msg": f"told {FAILURES} end"}
        plays = [
            {
                **LOCAL,
                "hosts": "all",
                "vars": variables,
                "tasks": [
                    {
                        # Of an include they are stronger than facts.
                        "block": [one | {"vars": _probed(variables)} for one in _including(*tasks)],
                        "rescue": [{"ansible.builtin.debug": told}],
                    }
                ],
            }
            for tasks, variables in cases
        ]
        done = self.play("-i", ",".join([*hosts, ""]), self._playbook(plays))
        _before, *each = re.split(r"^PLAY \[", done.stdout, flags=re.MULTILINE)
        assert len(each) == len(cases), done.stdout + done.stderr
        return [" ".join(one.partition('"told ')[2].rpartition(' end"')[0].split()) for one in each]

    def play(
        self, *words: str | Path, check: bool = False, **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        """``ansible-playbook`` in it."""
        settings = {
            "ANSIBLE_COLLECTIONS_PATH": str(collection.linked()),
            "ANSIBLE_CONFIG": str(collection.PROJECT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_LOCAL_TEMP": f"{self.scratch}/ansible",
            "SYSTEMD_OFFLINE": "1",
        }
        more = ["--check", "--diff"] if check else []
        more += ["-e", json.dumps(variables | {"ansible_python_interpreter": sys.executable})]
        return self.run(collection.program("ansible-playbook"), *words, *more, env=os.environ | settings)

    def _playbook(self, plays: list[dict[str, Any]]) -> Path:
        file = Path(f"{self.scratch}.yml")
        file.write_text(json.dumps(plays))
        return file

    def systemd(self, *running: str) -> None:
        """A stand-in for systemd, with units that run and are enabled; see `asked`."""
        program = self.scratch.with_name("systemctl")
        program.write_text(SYSTEMCTL)
        self.sh("mkdir -p /run/systemd/system /run/units; touch /run/refuses")
        self.sh(f"cp {program} /usr/local/bin/systemctl; chmod +x /usr/local/bin/systemctl")
        for unit in running:
            self.sh(f"touch /run/units/{unit} /run/units/{unit}.enabled")

    def asked(self) -> list[str]:
        """What the stand-in was asked to do, since the last time."""
        return self.sh("cat /run/units/asked || true; rm -f /run/units/asked").splitlines()

    def unpack(self, name: str) -> None:
        """A package that is not installed here, as ``scripts/setup tests`` downloads it."""
        packages = collection.PROJECT / ".build/packages" / name
        if not (packages / "complete").exists():
            pytest.skip(f"no {packages}: `scripts/setup tests` could not download it")
        self.sh(UNPACKING.format(packages=packages, there=self.scratch / name))

    def release(self, prefix: str, *, unit: bool = True) -> None:
        """A release in use below ``prefix``, whose programs are those of the tests, and the unit for it."""
        there = f"{prefix}/releases/1.0-abc"
        self.sh(
            f"mkdir -p {there}/bin; touch {there}/complete; echo 1.0-abc >{there}/release;"
            f"ln -s {Path(sys.executable).with_name('sockmid')} {there}/bin/sockmid;"
            f"ln -sfn releases/1.0-abc {prefix}/current"
        )
        if unit:
            self.sh(
                f"cd {collection.PROJECT}/daemon/systemd;"
                f"sed s,/opt/sockmi/bin/,{prefix}/current/bin/, sockmid.service"
                " >/etc/systemd/system/sockmid.service"
            )


# As a kernel with AppArmor, whose parser notes what it loads.
APPARMOR = """
mount -t tmpfs modules /sys/module; mkdir -p /sys/module/apparmor/parameters
echo Y >/sys/module/apparmor/parameters/enabled
mount -t tmpfs security /sys/kernel/security; mkdir /sys/kernel/security/apparmor
cd /sys/kernel/security/apparmor; touch .replace; echo 'sockmid-other (enforce)' >profiles
mkdir -p /etc/apparmor.d/local; echo '# Mine.' >/etc/apparmor.d/local/sockmid
mount -t tmpfs cache /var/cache; mkdir -p /var/cache/apparmor/1a2b.0
"""
PARSER = """#!/bin/sh
loaded=/sys/kernel/security/apparmor/profiles
case $1 in
--skip-kernel-load) grep -q '^profile sockmid ' "$3" ;;
--replace) cp "$2" /var/cache/apparmor/1a2b.0/sockmid; echo 'sockmid (enforce)' >>$loaded ;;
--remove) sed -i '/^sockmid (/d' $loaded ;;
esac
"""


def apparmor(host: RoleHost, folder: Path) -> None:
    """Have a host's kernel confine programs, as far as the role looks."""
    (folder / "parser").write_text(PARSER)
    host.sh(f"{APPARMOR} install -m 755 {folder}/parser /usr/local/sbin/apparmor_parser")


def wheelhouse(host: RoleHost, folder: Path) -> str:
    """A wheelhouse for this host, whose bundle nobody unpacks; its folder."""
    folder.mkdir()
    tag = host.sh("python3 -c 'import sys; print(\"cp%d%d\" % sys.version_info[:2])'; uname -m").split()
    bundle = {"file": "sockmi-bundle.tar", "release": "2.0-def"}
    (folder / "sockmi-bundle.tar").write_bytes(bytes(1024))
    dkms = {"file": "sockmi-dkms.tar", "version": "2.0"}
    manifest = {"bundles": {"-".join(tag): bundle}, "dkms": dkms}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


# Of a loop only what failed of it: what is right has a text, too, for the case that it is wrong.
FAILURES = (
    "{{ ([ansible_failed_result] + ansible_failed_result.results | default([])) "
    "| selectattr('failed', 'true') | map('dict2items') | flatten "
    "| selectattr('key', 'in', ['msg', 'stderr']) | map(attribute='value') | join(' ') }}"
)
LOCAL = {"connection": "local", "gather_facts": False}


def _probed(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name == "__sockmi_probe"}


def _including(*tasks: str) -> list[dict[str, Any]]:
    role = "sockmi.appliance.sockmi"
    return [{"ansible.builtin.include_role": {"name": role, "tasks_from": one}} for one in tasks]
