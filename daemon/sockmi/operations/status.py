# SPDX-License-Identifier: MIT
"""The request `status`."""

from __future__ import annotations

import os
import time

from sockmi import api
from sockmi.engine.base import Kind
from sockmi.parts import Parts


def status(daemon: Parts, request: api.StatusRequest) -> api.StatusResponse:
    """What the daemon is, and what it has to do."""
    lists = daemon.importing.stock.lists
    counts = lists.counts()
    outcomes: dict[api.Outcome, int] = {}
    for metric in daemon.metrics.migrations.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                outcome = api.Outcome(sample.labels["outcome"])
                outcomes[outcome] = outcomes.get(outcome, 0) + int(sample.value)
    return api.StatusResponse(
        id=request.id,
        version=daemon.version,
        host=daemon.host_name,
        host_id=daemon.identity.host_id.hex(),
        pid=os.getpid(),
        engine=daemon.shell.engine.name,
        modes=list(daemon.config.redirect.modes),
        uptime_s=time.monotonic() - daemon.started_at,
        stopping=daemon.stopping,
        groups=daemon.members.names(),
        import_lists={
            kind: api.ListLength(
                length=counts[kind] + lists.reserved(kind),
                maximum=lists.maxima[kind],
                waiting=lists.waiting_for(kind),
            )
            for kind in Kind
        },
        migrations_under_way=len(daemon.exporting.exports),
        redirects_out=len(daemon.redirecting.routes),
        redirects_in=len(daemon.redirecting.holdings),
        outcomes=outcomes,
    )
