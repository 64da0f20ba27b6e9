#!/usr/bin/python
# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The SockMi kernel module, through DKMS."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kmod
short_description: Build, load and unload the SockMi kernel module
version_added: "0.1.0"
author: SockMi contributors (@sockmi)
description:
  - Builds the SockMi kernel module for a kernel through DKMS, so that it is built again with each kernel to
    come, loads and unloads it, and sets its parameters.
  - Says what stands in the way (missing headers, Secure Boot, a kernel that is too old or unknown, ...), and
    what to do about it. What could not be loaded is not built for O(state=loaded).
  - Does not unload the module while migrated connections depend on it.
options:
  state:
    description:
      - V(loaded), built, installed and loaded; loaded again if another build is loaded and nothing depends on
        it.
      - V(built), built and installed; whether it is loaded is left as it is.
      - V(unloaded), not loaded; it stays installed.
      - V(absent), not loaded, and removed from DKMS with its sources, the parameters and what loads it at
        boot. While it is in use nothing is removed.
    type: str
    choices: [loaded, built, unloaded, absent]
    default: loaded
  source:
    description:
      - Folder on the managed host with the module's source tree (C(dkms.conf) is in it), or a tar archive of
        it.
      - If it differs from what DKMS has, that is replaced and built again. If it is not given, what DKMS
        has is used.
    type: path
  kernel:
    description:
      - Release of the kernel to build for, as C(uname -r) says it. The running one, if it is not given.
      - A module for another kernel is built, but not loaded.
    type: str
  parameters:
    description:
      - Parameters of the module by name, as C(modinfo sockmi) lists them, kept in
        C(/etc/modprobe.d/sockmi.conf). V({}) removes the file.
      - Those that can be changed while it is loaded are; others take effect when it is loaded again. One that
        is no longer given has its default.
      - Names and numbers are compared with what the module has before anything is done. If it cannot be
        loaded with them all the same, the file is as it was, and what was loaded is loaded with that again.
    type: dict
  at_boot:
    description:
      - Whether it is loaded at boot (C(/etc/modules-load.d/sockmi.conf)). The default is true for V(loaded),
        and otherwise as it is.
      - With O(state=absent) the file is removed, whatever is given here.
    type: bool
  force:
    description:
      - Have the module drop the redirects that it has before it is unloaded, and the images that wait in its
        import lists, in all network namespaces. Connections that depend on them are cut off.
    type: bool
    default: false
  stop_unit:
    description:
      - A systemd unit, V(sockmid.service), that may be stopped if nothing but its main process keeps the
        module from being unloaded.
      - With O(state=loaded) it is started again as soon as the other build is loaded, or cannot be;
        otherwise it stays stopped. In check mode it counts as stopped where it would be.
      - Without it a module that the daemon has open is replaced at the next boot.
    type: str
attributes:
  check_mode:
    description: Can run in check mode; obstacles are looked for, nothing is built, loaded or written.
    support: full
  diff_mode:
    description: Shows versions, parameters and whether it is loaded, before and after.
    support: full
  idempotent:
    description: Running it again changes nothing.
    support: full
notes:
  - Run it as root (C(become)). Needs C(dkms), a compiler and the headers of the kernel on the managed host.
seealso:
  - module: sockmi.appliance.info
"""

EXAMPLES = r"""
- name: Build it for the running kernel, and load it
  sockmi.appliance.kmod:
    source: /usr/local/src/sockmi-dkms-1.0.tar

- name: Build it for the kernel of the next boot
  sockmi.appliance.kmod:
    state: built
    kernel: 6.12.48+deb13-cloud-amd64

- name: More room in the lists
  sockmi.appliance.kmod:
    parameters:
      list_max: "64,64,4096"

- name: Another build, now, if no migrated connection depends on the one that is loaded
  sockmi.appliance.kmod:
    source: /usr/local/src/sockmi-dkms-1.1.tar
    stop_unit: sockmid.service

