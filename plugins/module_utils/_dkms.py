# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""DKMS and the SockMi kernel module in it; private to this collection."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sockmi.appliance.plugins.module_utils._module import WrongValue
from ansible_collections.sockmi.appliance.plugins.module_utils._obstacle import Obstacle
from ansible_collections.sockmi.appliance.plugins.module_utils._source import Source, digest

NAME = "sockmi"
OLDEST = (6, 1)
UNKNOWN = (8, 0)
SOURCES = Path("/usr/src")
MODULES = Path("/lib/modules")


class Dkms:
    """DKMS, as to one kernel. What it does it adds to ``actions``; in check mode it does nothing else."""

    def __init__(self, module: AnsibleModule, kernel: str, actions: list[str]) -> None:
        self.module = module
        self.kernel = kernel
        self.actions = actions

    def versions(self) -> dict[str, bool]:
        """Versions that DKMS knows, and whether each is installed for the kernel."""
        return {version: self.kernel in kernels for version, kernels in self._installed().items()}

    def _installed(self) -> dict[str, list[str]]:
        """Versions that DKMS knows, and for which kernels each is installed."""
        if not self.module.get_bin_path("dkms"):
            return {}
        _code, out, _err = self.module.run_command(["dkms", "status", "-m", NAME])
        found: dict[str, list[str]] = {}
        for line in out.splitlines():
            match = re.match(r"sockmi(?:/|, )([^,:\s]+)(?:, ([^,:\s]+))?.*: *(\w+)", line)
            if match:
                kernels = found.setdefault(match[1], [])
                if match[2] and match[3] == "installed":
                    kernels.append(match[2])
        return found

    def source(self) -> Source | None:
        """What it would be built from, if nothing else is given."""
        with contextlib.suppress(ValueError, WrongValue):
            return Source(SOURCES / f"{NAME}-{max(self.versions(), key=in_order)}")
        return None

    def build(self, source: Source | None) -> None:
        """Have it built and installed from ``source``, or else from what DKMS has.

        Raises Obstacle if something stands in the way, WrongValue if there is no source.
        """
        versions = self.versions()
        if source is None and not versions:
            self._examine()  # which matters more
            raise WrongValue("DKMS has no module sockmi yet; give source, its source tree.")
        version = source.version if source else max(versions, key=in_order)
        kernels = self._installed()
        folder = SOURCES / f"{NAME}-{version}"
        fresh = source is not None and (version not in versions or digest(folder) != source.digest)
        if not fresh and versions.get(version):
            return
        self._examine()
        with self._replacing(folder, version) if fresh else contextlib.nullcontext():
            if fresh:
                if source is not None and not self.module.check_mode:
                    source.write(folder)
                self.run("add", version)
            self._build_and_install(version)
        self._follow(kernels, version)

    def _follow(self, before: dict[str, list[str]], version: str) -> None:
        """Have other kernels' modules be of ``version`` too, and forget older ones that none has any more.

        ``before``: what was installed for which kernels. A kernel for which it cannot be built keeps what it
        has, if that is another version, so that the next boot finds a module.
        """
        kept = set()
        for kernel in sorted({name for names in before.values() for name in names} - {self.kernel}):
            other = Dkms(self.module, kernel, self.actions)
            if not (MODULES / kernel).is_dir():
                continue  # it has been removed
            try:
                other._examine()
                other._build_and_install(version)
            except Obstacle as obstacle:
                kept.add(kernel)
                self.module.warn(f"sockmi {version} was not built for Linux {kernel}: {obstacle}")
        for old, kernels in before.items():
            if old == version:
                continue
            if not kept & set(kernels):
                self.run("remove", old, "--all")
                if not self.module.check_mode:
                    shutil.rmtree(SOURCES / f"{NAME}-{old}", ignore_errors=True)
            else:
                for kernel in sorted(set(kernels) - kept):
                    self.run("remove", old, "-k", kernel)

    def _build_and_install(self, version: str) -> None:
        self.run("build", version, "-k", self.kernel, *self._headers_named())
        self.run("install", version, "-k", self.kernel, "--force")

    @contextlib.contextmanager
    def _replacing(self, folder: Path, version: str) -> Iterator[None]:
        """Other sources of a version that is there take its place, or it is put back for its kernels."""
        kernels = self._installed().get(version)
        if kernels is None:
            try:
                yield
            except BaseException:
                if version not in self._installed():  # sources that DKMS does not know would be nobody's
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            return
        with tempfile.TemporaryDirectory() as kept:
            former = Path(kept) / folder.name
            if not self.module.check_mode:
                shutil.copytree(folder, former)
            self.run("remove", version, "--all")
            try:
                yield
            except BaseException:  # a full disk too
                with contextlib.suppress(Obstacle):
                    self.run("remove", version, "--all")
                with contextlib.suppress(Obstacle, OSError):
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(former, folder)
                    self.run("add", version)
                    for kernel in kernels:
                        self.run("build", version, "-k", kernel)
                        self.run("install", version, "-k", kernel, "--force")
                raise

    def remove(self) -> None:
        """Have DKMS forget all versions, and delete their sources."""
        for version in self.versions():
            self.run("remove", version, "--all")
        for folder in sorted(SOURCES.glob(f"{NAME}-*")):
            if (folder / "dkms.conf").exists():
                if not self.module.check_mode:
                    shutil.rmtree(folder)
                self.actions.append(f"delete {folder}")

    def run(self, verb: str, version: str, *words: str) -> None:
        """One command of dkms(8) for ``version``; raises Obstacle with what it said if it fails."""
        code, out, err = 0, "", ""
        if not self.module.check_mode:
            code, out, err = self.module.run_command(["dkms", verb, "-m", NAME, "-v", version, *words])
        if code == 0:
            self.actions.append(f"{verb} {version}")
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

    def _headers(self) -> Path | None:
        """The folder with the kernel's headers, if they are here.

        The link in /lib/modules comes with the kernel. The RHEL family's kernel-devel brings only the folder,
        which a kernel that is still to come may have already.
        """
        linked, devel = MODULES / self.kernel / "build", SOURCES / "kernels" / self.kernel
        return next((folder for folder in (linked, devel) if (folder / "Makefile").exists()), None)

    def _headers_named(self) -> list[str]:
        """What dkms(8) must be told of them: nothing if they are where it looks."""
        folder = self._headers()
        return [] if folder is None or folder.name == "build" else ["--kernelsourcedir", str(folder)]

    def _examine(self) -> None:
        """Raise Obstacle for what would make the build fail."""
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
        if self._headers() is None:
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


def in_order(version: str) -> list[tuple[int, str]]:
    """What versions are sorted by: 1.10 comes after 1.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.+~-]", version)]
