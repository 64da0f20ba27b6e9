# SPDX-License-Identifier: MIT
"""A held packet is kept and delivered: its sender does not have to repeat it."""

from __future__ import annotations

import select
import socket
import struct

import pytest

from lab.labs import Lab
from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.held import (
    BYTES_MAX,
    BYTES_PER_CONNECTION_MAX,
    PACKETS_PER_CONNECTION_MAX,
    RESTING_BYTES_MAX,
    RESTING_BYTES_PER_CONNECTION_MAX,
    HeldPackets,
)
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables


def retransmissions(sock: socket.socket) -> int:
    """``tcpi_total_retrans`` of TCP_INFO."""
    return int(struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 100)[0])


def connected(lab: Lab, version: int) -> tuple[socket.socket, socket.socket, FourTuple]:
    """A connection from the peer to a, and how a sees it."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with lab.host("a").socket(family) as listener:
        listener.bind((lab.host("a").address(version), 5020))
        listener.listen()
        client = lab.host("peer").socket(family)
        client.connect((lab.host("a").address(version), 5020))
        server, _unused = listener.accept()
    host, port = server.getpeername()[:2]
    tuple_ = FourTuple(
        Endpoint.parse(f"[{lab.host('a').address(version)}]:5020".replace("[1", "1").replace("]", ""))
        if version == 4
        else Endpoint.parse(f"[{lab.host('a').address(version)}]:5020"),
        Endpoint.parse(f"{host}:{port}" if version == 4 else f"[{host}]:{port}"),
    )
    return client, server, tuple_


@pytest.mark.parametrize("version", [4, 6])
def test_delivered_without_a_retransmission(lab: Lab, version: int) -> None:
    settings = Settings()

    def scenario() -> int:
        tables, held = Tables(settings), HeldPackets(settings.log_group, settings.inject_mark)
        tables.setup()
        client, server, connection = connected(lab, version)
        try:
            held.want([connection])
            tables.hold([connection], 5.0)
            client.sendall(b"held back")
            assert select.select([held], [], [], 2)[0], "nothing was logged"
            assert not select.select([server], [], [], 0)[0], "the hold let it through"
            tables.unhold([connection])
            packets = held.take([connection])
            assert len(packets[connection]) >= 1
            assert held.deliver(packets) == len(packets[connection])
            assert select.select([server], [], [], 2)[0]
            assert server.recv(100) == b"held back"
            assert held.take([connection]) == {}, "it is kept no longer"
            server.sendall(b"and an answer")
            assert client.recv(100) == b"and an answer"
            return retransmissions(client)
        finally:
            client.close()
            server.close()
            held.close()
            tables.teardown()
            tables.close()

    # A machine that stalls for 200 ms makes the peer repeat it after all; not three times in a row.
    assert 0 in (lab.host("a").python(scenario) for _turn in range(3))


def test_what_is_kept_is_bounded_and_only_what_is_wanted(lab: Lab) -> None:
    def scenario() -> None:
        held = HeldPackets(Settings().log_group, Settings().inject_mark)
        connection = FourTuple(Endpoint.parse("192.0.2.1:80"), Endpoint.parse("192.0.2.2:4000"))
        held.add(connection, [b"not wanted"])
        assert held.take([connection]) == {}
        held.want([connection])
        held.add(connection, [b"%d" % number for number in range(1000)])
        kept = held.take([connection])[connection]
        assert len(kept) == PACKETS_PER_CONNECTION_MAX
        assert kept[-1] == b"999"
        with pytest.raises(OSError, match="another daemon"):
            HeldPackets(Settings().log_group, Settings().inject_mark)
        held.close()

    lab.host("b").python(scenario)


def test_listed_connections_do_not_use_up_what_moves_needs(lab: Lab) -> None:
    """However many are listed and busy, one in a freeze keeps its packets."""

    def scenario() -> None:
        held = HeldPackets(Settings().log_group, Settings().inject_mark)
        local = Endpoint.parse("192.0.2.1:80")
        listed = [FourTuple(local, Endpoint.parse(f"192.0.2.2:{port}")) for port in range(1, 1001)]
        for one in listed:
            held.want([one])
            held.add(one, [bytes([n]) * 60_000 for n in range(3)])
            held.rest(one, None, lambda: None)
            held.add(one, [b"later" * 2_000, b"small"])
        kept = held.take(listed[:1])[listed[0]]
        assert [len(each) for each in kept] == [60_000, 5], "the earliest, and what else has room"
        moving = [FourTuple(local, Endpoint.parse(f"192.0.2.3:{port}")) for port in range(1, 41)]
        held.want(moving)
        for one in moving:
            held.add(one, [bytes([n]) * 60_000 for n in range(30)])
        found = held.take(moving)
        sizes = [sum(map(len, found[one])) for one in moving if one in found]
        assert all(size <= BYTES_PER_CONNECTION_MAX for size in sizes)
        assert sum(sizes) > BYTES_MAX - 60_000, "what is listed has given way"
        assert found[moving[0]][-1] == bytes([29]) * 60_000, "the latest"
        rest = held.take(listed)
        sizes = [sum(map(len, several)) for several in rest.values()]
        assert max(sizes, default=0) <= RESTING_BYTES_PER_CONNECTION_MAX
        assert sum(sizes) <= RESTING_BYTES_MAX
        # Nothing is counted that is not there: all of it can be used again.
        held.want(moving)
        for one in moving:
            held.add(one, [bytes([n]) * 60_000 for n in range(16)])
        assert (
            sum(len(each) for several in held.take(moving).values() for each in several) > BYTES_MAX - 60_000
        )
        held.close()

    lab.host("b").python(scenario)


def test_what_is_no_tcp_is_not_delivered(lab: Lab) -> None:
    def scenario() -> None:
        held = HeldPackets(Settings().log_group, Settings().inject_mark)
        connection = FourTuple(Endpoint.parse("10.77.1.11:80"), Endpoint.parse("10.77.1.10:4000"))
        for bad in (b"", b"\x45", bytes(60), b"\x45" + bytes(59), b"\x60" + bytes(80), b"\x4f" + bytes(30)):
            assert held.deliver({connection: [bad]}) == 0
        held.close()

    lab.host("a").python(scenario)
