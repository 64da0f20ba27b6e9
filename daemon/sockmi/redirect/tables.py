# SPDX-License-Identifier: MIT
"""Our nftables tables on this host: made once, then changed element by element.

One ``Tables`` serves all modes of a daemon and is itself the ``Holds`` of base.py. The
entries live in the kernel only: a daemon that restarts finds them as they were.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from sockmi import processes
from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect import nft_messages, own_ports, ruleset, shield
from sockmi.redirect.base import Inbound, Mode, Outbound
from sockmi.redirect.guard import Guard
from sockmi.redirect.nftset import INET, NETDEV, Batch, NftSet, NftSocket
from sockmi.redirect.routes import Routes
from sockmi.redirect.settings import Settings, Tag
from sockmi.redirect.table_news import TableNews
from sockmi.redirect.ways import Address

_log = logging.getLogger(__name__)

_KEY4 = struct.Struct("!4sHxx4sHxx")
_KEY6 = struct.Struct("!16sHxx16sHxx")
_MARK = struct.Struct("=I")  # nftables keeps marks in host order
_PORT = struct.Struct("!H")
_NUMBER = {Mode.FORWARD: 1, Mode.NAT: 2, Mode.TAKEOVER: 3, Mode.IPTABLES: 4}  # in marks: never renumber
_NFT_TIMEOUT_S = 30.0
_INTERFACE_MAX = (1 << 24) - 1  # beside a prefix length in a mark; beyond it only the length is kept

Row = TypeVar("Row", Inbound, Outbound)


def key_of(t: FourTuple) -> bytes:
    """The element key of a connection: remote and local end, as every set of ours has it."""
    pack = _KEY4.pack if t.version == 4 else _KEY6.pack
    return pack(t.remote.address.packed, t.remote.port, t.local.address.packed, t.local.port)


def tuple_of(key: bytes) -> FourTuple:
    """The inverse of ``key_of``."""
    if len(key) == _KEY4.size:
        remote, rport, local, lport = _KEY4.unpack(key)
        return FourTuple(Endpoint(IPv4Address(local), lport), Endpoint(IPv4Address(remote), rport))
    remote, rport, local, lport = _KEY6.unpack(key)
    return FourTuple(Endpoint(IPv6Address(local), lport), Endpoint(IPv6Address(remote), rport))


def address_of(data: bytes) -> Address:
    """An IPv4 or IPv6 address from its 4 or 16 bytes."""
    return IPv4Address(data) if len(data) == 4 else IPv6Address(data)


def by_version(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row], list[bytes]]]:
    """Connections of each IP version that occurs, and their element keys."""
    sorted_rows: dict[int, list[Row]] = {}
    for row in rows:
        sorted_rows.setdefault(row.tuple.version, []).append(row)
    for version, members in sorted_rows.items():
        yield version, members, [key_of(row.tuple) for row in members]


def keys_by_version(tuples: Iterable[FourTuple]) -> Iterator[tuple[int, list[bytes]]]:
    """Element keys of each IP version that occurs."""
    found: dict[int, list[bytes]] = {}
    for t in tuples:
        found.setdefault(t.version, []).append(key_of(t))
    yield from found.items()


class Tables:
    """The shared tables, the holds, and the elements of all modes.

    ``holds``, ``flows``, ``addresses``, ``nexts``, ``led``, ``importers``: the sets by IP version.
    """

    def __init__(self, settings: Settings | None = None, use_destroy: bool = True) -> None:
        """Opens netlink in the caller's network namespace; changes nothing before ``setup``."""
        self.settings = settings or Settings()
        self.routes = Routes(self.settings)
        self._nft = NftSocket(use_destroy)
        self.news = TableNews()
        self.guard = Guard(self.settings)
        #: Called when there is no such table; whether there is by now.
        self.restore: Callable[[], bool] = bool
        self._lock = threading.RLock()
        self._making = threading.Lock()  # of the tables; elements are changed meanwhile
        self._devices: dict[str, int] = {}  # what has been made for: names and indexes
        self._known_ports: set[int] = set()
        self._ours: set[int] | None = None  # of those that are reserved; None: not yet read
        self._users: set[object] = set()
        self._made: object = None  # what the kernel says of the tables, if nobody else has changed them
        self._maybe_unheard = False
        # What only the kernel knows, for when somebody takes it from there.
        self._known_given: dict[Address, bytes] = {}
        self._known_aliases: set[Address] = set()
        table = self.settings.table

        def each(family: int, name: str, ends: int, data_ends: int = 0, data: int = 0) -> dict[int, NftSet]:
            """A set whose key is ``ends`` endpoints, with ``data_ends`` addresses or ``data`` bytes."""
            return {
                version: NftSet(family, table, f"{name}{version}", ends * (wide + 4), data_ends * wide + data)
                for version, wide in ((4, 4), (6, 16))
            }

        self.holds = each(INET, "hold", 2)
        self._quiet = each(INET, "quiet", 2)
        self.flows = each(INET, "flow", 2, data=4)
        self.addresses = each(INET, "addr", 2, 1)
        self.nexts = each(NETDEV, "next", 2, 1)
        self.led = each(INET, "led", 2)
        self._anew = each(INET, "anew", 2)
        self.importers = {v: NftSet(INET, table, f"importers{v}", wide) for v, wide in ((4, 4), (6, 16))}
        self._reserved = NftSet(INET, table, "own_ports", 2)
        self._syn_holds = each(INET, "hold_syn", 1)
        self._port_holds = {version: NftSet(INET, table, f"hold_port{version}", 2) for version in (4, 6)}
        self._away = each(INET, "away", 1)
        self._away_ports = {version: NftSet(INET, table, f"away_port{version}", 2) for version in (4, 6)}
        self._ports = NftSet(INET, table, "ports", 4, 2)
        self._given = {v: NftSet(INET, table, f"given{v}", wide, 4) for v, wide in ((4, 4), (6, 16))}
        self._aliases = {v: NftSet(INET, table, f"alias{v}", wide) for v, wide in ((4, 4), (6, 16))}

    # --- made once ---------------------------------------------------------------------------

    def setup(self, user: object = None) -> None:
        """Make the tables, rules and routes, or renew their rules; elements stay. Idempotent.

        ``user``: who needs them; they go when the last user has called ``teardown``.
        """
        with self._making:
            devices = self.routes.devices()
            text = ruleset.inet(self.settings) + ruleset.netdev(self.settings, list(devices))
            self._load(text + self._stale_chains(devices))
            self.routes.install(list(devices))
            self._devices = devices
            self._users.add(user)
            self._made = self._look()
            self._learn_notes()

    def renew(self) -> None:
        """After ``setup``: the same for devices that have come since, or are there again.

        Nothing else is touched. Devices that are down or without an address for a while keep what they have.
        """
        with self._making:
            if not self._users:
                return
            had = self._devices
            present = {name: index for index, name in socket.if_nameindex()}
            kept = {name: index for name, index in had.items() if present.get(name) == index}
            devices = kept | self.routes.devices(needed=False)
            new = [name for name, index in devices.items() if not self._is_led(name, index)]
            stale = "" if had.keys() <= devices.keys() else self._stale_chains(devices)
            if new or stale:
                self._load(ruleset.netdev(self.settings, new) + stale)
            # Also of those that were down: their routes are gone.
            self.routes.install(list(devices))
            self._devices = devices
            if new:
                _log.info("packets are led on from %s now, too", ", ".join(new))

    def is_led(self, device: str) -> bool:
        """Whether the packets that come in by ``device`` meet our redirects.

        One of that name that was there before it may have left its chain behind, which leads nowhere.
        """
        try:
            return self._is_led(device, socket.if_nametoindex(device))
        except OSError:
            return False

    def _is_led(self, device: str, index: int) -> bool:
        with self._lock:
            if self._devices.get(device) != index:
                return False
            return self._nft.chain(NETDEV, self.settings.table, ruleset.chain_of(device)) is not None

    def unled(self) -> list[str]:
        """Devices of ``setup`` for which nothing has been made, or no more. OSError as there."""
        return [name for name, index in self.routes.devices().items() if not self._is_led(name, index)]

    def teardown(self, user: object = None) -> None:
        """Remove all that ``setup`` made, with all elements, when ``user`` was the last; idempotent."""
        with self._making:
            self._users.discard(user)
            if self._users:
                return
            self.routes.remove()
            self._release_ports()
            self.guard.lower()
            self._load(ruleset.gone(self.settings))
            self.unshield()  # of a daemon that was killed in the middle of making them again
            self._devices = {}
            self._made = None
            self._known_ports.clear()
            self._ours = None

    def close(self) -> None:
        """Close the sockets; the tables stay, but for the guard."""
        self.guard.lower()
        self._nft.close()
        self.news.close()

    # --- made again --------------------------------------------------------------------------

    def _look(self) -> object:
        """What changes if a table is removed, even if somebody makes it again, or if its rules are."""
        table = self.settings.table
        with self._lock:
            found: list[object] = [self._nft.table(family, table) for family in (INET, NETDEV)]
            return found + [self._nft.chain(INET, table, name) for name in ruleset.BASE_CHAINS]

    def is_whole(self) -> bool:
        """Whether the tables are those that ``setup`` made."""
        self._maybe_unheard = False
        return self._made is None or self._look() == self._made

    @property
    def maybe_unheard(self) -> bool:
        """Whether there was a transaction of our own since ``is_whole``: of others' then is no news."""
        return self._maybe_unheard

    def shield(self) -> None:
        """Until ``unshield`` no RST comes in or goes out."""
        nft_messages.send(shield.raised(self.settings.table))

    def unshield(self) -> None:
        """The inverse of ``shield``."""
        nft_messages.send(shield.lowered(self.settings.table))

    def rebuild(self) -> None:
        """As ``setup``, but at once: for the devices and routes that there were. Of elements, the notes.

        What is left of the tables goes: half of it may be missing, or it is of another day.
        """
        with self._making:
            present = {name: index for index, name in socket.if_nameindex()}
            devices = [name for name, index in self._devices.items() if present.get(name) == index]
            made = ruleset.inet(self.settings) + ruleset.netdev(self.settings, devices)
            self._load(ruleset.gone(self.settings) + made)
            self._known_ports.clear()
            with self.transaction() as batch:
                for address, data in self._known_given.items():
                    batch.put(self._given[address.version], [address.packed], [data])
                batch.add(self._reserved, ((_PORT.pack(port), b"") for port in self._ours or ()))
                for address in self._known_aliases:
                    batch.add(self._aliases[address.version], [(address.packed, b"")])
            self._made = self._look()

    def _learn_notes(self) -> None:
        with self._lock:
            given = [pair for each in self._given.values() for pair in self._nft.dump(each)]
            aliases = [key for each in self._aliases.values() for key, _unused in self._nft.dump(each)]
            if self._ours is None:
                self._ours = {_PORT.unpack_from(key)[0] for key, _unused in self._nft.dump(self._reserved)}
        self._known_given = {address_of(key): data for key, data in given}
        self._known_aliases = {address_of(key) for key in aliases}

    def _load(self, text: str) -> None:
        done = _nft(["-f", "-"], text)
        if done.returncode:
            raise OSError(
                f"nft refused table {self.settings.table}: {done.stderr.strip()[:500]}; if another version "
                f"made the table, drain this host and run `nft delete table inet {self.settings.table}`"
            )

    def _stale_chains(self, devices: Iterable[str]) -> str:
        """Commands that remove the ingress chains of devices that are no longer ours."""
        listed = _nft(["-j", "list", "chains", "netdev"], "")
        if listed.returncode:
            return ""
        wanted = {ruleset.chain_of(device) for device in devices}
        chains = [item["chain"] for item in json.loads(listed.stdout)["nftables"] if "chain" in item]
        names = [c["name"] for c in chains if c["table"] == self.settings.table and c["name"] not in wanted]
        table = f"netdev {self.settings.table}"
        return "".join(f"flush chain {table} {name}\ndelete chain {table} {name}\n" for name in names)

    # --- holds (base.Holds) ------------------------------------------------------------------

    def hold(self, tuples: Sequence[FourTuple], timeout_s: float | None) -> None:
        """See base.Holds; a hold that is there gets the new timeout."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.put(self.holds[version], keys, [b""] * len(keys), _milliseconds(timeout_s))
                if timeout_s is None:
                    batch.add(self._quiet[version], ((key, b"") for key in keys))

    def unhold(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Holds."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.remove(self.holds[version], keys)
                batch.remove(self._quiet[version], keys)

    def settle(self, tuples: Sequence[FourTuple]) -> None:
        """See base.Holds."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.remove(self._quiet[version], keys)

    def unsettled(self) -> list[FourTuple]:
        """What was held without a timeout and is not settled, read back from the kernel."""
        with self._lock:
            return [tuple_of(key) for s in self._quiet.values() for key, _unused in self._nft.dump(s)]

    def held(self) -> list[FourTuple]:
        """All holds, read back from the kernel."""
        with self._lock:
            return [tuple_of(key) for s in self.holds.values() for key, _unused in self._nft.dump(s)]

    def hold_listeners(self, endpoints: Sequence[Endpoint], timeout_s: float | None) -> None:
        """See base.Holds; ``::`` holds IPv4 too, as a listener there accepts both."""
        with self.transaction() as batch:
            for nftset, keys in _listener_keys(endpoints, self._syn_holds, self._port_holds):
                batch.put(nftset, keys, [b""] * len(keys), _milliseconds(timeout_s))

    def unhold_listeners(self, endpoints: Sequence[Endpoint]) -> None:
        """See base.Holds."""
        with self.transaction() as batch:
            for nftset, keys in _listener_keys(endpoints, self._syn_holds, self._port_holds):
                batch.remove(nftset, keys)

    def miss_listeners(self, endpoints: Sequence[Endpoint], no_more: Sequence[Endpoint] = ()) -> None:
        """See base.Holds."""
        with self.transaction() as batch:
            for nftset, keys in _listener_keys(no_more, self._away, self._away_ports):
                batch.remove(nftset, keys)
            for nftset, keys in _listener_keys(endpoints, self._away, self._away_ports):
                batch.add(nftset, ((key, b"") for key in keys))

    def missed_listeners(self) -> list[Endpoint]:
        """See base.Holds."""
        found = []
        with self._lock:
            for version, nftset in self._away.items():
                wide = 4 if version == 4 else 16
                for key, _unused in self._nft.dump(nftset):
                    found.append(Endpoint(address_of(key[:wide]), *_PORT.unpack_from(key, wide)))
            for version, nftset in self._away_ports.items():
                anywhere = IPv4Address(0) if version == 4 else IPv6Address(0)
                found += [
                    Endpoint(anywhere, *_PORT.unpack_from(key)) for key, _unused in self._nft.dump(nftset)
                ]
        return found

    def reserve_ports(self, ports: Collection[int]) -> None:
        """See base.Holds. The set keeps which are ours, as the kernel keeps them reserved.

        Of one thread. The lock is not kept: a transaction may have the tables made again, by who waits for
        ``_making`` then, and who makes them asks the kernel under the lock.
        """
        with self._lock:
            if self._ours is None:
                self._ours = {_PORT.unpack_from(key)[0] for key, _unused in self._nft.dump(self._reserved)}
            ours = self._ours
        wanted = own_ports.chosen(ports, ours)
        if not wanted | ours:
            return
        now = own_ports.reserved()
        if ours == wanted <= now:
            return
        new = wanted - ours - now  # what was reserved before we came is not for us to release
        with self.transaction() as batch:
            batch.add(self._reserved, ((_PORT.pack(port), b"") for port in new))
        self._ours = ours | new
        kept = (ours | new) & wanted
        if (after := now - (ours - kept) | kept) != now:
            own_ports.reserve(after)
        with self.transaction() as batch:
            batch.remove(self._reserved, [_PORT.pack(port) for port in ours - kept])
        self._ours = kept

    def _release_ports(self) -> None:
        try:
            self.reserve_ports(())
        except OSError as error:
            if error.errno != errno.ENOENT:  # no such table, or set: of an earlier version
                raise

    # --- elements of the modes ---------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Batch]:
        """A batch that is committed at the end of the block, all or nothing."""
        batch = Batch()
        yield batch
        try:
            self._commit(batch)
        except FileNotFoundError:
            if not self.restore():
                raise
            self._commit(batch)

    def _commit(self, batch: Batch) -> None:
        with self._lock, self.news.unheard():
            self._maybe_unheard = True
            self._nft.commit(batch)

    def moved(self, mode: Mode) -> bytes:
        """Flow data: the connection left; drop its packets both ways."""
        return self._mark(Tag.MOVED, _NUMBER[mode])

    def ended(self, mode: Mode) -> bytes:
        """Flow data: the connection left and is no more; its ends are free for a new one."""
        return self._mark(Tag.ENDED, _NUMBER[mode])

    def local(self, mode: Mode) -> bytes:
        """Flow data: the connection came and kept its address."""
        return self._mark(Tag.LOCAL, _NUMBER[mode])

    def nat_out(self, port: int) -> bytes:
        """Flow data: the connection left; ``port`` is the importer's."""
        return self._mark(Tag.NAT_OUT, port)

    def nat_in(self, port: int) -> bytes:
        """Flow data: the connection came; ``port`` is the one that the peer knows."""
        return self._mark(Tag.NAT_IN, port)

    def _mark(self, tag: Tag, low: int) -> bytes:
        return _MARK.pack(self.settings.marked(tag, low))

    def need_ports(self, batch: Batch, ports: Iterable[int]) -> None:
        """Ports that translation writes; the map from mark to port only ever grows (65,536 at most)."""
        new = set(ports) - self._known_ports
        batch.add(self._ports, ((_MARK.pack(port), _PORT.pack(port)) for port in new))
        batch.then(lambda: self._known_ports.update(new))

    def note_importers(self, batch: Batch, addresses: Iterable[Address]) -> None:
        """Hosts that packets are translated to: chain reroute looks for them in what this host says."""
        for address in set(addresses):
            batch.add(self.importers[address.version], [(address.packed, b"")])

    def expire(
        self, mode: Mode, tuples: Sequence[FourTuple], linger_s: float, *maps: dict[int, NftSet]
    ) -> None:
        """Forget where connections went, but drop what is late of them for ``linger_s``; 0: not at all.

        A new connection with the same ends is none of ours from its SYN on, whoever sends it.
        """
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                for each in (*maps, self._anew):
                    batch.remove(each[version], keys)
                if linger_s > 0:
                    batch.put(
                        self.flows[version], keys, [self.ended(mode)] * len(keys), _milliseconds(linger_s)
                    )
                else:
                    batch.remove(self.flows[version], keys)

    def silence(self, mode: Mode, tuples: Sequence[FourTuple]) -> None:
        """Drop all packets of connections that others' rules lead away, until those are gone."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.put(self.flows[version], keys, [self.moved(mode)] * len(keys))

    def forget(self, tuples: Sequence[FourTuple], *maps: dict[int, NftSet]) -> None:
        """Connections are ordinary ones again: no flow and no element in ``maps``."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                for each in (*maps, self.flows):
                    batch.remove(each[version], keys)

    def relinquish(self, tuples: Sequence[FourTuple], elements: dict[int, NftSet]) -> None:
        """No element in that map; flows stay, which are another mode's by now."""
        with self.transaction() as batch:
            for version, keys in keys_by_version(tuples):
                batch.remove(elements[version], keys)

    def lead(self, batch: Batch, tuples: Iterable[FourTuple]) -> None:
        """Others' rules lead them on: the silence about a listener that has moved is not for them."""
        for version, keys in keys_by_version(tuples):
            batch.put(self.led[version], keys, [b""] * len(keys))

    def clear(self, batch: Batch, tuples: Iterable[FourTuple]) -> None:
        """No flow and no hold, for modes that keep their entries elsewhere."""
        for version, keys in keys_by_version(tuples):
            batch.remove(self.flows[version], keys)
            batch.remove(self.holds[version], keys)

    # --- read back -----------------------------------------------------------------------------

    def read(self, maps: dict[int, NftSet]) -> dict[FourTuple, Address]:
        """Every element of an address map (``addresses`` or ``nexts``)."""
        with self._lock:
            return {tuple_of(k): address_of(d) for s in maps.values() for k, d in self._nft.dump(s)}

    def read_flows(self) -> dict[FourTuple, tuple[Tag, int]]:
        """Every flow: its tag, and its port or mode number."""
        with self._lock:
            return {tuple_of(k): _tag(d) for s in self.flows.values() for k, d in self._nft.dump(s)}

    def read_mode(self, tag: Tag, mode: Mode) -> list[FourTuple]:
        """The flows that ``mode`` tagged ``tag`` (MOVED or LOCAL)."""
        wanted = (tag, _NUMBER[mode])
        return [t for t, found in self.read_flows().items() if found == wanted]

    def flow(self, t: FourTuple) -> tuple[Tag, int] | None:
        """One connection's flow, or None."""
        with self._lock:
            data = self._nft.get(self.flows[t.version], key_of(t))
        return None if data is None else _tag(data)

    def address(self, maps: dict[int, NftSet], t: FourTuple) -> Address | None:
        """One connection's element of an address map, or None."""
        with self._lock:
            data = self._nft.get(maps[t.version], key_of(t))
        return None if data is None else address_of(data)

    # --- addresses that have left (takeover) ---------------------------------------------------

    def note_given(self, address: Address, interface: int, prefix_length: int) -> None:
        """Before ``address`` leaves this host: where it was. The kernel keeps it, as it keeps the absence."""
        if interface > _INTERFACE_MAX:
            interface = 0
        data = _MARK.pack(interface << 8 | prefix_length)
        with self.transaction() as batch:
            batch.put(self._given[address.version], [address.packed], [data])
        self._known_given[address] = data

    def given(self, address: Address) -> tuple[int, int] | None:
        """(interface index or 0, prefix length) of an address that has left, or None."""
        with self._lock:
            data = self._nft.get(self._given[address.version], address.packed)
        return None if data is None else divmod(_MARK.unpack(data)[0], 256)

    def forget_given(self, address: Address) -> None:
        """The inverse of ``note_given``."""
        with self.transaction() as batch:
            batch.remove(self._given[address.version], [address.packed])
        self._known_given.pop(address, None)

    # --- addresses that are here for connections that have come (takeover) ---------------------

    def note_alias(self, address: Address) -> None:
        """Before this host gets ``address`` from us. The note stays when it leaves, as it may come again."""
        with self.transaction() as batch:
            batch.add(self._aliases[address.version], [(address.packed, b"")])
        self._known_aliases.add(address)

    def is_alias(self, address: Address) -> bool:
        """Whether it is here, if it is, because of connections that have come."""
        with self._lock:
            return self._nft.get(self._aliases[address.version], address.packed) is not None

    def forget_alias(self, address: Address) -> None:
        """The inverse of ``note_alias``: somebody else has seen to it that this host has it."""
        with self.transaction() as batch:
            batch.remove(self._aliases[address.version], [address.packed])
        self._known_aliases.discard(address)

    def is_importer(self, address: Address) -> bool:
        """Whether a connection was ever translated to ``address`` from here."""
        with self._lock:
            return self._nft.get(self.importers[address.version], address.packed) is not None


