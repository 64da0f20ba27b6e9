# SPDX-License-Identifier: MIT
"""Streams over loopback: pools that know each other, and all who should not get in. All real but the Wire."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockmi.addresses import Endpoint
from sockmi.transport.group import Member
from sockmi.transport.identity import HostId, Identity
from sockmi.transport.link import Link, Phase
from sockmi.transport.stream import QueueFull, StreamError, StreamPool, StreamSettings

LOOPBACK = Endpoint(ip_address("127.0.0.1"), 0)
QUICK = StreamSettings(
    open_timeout_s=1.0, ping_interval_s=0.1, dead_after_s=0.5, probe_timeout_s=0.3, backoff_max_s=0.3
)


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Poll; fail with the condition's place."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition.__code__}"
        await asyncio.sleep(0.005)


class Host:
    """A pool with what it was told."""

    def __init__(
        self, directory: Path, settings: StreamSettings = QUICK, listen: Endpoint = LOOPBACK
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.identity = Identity.load_or_create(directory)
        self.settings = settings
        self.events: list[tuple[str, HostId]] = []
        self.reasons: list[str] = []
        self.messages: list[tuple[HostId, bytes]] = []
        self.errors: list[dict[str, object]] = []
        self.start(listen)

    @property
    def id(self) -> HostId:
        return self.identity.host_id

    def start(self, listen: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _unused, context: self.errors.append(context))
        self.pool = StreamPool(
            loop,
            self.identity,
            self.settings,
            on_message=lambda host, payload: self.messages.append((host, bytes(payload))),
            on_open=lambda host: self.events.append(("open", host)),
            on_lost=self._lost,
            on_drain=lambda host: self.events.append(("drain", host)),
        )
        (self.endpoint,) = self.pool.listen([listen])

    def _lost(self, host: HostId, reason: str) -> None:
        self.events.append(("lost", host))
        self.reasons.append(reason)

    def member(self, endpoint: Endpoint | None = None) -> Member:
        one = self.identity
        where = (endpoint or self.endpoint,)
        return Member(
            one.host_id, "test", ("127.0.0.1", 1), where, one.certificate, one.fingerprint, (), (), 0.0
        )

    def knows(self, *others: Host) -> None:
        for other in others:
            assert self.pool.update(other.member())


async def until_counted(host: Host, name: str, count: int) -> None:
    await until(lambda: host.pool.counters[name] == count)


async def until_lost(host: Host, count: int) -> None:
    await until(lambda: len(host.reasons) == count)


async def until_heard(host: Host, message: bytes) -> None:
    await until(lambda: bool(host.messages) and host.messages[-1][1] == message)


@asynccontextmanager
async def pair(tmp_path: Path, settings: StreamSettings = QUICK) -> AsyncIterator[tuple[Host, Host]]:
    """Two hosts that know each other; the first has the lower id."""
    low, high = sorted(
        (Host(tmp_path / "1", settings), Host(tmp_path / "2", settings)), key=lambda one: one.id
    )
    low.knows(high)
    high.knows(low)
    try:
        yield low, high
    finally:
        low.pool.close()
        high.pool.close()
        assert not low.errors and not high.errors


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Bounded in time."""

    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


def test_open_send_both_ways_and_sizes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            assert not low.pool.send(high.id, b"nobody there")
            assert not low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            assert low.pool.open(high.id)
            sizes = [0, 1, 16379, 16380, 16384, 16385, 40000, 3_000_000, 5, 100_000]
            sent = [os.urandom(size) for size in sizes]
            for message in sent:
                assert low.pool.send(high.id, message)
                third = len(message) // 3
                assert high.pool.send(low.id, [message[:third], b"", bytearray(message[third:])])
            await until(lambda: len(low.messages) == len(high.messages) == len(sizes))
            assert [message for _unused, message in high.messages] == sent
            assert low.messages == [(high.id, message) for message in sent]
            assert low.pool.hosts() == [high.id] and low.pool.queued_bytes(high.id) == 0
        assert low.events == [("open", high.id)] and high.events == [("open", low.id)]

    run(scenario)


