# SPDX-License-Identifier: MIT
"""Applications wait for sockets, are sent dormant descriptors, and say which of them they keep.

Descriptors leave as soon as they are prepared, so that the application has them when the exporter has
decided: before that its ``taken`` is not answered.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sockmi import api
from sockmi.control import Client
from sockmi.crashpoints import reached
from sockmi.image import Section, section
from sockmi.import_lists import Waiting
from sockmi.importing.answers import context_file, import_response, imported_item, taken_response
from sockmi.importing.copies import Copy, importer_failed
from sockmi.importing.criteria import criteria_of
from sockmi.importing.delivery import Delivery
from sockmi.importing.life import Life
from sockmi.importing.listed import Listed
from sockmi.importing.stock import Stock
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

# An application that has been sent its descriptor and does not answer loses it again.
_TAKE_TIMEOUT_S = 5.0
# The daemon goes on when the application runs: both may have the same processor.
_SETTLE_AFTER_S = 0.001
# An application that runs so rarely that all it is handed lapses is told so in the end.
_LAPSES_MAX = 5
_WAITING_MAX = 65536  # requests of one user other than root
_UNDONE = Refusal(Code.CHANGED, "Its exporter has undone the move; ask again.")


@dataclass(slots=True)
class Wish:
    """What a client waits for, and until when (time.monotonic(); None: for ever).

    ``lapses``: how often all that it was handed had waited for too long.
    """

    request: api.ImportRequest
    until_s: float | None
    timer: Any = None
    lapses: int = 0

    def cancel(self) -> None:
        """It is not waited for any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@dataclass(slots=True)
