# SPDX-License-Identifier: MIT
"""What the daemon does now and then, off the freeze: folding, pruning, looking around."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sqlite3
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from sockmi import notify
from sockmi.device_news import DeviceNews
from sockmi.native import trim
from sockmi.protocol.context import Capacity
from sockmi.shell import Shell

_log = logging.getLogger(__name__)

_FOLD_INTERVAL_S = 1.0
_TRIM_AFTER_ROWS = 100
_DEVICES_AFTER_S = 0.05  # a new one gets its address and goes up
_DEVICES_PAUSE_S = 1.0  # they come and go in numbers
_DEVICES_WAIT_S = 1.0  # at most, until nothing is frozen
_DEVICES_AGAIN_MAX_S = 60.0
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
        renew_devices: Callable[[], None],
        local_addresses: Callable[[], frozenset[IPv4Address | IPv6Address]],
        keep_workers: Callable[[], None],
        look_at_tables: Callable[[], None],
    ) -> None:
        """``look_at_listeners``: the kernel has no news of a socket that only stops listening.
        ``keep_workers``: called once a second while something is frozen, or about to be.
        ``look_at_tables``: whether they are there, once a second if nothing is frozen.
        ``renew_devices``: of the redirects, in a thread, as is ``local_addresses``.

        ``look_at_ages``: of what waits in the import lists. ``is_calm``: nothing is frozen, nor about to be.
        """
        self._loop = loop
        self._shell = shell
        self._capacity = capacity
        self._is_calm = is_calm
        self._look_at_listeners = look_at_listeners
        self._look_at_ages = look_at_ages
        self._renew_devices = renew_devices
        self._local_addresses = local_addresses
        self._keep_workers = keep_workers
        self._look_at_tables = look_at_tables
        self._device_news = DeviceNews()  # from now on: what comes while the redirects are set up counts
        self._devices_again_s = _DEVICES_PAUSE_S
        self._ended = False
        self._untrimmed = 0  # rows folded since memory was given back
        self._trim_again = True  # at first: the start is work, too

    def start(self) -> None:
        """Do all of them, from now on."""
        self._fold()
        self._prune()
        self._look_at_devices()
        self._listeners()
        self._ages()

    def finish(self) -> None:
        """What must not be left undone when the daemon ends."""
        self._ended = True
        self._loop.remove_reader(self._device_news.socket)
        self._device_news.close()
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
            self._look_at_tables()
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

    def _look_at_devices(self) -> None:
        """See that the redirects have all devices, and that an exporter may name this host by any address."""
        not_before = self._loop.time() + _DEVICES_PAUSE_S
        future = self._loop.run_in_executor(None, self._renewed)

        def looked(one: asyncio.Future[frozenset[IPv4Address | IPv6Address]]) -> None:
            if self._ended or one.cancelled():
                return
            if (error := one.exception()) is None:
                self._capacity.addresses = one.result()
                self._devices_again_s = _DEVICES_PAUSE_S
            else:
                pause_s, self._devices_again_s = self._devices_again_s, self._devices_again_s * 2
                self._devices_again_s = min(self._devices_again_s, _DEVICES_AGAIN_MAX_S)
                _log.warning(
                    "devices have changed, and the redirects have not (%s); once more in %g s", error, pause_s
                )
                self._loop.call_later(pause_s, self._look_at_devices)
                return
            self._loop.add_reader(self._device_news.socket, self._devices_changed, not_before)

        future.add_done_callback(looked)

    def _renewed(self) -> frozenset[IPv4Address | IPv6Address]:
        self._renew_devices()
        return self._local_addresses()

    def _devices_changed(self, not_before: float) -> None:
        if not self._device_news.read():
            return
        self._loop.remove_reader(self._device_news.socket)
        now = self._loop.time()
        at = max(not_before, now + _DEVICES_AFTER_S)
        self._loop.call_later(at - now, self._when_calm, at + _DEVICES_WAIT_S)

    def _when_calm(self, at_last: float) -> None:
        if self._ended:
            return
        if self._is_calm() or self._loop.time() >= at_last:
            self._device_news.read()  # it is all looked at now
            self._look_at_devices()
        else:
            self._loop.call_later(_DEVICES_AFTER_S, self._when_calm, at_last)

    def _listeners(self) -> None:
        self._look_at_listeners()
        self._loop.call_later(self._shell.config.timing.audit_interval_s, self._listeners)

    def _ages(self) -> None:
        self._look_at_ages()
        self._loop.call_later(_AGES_INTERVAL_S, self._ages)
