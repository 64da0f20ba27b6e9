# SPDX-License-Identifier: MIT
"""The two halves of an imaginary move: what the exporter does, and what the importer does."""

from __future__ import annotations

import copy
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address
from typing import cast

from sockmi import api
from sockmi.addresses import Endpoint, FourTuple
from sockmi.config import ImportConfig
from sockmi.crashpoints import reached, rehearsing
from sockmi.engine.base import Kind, Needs, SocketFacts
from sockmi.engine.files import inode_in, link_of
from sockmi.exporting import Export, Exporting, Selected
from sockmi.exporting.items import item_of
from sockmi.importing import Importing
from sockmi.importing.images import chunk_name
from sockmi.metrics import Metrics
from sockmi.placing import Placing
from sockmi.protocol import actions
from sockmi.protocol.context import Capacity
from sockmi.protocol.events import Event
from sockmi.protocol.records import ID_BYTES, Item, Place
from sockmi.redirect.base import Mode
from sockmi.redirecting import Redirecting
from sockmi.refusal import Refusal
from sockmi.rehearsing.dialogue import Dialogue
from sockmi.rehearsing.props import Later, Ourselves, Taker, Uncounted, Untold, Unwritten
from sockmi.shell import Shell, inbound

_log = logging.getLogger(__name__)

FEW = 4
"""More sockets than this need no rehearsal: the first of them are the others'."""

# Of the loopback network, and nobody's: no packet is ever sent from one to the other.
_HERE, _PEER = IPv4Address("127.83.77.1"), Endpoint(IPv4Address("127.83.77.2"), 9)
_NOBODY = bytes(ID_BYTES)
_IMPORT = b'{"op": "import", "id": 1, "requests": [{"states": ["connected"]}]}'
_TAKEN = b'{"op": "taken", "id": 1, "migrations": ["%s"]}'
_TCP_REPAIR, _ON, _OFF_NO_PROBE = 19, 1, -1


