# SPDX-License-Identifier: MIT
"""Debian's own kernels: fetched, and made into what a guest boots from and a module is built against."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guests.archive import Archive
from guests.chroot import Chroot, host_suite
from guests.errors import HarnessError
from guests.initrd import Initrd
from guests.module import build
from guests.packages import need
from guests.paths import CACHE, LOGS, PROJECT, room
from guests.work import alone, run, say

# W=1 checks the comments too, by programs in Perl (6.12) and Python (7.2).
BUILDERS = ("gcc", "make", "libc6-dev", "perl", "python3")
# Not C=1: 7.2 takes that back where its scripts/checker-valid.sh says no, which Debian's packages have not.
SPARSE = ("KBUILD_CHECKSRC=1", "CF=-D__CHECK_ENDIAN__")
DKMS = ("dkms", "gcc", "make")
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "ext4")


@dataclass(frozen=True)
class DebianKernel:
    """The newest cloud kernel of a suite."""

    name: str  # as the tests and the command line call it
    suite: str
    flavour: str = "cloud-amd64"

    @property
    def release(self) -> str:
        """As uname -r says it."""
        for package in Archive(self.suite).depends(f"linux-image-{self.flavour}"):
            if found := re.fullmatch(r"linux-image-(\d.*)", package):
                return found[1]
        raise HarnessError(
            f"{self.suite}'s linux-image-{self.flavour} depends on no kernel: look at apt-cache show"
        )

    @property
    def folder(self) -> Path:
        """Where what was made from this kernel is kept."""
        version = Archive(self.suite).record(f"linux-image-{self.flavour}")["Version"]
        return CACHE / f"debian-{self.name}-{version}"

    def prepare(self) -> Path:
        """The folder with ``vmlinuz``, ``modules.img`` and the unpacked ``modules``."""
        need(("kmod", "e2fsprogs", "xz-utils", "zstd", "busybox-static", "dpkg"))
        folder = self.folder
        with alone(folder.name):
            if not (folder / "made").exists():
                self._make(room(folder))
                (folder / "made").touch()
        return folder

    def _make(self, folder: Path) -> None:
        say(f"preparing Debian's kernel {self.release}")
        image = f"linux-image-{self.release}"
        packages = Archive(self.suite).closure(image, r"^linux-(image|binary|modules|base)-\d")
        shutil.rmtree(folder / "image", ignore_errors=True)
        Archive(self.suite).unpack(packages, folder / "image")
        shutil.copy(_only(folder / "image", "vmlinuz*"), folder / "vmlinuz")
        tree = next(path for path in (folder / "image").rglob(f"lib/modules/{self.release}") if path.is_dir())
        log = LOGS / f"kernel-{self.name}.log"
        for suffix, unpack in ((".xz", "unxz"), (".zst", "unzstd --rm -q"), (".gz", "gunzip")):
            find = f"find '{tree}' -name '*.ko{suffix}' -print0 | xargs -0 -r -n 64 {unpack}"
            run(["sh", "-c", find], log=log)
        base = folder / "modules"
        shutil.rmtree(base, ignore_errors=True)
        shutil.move(tree, room(base / "lib/modules") / self.release)
        run(["depmod", "-b", base, self.release], log=log)
        shutil.rmtree(folder / "image")
        megabytes = int(
            subprocess.run(["du", "-sm", base], capture_output=True, text=True, check=True).stdout.split()[0]
        )
        size = f"{megabytes * 5 // 4 + 32}M"
        disk = folder / "modules.img"
        disk.unlink(missing_ok=True)
        contents = base / f"lib/modules/{self.release}"
        run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", contents, disk, size],
            log=log,
        )

    def initrd(self) -> Path:
        """The initial RAM disk that finds the root and the modules of a guest."""
        folder = self.prepare()
        return Initrd(self.release, folder / f"modules/lib/modules/{self.release}", DRIVERS).make(folder)

    def module(
        self, source: Path = PROJECT / "kmod", keep: Path | None = None, *, strict: bool = False
    ) -> Path:
        """The ``.ko`` of the module in ``source``, built for this kernel (see guests.module.build).

        ``strict`` has sparse look at it too.
        """
        make = ["make", "W=1", *(SPARSE if strict else ())]
        if self.suite == host_suite():
            headers = self._headers()
            if strict:
                need(("sparse",))
            return build(
                source,
                self.name,
                lambda where: [*make, "-C", headers, f"M={where}", "modules"],
                keep,
                strict=strict,
            )
        chroot = Chroot(self.suite, (*BUILDERS, "sparse", f"linux-headers-{self.release}"))
        chroot.make()
        headers = Path(f"/usr/src/linux-headers-{self.release}")

        def command(where: Path) -> Sequence[str | Path]:
            return chroot.command(where.parent, [*make, "-C", headers, f"M=/build/{where.name}", "modules"])

        return build(source, self.name, command, keep, strict=strict)

    def _headers(self) -> Path:
        """The headers for building on this machine, whose compiler is the suite's own."""
        need(("gcc", "make", "libelf-dev"))
        folder = self.folder / "headers"
        with alone(f"{self.folder.name}-headers"):
            if not (folder / "made").exists():
                shutil.rmtree(folder, ignore_errors=True)
                package = f"linux-headers-{self.release}"
                Archive(self.suite).unpack(
                    Archive(self.suite).closure(package, r"^linux-(headers|kbuild)-\d"), folder
                )
                # The packages name each other by absolute path.
                for file in (folder / "usr/src").glob("linux-headers-*/Makefile"):
                    file.write_text(file.read_text().replace("/usr/src/", f"{folder}/usr/src/"))
                for link in (folder / "usr/src").glob("linux-headers-*/*"):
                    if link.is_symlink() and str(link.readlink()).startswith("/usr/"):
                        target = Path(f"{folder}{link.readlink()}")
                        link.unlink()
                        link.symlink_to(target)
                (folder / "made").touch()
        return folder / f"usr/src/linux-headers-{self.release}"


def dkms_packages(kernel: DebianKernel) -> tuple[str, ...]:
    """What a guest with ``kernel`` needs to build the module by itself, through DKMS."""
    return (*DKMS, f"linux-headers-{kernel.release}")


def _only(folder: Path, pattern: str) -> Path:
    found = [path for path in folder.rglob(pattern) if path.is_file()]
    if len(found) != 1:
        raise HarnessError(
            f"{folder} has {len(found)} files {pattern}, not one: the packages changed their layout"
        )
    return found[0]


DEBIAN_KERNELS = {
    kernel.name: kernel
    for kernel in (
        DebianKernel("6.1", "bookworm"),
        DebianKernel("6.12", "trixie"),
        DebianKernel("7.2", "sid"),
    )
}
