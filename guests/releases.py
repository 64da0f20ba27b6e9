# SPDX-License-Identifier: MIT
"""The module as other releases might have it: today's sources, another device interface in their header.

``kmod/uapi/sockmi.h`` says what a release of the same major may do: add ordinals, members, flags. So the
``older`` one has not what came after minor 1, each struct of the ``newer`` one has grown by a member, and the
``foreign`` one has the next major. What a release does beside its interface is today's in all of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from guests.errors import HarnessError
from guests.paths import CACHE, LOGS, PROJECT, digest
from guests.work import alone, run

_HEADER = Path("uapi/sockmi.h")
_FIRST_MINOR = 1  # beyond which sockmi.h says what each minor has added


def _replaced(text: str, pattern: str, by: str | Callable[[re.Match[str]], str]) -> str:
    """Every match of ``pattern`` replaced; HarnessError if there is none."""
    changed, count = re.subn(pattern, by, text, flags=re.MULTILINE)
    if not count:
        raise HarnessError(f"kmod/{_HEADER} has nothing like {pattern!r}: see guests/releases.py")
    return changed


def _raised(text: str, name: str) -> str:
    """``SOCKMI_DEV_ABI_...`` raised by one."""
    pattern = rf"^(#define SOCKMI_DEV_ABI_{name}) (\d+)$"
    return _replaced(text, pattern, lambda match: f"{match[1]} {int(match[2]) + 1}")


def _older(text: str) -> str:
    text = _replaced(text, r"^(#define SOCKMI_DEV_ABI_MINOR) \d+$", rf"\1 {_FIRST_MINOR}")
    # An unknown flag is an error, and so is none of them known.
    return _replaced(text, r"^(#define SOCKMI_COMMIT_\w+) .*$", r"\1 0")


def _newer(text: str) -> str:
    text = _replaced(
        _raised(text, "MINOR"), r"^(struct sockmi_ioc_\w+ \{\n[^}]*)", r"\1\t__aligned_u64 later;\n"
    )
    # And a feature that nobody has heard of.
    return _replaced(text, r"^(#define SOCKMI_FEATURE_EXPORT) .*$", r"\1 (1u << 0 | 1u << 31)")


def _foreign(text: str) -> str:
    return _raised(text, "MAJOR")


RELEASES = {"older": _older, "newer": _newer, "foreign": _foreign}


class Kernel(Protocol):
    """What a module can be built for."""

    def module(self, source: Path) -> Path:
        """Its ``.ko``."""


def module(release: str, kernel: Kernel) -> Path:
    """The ``.ko`` of the module of ``release``, from a tree as DKMS gets it."""
    folder = CACHE / f"releases/{release}-{digest(str(PROJECT))}"
    with alone(f"release-{folder.name}"):  # until it is built: another kernel's build makes the tree anew
        shutil.rmtree(folder, ignore_errors=True)
        make: list[str | Path] = ["make", "-C", PROJECT / "kmod", "dkms-tree", f"DKMS_TREE={folder}"]
        run(make, log=LOGS / "releases.log")
        header = folder / _HEADER
        header.write_text(RELEASES[release](header.read_text()))
        return kernel.module(folder)
