# SPDX-License-Identifier: MIT
"""Root file systems of guests, and the disks that carry a checkout and its Python environment into them."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from guests.chroot import debootstrap, host_suite
from guests.packages import need
from guests.paths import CACHE, LOGS, PROJECT, digest
from guests.work import alone, run, say

PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "kmod", "iproute2", "iputils-ping",
    "procps", "nftables", "iptables", "conntrack", "tcpdump", "curl", "iperf3", "nginx-light", "libjansson4",
    "psmisc", "util-linux", "ethtool", "strace",
)  # fmt: skip

MASKED = (
    "systemd-logind.service", "systemd-networkd-wait-online.service", "getty@tty1.service",
    "serial-getty@ttyS0.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "fstrim.timer", "systemd-tmpfiles-clean.timer", "systemd-timesyncd.service",
    "e2scrub_reap.service", "nginx.service",
)  # fmt: skip
"""Units that cost boot time and that no test and no role of ours depends on."""

CARRIED = ("daemon", "guests", "kmod", "lab", "scripts", "tests", "bench", "plugins", "pyproject.toml")
"""What of a checkout goes into a guest."""


@dataclass(frozen=True)
class Image:
    """A root file system of one suite."""

    suite: str
    packages: tuple[str, ...] = PACKAGES

    @property
    def file(self) -> Path:
        """Where it is, once made."""
        return CACHE / f"root-{self.suite}-{digest(*self.packages, *MASKED)}.img"

    def make(self) -> Path:
        """The image; making it takes one to three minutes, once."""
        need(("e2fsprogs",))
        with alone(self.file.name):
            if not self.file.exists():
                say(f"making a root file system of {self.suite}")
                folder = Path(f"{self.file}.new")
                log = LOGS / f"root-{self.suite}.log"
                shutil.rmtree(folder, ignore_errors=True)
                debootstrap(self.suite, self.packages, folder, log)
                _adapt(folder)
                disk(folder, self.file, log, spare=2048)
                shutil.rmtree(folder)
        return self.file


def _adapt(root: Path) -> None:
    """Make it boot without asking anyone."""
    subprocess.run(["chroot", root, "passwd", "-d", "root"], check=True, capture_output=True)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).unlink(missing_ok=True)
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (root / "etc/fstab").write_text("")
    (root / "etc/machine-id").write_text("uninitialized\n")
    (root / "etc/ssh/sshd_config.d/sockmi.conf").write_text("UseDNS no\nPermitRootLogin prohibit-password\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)


def disk(folder: Path, file: Path, log: Path, spare: int) -> None:
    """Make ``file`` an ext4 file system with what is in ``folder`` and ``spare`` MiB of room."""
    used = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True).stdout.split()[0]
    fresh = Path(f"{file}.part")
    fresh.unlink(missing_ok=True)
    size = f"{int(used) * 5 // 4 + spare}M"
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", folder, fresh, size], log=log)
    fresh.rename(file)


def environment_disk() -> Path:
    """A disk with this checkout's .venv. A guest whose root is of the host's suite can use it."""
    venv = PROJECT / ".venv"
    # The cache may be shared by checkouts: each has one such disk.
    ours = f"venv-{host_suite()}-{digest(str(PROJECT))}"
    named = CACHE / f"{ours}-{digest((venv / '.stamp').read_bytes())}.img"
    with alone("venv"):
        if not named.exists():
            for old in CACHE.glob(f"{ours}-*.img"):
                old.unlink()
            disk(venv, named, LOGS / "venv.log", spare=16)
    return named


def checkout_tar(file: Path) -> None:
    """Write this checkout's sources and built libraries to ``file`` as a tar archive."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        skipped = {"__pycache__", ".git", ".build", ".venv", "node_modules", ".hypothesis", ".pytest_cache"}
        return None if skipped & set(Path(entry.name).parts) else entry

    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in CARRIED:
            if (PROJECT / name).exists():
                archive.add(PROJECT / name, name, filter=kept)
