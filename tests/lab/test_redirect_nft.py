# SPDX-License-Identifier: MIT
"""The netlink batch: all or nothing, idempotent, on kernels with and without DESTROYSETELEM."""

from __future__ import annotations

import errno
import statistics
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from sockmi.addresses import Endpoint, FourTuple
from sockmi.redirect.base import Mode
from sockmi.redirect.nftset import INET, Batch, NftSet, NftSocket
from sockmi.redirect.settings import Settings, Tag
from sockmi.redirect.tables import Tables, key_of, tuple_of
from tests.lab.redirect_lab import Host, run, until

SET = NftSet(INET, "t", "plain", 40)
MAP = NftSet(INET, "t", "pairs", 4, 16)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    import os

    made = Host("x", f"smt-{os.getpid()}-rdnft-x")
    run("ip", "netns", "add", made.namespace)
    try:
        run("ip", "-n", made.namespace, "link", "set", "lo", "up")
        yield made
    finally:
        made.close()
        run("ip", "netns", "del", made.namespace)


@pytest.fixture(params=[True, False], ids=["destroy", "no-destroy"])
def nft(host: Host, request: pytest.FixtureRequest) -> Iterator[NftSocket]:
    host.nft(
        "-f",
        "-",
        text="""
        table inet t {
            set plain { type ipv6_addr . inet_service . ipv6_addr . inet_service; flags timeout; }
            map pairs { type ipv4_addr : ipv6_addr; flags timeout; }
        }""",
    )
    with host.inside():
        made = NftSocket(use_destroy=request.param)
    if request.param and not made.has_destroy:
        pytest.skip("this kernel has no NFT_MSG_DESTROYSETELEM (Linux < 6.3)")
    assert made.has_destroy is request.param
    yield made
    made.close()
    host.nft("delete", "table", "inet", "t")


def key(n: int) -> bytes:
    return n.to_bytes(4, "big")


def data(n: int) -> bytes:
    return n.to_bytes(16, "big")


def commit(nft: NftSocket, *ops: tuple[str, int] | tuple[str, int, int]) -> None:
    batch = Batch()
    for verb, k, *d in ops:
        if verb == "add":
            batch.add(MAP, [(key(k), data(d[0]))])
        else:
            batch.remove(MAP, [key(k)])
    nft.commit(batch)


def content(nft: NftSocket) -> dict[int, int]:
    return {int.from_bytes(k, "big"): int.from_bytes(d, "big") for k, d in nft.dump(MAP)}


def test_absent_removals_do_not_abort(nft: NftSocket) -> None:
    commit(nft, ("add", 1, 1), ("remove", 7), ("remove", 8), ("add", 2, 2), ("remove", 9), ("remove", 1))
    assert content(nft) == {2: 2}
    commit(nft, ("remove", 5), ("remove", 6))
    commit(nft, ("remove", 2), ("remove", 2))
    assert content(nft) == {}


def test_adding_twice_and_replacing(nft: NftSocket) -> None:
    commit(nft, ("add", 1, 10))
    commit(nft, ("add", 1, 10))
    commit(nft, ("remove", 1), ("add", 1, 11), ("remove", 2), ("add", 2, 20))
    assert content(nft) == {1: 11, 2: 20}
    assert nft.get(MAP, key(1)) == data(11) and nft.get(MAP, key(3)) is None


def test_other_data_is_refused_and_nothing_is_done(nft: NftSocket) -> None:
    commit(nft, ("add", 1, 10))
    with pytest.raises(OSError, match="set pairs of table t") as caught:
        commit(nft, ("add", 5, 5), ("add", 1, 99), ("add", 6, 6))
    assert caught.value.errno in (errno.EBUSY, errno.EEXIST)  # by kernel version
    assert content(nft) == {1: 10}


def test_missing_set_is_named(nft: NftSocket) -> None:
    batch = Batch()
    batch.add(NftSet(INET, "t", "absent", 4), [(key(1), b"")])
    with pytest.raises(OSError, match=r"set absent of table t: No such file.*run setup\(\) first"):
        nft.commit(batch)
    commit(nft, ("add", 1, 1))  # the socket is as good as before
    assert content(nft) == {1: 1}


def test_bad_set_index_and_sizes(nft: NftSocket) -> None:
    batch = Batch()
    batch.add(NftSet(INET, "t", "plain", 41), [(bytes(40), b"")])
    with pytest.raises(OSError, match="Invalid argument"):
        nft.commit(batch)


