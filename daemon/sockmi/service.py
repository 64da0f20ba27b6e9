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
import functools
import gc
import logging
import os
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path

from sockmi import durable, logs, notify
from sockmi.awaiting_routes import AwaitingRoutes
from sockmi.chores import Chores
from sockmi.config import Config, ConfigError
from sockmi.control import ControlServer
from sockmi.core_settings import core_settings, offered_weight
from sockmi.crashpoints import arm
from sockmi.diag import DestroyedSockets, SocketDiag
from sockmi.driver import Driver
from sockmi.engine.choice import choose
from sockmi.engine.inspector import inspectors
from sockmi.engine.kernel import ModuleMissing
from sockmi.engine.listing import listeners
from sockmi.engine.repair import keep_record
from sockmi.engine.trial import obstacle
from sockmi.exporting import Exporting
from sockmi.holders import Found, Holders, duplicates
from sockmi.importing import Importing
from sockmi.journal import Journal, JournalError
from sockmi.limits import raise_limit
from sockmi.looking import look
from sockmi.members import Members
from sockmi.messenger import Messenger
from sockmi.metrics import Metrics
from sockmi.native import library, one_heap, trim
from sockmi.operations import Operations
from sockmi.peers import Peers
from sockmi.placing import Placing
from sockmi.policy import POLICIES
from sockmi.protocol import actions, events
from sockmi.protocol.context import Capacity
from sockmi.protocol.core import Core
from sockmi.protocol.records import Holding, HostId, Route
from sockmi.recovery import Recovery
from sockmi.redirect.base import Mode
from sockmi.redirect.factory import make_redirects
from sockmi.redirect.held import HeldPackets
from sockmi.redirect.icmp import IcmpInjector, IcmpRelay
from sockmi.redirect.routes_worker import RoutesWorker
from sockmi.redirect.takeover import Takeover
from sockmi.redirecting import Redirecting
from sockmi.rehearsing import FEW, Rehearsal
from sockmi.restoring import Restoring
from sockmi.shell import Shell
from sockmi.spool import Spool, SpoolError
from sockmi.starting import StartError, lock_state
from sockmi.sysctl_exports import SysctlExports
from sockmi.transport.group import GroupError
from sockmi.transport.identity import Identity, IdentityError
from sockmi.transport.keyring import KeyFileError
from sockmi.transport.sockaddr import to_endpoint
from sockmi.transport.stream import StreamError
from sockmi.version import VERSION

_log = logging.getLogger(__name__)

