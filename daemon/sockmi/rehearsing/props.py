# SPDX-License-Identifier: MIT
"""What stands on the stage of a rehearsal for the parts of the daemon that must not notice it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from sockmi.control import Client
from sockmi.engine.owners import Holders, Owners
from sockmi.journal import Change, Journal
from sockmi.movelog import MoveLog
from sockmi.refusal import Refusal

_SOON_S = 0.01


class Later:
    """The loop: what is due soon comes when ``run`` is called, and what is due late (time limits) never."""

    def __init__(self) -> None:
        self._due: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Any:
        """See shell.Loop."""
        if delay < _SOON_S:
            self._due.append((callback, args))
        return self

    def run_in_executor(self, executor: None, func: Callable[..., object], *args: Any) -> Any:
        """See shell.Loop; it has no threads."""
        return self.call_later(0, func, *args)

    def cancel(self) -> None:
        """Of a handle: only time limits are cancelled, and they never come."""

    def run(self) -> None:
        """All that is due soon, and what follows from it."""
        while self._due:
            callback, args = self._due.popleft()
            callback(*args)

    def clear(self) -> None:
        """Nothing is due any more."""
        self._due.clear()


class Unwritten(Journal):
    """The journal: it serializes, and keeps nothing."""

    def __init__(self) -> None:
        """No file."""

    def write(self, change: Change) -> None:
        """See Journal."""
        to_json([change.keep, change.drop, change.audit])


class Uncounted:
    """The metrics, and each of them: whatever is told to them is forgotten."""

    def __getattr__(self, _name: str) -> Uncounted:
        return self

    def __call__(self, *_args: object, **_named: object) -> Uncounted:
        return self


class Untold(MoveLog):
    """The log of what has ended."""

    def append(self, record: dict[str, Any]) -> None:
        """See MoveLog."""


class Ourselves(Owners):
    """The owners of a socket that only this process has: they need not be stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptor = -1

    def find(self, inodes: Iterable[int]) -> Holders:
        """See Owners."""
        return {inode: {os.getpid(): [self.descriptor]} for inode in inodes}

    def descriptors(self, inode: int) -> list[tuple[int, int]]:
        """See Owners."""
        return [(os.getpid(), self.descriptor)]

    def holders(self, inode: int) -> list[int]:
        """See Owners."""
        return []

    def held(self, inodes: Collection[int]) -> set[int]:
        """See Owners."""
        return set(inodes)

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """See Owners."""
        return [None] * len(inodes)

    def resume(self, inodes: Sequence[int]) -> None:
        """See Owners."""


class Taker(Client):
    """An application that waits for a socket; ``taken`` is its descriptor (-1: none yet)."""

    def __init__(self) -> None:
        self.pid, self.uid, self.gid = os.getpid(), 0, 0
        self.closed = False
        self.taken = -1
        self._asked = False

    def respond(self, response: BaseModel | dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """See Client."""
        _line = to_json(response) if isinstance(response, dict) else response.model_dump_json()
        if descriptors:
            self.taken, self._asked = os.dup(descriptors[0]), True

    def is_asked(self) -> bool:
        """Whether it has been sent its descriptor since it was asked this last."""
        asked, self._asked = self._asked, False
        return asked

    def close(self) -> None:
        """See Client."""
        self.closed = True