def _listener_keys(
    endpoints: Iterable[Endpoint], specific: dict[int, NftSet], everywhere: dict[int, NftSet]
) -> Iterator[tuple[NftSet, list[bytes]]]:
    """Keys of listeners on an address, and by port of those on all addresses: on ``::`` they accept IPv4."""
    found: dict[NftSet, dict[bytes, None]] = {}
    for endpoint in endpoints:
        port = _PORT.pack(endpoint.port)
        if not endpoint.address.is_unspecified:
            key = endpoint.address.packed + port + b"\0\0"
            found.setdefault(specific[endpoint.version], {})[key] = None
            continue
        for version in (4,) if endpoint.version == 4 else (4, 6):
            found.setdefault(everywhere[version], {})[port] = None
    for nftset, keys in found.items():
        yield nftset, list(keys)


def _tag(data: bytes) -> tuple[Tag, int]:
    (mark,) = _MARK.unpack(data)
    return Tag(mark >> 16 & 0xF), mark & 0xFFFF


def _milliseconds(timeout_s: float | None) -> int:
    """Element timeout: at least 1 ms, as 0 would mean for ever; None is for ever."""
    if timeout_s is None:
        return 0
    return min(max(1, round(timeout_s * 1000)), 0xFFFFFFFF)


def _nft(arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
    try:
        return processes.run(["nft", *arguments], text, timeout_s=_NFT_TIMEOUT_S)
    except FileNotFoundError:
        raise FileNotFoundError("the program nft is not installed; install the package nftables") from None
