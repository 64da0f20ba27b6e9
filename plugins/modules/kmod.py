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
    what to do about it.
  - Does not unload the module while migrated connections depend on it.
options:
  state:
    description:
      - V(loaded), built, installed and loaded; loaded again if another build is loaded and nothing depends on
        it.
      - V(built), built and installed; whether it is loaded is left as it is.
      - V(unloaded), not loaded; it stays installed.
      - V(absent), not loaded, and removed from DKMS with its sources.
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
      - Those that can be changed while it is loaded are; others take effect when it is loaded again.
    type: dict
  at_boot:
    description:
      - Whether it is loaded at boot (C(/etc/modules-load.d/sockmi.conf)). The default is true for V(loaded),
        and otherwise as it is; V(absent) removes the file.
    type: bool
  force:
    description:
      - Have the module drop the redirects that it has before it is unloaded. Connections that depend on them
        are cut off.
    type: bool
    default: false
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

- name: Remove it
  sockmi.appliance.kmod:
    state: absent
"""

RETURN = r"""
kernel:
  description: The kernel that was built for.
  returned: success, or when something stands in the way
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
  description: What was done, or in check mode would be.
  returned: success
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
          V(unload-failed) or V(flush-failed).
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

import fcntl  # noqa: E402
import hashlib  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import struct  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module  # noqa: E402

NAME = "sockmi"
OLDEST = (6, 1)
UNKNOWN = (8, 0)
SOURCES = Path("/usr/src")
MODPROBE = Path("/etc/modprobe.d/sockmi.conf")
AT_BOOT = Path("/etc/modules-load.d/sockmi.conf")
LOADED = Path("/sys/module/sockmi")
DEVICE = Path("/dev/sockmi")
MOK = Path("/var/lib/dkms/mok.pub")
AT_BOOT_TEXT = "# Managed by Ansible (sockmi.appliance.kmod).\nsockmi\n"
NAMES_MAX = 5

# kmod/uapi/sockmi.h; a unit test compares them.
ABI = (1, 0)
HELLO = struct.Struct("=HHIHHIQQIIII")
FLUSH = struct.Struct("=II")
IOC_HELLO = 3 << 30 | HELLO.size << 16 | 0xB9 << 8 | 0x00
IOC_NAT_FLUSH = 3 << 30 | FLUSH.size << 16 | 0xB9 << 8 | 0x43


class Obstacle(Exception):
    """Something stands in the way; the text is the sentence, ``mend`` what to do."""

    def __init__(self, code: str, message: str, mend: str) -> None:
        super().__init__(message)
        self.row = {"code": code, "message": message, "mend": mend}