def test_what_another_message_follows_is_written_with_it(tmp_path: Path) -> None:
    """In order; and if nothing follows, soon."""

    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            for message in (b"one", b"two"):
                assert low.pool.send(high.id, message, more=True)
                assert low.pool.queued_bytes(high.id)
            assert low.pool.send(high.id, b"three")
            assert not low.pool.queued_bytes(high.id)
            await until(lambda: len(high.messages) == 3)
            low.pool.send(high.id, b"four", more=True)
            await until(lambda: len(high.messages) == 4)
            assert [message for _unused, message in high.messages] == [b"one", b"two", b"three", b"four"]

    run(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_simultaneous_connects_become_one(tmp_path: Path, seed: int) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            rng = random.Random(seed)  # noqa: S311
            for turn in range(15):
                for one, other in rng.sample([(low, high), (high, low)], 2):
                    one.pool.open(other.id)
                    if rng.random() < 0.5:
                        await asyncio.sleep(rng.random() * 0.004)
                await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
                for one, other in ((low, high), (high, low)):
                    assert one.pool.send(other.id, b"turn %d" % turn)
                want = b"turn %d" % turn
                for one in (low, high):
                    await until_heard(one, want)
                assert len(low.pool._links) == len(high.pool._links) == 1
                (link,) = low.pool._links
                link.fail("the test breaks it")
                await until(lambda: not high.pool.is_open(low.id))
            for one in (low, high):
                kinds = [kind for kind, _unused in one.events]
                assert kinds == ["open", "lost"] * 15, kinds

    run(scenario)


def test_one_sided_reachability_still_gives_a_stream(tmp_path: Path) -> None:
    """The host with the lower id cannot reach the other; the other's own connection serves."""

    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            stuck = socket.create_server(("127.0.0.1", 0), backlog=0)
            fill = [socket.socket() for _turn in range(4)]
            for one in fill:  # a full backlog: SYNs are dropped
                one.setblocking(False)
                one.connect_ex(stuck.getsockname())
            port = stuck.getsockname()[1]
            low.pool.update(high.member(Endpoint(LOOPBACK.address, port)))
            low.pool.open(high.id)
            high.pool.open(low.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            assert high.pool.send(low.id, b"through")
            await until(lambda: low.messages)
            for one in [stuck, *fill]:
                one.close()

    run(scenario)


def test_unreachable_backs_off_and_the_next_address_is_tried(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                nothing = Endpoint(LOOPBACK.address, closed.getsockname()[1])
                low.pool.update(high.member(nothing))
                started = time.monotonic()
                for turn in range(1, 5):
                    assert not low.pool.open(high.id)
                    await until_lost(low, turn)
                assert time.monotonic() - started > 0.025 + 0.05 + 0.1  # half of each backoff at least
                assert "refused" in low.reasons[0]
                member = high.member()
                member.endpoints = (nothing, high.endpoint)
                low.pool.open(high.id)
                low.pool.update(member)  # news from the host end the wait
                await until(lambda: low.pool.is_open(high.id))

    run(scenario)


def test_unknown_host(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, _high):
            assert not low.pool.open(bytes(16))
            await until(lambda: low.events)
            assert low.events == [("lost", bytes(16))] and low.reasons == ["not a member of the group"]
            assert not low.pool.send(bytes(16), b"x")

    run(scenario)


def test_restarted_host_replaces_its_stream_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            low.pool.close()
            low.start(low.endpoint)
            low.knows(high)
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.events[-1:] == [("open", low.id)])
            assert [kind for kind, _unused in high.events] == ["open", "lost", "open"]
            low.pool.send(high.id, b"again")
            await until(lambda: high.messages)

    run(scenario)


def test_a_second_stream_of_a_living_one_is_refused_and_of_a_dead_one_taken(tmp_path: Path) -> None:
    """A host with a stream that does not answer, because it forgot it, gets its new stream."""

    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            twin = Host.__new__(Host)  # the same identity, another pool: as after a restart without a FIN
            twin.__dict__.update(low.__dict__)
            twin.events, twin.reasons, twin.messages, twin.errors = [], [], [], []
            twin.start(LOOPBACK)
            twin.knows(high)
            twin.pool.open(high.id)
            await until(lambda: twin.reasons)
            assert high.pool.is_open(low.id) and low.pool.is_open(high.id)  # the old one has answered
            (old,) = low.pool._links
            asyncio.get_running_loop().remove_reader(old._fd)  # deaf, but the kernel acknowledges
            twin.pool.open(high.id)
            await until(lambda: twin.pool.is_open(high.id))
            assert [kind for kind, _unused in high.events] == ["open", "lost", "open"]
            twin.pool.close()

    run(scenario)


def test_silent_host_is_given_up_within_the_limit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            await asyncio.sleep(QUICK.dead_after_s * 1.5)
            assert low.pool.is_open(high.id)  # idle is not dead: they ask each other
            (link,) = high.pool._links
            asyncio.get_running_loop().remove_reader(link._fd)
            high.pool._timer.cancel()  # it hangs
            started = time.monotonic()
            await until(lambda: low.reasons)
            assert 0.3 < time.monotonic() - started < 3
            assert "silent" in low.reasons[0]

    run(scenario)


def test_back_pressure_and_drain(tmp_path: Path) -> None:
    async def scenario() -> None:
        limit = StreamSettings(frame_bytes_max=1 << 20, queue_bytes_max=8 << 20)
        async with pair(tmp_path, limit) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            with pytest.raises(ValueError, match="more than"):
                low.pool.send(high.id, bytes((1 << 20) + 1))
            payload, sent = os.urandom(1 << 20), 0
            with pytest.raises(QueueFull):
                while sent < 100:
                    low.pool.send(high.id, payload)
                    sent += 1
            assert low.pool.queued_bytes(high.id) <= limit.queue_bytes_max
            await until(lambda: ("drain", high.id) in low.events)
            assert low.pool.send(high.id, b"goes on")
            await until(lambda: len(high.messages) == sent + 1)
            assert all(message == payload for _unused, message in high.messages[:-1])

    run(scenario)


def test_error_in_a_callback_does_not_stop_the_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            heard: list[bytes] = []

            def explode(_host: HostId, payload: memoryview) -> None:
                heard.append(bytes(payload))
                raise RuntimeError("in the protocol")

            high.pool._on_message = explode
            for number in range(10):
                low.pool.send(high.id, b"%d" % number)
            await until(lambda: len(heard) == 10)
            errors = low.errors + high.errors  # the loop has one handler, the last that was set
            assert len(errors) == 10
            low.errors.clear()
            high.errors.clear()

    run(scenario)


class TestMembership:
    def test_forgetting_ends_the_stream_and_the_trust(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
                high.pool.forget(low.id)
                assert high.reasons == ["no longer a member"]
                await until(lambda: low.reasons)
                for _turn in range(3):
                    low.pool.open(high.id)
                    lost = len(low.reasons)
                    await until_lost(low, lost + 1)
                assert not high.pool.hosts() and "open" not in [kind for kind, _unused in high.events[2:]]
                high.knows(low)
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id))

        run(scenario)

    def test_two_groups(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                assert low.pool.update(high.member(), "second")
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id))
                low.pool.forget(high.id, "second")
                assert low.pool.is_open(high.id)
                impostor = Host(tmp_path / "impostor").member()
                impostor.host_id = high.id
                assert not low.pool.update(impostor, "second")
                assert low.pool.counters["certificate_conflict"] == 1 and low.pool.is_open(high.id)
                low.pool.forget(high.id)
                assert not low.pool.is_open(high.id)

        run(scenario)

    def test_new_certificate_of_a_member(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id))
                other = Host(tmp_path / "other")
                other.knows(low)
                member = other.member()
                member.host_id = high.id
                assert low.pool.update(member)
                assert low.reasons == ["its certificate has changed"]
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id) and other.pool.is_open(low.id))
                other.pool.close()

        run(scenario)


