# SPDX-License-Identifier: MIT
"""What DKMS has after it has built the module, made at this machine's speed.

An emulated guest needs minutes for each source file, a chroot of its suite one for all. Its DKMS gets the
state of one that has built the same sources for the same kernel, and goes on from there: installs, loads,
removes.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from guests.chroot import Chroot
from guests.errors import HarnessError
from guests.kernels import BUILDERS, DebianKernel
from guests.paths import CACHE, LOGS, PROJECT, digest, room
from guests.work import alone, run

SCRIPT = """
set -eu
release=$1 version=$2
cleanup() { dkms remove "sockmi/$version" --all >/dev/null 2>&1 || true; rm -rf "/usr/src/sockmi-$version"; }
cleanup
trap cleanup EXIT
dkms add "/build/sockmi-$version"
dkms build "sockmi/$version" -k "$release" || { cat "/var/lib/dkms/sockmi/$version/build/make.log"; exit 1; }
# A guest's modules are not compressed, and its DKMS expects the same of what it has built.
find "/var/lib/dkms/sockmi/$version" -name '*.ko.xz' -exec unxz {} +
tar -C / -cf /build/built.tar "usr/src/sockmi-$version" "var/lib/dkms/sockmi/$version"
"""


def built(kernel: DebianKernel, source: Path = PROJECT / "kmod") -> Path:
    """A tar archive for the root of a guest with ``kernel`` and DKMS; made once for the same sources.

    Raises HarnessError with the compiler's messages.
    """
    found = re.search(r'^PACKAGE_VERSION="([^"]+)"', (source / "dkms.conf").read_text(), re.MULTILINE)
    if not found:
        raise HarnessError(f"{source}/dkms.conf has no PACKAGE_VERSION")
    work = room(CACHE / f"dkms/{kernel.folder.name}-{digest(str(source))}")
    tree = work / f"sockmi-{found[1]}"
    chroot = Chroot(kernel.suite, (*BUILDERS, "dkms", "kmod", "xz-utils", f"linux-headers-{kernel.release}"))
    chroot.make()
    with alone(f"{chroot.folder.name}-dkms"):
        subprocess.run(["rm", "-rf", tree], check=True)
        log = LOGS / f"dkms-{kernel.name}.log"
        run(["make", "-C", source, "dkms-tree", f"DKMS_TREE={tree}"], log=log)
        files = sorted(path for path in tree.rglob("*") if path.is_file())
        parts = [part for path in files for part in (str(path.relative_to(tree)), path.read_bytes())]
        archive = work / f"{digest(SCRIPT, *parts)}.tar"
        if not archive.exists():
            run(chroot.command(work, ["sh", "-c", SCRIPT, "dkms", kernel.release, found[1]]), log=log)
            for old in work.glob("*.tar"):
                if old.name != "built.tar":
                    old.unlink()
            (work / "built.tar").rename(archive)
    return archive
