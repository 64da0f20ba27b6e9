# SPDX-License-Identifier: MIT
"""The group on the network: sealed datagrams by multicast or to a list of addresses, and who is there.

Plain callbacks of an event loop, nothing else; a message costs one AEAD call and one system call.

Multicast: one socket is bound to the group's address and port, so that several groups share a
host and even a port; another, bound to this host's own address, sends everything and gets what
is meant for this host alone. List: one socket per address family.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sockmi.addresses import Endpoint
from sockmi.frozen import frozen
from sockmi.transport.hello import Introduction
from sockmi.transport.identity import HostId, Identity, IdentityError, check_certificate, fingerprint_of
from sockmi.transport.keyring import Keyring
from sockmi.transport.seal import DATAGRAM_BYTES_MAX, Limits, Received, Seal
from sockmi.transport.sockaddr import (
    Address,
    SockAddr,
    family_of,
    interface_addresses,
    routed_address,
    to_endpoint,
    to_sockaddr,
)

log = logging.getLogger(__name__)

_IP_MULTICAST_ALL = 49  # linux/in.h
_IPV6_MULTICAST_ALL = 29  # linux/in6.h
_DATAGRAMS_PER_TURN = 64
_RECEIVE_BUFFER_BYTES = 1 << 20


class GroupError(Exception):
    """The group's sockets cannot be set up; the text says what, where and what to do."""


@frozen
class GroupSettings:
    """Where the group meets. Either ``multicast`` or ``members`` (of which this host may be one).

    ``interface``: None lets routing choose. ``address``: our own; None: the interface's.
    ``unicast_port``: where this host gets what is for it alone; None: ``port``, 0: any free one.
    A member that has not been heard for ``expiry_s`` is gone (None: 3.5 announcements).
    """

    port: int
    multicast: Address | None = None
    members: tuple[Endpoint, ...] = ()
    interface: str | None = None
    address: Address | None = None
    unicast_port: int | None = None
    hops: int = 1
    loopback: bool = True
    announce_interval_s: float = 10.0
    expiry_s: float | None = None
    members_max: int = 1024

    def __post_init__(self) -> None:
        if (self.multicast is None) == (not self.members):
            raise ValueError("a group needs either a multicast address or a list of members")
        if self.multicast is not None and not self.multicast.is_multicast:
            raise ValueError(f"{self.multicast} is not multicast; choose one from 239.0.0.0/8 or ff05::/16")
        if not 1 <= self.port <= 0xFFFF:
            raise ValueError(f"port {self.port} is outside 1..65535")
        if self.announce_interval_s <= 0:
            raise ValueError("the announcement interval must be positive")

    @property
    def name(self) -> str:
        """``ADDRESS:PORT`` of the group, or ``list:PORT``; part of the datagrams' keys."""
        return str(Endpoint(self.multicast, self.port)) if self.multicast else f"list:{self.port}"

    @property
    def silence_s(self) -> float:
        """After how long a silent member is gone."""
        return self.expiry_s if self.expiry_s is not None else 3.5 * self.announce_interval_s


@dataclass(slots=True)
class Member:
    """Another host of the group, proven alive. ``endpoints``: where its stream listens, in order of trial.

    ``address`` is where its datagrams come from; ``last_heard`` is monotonic time (s).
    """

    host_id: HostId
    host_name: str
    address: SockAddr
    endpoints: tuple[Endpoint, ...]
    certificate: bytes
    fingerprint: bytes
    engines: tuple[str, ...]
    redirects: tuple[str, ...]
    last_heard: float = field(compare=False)


