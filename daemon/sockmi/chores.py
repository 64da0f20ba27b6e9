# SPDX-License-Identifier: MIT
"""What the daemon does now and then, off the freeze: folding, pruning, looking around."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
import sqlite3
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from sockmi import notify
from sockmi.native import trim
from sockmi.protocol.context import Capacity
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

_FOLD_INTERVAL_S = 1.0
_TRIM_AFTER_ROWS = 100
_ADDRESSES_PAUSE_S = 1.0  # they come and go in numbers
_RTMGRP_ADDRESSES = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_AGES_INTERVAL_S = 1.0
_KEEP_HISTORY = 100_000
_PRUNE_INTERVAL_S = 60.0
_PRUNE_ROWS = 1000  # at once


class Chores:
    """Each does its work and asks to be called again; ``start`` stands beside its inverse, ``finish``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        shell: Shell,
        capacity: Capacity,
        *,
        is_calm: Callable[[], bool],
        look_at_listeners: Callable[[], None],
        look_at_ages: Callable[[], None],
        local_addresses: Callable[[], frozenset[IPv4Address | IPv6Address]],
        keep_workers: Callable[[], None],
    ) -> None:
        """``look_at_listeners``: the kernel has no news of a socket that only stops listening.
        ``keep_workers``: called once a second while something is frozen, or about to be.

        ``look_at_ages``: of what waits in the import lists. ``is_calm``: nothing is frozen, nor about to be.
        """
        self._loop = loop
        self._shell = shell
        self._capacity = capacity
        self._is_calm = is_calm
        self._look_at_listeners = look_at_listeners
        self._look_at_ages = look_at_ages
        self._local_addresses = local_addresses
        self._keep_workers = keep_workers
        self._address_news = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        self._untrimmed = 0  # rows folded since memory was given back
        self._trim_again = True  # at first: the start is work, too

    def start(self) -> None:
        """Do all of them, from now on."""
        self._fold()
        self._prune()
        self._address_news.bind((0, _RTMGRP_ADDRESSES))
        self._learn_addresses()
        self._listeners()
        self._ages()

    def finish(self) -> None:
        """What must not be left undone when the daemon ends."""
        self._loop.remove_reader(self._address_news)
        self._address_news.close()
        while self._shell.moves.write(calm=True):
            pass
        try:
            self._shell.journal.prune(_KEEP_HISTORY)
        except Exception:  # a full disk is no reason not to stop
            _log.exception("pruning the journal")

    def watch(self, interval_s: float) -> None:
        """Tell systemd that the loop turns."""
        notify.alive()
        self._loop.call_later(interval_s, self.watch, interval_s)

    def _fold(self) -> None:
        """Index what the journal has appended, and give back memory after much work."""
        if self._is_calm():
            with contextlib.suppress(sqlite3.Error, OSError):  # a full disk: next time
                self._shell.catch_up()
                self._untrimmed += (rows := self._shell.journal.fold())
                self._trim(quiet=not rows and not len(self._shell.moves))
        else:
            self._keep_workers()
        self._tell_moves()
        self._loop.call_later(_FOLD_INTERVAL_S, self._fold)

    def _trim(self, *, quiet: bool) -> None:
        """After much work, and again when there is none: what the last of it had is free by then."""
        much = self._untrimmed >= _TRIM_AFTER_ROWS
        if much or (quiet and self._trim_again):
            self._untrimmed, self._trim_again = 0, much
            gc.collect()
            trim()

    def _tell_moves(self) -> None:
        if self._shell.moves.write(calm=self._is_calm()):
            self._loop.call_later(0, self._tell_moves)

    def _prune(self) -> None:
        """A little at a time: the history does not grow without end between two stops."""
        pruned = 0
        if self._is_calm():
            with contextlib.suppress(sqlite3.Error):
                pruned = self._shell.journal.prune(_KEEP_HISTORY, _PRUNE_ROWS)
        more = pruned == _PRUNE_ROWS or not self._is_calm()
        self._loop.call_later(_FOLD_INTERVAL_S if more else _PRUNE_INTERVAL_S, self._prune)

    def _learn_addresses(self) -> None:
        """An exporter may name its target by any address of that host."""
        self._loop.add_reader(self._address_news, self._addresses_changed)
        future = self._loop.run_in_executor(None, self._local_addresses)

        def learnt(one: asyncio.Future[frozenset[IPv4Address | IPv6Address]]) -> None:
            if not one.cancelled() and one.exception() is None:
                self._capacity.addresses = one.result()

        future.add_done_callback(learnt)

    def _addresses_changed(self) -> None:
        """What has changed is no matter, nor whether the kernel had room to tell all (ENOBUFS)."""
        self._loop.remove_reader(self._address_news)
        try:
            while self._address_news.recv(65536):
                pass
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                raise
        self._loop.call_later(_ADDRESSES_PAUSE_S, self._learn_addresses)

    def _listeners(self) -> None:
        self._look_at_listeners()
        self._loop.call_later(self._shell.config.timing.audit_interval_s, self._listeners)

    def _ages(self) -> None:
        self._look_at_ages()
        self._loop.call_later(_AGES_INTERVAL_S, self._ages)
