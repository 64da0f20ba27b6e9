# SPDX-License-Identifier: MIT
"""Descriptors of ours for sockets that leave: the daemon has one only while a socket is frozen.

A descriptor of ours keeps a socket open when its owner has closed it: no FIN would go out, and the owner's
epoll would go on reporting it. So it is taken shortly before the freeze, from where the owner has it, and
closed when the original is, or when all goes on as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, Protocol

from sockmi.addresses import FourTuple
from sockmi.diag import Found
from sockmi.engine.base import Kind
from sockmi.engine.closing import close_all
from sockmi.engine.duplicate import Duplicator
from sockmi.engine.listing import bound, listening
from sockmi.engine.owners import ABANDONED, Owners
from sockmi.exporting.export import Export
from sockmi.refusal import Code, Refusal

PASSED_ON = Refusal(
    Code.CHANGED,
    "It is on its way from one process to another, or in one that cannot be seen; try again.",
)


class Findable(Protocol):
    """What the kernel finds a socket by; SocketFacts is one of these. ``tuple``: of a connection."""

    @property
    def inode(self) -> int: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def tuple(self) -> FourTuple | None: ...


class Descriptors:
    """``take`` stands beside its inverse, ``close_ours``."""

    def __init__(self, owners: Owners, find: Callable[[FourTuple], Found | None]) -> None:
        """``find``: the kernel's socket of a connection."""
        self._owners = owners
        self.find = find

    def take(self, exports: Sequence[Export]) -> list[Refusal | None]:
        """A descriptor for each; None, or why there is none.

        Of a socket that is not where it was the kernel is asked; only if it has it is /proc looked through.
        So it is, once, if a caller's rights depend on who has a socket by now.
        """
        if theirs := {export.facts.inode for export in exports if export.selected.caller}:
            self._owners.find(theirs)
        with contextlib.closing(Duplicator()) as duplicator:
            results = [self._take(duplicator, export) for export in exports]
            elsewhere = [
                at
                for at, refusal in enumerate(results)
                if refusal is not None
                and refusal.code is Code.NO_SUCH_SOCKET
                and (exports[at].facts.tuple is None or self._is_known(exports[at].facts))
            ]
            if elsewhere:
                self._owners.find({exports[at].facts.inode for at in elsewhere})
                for at in elsewhere:
                    results[at] = self._take(duplicator, exports[at])
        return results

    def _take(self, duplicator: Duplicator, export: Export) -> Refusal | None:
        refusal = ABANDONED
        for pid, fd in self._owners.descriptors(export.facts.inode):
            try:
                export.selected.descriptor = duplicator.duplicate(pid, fd, export.facts.inode)
                return None
            except Refusal as why_not:
                if why_not.code is not Code.NO_SUCH_SOCKET:
                    refusal = why_not
        return refusal

    def _is_known(self, one: Findable) -> bool:
        found = self.find(one.tuple) if one.tuple else None
        return found is not None and found.inode == one.inode

    def passed_on(self, lost: Sequence[Findable]) -> list[bool]:
        """Of sockets that no process has: whether the kernel has them, as they are on their way between two.

        We must not have them either. Of those that are only bound no kernel before Linux 6.8 says anything.
        """
        kinds = {one.kind for one in lost}
        known = listening() if Kind.LISTENING in kinds else set()
        known |= bound() if Kind.BOUND in kinds else set()
        return [one.inode in known or self._is_known(one) for one in lost]

    def abandoned(self, exports: Sequence[Export]) -> list[Refusal | None]:
        """Of those that are frozen: whether nobody but us has it, as it was closed after ``take``."""
        held = self._owners.held({export.facts.inode for export in exports})
        return [None if export.facts.inode in held else ABANDONED for export in exports]

    def name_passed_on(self, exports: Sequence[Export], results: MutableSequence[Any]) -> None:
        """Refuse otherwise what no process has, we neither, and is not closed for all that."""
        lost = [
            index
            for index, result in enumerate(results)
            if isinstance(result, Refusal) and result.code is Code.NO_SUCH_SOCKET
        ]
        if not lost:
            return
        for index, alive in zip(lost, self.passed_on([exports[index].facts for index in lost]), strict=True):
            if alive:
                results[index] = PASSED_ON


def close_ours(exports: Sequence[Export]) -> None:
    """Close our descriptors, if there are any."""
    close_all([one.selected.descriptor for one in exports if one.selected.descriptor >= 0])
    for export in exports:
        export.selected.descriptor = -1
