# SPDX-License-Identifier: MIT
"""What has ended since the metrics were last told: a chunk of hundreds is told at once."""

from __future__ import annotations

from collections import Counter

from sockmi.refusal import Code
from sockmi.shell import Shell


class Tally:
    """Counts until ``tell``."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._outcomes: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._shipped_bytes = 0

    def ended(self, outcome: str, refused: Code | str | None = None) -> None:
        """One migration has ended; ``refused``: the code of its refusal."""
        self._outcomes[outcome] += 1
        if refused is not None:
            self._refusals[refused] += 1

    def shipped(self, image_bytes: int) -> None:
        """An image has been sent."""
        self._shipped_bytes += image_bytes

    def tell(self) -> None:
        """Put it all into the metrics, and begin anew."""
        metrics, engine = self._shell.metrics, self._shell.engine.name
        for outcome, count in self._outcomes.items():
            metrics.migrations.labels(direction="export", outcome=outcome, engine=engine).inc(count)
        for code, count in self._refusals.items():
            metrics.refusals.labels(code=code).inc(count)
        if self._shipped_bytes:
            metrics.image_bytes.labels(direction="export").inc(self._shipped_bytes)
        self._outcomes.clear()
        self._refusals.clear()
        self._shipped_bytes = 0
