# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Source trees of the SockMi kernel module; private to this collection."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

from ansible_collections.sockmi.appliance.plugins.module_utils._module import WrongValue


class Source:
    """A source tree: a folder, or the contents of a tar archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.files = self._archived() if path.is_file() else self._folder()
        except (OSError, tarfile.TarError) as error:
            raise WrongValue(f"source {path}: {error}; give the module's source tree.") from None
        conf = self.files.get("dkms.conf", b"").decode("utf-8", "replace")
        found = re.search(r'^PACKAGE_VERSION="?([A-Za-z0-9._+-]+)"?', conf, re.MULTILINE)
        if not found or not re.search(r'^PACKAGE_NAME="?sockmi"?', conf, re.MULTILINE):
            raise WrongValue(
                f"source {path} has no dkms.conf of SockMi; give the folder or the archive that "
                "`make -C kmod dkms-tree` or `make wheelhouse` makes."
            )
        self.version = found[1]

    def _archived(self) -> dict[str, bytes]:
        files = {}
        with tarfile.open(self.path) as archive:
            for entry in archive.getmembers():
                parts = Path(entry.name).parts
                if entry.isdir():
                    continue
                if not entry.isfile() or ".." in parts or entry.name.startswith("/"):
                    raise WrongValue(f"source {self.path}: {entry.name} does not belong into it.")
                content = archive.extractfile(entry)
                files["/".join(parts)] = content.read() if content else b""
        return files

    def _folder(self) -> dict[str, bytes]:
        if not self.path.is_dir():
            raise FileNotFoundError("there is no such file or folder")
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    @property
    def digest(self) -> str:
        """SHA-256 of names and contents."""
        summed = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            summed.update(f"{len(name)}:{name}{len(content)}:".encode())
            summed.update(content)
        return summed.hexdigest()

    def write(self, folder: Path) -> None:
        """Put it there, in the place of what is there."""
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, content in self.files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def digest(folder: Path) -> str:
    """Of a source tree; "" if there is none."""
    try:
        return Source(folder).digest
    except WrongValue:
        return ""
