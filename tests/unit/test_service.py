# SPDX-License-Identifier: MIT
"""What the daemon makes of its options for the protocol."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from sockmi.config import Config, ImportConfig
from sockmi.engine.base import Kind
from sockmi.import_lists import Candidate
from sockmi.importing import Importing
from sockmi.protocol import messages as m
from sockmi.protocol.codec import decode, encode
from sockmi.protocol.context import Capacity
from sockmi.protocol.records import Counts
from sockmi.redirect.base import Mode
from sockmi.service import offered_weight


@pytest.mark.parametrize("weight", [1e-9, 0.001, 0.5, 1, 3, 655.36, 700, 1000])
def test_every_weight_can_be_offered(weight: float) -> None:
    """And none becomes 0, which means "only if nobody else"."""
    offered = offered_weight(Config(weight=weight).weight)
    assert offered > 0
    offer = m.Offer(bytes(16), Counts(), Counts(), 1000, offered, (Mode.NAT,), 1000)
    assert decode(encode(offer)) == offer


def test_weights_keep_their_proportion() -> None:
    for one, other in ((1, 3), (0.5, 0.25), (1000, 10), (0.2, 1)):
        assert offered_weight(one) / offered_weight(other) == one / other


def test_a_host_that_is_overfull_offers_its_load() -> None:
    """More is listed than the maxima allow, since they were lowered."""
    capacity, limits = Capacity(), ImportConfig(max_bound=0, max_listening=0, max_connected=70)
    shell: Any = SimpleNamespace(config=Config(imports=limits))
    importing = Importing(shell, None, capacity, None)  # type: ignore[arg-type]
    for _ in range(70):
        importing.lists.put(Candidate(uuid4(), Kind.CONNECTED, None, None, 0, None))
    importing.set_maxima(ImportConfig(max_bound=0, max_listening=0, max_connected=1))
    assert capacity.load == 1000