- name: Remove it
  sockmi.appliance.kmod:
    state: absent
"""

RETURN = r"""
kernel:
  description: The kernel that was built for.
  returned: success, or once it has begun
  type: str
  sample: 6.1.0-40-cloud-amd64
version:
  description: Version of the module in DKMS after the task, or null.
  returned: success
  type: str
  sample: "1.0"
built:
  description: Whether it is built and installed for RV(kernel).
  returned: success
  type: bool
  sample: true
loaded:
  description: Whether it is loaded now.
  returned: success
  type: bool
  sample: true
reload_needed:
  description:
    - Whether another build, or other parameters, than those installed are loaded, and something depends on
      them.
  returned: success
  type: bool
  sample: false
users:
  description:
    - How many users the loaded module has, migrated connections and open devices, as the kernel counts them.
  returned: success
  type: int
  sample: 0
actions:
  description:
    - What was done, or in check mode would be.
    - After a failure, what had been done by then, in order.
  returned: success, or once it has begun
  type: list
  elements: str
  sample: [add 1.0, build 1.0, install 1.0, load]
obstacles:
  description: What stands in the way.
  returned: success, or when something stands in the way
  type: list
  elements: dict
  contains:
    code:
      description:
        - A code for programs, V(old-kernel), V(unknown-kernel), V(no-dkms), V(no-make), V(no-gcc),
          V(no-headers), V(build-failed), V(modules-disabled), V(secure-boot), V(load-failed), V(in-use),
          V(unload-failed), V(flush-failed) or V(unit-failed).
      type: str
      returned: always
    message:
      description: A sentence for people.
      type: str
      returned: always
    mend:
      description: What to do about it.
      type: str
      returned: always
  sample:
    - code: no-headers
      message: There are no headers of Linux 6.1.0-40-cloud-amd64 here.
      mend: Install the package linux-headers-6.1.0-40-cloud-amd64.
