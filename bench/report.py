# SPDX-License-Identifier: MIT
"""Figures, targets, and how they are printed."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` of all do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * percent / 100) - 1))]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value; ``part`` is the letter of its part, ``unit`` what it is counted in."""

    part: str
    name: str
    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached: ``value`` at most (or at least) ``limit``."""

    part: str
    name: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """NaN (it could not be measured) is not met."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Report:
    """All that one run has found."""

    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, part: str, name: str, value: float, unit: str, note: str = "") -> None:
        """Note a figure, and print it at once: a run takes minutes."""
        figure = Figure(part, name, value, unit, note)
        self.figures.append(figure)
        print(_line(figure), flush=True)

    def aim(
        self, part: str, name: str, value: float, limit: float, unit: str, *, at_least: bool = False
    ) -> None:
        """Compare with a target."""
        self.targets.append(Target(part, name, value, limit, unit, at_least))

    def problem(self, text: str) -> None:
        """Something could not be measured."""
        self.problems.append(text)
        print(f"  ! {text}", flush=True)

    def print_targets(self) -> None:
        """The last part of the table."""
        print("\ntargets")
        for one in self.targets:
            sign = ">=" if one.at_least else "<="
            verdict = "met" if one.met else "NOT MET"
            wanted = f"{sign} {_number(one.limit)} {one.unit}"
            print(f"  ({one.part}) {one.name:<58} {_number(one.value):>12}  {wanted:<18} {verdict}")
        for text in self.problems:
            print(f"  ! {text}")

    def write(self, path: Path, *, quick: bool) -> None:
        """As JSON; values that could not be measured are null."""
        content = {
            "quick": quick,
            "machine": {
                "kernel": platform.release(),
                "python": platform.python_version(),
                "processors": os.cpu_count(),
                "load_1min": os.getloadavg()[0],
            },
            "figures": [_plain(asdict(one)) for one in self.figures],
            "targets": [_plain(asdict(one) | {"met": one.met}) for one in self.targets],
            "problems": self.problems,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(row: dict[str, object]) -> dict[str, object]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()
    }


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _line(figure: Figure) -> str:
    note = f"  {figure.note}" if figure.note else ""
    return f"  ({figure.part}) {figure.name:<58} {_number(figure.value):>12} {figure.unit}{note}"
