# SPDX-License-Identifier: MIT
"""A group's key is in no output of the role: -vvv, --diff, wrong arguments, check mode."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import pytest

from tests import collection

pytest.importorskip("ansible")
pytestmark = pytest.mark.timeout(600)

PLAY = """
- name: Role
  hosts: all
  gather_facts: false
  tasks:
    - name: As far as it goes here
      block:
        - name: Install
          ansible.builtin.include_role:
            name: sockmi.appliance.install
      rescue:
        - name: It has failed
          ansible.builtin.debug:
            msg: told
"""
CONFIGURE = """
- name: Role
  hosts: all
  gather_facts: false
  tasks:
    - name: Configuration
      ansible.builtin.include_role:
        name: sockmi.appliance.sockmi
        tasks_from: configure
"""


def told(folder: Path, play: str, variables: dict[str, object], *flags: str) -> tuple[int, str]:
    """Exit status and all output of a run on this machine."""
    (folder / "play.yml").write_text(play)
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory = {"all": {"hosts": {"host": local | variables}}}
    (folder / "hosts.json").write_text(json.dumps(inventory))
    words = [folder / "play.yml", "-i", folder / "hosts.json", "-vvv", "--diff", *flags]
    done = collection.run(None, "ansible-playbook", *words, timeout_s=280)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "wrong", [{}, {"port": "no"}, {"unknown": 1}], ids=["whole", "wrong-type", "unknown-option"]
)
def test_whole_role_in_check_mode(tmp_path: Path, wrong: dict[str, object]) -> None:
    """From the check of its arguments on; on a machine without systemd it ends where it looks for that."""
    shared, own = secrets.token_hex(32), secrets.token_hex(32)
    groups = [{"name": "default"}, {"name": "web", "key": own, **wrong}]
    variables = {"sockmi_group_key": shared, "sockmi_groups": groups}
    _status, output = told(tmp_path, PLAY, variables, "--check")
    assert "sockmi" in output
    assert shared not in output
    assert own not in output


def test_keys_written(tmp_path: Path) -> None:
    """The tasks that write keys and configuration, for real."""
    shared, own = secrets.token_hex(32), secrets.token_hex(32)
    (tmp_path / "prefix/current/bin").mkdir(parents=True)
    (tmp_path / "prefix/current/bin/sockmid").symlink_to(Path(sys.executable).with_name("sockmid"))
    etc = tmp_path / "etc"
    etc.mkdir()
    variables: dict[str, object] = {"sockmi_group_key": shared}
    variables["sockmi_groups"] = [{"name": "default"}, {"name": "web", "key": own, "port": 7790}]
    # Of these the role has its own, which an inventory does not change; its first look finds no former keys.
    own_facts = {"__sockmi_etc": str(etc), "__sockmi_probe": {"key_files": []}}
    extra = json.dumps(own_facts | {"sockmi_prefix": str(tmp_path / "prefix")})
    status, output = told(tmp_path, CONFIGURE, variables, "-e", extra)
    assert status == 0, output.replace(shared, "SHARED").replace(own, "OWN")
    assert [(etc / f"{name}.key").read_text().strip() for name in ("default", "web")] == [shared, own]
    assert "key_file" in output
    assert shared not in output
    assert own not in output