class Group:
    """This host in one group.

    ``on_message(sender, address, message)``; ``on_member(member)`` when a member is new, has
    restarted or says something else of itself; ``on_leave(member, reason)``.
    ``alive(host)``: whether a silent member is known to live by other means (an open stream).
    Exceptions of the callbacks go to the loop's exception handler.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: GroupSettings,
        keyring: Keyring,
        identity: Identity,
        introduction: Introduction,
        *,
        on_message: Callable[[HostId, SockAddr, bytes], None],
        on_member: Callable[[Member], None] = lambda member: None,
        on_leave: Callable[[Member, str], None] = lambda member, reason: None,
        alive: Callable[[HostId], bool] = lambda host: False,
        limits: Limits | None = None,
    ) -> None:
        self.settings = settings
        self.members: dict[HostId, Member] = {}
        self.counters: Counter[str] = Counter()
        self._loop = loop
        self._seal = Seal(
            keyring, identity.host_id, settings.name.encode(), introduction.encode(), limits=limits
        )
        self._on_message = on_message
        self._on_member = on_member
        self._on_leave = on_leave
        self._alive = alive
        self._listener: socket.socket | None = None  # bound to the multicast address
        self._sockets: dict[int, socket.socket] = {}  # by family; all that we send
        self._joined: tuple[int, Address | None] = (0, None)  # see _where
        self._timer: asyncio.TimerHandle | None = None
        self._broken = False

    @property
    def seal_counters(self) -> Counter[str]:
        """What the seal has accepted and, by reason, refused."""
        return self._seal.counters

    def refused_lately(self, reason: str) -> SockAddr | None:
        """From where, within a few announcements, a datagram came that the seal refused for ``reason``."""
        source, at = self._seal.refused.get(reason, (None, 0.0))
        lately = self._loop.time() - at < 3.5 * self.settings.announce_interval_s
        return source if lately and isinstance(source, tuple) else None

    @property
    def local(self) -> tuple[Endpoint, ...]:
        """Where datagrams for this host alone arrive."""
        return tuple(to_endpoint(one.getsockname()) for one in self._sockets.values())

    def start(self) -> None:
        """Open the sockets, join, announce. GroupError if that is impossible now."""
        self._open()
        self._tick()

    def close(self) -> None:
        """Say farewell and stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sockets:
            self._to_all(self._seal.leave())
        self._close()

    def introduce(self, introduction: Introduction) -> None:
        """Say something else of this host from now on; announced at once."""
        self._seal.introduction = introduction.encode()
        self._to_all(self._seal.hello())

    def rekey(self, keyring: Keyring) -> None:
        """Use another keyring; members known only by a key that is gone must prove themselves again."""
        for host in self._seal.rekey(keyring):
            self._gone(host, "its key is no longer valid")
        self._to_all(self._seal.hello())

    def send(self, message: bytes, to: HostId | None) -> bool:
        """Send a message to a member, or (None) to all. Best effort; False: certainly not sent.

        ValueError if it is larger than ``seal.MESSAGE_BYTES_MAX``.
        """
        if to is None:
            return self._to_all(self._seal.message(message, None))
        member = self.members.get(to)
        return member is not None and self._sendto(self._seal.message(message, to), member.address)

    # --- sockets ---

    def _open(self) -> None:
        try:
            index, address = self._joined = self._where()
            if self.settings.multicast is not None and address is not None:
                self._open_multicast(self.settings.multicast, index, address)
            else:
                self._open_list(address)
        except OSError as error:
            self._close()
            where = f" on {self.settings.interface}" if self.settings.interface else ""
            raise GroupError(
                f"group {self.settings.name}{where}: {error.strerror or error}; is the interface up, has it "
                "an address, and is the port free?"
            ) from error
        self._broken = False
        for one in [*self._sockets.values(), *([self._listener] if self._listener else [])]:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            self._loop.add_reader(one.fileno(), self._readable, one)

    def _where(self) -> tuple[int, Address | None]:
        """The interface's index (0: by routing) and our address for multicast; OSError if there is none."""
        interface, address = self.settings.interface, self.settings.address
        multicast = self.settings.multicast
        index = socket.if_nametoindex(interface) if interface else 0
        if address is None and multicast is not None:
            if interface:
                address = next(iter(interface_addresses(interface, multicast.version)), None)
            else:
                address = routed_address(multicast)
            if address is None:
                raise OSError(0, "no address to send from")
        return index, address

    def _open_multicast(self, multicast: Address, index: int, address: Address) -> None:
        family = family_of(multicast)
        port = self.settings.port if self.settings.unicast_port is None else self.settings.unicast_port
        own = self._sockets[family] = _udp(family)
        own.bind(to_sockaddr(Endpoint(address, port)))
        self._listener = listener = _udp(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET:
            # struct ip_mreqn: group, our address, interface; MULTICAST_ALL off: only groups joined here.
            ours = bytes(4) if index else address.packed
            request = struct.pack("=4s4si", multicast.packed, ours, index)
            own.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
            own.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, self.settings.hops)
            own.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, self.settings.loopback)
            own.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
            listener.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
            listener.bind((str(multicast), self.settings.port))
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        else:
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, self.settings.hops)
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, self.settings.loopback)
            own.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
            listener.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
            listener.bind((str(multicast), self.settings.port, 0, index))
            listener.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, struct.pack("=16si", multicast.packed, index)
            )

    def _open_list(self, address: Address | None) -> None:
        port = self.settings.port if self.settings.unicast_port is None else self.settings.unicast_port
        for family in sorted({family_of(member.address) for member in self.settings.members}):
            own = self._sockets[family] = _udp(family)
            wildcard = ("0.0.0.0", port) if family == socket.AF_INET else ("::", port, 0, 0)  # noqa: S104
            if self.settings.interface:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.settings.interface.encode())
            fits = address is not None and family_of(address) == family
            own.bind(to_sockaddr(Endpoint(address, port)) if address is not None and fits else wildcard)

    def _close(self) -> None:
        for one in [*self._sockets.values(), *([self._listener] if self._listener else [])]:
            self._loop.remove_reader(one.fileno())
            one.close()
        self._sockets = {}
        self._listener = None

    def _reopen_if_moved(self) -> None:
        """An interface that was removed and made again, or got another address, has lost our membership."""
        if not self._broken and self._sockets:
            try:
                if self._where() == self._joined:
                    return
            except OSError as error:
                log.debug("group %s: %s", self.settings.name, error)
        self._close()
        try:
            self._open()
        except GroupError as error:
            log.warning("%s Trying again.", error)
        else:
            log.info("group %s: joined again", self.settings.name)

    # --- time ---

    def _tick(self) -> None:
        """Every interval: look after the sockets, announce, miss the silent."""
        interval = self.settings.announce_interval_s * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
        self._timer = self._loop.call_later(interval, self._tick)
        self._reopen_if_moved()
        self._to_all(self._seal.hello())
        now = self._loop.time()
        for member in list(self.members.values()):
            if now - member.last_heard > self.settings.silence_s and not self._alive(member.host_id):
                self._seal.forget(member.host_id)
                self._gone(member.host_id, f"not heard for {now - member.last_heard:.1f} s")

    def _gone(self, host: HostId, reason: str) -> None:
        if (member := self.members.pop(host, None)) is not None:
            name = self.settings.name
            log.info("group %s: %s (%s) is gone: %s", name, host.hex(), member.host_name, reason)
            self._call(self._on_leave, member, reason)

    # --- in ---

    def _readable(self, one: socket.socket) -> None:
        for _turn in range(_DATAGRAMS_PER_TURN):
            if one.fileno() < 0:
                return  # a callback has closed the group
            try:
                datagram, source = one.recvfrom(DATAGRAM_BYTES_MAX + 1)  # one more, to see what is too large
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.counters[f"receive_{error.errno}"] += 1
                self._broken = True
                return
            received = self._seal.receive(datagram, source, self._loop.time())
            if received is not None:
                self._received(received, source)

    def _received(self, received: Received, source: SockAddr) -> None:
        if received.reply is not None:
            self._sendto(received.reply, source)
        member = self.members.get(received.sender)
        if received.introduction is not None:
            member = self._introduced(received, source)
        elif received.leaving:
            self._gone(received.sender, "it said farewell")
        if member is None:
            return
        if received.message is not None:
            member.last_heard = self._loop.time()
            self._call(self._on_message, received.sender, source, received.message)

    def _introduced(self, received: Received, source: SockAddr) -> Member | None:
        """Enter what a HELLO says in the table; a HELLO that makes no sense is as if it had not come."""
        old = self.members.get(received.sender)
        try:
            says = Introduction.decode(received.introduction or b"")
            if (old is None or old.certificate != says.certificate) and (
                check_certificate(says.certificate) != received.sender
            ):
                raise ValueError("its certificate names another host")
            if old is None and len(self.members) >= self.settings.members_max:
                raise ValueError(f"the group has {self.settings.members_max} members already")
        except (ValueError, IdentityError) as error:
            self.counters["bad_hello"] += 1
            log.warning(
                "group %s: HELLO of %s from %s refused: %s",
                self.settings.name,
                received.sender.hex(),
                source[0],
                error,
            )
            if old is None:
                self._seal.forget(received.sender)
            return None
        addresses = says.addresses or (to_endpoint(source).address,)
        member = Member(
            host_id=received.sender,
            host_name=says.host_name,
            address=source,
            endpoints=tuple(Endpoint(address, says.stream_port) for address in addresses),
            certificate=says.certificate,
            fingerprint=fingerprint_of(says.certificate),
            engines=says.engines,
            redirects=says.redirects,
            last_heard=self._loop.time(),
        )
        self.members[received.sender] = member
        if received.new_session or member != old:
            name = self.settings.name
            log.info("group %s: %s (%s) at %s", name, member.host_id.hex(), member.host_name, source[0])
            self._call(self._on_member, member)
        return member

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # the loop goes on, whatever a message does
            self._loop.call_exception_handler({"message": f"error in {callback!r}", "exception": error})

    # --- out ---

    def _to_all(self, datagram: bytes) -> bool:
        if self.settings.multicast is not None:
            target = to_sockaddr(Endpoint(self.settings.multicast, self.settings.port))
            if len(target) == 4:
                target = (target[0], target[1], 0, self._joined[0])
            return self._sendto(datagram, target)
        targets = dict.fromkeys(to_sockaddr(member) for member in self.settings.members)
        targets.update(dict.fromkeys(member.address for member in self.members.values()))
        return sum(self._sendto(datagram, target) for target in targets) > 0

    def _sendto(self, datagram: bytes, target: SockAddr) -> bool:
        one = self._sockets.get(socket.AF_INET6 if len(target) == 4 else socket.AF_INET)
        if one is None:
            return False
        try:
            one.sendto(datagram, target)
        except (BlockingIOError, InterruptedError):
            self.counters["send_full"] += 1
        except OSError as error:
            self.counters[f"send_{error.errno}"] += 1  # no route, or a firewall; the next one may get through
        else:
            return True
        return False


def _udp(family: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return one
