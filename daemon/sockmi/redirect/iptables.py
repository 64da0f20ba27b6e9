"""``iptables``: the paper's own rules, for hosts that still live on iptables-legacy. The slow one.

Rules are searched one by one by the kernel and installed one by one by python-iptables (some
milliseconds each), so this is for a few connections at a time: choose `nat` wherever nftables
is allowed to do the work.

Exporter: DNAT, the connection's conntrack entry deleted so that DNAT is consulted, and a filter
for what our own stack would say (the paper's FIN/RST filter). Importer: what comes in from the peer is
not tracked, what goes out gets SNAT. Both need conntrack's willingness to pick up
connections in their middle: net.netfilter.nf_conntrack_tcp_loose must not be 0.
"""

from __future__ import annotations

import contextlib
import errno
import re
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.nat import not_forwarding
from sockmi.redirect.routes import RTN_UNICAST, read_sysctl
from sockmi.redirect.tables import Tables

_TCP = 6
_FAMILY = {4: 2, 6: 10}
_AWAY, _HOME, _UNTRACKED, _MUTE = "away", "home", "raw", "mute"
_HOOK = {_AWAY: ("nat", "PREROUTING"), _HOME: ("nat", "POSTROUTING"), _UNTRACKED: ("raw", "PREROUTING"),
         _MUTE: ("filter", "OUTPUT")}  # fmt: skip


