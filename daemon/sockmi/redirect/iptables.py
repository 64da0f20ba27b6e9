# SPDX-License-Identifier: MIT
"""``iptables``: the paper's own rules, for hosts that still live on iptables-legacy. The slow one.

Rules are searched one by one by the kernel and installed one by one by python-iptables (some
milliseconds each), so this is for a few connections at a time: choose `nat` wherever nftables
is allowed to do the work.

Exporter: DNAT, and a filter for what our own stack would say (the paper's FIN/RST filter). Importer: what
comes in from the peer is not tracked, what goes out gets SNAT. Conntrack would consult these rules only for
connections that it picks up in their middle, which net.netfilter.nf_conntrack_tcp_loose can forbid; so the
connection's old entry is replaced by one that is translated already (and is liberal: each host sees
one direction only). The rules are there for those whose entries somebody flushes.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from sockmi import processes
from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.nat import not_forwarding
from sockmi.redirect.routes import RTN_UNICAST, apart, read_sysctl
from sockmi.redirect.tables import Tables, keys_by_version

_TCP = 6
_FAMILY = {4: 2, 6: 10}
# Of a conntrack entry: seen both ways, assured, confirmed; of both ends: SACK, be liberal (value, mask).
_SETTLED = 0b1110
_LIBERAL = (0x0A, 0x0A)
# TCP_CONNTRACK_*. To what leaves, the peer may still answer with SYN and ACK; anything else that comes in
# makes an established connection of it (tcp_conntracks[] of nf_conntrack_proto_tcp.c).
_TCP_SYN_RECV, _TCP_ESTABLISHED = 2, 3
_ESTABLISHED_S = 432000
_AWAY, _HOME, _UNTRACKED, _MUTE = "away", "home", "raw", "mute"
_PACKAGES = str(Path(__file__).resolve().parents[2])
_NET = Path("/proc/thread-self/net")
_Target = tuple[str, dict[str, str]]


def unusable(command: str = "iptables") -> str | None:
    """None if this host's iptables is the legacy one and python-iptables is there, else what to do.

    ``command``: the host's iptables program; its rules must be those that we write.
    """
    try:
        version = processes.run([command, "-V"]).stdout
    except FileNotFoundError:
        return f"{command} is not installed; use redirect mode nat"
    if "nf_tables" in version:
        return (
            f"{command} is {version.strip()}, which does not see legacy rules; use redirect mode nat, or "
            "`update-alternatives --set iptables /usr/sbin/iptables-legacy`"
        )
    if importlib.util.find_spec("iptc") is None:
        return "python-iptables is not installed; `pip install python-iptables`, or use redirect mode nat"
    return None


def unloaded() -> str | None:
    """None if the kernel has legacy iptables, else what to do.

    Its tables, matches and targets the kernel loads itself when they are asked for, but ip_tables and
    ip6_tables whoever wants them has to: the daemon's unit leaves it no CAP_SYS_MODULE.
    """
    absent = [name for name in ("ip_tables", "ip6_tables") if not (_NET / f"{name}_names").exists()]
    if not absent:
        return None
    return (
        f"the kernel has not loaded {' and '.join(absent)}; `modprobe -a {' '.join(absent)}`, at boot by a "
        "file in /etc/modules-load.d, or use redirect mode nat"
    )


def _environment() -> dict[str, str]:
    """A worker's: it finds this package, and python-iptables the library that came with it.

    Untold ctypes would look for that, with a compiler and a linker if there are any, which AppArmor's
    profile has not. And python-iptables asks distutils for a path: where setuptools takes that name for
    itself, all of setuptools would be loaded, which takes five times as long as all else.
    """
    first = {"PYTHONPATH": _PACKAGES}
    spec = importlib.util.find_spec("iptc")
    if spec and spec.origin:
        first["IPTABLES_LIBDIR"] = str(Path(spec.origin).parents[1])
    told = {"SETUPTOOLS_USE_DISTUTILS": "stdlib"} | os.environ
    return told | {name: os.pathsep.join(filter(None, (one, told.get(name)))) for name, one in first.items()}


class _Worker:
    """iptables_worker for one IP version, started in the caller's network namespace when first needed."""

    def __init__(self, version: int, prefix: str) -> None:
        self._arguments = (str(version), prefix)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def call(self, method: str, *arguments: Any) -> Any:
        """The worker's answer; OSError if it says no or has ended."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = (sys.executable, "-W", "ignore", "-m", "sockmi.redirect.iptables_worker")
                environment = _environment()
                with processes.no_new_process:
                    self._process = subprocess.Popen(
                        command + self._arguments,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        env=environment,
                    )
            process = self._process
            assert process.stdin and process.stdout
            line = ""
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps([method, *arguments]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        answer = json.loads(line) if line else {"error": "python-iptables has ended its process"}
        if "error" in answer:
            raise OSError(f"iptables, IPv{self._arguments[0]}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the worker; the rules stay."""
        with self._lock:
            if self._process is not None:
                assert self._process.stdin and self._process.stdout
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
                self._process.stdout.close()
                self._process.wait(10)
                self._process = None


