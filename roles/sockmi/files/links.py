# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes symbolic links. JSON in the first argument: `links` ({"link": "target"}), folders `own`, file `made`.

A link is SockMi's if it leads into one of the folders `own`; another, and what is no link, is left as it is:
where one is wanted that is an error, before anything changes. A link whose target is null is removed. The
file names the folders that were made for links, one a line: they go when nothing is left in them.
Prints the links that changed, as a JSON list; --check only says what would be.
"""

import contextlib
import json
import os
import sys
from pathlib import Path


def change(wrong, record):
    """Make and remove links (path to target or None), and the folders for them."""
    made = set(record.read_text().splitlines() if record.exists() else ())
    for link, target in wrong.items():
        if target is not None and not link.parent.is_dir():
            made |= {str(folder) for folder in link.parents if not folder.exists()}
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text("".join(f"{folder}\n" for folder in sorted(made)))
            link.parent.mkdir(parents=True)
        if link.is_symlink():
            link.unlink()
        if target is not None:
            link.symlink_to(target)
    for folder in sorted(made, reverse=True):
        with contextlib.suppress(OSError):  # something is left in it
            Path(folder).rmdir()


def main():
    """Make them."""
    asked = json.loads(sys.argv[1])
    own = tuple(folder.rstrip("/") + "/" for folder in asked["own"])
    wrong = {}
    for name, target in asked["links"].items():
        link = Path(name)
        # readlink(2), as Path.readlink is not in Python 3.8.
        now = os.readlink(name) if link.is_symlink() else None  # noqa: PTH115
        if now == target:
            continue
        if link.exists() if now is None else not now.startswith(own):
            if target is None:
                continue
            sys.exit(f"{name} is there, and no link of ours: move it away")
        wrong[link] = target
    if wrong and "--check" not in sys.argv[2:]:
        change(wrong, Path(asked["made"]))
    print(json.dumps(list(map(str, wrong))))


try:
    main()
except OSError as error:
    sys.exit(f"{error.filename}: {error.strerror}; the links of SockMi's commands and manual go there")
