# SPDX-License-Identifier: MIT
"""Migrations that were asked for together, and who waits for their outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sockmi.exporting.export import Export
from sockmi.protocol.records import BatchId
from sockmi.refusal import Refusal

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batch:
    """``done`` gets all the records once, ``progress`` each as it ends.

    ``looking``: at its sockets; ``called_off``: why none of them shall go, whatever is seen.
    ``waiting``: exports whose holders are being looked for. ``open_ids``: under how many ids it is open;
    what waited in the queue of one of its listeners has a batch id of its own.
    """

    done: Callable[[list[dict[str, Any]]], None]
    progress: Callable[[dict[str, Any]], None] | None
    records: list[dict[str, Any]] = field(default_factory=list)
    open_ids: int = 0
    waiting: list[Export] = field(default_factory=list)
    looking: bool = False
    called_off: Refusal | None = None

    def tell_progress(self, record: dict[str, Any]) -> None:
        """One of its migrations has ended."""
        if self.progress is not None:
            _tell(self.progress, record)

    def tell_done(self) -> None:
        """All of them have."""
        _tell(self.done, self.records)


class Batches:
    """Those that are not over. ``open`` stands beside its inverse, ``close``."""

    def __init__(self) -> None:
        self._open: dict[BatchId, Batch] = {}

    def __contains__(self, batch_id: BatchId) -> bool:
        """Whether some migration of the batch has no outcome yet."""
        return batch_id in self._open

    def get(self, batch_id: BatchId) -> Batch | None:
        """None: it is over, or an earlier daemon's."""
        return self._open.get(batch_id)

    def all(self) -> list[tuple[BatchId, Batch]]:
        """Each id with its batch."""
        return list(self._open.items())

    def open(self, batch_id: BatchId, batch: Batch) -> None:
        """Have it known by one more id."""
        batch.open_ids += 1
        self._open[batch_id] = batch

    def close(self, batch_id: BatchId) -> None:
        """All that has this id has its outcome; with the last id the batch is over."""
        batch = self._open.pop(batch_id, None)
        if batch is None:
            return
        batch.open_ids -= 1
        if batch.open_ids == 0:
            batch.tell_done()


def _tell(hearer: Callable[[Any], None], news: Any) -> None:
    """What became of migrations is so, whether or not it can be told."""
    try:
        hearer(news)
    except Exception:
        _log.exception("the outcome of an export could not be told to whoever asked for it")
