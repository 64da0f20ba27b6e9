# SPDX-License-Identifier: MIT
"""Whether KVM works here. /dev/kvm being there says little: it is tried, once per boot of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from guests.child import bound
from guests.paths import CACHE, digest, room
from guests.work import alone, say

TRIAL = 20  # seconds
# cmpxchg16b as QEMU 7.2's TCG translates it corrupts the slab allocator of 6.12 and later.
TCG = ("-accel", "tcg,thread=multi,tb-size=128", "-cpu", "Nehalem,-cx16")
KVM = ("-accel", "kvm", "-cpu", "host")


def accelerator(kernel: Path, initrd: Path) -> tuple[str, ...]:
    """QEMU's options for the fastest accelerator with which ``kernel`` gets as far as our init.

    ``SOCKMI_ACCELERATOR`` may be set to ``tcg`` or ``kvm`` to skip the trial.
    """
    forced = os.environ.get("SOCKMI_ACCELERATOR")
    if forced in ("tcg", "kvm"):
        return KVM if forced == "kvm" else TCG
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    known = room(CACHE / "kvm") / digest(boot, str(kernel))
    with alone("kvm"):
        if not known.exists():
            works = _trial(kernel, initrd)
            say(f"KVM {'works' if works else 'does not work'} here with {kernel.parent.name}")
            known.write_text("kvm" if works else "tcg")
    return KVM if known.read_text() == "kvm" else TCG


def _trial(kernel: Path, initrd: Path) -> bool:
    words = [
        *bound(), "qemu-system-x86_64", *KVM, "-m", "256",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
        "-serial", "stdio",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            words, capture_output=True, stdin=subprocess.DEVNULL, timeout=TRIAL, check=False
        )
    except subprocess.TimeoutExpired as late:
        return b"sockmi-harness: no disk" in (late.stdout or b"")
    return b"sockmi-harness: no disk" in done.stdout
