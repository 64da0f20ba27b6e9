# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What keeps the SockMi kernel module from being built, loaded or unloaded; private to this collection."""

from __future__ import annotations


class Obstacle(Exception):
    """Something stands in the way; the text is the sentence, ``mend`` what to do."""

    def __init__(self, code: str, message: str, mend: str) -> None:
        super().__init__(message)
        self.row = {"code": code, "message": message, "mend": mend}
