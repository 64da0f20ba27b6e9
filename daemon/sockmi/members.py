# SPDX-License-Identifier: MIT
"""The other daemons: the groups that this host is in, and the streams to their members."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from pydantic import ValidationError

from sockmi import api
from sockmi.addresses import Endpoint, parse_address
from sockmi.config import Config, GroupConfig
from sockmi.ip_versions import families
from sockmi.joined_groups import JoinedGroups
from sockmi.problems import problems
from sockmi.protocol.codec import STREAM_BYTES_MAX
from sockmi.refusal import Code, Refusal
from sockmi.transport.group import Group, GroupError, GroupSettings, Member
from sockmi.transport.hello import Introduction
from sockmi.transport.identity import HostId, Identity
from sockmi.transport.keyring import KeyFileError, Keyring
from sockmi.transport.sockaddr import to_endpoint
from sockmi.transport.stream import QueueFull, StreamPool, StreamSettings

_log = logging.getLogger(__name__)

_REJOIN_AFTER_S = 10.0


@dataclass(slots=True)
class _Joined:
    config: GroupConfig
    group: Group
    keyring: Keyring


class Members:
    """Groups and streams under one roof: a host is a host, whichever group it was heard in."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        identity: Identity,
        host_name: str,
        *,
        on_datagram: Callable[[HostId, bytes], None],
        on_frame: Callable[[HostId, int, memoryview], None],
        on_opened: Callable[[HostId], None],
        on_lost: Callable[[HostId, str], None],
        on_count: Callable[[str, int], None],
        engine: str,
    ) -> None:
        self._loop = loop
        self._config = config
        self._identity = identity
        self._host_name = host_name
        self._on_datagram = on_datagram
        self._on_opened = on_opened
        self._on_count = on_count
        self._engine = engine
        self._joined: dict[str, _Joined] = {}
        self._kept = JoinedGroups(config.state_dir)
        self._absent: dict[str, GroupConfig] = {}  # joined once, and not possible now
        self._rejoin: asyncio.TimerHandle | None = None
        self._introduction: Introduction | None = None
        self._streams = StreamPool(
            loop,
            identity,
            StreamSettings(frame_bytes_max=STREAM_BYTES_MAX + 1),  # and the frame's kind
            on_message=lambda host, frame: on_frame(host, frame[0], frame[1:]),
            on_open=on_opened,
            on_lost=on_lost,
        )

    # -- life

    def start(self) -> None:
        """Listen for streams; join the configured groups, and those that were joined before."""
        stream = self._config.stream
        wildcards: dict[int, IPv4Address | IPv6Address] = {4: IPv4Address(0), 6: IPv6Address(0)}
        addresses = [stream.address] if stream.address else [wildcards[version] for version in families()]
        listening = self._streams.listen([Endpoint(address, stream.port) for address in addresses])
        self._introduction = Introduction(
            certificate=self._identity.certificate,
            stream_port=listening[0].port,
            host_name=self._host_name,
            addresses=(stream.address,) if stream.address else (),
            engines=(self._engine,),
            redirects=tuple(self._config.redirect.modes),
        )
        for group in self._config.groups:
            self._join(group)
        self._absent = {one.name: one for one in self._kept.read() if one.name not in self._joined}
        self._join_again()

    def close(self) -> None:
        """Say farewell, and close everything."""
        if self._rejoin is not None:
            self._rejoin.cancel()
        for joined in self._joined.values():
            joined.group.close()
        self._joined.clear()
        self._streams.close()

    def _join(self, config: GroupConfig) -> None:
        assert self._introduction is not None
        keyring = Keyring.load(config.key_file)
        name = config.name
        group = Group(
            self._loop,
            GroupSettings(
                port=config.port,
                multicast=None if config.members else config.address,
                members=tuple(_member_endpoint(one, config.port) for one in config.members),
                interface=config.interface,
                hops=config.hops,
                announce_interval_s=config.announce_interval_s,
            ),
            keyring,
            self._identity,
            self._introduction,
            on_message=lambda host, _unused, content: self._on_datagram(host, content),
            on_member=lambda member: self._came(name, member),
            on_leave=lambda member, reason: self._left(name, member),
        )
        try:
            group.start()
        except GroupError as error:
            same = [known for known, one in self._joined.items() if one.config.port == config.port]
            if same and isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
                raise GroupError(
                    f"group {name}: group {same[0]} of this host has port {config.port}; give it another port"
                ) from None
            raise
        self._joined[name] = _Joined(config, group, keyring)

    def _join_again(self) -> None:
        """What was joined before the restart; now and then, as its interface or key may still come."""
        for name, group in list(self._absent.items()):
            try:
                self._join(group)
            except (GroupError, KeyFileError) as error:
                if self._rejoin is None:
                    _log.warning(
                        "group %s, joined before the restart, not joined again: %s; "
                        "tried every %g s, until it is left",
                        name,
                        error,
                        _REJOIN_AFTER_S,
                    )
            else:
                del self._absent[name]
        self._rejoin = self._loop.call_later(_REJOIN_AFTER_S, self._join_again) if self._absent else None

    def _came(self, group: str, member: Member) -> None:
        self._streams.update(member, group)
        self._on_count(group, len(self._joined[group].group.members) if group in self._joined else 0)

    def _left(self, group: str, member: Member) -> None:
        self._streams.forget(member.host_id, group)
        self._on_count(group, len(self._joined[group].group.members) if group in self._joined else 0)

    # -- messages

    def send_datagram(self, content: bytes, to: HostId | None) -> None:
        """Best effort; to every group if ``to`` is None."""
        for joined in self._joined.values():
            if to is None or to in joined.group.members:
                joined.group.send(content, to)
                if to is not None:
                    return

    def send_frame(self, to: HostId, kind: int, content: bytes, *, more: bool = False) -> bool:
        """Send on the open stream, ``more``: with the frame that follows at once; False if there is none."""
        try:
            return self._streams.send(to, [bytes([kind]), content], more=more)
        except (QueueFull, ValueError) as error:
            _log.warning("to %s: %s", self.name_of(to), error)
            return False

    def open(self, host: HostId) -> None:
        """Have a stream; ``on_opened`` or ``on_lost`` follows."""
        if self._streams.open(host):
            self._loop.call_soon(self._on_opened, host)

    def open_early(self, host: HostId) -> None:
        """The same, as far as it can be had, for what asks for it later."""
        self._streams.open(host)

    # -- who is there

    def member(self, host: HostId) -> Member | None:
        """A member of any group."""
        for joined in self._joined.values():
            if (member := joined.group.members.get(host)) is not None:
                return member
        return None

    def addresses_of(self, host: HostId) -> Collection[IPv4Address | IPv6Address]:
        """Those of its streams, and the one by which it is heard; none of a host that is no member."""
        member = self.member(host)
        return _addresses_of(member) if member is not None else ()

    def count(self) -> int:
        """How many other hosts are heard."""
        return len({host for joined in self._joined.values() for host in joined.group.members})

    def refused_lately(self, reason: str) -> list[tuple[str, str]]:
        """Groups, each with the address, from which datagrams come that are refused for ``reason``."""
        found = [(name, joined.group.refused_lately(reason)) for name, joined in self._joined.items()]
        return [(name, str(to_endpoint(source).address)) for name, source in found if source]

    def not_connected(self) -> dict[str, tuple[Endpoint, ...]]:
        """The names of members to which there is no stream now, and where theirs should answer."""
        return {
            member.host_name or host.hex(): member.endpoints
            for joined in self._joined.values()
            for host, member in joined.group.members.items()
            if not self._streams.is_open(host)
        }

    def hosts(self) -> frozenset[HostId]:
        """The other hosts that are heard."""
        return frozenset(host for joined in self._joined.values() for host in joined.group.members)

    def name_of(self, host: HostId) -> str:
        """A host's name, or its id if it is not (or no longer) a member."""
        if host == self._identity.host_id:
            return self._host_name
        member = self.member(host)
        return (member.host_name if member else "") or host.hex()

    def target(self, text: str | None) -> tuple[HostId | None, IPv4Address | IPv6Address | None]:
        """What an operator means by a name, an id or an address; raises Refusal if nobody is meant."""
        if text is None:
            return None, None
        known = {host: one for joined in self._joined.values() for host, one in joined.group.members.items()}
        try:
            address = parse_address(text)
        except ValueError:
            address = None
        for host, member in known.items():
            if text in (member.host_name, host.hex()) or address in _addresses_of(member):
                return host, None
        if address is not None:
            return None, address
        if text in (self._host_name, self._identity.host_id.hex()):
            raise Refusal(Code.NO_SUCH_HOST, f"{text} is this host itself; name another one.")
        names = ", ".join(sorted(member.host_name for member in known.values())) or "nobody"
        raise Refusal(Code.NO_SUCH_HOST, f"No member of the group is called {text!r}; heard: {names}.")

    # -- groups, for operators

    def rekey(self) -> None:
        """Read the key files again; raises KeyFileError, and then nothing has changed."""
        new = {name: Keyring.load(joined.config.key_file) for name, joined in self._joined.items()}
        for name, keyring in new.items():
            if keyring != self._joined[name].keyring:
                self._joined[name].keyring = keyring
                self._joined[name].group.rekey(keyring)

    def keyrings(self) -> dict[str, Keyring]:
        """The keys of each group."""
        return {name: joined.keyring for name, joined in self._joined.items()}

    def names(self) -> list[str]:
        """The groups that this host is in."""
        return list(self._joined)

    def change(self, request: api.GroupsRequest) -> bool:
        """Join or leave; True if there was something to do."""
        assert request.name is not None
        if request.action is api.GroupsAction.LEAVE:
            return self._leave(request.name, force=request.force)
        known = self._joined.get(request.name)
        wanted = _group_config(request)
        if known is not None:
            if known.config == wanted:
                return False
            raise Refusal(
                Code.BAD_REQUEST,
                f"Group {request.name!r} has other settings; leave it first, then join again.",
            )
        try:
            self._join(wanted)
        except (GroupError, KeyFileError) as error:
            raise Refusal(Code.BAD_REQUEST, f"Not joined: {error}") from None
        before = self._absent.pop(wanted.name, None)
        try:
            self._keep()
        except OSError as error:
            self._drop(wanted.name)
            if before is not None:
                self._absent[wanted.name] = before
            raise Refusal(
                Code.INTERNAL, f"Not joined: it could not be kept for the next start ({error})."
            ) from None
        return True

    def _leave(self, name: str, *, force: bool) -> bool:
        if name not in self._joined and name not in self._absent:
            return False
        if not force and name in self._configured:
            raise Refusal(
                Code.BAD_REQUEST,
                f"Group {name!r} stands in the configuration, and is back with the daemon's next start: "
                "take it out there and restart the daemon, or leave it until then by force.",
            )
        try:
            self._keep(without=name)
        except OSError as error:
            raise Refusal(
                Code.INTERNAL, f"Not left: it would be joined again at the next start ({error})."
            ) from None
        self._absent.pop(name, None)
        if name in self._joined:
            self._drop(name)
        return True

    def _drop(self, name: str) -> None:
        """The inverse of ``_join``."""
        group = self._joined[name].group
        group.close()
        for member in list(group.members.values()):
            self._streams.forget(member.host_id, name)
        del self._joined[name]

    def _keep(self, without: str | None = None) -> None:
        """For the next start: what is not configured. Raises OSError."""
        joined = {name: one.config for name, one in self._joined.items() if name not in self._configured}
        self._kept.keep(one for name, one in (self._absent | joined).items() if name != without)

    @property
    def _configured(self) -> set[str]:
        """Names of the groups that come back as configured, whatever was joined under them meanwhile."""
        return {group.name for group in self._config.groups}

    def rows(self) -> list[api.GroupRow]:
        """The groups and their members."""
        now = self._loop.time()
        return [
            api.GroupRow(
                name=name,
                address=None if joined.config.members else str(joined.config.address),
                port=joined.config.port,
                interface=joined.config.interface,
                peers=[str(_member_endpoint(one, joined.config.port)) for one in joined.config.members],
                configured=name in self._configured,
                members=[
                    api.Member(
                        host=member.host_name or member.host_id.hex(),
                        host_id=member.host_id.hex(),
                        address=str(to_endpoint(member.address)),
                        last_heard_s=max(0.0, now - member.last_heard),
                        connected=self._streams.is_open(member.host_id),
                    )
                    for member in joined.group.members.values()
                ],
            )
            for name, joined in self._joined.items()
        ]


def _addresses_of(member: Member) -> set[IPv4Address | IPv6Address]:
    return {one.address for one in member.endpoints} | {to_endpoint(member.address).address}


def _member_endpoint(text: str, port: int) -> Endpoint:
    """``ADDRESS`` or ``ADDRESS:PORT``."""
    try:
        return Endpoint(ip_address(text), port)
    except ValueError:
        return Endpoint.parse(text)


def _group_config(request: api.GroupsRequest) -> GroupConfig:
    assert request.name is not None and request.key_file is not None
    values: dict[str, object] = {"name": request.name, "key_file": Path(request.key_file)}
    values |= {"address": request.address} if request.address else {}
    values |= {"port": request.port} if request.port else {}
    values |= {"interface": request.interface} if request.interface else {}
    values |= {"members": tuple(request.peers)} if request.peers else {}
    try:
        return GroupConfig.model_validate(values)
    except ValidationError as error:
        raise Refusal(Code.BAD_REQUEST, f"Not a group: {'; '.join(problems(error))}.") from None
