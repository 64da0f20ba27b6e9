# SPDX-License-Identifier: MIT
"""What is here of sockets that came, and who owns which part of it."""

from __future__ import annotations

from sockmi.import_lists import ImportLists
from sockmi.importing.copies import Copies
from sockmi.importing.images import Images
from sockmi.importing.room import Room
from sockmi.placing import Placing
from sockmi.protocol.context import Capacity
from sockmi.shell import Shell


class Stock:
    """The copies, their images in the spool, the lists of what waits and who waits, the room for more."""

    def __init__(self, shell: Shell, placing: Placing, capacity: Capacity) -> None:
        self.copies = Copies(shell, placing)
        self.images = Images(shell)
        self.lists = ImportLists({})
        self.room = Room(shell, self.lists, capacity)
