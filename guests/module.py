# SPDX-License-Identifier: MIT
"""Builds the kernel module, or a throw-away one, outside the tree: one folder per kernel and source."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from guests.errors import HarnessError
from guests.paths import CACHE, LOGS, PROJECT, digest, room
from guests.work import JOBS, alone, run

SHARED = ("daemon/libsockmi",)
"""Folders whose sources the module shares; they keep their place relative to kmod/."""

SOURCES = (".c", ".h", ".S", ".py", ".lds")

_WARNING = re.compile(r"warning:|error:|^WARNING: modpost")


def stage(source: Path, into: Path) -> None:
    """Make ``into`` hold the sources below ``source``; unchanged files keep their times, for make's sake."""
    wanted = {
        path.relative_to(source): path
        for path in source.rglob("*")
        if path.is_file()
        and (path.suffix in SOURCES or path.name in ("Kbuild", "Makefile") or path.suffix == ".mk")
        if not path.name.endswith(".mod.c")
    }
    for path in into.rglob("*"):
        known = path.suffix in SOURCES and not path.name.endswith(".mod.c")
        if known and path.is_file() and path.relative_to(into) not in wanted:
            path.unlink()
    for name, path in wanted.items():
        copy = into / name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            room(copy.parent)
            shutil.copyfile(path, copy)


def build(
    source: Path,
    kernel: str,
    make: Callable[[Path], Sequence[str | Path]],
    keep: Path | None = None,
    *,
    strict: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """Build the module in the folder ``source`` for the kernel called ``kernel``; its ``.ko``.

    ``make`` gives the command that builds the folder it is given. With ``keep`` the module is copied there,
    so that a build of someone else cannot change it. ``strict`` builds everything anew, and a warning is an
    error. ``words``: more ones for make. Raises HarnessError with the compiler's messages.
    """
    source = source.resolve()
    if not any((source / name).exists() for name in ("Kbuild", "Makefile")):
        raise HarnessError(f"{source} has no Kbuild or Makefile: nothing to build a module from")
    work = room(CACHE / f"modules/{kernel}/{source.name}-{digest(str(source), *words)}")
    log = LOGS / f"module-{source.name}-{kernel}.log"
    with alone(f"module-{work.parent.name}-{work.name}"):
        if strict:
            shutil.rmtree(work)
        stage(source, room(work / source.name))
        for shared in SHARED if source == PROJECT / "kmod" else ():
            stage(PROJECT / shared, room(work / shared))
        log.unlink(missing_ok=True)
        run([*make(work / source.name), *words, f"-j{JOBS}"], log=log, limit=1800)
        warnings = [line for line in log.read_text(errors="replace").splitlines() if _WARNING.search(line)]
        if strict and warnings:
            raise HarnessError(
                f"{source} builds for {kernel} with warnings; see {log}:\n" + "\n".join(warnings)
            )
        modules = sorted((work / source.name).glob("*.ko"))
        if len(modules) != 1:
            raise HarnessError(f"{source} made {len(modules)} modules, not one: see {log}")
        if keep is None:
            return modules[0]
        return Path(shutil.copyfile(modules[0], keep / modules[0].name))