"""

import contextlib  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module, _parameters  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._dkms import Dkms, in_order  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._loaded import Loaded  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._obstacle import Obstacle  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._source import Source  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._unit import Unit  # noqa: E402

MODPROBE = Path("/etc/modprobe.d/sockmi.conf")
AT_BOOT = Path("/etc/modules-load.d/sockmi.conf")
AT_BOOT_TEXT = "# Managed by Ansible (sockmi.appliance.kmod).\nsockmi\n"


class Kmod:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params: dict[str, Any] = module.params
        self.running: str = os.uname().release
        self.kernel: str = module.params["kernel"] or self.running
        self.state: str = module.params["state"]
        self.actions: list[str] = []
        self.reload_needed = False
        self._former: str | None = None
        self.dkms = Dkms(module, self.kernel, self.actions)
        self.loaded = Loaded(module, self.actions)
        self.unit = Unit(module, self.actions, self.params["stop_unit"]) if self.params["stop_unit"] else None

    def run(self) -> None:
        """Look, do, report."""
        if not re.fullmatch(r"[A-Za-z0-9._+~-]+", self.kernel):
            raise _module.WrongValue(f"kernel is {self.kernel!r}; give a release as `uname -r` says it.")
        wanted = self._wanted_parameters()
        if os.geteuid() and not self.module.check_mode:
            raise _module.WrongValue("This needs root; use become.")
        try:
            before = self._now()
            if self.state == "loaded" and self.kernel == self.running and not self.loaded.there:
                self.loaded.may_load()  # first: nothing is built that could not be
            building = self.state in ("loaded", "built")
            source = Source(Path(self.params["source"])) if building and self.params["source"] else None
            known = self._known(source)
            if wanted and known:
                _parameters.check(wanted, known)  # first: nothing is built or written for what is not taken
            if building:
                self.dkms.build(source)
            if self.state in ("unloaded", "absent"):
                self._unload()  # first: if it is in use, all stays as it is
            self._keep_parameters(wanted, known)
            self._boot()
            if self.state == "loaded":
                self._load()
            if self.state == "absent":
                self.dkms.remove()
        except Obstacle as obstacle:
            self._fail(f"{obstacle} {obstacle.row['mend']}", obstacles=[obstacle.row])
        except _module.WrongValue as error:
            self._fail(str(error))
        except OSError as error:
            self._fail(f"What actions name is done, the rest is not: {error}. Mend that, and run it again.")
        after = self._predicted(before) if self.module.check_mode else self._now()
        result: dict[str, Any] = {
            "changed": bool(self.actions),
            "kernel": self.kernel,
            "version": after["version"],
            "built": after["built"],
            "loaded": after["loaded"],
            "reload_needed": self.reload_needed,
            "users": self.loaded.users,
            "actions": self.actions,
            "obstacles": [],
        }
        if self.reload_needed:
            self.module.warn(
                "The loaded module is not the one that is installed now, or has other parameters, but is in "
                f"use ({self.loaded.dependents()}). It is replaced at the next boot, or when this is run "
                "with nothing depending on it but a daemon that it may stop (stop_unit)."
            )
        if self.module._diff:
            result["diff"] = {"before": _module.pretty(before), "after": _module.pretty(after)}
        self.module.exit_json(**result)

    def _fail(self, message: str, **more: Any) -> None:
        """Fail, and tell what had been done by then."""
        self.module.fail_json(
            msg=message, kernel=self.kernel, changed=bool(self.actions), actions=self.actions, **more
        )

    # -- what is there

    def _now(self) -> dict[str, Any]:
        versions = self.dkms.versions()
        installed = [version for version, here in versions.items() if here]
        return {
            "version": max(installed or versions, key=in_order, default=None),
            "built": bool(installed),
            "loaded": self.loaded.there,
            "parameters": _configured(),
            "at_boot": AT_BOOT.exists(),
        }

    def _predicted(self, before: dict[str, Any]) -> dict[str, Any]:
        after = dict(before)
        for action in self.actions:
            verb, _unused, what = action.partition(" ")
            if verb == "add":
                after["version"] = what
            elif verb == "install":
                after.update(version=what, built=True)
            elif verb == "remove" and what == after["version"] and self.state == "absent":
                after.update(version=None, built=False)
            elif verb in ("load", "unload"):
                after["loaded"] = verb == "load"
            elif verb == "parameters":
                after["parameters"] = {} if self.state == "absent" else self._wanted_parameters() or {}
            elif action in ("at boot", "not at boot"):
                after["at_boot"] = action == "at boot"
        return after

    # -- parameters

    def _wanted_parameters(self) -> dict[str, str] | None:
        given = self.params["parameters"]
        if given is None:
            return None
        wanted = {}
        for name, value in given.items():
            text = "1" if value is True else "0" if value is False else str(value)
            if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or not re.fullmatch(r"[A-Za-z0-9,._-]+", text):
                raise _module.WrongValue(
                    f"parameters: {name!s}={text!r} is no parameter; give names and values as "
                    "`modinfo -p sockmi` has them."
                )
            wanted[str(name)] = text
        return wanted

    def _known(self, source: Source | None) -> dict[str, _parameters.Parameter]:
        """Parameters of the module that there will be; empty if they cannot be told."""
        if self.state == "absent" or self.params["parameters"] is None:
            return {}
        there = {} if source else _parameters.installed(self.module, self.kernel)
        source = source or self.dkms.source()
        return there or (_parameters.of_sources(source.files) if source else {})

    def _keep_parameters(
        self, wanted: dict[str, str] | None, known: dict[str, _parameters.Parameter]
    ) -> None:
        if self.state == "absent":
            if MODPROBE.exists():
                self._file(MODPROBE, None, "parameters")
            return
        if wanted is None:
            return
        if self.state == "loaded" and self.loaded.there:
            self.reload_needed = self.loaded.set(wanted, _configured(), known)
        if wanted != _configured():
            self._former = MODPROBE.read_text() if MODPROBE.exists() else None
            words = "".join(f" {name}={value}" for name, value in sorted(wanted.items()))
            text = (
                f"# Managed by Ansible (sockmi.appliance.kmod).\noptions sockmi{words}\n" if wanted else None
            )
            self._file(MODPROBE, text, "parameters")

    def _boot(self) -> None:
        wanted = False if self.state == "absent" else self.params["at_boot"]
        if wanted is None and self.state == "loaded":
            wanted = True
        if self.state == "loaded" and self.kernel != self.running and self.params["at_boot"] is None:
            wanted = None
        if wanted is not None and wanted != AT_BOOT.exists():
            self._file(AT_BOOT, AT_BOOT_TEXT if wanted else None, "at boot" if wanted else "not at boot")

    def _file(self, path: Path, text: str | None, action: str) -> None:
        if self.module.check_mode:
            pass
        elif text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(dir=str(path.parent))
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            Path(fresh).chmod(0o644)
            Path(fresh).rename(path)
        self.actions.append(action)

    # -- loading

    def _load(self) -> None:
        if self.kernel != self.running:
            return
        if not self.loaded.there:
            self._load_or_undo(again=False)
            return
        if not self.loaded.stale() and not self.reload_needed:
            return
        with self._unit_stopped():
            if self.loaded.users:
                self.reload_needed = True
                return
            self.loaded.unload()
            self.reload_needed = False
            self._load_or_undo(again=True)

    def _load_or_undo(self, *, again: bool) -> None:
        """Load it; with parameters that it does not take they are as they were, and loaded (``again``)."""
        try:
            self.loaded.load()
        except Obstacle:
            if "parameters" in self.actions:
                self._file(MODPROBE, self._former, "parameters")
                self.actions[:] = [one for one in self.actions if one != "parameters"]
                with contextlib.suppress(Obstacle):
                    if again:
                        self.loaded.load()
            raise

    def _unload(self) -> None:
        if self.loaded.there:
            with self._unit_stopped():
                self.loaded.unload(force=self.params["force"])

    @contextlib.contextmanager
    def _unit_stopped(self) -> Iterator[None]:
        """Within, the unit is stopped if that helps. Afterwards it runs, unless the module is unloaded."""
        process = self.unit.process() if self.unit else 0
        if self.unit is None or not self._stopping_helps(process):
            yield
            return
        try:
            self.unit.stop()
            if self.module.check_mode:
                self.loaded.predict_end(process)
            yield
        except BaseException:
            self.unit.start()
            raise
        if self.state == "loaded":
            self.unit.start()
            self.loaded.predict_start(process)

    def _stopping_helps(self, process: int) -> bool:
        """Whether nothing would keep the module if that process ended, or only what ``force`` drops."""
        others = set(self.loaded.holders()) - {process}
        without = self.loaded.users_without(process)
        return without < self.loaded.users and not others and (not without or self.params["force"])


def _configured() -> dict[str, str]:
    """Parameters of modprobe.d."""
    found = {}
    for line in _module.text_of(MODPROBE).splitlines():
        words = line.split()
        if words[:2] == ["options", "sockmi"]:
            found.update(word.split("=", 1) for word in words[2:] if "=" in word)
    return found


def argument_spec() -> dict[str, Any]:
    """The options."""
    return {
        "state": {"type": "str", "choices": ["loaded", "built", "unloaded", "absent"], "default": "loaded"},
        "source": {"type": "path"},
        "kernel": {"type": "str"},
        "parameters": {"type": "dict"},
        "at_boot": {"type": "bool"},
        "force": {"type": "bool", "default": False},
        "stop_unit": {"type": "str"},
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    _module.guarded(module, lambda: Kmod(module).run())


if __name__ == "__main__":
    main()
