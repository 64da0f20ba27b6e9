# SPDX-License-Identifier: MIT
"""The guests' initial RAM disk: busybox, the drivers of the virtual machine, our init and agent."""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from guests.errors import HarnessError
from guests.paths import digest
from guests.work import alone

HERE = Path(__file__).parent / "inside"
BUSYBOX = Path("/bin/busybox")
CARRIED = ("init", "guest-init", "agent.py", "agent.service")


class Initrd:
    """What is in it, for one kernel."""

    def __init__(self, release: str, modules: Path, drivers: Sequence[str]) -> None:
        self.release = release
        self.modules = modules
        self.drivers = drivers

    def _order(self) -> list[Path]:
        """The files of the drivers and of what they depend on, in the order in which they must be loaded."""
        needs: dict[str, tuple[Path, list[Path]]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            name, _unused, rest = line.partition(":")
            path = self.modules / name
            needs[path.stem.replace("-", "_")] = (path, [self.modules / other for other in rest.split()])
        built_in = {
            Path(line).stem.replace("-", "_")
            for line in (self.modules / "modules.builtin").read_text().splitlines()
        }
        order: list[Path] = []
        for driver in self.drivers:
            if driver in built_in:
                continue
            if driver not in needs:
                raise HarnessError(f"kernel {self.release} has no driver {driver}, which a guest boots from")
            path, others = needs[driver]
            order += [other for other in [*reversed(others), path] if other not in order]
        return order

    def make(self, folder: Path) -> Path:
        """The file, in ``folder``, named by what it was made from."""
        order = self._order()
        carried = {name: (HERE / name).read_bytes() for name in CARRIED}
        contents: list[str | bytes] = [
            self.release,
            *map(str, order),
            *carried.values(),
            BUSYBOX.read_bytes(),
        ]
        made = folder / f"initrd-{digest(*contents)}"
        with alone(made.name):
            if not made.exists():
                fresh = Path(f"{made}.{os.getpid()}")
                fresh.write_bytes(gzip.compress(self._archive(order, carried), 1))
                fresh.rename(made)
        return made

    def _archive(self, order: Sequence[Path], carried: dict[str, bytes]) -> bytes:
        archive = Archive()
        for name in ("bin", "dev", "proc", "sys", "root", "modules", "sockmi"):
            archive.folder(name)
        archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
        archive.link("bin/sh", "busybox")
        archive.file("init", carried["init"], 0o755)
        for name, data in carried.items():
            archive.file(f"sockmi/{name}", data, 0o755)
        for path in order:
            archive.file(f"modules/{path.name}", path.read_bytes())
        archive.file("modules/order", "".join(f"{path.name}\n" for path in order).encode())
        return archive.done()


class Archive:
    """A cpio archive in the format that kernels unpack (Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._data += b"\0" * (-len(self._data) % 4)
        self._data += data
        self._data += b"\0" * (-len(self._data) % 4)

    def folder(self, name: str) -> None:
        """An empty folder."""
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, permissions: int = 0o644) -> None:
        """A file; its folder must have been made before."""
        self._entry(name, stat.S_IFREG | permissions, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link; its folder must have been made before."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def done(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self._data)