def test_timeouts(nft: NftSocket) -> None:
    batch = Batch()
    batch.put(MAP, [key(1)], [data(1)], timeout_ms=60_000)
    nft.commit(batch)
    batch = Batch()
    batch.put(MAP, [key(1), key(2)], [data(1), data(2)], timeout_ms=100)  # the later timeout holds
    nft.commit(batch)
    assert content(nft) == {1: 1, 2: 2}
    until(lambda: content(nft) == {}, "both are gone", 3)
    commit(nft, ("remove", 1), ("add", 2, 3))
    assert content(nft) == {2: 3}


def test_large_batch(nft: NftSocket) -> None:
    """Many messages of 64 KiB lists in one sendmsg, and half of the removals absent."""
    n = 20_000
    keys = [i.to_bytes(40, "big") for i in range(n)]
    batch = Batch()
    batch.remove(SET, keys[: n // 100])
    batch.add(SET, ((k, b"") for k in keys))
    nft.commit(batch)
    assert {k for k, _unused in nft.dump(SET)} == set(keys)
    batch = Batch()
    batch.remove(SET, keys[n // 2 :] + [i.to_bytes(40, "big") for i in range(n, n + 500)])
    nft.commit(batch)
    assert {k for k, _unused in nft.dump(SET)} == set(keys[: n // 2])


def test_costs(nft: NftSocket, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what one transaction and one element cost; asserts nothing about time."""
    single = []
    for i in range(1000):
        batch = Batch()
        batch.add(MAP, [(key(i), data(i))])
        start = time.perf_counter()
        nft.commit(batch)
        single.append(time.perf_counter() - start)
    keys = [i.to_bytes(40, "big") for i in range(10_000)]
    start = time.perf_counter()
    batch = Batch()
    batch.add(SET, ((k, b"") for k in keys))
    nft.commit(batch)
    bulk = time.perf_counter() - start
    with capsys.disabled():
        print(
            f"\nnft batch, destroy={nft.has_destroy}: one element {statistics.median(single) * 1e6:.0f} us "
            f"(median), 10,000 in one transaction {bulk * 100:.1f} us each"
        )
    assert len(content(nft)) == 1000


@pytest.mark.parametrize("version", [4, 6])
def test_keys_round_trip(version: int) -> None:
    one, two = ("192.0.2.1", "198.51.100.7") if version == 4 else ("2001:db8::1", "2001:db8::7")
    t = FourTuple(Endpoint(ip_address(one), 80), Endpoint(ip_address(two), 65535))
    assert tuple_of(key_of(t)) == t


def test_setup_keeps_live_entries(host: Host) -> None:
    """Also holds with their remaining time, and the rules are there once however often setup runs."""
    with host.inside():
        tables = Tables(Settings(table="again"))
        tables.setup()
        t = FourTuple(Endpoint(ip_address("192.0.2.1"), 80), Endpoint(ip_address("192.0.2.2"), 81))
        tables.hold([t], 60)
        with tables.transaction() as batch:
            batch.put(tables.flows[4], [key_of(t)], [tables.moved(Mode.FORWARD)])
        rules = host.nft("-s", "list", "table", "inet", "again").count("\n")
        for _turn in range(3):
            tables.setup()
        assert host.nft("-s", "list", "table", "inet", "again").count("\n") == rules
        assert tables.held() == [t] and tables.read_flows() == {t: (Tag.MOVED, 1)}
        assert tables.flow(t) == (Tag.MOVED, 1)
        tables.teardown()
        tables.teardown()
        tables.close()
    assert "again" not in host.nft("list", "tables")


def test_listed_rules_can_be_loaded_again(host: Host) -> None:
    """`nft list ruleset > file; nft -f file` is what administrators do."""
    with host.inside():
        tables = Tables(Settings(table="saved"))
        tables.setup()
        text = host.nft("list", "ruleset")
        host.nft("-c", "-f", "-", text=text)
        tables.teardown()
        tables.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "with space"}, "letters, digits and _"),
        ({"table": ""}, "letters, digits and _"),
        ({"mark": 0x50C0}, "low 20 bits"),
        ({"mark": 0}, "low 20 bits"),
        ({"route_table": 254}, "the kernel's own"),
        ({"rule_priority": 0}, r"1\.\.32765"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)  # type: ignore[arg-type]
