# SPDX-License-Identifier: MIT
"""The User-Mode-Linux kernels, built from Debian's source and cached by what they were built from."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guests.archive import Archive
from guests.errors import HarnessError
from guests.module import build
from guests.packages import need
from guests.paths import CACHE, LOGS, PROJECT, digest, room
from guests.work import JOBS, alone, run, say

HERE = Path(__file__).parent
TOOLS = ("gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils", "kmod", "python3")

EDITS = (
    # Counting preemption, which this option needs, needs no preemption.
    (
        "lib/Kconfig.debug",
        "\tdepends on DEBUG_KERNEL\n\tdepends on !ARCH_NO_PREEMPT\n",
        "\tdepends on DEBUG_KERNEL\n",
    ),
    # Frame pointers make the stack traces by which the fault injector keeps to the module.
    ("lib/Kconfig.debug", "STACKTRACE_SUPPORT\n\tdepends on !X86_64\n", "STACKTRACE_SUPPORT\n"),
    # Bytes of a processor's extended state: the source's constant is too small since AMX (11,008 bytes), and
    # then no process starts ("ptrace set fp regs failed, errno = 14").
    ("arch/x86/um/user-offsets.c", "HOST_FP_SIZE, 2696", "HOST_FP_SIZE, 12288"),
)
"""What is changed in the source, and must occur in it once: file, before, after."""


@dataclass(frozen=True)
class UmlKernel:
    """A kernel to build: which source of which suite, with which fragments of configuration."""

    name: str
    suite: str
    source: str  # the package that has the source
    fragments: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is, once built: ``linux`` is the program, and modules are built against the folder."""
        text = "".join((HERE / fragment).read_text() for fragment in self.fragments)
        compiler = subprocess.run(
            ["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True
        ).stdout
        return CACHE / f"{self.name}-{digest(self._version(), text, repr(EDITS), compiler)}"

    def _version(self) -> str:
        return Archive(self.suite).record(self.source)["Version"]

    def unpacked(self) -> Path:
        """The folder with the source."""
        folder = CACHE / f"source-{self._version()}-{digest(repr(EDITS))}"
        with alone(folder.name):
            if folder.exists():
                return folder
            fresh = Path(f"{folder}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            package = Path(f"{folder}.deb")
            Archive(self.suite).unpack([self.source], package)
            say(f"unpacking {self.source}")
            packed = package / f"usr/src/{self.source}.tar.xz"
            unpack: list[str | Path] = ["tar", "-C", room(fresh), "--strip-components=1", "-xf", packed]
            run(unpack, log=LOGS / f"{self.name}-build.log")
            shutil.rmtree(package)
            _edit(fresh)
            fresh.rename(folder)
        return folder

    def build(self) -> Path:
        """The folder of the built kernel; building takes about 15 minutes of CPU, once."""
        need(TOOLS)
        folder = self.folder
        with alone(folder.name):
            if not (folder / "built").exists():
                source = self.unpacked()
                started = time.monotonic()
                say(f"building {self.name} in {folder} (about 15 minutes of CPU, once); log in {LOGS}")
                self._make(source, room(folder))
                (folder / "built").touch()
                say(f"built {self.name} in {time.monotonic() - started:.0f} s")
        return folder

    def module(
        self,
        source: Path = PROJECT / "kmod",
        keep: Path | None = None,
        *,
        strict: bool = False,
        words: Sequence[str] = (),
    ) -> Path:
        """The ``.ko`` of the module in ``source``, built for this kernel (see guests.module.build)."""
        make = ["make", "W=1", "ARCH=um", "-C", str(self.build())]
        return build(
            source,
            self.name,
            lambda where: [*make, f"M={where}", "modules"],
            keep,
            strict=strict,
            words=words,
        )

    def _make(self, source: Path, folder: Path) -> None:
        log = LOGS / f"{self.name}-build.log"
        make = ["make", "ARCH=um", f"O={folder}", "-C", str(source)]
        parts = [HERE / fragment for fragment in self.fragments]
        run([*make, "x86_64_defconfig"], log=log)
        merge = source / "scripts/kconfig/merge_config.sh"
        run([merge, "-m", "-O", folder, folder / ".config", *parts], log=log, cwd=source)
        run([*make, "olddefconfig"], log=log)
        refused = _refused((folder / ".config").read_text(), "".join(part.read_text() for part in parts))
        if refused:
            raise HarnessError(f"{self.name} does not take {', '.join(refused)}: see {HERE} and Kconfig")
        run([*make, f"-j{JOBS}", "linux", "modules"], log=log)


def _edit(source: Path) -> None:
    for name, before, after in EDITS:
        file = source / name
        text = file.read_text()
        if text.count(before) != 1:
            raise HarnessError(
                f"{file}: {before.strip()!r} is there {text.count(before)} times, not once: see EDITS"
            )
        file.write_text(text.replace(before, after))


def _refused(config: str, fragments: str) -> list[str]:
    got = set(config.splitlines())
    wanted = [line for line in fragments.splitlines() if line.startswith("CONFIG_")]
    unwanted = [line.split()[1] for line in fragments.splitlines() if line.endswith(" is not set")]
    return [line for line in wanted if line not in got] + [
        f"{name} off" for name in unwanted if any(line.startswith(f"{name}=") for line in got)
    ]


UML_6_1_DEBUG = UmlKernel("uml-6.1-debug", "bookworm", "linux-source-6.1", ("base.config", "debug.config"))
UML_6_1 = UmlKernel("uml-6.1", "bookworm", "linux-source-6.1", ("base.config",))
