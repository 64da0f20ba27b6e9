# SPDX-License-Identifier: MIT
"""What the daemon makes of its options for the protocol."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from sockmi.config import Config, ImportConfig
from sockmi.core_settings import core_settings, offered_weight
from sockmi.engine.base import Kind
from sockmi.image import LIMIT_BYTES
from sockmi.import_lists import Candidate
from sockmi.importing import Importing
from sockmi.messenger import Messenger
from sockmi.metrics import Metrics
from sockmi.policy import POLICIES
from sockmi.protocol import actions, events
from sockmi.protocol import messages as m
from sockmi.protocol.codec import STREAM_BYTES_MAX, decode, encode
from sockmi.protocol.context import Capacity
from sockmi.protocol.fields import CodecError
from sockmi.protocol.records import CHUNK_ITEMS_MAX, IMAGE_BYTES_MAX, ChunkId, Counts, Place
from sockmi.redirect.base import Mode

HEADER = Path(__file__).parents[2] / "daemon/libsockmi/engine/image.h"


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
    shell: Any = SimpleNamespace(config=Config(imports=limits), metrics=Metrics())
    importing = Importing(shell, None, capacity, None)  # type: ignore[arg-type]
    for _turn in range(70):
        importing.stock.lists.put(Candidate(uuid4(), Kind.CONNECTED, None, None, 0, None))
    importing.stock.room.set_maxima(ImportConfig(max_bound=0, max_listening=0, max_connected=1))
    assert capacity.load == 1000


HOST, ID = b"h" * 16, b"i" * 16


def test_one_limit_for_images_everywhere() -> None:
    """Configuration, wire, transport, and the image's format in Python and C."""
    assert Config(image_bytes_max=IMAGE_BYTES_MAX).image_bytes_max == LIMIT_BYTES == IMAGE_BYTES_MAX
    with pytest.raises(ValidationError, match="image_bytes_max"):
        Config(image_bytes_max=IMAGE_BYTES_MAX + 1)
    [mib] = re.findall(r"SOCKMI_IMAGE_LIMIT_BYTES \(\(size_t\)(\d+) << 20\)", HEADER.read_text())
    assert int(mib) << 20 == IMAGE_BYTES_MAX


def test_the_largest_chunk_can_be_shipped() -> None:
    """And one byte more is refused before it is sent."""
    images = (bytes(IMAGE_BYTES_MAX - CHUNK_ITEMS_MAX + 1), *(b"1",) * (CHUNK_ITEMS_MAX - 1))
    names, places = (ID,) * CHUNK_ITEMS_MAX, (Place(),) * CHUNK_ITEMS_MAX
    octets = encode(m.Ship(ChunkId(ID, 0), names, places, images))
    assert len(octets) <= STREAM_BYTES_MAX
    with pytest.raises(CodecError, match="at most 67108864 are in a chunk"):
        encode(m.Ship(ChunkId(ID, 0), names, places, (*images[:-1], b"22")))


def test_a_message_that_cannot_be_written_is_told_to_the_core() -> None:
    """The daemon goes on."""
    waiting: list[events.Event] = []
    nothing: Any = None
    messenger = Messenger(nothing, waiting.append, route_of=nothing, held_arrived=nothing, inject=nothing)
    ship = m.Ship(ChunkId(ID, 0), (ID,), (Place(),), (bytes(IMAGE_BYTES_MAX + 1),))
    messenger.send(actions.Send(HOST, ship, m.Channel.STREAM))
    [failed] = waiting
    assert isinstance(failed, events.SendFailed)
    assert (failed.to, failed.message) == (HOST, ship) and "67108865" in failed.why


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_has_its_grace(policy: str) -> None:
    """Unless an operator has said otherwise, be it 0."""
    config = Config.model_validate({"policy": policy})
    assert core_settings(config).offer_grace_s == POLICIES[policy].grace_s > 0
    for said in (0, 0.3):
        config = Config.model_validate({"policy": policy, "timing": {"offer_grace_s": said}})
        assert core_settings(config).offer_grace_s == said
