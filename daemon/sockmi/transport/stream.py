# SPDX-License-Identifier: MIT
"""Streams between the hosts of the group: one TLS 1.3 connection for each pair, opened on demand.

Whom we talk to is decided by certificates alone: the fingerprints that came in sealed HELLOs
are pinned, whoever connects. Where both hosts connect at once, the connection that the
host with the lower id began is kept.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sockmi.addresses import Endpoint
from sockmi.frozen import frozen
from sockmi.transport.group import Member
from sockmi.transport.identity import HostId, Identity
from sockmi.transport.link import Frame, Link, Phase, connect
from sockmi.transport.sockaddr import Address, family_of, to_endpoint, to_sockaddr

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview
_ACCEPTS_PER_TURN = 16
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class QueueFull(BufferError):
    """More is waiting for this host than ``queue_bytes_max``; ``on_drain`` will say when to go on."""


class StreamError(Exception):
    """The streams cannot be listened for; the text says what, where and what to do."""


@frozen
class StreamSettings:
    """Limits. After ``ping_interval_s`` of silence a host is asked, after ``dead_after_s`` it is given up."""

    frame_bytes_max: int = (64 << 20) + (1 << 20)
    queue_bytes_max: int = 160 << 20
    open_timeout_s: float = 3.0
    ping_interval_s: float = 1.0
    dead_after_s: float = 5.0
    probe_timeout_s: float = 1.0
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0
    unproven_max: int = 64
    unproven_per_address_max: int = 16


@dataclass(slots=True)
class _Peer:
    """All about one other host. At most one of ``active`` and ``attempt`` is set."""

    host_id: HostId
    members: dict[str, Member] = field(default_factory=dict)  # by group; all with one fingerprint
    active: Link | None = None
    attempt: Link | None = None  # ours, on its way
    untried: list[Endpoint] = field(default_factory=list)
    standby: Link | None = None  # theirs, verified, while it is not clear that it is needed
    context: ssl.SSLContext | None = None
    failures: int = 0
    retry_at: float = 0.0
    retry: asyncio.TimerHandle | None = None
    probe: int | None = None  # the PING whose answer shows that ``active`` lives
    pings: int = 0
    pinged_at: float = 0.0
    full: bool = False

    @property
    def member(self) -> Member:
        """Any group's view; the fingerprint is the same in all."""
        return next(iter(self.members.values()))


