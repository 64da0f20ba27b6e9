# SPDX-License-Identifier: MIT
"""The Ansible module `kmod` with the real DKMS of a Debian system: built, again, in check mode, removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from guests.chroot import Chroot
from guests.kernels import BUILDERS, DEBIAN_KERNELS
from guests.paths import PROJECT
from guests.work import alone
from tests import returned

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class System:
    """A Debian system with DKMS and headers, in which the module runs as it does on a managed host."""

    def __init__(self, chroot: Chroot, build: Path, release: str) -> None:
        self.chroot = chroot
        self.build = build
        self.release = release

    def run(self, *, check: bool = False, **options: Any) -> dict[str, Any]:
        """The module's result."""
        flags = {"_ansible_check_mode": check, "_ansible_diff": True}
        arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {"kernel": self.release, **options, **flags}})
        module = "ansible_collections.sockmi.appliance.plugins.modules.kmod"
        command = ["env", "PYTHONPATH=/build/python", "python3", "-m", module]
        done = subprocess.run(
            ["nice", "-n", "19", *self.chroot.command(self.build, command)],
            input=arguments, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        assert not returned.differences("kmod", result)
        return result

    def installed_version(self) -> str:
        """Of the module that modprobe would load."""
        # Where the kernel's own package has listed no modules, as here, DKMS leaves depmod out.
        script = 'depmod "$0" && modinfo -k "$0" -F version sockmi'
        command = self.chroot.command(self.build, ["sh", "-c", script, self.release])
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()


def test_built_once_predicted_and_removed(kernel: str, tmp_path: Path) -> None:
    debian = DEBIAN_KERNELS[kernel]
    build = tmp_path / "build"
    words = ["make", "-C", PROJECT / "kmod", "dkms-tree", f"DKMS_TREE={build / 'tree'}"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=60)
    plugins = build / "python/ansible_collections/sockmi/appliance/plugins"
    shutil.copytree(PROJECT / "plugins/modules", plugins / "modules")
    shutil.copytree(PROJECT / "plugins/module_utils", plugins / "module_utils")
    installed = Path(sysconfig.get_path("purelib"))
    for name in ("module_utils", "_internal", "_vendor"):
        if (installed / "ansible" / name).is_dir():
            shutil.copytree(installed / "ansible" / name, build / "python/ansible" / name)
    for name in ("__init__.py", "release.py"):
        shutil.copy(installed / "ansible" / name, build / "python/ansible")
    chroot = Chroot(debian.suite, (*BUILDERS, "dkms", "kmod", "xz-utils", f"linux-headers-{debian.release}"))
    chroot.make()
    with alone(f"{chroot.folder.name}-dkms"):
        system = System(chroot, build, debian.release)
        system.run(state="absent")
        predicted = system.run(check=True, state="built", source="/build/tree")
        assert predicted["actions"] == ["add 1.0", "build 1.0", "install 1.0"], predicted
        assert not (chroot.folder / "usr/src/sockmi-1.0").exists()

        built = system.run(
            state="built", source="/build/tree", at_boot=True, parameters={"list_max": "1,2,3"}
        )
        assert built["changed"] is True, built
        assert (built["version"], built["built"]) == ("1.0", True)
        assert built["actions"][:3] == predicted["actions"]
        assert list((chroot.folder / "lib/modules" / debian.release).rglob("sockmi.ko*"))
        assert "options sockmi list_max=1,2,3" in (chroot.folder / "etc/modprobe.d/sockmi.conf").read_text()
        again = system.run(
            state="built", source="/build/tree", at_boot=True, parameters={"list_max": "1,2,3"}
        )
        assert (again["changed"], again["actions"]) == (False, [])

        (build / "tree/uapi/note.h").write_text("/* other contents */\n")
        upgrade = system.run(state="built", source="/build/tree")
        assert upgrade["actions"] == ["remove 1.0", "add 1.0", "build 1.0", "install 1.0"], upgrade
        for name in ("dkms.conf", "main.c"):
            file = build / "tree" / name
            file.write_text(
                file.read_text()
                .replace('VERSION="1.0"', 'VERSION="1.1"')
                .replace('VERSION("1.0")', 'VERSION("1.1")')
            )
        release = system.run(state="built", source="/build/tree")
        assert release["actions"] == ["add 1.1", "build 1.1", "install 1.1", "remove 1.0"], release
        assert (release["version"], release["built"]) == ("1.1", True)
        assert system.installed_version() == "1.1"
        assert not (chroot.folder / "usr/src/sockmi-1.0").exists()
        assert system.run(state="built", source="/build/tree")["changed"] is False

        whole = (build / "tree/main.c").read_text()
        (build / "tree/main.c").write_text("#error broken on purpose\n")
        broken = system.run(state="built", source="/build/tree")
        assert broken["failed"] is True
        assert broken["obstacles"][0]["code"] == "build-failed"
        assert "broken on purpose" in broken["msg"]
        back = ["remove 1.1", "add 1.1", "build 1.1", "install 1.1"]
        assert (broken["changed"], broken["actions"]) == (True, ["remove 1.1", "add 1.1", *back])
        missing = system.run(state="built", kernel="6.1.0-nowhere", source="/build/tree")
        assert missing["obstacles"][0]["code"] == "no-headers"
        assert "linux-headers-6.1.0-nowhere" in missing["msg"]

        # As the RHEL family has them before the kernel itself is installed: without the link in /lib/modules.
        link = chroot.folder / "lib/modules" / debian.release / "build"
        devel = chroot.folder / "usr/src/kernels" / debian.release
        target = link.readlink()
        devel.parent.mkdir(exist_ok=True)
        devel.symlink_to(Path("/usr/src", target.name))  # the link may be a relative one
        link.unlink()
        try:
            system.run(state="absent")
            assert not (chroot.folder / "etc/modules-load.d/sockmi.conf").exists()
            assert system.run(state="absent", at_boot=True)["changed"] is False
            (build / "tree/main.c").write_text(whole)
            built = system.run(state="built", source="/build/tree")
            assert built.get("built") is True, built
        finally:
            link.symlink_to(target)
            shutil.rmtree(devel.parent)

        removed = system.run(state="absent")
        assert removed["changed"] is True
        assert (removed["version"], removed["built"]) == (None, False)
        assert system.run(state="absent")["changed"] is False
        assert not list((chroot.folder / "lib/modules" / debian.release).rglob("sockmi.ko*"))