def unusable(command: str = "iptables") -> str | None:
    """None if this host's iptables is the legacy one and python-iptables is there, else what to do.

    ``command``: the host's iptables program; its rules must be those that we write.
    """
    try:
        version = subprocess.run(
            [command, "-V"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except FileNotFoundError:
        return f"{command} is not installed; use redirect mode nat"
    if "nf_tables" in version:
        return (
            f"{command} is {version.strip()}, which does not see legacy rules; use redirect mode nat, or "
            "`update-alternatives --set iptables /usr/sbin/iptables-legacy`"
        )
    try:
        import iptc  # noqa: F401
    except Exception as error:  # it raises its own XTablesError when a library is missing
        return f"python-iptables cannot be loaded ({error}); `pip install python-iptables`, or use mode nat"
    return None


class Iptables:
    """base.Redirect"""

    mode = Mode.IPTABLES

    def __init__(self, tables: Tables, command: str = "iptables") -> None:
        self._tables = tables
        self._command = command
        self._lock = threading.Lock()

    # --- chains and rules --------------------------------------------------------------------

    def _name(self, role: str) -> str:
        return f"{self._tables.settings.table[:20]}_{role}"  # 28 characters at most

    @contextlib.contextmanager
    def _changing(self, version: int, role: str) -> Iterator[Any]:
        """The chain of ``role``; changes are committed at the end of the block."""
        import iptc

        kind, _ = _HOOK[role]
        with self._lock:
            table = (iptc.Table if version == 4 else iptc.Table6)(kind)
            table.autocommit = False
            table.refresh()
            try:
                yield iptc.Chain(table, self._name(role))
                table.commit()
            finally:
                table.refresh()
                table.autocommit = True

    def _hooks(self, chain: Any, role: str) -> tuple[Any, list[Any]]:
        """The built-in chain of ``role`` and our jumps in it."""
        import iptc

        hook = iptc.Chain(chain.table, _HOOK[role][1])
        return hook, [rule for rule in hook.rules if rule.target and rule.target.name == chain.name]

    def setup(self) -> None:
        """See base.Redirect. OSError says why when this host cannot do it."""
        reason = unusable(self._command)
        if reason is None and read_sysctl("net/netfilter/nf_conntrack_tcp_loose") == 0:
            reason = (
                "net.netfilter.nf_conntrack_tcp_loose is 0: conntrack would call moved connections invalid; "
                "set it to 1 or use redirect mode nat"
            )
        if reason:
            raise OSError(errno.EOPNOTSUPP, f"redirect mode iptables: {reason}")
        self._tables.setup(self.mode)
        for version in (4, 6):
            for role in _HOOK:
                with self._changing(version, role) as chain:
                    if not chain.table.is_chain(chain.name):
                        chain.table.create_chain(chain.name)
                    hook, jumps = self._hooks(chain, role)
                    if not jumps:
                        hook.insert_rule(self._rule(version, chain.name))

    def teardown(self) -> None:
        """See base.Redirect."""
        if unusable(self._command) is None:
            for version in (4, 6):
                for role in _HOOK:
                    with self._changing(version, role) as chain:
                        if not chain.table.is_chain(chain.name):
                            continue
                        hook, jumps = self._hooks(chain, role)
                        for jump in jumps:
                            hook.delete_rule(jump)
                        chain.flush()
                        chain.table.delete_chain(chain.name)
        self._tables.teardown(self.mode)

    def _rule(self, version: int, target: str, ends: FourTuple | None = None, **options: str) -> Any:
        """A rule for segments from ``ends.local`` to ``ends.remote``."""
        import iptc

        rule = iptc.Rule() if version == 4 else iptc.Rule6()
        if ends is not None:
            rule.protocol = "tcp"
            rule.src, rule.dst = str(ends.local.address), str(ends.remote.address)
            match = rule.create_match("tcp")
            match.sport, match.dport = str(ends.local.port), str(ends.remote.port)
        rule.target = iptc.Target(rule, target)
        for name, value in options.items():
            setattr(rule.target, name, value)
        return rule

    def _edit(self, role: str, tuples: Iterable[FourTuple], make: Callable[[FourTuple], Any] | None) -> None:
        """Remove the rules of ``tuples`` (as the segments have them) in a chain, and put new ones, if any."""
        by_version: dict[int, set[FourTuple]] = {}
        for t in tuples:
            by_version.setdefault(t.version, set()).add(t)
        for version, members in by_version.items():
            with self._changing(version, role) as chain:
                for rule in [rule for rule in chain.rules if _ends(rule) in members]:
                    chain.delete_rule(rule)
                if make is not None:
                    for t in members:
                        chain.append_rule(make(t))

    def _list(self, role: str) -> list[tuple[FourTuple, Any]]:
        found = []
        for version in (4, 6):
            with self._changing(version, role) as chain:
                if chain.table.is_chain(chain.name):
                    found += [(ends, _target(rule)) for rule in chain.rules if (ends := _ends(rule))]
        return found

    # --- base.Redirect -----------------------------------------------------------------------

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if there is a route and this host forwards."""
        way = self._tables.routes.path(importer)
        if way is None or way.kind != RTN_UNICAST:
            return f"no route from this host to {importer}; see `ip route get {importer}`"
        return not_forwarding(way, importer.version)

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect; one transaction for each table, in an order that lets nothing slip."""
        to = {_turned(c.tuple): c.importer for c in connections}
        self._edit(_MUTE, (c.tuple for c in connections), lambda t: self._rule(t.version, "DROP", t))
        self._edit(_AWAY, to, lambda t: self._rule(t.version, "DNAT", t, to_destination=str(to[t])))
        self._forget_tracked([c.tuple for c in connections])
        with self._tables.transaction() as batch:
            self._tables.clear(batch, [c.tuple for c in connections])

    reroute = send_away

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._edit(_AWAY, map(_turned, tuples), None)
        self._edit(_MUTE, tuples, None)
        self._forget_tracked(tuples)

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """See base.Redirect; iptables has no timeouts, so the late packets meet our nftables flow map."""
        self._tables.expire(self.mode, tuples, linger_s)
        self.take_back(tuples)

    def admit(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; a connection that is home again has no rules."""
        home = [c.tuple for c in connections if c.origin == c.tuple.local]
        origins = {c.tuple: c.origin for c in connections if c.origin != c.tuple.local}
        if home:
            self.take_back(home)
        self._edit(_UNTRACKED, map(_turned, origins), lambda t: self._rule(t.version, "CT", t, notrack=""))
        self._edit(_HOME, origins, lambda t: self._rule(t.version, "SNAT", t, to_source=str(origins[t])))
        self._forget_tracked(list(origins))
        with self._tables.transaction() as batch:
            self._tables.clear(batch, [c.tuple for c in connections])

    def evict(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect."""
        tuples = [c.tuple for c in connections]
        self._edit(_UNTRACKED, map(_turned, tuples), None)
        self._edit(_HOME, tuples, None)
        self._forget_tracked(tuples)

    def outbound(self) -> list[Outbound]:
        """See base.Redirect."""
        return [Outbound(_turned(ends), to) for ends, to in self._list(_AWAY) if to]

    def inbound(self) -> list[Inbound]:
        """See base.Redirect; connections that came home have no rule and are not listed."""
        return [Inbound(ends, to) for ends, to in self._list(_HOME) if to]

    def _forget_tracked(self, tuples: Sequence[FourTuple]) -> None:
        """Delete the conntrack entries of connections, whichever end is taken for the first."""
        from sockmi.redirect.routes import apart

        def work(_: Any) -> None:
            with NFCTSocket() as conntrack:
                for t in tuples:
                    for first, second in ((t.local, t.remote), (t.remote, t.local)):
                        each = NFCTAttrTuple(
                            family=_FAMILY[t.version],
                            saddr=str(first.address),
                            daddr=str(second.address),
                            proto=_TCP,
                            sport=first.port,
                            dport=second.port,
                        )
                        with contextlib.suppress(KeyError):
                            try:
                                conntrack.entry("del", tuple_orig=each)
                            except NetlinkError as error:
                                if error.code != errno.ENOENT:
                                    raise

        apart(work)


def _turned(t: FourTuple) -> FourTuple:
    return FourTuple(t.remote, t.local)


def _ends(rule: Any) -> FourTuple | None:
    """Source and destination of a rule of ours, as local and remote."""
    if rule.protocol != "tcp" or not rule.matches:
        return None
    match = rule.matches[0]
    source, destination = (ip_network(text).network_address for text in (rule.src, rule.dst))
    return FourTuple(Endpoint(source, int(match.sport)), Endpoint(destination, int(match.dport)))


def _target(rule: Any) -> Endpoint | None:
    text = rule.target.to_destination if rule.target.name == "DNAT" else rule.target.to_source
    found = re.fullmatch(r"\[?([0-9a-fA-F.:]+?)\]?:(\d+)", text or "")
    return Endpoint(ip_address(found[1]), int(found[2])) if found else None
