# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A systemd unit that is stopped for the SockMi kernel module's sake; private to this collection."""

from __future__ import annotations

import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sockmi.appliance.plugins.module_utils._module import WrongValue
from ansible_collections.sockmi.appliance.plugins.module_utils._obstacle import Obstacle


class Unit:
    """The unit ``name``. What is done to it is added to ``actions``; in check mode only that."""

    def __init__(self, module: AnsibleModule, actions: list[str], name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*", name):
            raise WrongValue(f"stop_unit is {name!r}; give the name of a unit, such as sockmid.service.")
        self.module = module
        self.actions = actions
        self.name = name

    def process(self) -> int:
        """Id of its main process; 0 if it does not run."""
        tool = self.module.get_bin_path("systemctl")
        if not tool:
            return 0
        words = [tool, "show", "--property=MainPID", "--value", self.name]
        _code, out, _err = self.module.run_command(words)
        return int(out) if out.strip().isdigit() else 0

    def stop(self) -> None:
        """Stop it, and wait until it has ended."""
        self._systemctl("stop")

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        self._systemctl("start")

    def _systemctl(self, verb: str) -> None:
        words = ["systemctl", verb, self.name]
        code, out, err = (0, "", "") if self.module.check_mode else self.module.run_command(words)
        if code:
            raise Obstacle(
                "unit-failed",
                f"{' '.join(words)} ended with {code}: {(err or out).strip()}.",
                f"See its log (journalctl -u {self.name}).",
            )
        self.actions.append(f"{verb} {self.name}")
