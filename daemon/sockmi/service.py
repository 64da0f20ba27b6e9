# SPDX-License-Identifier: MIT
"""The daemon: one event loop, the protocol core, and the parts that carry out its actions.

What arrives (datagrams, stream messages, control requests, timers, the kernel's news) becomes an
event; the core answers with actions; they are carried out in order, and their answers are events
again. Nothing here decides anything that the core could decide.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import socket
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from sockmi import durable, logs, notify
from sockmi.config import Config, ConfigError
from sockmi.control import ControlServer
from sockmi.crashpoints import arm
from sockmi.diag import DestroyedSockets, SocketDiag
from sockmi.engine.choice import choose
from sockmi.engine.duplicate import duplicate
from sockmi.engine.kernel import ModuleMissing
from sockmi.engine.listing import listeners
from sockmi.engine.owners import find_holders
from sockmi.engine.trial import obstacle
from sockmi.exporting import Exporting
from sockmi.importing import Importing
from sockmi.journal import Journal, JournalError
from sockmi.limits import raise_limit
from sockmi.members import Members
from sockmi.metrics import Metrics
from sockmi.native import library, trim
from sockmi.operations import Operations
from sockmi.placing import Placing, local_addresses
from sockmi.policy import POLICIES
from sockmi.protocol import actions, events, messages
from sockmi.protocol.codec import CodecError, decode, encode
from sockmi.protocol.context import Capacity
from sockmi.protocol.context import Settings as CoreSettings
from sockmi.protocol.core import Core
from sockmi.protocol.records import Holding, HostId, Route
from sockmi.recovery import Recovery
from sockmi.redirect.base import Outbound
from sockmi.redirect.factory import make_redirects
from sockmi.redirect.held import HeldPackets
from sockmi.redirect.icmp import IcmpError, IcmpInjector, IcmpRelay
from sockmi.redirecting import Redirecting
from sockmi.refusal import Code, Refusal
from sockmi.shell import Shell, unknown
from sockmi.spool import Spool, SpoolError
from sockmi.transport.group import GroupError
from sockmi.transport.identity import Identity, IdentityError
from sockmi.transport.keyring import KeyFileError
from sockmi.transport.stream import StreamError
from sockmi.version import VERSION

_log = logging.getLogger(__name__)

_FRAME_PROTOCOL = 0
_FRAME_ICMP = 1
_FRAME_HELD = 2
_FOLD_INTERVAL_S = 1.0
_TRIM_AFTER_ROWS = 100
_ADDRESSES_INTERVAL_S = 10.0
_AGES_INTERVAL_S = 1.0
_KEEP_HISTORY = 100_000
_PRUNE_INTERVAL_S = 60.0
_PRUNE_ROWS = 1000  # at once
_STOP_GRACE_S = 5.0
# Halves, thirds, quarters and fifths are whole, and 1000 fits in 16 bits.
_WEIGHT_UNITS = 60
# What is in doubt is silent until the other host is heard again: ask often.
_RETRY_MAX_S = 3.0


class StartError(Exception):
    """The daemon cannot start; the text says what, where and what to do."""


class DaemonFailed(Exception):
    """The daemon ended itself; its log has the details, and a restart settles what was under way."""


_START_ERRORS = (
    ConfigError,
    StartError,
    JournalError,
    SpoolError,
    IdentityError,
    KeyFileError,
    GroupError,
    StreamError,
)


class Daemon:
    """One host's daemon. ``start`` and ``run`` belong to one thread and one event loop."""

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        self.config = config
        self.config_path = config_path
        self.loop = asyncio.new_event_loop()
        self.version = VERSION
        self.started_at = time.monotonic()
        self.stopping = False
        self.metrics = Metrics()
        self._events: deque[events.Event] = deque()
        self._draining = False
        self._failure: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._untrimmed = 0  # rows folded since memory was given back
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(config.state_dir / "lock")
        self.journal = Journal(config.journal_path)
        self.identity = Identity.load_or_create(config.state_dir)
        self.host_name = config.host_name or socket.gethostname()
        self.redirects, self.tables = make_redirects(config.redirect, durable.modes_in_use(self.journal))
        self.diag = SocketDiag()
        self.capacity = Capacity(
            modes=config.redirect.modes,
            weight=offered_weight(config.weight),
            image_bytes_max=config.image_bytes_max,
        )
        self.core = Core(
            self.identity.host_id, core_settings(config), self.capacity, POLICIES[config.policy]()
        )
        arm(library())
        try:
            self.engine, self.why_engine = choose(config.engine, self.tables.settings.inject_mark)
        except ModuleMissing as missing:
            raise StartError(f"engine: kernel is asked for, but {missing}; or set engine: auto") from None
        self.metrics.engine.labels(engine=self.engine.name).set(1)
        self.members = Members(
            self.loop,
            config,
            self.identity,
            self.host_name,
            on_datagram=self._datagram,
            on_frame=self._frame,
            on_opened=lambda host: self.dispatch(events.StreamOpened(host)),
            on_lost=lambda host, reason: self.dispatch(events.StreamLost(host, reason)),
            on_count=self._members_changed,
            engine=self.engine.name,
        )
        self.held = HeldPackets(config.redirect.log_group, self.tables.settings.inject_mark)
        self.shell = Shell(
            config=config,
            host_id=self.identity.host_id,
            host_name=self.host_name,
            loop=self.loop,
            engine=self.engine,
            holds=self.tables,
            held=self.held,
            redirects=self.redirects,
            journal=self.journal,
            spool=Spool(config.spool_dir),
            metrics=self.metrics,
            dispatch=self.dispatch,
            send_held=lambda host, content: self.members.send_frame(host, _FRAME_HELD, content, more=True),
            name_of=self.members.name_of,
        )
        routes: dict[bytes, Route] = {}
        holdings: dict[bytes, Holding] = {}
        self.redirecting = Redirecting(
            self.shell, routes, holdings, self.diag.state, listeners, self._waits_for_application
        )
        self.exporting = Exporting(self.shell, self.redirecting, self._find_holders, self.diag.destroy)
        self.importing = Importing(
            self.shell,
            Placing(
                config.redirect.modes,
                self.tables.routes.path,
                lambda one: self.diag.state(one) is not None,
                obstacle,
            ),
            self.capacity,
            self.redirecting,
        )
        self.operations = Operations(self)
        self._icmp_relay = IcmpRelay(self.tables, list(self.redirects.values()), self._ship_icmp)
        self._icmp_injector = IcmpInjector(self.tables)
        self._destroyed: DestroyedSockets | None = None
        self._control: ControlServer | None = None
        self._carry_out: dict[type, Callable[[Any], None]] = {
            actions.Send: self._send,
            actions.OpenStream: lambda action: self.members.open(action.host),
            actions.Ignored: self._ignored,
            actions.Quiet: lambda action: self.loop.stop(),
            **self.exporting.carry_out(),
            **self.importing.carry_out(),
            actions.Reroute: self.redirecting.reroute,
            actions.SaveRoutes: self.redirecting.save_routes,
            actions.Collect: self.redirecting.collect,
            actions.ForgetNotices: self.redirecting.forget_notices,
            actions.ForgetHoldings: self.redirecting.forget_holdings,
        }

    # -- life

    def start(self) -> None:
        """Reconcile with the journal and the kernel, then open for business."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop)
        self.loop.add_signal_handler(signal.SIGHUP, self._hangup)
        for redirect in self.redirects.values():
            redirect.setup()
        self.dispatch(self._recover())
        self._destroyed = DestroyedSockets(
            self.redirecting.destroyed, self.redirecting.listener_destroyed, self.redirecting.look_at_all
        )
        self.loop.add_reader(self._destroyed.socket, self._destroyed.readable)
        for descriptor in self._icmp_relay.filenos():
            self.loop.add_reader(descriptor, self._icmp_relay.work)
        self.loop.add_reader(self.held, self.held.readable)
        self.members.start()
        self.redirecting.look_at_all()
        if self.config.metrics_port:
            self.metrics.serve(str(self.config.metrics_address), self.config.metrics_port)
        self._control = ControlServer(
            self.loop, self.config.control_path, self.config.control_mode, self.operations
        )
        self._fold()
        self._prune()
        self._learn_addresses()
        self._look_at_listeners()
        self._look_at_ages()
        self.exporting.listeners.queues.resume()
        _log.info("host %s (%s) is ready", self.host_name, self.identity.host_id.hex())

    def _recover(self) -> events.Started:
        """Settle what an earlier run left; what is to be resumed."""
        recovery = Recovery(
            self.shell, self.diag.find, self.diag.destroy, self._duplicates, self.exporting.listeners.queues
        )
        recovery.exports()
        started = durable.started(self.journal)
        self.redirecting.add_routes(started.routes)
        self.redirecting.add_holdings(started.holdings)
        held = frozenset(self.tables.held())
        self.importing.resumption.resume(
            started.prepared, lambda one: recovery.came_to_life(one, held), recovery.unconnected_lives
        )
        self.redirecting.look_for_listeners(self.tables.missed_listeners())
        copies = self.importing.stock.copies
        recovery.kernel(
            self.redirecting.routes,
            self.redirecting.holdings,
            returning={
                chunk.arrivals[position].item.connection
                for chunk in started.prepared
                for position in chunk.prepared
            },
            listed={copy.holding.connection for copy in copies if copy.holding},
            held=held | set(self.tables.unsettled()),
            keep_held={copy.tuple for copy in copies if copy.tuple},
        )
        return started

    def run(self) -> None:
        """Until SIGTERM or SIGINT; finishes or undoes what is under way.

        Raises DaemonFailed when something happened that nobody expected: the journal knows more than a
        process that no longer knows what it has done.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop)
        self.loop.add_signal_handler(signal.SIGHUP, self._hangup)
        # What is there now stays; and a batch of thousands is no garbage to look through every 700 objects.
        gc.collect()
        trim()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        notify.ready()
        watchdog_s = notify.watchdog_interval_s()
        if watchdog_s:
            self._watchdog(watchdog_s)
        try:
            self.loop.run_forever()
        finally:
            self.close()
        if self._failure is not None:
            raise DaemonFailed(str(self._failure)) from self._failure

    def stop(self) -> None:
        """Finish what is committed, undo what is not, then end."""
        if self.stopping:
            return
        self.stopping = True
        notify.stopping()
        self.dispatch(events.Stop(_STOP_GRACE_S))

    def close(self) -> None:
        """Close everything; redirects, holds, journal and spool stay for the next run."""
        if self._control is not None:
            self._control.close()
        self.members.close()
        for descriptor in self._icmp_relay.filenos():
            self.loop.remove_reader(descriptor)
        self._icmp_relay.close()
        self.loop.remove_reader(self.held)
        self.held.close()
        self._icmp_injector.close()
        if self._destroyed is not None:
            self.loop.remove_reader(self._destroyed.socket)
            self._destroyed.close()
        self.metrics.close()
        self.diag.close()
        while self.shell.moves.write(idle=True):
            pass
        try:
            self.journal.prune(_KEEP_HISTORY)
        except Exception:  # a full disk is no reason not to stop
            _log.exception("pruning the journal")
        self.journal.close()
        self.loop.close()

    def _watchdog(self, interval_s: float) -> None:
        notify.alive()
        self.loop.call_later(interval_s, self._watchdog, interval_s)

    def _hangup(self) -> None:
        try:
            changed, restart_needed = self.reload()
        except ConfigError as error:
            _log.error("not reloaded: %s", error)
        else:
            _log.info(
                "reloaded: %s changed, %s need a restart", changed or "nothing", restart_needed or "none"
            )

    def reload(self) -> tuple[list[str], list[str]]:
        """Read the configuration and key files again; returns (settings changed now, those for a restart)."""
        if self.config_path is None:
            raise ConfigError("this daemon was started without a configuration file")
        notify.reloading()
        try:
            new = Config.load(self.config_path)
            try:
                self.members.rekey()
            except KeyFileError as error:
                raise ConfigError(str(error)) from error
            live = {"timing", "imports", "policy", "weight", "chunk_size", "pipeline_depth", "log_level"}
            differing = [
                name for name in Config.model_fields if getattr(new, name) != getattr(self.config, name)
            ]
            changed = [name for name in differing if name in live]
            self.config = self.shell.config = self.config.model_copy(
                update={name: getattr(new, name) for name in changed}
            )
            self.core.settings = core_settings(self.config)
            self.core.policy = POLICIES[self.config.policy]()
            self.capacity.weight = offered_weight(self.config.weight)
            self.importing.stock.room.set_maxima(self.config.imports)
            logs.set_level(self.config)
        finally:
            notify.ready()
        return changed, [name for name in differing if name not in live]

    def _learn_addresses(self) -> None:
        """An exporter may name its target by any address of that host."""
        future = self.loop.run_in_executor(None, local_addresses)

        def learnt(one: asyncio.Future[frozenset[IPv4Address | IPv6Address]]) -> None:
            if not one.cancelled() and one.exception() is None:
                self.capacity.addresses = one.result()

        future.add_done_callback(learnt)
        self.loop.call_later(_ADDRESSES_INTERVAL_S, self._learn_addresses)

    def _look_at_ages(self) -> None:
        """Of what waits in the import lists."""
        self.importing.ages.look()
        self.loop.call_later(_AGES_INTERVAL_S, self._look_at_ages)

    def _look_at_listeners(self) -> None:
        """The kernel has no news of a socket that only stops listening."""
        self.redirecting.look_at_listeners()
        self.loop.call_later(self.config.timing.audit_interval_s, self._look_at_listeners)

    def _members_changed(self, group: str, count: int) -> None:
        self.metrics.members.labels(group=group).set(count)
        self.capacity.members = self.members.hosts()

    def _fold(self) -> None:
        """Off the freeze: index what the journal has appended, and give back memory after much work."""
        if self.core.idle:
            with contextlib.suppress(sqlite3.Error, OSError):  # a full disk: next time
                self.shell.catch_up()
                self._untrimmed += self.journal.fold()
            if self._untrimmed >= _TRIM_AFTER_ROWS:
                self._untrimmed = 0
                gc.collect()
                trim()
        self._tell_moves()
        self.loop.call_later(_FOLD_INTERVAL_S, self._fold)

    def _prune(self) -> None:
        """Now and then, a little at a time: the history does not grow without end between two stops."""
        pruned = 0
        if self.core.idle:
            with contextlib.suppress(sqlite3.Error):
                pruned = self.journal.prune(_KEEP_HISTORY, _PRUNE_ROWS)
        more = pruned == _PRUNE_ROWS or not self.core.idle
        self.loop.call_later(_FOLD_INTERVAL_S if more else _PRUNE_INTERVAL_S, self._prune)

    def _tell_moves(self) -> None:
        if self.shell.moves.write(idle=self.core.idle):
            self.loop.call_later(0, self._tell_moves)

    # -- events and actions

    def dispatch(self, event: events.Event) -> None:
        """Feed an event to the core and carry out what it answers, in order."""
        self._events.append(event)
        if not self._draining:
            self._drain(list)

    def _drain(self, begin: Callable[[], list[actions.Action]]) -> None:
        """Carry out actions, then handle what events there are, and their actions, until nothing is left."""
        if self._failure is not None:
            return
        self._draining = True
        try:
            self._perform(begin())
            while self._events:
                self._perform(self.core.handle(self._events.popleft(), time.monotonic()))
        except Exception as error:
            _log.critical("this was not to be expected; the daemon ends, to begin anew", exc_info=True)
            self._failure = error
            self.loop.stop()
        finally:
            self._draining = False
        self._set_timer()

    def _perform(self, todo: list[actions.Action]) -> None:
        for action in todo:
            carry_out = self._carry_out.get(type(action))
            if carry_out is None:
                raise unknown(action)
            carry_out(action)

    def _set_timer(self) -> None:
        deadline = self.core.next_deadline()
        if self._timer is not None:
            if deadline is not None and abs(self._timer.when() - deadline) < 1e-6:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            # asyncio's clock is time.monotonic too.
            self._timer = self.loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._drain(lambda: self.core.handle_timer(time.monotonic()))

    # -- messages

    def _send(self, action: actions.Send) -> None:
        try:
            encoded = encode(action.message)
        except CodecError as error:
            _log.error("a message cannot be sent: %s", error)
            if action.to is not None:
                self._events.append(events.SendFailed(action.to, action.message, str(error)))
            return
        if action.channel is messages.Channel.STREAM and action.to is not None:
            if not self.members.send_frame(action.to, _FRAME_PROTOCOL, encoded):
                self._events.append(events.StreamLost(action.to, "no stream"))
        else:
            self.members.send_datagram(encoded, action.to)

    def _datagram(self, source: HostId, content: bytes) -> None:
        self._received(source, content, messages.Channel.DATAGRAM)

    def _frame(self, source: HostId, kind: int, content: memoryview) -> None:
        if kind == _FRAME_PROTOCOL:
            self._received(source, content, messages.Channel.STREAM)
        elif kind == _FRAME_HELD:
            try:
                self.importing.stock.copies.held_arrived(bytes(content))
            except ValueError as error:
                _log.warning("%s sent malformed held packets: %s", self.members.name_of(source), error)
        elif kind == _FRAME_ICMP:
            self._received_icmp(source, bytes(content))
        else:
            _log.warning("%s sent a frame of unknown kind %d", self.members.name_of(source), kind)

    def _received(self, source: HostId, content: bytes | memoryview, channel: messages.Channel) -> None:
        try:
            message = decode(content)
        except CodecError as error:
            _log.warning("%s sent a malformed message: %s", self.members.name_of(source), error)
            return
        self.dispatch(events.Received(source, message, channel))

    def _ignored(self, action: actions.Ignored) -> None:
        name = type(action.message).__name__
        _log.debug("ignored %s of %s: %s", name, self.members.name_of(action.source), action.why)

    # -- ICMP errors about connections that have left

    def _ship_icmp(self, away: Outbound, error: IcmpError) -> None:
        route = self.redirecting.route_of(away.tuple)
        if route is not None:
            self.members.send_frame(route.holder, _FRAME_ICMP, error.to_bytes())

    def _received_icmp(self, source: HostId, content: bytes) -> None:
        try:
            error = IcmpError.from_bytes(content)
        except ValueError as malformed:
            _log.warning("%s sent a malformed ICMP error: %s", self.members.name_of(source), malformed)
            return
        self._icmp_injector.inject(error)

    # -- helpers of the halves

    def _find_holders(
        self, inodes: set[int], found: Callable[[dict[int, list[int]], dict[int, Refusal]], None]
    ) -> None:
        """Look through /proc in a thread: it takes milliseconds, and nothing is frozen yet."""
        owners = self.engine.owners

        def finish(one: asyncio.Future[dict[int, dict[int, list[int]]]]) -> None:
            try:
                holders = one.result()
                verdicts = dict(zip(holders, self.engine.obstacles(list(holders)), strict=True))
            except Exception as error:
                if not isinstance(error, OSError):
                    _log.exception("looking for the owners of %d sockets", len(inodes))
                message = f"The owners of this socket cannot be found ({error}); try again."
                found({}, dict.fromkeys(inodes, Refusal(Code.OWNER_UNSTOPPABLE, message)))
                return
            found(
                {inode: sorted(by_pid) for inode, by_pid in holders.items()},
                {inode: refusal for inode, refusal in verdicts.items() if refusal is not None},
            )

        self.loop.run_in_executor(None, owners.find, inodes).add_done_callback(finish)

    def _duplicates(self, inodes: set[int]) -> dict[int, int]:
        """A descriptor of ours for each of the sockets that some process still holds."""
        found: dict[int, int] = {}
        for inode, holders in find_holders(inodes)[0].items():
            for pid, descriptors in holders.items():
                try:
                    found[inode] = duplicate(pid, descriptors[0], inode)
                    break
                except Refusal as refusal:
                    # What cannot be looked at for want of a descriptor must not pass for gone.
                    if refusal.code is Code.NO_DESCRIPTORS:
                        raise StartError(refusal.message) from None
        return found

    def _waits_for_application(self, holding: Holding) -> bool:
        return holding.migration in self.importing.stock.copies


