# SPDX-License-Identifier: MIT
"""DKMS builds, installs and removes the module from its own source tree; what it built works in a guest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.chroot import Chroot
from guests.guest import Guest
from guests.kernels import BUILDERS, DEBIAN_KERNELS
from guests.paths import PROJECT
from guests.work import alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SCRIPT = """
set -eu
release=$1
unknown=8.0.0-1-amd64
cleanup() {
    dkms remove sockmi/1.0 --all >/dev/null 2>&1 || true
    rm -rf /usr/src/sockmi-1.0 "/lib/modules/$unknown"
}
cleanup
trap cleanup EXIT
# As the kernel's own package has done on a host; where no module is listed, DKMS leaves depmod out.
depmod "$release"
dkms add /build/sockmi-1.0
dkms build sockmi/1.0 -k "$release" || { cat /var/lib/dkms/sockmi/1.0/build/make.log; exit 1; }
dkms install sockmi/1.0 -k "$release"
dkms status sockmi/1.0
cp "$(modinfo -k "$release" -F filename sockmi)" /build/
modinfo -k "$release" -F vermagic sockmi
# A kernel that the module does not know is installed: its package runs this, and would fail with it.
mkdir -p "/lib/modules/$unknown"
ln -s "/usr/src/linux-headers-$release" "/lib/modules/$unknown/build"
dkms autoinstall -k "$unknown" 2>&1 && echo "passed over" || echo "failed: $?"
dkms remove sockmi/1.0 --all
echo "left: $(dkms status sockmi/1.0)$(find /lib/modules -name 'sockmi.ko*')"
"""


def test_added_built_installed_removed(
    guests: Callable[..., list[Guest]], kernel: str, tmp_path: Path
) -> None:
    debian = DEBIAN_KERNELS[kernel]
    tree = tmp_path / "build/sockmi-1.0"
    words = ["make", "-C", PROJECT / "kmod", "dkms-tree", f"DKMS_TREE={tree}"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=60)
    chroot = Chroot(debian.suite, (*BUILDERS, "dkms", "kmod", "xz-utils", f"linux-headers-{debian.release}"))
    chroot.make()
    with alone(f"{chroot.folder.name}-dkms"):
        done = subprocess.run(
            ["nice", "-n", "19", *chroot.command(tree.parent, ["sh", "-c", SCRIPT, "dkms", debian.release])],
            capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"{debian.release}, x86_64: installed" in done.stdout
    assert f"\n{debian.release} SMP" in done.stdout
    assert done.stdout.splitlines()[-1] == "left: "
    assert "BUILD_EXCLUSIVE" in done.stdout
    if debian.suite != "bookworm":  # before DKMS 3.0.11 it was an error for all that
        assert "\npassed over\n" in done.stdout

    (built,) = tree.parent.glob("sockmi.ko*")
    (guest,) = guests(1)
    unpack = {".xz": ["xz", "-dk"], ".zst": ["zstd", "-dq"]}.get(built.suffix)
    if unpack:
        subprocess.run([*unpack, built], check=True, timeout=60)
    guest.load(tree.parent / "sockmi.ko")
    assert guest.run("cat /proc/sys/sockmi/export").stdout == "none\n"
    guest.run(["rmmod", "sockmi"])
