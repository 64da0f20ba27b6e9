# SPDX-License-Identifier: MIT
"""The protocol in a bad world. A failing seed: ``SOCKMI_SIM_SEED=<seed> pytest tests/simulation``."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from sockmi.protocol import actions, events, messages
from sockmi.protocol.chunks import Chunks
from sockmi.protocol.importer import ImporterCore
from sockmi.protocol.messages import Verdict
from sockmi.protocol.routing import Routes
from sockmi.protocol.tables import Export, Import, UndeclaredTransition
from sockmi.refusal import Code, Refusal
from tests.simulation.world import SCENARIOS, SETTINGS, Host, LawBroken, World, random_run, scripted_run

RUNS = int(os.environ.get("SOCKMI_SIM_RUNS", "1250"))
FOUND = (
    946624783,  # a home that could not follow a hop was never told the end
    2012608574,  # a REROUTE that came to a waypoint moved its redirect, which nobody collected then
    4040304233,  # a home died between its word that its redirect is pinned and its note of that
)
FRESH = random.SystemRandom().randrange(1 << 32)


def run_seed(seed: int) -> World:
    """One run; its seed stands in whatever goes wrong."""
    try:
        return random_run(seed)
    except Exception as error:
        raise AssertionError(f"SOCKMI_SIM_SEED={seed}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    "start", [0, RUNS, FRESH, FRESH + RUNS], ids=["fixed-1", "fixed-2", "fresh-1", "fresh-2"]
)
def test_random_runs(start: int) -> None:
    """Lost, late, repeated, reordered, forged messages; broken streams; crashes; partitions; skew."""
    one = os.environ.get("SOCKMI_SIM_SEED")
    seeds = [int(one)] if one is not None else range(start, start + RUNS)
    print(f"seeds {seeds[0]}..{seeds[-1]}")
    outcomes: Counter[actions.Outcome] = Counter()
    for seed in seeds:
        outcomes.update(run_seed(seed).outcomes)
    print(dict(outcomes))
    if len(seeds) > 100:  # the runs must have done something
        assert outcomes[actions.Outcome.ACTIVE] > len(seeds)
        assert outcomes[actions.Outcome.REFUSED] > len(seeds) / 2


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_failed_once(seed: int) -> None:
    """Fresh seeds that found a fault, which has been mended."""
    run_seed(seed)


def test_a_seed_is_a_run() -> None:
    """The same seed gives the same run, to the last step."""
    one, other = random_run(4711), random_run(4711)
    assert (one.steps, one.time, one.outcomes) == (other.steps, other.time, other.outcomes)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_crash_after_each_step(scenario: str) -> None:
    """Each host in turn dies after each single step of any shell."""
    calm = scripted_run(scenario)
    assert calm.outcomes[actions.Outcome.REFUSED] == 0
    assert calm.steps > 10
    for step in range(1, calm.steps + 1):
        for host in range(3):
            try:
                scripted_run(scenario, (step, host))
            except Exception as error:
                raise AssertionError(f"{scenario}, host {host} dies after step {step}: {error!r}") from error


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_calm_runs_end_where_they_should(scenario: str) -> None:
    """Without trouble every connection arrives, and no waypoint is left."""
    world = scripted_run(scenario)
    goal = {"first hop": 1, "two hops": 2, "home again": 0}[scenario]
    alive = [one for one in world.home if one not in world.ended]
    assert alive
    assert all(one in world.hosts[goal].live for one in alive)
    assert [bool(host.away) for host in world.hosts] == [goal != 0, False, False]


@pytest.mark.parametrize("targeted", [False, True])
def test_a_dry_run_leaves_nothing(targeted: bool) -> None:
    """Everything is planned, nothing has moved, and no importer keeps room for it."""
    world = World(3, connections=3)
    a, b, _unused = world.hosts
    for connection, home in world.home.items():
        a.live[connection] = home.live.pop(connection)
        world.home[connection] = a
    world.export(a, sorted(a.live), b if targeted else None, dry_run=True)
    world.run(SETTINGS.lease_s / 2)
    assert world.outcomes[actions.Outcome.PLANNED] == 3 == sum(world.outcomes.values())
    assert all(host.core is not None and host.core.idle for host in world.hosts)
    assert len(a.live) == 3 and not world.open_batches


# --- planted faults: a simulator that finds nothing proves nothing --------------------------


def forget_decisions(patch: pytest.MonkeyPatch) -> None:
    """The exporter does not read its decisions back: restart presumes abort."""
    patch.setattr(Chunks, "started", lambda self, event: None)


def skip_commit_journal(patch: pytest.MonkeyPatch) -> None:
    """The shell closes the originals without having journalled COMMIT."""
    patch.setattr(Host, "journal_commit", lambda self, decision, moved, notices: None)


def skip_prepared_journal(patch: pytest.MonkeyPatch) -> None:
    """The importer says PREPARED without having spooled."""

    def spool_only(self: Host, record: Any, images: Any) -> None:
        for position in record.prepared:
            self.journal.spool[record.chunk, record.arrivals[position].item.migration] = images[position]

    patch.setattr(Host, "journal_prepared", spool_only)


def abort_prepared_by_timeout(patch: pytest.MonkeyPatch) -> None:
    """The importer decides by itself when it hears nothing."""

    def give_up(self: ImporterCore, chunk: Any) -> None:
        chunk.state = Import.DISCARDED
        self._discard(chunk, chunk.prepared)
        self._forget(chunk)

    patch.setattr(ImporterCore, "_query", give_up)


def abort_while_committing(patch: pytest.MonkeyPatch) -> None:
    """The exporter answers ABORT while its shell is committing."""
    original = Chunks.on_query

    def on_query(self: Chunks, source: bytes, message: messages.Query, channel: Any) -> None:
        chunk = self._chunks.get(message.chunk)
        if chunk is not None and chunk.state is not Export.CONFIRMING:
            self._context.out.append(actions.Send(source, messages.Abort(message.chunk), channel))
        else:
            original(self, source, message, channel)

    patch.setattr(Chunks, "on_query", on_query)


def confirm_too_early(patch: pytest.MonkeyPatch) -> None:
    """The exporter confirms what is prepared, not what is committed."""
    original = Chunks.on_prepared

    def on_prepared(self: Chunks, source: bytes, message: messages.Prepared, channel: Any) -> None:
        original(self, source, message, channel)
        chunk = self._chunks.get(message.chunk)
        if chunk is not None and chunk.state is Export.COMMITTING:
            self._context.stream(source, messages.Confirm(chunk.id, chunk.prepared))

    patch.setattr(Chunks, "on_prepared", on_prepared)


def ignore_hop_fencing(patch: pytest.MonkeyPatch) -> None:
    """The home believes whoever wants to move a connection, whenever."""

    def judge(self: Routes, source: bytes, move: messages.Move, moved: list[Any]) -> Verdict | None:
        route = self._routes.get(move.connection)
        if route is None or move.holder == self._context.host:
            return Verdict.GONE
        new = type(route)(
            route.connection, route.migration, route.kind, max(move.hop, route.hop), route.home, move.holder,
            move.place, route.local, route.remote, route.origin, route.upstream,
        )  # fmt: skip
        self._moving[move.connection] = new
        moved.append(new)
        return Verdict.DONE

    def done(self: Routes, event: events.RerouteDone) -> None:
        for connection, _unused, refusal in event.results:
            new = self._moving.pop(connection, None)
            if new is not None and refusal is None and connection in self._routes:
                self._put(new)

    patch.setattr(Routes, "_judge", judge)
    patch.setattr(Routes, "reroute_done", done)


def audit_forgets_what_is_prepared(patch: pytest.MonkeyPatch) -> None:
    """A holder that is still in doubt says that the connection is gone."""
    original = Routes.on_audit

    def on_audit(self: Routes, source: bytes, message: messages.Audit, channel: Any) -> None:
        arriving, self.arriving = self.arriving, lambda _unused: False
        original(self, source, message, channel)
        self.arriving = arriving

    patch.setattr(Routes, "on_audit", on_audit)


def stop_confirming(patch: pytest.MonkeyPatch) -> None:
    """CONFIRM is sent only three times, and then the decision is forgotten."""
    original = Chunks._confirm

    def confirm(self: Chunks, chunk: Any, channel: Any) -> None:
        if chunk.attempt >= 3:
            self._settle(chunk, "ACTIVE", lost=())
        else:
            original(self, chunk, channel)

    patch.setattr(Chunks, "_confirm", confirm)


def abort_what_is_committed(patch: pytest.MonkeyPatch) -> None:
    """A deadline undoes, in the core, what the shell has committed."""
    original = Chunks.committed

    def committed(self: Chunks, event: events.CommitDone) -> None:
        late = (Refusal(Code.FREEZE_DEADLINE, "late"),) * len(event.results)
        original(self, events.CommitDone(event.chunk, late))

    patch.setattr(Chunks, "committed", committed)


def return_to_another_port(patch: pytest.MonkeyPatch) -> None:
    """A connection that comes back gets a new place although others still lead to the former."""
    original = Host.on_reserve

    def on_reserve(self: Host, action: actions.Reserve) -> Any:
        return original(
            self,
            actions.Reserve(
                action.batch,
                action.exporter,
                action.page,
                action.items,
                action.modes,
                (None,) * len(action.items),
            ),
        )

    patch.setattr(Host, "on_reserve", on_reserve)


def leave_one_of_an_address(patch: pytest.MonkeyPatch) -> None:
    """Takeover leads an address away though one of its connections cannot go."""
    patch.setattr("sockmi.protocol.chunks.stays", lambda *_unused: None)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    leave_one_of_an_address,
    forget_decisions,
    skip_commit_journal,
    skip_prepared_journal,
    abort_prepared_by_timeout,
    abort_while_committing,
    confirm_too_early,
    ignore_hop_fencing,
    audit_forgets_what_is_prepared,
    stop_confirming,
    abort_what_is_committed,
    return_to_another_port,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these faults breaks a law within some hundred runs."""
    fault(monkeypatch)
    for seed in range(1500):
        try:
            random_run(seed)
        except (LawBroken, UndeclaredTransition) as error:
            print(f"seed {seed}: {error}")
            return
    pytest.fail("the simulator did not find it")
