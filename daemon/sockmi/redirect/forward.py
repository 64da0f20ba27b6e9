# SPDX-License-Identifier: MIT
"""``forward``: address-preserving, for one segment; the default there.

The exporter sends the peer's frames on to the importer at netdev ingress, unchanged but
for the link-layer address and a TTL that is one less. The importer's socket keeps the exporter's
address; its packets go to the peer directly. No translation, no connection tracking, no
IP forwarding. IP fragments of TCP (not the first) are not sent on: senders that fragment TCP
need `nat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.routes import ARPHRD_ETHER, RTN_UNICAST
from sockmi.redirect.settings import Tag
from sockmi.redirect.tables import Tables, by_version
from sockmi.redirect.ways import Way


def on_segment(tables: Tables, importer: IPv4Address | IPv6Address) -> Way | str:
    """The way to ``importer`` if it is on a segment of ours, else why its link-layer address is of no use."""
    way, configured = tables.routes.path(importer), tables.settings.devices
    if way is None:
        return f"no route to {importer}; see `ip route get {importer}`"
    if way.kind != RTN_UNICAST:
        return f"{importer} is this host itself, or not a unicast address"
    if way.gateway is not None:
        return f"{importer} is behind router {way.gateway}, not on a segment of this host; use nat"
    if configured and way.device not in configured:
        return f"{importer} is reached by {way.device}, but redirects use {', '.join(configured)}"
    if way.device_type != ARPHRD_ETHER:
        return f"{way.device} has no link-layer addresses; use nat"
    if not tables.is_led(way.device):
        return (
            f"{importer} is reached by {way.device}, for which no redirects are made: it is new, down or "
            "without an address; try again in some seconds, or see `sockmi doctor`"
        )
    return way


class Forward:
    """base.Redirect"""

    mode = Mode.FORWARD

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def setup(self) -> None:
        """See base.Redirect."""
        self._tables.setup(self.mode)

    def teardown(self) -> None:
        """See base.Redirect."""
        self._tables.teardown(self.mode)

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if ``importer`` is on-link by one of our devices; has the kernel resolve its MAC."""
        way = on_segment(self._tables, importer)
        if isinstance(way, str):
            return way
        self._tables.routes.warm(importer, way.device)
        return None

    def obstacle(self, leaving: Sequence[FourTuple]) -> None:
        """See base.Redirect; each connection goes for itself."""

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect."""
        t = self._tables
        moved = t.moved(self.mode)
        with t.transaction() as batch:
            for version, rows, keys in by_version(connections):
                batch.put(t.nexts[version], keys, [row.importer.address.packed for row in rows])
                batch.put(t.flows[version], keys, [moved] * len(keys))
                batch.remove(t.holds[version], keys)

    reroute = send_away

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._tables.forget(tuples, self._tables.nexts)

    def relinquish(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._tables.relinquish(tuples, self._tables.nexts)

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """See base.Redirect."""
        self._tables.expire(self.mode, tuples, linger_s, self._tables.nexts)

    def expect(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; their packets come here already."""

    def admit(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; an own entry of ``send_away`` goes, as the connection is back."""
        t = self._tables
        local = t.local(self.mode)
        with t.transaction() as batch:
            for version, _unused, keys in by_version(connections):
                batch.remove(t.nexts[version], keys)
                batch.put(t.flows[version], keys, [local] * len(keys))
                batch.remove(t.holds[version], keys)

    def evict(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect."""
        with self._tables.transaction() as batch:
            for version, _unused, keys in by_version(connections):
                batch.remove(self._tables.flows[version], keys)

    def outbound(self) -> list[Outbound]:
        """See base.Redirect."""
        t = self._tables
        return [Outbound(each, Endpoint(to, each.local.port)) for each, to in t.read(t.nexts).items()]

    def inbound(self) -> list[Inbound]:
        """See base.Redirect."""
        return [Inbound(each, each.local) for each in self._tables.read_mode(Tag.LOCAL, self.mode)]