class Source:
    """A source tree: a folder, or the contents of a tar archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.files = self._archived() if path.is_file() else self._folder()
        except (OSError, tarfile.TarError) as error:
            raise _module.WrongValue(f"source {path}: {error}; give the module's source tree.") from None
        conf = self.files.get("dkms.conf", b"").decode("utf-8", "replace")
        found = re.search(r'^PACKAGE_VERSION="?([A-Za-z0-9._+-]+)"?', conf, re.MULTILINE)
        if not found or not re.search(r'^PACKAGE_NAME="?sockmi"?', conf, re.MULTILINE):
            raise _module.WrongValue(
                f"source {path} has no dkms.conf of SockMi; give the folder or the archive that "
                "`make -C kmod dkms-tree` or `make wheelhouse` makes."
            )
        self.version = found[1]

    def _archived(self) -> dict[str, bytes]:
        files = {}
        with tarfile.open(self.path) as archive:
            for entry in archive.getmembers():
                parts = Path(entry.name).parts
                if entry.isdir():
                    continue
                if not entry.isfile() or ".." in parts or entry.name.startswith("/"):
                    raise _module.WrongValue(f"source {self.path}: {entry.name} does not belong into it.")
                content = archive.extractfile(entry)
                files["/".join(parts)] = content.read() if content else b""
        return files

    def _folder(self) -> dict[str, bytes]:
        if not self.path.is_dir():
            raise FileNotFoundError("there is no such file or folder")
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    @property
    def digest(self) -> str:
        """SHA-256 of names and contents."""
        summed = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            summed.update(f"{len(name)}:{name}{len(content)}:".encode())
            summed.update(content)
        return summed.hexdigest()

    def write(self, folder: Path) -> None:
        """Put it there, in the place of what is there."""
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, content in self.files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


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

    def run(self) -> None:
        """Look, do, report."""
        if not re.fullmatch(r"[A-Za-z0-9._+~-]+", self.kernel):
            raise _module.WrongValue(f"kernel is {self.kernel!r}; give a release as `uname -r` says it.")
        wanted = self._wanted_parameters()
        try:
            before = self._now()
            if self.state in ("loaded", "built"):
                self._build()
            self._parameters(wanted)
            self._boot()
            if self.state == "loaded":
                self._load()
            elif self.state in ("unloaded", "absent"):
                self._unload()
            if self.state == "absent":
                self._remove()
        except Obstacle as obstacle:
            self.module.fail_json(
                msg=f"{obstacle} {obstacle.row['mend']}",
                kernel=self.kernel,
                obstacles=[obstacle.row],
            )
        after = self._predicted(before) if self.module.check_mode else self._now()
        result: dict[str, Any] = {
            "changed": bool(self.actions),
            "kernel": self.kernel,
            "version": after["version"],
            "built": after["built"],
            "loaded": after["loaded"],
            "reload_needed": self.reload_needed,
            "users": _users(),
            "actions": self.actions,
            "obstacles": [],
        }
        if self.reload_needed:
            self.module.warn(
                "The loaded module is not the one that is installed now, or has other parameters, but is in "
                f"use ({self._dependents()}). It is replaced at the next boot, or when this is run with "
                "nothing depending on it."
            )
        if self.module._diff:
            result["diff"] = {"before": _module.pretty(before), "after": _module.pretty(after)}
        self.module.exit_json(**result)

    # -- what is there

    def _versions(self) -> dict[str, bool]:
        """Versions that DKMS knows, and whether each is installed for the kernel."""
        if not self.module.get_bin_path("dkms"):
            return {}
        _code, out, _err = self.module.run_command(["dkms", "status", "-m", NAME])
        found: dict[str, bool] = {}
        for line in out.splitlines():
            match = re.match(r"sockmi(?:/|, )([^,:\s]+)(?:, ([^,:\s]+))?.*: *(\w+)", line)
            if match:
                here = match[2] == self.kernel and match[3] == "installed"
                found[match[1]] = found.get(match[1], False) or here
        return found

    def _now(self) -> dict[str, Any]:
        versions = self._versions()
        installed = [version for version, here in versions.items() if here]
        return {
            "version": (installed or sorted(versions) or [None])[-1],
            "built": bool(installed),
            "loaded": LOADED.is_dir(),
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
                after["parameters"] = self._wanted_parameters() or {}
            elif action in ("at boot", "not at boot"):
                after["at_boot"] = action == "at boot"
        return after

    # -- building

    def _build(self) -> None:
        source = Source(Path(self.params["source"])) if self.params["source"] else None
        versions = self._versions()
        if source is None and not versions:
            if not self.module.get_bin_path("dkms"):
                raise Obstacle("no-dkms", "There is no dkms here.", "Install the package dkms.")
            raise _module.WrongValue("DKMS has no module sockmi yet; give source, its source tree.")
        version = source.version if source else sorted(versions)[-1]
        folder = SOURCES / f"{NAME}-{version}"
        fresh = source is not None and (version not in versions or _digest(folder) != source.digest)
        if not fresh and versions.get(version):
            return
        self._obstacles()
        if fresh and version in versions:
            self._dkms("remove", version, "--all")
        if fresh:
            if source is not None and not self.module.check_mode:
                source.write(folder)
            self._dkms("add", version)
        self._dkms("build", version, "-k", self.kernel)
        self._dkms("install", version, "-k", self.kernel, "--force")
        for old in versions:
            if old != version:
                self._dkms("remove", old, "--all")
                if not self.module.check_mode:
                    shutil.rmtree(SOURCES / f"{NAME}-{old}", ignore_errors=True)

    def _dkms(self, verb: str, version: str, *words: str) -> None:
        self.actions.append(f"{verb} {version}")
        if self.module.check_mode:
            return
        code, out, err = self.module.run_command(["dkms", verb, "-m", NAME, "-v", version, *words])
        if code == 0:
            return
        log = Path(f"/var/lib/dkms/{NAME}/{version}/build/make.log")
        made = log.read_text(errors="replace") if verb == "build" and log.exists() else err or out
        lines = [line for line in made.splitlines() if line.strip()]
        # The compiler's or the linker's, of which the first says most; not those of make that follow from it.
        causes = [line for line in lines if re.search(r"\berror: ", line, re.IGNORECASE)]
        told = causes[:3] or lines[-3:]
        raise Obstacle(
            "build-failed",
            f"dkms {verb} of sockmi {version} for Linux {self.kernel} ended with {code}: "
            f"{' | '.join(told).strip(' .')}.",
            f"See {log}; the kernel may be newer than this release of SockMi."
            if verb == "build"
            else "See `dkms status -m sockmi`; state=absent removes what is there, and it can be built anew.",
        )

    def _obstacles(self) -> None:
        """Raise Obstacle for what would make the build, or loading it, fail."""
        found = re.match(r"(\d+)\.(\d+)", self.kernel)
        number = (int(found[1]), int(found[2])) if found else (0, 0)
        if number < OLDEST:
            raise Obstacle(
                "old-kernel", f"Linux {self.kernel} is too old.", "The module needs Linux 6.1 or later."
            )
        if number >= UNKNOWN:
            raise Obstacle(
                "unknown-kernel",
                f"The module does not know Linux {self.kernel}.",
                "Get a newer release of SockMi.",
            )
        for program, package in (("dkms", "dkms"), ("make", "make"), ("gcc", "gcc")):
            if not self.module.get_bin_path(program):
                raise Obstacle(
                    f"no-{program}", f"There is no {program} here.", f"Install the package {package}."
                )
        if not Path(f"/lib/modules/{self.kernel}/build/Makefile").exists():
            package = (
                f"kernel-devel-{self.kernel}"
                if self.module.get_bin_path("rpm")
                else f"linux-headers-{self.kernel}"
            )
            raise Obstacle(
                "no-headers",
                f"There are no headers of Linux {self.kernel} here.",
                f"Install the package {package}.",
            )

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

    def _parameters(self, wanted: dict[str, str] | None) -> None:
        if self.state == "absent":
            if MODPROBE.exists():
                self._file(MODPROBE, None, "parameters")
            return
        if wanted is None:
            return
        if wanted != _configured():
            words = "".join(f" {name}={value}" for name, value in sorted(wanted.items()))
            text = (
                f"# Managed by Ansible (sockmi.appliance.kmod).\noptions sockmi{words}\n" if wanted else None
            )
            self._file(MODPROBE, text, "parameters")
        if self.state != "loaded" or not LOADED.is_dir():
            return
        for name, value in sorted(wanted.items()):
            file = LOADED / "parameters" / name
            if not file.exists() or file.read_text().strip() in (value, {"1": "Y", "0": "N"}.get(value)):
                continue
            if file.stat().st_mode & 0o200 == 0:
                self.reload_needed = True
                continue
            self.actions.append(f"set {name}={value}")
            if not self.module.check_mode:
                try:
                    file.write_text(value)
                except OSError as error:
                    raise _module.WrongValue(
                        f"parameters: {name}={value}: {error.strerror}; see `modinfo -p sockmi`."
                    ) from None

    def _boot(self) -> None:
        wanted = self.params["at_boot"]
        if wanted is None:
            wanted = {"loaded": True, "absent": False}.get(self.state)
        if self.state == "loaded" and self.kernel != self.running and self.params["at_boot"] is None:
            wanted = None
        if wanted is not None and wanted != AT_BOOT.exists():
            self._file(AT_BOOT, AT_BOOT_TEXT if wanted else None, "at boot" if wanted else "not at boot")

    def _file(self, path: Path, text: str | None, action: str) -> None:
        self.actions.append(action)
        if self.module.check_mode:
            return
        if text is None:
            path.unlink()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=str(path.parent))
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(fresh).chmod(0o644)
        Path(fresh).rename(path)

    # -- loading

    def _load(self) -> None:
        if self.kernel != self.running:
            return
        if LOADED.is_dir():
            if not self._stale() and not self.reload_needed:
                return
            if _users():
                self.reload_needed = True
                return
            self._change("unload")
            self.reload_needed = False
        self._may_load()
        self._change("load")

    def _stale(self) -> bool:
        """Whether what is loaded is another build than what is, or will be, installed."""
        if any(action.startswith("install ") for action in self.actions) and self.module.check_mode:
            return True
        installed, file = self._srcversion(), LOADED / "srcversion"
        return bool(installed) and file.exists() and file.read_text().strip() != installed

    def _srcversion(self) -> str:
        """What tells the build installed for the running kernel from others; empty if there is none."""
        _code, out, _err = self.module.run_command(["modinfo", "-k", self.running, "-F", "srcversion", NAME])
        return out.strip()

    def _may_load(self) -> None:
        if _text("/proc/sys/kernel/modules_disabled") == "1":
            raise Obstacle(
                "modules-disabled",
                "kernel.modules_disabled is 1: no module can be loaded.",
                "It takes a reboot without it.",
            )
        lockdown = _text("/sys/kernel/security/lockdown")
        enforced = (
            _text("/sys/module/module/parameters/sig_enforce") == "Y"
            or "[integrity]" in lockdown
            or "[confidentiality]" in lockdown
        )
        if enforced and not self._enrolled():
            raise Obstacle(
                "secure-boot",
                "Secure Boot is on, so the kernel loads only modules whose signer's key is enrolled, and "
                "DKMS's is not.",
                f"Run `mokutil --import {MOK}` (`dkms generate_mok` makes the key), choose a password, "
                "reboot and enroll the key.",
            )

    def _enrolled(self) -> bool:
        tool = self.module.get_bin_path("mokutil")
        if not tool or not MOK.exists():
            return False
        _code, out, _err = self.module.run_command([tool, "--test-key", str(MOK)])
        return "already enrolled" in out

    def _change(self, action: str) -> None:
        """``load`` or ``unload``."""
        self.actions.append(action)
        if self.module.check_mode:
            return
        words = ["modprobe", NAME] if action == "load" else ["modprobe", "-r", NAME]
        if action == "unload" and not self._srcversion():
            words = ["rmmod", NAME]  # loaded by hand (insmod): modprobe knows installed modules only
        code, out, err = self.module.run_command(words)
        if code:
            raise Obstacle(
                f"{action}-failed",
                f"{' '.join(words)} ended with {code}: {(err or out).strip()}.",
                "See the kernel's log (journalctl -k).",
            )

    def _unload(self) -> None:
        if not LOADED.is_dir():
            return
        if _users() and self.params["force"] and not self.module.check_mode:
            self._flush()
        if _users() and not (self.params["force"] and self.module.check_mode):
            raise Obstacle(
                "in-use",
                f"The module is in use: {self._dependents()}.",
                "Move the connections on, or let them end (sockmi list redirects), and stop what has the "
                "device open (systemctl stop sockmid); force drops redirects, which cuts their "
                "connections off.",
            )
        self._change("unload")

    def _flush(self) -> None:
        """Have the module forget its redirects, of this network namespace."""
        self.actions.append("drop redirects")
        try:
            with DEVICE.open("r+b", buffering=0) as device:
                fcntl.ioctl(device, IOC_HELLO, HELLO.pack(*ABI, *(0,) * 10))
                fcntl.ioctl(device, IOC_NAT_FLUSH, FLUSH.pack(0, 0))
        except OSError as error:
            raise Obstacle(
                "flush-failed",
                f"The module does not drop its redirects: {error.strerror}.",
                "Load a module of this release, or reboot.",
            ) from None

    def _dependents(self) -> str:
        """Who uses the module, in words."""
        holders = []
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if os.readlink(link) == str(DEVICE):  # noqa: PTH115 - not in Python 3.8
                    process = link.parts[2]
                    name = f"{_text(f'/proc/{process}/comm')} ({process})"
                    if name not in holders:
                        holders.append(name)
            except OSError:
                continue
        named = f", the device is open in {', '.join(holders[:NAMES_MAX])}" if holders else ""
        return f"{_users()} users, that is connections that have moved and open devices{named}"

    def _remove(self) -> None:
        for version in self._versions():
            self._dkms("remove", version, "--all")
        for folder in sorted(SOURCES.glob(f"{NAME}-*")):
            if (folder / "dkms.conf").exists():
                self.actions.append(f"delete {folder}")
                if not self.module.check_mode:
                    shutil.rmtree(folder)


def _text(path: str) -> str:
    """The contents of a small file, stripped; "" if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _users() -> int:
    """Users of the loaded module."""
    return int(_text(str(LOADED / "refcnt")) or 0)


def _digest(folder: Path) -> str:
    """Of a source tree; "" if there is none."""
    try:
        return Source(folder).digest
    except _module.WrongValue:
        return ""


def _configured() -> dict[str, str]:
    """Parameters of modprobe.d."""
    found = {}
    for line in _text(str(MODPROBE)).splitlines():
        words = line.split()
        if words[:2] == ["options", NAME]:
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
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    _module.guarded(module, Kmod(module).run)


if __name__ == "__main__":
    main()
