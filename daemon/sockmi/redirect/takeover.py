# SPDX-License-Identifier: MIT
"""``takeover``: the address itself moves; for service addresses that leave with all their connections.

The exporter removes the address, the importer adds it as an alias and announces it. So it
can only be done when everything that uses the address moves at once: see ``conflicts``.
Where each connection went is kept in the map ``addr``, for ``outbound``, how this host had an address
that it has given up in the map ``given``, and which addresses it has only because of connections that have
come in the set ``alias``; no packet looks there.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Collection, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.announce import Announcer, Scheduler, in_thread
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.forward import on_segment
from sockmi.redirect.settings import Tag
from sockmi.redirect.tables import Tables, by_version
from sockmi.redirect.ways import Address, Held

_LISTEN, _TIME_WAIT, _CLOSE = 0x0A, 0x06, 0x07


def _endpoint(text: str) -> Endpoint:
    """``0100007F:0050`` of /proc/net/tcp: each 32-bit word in host order, the port in hexadecimal."""
    address, _unused, port = text.partition(":")
    words = bytes.fromhex(address)
    packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    if len(packed) == 4:
        return Endpoint(IPv4Address(packed), int(port, 16))
    v6 = IPv6Address(packed)
    return Endpoint(v6.ipv4_mapped or v6, int(port, 16))


def users(addresses: Collection[Address]) -> list[tuple[Endpoint, Endpoint, bool]]:
    """(local, remote, is a listener) of each TCP socket on ``addresses`` that is not in TIME-WAIT."""
    found = []
    for name in ("tcp", "tcp6"):
        path = Path("/proc/thread-self/net", name)
        if not path.exists():
            continue
        for line in path.read_text().splitlines()[1:]:
            words = line.split()
            local, state = _endpoint(words[1]), int(words[3], 16)
            if local.address in addresses and state not in (_TIME_WAIT, _CLOSE):
                found.append((local, _endpoint(words[2]), state == _LISTEN))
    return found


def _peers(connections: Sequence[Inbound]) -> dict[Address, Address]:
    """By address of this host: one that it is to be reached from."""
    return {c.tuple.local.address: c.tuple.remote.address for c in connections}


class Takeover:
    """base.Redirect"""

    mode = Mode.TAKEOVER

    def __init__(self, tables: Tables, scheduler: Scheduler = in_thread) -> None:
        """``scheduler(delay_s, call)`` makes the later announcement, and returns what can ``cancel`` it."""
        #: Addresses that the other redirects lead connections on from.
        self.needed: Callable[[], Collection[Address]] = tuple
        self._tables = tables
        self._announcer = Announcer(tables.routes, scheduler)

    def setup(self) -> None:
        """See base.Redirect."""
        self._tables.setup(self.mode)

    def teardown(self) -> None:
        """See base.Redirect; addresses stay with whom they are."""
        self._announcer.close()
        self._tables.teardown(self.mode)

    def reachable(self, importer: IPv4Address | IPv6Address) -> str | None:
        """None if ``importer`` is on a segment of ours, where it can be heard announcing an address."""
        way = on_segment(self._tables, importer)
        return way if isinstance(way, str) else None

    def conflicts(self, leaving: Collection[FourTuple], listeners: Collection[Endpoint] = ()) -> list[str]:
        """Why the local addresses of ``leaving`` cannot be given up; empty if they can.

        ``leaving``, ``listeners``: all that is in the batch. A listener on the unspecified
        address is no obstacle: it goes on serving the other addresses. What waits for its application has no
        socket, and a hold.
        """
        reasons = []
        addresses = {t.local.address for t in leaving}
        for address in sorted(addresses, key=str):
            held = self._tables.routes.held(address)
            if held is None:
                reasons.append(f"{address} is not an address of this host")
            elif held.alone:
                reasons.append(f"{address} is the only address of {held.device}: this host would be cut off")
            elif held.has_dependents:
                reasons.append(
                    f"{address} is the primary address of others on {held.device}, which would go with it; "
                    f"run `sysctl -w net.ipv4.conf.{held.device}.promote_secondaries=1`"
                )
        tuples, bound = set(leaving), set(listeners)
        gone = {t for t, (tag, _unused) in self._tables.read_flows().items() if tag == Tag.MOVED}
        for local, remote, listening in users(addresses):
            if listening and local not in bound:
                reasons.append(f"a listener on {local} is not in the batch; move or close it too")
            elif not listening and FourTuple(local, remote) not in tuples | gone:
                reasons.append(f"connection {local} <-> {remote} is not in the batch; move or close it too")
        reasons += [
            f"connections that came to {address} are led on from it; they end first, or come back"
            for address in sorted(addresses & set(self.needed()), key=str)
        ]
        reasons += [
            f"{one} waits in an import list and is not in the batch; move or import it too"
            for one in self._tables.unsettled()
            if one.local.address in addresses and one not in tuples
        ]
        return reasons

    def _here(self, leaving: Sequence[FourTuple]) -> list[FourTuple]:
        """Those whose address has not been given up yet."""
        gone = {address for address in {t.local.address for t in leaving} if self._gone(address)}
        return [t for t in leaving if t.local.address not in gone]

    def _gone(self, address: Address) -> bool:
        """Whether ``send_away`` has removed it; a daemon may have died between the note and the removal."""
        return self._tables.given(address) is not None and self._tables.routes.held(address) is None

    def obstacle(self, leaving: Sequence[FourTuple]) -> str | None:
        """See base.Redirect. Listeners are no obstacle: they end, or follow in a batch of their own."""
        here = self._here(leaving)
        listeners = {
            local for local, _unused, listening in users({t.local.address for t in here}) if listening
        }
        return "; ".join(self.conflicts(here, listeners)[:5]) or None

    def send_away(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect. OSError (EBUSY), and nothing is changed, if there is an ``obstacle`` now."""
        tuples = [c.tuple for c in connections]
        here = self._here(tuples)
        if why := self.obstacle(tuples):
            raise OSError(errno.EBUSY, f"takeover: {why}")
        self.reroute(connections)
        for address in sorted({t.local.address for t in here}, key=str):
            held = self._tables.routes.held(address)
            if held is not None:
                note = address, socket.if_nametoindex(held.device), held.prefix_length
                alias = self._tables.is_alias(address)
                if not alias:
                    self._tables.note_given(*note)
                self._announcer.withdraw(address)
                self._tables.routes.remove_address(address)
                # Not before, in case it stays: what is here and given others have brought (see _take).
                if alias:
                    self._tables.note_given(*note)

    def reroute(self, connections: Sequence[Outbound]) -> None:
        """See base.Redirect; the address has left already, only the record changes."""
        t = self._tables
        moved = t.moved(self.mode)
        with t.transaction() as batch:
            for version, rows, keys in by_version(connections):
                batch.put(t.addresses[version], keys, [row.importer.address.packed for row in rows])
                batch.put(t.flows[version], keys, [moved] * len(keys))
                batch.remove(t.holds[version], keys)

    def take_back(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect; this host has the address again."""
        for address in {t.local.address for t in tuples}:
            self._take(address)
        self._tables.forget(tuples, self._tables.addresses)

    def relinquish(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Redirect."""
        self._tables.relinquish(tuples, self._tables.addresses)

    def expire(self, tuples: Sequence[FourTuple], linger_s: float) -> None:
        """See base.Redirect."""
        self._tables.expire(self.mode, tuples, linger_s, self._tables.addresses)

    def expect(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; the address comes before its first application does."""
        for address, remote in _peers(connections).items():
            if self._tables.routes.held(address) is None:
                self._take(address, remote)

    def admit(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; the address is announced once the packets would be received."""
        t = self._tables
        local = t.local(self.mode)
        with t.transaction() as batch:
            for version, _unused, keys in by_version(connections):
                batch.remove(t.addresses[version], keys)
                batch.put(t.flows[version], keys, [local] * len(keys))
                batch.remove(t.holds[version], keys)
        for address, remote in _peers(connections).items():
            self._take(address, remote)

    def _take(self, address: Address, towards: Address | None = None) -> None:
        """Have and announce ``address``, as it was here, or else as a host address on the way to the peer."""
        routes, tables = self._tables.routes, self._tables
        held = routes.held(address)
        if held is not None:
            if tables.given(address) is not None:
                tables.forget_alias(address)  # not we have brought it back
        elif (held := self._as_it_was(address)) is None:
            # the address is of a network of ours if its own route says so, else the peer's route has to do
            ways = [routes.path(each) for each in (address, towards) if each is not None]
            device = next((way.device for way in ways if way and way.device in routes.devices()), None)
            if device is None:
                raise OSError(errno.ENODEV, f"takeover: no device of this host leads to {address}'s network")
            held = Held(address, device, address.max_prefixlen, False, False)
            tables.note_alias(address)
        routes.add_address(address, held.device, held.prefix_length)
        tables.forget_given(address)
        self._announcer.announce(address, held.device)

    def _as_it_was(self, address: Address) -> Held | None:
        given = self._tables.given(address)
        if given is None:
            return None
        interface, prefix_length = given
        with contextlib.suppress(OSError):  # that device is no more
            return Held(address, socket.if_indextoname(interface), prefix_length, False, False)
        return None

    def evict(self, connections: Sequence[Inbound]) -> None:
        """See base.Redirect; an alias goes with its last connection, if nothing uses or awaits it by then.

        A listener may have come after its connections, and have new ones.
        """
        self._tables.forget([c.tuple for c in connections], self._tables.addresses)
        self.leave({c.tuple.local.address for c in connections})

    def leave(self, addresses: Collection[Address]) -> None:
        """Give up those that are aliases, if nothing needs them any more."""
        aliases = {address for address in addresses if self._tables.is_alias(address)}
        if not aliases:
            return
        left = {c.tuple.local.address for c in self.inbound()}
        left |= {one.local.address for one in self._tables.unsettled()}
        for address in aliases - left - set(self.needed()):
            held = self._tables.routes.held(address)
            if held is None or held.prefix_length != address.max_prefixlen or users([address]):
                continue
            self._announcer.withdraw(address)
            self._tables.routes.remove_address(address)
            self._tables.forget_alias(address)

    def outbound(self) -> list[Outbound]:
        """See base.Redirect."""
        addresses = self._tables.read(self._tables.addresses)
        return [
            Outbound(t, Endpoint(addresses[t], t.local.port))
            for t in self._tables.read_mode(Tag.MOVED, self.mode)
            if t in addresses
        ]

    def inbound(self) -> list[Inbound]:
        """See base.Redirect."""
        return [Inbound(t, t.local) for t in self._tables.read_mode(Tag.LOCAL, self.mode)]