def _lock(path: Path) -> int:
    """Keep other daemons from this state: they would settle what we have under way. Goes with the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StartError(
            f"{path}: another daemon uses this state; stop it, or choose another state_dir"
        ) from None
    return descriptor


def offered_weight(weight: float) -> int:
    """What OFFER says of ``weight`` (more than 0 to 1000), in sixtieths; never 0: that has a meaning."""
    return max(1, round(weight * _WEIGHT_UNITS))


def _uninstall(config: Config, force: bool) -> int:
    """``--remove-redirects``; 0, or 1 if connections depend on them."""
    from sockmi.uninstalling import Needed, remove_redirects

    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(config.state_dir / "lock")
    try:
        cut_off = remove_redirects(config, force=force)
    except Needed as needed:
        print(f"sockmid: {needed}", file=sys.stderr)
        return 1
    finally:
        os.close(lock)
    print(f"removed; {cut_off} connections were cut off" if cut_off else "removed")
    return 0


def core_settings(config: Config) -> CoreSettings:
    """The protocol core's settings from the configuration."""
    timing = config.timing
    grace_s = timing.offer_grace_s
    return CoreSettings(
        request_interval_s=timing.request_interval_s,
        offer_grace_s=POLICIES[config.policy].grace_s if grace_s is None else grace_s,
        lease_s=timing.lease_s,
        freeze_deadline_s=timing.freeze_deadline_s,
        audit_interval_s=timing.audit_interval_s,
        retry_max_s=_RETRY_MAX_S,
        chunk_items=config.chunk_size,
        pipeline_depth=config.pipeline_depth,
    )


