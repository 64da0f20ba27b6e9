# SPDX-License-Identifier: MIT
"""How long offers are collected, and who is chosen of them."""

from __future__ import annotations

import pytest

from sockmi.policy import POLICIES, Policy
from sockmi.protocol import actions as a
from sockmi.protocol import events as e
from sockmi.protocol.actions import Outcome
from sockmi.protocol.records import Counts
from sockmi.refusal import Code
from tests.unit.core_bench import B, Bench, C, item, only, results


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_nobody_waits_in_vain_for_offers(policy: type[Policy]) -> None:
    """All have offered, or only one was asked."""
    for targeted in (False, True):
        bench = Bench(offer_grace_s=1.0)
        bench.core.policy, bench.capacity.members = policy(), frozenset({B, C})
        bench.export(item(1), target=B if targeted else None)
        out = bench.offer(B, load=10)
        if not targeted:
            assert out == []
            out = bench.offer(C, load=20)
        assert only(out, a.OpenStream).host == B


def test_who_waits_comes_before_who_was_faster() -> None:
    """And then nobody waits for more."""
    bench = Bench(offer_grace_s=1.0)
    bench.capacity.members = frozenset({B, C, b"D" * 16})
    bench.export(item(1))
    assert bench.offer(B) == []
    assert only(bench.offer(C, waiting=1), a.OpenStream).host == C
    bench = Bench(offer_grace_s=1.0)
    bench.export(item(1))
    assert only(bench.offer(B, waiting=1), a.OpenStream).host == B


def test_without_grace_the_first_offer_is_taken() -> None:
    bench = Bench(offer_grace_s=0.0)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1))
    assert only(bench.offer(B), a.OpenStream).host == B


def test_an_offer_counts_though_the_time_is_over() -> None:
    """While better ones are waited for the batch's time ends: what is there is taken."""
    bench = Bench(offer_grace_s=10.0)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1), item(2))
    bench.wait(4.9)
    assert bench.offer(B, Counts(0, 0, 1)) == []
    out = bench.wait(0.2)
    assert only(out, a.OpenStream).host == B
    assert results(out) == {bytes([2]) * 16: (Outcome.REFUSED, Code.NO_OFFER)}


def test_who_has_failed_is_not_waited_for() -> None:
    bench = Bench(offer_grace_s=1.0, leg_failures_max=1)
    bench.capacity.members = frozenset({B, C})
    bench.export(item(1))
    bench.offer(B)
    out = bench.wait(1.1)
    assert only(out, a.OpenStream).host == B
    bench.do(e.StreamLost(B))
    assert only(bench.offer(C), a.OpenStream).host == C
