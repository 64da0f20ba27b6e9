# SPDX-License-Identifier: MIT
"""What daemons send each other: the core's messages, packets that were held, ICMP errors."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sockmi.addresses import FourTuple
from sockmi.members import Members
from sockmi.protocol.actions import Ignored, Send
from sockmi.protocol.codec import decode, encode
from sockmi.protocol.events import Event, Received, SendFailed, StreamLost
from sockmi.protocol.fields import CodecError
from sockmi.protocol.messages import Channel
from sockmi.protocol.records import HostId, Route
from sockmi.redirect.base import Outbound
from sockmi.redirect.icmp import IcmpError

_log = logging.getLogger(__name__)

_FRAME_PROTOCOL = 0
_FRAME_ICMP = 1
_FRAME_HELD = 2


class Messenger:
    """Each thing that is sent stands beside what the other host does with it."""

    def __init__(
        self,
        members: Members,
        dispatch: Callable[[Event], None],
        *,
        route_of: Callable[[FourTuple], Route | None],
        held_arrived: Callable[[bytes], None],
        inject: Callable[[IcmpError], object],
    ) -> None:
        """``route_of``: where a connection has gone.

        ``held_arrived`` (ValueError: malformed) and ``inject``: what becomes here of packets and ICMP errors.
        """
        self._members = members
        self._dispatch = dispatch
        self._route_of = route_of
        self._held_arrived = held_arrived
        self._inject = inject

    # -- the core's messages

    def send(self, action: Send) -> None:
        """On a stream, or as a datagram to one host or to all."""
        try:
            encoded = encode(action.message)
        except CodecError as error:
            _log.error("a message cannot be sent: %s", error)
            if action.to is not None:
                self._dispatch(SendFailed(action.to, action.message, str(error)))
            return
        if action.channel is Channel.STREAM and action.to is not None:
            if not self._members.send_frame(action.to, _FRAME_PROTOCOL, encoded):
                self._dispatch(StreamLost(action.to, "no stream"))
        else:
            self._members.send_datagram(encoded, action.to)

    def datagram(self, source: HostId, content: bytes) -> None:
        """One has come."""
        self._received(source, content, Channel.DATAGRAM)

    def frame(self, source: HostId, kind: int, content: memoryview) -> None:
        """One has come on a stream."""
        if kind == _FRAME_PROTOCOL:
            self._received(source, content, Channel.STREAM)
        elif kind == _FRAME_HELD:
            self._received_held(source, bytes(content))
        elif kind == _FRAME_ICMP:
            self._received_icmp(source, bytes(content))
        else:
            _log.warning("%s sent a frame of unknown kind %d", self._members.name_of(source), kind)

    def _received(self, source: HostId, content: bytes | memoryview, channel: Channel) -> None:
        try:
            message = decode(content)
        except CodecError as error:
            _log.warning("%s sent a malformed message: %s", self._members.name_of(source), error)
            return
        self._dispatch(Received(source, message, channel))

    def ignored(self, action: Ignored) -> None:
        """The core has no use for a message."""
        name = type(action.message).__name__
        _log.debug("ignored %s of %s: %s", name, self._members.name_of(action.source), action.why)

    # -- packets that a hold has kept

    def send_held(self, importer: HostId, content: bytes) -> bool:
        """With the message that follows at once; False if there is no stream."""
        return self._members.send_frame(importer, _FRAME_HELD, content, more=True)

    def _received_held(self, source: HostId, content: bytes) -> None:
        try:
            self._held_arrived(content)
        except ValueError as error:
            _log.warning("%s sent malformed held packets: %s", self._members.name_of(source), error)

    # -- ICMP errors about connections that have left

    def send_icmp(self, away: Outbound, error: IcmpError) -> None:
        """To the host that has the connection now."""
        route = self._route_of(away.tuple)
        if route is not None:
            self._members.send_frame(route.holder, _FRAME_ICMP, error.to_bytes())

    def _received_icmp(self, source: HostId, content: bytes) -> None:
        try:
            error = IcmpError.from_bytes(content)
        except ValueError as malformed:
            _log.warning("%s sent a malformed ICMP error: %s", self._members.name_of(source), malformed)
            return
        self._inject(error)