def main(arguments: list[str] | None = None) -> int:
    """``sockmid``: 0 after a clean stop, 1 if it cannot start, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="sockmid", description="Moves live TCP sockets between hosts.")
    parser.add_argument("--config", type=Path, default=Path("/etc/sockmi/sockmi.yml"), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument(
        "--remove-redirects",
        action="store_true",
        help="remove all rules, chains and routes of this host's redirects and exit; the daemon must not run",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --remove-redirects: also if moved connections need them"
    )
    parser.add_argument("--version", action="version", version=f"sockmid {VERSION}")
    options = parser.parse_args(arguments)
    if options.force and not options.remove_redirects:
        parser.error("--force goes with --remove-redirects")
    try:
        config = Config.load(options.config)
        if options.check:
            print(f"{options.config}: good")
            return 0
        logs.configure(config)
        if os.geteuid() != 0:
            raise StartError("sockmid needs root (its unit takes all but seven capabilities away)")
        if options.remove_redirects:
            return _uninstall(config, options.force)
        raise_limit()
        daemon = Daemon(config, options.config)
        daemon.start()
    except (*_START_ERRORS, sqlite3.Error, RuntimeError, OSError) as error:
        print(f"sockmid: {error}", file=sys.stderr)
        return 1
    try:
        daemon.run()
    except DaemonFailed as failed:
        print(f"sockmid: {failed}; see its log", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
