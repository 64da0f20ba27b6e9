# SPDX-License-Identifier: MIT
"""The protocol core of one host: events in, actions out. No I/O, no clock, no chance.

    core = Core(host, settings, capacity, policy)
    for action in core.handle(event, now): ...
    deadline = core.next_deadline()          # then core.handle_timer(now)

``now`` is seconds of any monotonic clock, never less than before. One thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sockmi.policy import Policy
from sockmi.protocol import actions, events, messages
from sockmi.protocol.actions import Action
from sockmi.protocol.context import Capacity, Context, Settings
from sockmi.protocol.events import Event
from sockmi.protocol.exporter import ExporterCore
from sockmi.protocol.importer import ImporterCore
from sockmi.protocol.messages import STREAM_ONLY, Channel
from sockmi.protocol.records import ID_BYTES, HostId
from sockmi.protocol.routing import Routes
from sockmi.refusal import Code, Refusal


class Core:
    """See the module docstring. Composes the exporter, the importer and the routes of a host."""

    def __init__(
        self, host: HostId, settings: Settings, capacity: Capacity, policy: Policy | None = None
    ) -> None:
        if len(host) != ID_BYTES:
            raise ValueError(f"a host id has {ID_BYTES} bytes, not {len(host)}")
        self._context = Context(host, settings, capacity, policy)
        self.routes = Routes(self._context)
        self.exporter = ExporterCore(self._context, self.routes)
        self.importer = ImporterCore(self._context, self.routes)
        self.routes.arriving = self.importer.holds
        self.routes.activating = self.importer.activates
        self._started = False
        self._grace_until: float | None = None
        self._quiet = False
        exporter, importer, routes = self.exporter, self.importer, self.routes
        self._events: dict[type, Callable[[Any], None]] = {
            events.Started: self._on_started,
            events.Stop: self._on_stop,
            events.Received: self._on_received,
            events.StreamOpened: exporter.stream_opened,
            events.StreamLost: self._on_stream_lost,
            events.SendFailed: self._on_send_failed,
            events.StartExport: exporter.start_export,
            events.CancelExport: exporter.cancel_export,
            events.ChildrenFound: exporter.children_found,
            events.FreezeDone: exporter.chunks.frozen,
            events.CommitDone: exporter.chunks.committed,
            events.ReserveDone: importer.reserve_done,
            events.PrepareDone: importer.prepared,
            events.ActivateDone: importer.activated,
            events.RerouteDone: routes.reroute_done,
            events.CollectDone: routes.collect_done,
            events.ConnectionsEnded: routes.connections_ended,
            events.Forget: self._on_forget,
        }
        self._messages: dict[type, Callable[[HostId, Any, Channel], None]] = {
            messages.Request: importer.on_request,
            messages.Release: importer.on_release,
            messages.Reserve: importer.on_reserve,
            messages.Ship: importer.on_ship,
            messages.Confirm: importer.on_confirm,
            messages.Abort: importer.on_abort,
            messages.Undecided: importer.on_undecided,
            messages.Offer: exporter.on_offer,
            messages.Reserved: exporter.on_reserved,
            messages.Prepared: exporter.chunks.on_prepared,
            messages.Active: exporter.chunks.on_active,
            messages.Query: exporter.chunks.on_query,
            messages.Reroute: routes.on_reroute,
            messages.Rerouted: routes.on_rerouted,
            messages.Ended: routes.on_ended,
            messages.Collected: routes.on_collected,
            messages.Audit: routes.on_audit,
            messages.Audited: routes.on_audited,
        }

    @property
    def host(self) -> HostId:
        """This host's id."""
        return self._context.host

    @property
    def settings(self) -> Settings:
        """May be replaced (reload); takes effect from the next event on."""
        return self._context.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._context.settings = settings

    @property
    def policy(self) -> Policy:
        """May be replaced (reload)."""
        return self._context.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._context.policy = policy

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about ``event``; raise UndeclaredTransition if it cannot be (a bug of the shell)."""
        if not self._started and not isinstance(event, events.Started):
            return []  # the journal speaks first: until then we must not presume anything
        self._context.now = now
        self._events[type(event)](event)
        return self._take()

    def next_deadline(self) -> float | None:
        """When to call ``handle_timer``; None: never."""
        return self._context.timers.next()

    def handle_timer(self, now: float) -> list[Action]:
        """What to do about all deadlines up to ``now``."""
        self._context.now = now
        due = []
        while (key := self._context.timers.pop(now)) is not None:
            due.append(key)
            self._ring(key)
            if len(due) > 10_000:  # the rest at the next call; it is due at once
                break
        return self._take()

    @property
    def idle(self) -> bool:
        """Whether no migration, lease or redirect change is under way."""
        return self.exporter.idle and self.importer.idle and self.routes.idle

    @property
    def calm(self) -> bool:
        """Whether work of some milliseconds lengthens no freeze.

        Unlike ``idle`` it does not depend on other hosts: one that is dead leaves things to be repeated
        for ever.
        """
        return self.exporter.calm and self.importer.calm

    @property
    def frozen(self) -> bool:
        """Whether a chunk stands still, here or on its way to this host: each millisecond lengthens that."""
        return not self.exporter.chunks.calm or self.importer.frozen

    @property
    def awaited(self) -> set[HostId]:
        """Hosts for whose answer something waits, or to which connections are led; see events.Forget."""
        return self.exporter.chunks.awaited | self.routes.awaited

    def _ring(self, key: object) -> None:
        if key == ("stop",):
            self._say_quiet()
            return
        if not isinstance(key, tuple) or not (
            self.exporter.timer(key) or self.importer.timer(key) or self.routes.timer(key)
        ):
            raise AssertionError(f"a timer that nobody has set: {key!r}")

    def _take(self) -> list[Action]:
        if (
            self._context.stopping
            and not self._quiet
            and not self._busy()
            and self.exporter.idle
            and self.importer.idle
        ):
            self._say_quiet()
        out, self._context.out = self._context.out, []
        return out

    def _busy(self) -> bool:
        return self.exporter.chunks.busy or self.importer.busy or self.routes.busy

    def _say_quiet(self) -> None:
        if not self._quiet:
            self._quiet = True
            self._context.timers.cancel(("stop",))
            self._context.out.append(actions.Quiet())

    def _on_started(self, event: events.Started) -> None:
        if self._started:
            raise ValueError("Started comes once")
        self._started = True
        self.routes.started(event)
        self.importer.started(event)
        self.exporter.chunks.started(event)

    def _on_stop(self, event: events.Stop) -> None:
        if self._context.stopping:
            return
        self._context.stopping = True
        self._context.timers.set(("stop",), self._context.now + event.grace_s)
        self.exporter.stop()
        self.importer.stop()

    def _on_stream_lost(self, event: events.StreamLost) -> None:
        self.exporter.stream_lost(event)
        self.importer.stream_lost(event)

    def _on_send_failed(self, event: events.SendFailed) -> None:
        """What waits for an answer to it is refused; any other message is as good as lost."""
        name = type(event.message).__name__.upper()
        reason = Refusal(Code.INTERNAL, f"{name} cannot be sent ({event.why}); report it")
        self.exporter.send_failed(event, reason)
        self.importer.send_failed(event, reason)

    def _on_forget(self, event: events.Forget) -> None:
        self.exporter.chunks.forget(event.host)
        self.routes.forget(event.host)

    def _on_received(self, event: events.Received) -> None:
        if event.source == self._context.host:
            return  # our own multicast
        kind = type(event.message)
        if kind in STREAM_ONLY and event.channel is not Channel.STREAM:
            self._context.ignore(event.source, event.message, "it needs a stream")
            return
        self._messages[kind](event.source, event.message, event.channel)
