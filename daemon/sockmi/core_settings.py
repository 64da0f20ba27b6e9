# SPDX-License-Identifier: MIT
"""What the protocol core is told of the configuration."""

from __future__ import annotations

from sockmi.config import Config
from sockmi.policy import POLICIES
from sockmi.protocol.context import Settings

# Halves, thirds, quarters and fifths are whole, and 1000 fits in 16 bits.
_WEIGHT_UNITS = 60
# What is in doubt is silent until the other host is heard again: ask often.
_RETRY_MAX_S = 3.0


def core_settings(config: Config) -> Settings:
    """The protocol core's settings from the configuration."""
    timing = config.timing
    grace_s = timing.offer_grace_s
    return Settings(
        request_interval_s=timing.request_interval_s,
        offer_grace_s=POLICIES[config.policy].grace_s if grace_s is None else grace_s,
        lease_s=timing.lease_s,
        freeze_deadline_s=timing.freeze_deadline_s,
        audit_interval_s=timing.audit_interval_s,
        retry_max_s=_RETRY_MAX_S,
        chunk_items=config.chunk_size,
        pipeline_depth=config.pipeline_depth,
    )


def offered_weight(weight: float) -> int:
    """What OFFER says of ``weight`` (more than 0 to 1000), in sixtieths; never 0: that has a meaning."""
    return max(1, round(weight * _WEIGHT_UNITS))