class Handing:
    """Dormant descriptors on their way to one client.

    ``decided``: the exporter has; until then ``taken`` is not answered. ``undone``: those that were
    not committed. ``done`` is called when they live, or have been listed.
    """

    wish: Wish
    copies: list[Copy]
    done: Callable[[], None]
    decided: bool
    timer: Any = None
    taken: api.TakenRequest | None = None
    undone: set[UUID] = field(default_factory=set)

    def cancel(self) -> None:
        """The time limit of what is waited for."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Handover:
    """Owns who waits for what, and what is on its way to whom: a client is in one of these states."""

    def __init__(self, shell: Shell, stock: Stock, listed: Listed, life: Life, delivery: Delivery) -> None:
        self._shell = shell
        self._copies = stock.copies
        self._lists = stock.lists
        self._room = stock.room
        self._listed = listed
        self._life = life
        self._delivery = delivery
        self._wishes: dict[Client, Wish] = {}
        self._handings: dict[Client, Handing] = {}

    # -- an application waits

    def wait(self, client: Client, request: api.ImportRequest) -> None:
        """An application wants sockets: give what is listed, else let it wait."""
        if client in self._wishes or client in self._handings:
            raise Refusal(Code.BAD_REQUEST, "This connection has an import under way; use another one.")
        if client.uid and self._lists.waiting_of(client.uid) + len(request.requests) > _WAITING_MAX:
            message = (
                f"Your imports wait for {_WAITING_MAX} sockets already; have fewer of them wait at once."
            )
            raise Refusal(Code.BAD_REQUEST, message)
        until_s = time.monotonic() + request.timeout_ms / 1000 if request.timeout_ms >= 0 else None
        self._wait(client, Wish(request, until_s))

    def gone(self, client: Client) -> None:
        """The inverse of ``wait``: what was on its way to the client is listed, once it is decided."""
        self._lists.cancel(client)
        if (wish := self._wishes.pop(client, None)) is not None:
            wish.cancel()
        if (handing := self._handings.pop(client, None)) is not None:
            handing.cancel()
            for copy in handing.copies:
                (self._listed.put if handing.decided else self._listed.put_away)(copy)
            handing.done()
        self._room.update()

    def _wait(self, client: Client, wish: Wish) -> None:
        waitings = [
            Waiting(client, index, criteria_of(one), client.uid)
            for index, one in enumerate(wish.request.requests)
        ]
        # No more than one answer can carry: what is claimed is handed over now.
        taken = (one for waiting in waitings if (one := self._lists.take(waiting)))
        found = list(itertools.islice(taken, api.DESCRIPTORS_MAX // 2))
        self._lists.wait(waitings)
        self._wishes[client] = wish
        if found:
            copies = []
            for candidate in found:
                copy = self._copies[candidate.migration_id.bytes]
                if self._listed.wake(copy):
                    copies.append(copy)
                else:
                    self._lists.unreserve(candidate.migration_id)
            if copies:
                self.hand(client, copies)
                return
        if wish.until_s is not None:
            left_s = wish.until_s - time.monotonic()
            if left_s <= 0:
                self._answer_nothing(client)
                return
            wish.timer = self._shell.loop.call_later(left_s, self._answer_nothing, client)
        self._room.update()

    def _answer_nothing(self, client: Client) -> None:
        wish = self._wishes.pop(client)
        self._lists.cancel(client)
        self._room.update()
        client.respond(api.ImportResponse(id=wish.request.id, imported=[]))

    def offer(self, migration: UUID) -> None:
        """Give a listed socket to an application that waits, or to the program that listens for it."""
        if not self._lists.is_free(migration):
            return
        copy = self._copies[migration.bytes]
        waiting = self._lists.claim(copy.candidate)
        if waiting is None:
            self._delivery.deliver(copy)
        elif isinstance(waiting.client, Client) and self._listed.wake(copy):
            self.hand(waiting.client, [copy])

    def by_client(self, copies: Iterable[Copy]) -> dict[Client, list[Copy]]:
        """Those that an application waits for."""
        found: dict[Client, list[Copy]] = {}
        for copy in copies:
            waiting = self._lists.claimed(copy.candidate.migration_id)
            if waiting is not None and isinstance(waiting.client, Client) and waiting.client in self._wishes:
                found.setdefault(waiting.client, []).append(copy)
        return found

    # -- descriptors are on their way

    def hand_early(self, copies: Iterable[Copy]) -> None:
        """Send what is prepared, so that no time is lost with that once it is decided."""
        undecided = [copy for copy in copies if copy.holding is None and self._copies.has(copy)]
        for client, theirs in self.by_client(undecided).items():
            self.hand(client, theirs, decided=False)

    def hand(
        self,
        client: Client,
        copies: list[Copy],
        done: Callable[[], None] = lambda: None,
        *,
        decided: bool = True,
    ) -> None:
        """Send dormant descriptors; the client's ``taken``, and the decision, bring them to life."""
        wish = self._wishes.pop(client)
        wish.cancel()
        items, contexts = [], []
        failure: OSError | None = None
        for copy in copies:
            copy.client = client
            waiting = self._lists.claimed(copy.candidate.migration_id)
            context = section(copy.image, Section.CONTEXT) if copy.facts.context_bytes else b""
            try:
                if client.uid:  # it is the importer's now, not ours
                    os.fchown(copy.fd, client.uid, -1)
                if context:
                    contexts.append(context_file(context))
            except OSError as error:
                failure = error
            items.append(imported_item(copy, waiting.index if waiting else 0, context=bool(context)))
        self._lists.cancel(client)
        handing = Handing(wish, copies, done, decided)
        handing.timer = self._shell.loop.call_later(_TAKE_TIMEOUT_S, self._taken_too_late, client)
        self._handings[client] = handing
        descriptors = [copy.fd for copy in copies] + contexts
        if failure is None:
            client.respond(import_response(wish.request.id, items, len(descriptors)), descriptors)
        else:  # as if it had gone: they are listed, once it is decided
            _log.warning("import of pid %d: %s; disconnected, it may ask again", client.pid, failure)
            client.close()
        reached("hand.sent")
        for context_fd in contexts:
            os.close(context_fd)
        self._room.update()

    def _taken_too_late(self, client: Client) -> None:
        """The client sits on descriptors that are not live; they are given to the next one."""
        client.close()

    def undo(self, copy: Copy) -> None:
        """A copy is discarded that a client has, dormant (and now dead)."""
        if copy.client is None:
            return
        handing = self._handings[copy.client]
        handing.copies.remove(copy)
        handing.undone.add(copy.candidate.migration_id)
        if not handing.copies and handing.taken is not None:
            self._wait_again(copy.client, handing, handing.taken)

    def _wait_again(self, client: Client, handing: Handing, taken: api.TakenRequest) -> None:
        """All that a client had been handed is undone, or has to be made anew: it waits as before."""
        del self._handings[client]
        handing.cancel()
        client.respond(api.TakenResponse(id=taken.id, live=[], waiting=True))
        if not client.closed:  # it may have gone just now, and `gone` has found nothing of it
            self._wait(client, handing.wish)

    # -- the decision

    def on_their_way(self, copies: Iterable[Copy]) -> dict[Client, Handing]:
        """What some of these belong to."""
        return {copy.client: self._handings[copy.client] for copy in copies if copy.client}

    def sent(self) -> Iterator[Copy]:
        """What is ours and that an application has been sent, but has no life there yet."""
        return (copy for one in self._handings.values() if one.decided for copy in one.copies)

    def hold_back(self, clients: Iterable[Client]) -> None:
        """The decision could not be journalled: nothing comes to life, whatever the applications say."""
        for client in clients:
            if client in self._handings:
                self._handings[client].decided = False

    def decided(self, handings: dict[Client, Handing]) -> None:
        """It is journalled; some applications have had their say before."""
        for client, handing in handings.items():
            if handing.taken is not None:
                self._take(client, handing, handing.taken)

    # -- the application's word

    def taken(self, client: Client, request: api.TakenRequest) -> None:
        """The application has its descriptors: bring them to life."""
        handing = self._handings.get(client)
        if handing is None or handing.taken is not None:
            raise Refusal(
                Code.TIMEOUT, f"Nothing is on its way to you; answer an import within {_TAKE_TIMEOUT_S:g} s."
            )
        reached("taken.received")
        handing.cancel()
        handing.taken = request
        if not handing.copies:
            self._wait_again(client, handing, request)
        elif handing.decided:
            self._take(client, handing, request)
        elif handing.wish.until_s is not None:
            left_s = max(0.0, handing.wish.until_s - time.monotonic())
            handing.timer = self._shell.loop.call_later(left_s, self._undecided_too_long, client)

    def _undecided_too_long(self, client: Client) -> None:
        """The application does not wait longer, whatever the exporter will say."""
        handing = self._handings.pop(client)
        for copy in handing.copies:
            self._listed.put_away(copy)
        if handing.taken is not None:
            client.respond(api.TakenResponse(id=handing.taken.id, live=[]))

    def _take(self, client: Client, handing: Handing, request: api.TakenRequest) -> None:
        """The decision is there, and so is the application's word."""
        handing.cancel()
        wanted = set(request.migrations)
        taken = [copy for copy in handing.copies if copy.candidate.migration_id in wanted]
        for copy in handing.copies:
            if copy.candidate.migration_id not in wanted:
                self._listed.put(copy)
        failed = self._try(self._life.renew, taken)
        taken = [copy for copy in taken if copy.candidate.migration_id not in failed]
        if failed and not taken and handing.wish.lapses < _LAPSES_MAX:
            handing.wish.lapses += 1
            self._wait_again(client, handing, request)
            handing.done()
            return
        del self._handings[client]
        failed |= self._try(self._life.begin, taken)
        failed |= dict.fromkeys(handing.undone & wanted, _UNDONE)
        live = [copy for copy in taken if copy.candidate.migration_id not in failed]
        client.respond(taken_response(request.id, live, failed))
        connections = {copy.tuple: copy.fd for copy in live if copy.tuple}
        self._shell.held.deliver(self._shell.held.take(list(connections)), connections)
        reached("taken.answered")
        # They are the client's, whatever happens to us: this can wait until it has had the processor.
        self._shell.loop.call_later(_SETTLE_AFTER_S, self._settle, live, handing.done)

    def _try(
        self, step: Callable[[list[Copy]], dict[UUID, Refusal]], copies: list[Copy]
    ) -> dict[UUID, Refusal]:
        """A step of coming to life: those that do not."""
        try:
            return step(copies)
        except Exception as error:
            _log.exception("bringing %d sockets to life", len(copies))
            # What lives has moved: the image of it is the past.
            dead = [copy for copy in copies if copy.fd < 0 or not self._life.has_begun(copy)]
            for copy in dead:
                if copy.fd >= 0:
                    self._life.fall_back(copy)
            return {copy.candidate.migration_id: importer_failed(error) for copy in dead}

    def _settle(self, copies: Collection[Copy], done: Callable[[], None]) -> None:
        self._life.settle(copies)
        done()
