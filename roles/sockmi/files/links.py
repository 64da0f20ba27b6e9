# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes symbolic links: {"link": "target"} as JSON in the first argument; --check only says what would be.

A link whose target is null is removed, if it is a link. Prints the links that changed, as a JSON list.
"""

import json
import os
import sys
from pathlib import Path


def main():
    """Make them."""
    check = "--check" in sys.argv[2:]
    changed = []
    for name, target in json.loads(sys.argv[1]).items():
        link = Path(name)
        # readlink(2), as Path.readlink is not in Python 3.8.
        now = os.readlink(name) if link.is_symlink() else None  # noqa: PTH115
        if now == target:
            continue
        if now is None and link.exists():
            sys.exit(f"{name} is there, and no link of ours: move it away")
        changed.append(name)
        if check:
            continue
        if now is not None:
            link.unlink()
        if target is not None:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
    print(json.dumps(changed))


try:
    main()
except OSError as error:
    sys.exit(f"{error.filename}: {error.strerror}; the links of SockMi's commands and manual go there")
