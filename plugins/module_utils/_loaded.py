# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The SockMi kernel module in the running kernel; private to this collection."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sockmi.appliance.plugins.module_utils._module import WrongValue, text_of
from ansible_collections.sockmi.appliance.plugins.module_utils._obstacle import Obstacle
from ansible_collections.sockmi.appliance.plugins.module_utils._parameters import Parameter, same

NAME = "sockmi"
LOADED = Path("/sys/module/sockmi")
DEVICE = Path("/dev/sockmi")
# dkms(8): where it has the certificate of the key that it signs with, if this file names no other.
FRAMEWORK = Path("/etc/dkms/framework.conf")
MOK = Path("/var/lib/dkms/mok.pub")
MOK_UBUNTU = Path("/var/lib/shim-signed/mok/MOK.der")
SIGNED_ONLY = Path("/sys/module/module/parameters/sig_enforce")
LOCKDOWN = Path("/sys/kernel/security/lockdown")
NAMES_MAX = 5

# kmod/uapi/sockmi.h; a unit test compares them.
ABI = (1, 0)
HELLO = struct.Struct("=HHIHHIQQIIII")
FLUSH = struct.Struct("=II")
FORGET = struct.Struct("=IIII")
IOC_HELLO = 3 << 30 | HELLO.size << 16 | 0xB9 << 8 | 0x00
IOC_FORGET = 3 << 30 | FORGET.size << 16 | 0xB9 << 8 | 0x04
IOC_NAT_FLUSH = 3 << 30 | FLUSH.size << 16 | 0xB9 << 8 | 0x43