class StreamPool:
    """The streams of this host.

    ``on_message(host, payload)``: the memoryview is the receiver's to keep. ``on_open(host)``:
    messages can be sent; ``on_lost(host, reason)``: what was sent may or may not have arrived, or a
    stream that ``open`` asked for could not be had. Each on_open is followed by one on_lost before the
    next. No callback comes from within ``open`` or ``send``; ``update`` and ``forget`` may call on_lost.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        identity: Identity,
        settings: StreamSettings | None = None,
        *,
        on_message: Callable[[HostId, memoryview], None],
        on_open: Callable[[HostId], None],
        on_lost: Callable[[HostId, str], None],
        on_drain: Callable[[HostId], None] = lambda host: None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._loop = loop
        self._identity = identity
        self._settings = settings or StreamSettings()
        self._on_message = on_message
        self._on_open = on_open
        self._on_lost = on_lost
        self._on_drain = on_drain
        self._peers: dict[HostId, _Peer] = {}
        self._hosts: dict[bytes, HostId] = {}  # by fingerprint
        self._links: dict[Link, HostId] = {}  # of known hosts: active, attempt or standby
        self._unproven: dict[Link, Address] = {}  # incoming, before the handshake is complete
        self._listeners: list[socket.socket] = []
        self._server_context: ssl.SSLContext | None = None
        self._closed = False
        self._ticked_at = loop.time()
        self._tick_s = min(self._settings.ping_interval_s, self._settings.dead_after_s) / 2
        self._timer = loop.call_later(self._tick_s, self._tick)

    # --- what the daemon calls ---

    def listen(self, endpoints: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
        """Accept streams at these endpoints (port 0: any free one); returns them with their real ports."""
        for endpoint in endpoints:
            one = socket.socket(
                family_of(endpoint.address), socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if endpoint.version == 6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(to_sockaddr(endpoint))
                one.listen(128)
            except OSError as error:
                one.close()
                raise StreamError(
                    f"cannot listen at {endpoint}: {error.strerror}; "
                    "choose another stream.address or stream.port"
                ) from error
            self._listeners.append(one)
            self._loop.add_reader(one.fileno(), self._accept, one)
        return tuple(to_endpoint(one.getsockname()) for one in self._listeners)

    def update(self, member: Member, group: str = "default") -> bool:
        """A member is there, or says something else of itself: trust its certificate.

        False, and nothing is changed, if another group knows this host by another certificate.
        """
        peer = self._peers.setdefault(member.host_id, _Peer(member.host_id))
        others = [known for name, known in peer.members.items() if name != group]
        if any(known.fingerprint != member.fingerprint for known in others):
            self.counters["certificate_conflict"] += 1
            log.warning("host %s: another certificate in group %s; refused", member.host_id.hex(), group)
            return False
        known = peer.members.get(group)
        peer.members[group] = member
        changed = known is not None and known.fingerprint != member.fingerprint
        if known is not None and changed:
            self._hosts.pop(known.fingerprint, None)
            self._server_context = peer.context = None
        if self._hosts.get(member.fingerprint) is None:
            self._hosts[member.fingerprint] = member.host_id
            if self._server_context is not None:
                self._server_context.load_verify_locations(cadata=member.certificate)
        if changed:
            self._drop_links(peer, "its certificate has changed")
        if known is None or known.endpoints != member.endpoints:
            peer.failures, peer.retry_at = 0, 0.0
            if peer.retry is not None:
                peer.retry.cancel()
                self._retry(peer)
        return True

    def forget(self, host: HostId, group: str = "default") -> None:
        """A member has left a group. Out of the last one, it is no longer trusted: streams with it end."""
        peer = self._peers.get(host)
        if peer is None or peer.members.pop(group, None) is None or peer.members:
            return
        self._hosts = {fingerprint: other for fingerprint, other in self._hosts.items() if other != host}
        self._server_context = None  # made again, without it, when somebody connects
        del self._peers[host]
        self._drop_links(peer, "no longer a member")

    def open(self, host: HostId) -> bool:
        """True: there is a stream. False: ``on_open`` or ``on_lost`` will follow."""
        peer = self._peers.get(host)
        if peer is None:
            self._loop.call_soon(self._call, self._on_lost, host, "not a member of the group")
            return False
        if peer.active is None and peer.attempt is None and peer.retry is None:
            delay = peer.retry_at - self._loop.time()
            if delay > 0:
                peer.retry = self._loop.call_later(delay, self._retry, peer)
            else:
                self._begin(peer)
        return peer.active is not None

    def is_open(self, host: HostId) -> bool:
        """Whether messages can be sent now."""
        peer = self._peers.get(host)
        return peer is not None and peer.active is not None

    def hosts(self) -> list[HostId]:
        """With whom a stream is open."""
        return [peer.host_id for peer in self._peers.values() if peer.active is not None]

    def queued_bytes(self, host: HostId) -> int:
        """What waits to be written to this host."""
        peer = self._peers.get(host)
        return peer.active.queued_bytes if peer is not None and peer.active is not None else 0

    def send(self, host: HostId, payload: Buffer | Sequence[Buffer], *, more: bool = False) -> bool:
        """Send one message, in order; False if no stream is open (nothing is kept: ``open`` it).

        A sequence is one message, joined on the wire without a copy; the buffers must not change
        until they are sent. ``more``: another one follows at once, and is written with it. Raises QueueFull,
        or ValueError if the message exceeds ``frame_bytes_max``.
        """
        peer = self._peers.get(host)
        if peer is None or peer.active is None:
            return False
        buffers = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        size = sum(view.nbytes for view in views)
        if size > self._settings.frame_bytes_max:
            raise ValueError(f"message of {size} bytes, more than {self._settings.frame_bytes_max}")
        if peer.active.queued_bytes and peer.active.queued_bytes + size > self._settings.queue_bytes_max:
            peer.full = True
            raise QueueFull(f"{peer.active.queued_bytes} bytes wait already for host {host.hex()}")
        peer.active.send(Frame.MESSAGE, views, more=more)
        return True

    def close(self) -> None:
        """Close everything; no callback follows."""
        self._closed = True
        self._timer.cancel()
        for one in self._listeners:
            self._loop.remove_reader(one.fileno())
            one.close()
        self._listeners.clear()
        for peer in self._peers.values():
            if peer.retry is not None:
                peer.retry.cancel()
        for link in [*self._links, *self._unproven]:
            link.close()
        self._peers.clear()
        self._links.clear()
        self._unproven.clear()

    # --- outgoing ---

    def _retry(self, peer: _Peer) -> None:
        peer.retry = None
        if peer.active is None and peer.attempt is None:
            self._begin(peer)

    def _begin(self, peer: _Peer) -> None:
        peer.untried = list(peer.member.endpoints)
        self._next_endpoint(peer, "it has told no address")

    def _next_endpoint(self, peer: _Peer, reason: str) -> None:
        """Try the next address of the host; after the last one, its own stream or nothing."""
        while peer.untried:
            endpoint = peer.untried.pop(0)
            try:
                sock = connect(endpoint)
            except OSError as error:
                reason = f"{endpoint}: {error.strerror}"
                continue
            try:
                if peer.context is None:
                    peer.context = self._context(ssl.PROTOCOL_TLS_CLIENT, [peer.member])
                peer.attempt = self._link(sock, peer.context, server=False)
            except OSError as error:  # our identity file has gone
                sock.close()
                reason = f"{self._identity.path}: {error.strerror}"
                continue
            self._links[peer.attempt] = peer.host_id
            return
        peer.failures += 1
        backoff = self._settings.backoff_first_s * 2.0 ** min(peer.failures - 1, 20)
        backoff = min(self._settings.backoff_max_s, backoff)
        peer.retry_at = self._loop.time() + backoff * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
        self.counters["open_failed"] += 1
        if peer.standby is not None:
            self._welcome(peer, peer.standby)
        else:
            # Not from within open(): its caller does not expect to be called back yet.
            self._loop.call_soon(self._call, self._on_lost, peer.host_id, reason)

    def _link(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> Link:
        link = Link(
            self._loop,
            self,
            sock,
            context,
            server=server,
            frame_bytes_max=self._settings.frame_bytes_max,
            user_timeout_s=self._settings.dead_after_s,
        )
        timeout_s = self._settings.open_timeout_s
        link.timer = self._loop.call_later(timeout_s, lambda: link.fail(f"not open after {timeout_s:g} s"))
        return link

    # --- incoming ---

    def _accept(self, listener: socket.socket) -> None:
        for _turn in range(_ACCEPTS_PER_TURN):
            if self._closed:
                return
            try:
                sock, source = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("accept: %s", error.strerror)
                if error.errno in _OUT_OF_RESOURCES:
                    self._loop.remove_reader(listener.fileno())
                    self._loop.call_later(1.0, self._accept_again, listener)
                return
            address = to_endpoint(source).address
            if not self._may_try(address):
                self.counters["refused_unproven"] += 1
                sock.close()
                continue
            try:
                if self._server_context is None:
                    members = [peer.member for peer in self._peers.values()]
                    self._server_context = self._context(ssl.PROTOCOL_TLS_SERVER, members)
                link = self._link(sock, self._server_context, server=True)
            except OSError as error:  # reset before we looked, or our identity file has gone
                log.debug("an incoming stream failed: %s", error)
                sock.close()
                continue
            self._unproven[link] = address

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _may_try(self, address: Address) -> bool:
        """Strangers share half the room, so that they cannot keep members out."""
        from_here = sum(1 for other in self._unproven.values() if other == address)
        if not self._hosts or from_here >= self._settings.unproven_per_address_max:
            return False
        if len(self._unproven) < self._settings.unproven_max // 2:
            return True
        return len(self._unproven) < self._settings.unproven_max and any(
            address == at.address for peer in self._peers.values() for at in peer.member.endpoints
        )

    def _context(self, protocol: int, trusted: Sequence[Member]) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the certificate itself is pinned
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._identity.path)
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # no resumption: every stream shows its certificate
        for member in trusted:
            context.load_verify_locations(cadata=member.certificate)
        return context

    # --- LinkOwner ---

    def link_ready(self, link: Link) -> None:
        """Certificates are verified: whose link is it, and is it wanted?"""
        host = self._hosts.get(link.fingerprint)
        if not link.server:
            if host is None or host != self._links.get(link):
                link.fail("the certificate is another host's")
            return  # open when the other side says WELCOME
        self._unproven.pop(link, None)
        peer = self._peers.get(host) if host is not None else None
        if peer is None or host == self._identity.host_id:
            self.counters["refused_certificate"] += 1
            link.close()
            return
        self._links[link] = peer.host_id
        attempt = peer.attempt
        if peer.active is None and (
            attempt is None or peer.host_id < self._identity.host_id or attempt.phase is Phase.CONNECTING
        ):
            self._welcome(peer, link)
            return
        if peer.standby is not None:
            self._discard(peer.standby)
        peer.standby = link
        if peer.active is not None:
            # It has lost what we think is open, or both connected at once: see whether it still answers.
            peer.probe = self._ping(peer, peer.active)
            active = peer.active
            self._loop.call_later(self._settings.probe_timeout_s, self._probe_over, peer, active, link)

    def link_frame(self, link: Link, kind: int, payload: memoryview) -> None:
        """Dispatch a frame of a host that is known."""
        host = self._links.get(link)
        peer = self._peers.get(host) if host is not None else None
        if host is None or peer is None:
            link.close()
        elif link is peer.attempt and kind == Frame.WELCOME and not payload:
            peer.attempt = None
            self._opened(peer, link)
        elif link is not peer.active:
            link.fail("a frame before the stream was open")
        elif kind == Frame.MESSAGE:
            self._call(self._on_message, host, payload)
        elif kind == Frame.PING and payload.nbytes == 4:
            if link.queued_bytes > 2 * self._settings.queue_bytes_max:
                link.fail("it asks, but does not read the answers")
            else:
                link.send(Frame.PONG, [payload])
        elif kind == Frame.PONG and payload.nbytes == 4:
            if peer.probe is not None and int.from_bytes(payload, "big") >= peer.probe:
                peer.probe = None
                if peer.standby is not None:
                    self._discard(peer.standby)
                    peer.standby = None
        else:
            link.fail(f"malformed frame of type {kind}")

    def link_closed(self, link: Link, reason: str) -> None:
        """What was it for, and what takes its place?"""
        if self._unproven.pop(link, None) is not None:
            self.counters["handshake_failed"] += 1
            log.debug("an incoming stream failed: %s", reason)
            return
        host = self._links.pop(link, None)
        peer = self._peers.get(host) if host is not None else None
        if peer is None:
            return
        if link is peer.standby:
            peer.standby = None
        elif link is peer.attempt:
            peer.attempt = None
            self._next_endpoint(peer, reason)
        elif link is peer.active:
            peer.active = peer.probe = None
            peer.full = False
            self.counters["lost"] += 1
            log.info("stream with %s lost: %s", peer.host_id.hex(), reason)
            self._call(self._on_lost, peer.host_id, reason)
            if peer.standby is not None and peer.active is None:
                self._welcome(peer, peer.standby)

    def link_drained(self, link: Link) -> None:
        """Tell the daemon, if it was refused before."""
        host = self._links.get(link)
        peer = self._peers.get(host) if host is not None else None
        if peer is not None and peer.active is link and peer.full:
            peer.full = False
            self._call(self._on_drain, peer.host_id)

    # --- the one stream of a pair ---

    def _welcome(self, peer: _Peer, link: Link) -> None:
        """Take a link that the other host began."""
        if peer.attempt is not None:
            self._discard(peer.attempt)
            peer.attempt = None
        peer.standby = None
        link.send(Frame.WELCOME)
        if link.phase is Phase.READY:
            self._opened(peer, link)

    def _opened(self, peer: _Peer, link: Link) -> None:
        if link.timer is not None:
            link.timer.cancel()
        if peer.retry is not None:
            peer.retry.cancel()
            peer.retry = None
        if peer.standby is not None:
            self._discard(peer.standby)
            peer.standby = None
        peer.active = link
        peer.failures, peer.retry_at, peer.probe = 0, 0.0, None
        self.counters["opened"] += 1
        self._call(self._on_open, peer.host_id)

    def _discard(self, link: Link) -> None:
        self._links.pop(link, None)
        link.close()

    def _drop_links(self, peer: _Peer, reason: str) -> None:
        """End all that there is with a host; its callers are told once."""
        waited = peer.active is not None or peer.attempt is not None or peer.retry is not None
        if peer.retry is not None:
            peer.retry.cancel()
        for link in (peer.active, peer.attempt, peer.standby):
            if link is not None:
                self._discard(link)
        peer.active = peer.attempt = peer.standby = peer.retry = peer.probe = None
        if waited:
            self._call(self._on_lost, peer.host_id, reason)

    def _ping(self, peer: _Peer, link: Link) -> int:
        peer.pings = (peer.pings + 1) & 0xFFFFFFFF
        peer.pinged_at = self._loop.time()
        link.send(Frame.PING, [memoryview(peer.pings.to_bytes(4, "big"))])
        return peer.pings

    def _probe_over(self, peer: _Peer, active: Link, standby: Link) -> None:
        if peer.probe is not None and peer.active is active and peer.standby is standby:
            active.fail("it began a new stream and does not answer on the old one")

    def _tick(self) -> None:
        """Ask the silent, give up the dead."""
        now = self._loop.time()
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        stalled = now - self._ticked_at > 3 * self._tick_s  # it was us who were silent: ask first
        self._ticked_at = now
        for peer in list(self._peers.values()):
            link = peer.active
            if link is None:
                continue
            silent_s = now - link.last_heard
            if silent_s > self._settings.dead_after_s and not stalled:
                link.fail(f"silent for {silent_s:.1f} s")
            elif min(silent_s, now - peer.pinged_at) > self._settings.ping_interval_s:
                self._ping(peer, link)

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        if self._closed:
            return
        try:
            callback(*arguments)
        except Exception as error:  # the loop and the stream go on, whatever a message does
            self._loop.call_exception_handler({"message": f"error in {callback!r}", "exception": error})
