# SPDX-License-Identifier: MIT
"""What the core and the importers are told of an export before it is frozen."""

from __future__ import annotations

from dataclasses import replace

from sockmi.exporting.export import Export
from sockmi.protocol.records import Holding, Item
from sockmi.redirecting import Redirecting
from sockmi.shell import Shell

_GROWTH_BYTES = 1 << 20  # what queues may take between selection and freeze


def holding_of(export: Export, redirecting: Redirecting) -> Holding | None:
    """What this host holds of its connection, if it was imported."""
    if (copy := export.selected.copy) is not None:
        return redirecting.holdings.get(copy.arrival.item.connection)
    return redirecting.holding_of(export.facts)


def item_of(export: Export, shell: Shell, redirecting: Redirecting) -> Item:
    """Its migration, as the protocol knows it."""
    facts = export.facts
    migration = export.migration
    holding = holding_of(export, redirecting)
    bound = facts.local is not None and (facts.local.port or not facts.local.address.is_unspecified)
    local = facts.local if bound else None
    size_bytes = export.size_bytes
    # How long the image may become until it is shipped; no more than this host ships.
    largest = max(size_bytes, min(size_bytes + _GROWTH_BYTES, shell.config.image_bytes_max))
    export.record["hop"] = holding.hop + 1 if holding else 1
    return Item(
        migration=migration,
        connection=holding.connection if holding else migration,
        kind=facts.kind,
        state=facts.state,
        local=local,
        remote=facts.remote,
        origin=(holding.origin if holding else None) or local,
        hop=export.record["hop"],
        home=holding.home if holding else shell.host_id,
        needs=replace(facts.needs, image_bytes_max=largest),
        size_bytes=size_bytes,
        listener=export.listener,
        queued=export.queued,
        handle=export,
    )
