# SPDX-License-Identifier: GPL-3.0-or-later
"""Unpacks a bundle of the wheelhouse into a Python environment of its own: no pip, no network, in seconds.

Arguments: the bundle (removed afterwards) and the folder that the release shall be. requirements.txt in the
bundle names each wheel with its SHA-256; others, or a difference, are an error. The folder has the file
`complete` when all is there.
"""

import base64
import configparser
import csv
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

SCRIPT = """#!{python}
import re
import sys
from {module} import {name}
if __name__ == "__main__":
    sys.argv[0] = re.sub(r"(-script\\.pyw|\\.exe)?$", "", sys.argv[0])
    sys.exit({call}())
"""


def checksums(folder):
    """Wheel name and version to SHA-256, from requirements.txt."""
    lines = (folder / "requirements.txt").read_text().splitlines()
    matches = [re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines]
    if not all(matches):
        sys.exit(
            f"{folder}/requirements.txt is damaged: build the wheelhouse again "
            "(python3 scripts/wheelhouse --refresh)"
        )
    return {f"{match[1]}-{match[2]}": match[3] for match in matches}


def place(folder, site, name, metadata):
    """Where a file of a wheel belongs; None: nowhere."""
    data = metadata.replace(".dist-info", ".data/")
    if not name.startswith(data):
        return site / name
    scheme, _unused, rest = name[len(data) :].partition("/")
    roots = {"purelib": site, "platlib": site, "scripts": folder / "bin", "data": folder}
    return roots[scheme] / rest if scheme in roots else None


def unpack(folder, site, file):
    """Put one wheel there."""
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        [record] = [name for name in names if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
        metadata = record.split("/")[0]
        sums = {row[0]: row[1] for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
        for name in names:
            there = place(folder, site, name, metadata)
            if name.endswith("/") or there is None:
                continue
            if folder not in there.resolve().parents:
                sys.exit(f"{file.name}: {name} leads out of the release")
            content = wheel.read(name)
            expected = sums.get(name, "")
            actual = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            if expected and expected != f"sha256={actual}":
                sys.exit(f"{file.name}: {name} is damaged")
            there.parent.mkdir(parents=True, exist_ok=True)
            if there.parent == folder / "bin" and content.startswith(b"#!python"):
                content = b"#!%s" % os.fsencode(folder / "bin/python") + content[len(b"#!python") :]
            there.write_bytes(content)
            if there.parent == folder / "bin":
                there.chmod(0o755)
        points = f"{metadata}/entry_points.txt"
        if points in names:
            commands(folder, wheel.read(points).decode())


def commands(folder, text):
    """Write the commands that a wheel's entry points name."""
    points = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    points.optionxform = str
    points.read_string(text)
    for command, target in points.items("console_scripts") if points.has_section("console_scripts") else ():
        module, _unused, call = target.split(" ")[0].partition(":")
        file = folder / "bin" / command
        first = call.split(".")[0]
        file.write_text(SCRIPT.format(python=folder / "bin/python", module=module, name=first, call=call))
        file.chmod(0o755)


def main():
    """The command."""
    bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.umask(0o022)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(bundle) as archive:
        for entry in archive:
            if not (entry.isfile() or entry.isdir() or entry.issym()) or ".." in Path(entry.name).parts:
                sys.exit(f"{bundle}: {entry.name} does not belong there")
        archive.extractall(folder)  # noqa: S202 - looked at above
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python3*/site-packages")
    sums = checksums(folder)
    for file in sorted((folder / "wheels").glob("*.whl")):
        known = sums.pop("-".join(file.name.split("-")[:2]), None)
        if known != hashlib.sha256(file.read_bytes()).hexdigest():
            sys.exit(f"{file.name} is not the wheel that requirements.txt names")
        unpack(folder, site, file)
    if sums:
        sys.exit(f"{bundle} lacks {', '.join(sums)}")
    shutil.rmtree(folder / "wheels")
    (folder / "complete").touch()
    bundle.unlink()


try:
    main()
except (tarfile.TarError, zipfile.BadZipFile) as error:
    sys.exit(
        f"{sys.argv[1]} is damaged ({error}); build the wheelhouse again "
        "(python3 scripts/wheelhouse --refresh)"
    )
except OSError as error:
    sys.exit(f"{error.filename or sys.argv[2]}: {error.strerror or error}; the release was not installed")
