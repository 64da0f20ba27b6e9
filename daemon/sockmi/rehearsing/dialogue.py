# SPDX-License-Identifier: MIT
"""Two protocol cores that negotiate an imaginary move; what the parts of one do not do is imagined."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from sockmi.engine.base import Fidelity
from sockmi.protocol import actions, events
from sockmi.protocol.actions import Action
from sockmi.protocol.codec import decode, encode
from sockmi.protocol.context import Capacity, Settings
from sockmi.protocol.core import Core
from sockmi.protocol.events import Event
from sockmi.protocol.records import ID_BYTES, Counts, HostId, Item, Place
from sockmi.redirect.base import Mode
from sockmi.refusal import Refusal

CarryOut = Mapping[type[Action], Callable[[Any], None]]

_TIMEOUT_S = 1.0


class Dialogue:
    """One move, from REQUEST to ACTIVE."""

    def __init__(self, exporter: HostId, importer: HostId, ours: HostId, carry_out: CarryOut) -> None:
        """``carry_out``: by which parts of ``ours``, one of the two, its actions are carried out."""
        self._others = {exporter: importer, importer: exporter}
        self._exporter, self._importer, self._ours = exporter, importer, ours
        self._carry_out = carry_out
        self._news: deque[tuple[HostId, Event]] = deque()
        self._place, self._image = Place(), b""

    def tell(self, event: Event) -> None:
        """What a part answers."""
        self._news.append((self._ours, event))

    def move(self, item: Item, place: Place, image: bytes, between: Callable[[], None]) -> None:
        """``image``: what is shipped if freezing is imagined; ``between``: called after each event.

        Raises the Refusal of a part; RuntimeError if it does not come to its end.
        """
        self._place, self._image = place, image
        modes = (place.mode or Mode.FORWARD,)
        room = Capacity(rooms=Counts(connected=1), modes=modes)
        cores = {host: Core(host, Settings(), room) for host in self._others}
        start = events.StartExport(os.urandom(ID_BYTES), (item,), modes, _TIMEOUT_S, target=self._importer)
        self._news.extend([*((host, events.Started()) for host in cores), (self._exporter, start)])
        done = False
        while self._news:
            host, event = self._news.popleft()
            for result in getattr(event, "results", ()):
                if isinstance(result, Refusal):
                    raise result
            for action in cores[host].handle(event, time.monotonic()):
                self._perform(host, action)
                done |= isinstance(action, actions.BatchDone)
            between()
        if not done:
            raise RuntimeError("an imaginary move has come to a standstill")

    def _perform(self, host: HostId, action: Action) -> None:
        if isinstance(action, actions.Send):
            said = decode(encode(action.message))
            self._news.append((self._others[host], events.Received(host, said, action.channel)))
        elif host == self._ours and (part := self._carry_out.get(type(action))):
            part(action)
        elif (event := self._imagined(host, action)) is not None:
            self._news.append((host, event))

    def _imagined(self, host: HostId, action: Action) -> Event | None:
        """The answer, if all goes well."""
        match action:
            case actions.OpenStream():
                return events.StreamOpened(self._others[host])
            case actions.Reserve():
                return events.ReserveDone(action.batch, action.exporter, action.page, (self._place,))
            case actions.Freeze():
                return events.FreezeDone(action.chunk, (self._image,))
            case actions.Prepare():
                return events.PrepareDone(action.chunk, (Fidelity(),))
            case actions.Commit():
                return events.CommitDone(action.decision.chunk, (None,))
            case actions.Activate():
                return events.ActivateDone(action.chunk, (None,))
        return None
