# Copyright (c) SockMi contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run tasks in a network namespace of the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
name: netns
author: SockMi contributors (@sockmi)
short_description: Run tasks in a network namespace of the controller
version_added: "0.1.0"
description:
  - Runs commands on the controller, but inside a named network namespace, by C(nsenter).
  - Only the network differs; files, users and processes are the controller's.
    Hence files are copied locally.
requirements:
  - C(nsenter) of util-linux on the controller
options:
  netns:
    description:
      - Name of the network namespace, as in C(ip netns list).
    type: str
    required: true
    vars:
      - name: ansible_netns
  netns_environment:
    description:
      - Environment variables of every command, beside those of the task.
      - The variables E(SOCKMI_CONTROL) and the like tell programs which daemon is the host's.
    type: dict
    default: {}
    vars:
      - name: ansible_netns_environment
  become_success_timeout:
    description:
      - Seconds to wait for privilege escalation to succeed.
    type: int
    default: 10
    vars:
      - name: ansible_local_become_success_timeout
  become_strip_preamble:
    description:
      - Strip what privilege escalation prints before the command.
    type: bool
    default: true
    vars:
      - name: ansible_local_become_strip_preamble
extends_documentation_fragment:
  - connection_pipelining
notes:
  - The user that runs Ansible must be allowed to enter the namespace (root, or CAP_SYS_ADMIN).
"""

import os  # noqa: E402
import shlex  # noqa: E402

from ansible.errors import AnsibleConnectionFailure  # noqa: E402
from ansible.plugins.connection.local import Connection as LocalConnection  # noqa: E402

NAMESPACES = "/run/netns"


class Connection(LocalConnection):
    """The local connection, with every command inside a network namespace."""

    transport = "sockmi.appliance.netns"

    def _connect(self) -> Connection:
        """Check that there is such a namespace, to fail here and not in the first task."""
        if not self._connected:
            name = self.get_option("netns")
            if not name or "/" in name or name in (".", ".."):
                raise AnsibleConnectionFailure(
                    f"ansible_netns is {name!r}, which names no network namespace; "
                    "set it to a name that 'ip netns list' shows."
                )
            if not os.path.ismount(f"{NAMESPACES}/{name}"):
                raise AnsibleConnectionFailure(
                    f"There is no network namespace {name!r}; make it first "
                    "(the lab: ansible-playbook playbooks/lab.yml) or correct ansible_netns."
                )
            super()._connect()
        return self

    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        """Run ``cmd`` in the namespace; the result of the local connection."""
        return super().exec_command(self._wrapped(cmd), in_data=in_data, sudoable=sudoable)

    def _wrapped(self, command: str) -> str:
        words = ["nsenter", f"--net={NAMESPACES}/{self.get_option('netns')}", "--"]
        environment = self.get_option("netns_environment") or {}
        if environment:
            words += ["env", *(f"{name}={value}" for name, value in environment.items())]
        # The task's command may be any shell text, also with its own redirections.
        return shlex.join([*words, "/bin/sh", "-c", command])