class Rehearsal:
    """Has parts of its own, made like the daemon's; with it they share the engine, the kernel's tables and
    the spool, which keep what is theirs by connection and by chunk.

    For the repair engine. A rehearsal that fails is no obstacle to a move, and the last one.
    """

    def __init__(self, shell: Shell) -> None:
        """``shell``: the daemon's."""
        self._loop, self._owners = Later(), Ourselves()
        self._dialogue: Dialogue  # of the half that is played
        engine = copy.copy(shell.engine)
        engine.owners = self._owners
        # What comes to life tells its peer so: this one stays dormant.
        engine.activate = lambda fds, _images: [None] * len(fds)  # type: ignore[assignment]
        self._mode = Mode.FORWARD if Mode.FORWARD in shell.redirects else None
        self._shell = stage = replace(
            shell,
            config=shell.config.model_copy(update={"imports": ImportConfig()}),
            loop=self._loop,
            engine=engine,
            journal=Unwritten(),
            metrics=cast(Metrics, Uncounted()),
            dispatch=self._tell,
            send_held=lambda _host, _packets: True,
            moves=Untold(),
        )
        self._redirecting = Redirecting(
            stage, {}, {}, lambda tuples: [None] * len(tuples), Counter, lambda _holding: False
        )
        placing = Placing(
            stage.config.redirect.modes,
            path_to=lambda _address: None,
            states_of=lambda tuples: [None] * len(tuples),
            bury=lambda _tuple: True,
            obstacle=lambda *_unused: None,
            is_led=lambda _device: True,
            peers=shell.peers,
        )
        self._importing = Importing(stage, placing, Capacity(), self._redirecting)
        self._exporting = Exporting(
            stage,
            self._redirecting,
            look=lambda _descriptors, _done: None,
            find_holders=lambda _inodes, _done: None,
            find=lambda _tuple: None,
            destroy=lambda _tuple, _cookie: True,
            onward=self._importing.onward,
        )
        self._failed = False
        self._sample: tuple[Item, bytes] | None = None  # with its image, for the importer's half

    def lead_away(self) -> None:
        """What the exporter does."""
        self._play(self._lead_away)

    def take_in(self) -> None:
        """What the importer does."""
        self._play(self._take_in)

    def _play(self, half: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with rehearsing():
                half()
        except Refusal as refusal:
            _log.debug("a rehearsal: %s", refusal)
        except Exception:
            _log.info("no move is rehearsed any more; each takes a little longer", exc_info=True)
            self._failed = True
        finally:
            self._loop.clear()

    # -- the exporter's half

    def _lead_away(self) -> None:
        with _imaginary() as sock, ExitStack() as undo:
            export = self._export(sock)
            item = item_of(export, self._shell, self._redirecting)
            undo.callback(self._exporting.exports.end, export, None, "moved", None)
            undo.callback(self._unhold, item)
            undo.callback(self._redirecting.drop_route, item.connection)
            if self._mode:
                undo.callback(self._shell.redirects[self._mode].take_back, _tuples(item))
            freezer, committer = self._exporting.freezer, self._exporting.committer
            self._dialogue = Dialogue(
                item.home,
                _NOBODY,
                item.home,
                {
                    # To nowhere: whether an importer can be reached is known by now.
                    actions.Freeze: lambda action: freezer.freeze(replace(action, places=(Place(),))),
                    actions.Commit: committer.commit,
                    actions.LetGo: committer.let_go,
                },
            )
            self._dialogue.move(item, self._place(item), b"", self._loop.run)
            self._sample = item, export.image
            reached("rehearsal.led-away")

    def _export(self, sock: socket.socket) -> Export:
        self._owners.descriptor = sock.fileno()
        inode, local = inode_in(link_of(sock.fileno())) or 0, Endpoint(_HERE, sock.getsockname()[1])
        facts = SocketFacts(inode, 0, Kind.CONNECTED, "ESTABLISHED", sock.family, local, _PEER, 0, 0, Needs())
        selected = Selected(-1, os.getpid(), sock.fileno())
        return self._exporting.exports.register(selected, facts, os.urandom(ID_BYTES))

    # -- the importer's half

    def _take_in(self) -> None:
        if self._sample is None:
            self._lead_away()
        assert self._sample is not None
        sample, image = self._sample
        item, ours = replace(sample, home=_NOBODY, handle=None), sample.home
        importing, taker = self._importing, Taker()
        with ExitStack() as undo:

            def prepare(action: actions.Prepare) -> None:
                undo.callback(self._shell.spool.remove, chunk_name(action.chunk))
                undo.callback(self._discard, taker)
                importing.preparer.prepare(action)

            def activate(action: actions.Activate) -> None:
                [holding] = action.holdings
                if self._mode and (one := inbound(holding)):
                    undo.callback(self._shell.redirects[self._mode].evict, [one])
                importing.activation.activate(action)

            def between() -> None:
                self._loop.run()
                if taker.is_asked():
                    importing.handover.taken(taker, api.parse_request(_TAKEN % item.migration.hex().encode()))

            undo.callback(self._unhold, item)
            undo.callback(self._redirecting.drop_holding, item.connection)
            importing.handover.wait(taker, api.parse_request(_IMPORT))
            undo.callback(importing.handover.gone, taker)
            self._dialogue = Dialogue(
                _NOBODY, ours, ours, {actions.Prepare: prepare, actions.Activate: activate}
            )
            self._dialogue.move(item, self._place(item), image, between)
            reached("rehearsal.taken-in")

    def _discard(self, taker: Taker) -> None:
        left = [one for copy in list(self._importing.stock.copies) if (one := copy.fd) >= 0]
        self._shell.engine.discard([taker.taken, *left])

    # -- both

    def _place(self, item: Item) -> Place:
        return Place(item.local, self._mode) if self._mode else Place()

    def _tell(self, event: Event) -> None:
        self._dialogue.tell(event)

    def _unhold(self, item: Item) -> None:
        self._shell.holds.unhold(_tuples(item))
        self._shell.held.forget(_tuples(item))


def _tuples(item: Item) -> list[FourTuple]:
    return [item.tuple] if item.tuple else []


@contextmanager
def _imaginary() -> Iterator[socket.socket]:
    """A connection of which there is only this end, made and closed in repair: without a packet."""
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _ON)
        sock.bind((str(_HERE), 0))
        sock.connect((str(_PEER.address), _PEER.port))
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF_NO_PROBE)
        try:
            yield sock
        finally:
            with suppress(OSError):  # a whole move has closed it
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _ON)