class TestHostile:
    @pytest.mark.parametrize(
        "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x16\x03\x01\xff\xff" + bytes(70000)]
    )
    def test_garbage_to_the_port(self, tmp_path: Path, garbage: bytes) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                with socket.create_connection(("127.0.0.1", low.endpoint.port)) as attacker:
                    attacker.setblocking(False)
                    attacker.send(garbage)
                    await until(lambda: low.pool.counters["handshake_failed"] == 1)
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id))
                assert low.events == [("open", high.id)]

        run(scenario)

    def test_random_handshakes(self, tmp_path: Path) -> None:
        """Starts of a real ClientHello with changes: never more than a failed handshake."""

        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                outgoing = ssl.MemoryBIO()
                context = ssl.create_default_context()
                client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x")
                with pytest.raises(ssl.SSLWantReadError):
                    client.do_handshake()
                hello = outgoing.read()
                rng = random.Random(1)  # noqa: S311  # noqa: S311
                for turn in range(100):
                    mutated = bytearray(hello[: rng.randrange(1, len(hello) + 1)])
                    for _turn in range(rng.randrange(4)):
                        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
                    attacker = socket.create_connection(("127.0.0.1", low.endpoint.port))
                    attacker.sendall(bytes(mutated))
                    await asyncio.sleep(0)
                    attacker.close()
                    await until_counted(low, "handshake_failed", turn + 1)
                assert not low.pool._unproven
                high.pool.open(low.id)
                await until(lambda: low.pool.is_open(high.id))

        run(scenario)

    @pytest.mark.parametrize("announced", [False, True])
    def test_certificate_that_was_not_announced(self, tmp_path: Path, announced: bool) -> None:
        """A whole daemon with a good certificate of its own; and then the same, announced."""

        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                stranger = Host(tmp_path / "stranger")
                stranger.knows(low)
                if announced:
                    low.knows(stranger)
                stranger.pool.open(low.id)
                await until(lambda: stranger.events)
                assert stranger.events == [("open" if announced else "lost", low.id)]
                assert low.pool.counters["handshake_failed"] == (not announced)
                assert low.pool.hosts() == [stranger.id] * announced
                stranger.pool.close()
                assert not high.events

        run(scenario)

    def test_no_certificate_and_old_tls(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, _high):
                address = ("127.0.0.1", low.endpoint.port)

                def attack(version: ssl.TLSVersion) -> str:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                    context.minimum_version = context.maximum_version = version
                    try:
                        with context.wrap_socket(socket.create_connection(address, 5)) as client:
                            client.sendall(struct.pack("!IB", 0, 3))
                            return f"{len(client.recv(1))} bytes"
                    except OSError as error:  # an alert, or the reset that overtook it
                        return f"{type(error).__name__}: {error}"

                for turn, version in enumerate((ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2), 1):
                    answer = await asyncio.to_thread(attack, version)
                    assert "Error" in answer, answer
                    await until_counted(low, "handshake_failed", turn)

        run(scenario)

    def test_man_in_the_middle(self, tmp_path: Path) -> None:
        """Who answers at a member's address with another certificate, even a trusted member's, is refused."""

        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                middle = Host(tmp_path / "middle")
                middle.knows(low, high)
                low.pool.update(high.member(middle.endpoint))
                for turn in (1, 2):
                    low.pool.open(high.id)
                    await until_lost(low, turn)
                    assert "certificate" in low.reasons[-1]
                    low.knows(middle)  # the second time it is a member: its place is still not the other's
                    low.pool.update(high.member(middle.endpoint))
                assert not middle.messages and not low.pool.hosts()
                middle.pool.close()

        run(scenario)

    @pytest.mark.parametrize(
        ("frame", "reason"),
        [
            (struct.pack("!IB", 0xFFFFFFFF, 4), "frame of 4294967295 bytes"),
            (struct.pack("!IB", 0, 99), "malformed frame of type 99"),
            (struct.pack("!IB", 3, 1) + b"abc", "malformed frame of type 1"),
            (struct.pack("!IB", 0, 3), "malformed frame of type 3"),
        ],
    )
    def test_malformed_frames_of_a_member(self, tmp_path: Path, frame: bytes, reason: str) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                low.pool.open(high.id)
                await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
                (link,) = low.pool._links
                assert link._tls is not None
                link._tls.send(frame)
                await until(lambda: high.reasons)
                assert reason in high.reasons[0]

        run(scenario)

    def test_message_before_welcome(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                listener = socket.create_server(("127.0.0.1", 0))
                listener.setblocking(False)
                low.pool.update(high.member(Endpoint(LOOPBACK.address, listener.getsockname()[1])))

                def answer() -> None:
                    context = high.pool._context(ssl.PROTOCOL_TLS_SERVER, [low.member()])
                    listener.settimeout(5)
                    with context.wrap_socket(listener.accept()[0], server_side=True) as server:
                        server.sendall(struct.pack("!IB", 1, 4) + b"x")

                low.pool.open(high.id)
                await asyncio.gather(asyncio.to_thread(answer), until(lambda: low.reasons))
                assert low.reasons == ["a frame before the stream was open"] and not low.messages
                listener.close()

        run(scenario)

    def test_slow_and_many_strangers_keep_nobody_out(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, high):
                held = [
                    socket.create_connection(
                        ("127.0.0.1", low.endpoint.port), source_address=(f"127.0.0.{host}", 0)
                    )
                    for host in range(2, 12)
                    for _turn in range(8)
                ]
                await until(lambda: low.pool.counters["refused_unproven"] > 0)
                await until(lambda: len(low.pool._unproven) == QUICK.unproven_max // 2)
                high.pool.open(low.id)
                await until(lambda: high.pool.is_open(low.id))
                await until(
                    lambda: not low.pool._unproven, QUICK.open_timeout_s + 3
                )  # slow ones are sent away
                for one in held:
                    one.close()

        run(scenario)

    def test_one_address_gets_only_its_share(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            async with pair(tmp_path) as (low, _high):
                held = [socket.create_connection(("127.0.0.1", low.endpoint.port)) for _turn in range(40)]
                await until(lambda: low.pool.counters["refused_unproven"] == 24)
                assert len(low.pool._unproven) == QUICK.unproven_per_address_max
                for one in held:
                    one.close()

        run(scenario)


def test_port_taken_is_a_clear_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path) as (low, high):
            with pytest.raises(
                StreamError, match=r"cannot listen at 127\.0\.0\.1:\d+: Address already in use"
            ):
                low.pool.listen([high.endpoint])

    run(scenario)


def test_ipv6(tmp_path: Path) -> None:
    async def scenario() -> None:
        hosts = [Host(tmp_path / name, QUICK, Endpoint(ip_address("::1"), 0)) for name in "ab"]
        hosts[0].knows(hosts[1])
        hosts[1].knows(hosts[0])
        hosts[0].pool.open(hosts[1].id)
        await until(lambda: hosts[1].pool.is_open(hosts[0].id))
        for one in hosts:
            one.pool.close()

    run(scenario)


class Wire:
    """In the place of a TLS socket: what is read comes in pieces of given sizes."""

    def __init__(self, data: bytes, pieces: list[int]) -> None:
        self.data, self.pieces, self.at = data, pieces, 0

    def recv_into(self, into: memoryview) -> int:
        if self.at == len(self.data):
            raise ssl.SSLWantReadError
        size = min(self.pieces[self.at % len(self.pieces)], into.nbytes, len(self.data) - self.at)
        into[:size] = self.data[self.at : self.at + size]
        self.at += size
        return size

    def pending(self) -> int:
        return len(self.data) - self.at

    def close(self) -> None:
        pass


class Ear:
    """A link's owner that only listens."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes]] = []
        self.reason = ""

    def link_ready(self, link: Link) -> None:
        raise AssertionError

    def link_drained(self, link: Link) -> None:
        raise AssertionError

    def link_frame(self, link: Link, kind: int, payload: memoryview) -> None:
        self.frames.append((kind, bytes(payload)))

    def link_closed(self, link: Link, reason: str) -> None:
        self.reason = reason


def hear(data: bytes, pieces: list[int]) -> Ear:
    """What a link makes of bytes that come in pieces."""
    ear = Ear()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname()) as tcp,
        ):
            link = Link(
                loop,
                ear,
                tcp,
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
                server=False,
                frame_bytes_max=100_000,
                user_timeout_s=1.0,
            )
            link.phase, link._tls = Phase.READY, Wire(data, pieces)  # type: ignore[assignment]
            link._scratch = memoryview(bytearray(16389))
            while link.phase is Phase.READY and link._tls.pending():  # type: ignore[union-attr]
                link._read()
            link.close()

    asyncio.run(scenario())
    return ear


_PIECES = st.lists(st.integers(1, 20000), min_size=1, max_size=5)


@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.one_of(st.integers(0, 40), st.integers(0, 50000))), max_size=12
    ),
    _PIECES,
)
@settings(max_examples=60, deadline=None)
def test_frames_survive_any_cutting(frames: list[tuple[int, int]], pieces: list[int]) -> None:
    sent = [(kind, os.urandom(size)) for kind, size in frames]
    ear = hear(b"".join(struct.pack("!IB", len(data), kind) + data for kind, data in sent), pieces)
    assert ear.frames == sent and not ear.reason


@given(st.binary(max_size=3000), _PIECES)
@settings(max_examples=100, deadline=None)
def test_garbage_frames_are_bounded(garbage: bytes, pieces: list[int]) -> None:
    ear = hear(garbage, pieces)
    assert sum(len(payload) + 5 for _unused, payload in ear.frames) <= len(garbage)
    if len(garbage) >= 5 and int.from_bytes(garbage[:4], "big") > 100_000:
        assert "frame of" in ear.reason and not ear.frames


def test_large_messages_arrive_whole_in_linear_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        async with pair(tmp_path, StreamSettings()) as (low, high):
            low.pool.open(high.id)
            await until(lambda: low.pool.is_open(high.id) and high.pool.is_open(low.id))
            images = [os.urandom(1 << 20) for _turn in range(32)]
            started = time.perf_counter()
            low.pool.send(
                high.id, [part for image in images for part in (len(image).to_bytes(4, "big"), image)]
            )
            await until(lambda: high.messages, 30)
            took_s = time.perf_counter() - started
            whole = b"".join(len(image).to_bytes(4, "big") + image for image in images)
            assert hashlib.sha256(high.messages[0][1]).digest() == hashlib.sha256(whole).digest()
            with capsys.disabled():
                print(f"\n  32 MiB in one message, one process: {len(whole) / took_s / 1e6:.0f} MB/s")

    run(scenario)