_REHEARSING_MAX_S = 0.01
_STOP_GRACE_S = 5.0
# A peer that sends on must not wake the daemon for each packet, least of all in the middle of a move:
# what is needed is read at once (HeldPackets.take), a RST is looked for this often.
_HELD_PAUSE_S = 0.01


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
        self._lock = lock_state(config.state_dir)
        self.journal = Journal(config.journal_path)
        self.identity = Identity.load_or_create(config.state_dir)
        self.host_name = config.host_name or socket.gethostname()
        self.redirects, self.tables = make_redirects(config.redirect, durable.modes_in_use(self.journal))
        self._routes_worker = self.tables.routes.worker = RoutesWorker(self.tables.settings)
        self.diag = SocketDiag()
        self.capacity = Capacity(
            modes=config.redirect.modes,
            weight=offered_weight(config.weight),
            image_bytes_max=config.image_bytes_max,
        )
        self.core = Core(
            self.identity.host_id, core_settings(config), self.capacity, POLICIES[config.policy]()
        )
        self.driver = Driver(self.loop, self.core)
        arm(library())
        _keep_record(config.in_repair_path)
        try:
            self.engine, self.why_engine = choose(config.engine, self.tables.settings.inject_mark)
        except ModuleMissing as missing:
            raise StartError(f"engine: kernel is asked for, but {missing}; or set engine: auto") from None
        self.metrics.engine.labels(engine=self.engine.name).set(1)
        self.metrics.stuck.set_function(inspectors().stuck)
        self.members = Members(
            self.loop,
            config,
            self.identity,
            self.host_name,
            on_datagram=self._datagram,
            on_frame=self._frame,
            on_opened=self._stream_opened,
            on_lost=lambda host, reason: self.driver.dispatch(events.StreamLost(host, reason)),
            on_count=self._members_changed,
            engine=self.engine.name,
        )
        self._opening: set[HostId] = set()
        self.held = HeldPackets(config.redirect.log_group, self.tables.settings.inject_mark)
        self._held_timer: asyncio.TimerHandle | None = None
        self.shell = Shell(
            config=config,
            host_id=self.identity.host_id,
            host_name=self.host_name,
            loop=self.loop,
            engine=self.engine,
            holds=self.tables,
            held=self.held,
            redirects=self.redirects,
            peers=Peers(config.redirect.modes),
            journal=self.journal,
            spool=Spool(config.spool_dir),
            metrics=self.metrics,
            dispatch=self.driver.dispatch,
            send_held=self._send_held,
            name_of=self.members.name_of,
            addresses_of=self.members.addresses_of,
        )
        routes: dict[bytes, Route] = {}
        holdings: dict[bytes, Holding] = {}
        self.redirecting = Redirecting(
            self.shell, routes, holdings, self.diag.states, listeners, self._waits_for_application
        )
        self.shell.peers.led_here = self.redirecting.is_led_here
        if isinstance(takeover := self.shell.redirects.get(Mode.TAKEOVER), Takeover):
            takeover.needed = self.redirecting.led_from
        self.importing = Importing(
            self.shell,
            Placing(
                config.redirect.modes,
                self.tables.routes.path,
                self.diag.states,
                self.diag.bury,
                functools.partial(obstacle, carries_urgent=self.engine.carries_urgent),
                is_led=self.tables.is_led,
                peers=self.shell.peers,
            ),
            self.capacity,
            self.redirecting,
        )
        self._awaiting_routes = AwaitingRoutes(self.loop, self.driver, self._routes_worker)
        self._holders = Holders(self.loop, self.engine)
        self.exporting = Exporting(
            self.shell,
            self.redirecting,
            look=functools.partial(look, self.loop, self.engine, self.shell.peers),
            find_holders=self._find_holders,
            find=self.diag.find,
            destroy=self.diag.destroy,
            onward=self.importing.onward,
        )
        self._rehearsal = Rehearsal(self.shell) if self.engine.name == "repair" else None
        self.operations = Operations(self)
        self._sysctl = SysctlExports(self)
        self._icmp_injector = IcmpInjector(self.tables)
        self.messenger = Messenger(
            self.members,
            self.driver.dispatch,
            route_of=self.redirecting.route_of,
            held_arrived=self.importing.stock.copies.held_arrived,
            inject=self._icmp_injector.inject,
        )
        self._icmp_relay = IcmpRelay(self.tables, self.redirecting.known_as, self.messenger.send_icmp)
        self._restoring = Restoring(self.loop, self.tables, self._restore)
        self._chores = Chores(
            self.loop,
            self.shell,
            self.capacity,
            is_calm=lambda: self.core.calm,
            look_at_listeners=self.redirecting.look_at_listeners,
            look_at_ages=self.importing.ages.look,
            renew_devices=self.tables.renew,
            local_addresses=self.tables.routes.addresses,
            keep_workers=self._routes_worker.stay,
            look_at_tables=self._look_at_tables,
        )
        self._destroyed: DestroyedSockets | None = None
        self._control: ControlServer | None = None
        self.driver.carry_out = {
            actions.Send: self.messenger.send,
            actions.Ignored: self.messenger.ignored,
            actions.OpenStream: self._open_stream,
            actions.Quiet: lambda action: self.loop.stop(),
            **self.exporting.carry_out(),
            **self.importing.carry_out(),
            **self.redirecting.carry_out(),
            actions.Reserve: self._reserve,
            actions.Unreserve: self._unreserve,
        }

    # -- life

    def start(self) -> None:
        """Reconcile with the journal and the kernel, then open for business."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop)
        self.loop.add_signal_handler(signal.SIGHUP, self._hangup)
        for redirect in self.redirects.values():
            redirect.setup()
        self.driver.dispatch(self._recover())
        self.tables.unshield()  # in case it ended in the middle of `_restore`
        self._guard()
        self._destroyed = DestroyedSockets(
            self.redirecting.destroyed,
            self.redirecting.listener_destroyed,
            self.redirecting.aborted,
            self.redirecting.news_lost,
        )
        self.redirecting.reserve_ports()
        self.held.begun_anew = self.redirecting.begun_anew
        self.loop.add_reader(self._destroyed.socket, self._destroyed.readable)
        for descriptor in self._icmp_relay.filenos():
            self.loop.add_reader(descriptor, self._icmp_relay.work)
        self.loop.add_reader(self.held, self._packets_held)
        self.loop.add_reader(self.tables.news.socket, self._restoring.heard)
        self.tables.restore = self._restoring.now
        self.members.start()
        self.redirecting.look_at_all()
        if self.config.metrics_port:
            self.metrics.serve(str(self.config.metrics_address), self.config.metrics_port)
        self._control = ControlServer(
            self.loop, self.config.control_path, self.config.control_mode, self.operations
        )
        self._sysctl.start()
        self._chores.start()
        self.exporting.listeners.queues.resume()
        _log.info("host %s (%s) is ready", self.host_name, self.identity.host_id.hex())

    def _recover(self) -> events.Started:
        """Settle what an earlier run left; what is to be resumed."""
        recovery = self._recovery()
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

    def _recovery(self) -> Recovery:
        return Recovery(
            self.shell, self.diag.find, self.diag.destroy, duplicates, self.exporting.listeners.queues
        )

    def _look_at_tables(self) -> None:
        if self.tables.maybe_unheard:
            self._restoring.look()

    def _guard(self) -> None:
        try:
            self.tables.guard.raise_()
        except OSError as error:
            _log.warning("who flushes the nftables ruleset may end moved connections: %s", error)

    def _restore(self) -> None:
        """The tables, as a start makes them, and in them what this daemon knows."""
        self.tables.rebuild()
        dormant = self.importing.life.hold_dormant()
        keep_held = {copy.tuple for copy in dormant if copy.tuple}
        keep_held |= {*self.importing.early.hold_again(), *self.exporting.freezer.hold_frozen()}
        leading = self.exporting.committer.leading()
        self._recovery().kernel(
            self.redirecting.routes | leading,
            {name: one for name, one in self.redirecting.holdings.items() if name not in leading},
            returning={copy.arrival.item.connection for copy in dormant if not copy.holding},
            listed={copy.holding.connection for copy in dormant if copy.holding},
            held=self.tables.held(),
            keep_held=keep_held,
        )
        self.redirecting.miss_again()
        if iptables := self.redirects.get(Mode.IPTABLES):
            iptables.setup()  # it keeps in the tables what its rules are

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
            self._chores.watch(watchdog_s)
        try:
            self.loop.run_forever()
        finally:
            self.close()
        if (failure := self.driver.failure) is not None:
            raise DaemonFailed(str(failure)) from failure

    def stop(self) -> None:
        """Finish what is committed, undo what is not, then end."""
        if self.stopping:
            return
        self.stopping = True
        notify.stopping()
        self.exporting.admission.stop()
        self.driver.dispatch(events.Stop(_STOP_GRACE_S))

    def close(self) -> None:
        """Close everything; redirects, holds, journal and spool stay for the next run."""
        if self._control is not None:
            self._control.close()
        self._sysctl.close()
        self.members.close()
        for descriptor in self._icmp_relay.filenos():
            self.loop.remove_reader(descriptor)
        self._icmp_relay.close()
        self.loop.remove_reader(self.held)
        self.loop.remove_reader(self.tables.news.socket)
        if self._held_timer is not None:
            self._held_timer.cancel()
        self.held.close()
        self._icmp_injector.close()
        if self._destroyed is not None:
            self.loop.remove_reader(self._destroyed.socket)
            self._destroyed.close()
        self.metrics.close()
        self.diag.close()
        self._chores.finish()
        self._routes_worker.close()
        self.journal.close()
        self.loop.close()

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
            changed, restart_needed = self.config.differing(new)
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
        return changed, restart_needed

    def missed(self) -> list[HostId]:
        """See `sockmi.parts.Parts`."""
        return sorted(self.core.awaited - self.members.hosts() - {self.identity.host_id})

    def forget(self, host: HostId) -> bool:
        """See `sockmi.parts.Parts`."""
        waited = host in self.core.awaited
        _log.warning("host %s is forgotten, as it will never come back", host.hex())
        self.driver.dispatch(events.Forget(host))
        return waited

    def _open_stream(self, action: actions.OpenStream) -> None:
        self._opening.add(action.host)
        self.members.open(action.host)

    def expect(self, host: HostId) -> None:
        """See `sockmi.parts.Parts`."""
        self.members.open_early(host)
        self._foresee(host)

    def _foresee(self, host: HostId) -> None:
        if (member := self.members.member(host)) is not None:
            self.exporting.reachability.foresee(to_endpoint(member.address).address)

    def _stream_opened(self, host: HostId) -> None:
        """When RESERVE is on its way there is time, if it was us who wanted the stream."""
        self.driver.dispatch(events.StreamOpened(host))
        if host in self._opening:
            self._foresee(host)
            self.loop.call_later(0, self._rehearse, time.monotonic() + _REHEARSING_MAX_S)
        self._opening.discard(host)

    def _rehearse(self, until: float) -> None:
        """Again and again, until the importer has answered: a processor that sleeps meanwhile grows cold."""
        few = 0 < len(self.exporting.exports) <= FEW
        if self._rehearsal and few and not self.core.frozen and time.monotonic() < until:
            self._rehearsal.lead_away()
            self.loop.call_later(0, self._rehearse, until)

    def _find_holders(self, inodes: set[int], found: Found) -> None:
        """As `Holders.find`; and what then is put to the core may ask the routes."""
        self._awaiting_routes.wake()
        self._holders.find(inodes, lambda *answer: self._awaiting_routes.do(lambda: found(*answer)))

    def _reserve(self, action: actions.Reserve) -> None:
        def reserve() -> None:
            if self._rehearsal and not self.core.frozen and len(action.items) <= FEW:
                self._rehearsal.take_in()
            self.importing.reservations.reserve(action)

        self._awaiting_routes.do(reserve)

    def _unreserve(self, action: actions.Unreserve) -> None:
        self._awaiting_routes.do(lambda: self.importing.reservations.unreserve(action))

    def _members_changed(self, group: str, count: int) -> None:
        self.metrics.members.labels(group=group).set(count)
        self.capacity.members = self.members.hosts()

    # -- for parts that are made before those who answer them

    def _datagram(self, source: HostId, content: bytes) -> None:
        self.messenger.datagram(source, content)

    def _frame(self, source: HostId, kind: int, content: memoryview) -> None:
        self.messenger.frame(source, kind, content)

    def _packets_held(self) -> None:
        """The kernel has logged packets that a hold has dropped."""
        self.loop.remove_reader(self.held)
        self._held_timer = self.loop.call_later(_HELD_PAUSE_S, self._read_held)

    def _read_held(self) -> None:
        if self.held.readable():
            self._held_timer = self.loop.call_later(0, self._read_held)
        else:
            self.loop.add_reader(self.held, self._packets_held)

    def _send_held(self, importer: HostId, content: bytes) -> bool:
        return self.messenger.send_held(importer, content)

    def _waits_for_application(self, holding: Holding) -> bool:
        return holding.migration in self.importing.stock.copies


def _keep_record(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_record(path)
    except OSError:  # only if this daemon is killed together with the process that stops owners is it missed
        _log.exception("what is in repair is not kept for the next start")


def _uninstall(config: Config, *, force: bool, check: bool) -> int:
    """``--remove-redirects``; 0, or 1 if connections depend on them."""
    from sockmi.uninstalling import Needed, remove_redirects

    with contextlib.ExitStack() as held:
        if not check or config.state_dir.exists():  # a look makes nothing, and no daemon has run without it
            held.callback(os.close, lock_state(config.state_dir))
        try:
            cut_off = remove_redirects(config, force=force, check=check)
        except Needed as needed:
            print(f"sockmid: {needed}", file=sys.stderr)
            return 1
    said, lost = ("can be removed", "would be") if check else ("removed", "were")
    print(f"{said}; {cut_off} connections {lost} cut off" if cut_off else said)
    return 0


def _check(config: Config, path: Path) -> int:
    """``--check``; 0, or 1 if something is wrong. What may still come is told, and no fault of the file's."""
    from sockmi.checking import examine

    found = examine(config)
    for sentence in found.wrong:
        print(f"sockmid: {sentence}", file=sys.stderr)
    if not found.wrong:
        print(f"{path}: good")
        print(*found.used, *(f"but sockmid would not start now: {one}" for one in found.missing), sep="\n")
    return 1 if found.wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """``sockmid``: 0 after a clean stop, 1 if it cannot start, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="sockmid", description="Moves live TCP sockets between hosts.", allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/sockmi/sockmi.yml"), metavar="FILE")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the configuration and what it names, or whether the redirects can be removed, and exit",
    )
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
        if options.check and not options.remove_redirects:
            return _check(config, options.config)
        logs.configure(config)
        if os.geteuid() != 0:
            raise StartError("sockmid needs root (its unit takes all but seven capabilities away)")
        if options.remove_redirects:
            return _uninstall(config, force=options.force, check=options.check)
        raise_limit()
        one_heap()
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
