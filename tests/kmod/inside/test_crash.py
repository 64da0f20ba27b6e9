# SPDX-License-Identifier: MIT
"""kill -9 of either daemon at each step, where both or one has the kernel engine; as tests/lab/test_crash.py.

The end of a daemon closes its device file: what it had frozen goes on, its dormant copies are discarded. A
host may come back with the other engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.crashpoints import EXPORTER, IMPORTER
from tests.lab.crash_lab import Cluster, Serving, Stages, elements, proved
from tests.lab.scenario import status
from tests.lab.test_crash import UNDECIDED, UNDONE
from tests.lab.test_one_life import MOMENTS, the_importer_dies

# Four daemons that are killed and started again take an emulated guest five minutes for each step. What could
# differ between kernels is the module's, and the other tests have that in each of them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.kernels("uml-6.1-debug")]
#: The kernel thaws after 5 s at most, and the processors of guests are slow.
PATIENT = {"freeze_deadline_s": 5.0}
#: When an application has a copy, dormant or alive.
HANDED = {"hand.sent", "taken.admitted", "taken.activated"}


@dataclass(frozen=True)
class Dying:
    """Connections of two clients, one over IPv4 and one over IPv6, and daemons with these engines."""

    stages: Stages
    engines: dict[str, str]

    @contextmanager
    def __call__(self, directory: Path, crash_at: dict[str, str]) -> Iterator[tuple[Cluster, Serving]]:
        with self.stages("lines", directory, crash_at, "nat", timing=PATIENT, engines=self.engines) as (
            daemons,
            serving,
        ):
            assert {name: status(daemons.lab.host(name))["engine"] for name in self.engines} == self.engines
            serving.clients()
            yield daemons, serving


@pytest.fixture(scope="module", params=["kernel-kernel", "kernel-repair", "repair-kernel"])
def engines(request: pytest.FixtureRequest) -> dict[str, str]:
    """The exporter's and the importer's."""
    return dict(zip("ab", request.param.split("-"), strict=True))


@pytest.fixture(scope="module")
def dying(kernel: str, engines: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dying]:
    """Daemons and servers that stay for as long as no test fails."""
    serial = itertools.count()
    made = Stages(lambda: f"c{kernel.replace('.', '')[-6:]}{next(serial)}", tmp_path_factory)
    yield Dying(made, engines)
    made.close()


@pytest.mark.parametrize("point", [point for point in EXPORTER if point not in UNDONE])
def test_exporter_dies(dying: Dying, tmp_path: Path, point: str) -> None:
    with dying(tmp_path, {"a": point}) as (daemons, serving):
        moving = daemons.drain("a", "b", serving.port)
        daemons.died("a")
        assert moving.ended() is None
        daemons.restart_dead()
        assert not [one for one in elements(daemons.lab.host("a")) if one.name == "hold"]  # at once
        proved(daemons, serving, "a" if point in UNDECIDED else "b")


@pytest.mark.parametrize("point", [point for point in IMPORTER if point not in UNDONE])
def test_importer_dies(dying: Dying, tmp_path: Path, point: str) -> None:
    with dying(tmp_path, {"b": point}) as (daemons, serving):
        moving = daemons.drain("a", "b", serving.port)
        daemons.died("b")
        daemons.restart_dead()
        moving.ended()
        moving.told(proved(daemons, serving, "" if point.startswith("prepare") else "b"))


@pytest.mark.parametrize(("victim", "point"), [("a", "commit.journalled"), ("b", "taken.admitted")])
def test_comes_back_with_the_other_engine(dying: Dying, tmp_path: Path, victim: str, point: str) -> None:
    with dying(tmp_path, {victim: point}) as (daemons, serving):
        moving = daemons.drain("a", "b", serving.port)
        daemons.died(victim)
        config = daemons.daemons[victim].config
        before = dict(config)
        config["engine"] = other = {"kernel": "repair", "repair": "kernel"}[dying.engines[victim]]
        try:
            daemons.restart_dead()
            assert status(daemons.lab.host(victim))["engine"] == other
            moving.ended()
            proved(daemons, serving, "a" if point in UNDECIDED else "b")
        finally:
            config.clear()
            config.update(before)
            daemons.kill(victim)


@pytest.fixture(params=["kernel", "repair"])
def back(request: pytest.FixtureRequest) -> str:
    """The engine that b comes back with: a copy that the module has taken back is alive for neither."""
    return str(request.param)


@pytest.mark.parametrize(
    ("kind", "point", "late"),
    [(kind, point, late) for kind in ("bound", "listening") for point, late in MOMENTS if point in HANDED],
)
def test_one_life(lab: Lab, kind: str, point: str, late: bool, back: str) -> None:
    the_importer_dies(lab, kind, point, late, back, redirect={"modes": ["nat"]}, timing=PATIENT)