class Loaded:
    """The module as the kernel has it. What it does it adds to ``actions``; in check mode only that."""

    def __init__(self, module: AnsibleModule, actions: list[str]) -> None:
        self.module = module
        self.actions = actions
        self.running = os.uname().release
        self._ended: set[int] = set()  # what check mode takes for ended
        self._certificate = self._signers()

    @property
    def there(self) -> bool:
        """Whether it is loaded."""
        return LOADED.is_dir()

    @property
    def users(self) -> int:
        """How many users it has: moved connections and open devices."""
        return max(0, int(text_of(LOADED / "refcnt") or 0) - sum(map(_opened, self._ended)))

    def users_without(self, process: int) -> int:
        """How many it would have if that process (an id) ended."""
        return max(0, self.users - _opened(process))

    def predict_end(self, process: int) -> None:
        """Count from now on as if that process (an id) had ended."""
        self._ended.add(process)

    def predict_start(self, process: int) -> None:
        """Count from now on as if the process ran again."""
        self._ended.discard(process)

    def stale(self) -> bool:
        """Whether it is another build than what is, or will be, installed."""
        if any(action.startswith("install ") for action in self.actions) and self.module.check_mode:
            return True
        installed, file = self._srcversion(), LOADED / "srcversion"
        return bool(installed) and file.exists() and file.read_text().strip() != installed

    def set(self, parameters: dict[str, str], before: dict[str, str], known: dict[str, Parameter]) -> bool:
        """Set those that can be changed while it is loaded; whether others differ, which needs a reload.

        Those that are not given any more (``before``) get their default, and so would all that only loading
        sets. If the kernel does not take one, all have the value that they had, and WrongValue is raised.
        """
        reload_needed = False
        done: list[tuple[Path, str]] = []
        for file in sorted((LOADED / "parameters").glob("*")):
            default = known[file.name].default if file.name in known else ""
            writable = bool(file.stat().st_mode & 0o200)
            given = parameters.get(file.name)
            value = given if given is not None else default if file.name in before or not writable else ""
            loaded = file.read_text().strip()
            if not value or same(value, loaded, default):
                continue
            if not writable:
                reload_needed = True
                continue
            if not self.module.check_mode:
                try:
                    file.write_text(value)
                except OSError as error:
                    for other, former in done:
                        other.write_text(former)
                        self.actions.pop()
                    raise WrongValue(
                        f"parameters: {file.name}={value}: {error.strerror}; see `modinfo -p sockmi`."
                    ) from None
            done.append((file, loaded))
            self.actions.append(f"set {file.name}={value}")
        return reload_needed

    def load(self) -> None:
        """Load it; raises Obstacle if that is impossible."""
        self.may_load()
        self._change("load")

    def unload(self, *, force: bool = False) -> None:
        """Unload it; raises Obstacle while it is in use. ``force``: have it drop its redirects before."""
        drop = bool(self.users) and force and not self.holders()  # not if it would be in use all the same
        if drop:
            self._flush()
        if self.users and not (drop and self.module.check_mode):
            raise Obstacle(
                "in-use",
                f"The module is in use: {self.dependents()}.",
                "Move the connections on, or let them end (sockmi list redirects), and stop what has the "
                "device open (systemctl stop sockmid); force drops redirects and images that wait in import "
                "lists, in all network namespaces: their connections are cut off.",
            )
        self._change("unload")

    def dependents(self) -> str:
        """Who uses it, in words."""
        holders = list(self.holders().values())
        named = f", the device is open in {', '.join(holders[:NAMES_MAX])}" if holders else ""
        return f"{self.users} users, that is connections that have moved and open devices{named}"

    def holders(self) -> dict[int, str]:
        """Processes that have the device open: name (pid), by their ids."""
        running = {int(process.name): process for process in Path("/proc").glob("[0-9]*")}
        return {
            number: f"{text_of(process / 'comm')} ({number})"
            for number, process in running.items()
            if number not in self._ended and _opened(number)
        }

    def _srcversion(self) -> str:
        """What tells the build installed for the running kernel from others; empty if there is none."""
        _code, out, _err = self.module.run_command(["modinfo", "-k", self.running, "-F", "srcversion", NAME])
        return out.strip()

    def may_load(self) -> None:
        """Raise Obstacle if the kernel would take no module, or not this one."""
        if text_of(Path("/proc/sys/kernel/modules_disabled")) == "1":
            raise Obstacle(
                "modules-disabled",
                "kernel.modules_disabled is 1: no module can be loaded.",
                "It takes a reboot without it.",
            )
        if self._signed_only() and self._enrolled() is False:
            raise self._not_signed("DKMS's is not")

    def _signed_only(self) -> bool:
        """Whether the kernel loads only modules that were signed with a key that it knows."""
        lockdown = text_of(LOCKDOWN)
        return text_of(SIGNED_ONLY) == "Y" or "[integrity]" in lockdown or "[confidentiality]" in lockdown

    def _not_signed(self, why: str) -> Obstacle:
        tool = "" if self.module.get_bin_path("mokutil") else "Install the package mokutil. "
        key = "" if self._certificate.exists() else " (`dkms generate_mok` makes the key)"
        return Obstacle(
            "secure-boot",
            f"Secure Boot is on, so the kernel loads only modules whose signer's key is enrolled, and {why}.",
            f"{tool}Run `mokutil --import {self._certificate}`{key}, choose a password, reboot and enroll "
            "the key.",
        )

    def _enrolled(self) -> bool | None:
        """Whether the key that DKMS signs with is enrolled; None if that cannot be told."""
        if not self._certificate.exists():  # nobody has enrolled what is not made yet
            return False
        tool = self.module.get_bin_path("mokutil")
        if not tool:
            return None
        _code, out, _err = self.module.run_command([tool, "--test-key", str(self._certificate)])
        if "already enrolled" in out:
            return True
        return False if "not enrolled" in out or "enrollment request" in out else None

    def _signers(self) -> Path:
        """The certificate of the key that DKMS signs with."""
        files = [FRAMEWORK, *sorted(FRAMEWORK.with_name(f"{FRAMEWORK.name}.d").glob("*.conf"))]
        named = [
            line.partition("=")[2].strip().strip("\"'")
            for file in files
            for line in text_of(file).splitlines()
            if line.strip().startswith("mok_certificate=")
        ]
        if named:
            return Path(re.sub(r"\$(kernelver\b|\{kernelver\})", self.running, named[-1]))
        return MOK_UBUNTU if MOK_UBUNTU.exists() and not MOK.exists() else MOK

    def _change(self, action: str) -> None:
        """``load`` or ``unload``."""
        if self.module.check_mode:
            self.actions.append(action)
            return
        words = ["modprobe", NAME] if action == "load" else ["modprobe", "-r", NAME]
        if action == "unload" and not self._srcversion():
            words = ["rmmod", NAME]  # loaded by hand (insmod): modprobe knows installed modules only
        code, out, err = self.module.run_command(words)
        if code:
            told = f"{' '.join(words)} ended with {code}: {(err or out).strip()}"
            if action == "load" and self._signed_only() and self._enrolled() is None:
                raise self._not_signed(f"it cannot be told whether DKMS's is; {told}")
            raise Obstacle(
                f"{action}-failed",
                f"{told}.",
                "See the kernel's log (journalctl -k).",
            )
        self.actions.append(action)

    def _flush(self) -> None:
        """Have it forget what keeps it: redirects and waiting images, of all network namespaces."""
        if self.module.check_mode:
            self.actions.append("drop redirects")
            return
        try:
            with DEVICE.open("r+b", buffering=0) as device:
                fcntl.ioctl(device, IOC_HELLO, HELLO.pack(*ABI, *(0,) * 10))
                try:
                    fcntl.ioctl(device, IOC_FORGET, FORGET.pack(0, 0, 0, 0))
                except OSError as error:
                    if error.errno != errno.ENOTTY:
                        raise
                    fcntl.ioctl(device, IOC_NAT_FLUSH, FLUSH.pack(0, 0))  # of an earlier release: its own
        except OSError as error:
            raise Obstacle(
                "flush-failed",
                f"The module does not drop its redirects: {error.strerror}.",
                "Load a module of this release, or reboot.",
            ) from None
        self.actions.append("drop redirects")


def _opened(process: int) -> int:
    """How many descriptors of the device a process has."""
    count = 0
    with contextlib.suppress(OSError):  # it has ended
        for link in Path(f"/proc/{process}/fd").iterdir():
            count += os.readlink(link) == str(DEVICE)  # noqa: PTH115 - Python 3.8
    return count