class Iptables:
    """base.Redirect"""

    mode = Mode.IPTABLES

    def __init__(self, tables: Tables, command: str = "iptables") -> None:
        """``command``: this host's iptables program; see ``unusable``."""
        self._tables = tables
        self._command = command
        prefix = f"{tables.settings.table[:20]}_"  # chain names have at most 28 characters
        self._workers = {version: _Worker(version, prefix) for version in (4, 6)}

    def setup(self) -> None:
        """See base.Redirect. OSError says why when this host cannot do it."""
        if reason := unusable(self._command):
            raise OSError(errno.EOPNOTSUPP, f"redirect mode iptables: {reason}")
        self._tables.setup(self.mode)
        for worker in self._workers.values():
            try:
                worker.call("install")
            except OSError:
                # Not asked before: of a daemon that may load modules python-iptables has loaded them by now.
                if reason := unloaded():
                    raise OSError(errno.EOPNOTSUPP, f"redirect mode iptables: {reason}") from None
                raise
        away = self._list(_AWAY)
        self._expect_redirects(importer.address for _unused, importer in away)
        self._track(_AWAY, away)
        self._track(_HOME, self._list(_HOME))
        with self._tables.transaction() as batch:
            self._tables.lead(batch, (_turned(ends) for ends, _unused in away))

    def teardown(self) -> None:
        """See base.Redirect."""
        for worker in self._workers.values():
            if unusable(self._command) is None:
                worker.call("uninstall")
            worker.close()
        self._tables.teardown(self.mode)

    def close(self) -> None:
        """End the workers; the rules stay."""
        for worker in self._workers.values():
            worker.close()

    def _edit(
        self, role: str, tuples: Iterable[FourTuple], make: Callable[[FourTuple], _Target] | None
    ) -> None:
        """Remove the rules of ``tuples`` (as the segments have them) in a chain, and put new ones, if any."""
        by_version: dict[int, set[FourTuple]] = {}
        for t in tuples:
            by_version.setdefault(t.version, set()).add(t)
        for version, members in by_version.items():
            new = [(_ends(t), *make(t)) for t in members] if make else []
            self._workers[version].call("edit", role, [_ends(t) for t in members], new)

    def _list(self, role: str) -> list[tuple[FourTuple, Endpoint]]:
        found = []
        for worker in self._workers.values():
            for ends, other in worker.call("rules", role):
                source, sport, destination, dport = ends
                t = FourTuple(Endpoint(ip_address(source), sport), Endpoint(ip_address(destination), dport))
                found.append((t, Endpoint.parse(other)))
        return found

    # --- base.Redirect -----------------------------------------------------------------------

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if there is a route and this host forwards."""
        way = self._tables.routes.path(importer)
        if way is None or way.kind != RTN_UNICAST:
            return f"no route from this host to {importer}; see `ip route get {importer}`"
        return not_forwarding(way, importer.version)

    def obstacle(self, leaving: Sequence[FourTuple]) -> None:
        """See base.Redirect; each connection goes for itself."""

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect; one transaction for each table, in an order that lets nothing slip."""
        to = {_turned(c.tuple): c.importer for c in connections}
        tuples = [c.tuple for c in connections]
        self._expect_redirects(c.importer.address for c in connections)
        # what came here and goes on: untracked packets would pass DNAT by
        self._edit(_UNTRACKED, to, None)
        self._edit(_HOME, tuples, None)
        self._edit(_MUTE, tuples, lambda t: ("DROP", {}))
        self._edit(_AWAY, to, lambda t: ("DNAT", {"to_destination": str(to[t])}))
        self._forget_tracked(tuples)
        self._track(_AWAY, to.items())
        with self._tables.transaction() as batch:
            self._tables.lead(batch, tuples)
            self._tables.clear(batch, tuples)

    reroute = send_away

    def _expect_redirects(self, importers: Iterable[IPv4Address | IPv6Address]) -> None:
        """Before anything goes there: conntrack drops ICMP redirects about it, but no ICMPv6 ones."""
        with self._tables.transaction() as batch:
            self._tables.note_importers(batch, (each for each in importers if each.version == 6))

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect; conntrack knows them again as it did before."""
        self._drop(tuples)
        self._track(None, ((_turned(t), t.local) for t in tuples))

    def relinquish(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect; with a flow they are not tracked, so no rule of ours has led them since."""
        self._drop(tuples)

    def _drop(self, tuples: Sequence[FourTuple]) -> None:
        """Nothing leads them away."""
        self._edit(_AWAY, map(_turned, tuples), None)
        self._edit(_MUTE, tuples, None)
        self._forget_tracked(tuples)
        with self._tables.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.remove(self._tables.led[version], keys)

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """See base.Redirect; iptables has no timeouts, so the late packets meet our nftables flow map."""
        # A new connection must not begin before the rules are gone: they would lead it away.
        self._tables.silence(self.mode, tuples)
        self._drop(tuples)
        self._tables.expire(self.mode, tuples, linger_s)

    def expect(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; their packets come here already."""

    def admit(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; a connection that is home again has no rules."""
        home = [c.tuple for c in connections if c.origin == c.tuple.local]
        origins = {c.tuple: c.origin for c in connections if c.origin != c.tuple.local}
        if home:
            self.take_back(home)
        self._edit(_UNTRACKED, map(_turned, origins), lambda t: ("CT", {"notrack": ""}))
        self._edit(_HOME, origins, lambda t: ("SNAT", {"to_source": str(origins[t])}))
        self._forget_tracked(list(origins))
        self._track(_HOME, origins.items())
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
        return [Outbound(_turned(ends), to) for ends, to in self._list(_AWAY)]

    def inbound(self) -> list[Inbound]:
        """See base.Redirect; connections that came home have no rule and are not listed."""
        return [Inbound(ends, to) for ends, to in self._list(_HOME)]

    def _forget_tracked(self, tuples: Sequence[FourTuple]) -> None:
        """Delete the conntrack entries of connections, whichever end is taken for the first."""

        def work(_unused: Any) -> None:
            for version in {t.version for t in tuples}:
                with NFCTSocket(nfgen_family=_FAMILY[version]) as conntrack:
                    for t in tuples:
                        if t.version == version:
                            _delete_tracked(conntrack, t.local, t.remote)
                            _delete_tracked(conntrack, t.remote, t.local)

        apart(work)

    def _track(self, role: str | None, rows: Iterable[tuple[FourTuple, Endpoint]]) -> None:
        """Make conntrack entries for segments with these ends, translated as ``role`` says (None: not)."""
        by_version: dict[int, list[tuple[FourTuple, Endpoint]]] = {}
        for row in rows:
            by_version.setdefault(row[0].version, []).append(row)
        timeout_s = read_sysctl("net/netfilter/nf_conntrack_tcp_timeout_established") or _ESTABLISHED_S

        def work(_unused: Any) -> None:
            for version, members in by_version.items():
                with NFCTSocket(nfgen_family=_FAMILY[version]) as conntrack:
                    for ends, other in members:
                        _insert_tracked(conntrack, role, ends, other, timeout_s)

        if by_version:
            apart(work)


def _tracked(first: Endpoint, second: Endpoint) -> Any:
    return NFCTAttrTuple(
        family=_FAMILY[first.version],
        saddr=str(first.address),
        daddr=str(second.address),
        proto=_TCP,
        sport=first.port,
        dport=second.port,
    )


def _insert_tracked(
    conntrack: Any, role: str | None, ends: FourTuple, other: Endpoint, timeout_s: int
) -> None:
    port = ["CTA_NAT_PROTO", {"attrs": [["CTA_PROTONAT_PORT_MIN", other.port]]}]
    to = {"attrs": [[f"CTA_NAT_V{other.version}_MINIP", str(other.address)], port]}
    nat = {_AWAY: {"nat_dst": to}, _HOME: {"nat_src": to}}.get(role or "", {})
    tcp = [["CTA_PROTOINFO_TCP_STATE", _TCP_SYN_RECV if role == _AWAY else _TCP_ESTABLISHED]]
    tcp += [[f"CTA_PROTOINFO_TCP_FLAGS_{way}", {"value": _LIBERAL}] for way in ("ORIGINAL", "REPLY")]
    try:
        conntrack.entry(
            "add",
            tuple_orig=_tracked(ends.local, ends.remote),
            tuple_reply=_tracked(ends.remote, ends.local),
            status=_SETTLED,
            protoinfo={"attrs": [["CTA_PROTOINFO_TCP", {"attrs": tcp}]]},
            timeout=timeout_s,
            **nat,
        )
    except NetlinkError as error:
        if error.code != errno.EEXIST:  # a packet was faster: the rule has made it
            raise


def _delete_tracked(conntrack: Any, first: Endpoint, second: Endpoint) -> None:
    try:
        conntrack.entry("del", tuple_orig=_tracked(first, second))
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise


def _turned(t: FourTuple) -> FourTuple:
    return FourTuple(t.remote, t.local)


def _ends(t: FourTuple) -> list[Any]:
    return [str(t.local.address), t.local.port, str(t.remote.address), t.remote.port]
