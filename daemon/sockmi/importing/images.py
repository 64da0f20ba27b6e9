# SPDX-License-Identifier: MIT
"""The images of copies in the spool, and how long each chunk is kept there."""

from __future__ import annotations

import logging
from collections.abc import Collection
from uuid import UUID

from sockmi.importing.copies import Copy
from sockmi.protocol.records import ChunkId, MigrationId
from sockmi.shell import Shell
from sockmi.spool import SpoolError

_log = logging.getLogger(__name__)


class Images:
    """Owns which copies need their chunk; ``write`` stands beside its inverse, ``drop``."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._needed: dict[str, set[MigrationId]] = {}

    def write(self, chunk: str, copies: Collection[Copy]) -> None:
        """Have all images of a chunk in the spool."""
        self._shell.spool.write(chunk, {copy.candidate.migration_id: copy.image for copy in copies})
        self._needed[chunk] = {copy.migration for copy in copies}

    def drop(self, copy: Copy) -> None:
        """It needs its image no more; the spool's file goes with the last one."""
        left = self._needed.get(copy.chunk)
        if left is not None:
            left.discard(copy.migration)
            if not left:
                del self._needed[copy.chunk]
                self._shell.spool.remove(copy.chunk)

    def needed(self, chunk: str) -> set[MigrationId]:
        """Whose images the spool keeps of a chunk."""
        return self._needed.get(chunk, set())

    def read(self, copy: Copy) -> bytes:
        """Its image again; KeyError, SpoolError or OSError if it is lost."""
        return self._shell.spool.read(copy.chunk)[copy.candidate.migration_id]

    # -- after a restart

    def read_all(self, chunk: str) -> dict[UUID, bytes]:
        """All images of a chunk; nothing if they are lost."""
        try:
            return self._shell.spool.read(chunk)
        except KeyError:
            return {}
        except (SpoolError, OSError) as error:
            _log.error("the images of a chunk are lost: %s", error)
            return {}

    def remember(self, copy: Copy) -> None:
        """An earlier daemon has written it, and it is still needed."""
        self._needed.setdefault(copy.chunk, set()).add(copy.migration)

    def drop_others(self) -> None:
        """What nobody needs is removed."""
        for chunk in self._shell.spool.chunks():
            if chunk not in self._needed:
                self._shell.spool.remove(chunk)


def chunk_name(chunk: ChunkId) -> str:
    """A chunk's name in the spool."""
    return f"{chunk.batch.hex()}-{chunk.number}"


def unreadable(error: Exception) -> str:
    """Why a copy cannot be made from its image, for a refusal."""
    return f"Its image cannot be read from the spool ({error})."
