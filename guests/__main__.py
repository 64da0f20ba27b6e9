# SPDX-License-Identifier: MIT
"""``python3 -m guests``: see each command's --help."""

from __future__ import annotations

import sys

from guests.commands import main

sys.exit(main(sys.argv[1:]))
