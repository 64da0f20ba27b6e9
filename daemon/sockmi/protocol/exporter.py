# SPDX-License-Identifier: MIT
"""The exporter's side: from REQUEST to the importer's ACTIVE, for all batches of this host.

A **batch** asks for importers until each item has one; the part that goes to one importer is a
**leg**; a leg reserves its items page by page and moves them chunk by chunk (`chunks`).
Every retry is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from copy import deepcopy

from sockmi.engine.base import Kind, Needs
from sockmi.policy import Candidate
from sockmi.protocol import actions, events, messages
from sockmi.protocol.actions import Outcome, Result
from sockmi.protocol.batch import Batch, Leg
from sockmi.protocol.chunks import Chunks
from sockmi.protocol.context import Context
from sockmi.protocol.dividing import divide, wanted
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import (
    BatchId,
    ChunkId,
    ConnectionId,
    HostId,
    Item,
    MigrationId,
)
from sockmi.protocol.routing import Routes
from sockmi.protocol.tables import LEG, UndeclaredTransition, step
from sockmi.protocol.tables import Leg as LegState
from sockmi.protocol.together import Address, awaited, leaving, too_many
from sockmi.refusal import Code, Refusal

# An importer's refusals that another importer might not give; the first ones it may not give again itself.
_PASSING = frozenset({Code.LIST_FULL, Code.SHUTTING_DOWN})
_ELSEWHERE = _PASSING | frozenset(
    {Code.PORT_TAKEN, Code.TUPLE_TAKEN, Code.WINDOW_SCALE, Code.TIMESTAMP_UNIT, Code.TOO_LARGE,
     Code.NO_REDIRECT}
)  # fmt: skip
_ALL_REFUSE = Refusal(
    Code.NO_OFFER, "every host of the group has refused it, or failed too often; see their logs"
)
_DRY_REQUESTS = 4  # how often a dry run asks for what there is no room for
_CHOSEN_MAX = 60  # hosts that a RELEASE datagram can name; with more, the leases just expire


class ExporterCore:
    """See the module docstring; events and messages come by the methods named after them."""

    def __init__(self, context: Context, routes: Routes) -> None:
        self._context = context
        self._routes = routes
        self._batches: dict[BatchId, Batch] = {}
        self._moving: set[ConnectionId] = set()
        self.chunks = Chunks(context, routes, self)
        self._connections: dict[tuple[BatchId, MigrationId], ConnectionId] = {}

    # --- the shell -------------------------------------------------------------------------

    def start_export(self, event: events.StartExport) -> None:
        """Begin a batch."""
        timeout_s = event.timeout_s
        if event.dry_run:
            timeout_s = min(timeout_s, _DRY_REQUESTS * self._context.settings.request_interval_s)
        batch = Batch(
            event.batch,
            event.modes,
            self._context.now + timeout_s,
            timeout_s,
            event.target,
            event.target_address,
            left=len(event.items),
            dry_run=event.dry_run,
        )
        self._begin(batch, event.items)
        if batch.target == self._context.host or (
            batch.target_address is not None and batch.target_address in self._context.capacity.addresses
        ):
            self._refuse_pending(
                batch,
                Refusal(Code.NO_SUCH_HOST, "the target is this host itself; name another host of the group"),
            )
        elif batch.pending:
            self._request(batch)
        self._finish(batch)

    def children_found(self, event: events.ChildrenFound) -> None:
        """Begin a batch that goes where the listener went."""
        batch = Batch(
            event.batch,
            event.modes,
            self._context.now + event.timeout_s,
            event.timeout_s,
            event.host,
            left=len(event.items),
            follows=True,
        )
        self._begin(batch, event.items)
        if batch.pending:
            self._to_leg(batch, event.host, list(batch.pending.values()))
        self._finish(batch)

    def cancel_export(self, event: events.CancelExport) -> None:
        """Undo what of the batch is not committed."""
        batch = self._batches.get(event.batch)
        if batch is not None:
            self._give_up(
                batch, Refusal(Code.TIMEOUT, "the export was cancelled or took too long; export it again")
            )

    def stop(self) -> None:
        """Undo all that is not committed."""
        for batch in list(self._batches.values()):
            self._give_up(
                batch,
                Refusal(Code.SHUTTING_DOWN, "the exporting daemon is stopping; export it again when it runs"),
            )

    @property
    def idle(self) -> bool:
        """Whether nothing at all is left to do."""
        return self.chunks.idle and not self._batches

    @property
    def calm(self) -> bool:
        """Whether nothing is being reserved, frozen or decided."""
        return self.chunks.calm and not any(batch.legs for batch in self._batches.values())

    def stream_opened(self, event: events.StreamOpened) -> None:
        """Go on with the legs to that host."""
        for batch in list(self._batches.values()):
            leg = batch.legs.get(event.host)
            if leg is not None and leg.state is LegState.OPENING:
                leg.state = step(LEG, leg.state, "stream opened")
                self._context.timers.cancel(("leg", batch.id, leg.host))
                self._advance(batch, leg.host)
                self._finish(batch)

    def stream_lost(self, event: events.StreamLost) -> None:
        """Undo what that host has not yet prepared and we have not yet committed."""
        why = f" ({event.reason})" if event.reason else ""
        for batch in list(self._batches.values()):
            self._lose(
                batch,
                event.host,
                Refusal(Code.PEER_LOST, f"the stream to the importer broke{why}; export it again"),
                streaming=False,
            )

    def send_failed(self, event: events.SendFailed, reason: Refusal) -> None:
        """These items do not move; the others of their batch go on."""
        match event.message:
            case messages.Reserve(batch, page, items):
                self.on_reserved(
                    event.to, messages.Reserved(batch, page, (reason,) * len(items)), Channel.STREAM
                )
            case messages.Ship(chunk):
                self.chunks.abort(chunk, reason, retry=False, streaming=True)

    def timer(self, key: tuple[object, ...]) -> bool:
        """A deadline of this role; False if ``key`` is none."""
        match key:
            case ("request", bytes() as batch_id):
                self._request(self._batches[batch_id])
                self._finish(self._batches[batch_id])
            case ("choose", bytes() as batch_id):
                self._assign(self._batches[batch_id], last=not self._batches[batch_id].dry_run)
                self._finish(self._batches[batch_id])
            case ("batch", bytes() as batch_id):
                self._expire(self._batches[batch_id])
            case ("leg", bytes() as batch_id, bytes() as host):
                self._lose(
                    self._batches[batch_id],
                    host,
                    Refusal(Code.PEER_LOST, "the importer did not answer in time; export it again"),
                )
            case _:
                return self.chunks.timer(key)
        return True

    # --- messages --------------------------------------------------------------------------

    def on_offer(self, source: HostId, message: messages.Offer, _unused: Channel) -> None:
        """Keep it, and choose unless better ones may follow."""
        context, batch = self._context, self._batches.get(message.batch)
        if batch is None or not batch.pending or batch.follows:
            return  # others were faster: not worth a word
        if batch.target is not None and source != batch.target:
            context.ignore(source, message, "another host is the target")
            return
        if wanted(batch.pending.values()).connected and not set(batch.modes) & set(message.modes):
            context.ignore(source, message, "no redirect that both hosts can")
            return
        if batch.failures.get(source, 0) >= context.settings.leg_failures_max:
            context.ignore(source, message, "it failed too often in this batch")
            return
        batch.offers[source] = message
        if batch.dry_run and not batch.satisfied:
            return  # others may have room for the rest; what is asked for again is already offered here
        if context.settings.offer_grace_s <= 0 or self._enough(batch):
            self._assign(batch, last=not batch.dry_run)
            self._finish(batch)
        elif ("choose", batch.id) not in context.timers:
            context.timers.set(("choose", batch.id), context.now + context.settings.offer_grace_s)

    def on_reserved(self, source: HostId, message: messages.Reserved, _unused: Channel) -> None:
        """The items of a page become ready to be frozen, or are refused."""
        batch = self._batches.get(message.batch)
        leg = batch.legs.get(source) if batch is not None else None
        items = leg.pages.get(message.page) if leg is not None else None
        if batch is None or leg is None or items is None or len(items) != len(message.places):
            self._context.ignore(source, message, "no such page is being reserved")
            return
        del leg.pages[message.page]
        refused: list[Result] = []
        back: dict[Refusal, list[Item]] = {}
        for item, place in zip(items, message.places, strict=True):
            if isinstance(place, Refusal):
                if place.code in _ELSEWHERE and batch.target is None:
                    back.setdefault(place, []).append(item)
                    continue
                why = batch.because(item.migration, place)
                refused.append(Result(item.migration, Outcome.REFUSED, source, refusal=why))
            elif item.kind is Kind.CONNECTED and (place.mode not in batch.modes or place.endpoint is None):
                refusal = Refusal(
                    Code.NO_REDIRECT, f"the importer chose {place.mode}, which this host cannot; see doctor"
                )
                refused.append(Result(item.migration, Outcome.REFUSED, source, refusal=refusal))
            else:
                leg.ready.append((item, place))
        self._report(batch, refused)
        if any(refusal.code in _PASSING for refusal in back):
            batch.failures[source] = batch.failures.get(source, 0) + 1
        for refusal, returned in back.items():
            if refusal.code not in _PASSING:
                for item in returned:
                    batch.barred[item.migration].add(source)
            self._return(batch, returned, refusal)
        self._advance(batch, source)
        self._finish(batch)

    # --- batches ---------------------------------------------------------------------------

    def _begin(self, batch: Batch, items: Sequence[Item]) -> None:
        if batch.id in self._batches:
            raise UndeclaredTransition(f"batch {batch.id.hex()} is already under way")
        self._batches[batch.id] = batch
        refused: list[Result] = []
        for item in items:
            refusal = self._acceptable(item)
            if refusal is None:
                batch.pending[item.migration] = item
                self._moving.add(item.connection)
                self._connections[batch.id, item.migration] = item.connection
            else:
                refused.append(Result(item.migration, Outcome.REFUSED, refusal=refusal))
        self._report(batch, refused)
        self._context.timers.set(("batch", batch.id), batch.deadline)

    def _acceptable(self, item: Item) -> Refusal | None:
        if self._context.stopping:
            return Refusal(
                Code.SHUTTING_DOWN, "the exporting daemon is stopping; export it again when it runs"
            )
        if item.connection in self._moving:
            return Refusal(Code.ALREADY_MIGRATING, "this connection is already being exported; wait for it")
        expected = self._routes.next_hop(item.connection)
        if item.kind is not Kind.BOUND and item.hop != expected:
            return Refusal(
                Code.ALREADY_MIGRATING,
                f"hop {item.hop} of this connection cannot start here "
                + ("(it has left this host)" if expected is None else f"(the next one is {expected})")
                + "; list the sockets again and export the one that is there",
            )
        return None

    def _request(self, batch: Batch) -> None:
        """REQUEST what has no importer yet, again and again until the deadline."""
        self._refuse_hopeless(batch)
        if not batch.pending or batch.follows:
            return
        size = scale = image_max = 0
        timestamp_us = False
        for item in batch.pending.values():
            size += item.size_bytes
            scale = max(scale, item.needs.window_scale)
            image_max = max(image_max, item.needs.image_bytes_max)
            timestamp_us = timestamp_us or item.needs.timestamp_us
        request = messages.Request(
            batch.id,
            wanted(batch.pending.values()),
            Needs(scale, timestamp_us, image_max),
            size,
            batch.modes,
            batch.target,
            batch.target_address,
        )
        self._context.datagram(batch.target, request)
        interval = self._context.settings.request_interval_s
        self._context.timers.set(("request", batch.id), self._context.now + interval)

    def _assign(self, batch: Batch, last: bool = True) -> None:
        """Divide the pending items among the offers, by policy; unless ``last``, not before all fit."""
        context = self._context
        if not batch.pending or not batch.offers:
            return
        candidates = _candidates(batch)
        policy = deepcopy(context.policy) if batch.dry_run else context.policy
        shares = divide(
            batch.pending.values(),
            candidates,
            policy,
            batch.barred,
            whole_addresses=batch.moves_addresses,
        )
        if not last and sum(len(items) for _unused, items in shares) < len(batch.pending):
            return
        if not shares:
            return  # together with others they may do; if not, the end of the batch tells of them
        batch.offers.clear()
        context.timers.cancel(("choose", batch.id))
        for host, items in shares:
            self._to_leg(batch, host, items)
        if not batch.pending:
            context.timers.cancel(("request", batch.id))
            chosen = tuple(leg.host for leg in batch.legs.values())
            if len(chosen) <= _CHOSEN_MAX and (batch.target is None or batch.dry_run):
                context.datagram(batch.target, messages.Release(batch.id, chosen))

    def _enough(self, batch: Batch) -> bool:
        """Whether it is in vain to wait for more offers: no better ones, or none at all, would come."""
        if batch.target is not None or batch.target_address is not None:
            return True
        heard = self._context.capacity.members - self._failed(batch)
        return (bool(heard) and heard <= batch.offers.keys()) or self._context.policy.suffices(
            _candidates(batch)
        )

    def _failed(self, batch: Batch) -> set[HostId]:
        """Hosts that are not asked any more."""
        most = self._context.settings.leg_failures_max
        return {host for host, failures in batch.failures.items() if failures >= most}

    def _to_leg(self, batch: Batch, host: HostId, items: list[Item]) -> None:
        if not items:
            return
        for item in items:
            del batch.pending[item.migration]
        if batch.dry_run:
            self._report(batch, [Result(item.migration, Outcome.PLANNED, host) for item in items])
            return
        leg = batch.legs.get(host)
        if leg is None:
            leg = batch.legs[host] = Leg(host)
            self._context.out.append(actions.OpenStream(host))
            self._await(batch, leg, self._context.settings.stream_timeout_s)
        leg.unreserved.extend(items)
        self._advance(batch, host)

    def _await(self, batch: Batch, leg: Leg, timeout_s: float) -> None:
        self._context.timers.set(("leg", batch.id, leg.host), self._context.now + timeout_s)

    def _advance(self, batch: Batch, host: HostId) -> None:
        """Reserve, freeze, or close the leg: whatever it can do now."""
        leg = batch.legs.get(host)
        if leg is None or leg.state is not LegState.OPEN:
            return
        context, settings = self._context, self._context.settings
        while leg.unreserved and len(leg.pages) < settings.pages_in_flight:
            count = min(settings.page_items, len(leg.unreserved))
            page = tuple(leg.unreserved.popleft() for _turn in range(count))
            leg.pages[batch.next_page] = page
            context.stream(host, messages.Reserve(batch.id, batch.next_page, page, batch.modes))
            batch.next_page += 1
        if leg.pages:
            self._await(batch, leg, settings.reserve_timeout_s)
        else:
            context.timers.cancel(("leg", batch.id, host))
        freezing = self.chunks.freezing(leg.moving)
        while leg.ready and not freezing and len(leg.moving) < settings.pipeline_depth:
            if leg.probe in leg.pages:
                break
            # Only then it costs a look at every item.
            if (address := leaving(*leg.ready[0])) is not None:
                if awaited(address, leg.unplaced):
                    break
                if self._refuse_crowd(batch, leg, address):
                    continue
            identifier = ChunkId(batch.id, batch.next_chunk)
            batch.next_chunk += 1
            leg.moving.add(identifier)
            self.chunks.freeze(identifier, host, leg.ready, batch.alone)
            freezing = True  # the next one when this one is shipped: its freeze would only wait
        if not (leg.unreserved or leg.pages or leg.ready or leg.moving):
            self._close(batch, leg, "nothing left")
            context.stream(host, messages.Release(batch.id))

    def _refuse_crowd(self, batch: Batch, leg: Leg, address: Address) -> bool:
        """Whether the address that would leave next has more connections than can be frozen together."""
        most = self._context.settings.chunk_items
        crowd = [item for item, place in leg.ready if leaving(item, place) == address]
        if len(crowd) <= most:
            return False
        leg.ready = deque(one for one in leg.ready if leaving(*one) != address)
        why = too_many(len(crowd), address, most)
        self._report(
            batch, [Result(item.migration, Outcome.REFUSED, leg.host, refusal=why) for item in crowd]
        )
        return True

    def _close(self, batch: Batch, leg: Leg, trigger: str) -> None:
        leg.state = step(LEG, leg.state, trigger)
        self._context.timers.cancel(("leg", batch.id, leg.host))
        del batch.legs[leg.host]

    def _lose(self, batch: Batch, host: HostId, reason: Refusal, streaming: bool = True) -> None:
        """The importer is lost to this batch: thaw, and let the items try another one.

        ``streaming``: the stream is still there, so the host can be told in order.
        """
        leg = batch.legs.get(host)
        if leg is None:
            return
        batch.failures[host] = batch.failures.get(host, 0) + 1
        batch.offers.pop(host, None)
        was_open = leg.state is LegState.OPEN
        self._close(batch, leg, "lost")
        back = leg.unfrozen
        for chunk_id in sorted(leg.moving):
            self.chunks.abort(chunk_id, reason, retry=True, streaming=streaming)
        if was_open and streaming:  # else the importer sees it too, or its lease expires
            self._context.stream(host, messages.Release(batch.id))
        self._return(batch, back, reason)
        self._finish(batch)

    def _return(self, batch: Batch, items: Iterable[Item], reason: Refusal) -> None:
        """Items without an importer: ask again if there is time, else refuse."""
        self._return_all(batch, [(item, reason) for item in items])

    def _return_all(self, batch: Batch, items: list[tuple[Item, Refusal]]) -> None:
        """As ``_return``, each for its own reason, and all in one REQUEST."""
        if not items:
            return
        target, most = batch.target, self._context.settings.leg_failures_max
        failed = target is not None and batch.failures.get(target, 0) >= most
        if batch.expired is not None or failed or self._context.now >= batch.deadline:
            self._report(
                batch, [one for item, reason in items for one in batch.refused([item.migration], reason)]
            )
            return
        for item, reason in items:
            batch.pending[item.migration] = item
            batch.because(item.migration, reason)
        if batch.follows and target is not None:
            self._to_leg(batch, target, [item for item, _unused in items])
        elif ("request", batch.id) not in self._context.timers:
            self._request(batch)

    def _expire(self, batch: Batch) -> None:
        """Nobody took the rest in time; what is on its way goes on."""
        batch.expired = Refusal(
            Code.NO_OFFER,
            f"no host of the group offered to take it within {batch.timeout_s} s; check that daemons with "
            "this group's key run on the other hosts, have room, and can be redirected to (sockmi doctor)",
        )
        if batch.offers:  # better ones were still waited for, or none has room for what goes together
            asked = wanted(batch.pending.values()).total
            whole = " (takeover leads all connections of an address to one)" if batch.moves_addresses else ""
            self._assign(batch)
            if batch.dry_run or batch.offers:
                batch.expired = _no_room(batch, asked, whole)
        self._refuse_pending(batch, batch.expired)
        self._finish(batch)

    def _give_up(self, batch: Batch, reason: Refusal) -> None:
        batch.expired = reason
        self._refuse_pending(batch, reason)
        for leg in list(batch.legs.values()):
            back = leg.unfrozen
            if leg.state is LegState.OPEN:
                self._context.stream(leg.host, messages.Release(batch.id))
            self._close(batch, leg, "lost")
            for chunk_id in sorted(leg.moving):
                self.chunks.abort(chunk_id, reason, retry=False, streaming=True)
            self._report(batch, batch.refused((item.migration for item in back), reason))
        self._finish(batch)

    def _refuse_pending(self, batch: Batch, reason: Refusal) -> None:
        if not batch.pending:
            return
        for name in ("request", "choose"):
            self._context.timers.cancel((name, batch.id))
        refused = batch.refused(batch.pending, reason)
        batch.pending.clear()
        batch.offers.clear()
        if not batch.legs:
            self._context.datagram(batch.target, messages.Release(batch.id))
        self._report(batch, refused)

    def _refuse_hopeless(self, batch: Batch) -> None:
        """What every host that is heard has refused for good need not wait until the batch's time is over."""
        members, failed = self._context.capacity.members, self._failed(batch)
        if batch.target is not None or batch.target_address is not None or not members:
            return
        hopeless = [
            migration for migration in batch.pending
            if members <= failed | batch.barred.get(migration, set())
        ]  # fmt: skip
        if len(hopeless) == len(batch.pending):
            self._refuse_pending(batch, _ALL_REFUSE)
            return
        for migration in hopeless:
            del batch.pending[migration]
        self._report(batch, batch.refused(hopeless, _ALL_REFUSE))

    def _finish(self, batch: Batch) -> None:
        """Forget the batch when everything has its outcome."""
        if batch.left or batch.legs or batch.id not in self._batches:
            return
        del self._batches[batch.id]
        for name in ("request", "choose", "batch"):
            self._context.timers.cancel((name, batch.id))
        self._context.out.append(actions.BatchDone(batch.id))

    def _report(self, batch: Batch, results: list[Result]) -> None:
        self.report(batch.id, results)

    # --- what chunks tell ------------------------------------------------------------------

    def report(self, identifier: BatchId, results: list[Result]) -> None:
        """These have their outcome."""
        if not results:
            return
        batch = self._batches.get(identifier)
        if batch is not None:
            batch.left -= sum(result.outcome is not Outcome.COMMITTED for result in results)
        self._context.out.append(actions.Report(identifier, tuple(results)))
        if results[0].outcome is Outcome.COMMITTED:
            return
        for result in results:
            connection = self._connections.pop((identifier, result.migration), None)
            if connection is not None:
                self._moving.discard(connection)

    def refuse(
        self, identifier: BatchId, migrations: Iterable[MigrationId], reason: Refusal, importer: HostId
    ) -> None:
        """These do not move."""
        self.report(identifier, self._batches[identifier].refused(migrations, reason, importer))

    def take_back(self, identifier: BatchId, items: Iterable[Item], reason: Refusal) -> None:
        """These may try another importer."""
        self._return(self._batches[identifier], items, reason)

    def freeze_again(
        self,
        identifier: BatchId,
        failed: Iterable[tuple[Item, Refusal]],
        others: Iterable[tuple[Item, Refusal]],
    ) -> None:
        """These could not be frozen now: some more tries, each after a new REQUEST.

        ``others`` could, and go with them (an address leaves whole): a try more does not count against them.
        """
        batch = self._batches[identifier]
        again: list[tuple[Item, Refusal]] = []
        for item, reason in failed:
            batch.freezes[item.migration] += 1
            if batch.freezes[item.migration] < self._context.settings.freezes_max:
                again.append((item, reason))
            else:
                self.report(identifier, batch.refused([item.migration], reason))
        self._return_all(batch, [*again, *others])

    def shipped(self, chunk: ChunkId, host: HostId) -> None:
        """The next chunk may be frozen."""
        self._advance(self._batches[chunk.batch], host)

    def left(self, chunk: ChunkId, host: HostId) -> None:
        """The chunk no longer occupies the pipeline."""
        batch = self._batches[chunk.batch]
        leg = batch.legs.get(host)
        if leg is not None:
            leg.moving.discard(chunk)
        self._advance(batch, host)
        self._finish(batch)

    def in_time(self, chunk: ChunkId, host: HostId) -> None:
        """The importer has answered: it misses no deadline in succession."""
        leg = self._batches[chunk.batch].legs.get(host)
        if leg is not None:
            leg.misses = 0

    def overdue(
        self,
        chunk: ChunkId,
        host: HostId,
        migrations: Iterable[MigrationId],
        frozen_at: float,
        reason: Refusal,
    ) -> None:
        """The importer was not prepared in time: that costs a chunk, and the leg only if it happens again.

        What waits in the stream behind that chunk is late because of it: it does not count, and before
        anything else is frozen an empty page is to be answered.
        """
        batch = self._batches[chunk.batch]
        leg = batch.legs.get(host)
        if leg is None:
            return
        batch.alone.update(migrations)
        if frozen_at >= leg.missed_at:
            leg.misses += 1
            leg.missed_at = self._context.now
        if leg.misses >= self._context.settings.leg_failures_max:
            self._lose(batch, host, reason)
            return
        if leg.probe not in leg.pages and (leg.ready or len(leg.moving) > 1):
            leg.probe = batch.next_page
            leg.pages[leg.probe] = ()
            batch.next_page += 1
            self._context.stream(host, messages.Reserve(batch.id, leg.probe, (), batch.modes))
            self._await(batch, leg, self._context.settings.reserve_timeout_s)
        self.chunks.abort(chunk, reason, retry=True, streaming=True, tried=True)

    def settled(self, chunk: ChunkId) -> None:
        """The chunk is done with."""
        batch = self._batches.get(chunk.batch)
        if batch is not None:
            self._finish(batch)


def _no_room(batch: Batch, asked: int, whole: str) -> Refusal:
    """Why the rest of a batch stays, of which ``asked`` sockets were left to be offered a place."""
    planned = asked - wanted(batch.pending.values()).total
    queued = sum(item.queued for item in batch.pending.values())
    queues = " (one of the others waits in a listener's queue)" if queued == 1 else ""
    queues = f" ({queued} of the others wait in listeners' queues)" if queued > 1 else queues
    return Refusal(
        Code.NO_OFFER,
        f"those who offered have room for {planned} of {asked} sockets{queues}{whole}; import from them, "
        "raise their maxima (imports), or move fewer",
    )


def _candidates(batch: Batch) -> list[Candidate]:
    """Who has offered, in order of arrival."""
    return [
        Candidate(host, offer.rooms, offer.waiting, offer.load, offer.weight)
        for host, offer in batch.offers.items()
    ]
