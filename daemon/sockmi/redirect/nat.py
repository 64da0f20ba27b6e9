# SPDX-License-Identifier: MIT
"""``nat``: the paper's translation, stateless: for importers behind a router, or where forward fails.

The exporter rewrites the destination to the importer's address and port and routes the packet on;
the importer rewrites the source of what goes out and leaves what comes in alone. Connection
tracking sees neither direction on either host.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.routes import RTN_UNICAST, read_sysctl
from sockmi.redirect.settings import Tag
from sockmi.redirect.tables import Tables, by_version
from sockmi.redirect.ways import Address, Way

_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10, 3, 14), 6: (socket.IPPROTO_IPV6, 23, 3, 24)}
_DISCARD_PORT = 9
_HEADERS = {4: 28, 6: 48}  # IP and UDP


def not_forwarding(way: Way, version: int) -> str | None:
    """None if this host forwards packets that come in by the device of ``way``, else the mend."""
    name = f"net/ipv{version}/conf/{'all' if version == 6 else way.device}/forwarding"
    if read_sysctl(name):
        return None
    setting = "net.ipv4.ip_forward" if version == 4 else "net.ipv6.conf.all.forwarding"
    return f"this host does not forward IPv{version} packets of {way.device}; run `sysctl -w {setting}=1`"


class PathMtu:
    """The path MTU to importers behind routers.

    Peers' packets that are too long for the way to the importer must be answered by us: the router in
    between would tell the peer about a connection that it does not know. So the path is
    probed as soon as an importer comes into question, and a host route with that MTU,
    locked, makes the kernel refuse longer packets here.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._probes: dict[Address, tuple[socket.socket, Way, int]] = {}

    def probe(self, importer: Address, way: Way) -> None:
        """Send one datagram that may not be fragmented; the answer, if there is one, is read by ``apply``."""
        if way.gateway is None:
            return
        if importer not in self._probes:
            level, discover, probe, _unused = _MTU_DISCOVER[importer.version]
            sock = socket.socket(
                socket.AF_INET if importer.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
            )
            sock.setblocking(False)
            sock.setsockopt(level, discover, probe - 1)  # IP_PMTUDISC_DO: learn, and obey
            sock.connect((str(importer), _DISCARD_PORT))
            self._probes[importer] = (sock, way, 0)
        sock = self._probes[importer][0]
        for _turn in range(2):  # the first call may only report the error of the last
            with contextlib.suppress(OSError):
                sock.send(bytes(max(0, self._mtu(importer) - _HEADERS[importer.version])))

    def _mtu(self, importer: Address) -> int:
        level, *_unused, mtu = _MTU_DISCOVER[importer.version]
        return self._probes[importer][0].getsockopt(level, mtu)

    def apply(self, importer: Address) -> None:
        """Install the route if the path is known to be narrower than it was; cheap if not."""
        entry = self._probes.get(importer)
        if entry is None:
            return
        mtu = self._mtu(importer)
        sock, way, locked = entry
        if mtu < way.mtu_bytes and mtu != locked:
            self._tables.routes.lock_mtu(importer, mtu, way)
            self._probes[importer] = (sock, way, mtu)

    def close(self) -> None:
        """Close the probing sockets; routes go with ``Tables.teardown``."""
        for sock, *_unused in self._probes.values():
            sock.close()
        self._probes.clear()


class Nat:
    """base.Redirect"""

    mode = Mode.NAT

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.path_mtu = PathMtu(tables)

    def setup(self) -> None:
        """See base.Redirect."""
        self._tables.setup(self.mode)

    def teardown(self) -> None:
        """See base.Redirect."""
        self.path_mtu.close()
        self._tables.teardown(self.mode)

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if there is a route and this host forwards; learns the path MTU on the way."""
        way = self._tables.routes.path(importer)
        if way is None:
            return f"no route to {importer}; see `ip route get {importer}`"
        if way.kind != RTN_UNICAST:
            return f"{importer} is this host itself, or not a unicast address"
        reason = not_forwarding(way, importer.version)
        if reason is None:
            self.path_mtu.probe(importer, way)
        return reason

    def obstacle(self, leaving: Sequence[FourTuple]) -> None:
        """See base.Redirect; each connection goes for itself."""

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect."""
        t = self._tables
        addresses = {row.importer.address for row in connections}
        for address in addresses:
            self.path_mtu.apply(address)
        with t.transaction() as batch:
            t.need_ports(batch, (row.importer.port for row in connections))
            t.note_importers(batch, addresses)
            for version, rows, keys in by_version(connections):
                batch.put(t.addresses[version], keys, [row.importer.address.packed for row in rows])
                batch.put(t.flows[version], keys, [t.nat_out(row.importer.port) for row in rows])
                batch.remove(t.holds[version], keys)

    reroute = send_away

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._tables.forget(tuples, self._tables.addresses)

    def relinquish(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._tables.relinquish(tuples, self._tables.addresses)

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """See base.Redirect."""
        self._tables.expire(self.mode, tuples, linger_s, self._tables.addresses)

    def expect(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; their packets come here already."""

    def admit(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; a connection that is home again (origin is its own) is not translated."""
        t = self._tables
        home = t.local(self.mode)
        with t.transaction() as batch:
            t.need_ports(batch, (row.origin.port for row in connections))
            for version, rows, keys in by_version(connections):
                batch.remove(t.addresses[version], keys)
                away = [(k, r.origin) for k, r in zip(keys, rows, strict=True) if r.origin != r.tuple.local]
                batch.add(t.addresses[version], ((key, origin.address.packed) for key, origin in away))
                marks = [home if r.origin == r.tuple.local else t.nat_in(r.origin.port) for r in rows]
                batch.put(t.flows[version], keys, marks)
                batch.remove(t.holds[version], keys)

    def evict(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect."""
        self._tables.forget([row.tuple for row in connections], self._tables.addresses)

    def outbound(self) -> list[Outbound]:
        """See base.Redirect."""
        return [Outbound(t, other) for t, other in self._translated(Tag.NAT_OUT)]

    def inbound(self) -> list[Inbound]:
        """See base.Redirect."""
        home = [Inbound(t, t.local) for t in self._tables.read_mode(Tag.LOCAL, self.mode)]
        return home + [Inbound(t, other) for t, other in self._translated(Tag.NAT_IN)]

    def _translated(self, wanted: Tag) -> list[tuple[FourTuple, Endpoint]]:
        addresses = self._tables.read(self._tables.addresses)
        return [
            (t, Endpoint(addresses[t], port))
            for t, (tag, port) in self._tables.read_flows().items()
            if tag == wanted and t in addresses
        ]
