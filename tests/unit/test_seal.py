# SPDX-License-Identifier: MIT
"""Sealed datagrams, key files, identities and introductions: what must pass, and all that must not."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockmi.transport import keyring as keyrings
from sockmi.transport.hello import Introduction
from sockmi.transport.identity import Identity, IdentityError, check_certificate, fingerprint_of
from sockmi.transport.keyring import KeyFileError, Keyring
from sockmi.transport.seal import (
    DATAGRAM_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    WINDOW_SEQUENCES,
    Limits,
    Received,
    Seal,
)

KEY, OTHER_KEY = bytes(range(32)), bytes(range(32, 64))
ALICE, BOB, CAROL = (bytes([number]) * 16 for number in (1, 2, 3))
GROUP = b"239.77.83.1:7780"


def host(name: bytes, *keys: bytes, group: bytes = GROUP) -> Seal:
    return Seal(Keyring(keys or (KEY,)), name, group, b"I am " + name[:1].hex().encode())


def deliver(datagram: bytes, to: Seal, back: Seal, now: float = 0.0) -> list[Received]:
    """Give a datagram and every answer to it to whom it concerns; what each meant, in order."""
    meant: list[Received] = []
    for _turn in range(10):
        received = to.receive(datagram, "anywhere", now)
        if received is None:
            return meant
        meant.append(received)
        if received.reply is None:
            return meant
        datagram, to, back = received.reply, back, to
    raise AssertionError("the hosts talk for ever")


def acquainted(now: float = 0.0) -> tuple[Seal, Seal]:
    alice, bob = host(ALICE), host(BOB)
    deliver(alice.hello(), bob, alice, now)
    return alice, bob


def test_an_announcement_makes_both_known() -> None:
    alice, bob = host(ALICE), host(BOB)
    meant = deliver(alice.hello(), bob, alice)
    assert [(each.sender, each.introduction, each.new_session) for each in meant] == [
        (ALICE, None, False),  # bob asks
        (BOB, None, False),  # alice brings the nonce back, and asks
        (ALICE, b"I am 01", True),
        (BOB, b"I am 02", True),
    ]
    for sender, receiver, to in ((alice, bob, BOB), (bob, alice, ALICE), (alice, bob, None)):
        received = receiver.receive(sender.message(b"text", to), "x", 0.0)
        assert received is not None
        assert (received.sender, received.message, received.reply) == (sender.host_id, b"text", None)


def test_a_message_before_the_proof_is_only_answered() -> None:
    alice, bob = host(ALICE), host(BOB)
    first, second, third, fourth = deliver(alice.message(b"too early", None), bob, alice)
    assert all(each.message is None for each in (first, second, third, fourth))
    assert third.new_session and fourth.new_session


@given(st.binary(max_size=MESSAGE_BYTES_MAX))
@settings(max_examples=50, deadline=None)
def test_any_message_arrives(message: bytes) -> None:
    alice, bob = acquainted()
    datagram = alice.message(message, BOB)
    assert len(datagram) <= DATAGRAM_BYTES_MAX
    received = bob.receive(datagram, "x", 0.0)
    assert received is not None and received.message == message


def test_too_large_messages_are_refused_by_the_sender() -> None:
    alice, _unused = acquainted()
    assert len(alice.message(bytes(MESSAGE_BYTES_MAX), None)) == DATAGRAM_BYTES_MAX
    with pytest.raises(ValueError, match=f"more than {MESSAGE_BYTES_MAX}"):
        alice.message(bytes(MESSAGE_BYTES_MAX + 1), None)


def test_every_flipped_bit_and_every_truncation_is_refused() -> None:
    alice, bob = acquainted()
    datagram = alice.message(b"text", BOB)
    for bit in range(len(datagram) * 8):
        forged = bytearray(datagram)
        forged[bit // 8] ^= 1 << bit % 8
        assert bob.receive(bytes(forged), f"source {bit}", 0.0) is None
    for size in range(len(datagram)):
        assert bob.receive(datagram[:size], f"source {size}", 0.0) is None
    assert bob.counters["messages"] == 0
    received = bob.receive(datagram, "x", 0.0)
    assert received is not None and received.message == b"text"


def test_oversized_datagrams_are_refused_before_anything_is_parsed() -> None:
    alice, bob = acquainted()
    assert bob.receive(alice.message(b"", BOB) + bytes(DATAGRAM_BYTES_MAX), "x", 0.0) is None
    assert bob.counters == {**bob.counters, "size": 1}


@given(st.binary(max_size=DATAGRAM_BYTES_MAX + 100))
@settings(max_examples=300, deadline=None)
def test_garbage_is_dropped(garbage: bytes) -> None:
    bob = host(BOB)
    assert bob.receive(garbage, "x", 0.0) is None
    template = host(ALICE).message(b"", None)
    assert bob.receive(template[:41] + garbage, "x", 0.0) is None


@given(st.integers(0, 3), st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_malformed_content_of_key_holders_is_dropped(kind: int, payload: bytes) -> None:
    """Kinds and payloads that no daemon of ours sends, before and after the proof."""
    for alice, bob in ((host(ALICE), host(BOB)), acquainted()):
        received = bob.receive(alice._seal(kind + 2, payload, BOB), "x", 0.0)  # type: ignore[arg-type]
        assert received is None or (received.message is None and not received.new_session)


def test_wrong_key_and_wrong_group() -> None:
    bob = host(BOB)
    assert bob.receive(host(ALICE, OTHER_KEY).hello(), "x", 0.0) is None
    assert bob.counters["unknown_key"] == 1
    assert bob.receive(host(ALICE, group=b"239.77.83.2:7780").hello(), "x", 0.0) is None
    assert bob.counters["forged"] == 1


class TestReplay:
    def test_same_session(self) -> None:
        alice, bob = acquainted()
        datagrams = [alice.message(b"%d" % number, BOB) for number in range(50)]
        for datagram in datagrams[::-1]:  # overtaking is no replay
            assert bob.receive(datagram, "x", 0.0) is not None
        for datagram in datagrams:
            assert bob.receive(datagram, "x", 0.0) is None
        assert bob.counters["replayed"] == 50

    def test_what_fell_out_of_the_window(self) -> None:
        alice, bob = acquainted()
        late = [alice.message(b"", BOB) for _turn in range(2)]
        for _turn in range(WINDOW_SEQUENCES - 2):
            alice.message(b"", BOB)
        assert bob.receive(alice.message(b"", BOB), "x", 0.0) is not None
        assert bob.receive(late[0], "x", 0.0) is None
        assert bob.receive(late[1], "x", 0.0) is not None

    @given(st.lists(st.integers(1, 3 * WINDOW_SEQUENCES), max_size=300))
    @settings(max_examples=30, deadline=None)
    def test_no_number_passes_twice(self, numbers: list[int]) -> None:
        alice, bob = acquainted()
        base = alice._sequence
        passed: list[int] = []
        for number in numbers:
            alice._sequence = base + number - 1
            if bob.receive(alice.message(b"", BOB), "x", 0.0):
                passed.append(number)
        assert len(set(passed)) == len(passed)
        top, fresh = 0, []
        for number in numbers:
            if number > top - WINDOW_SEQUENCES and number not in fresh:
                fresh.append(number)
            top = max(top, number)
        assert passed == fresh

    def test_recording_to_a_restarted_receiver(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        recording = [alice.hello()]
        to_bob = recording[0]
        while True:  # record the whole acquaintance, the proof included
            asked = bob.receive(to_bob, "x", 0.0)
            if asked is None or asked.reply is None:
                break
            answer = alice.receive(asked.reply, "x", 0.0)
            if answer is None or answer.reply is None:
                break
            to_bob = answer.reply
            recording.append(to_bob)
        recording += [alice.message(b"move it", None), alice.message(b"move it", BOB), alice.leave()]
        assert bob.receive(recording[-2], "x", 0.0) is not None
        bob = host(BOB)
        for datagram in recording * 3:
            received = bob.receive(datagram, "x", 1.0)
            assert received is None or (received.message, received.new_session) == (None, False)
        assert bob.counters["sessions"] == bob.counters["messages"] == 0

    def test_recording_of_the_sender_before_its_restart(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        asked = bob.receive(alice.hello(), "x", 0.0)
        assert asked and asked.reply
        answered = alice.receive(asked.reply, "x", 0.0)
        assert answered and answered.reply
        proof = answered.reply
        assert bob.receive(proof, "x", 0.0)
        recording = [proof, alice.message(b"old", None)]
        restarted = host(ALICE)
        deliver(restarted.hello(), bob, restarted, 0.1)
        for datagram in recording * 3:  # within the nonce's slot, too
            received = bob.receive(datagram, "x", 0.2)
            assert received is None or (received.message, received.new_session) == (None, False)
        received = bob.receive(restarted.message(b"new", None), "x", 0.3)
        assert received is not None and received.message == b"new"

    def test_recording_after_the_member_was_forgotten(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        asked = bob.receive(alice.hello(), "x", 0.0)
        answered = alice.receive(asked.reply, "x", 0.0)  # type: ignore[union-attr, arg-type]
        proof = answered.reply  # type: ignore[union-attr]
        assert proof and bob.receive(proof, "x", 0.0)
        old = alice.message(b"old", BOB)
        assert bob.receive(old, "x", 0.0)
        bob.forget(ALICE)
        for datagram in (proof, old):
            received = bob.receive(datagram, "x", 0.1)
            assert received and not received.new_session and received.message is None
        deliver(alice.hello(), bob, alice, 0.2)
        assert bob.receive(old, "x", 0.3) is None
        received = bob.receive(alice.message(b"new", BOB), "x", 0.3)
        assert received and received.message == b"new"

    def test_a_proof_kept_back_grows_stale(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        asked = bob.receive(alice.hello(), "x", 0.0)
        answered = alice.receive(asked.reply, "x", 0.0)  # type: ignore[union-attr, arg-type]
        received = bob.receive(answered.reply, "x", 30.0)  # type: ignore[union-attr, arg-type]
        assert received and not received.new_session

    def test_reflected_to_its_sender(self) -> None:
        alice, bob = acquainted()
        for datagram in (alice.hello(), alice.message(b"", BOB), alice.message(b"", None)):
            assert alice.receive(datagram, "x", 0.0) is None
        assert alice.counters["own"] == 3
        assert alice.receive(host(ALICE).hello(), "x", 0.0) is None
        assert alice.counters["own_id_elsewhere"] == 1
        assert bob.counters["own"] == 0

    def test_diverted_to_another_member(self) -> None:
        alice, bob = acquainted()
        carol = host(CAROL)
        deliver(alice.hello(), carol, alice)
        assert carol.receive(alice.message(b"for bob", BOB), "x", 0.0) is None
        assert carol.counters["for_another"] == 1
        assert bob.counters["for_another"] == 0

    def test_challenge_of_another_process_start(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        asked = bob.receive(alice.hello(), "x", 0.0)
        restarted = host(ALICE)
        assert restarted.receive(asked.reply, "x", 0.0) is None  # type: ignore[union-attr, arg-type]
        assert restarted.counters["stale_challenge"] == 1


def test_key_rotation_without_a_gap() -> None:
    """New key accepted everywhere, then used, then the old one removed: no message is lost."""
    alice, bob = host(ALICE, KEY), host(BOB, KEY)
    deliver(alice.hello(), bob, alice)
    for keys in ((KEY, OTHER_KEY), (OTHER_KEY, KEY), (OTHER_KEY,)):
        for one, other in ((alice, bob), (bob, alice)):
            assert one.rekey(Keyring(keys)) == []
            for sender, receiver in ((one, other), (other, one)):
                received = receiver.receive(sender.message(b"x", None), "x", 0.0)
                assert received is not None and received.message == b"x", (keys, sender.host_id[:1])
            deliver(one.hello(), other, one)  # as Group.rekey announces
    assert alice.receive(host(CAROL, KEY).hello(), "x", 0.0) is None
    assert alice.counters["unknown_key"] == 1


def test_removing_a_key_removes_those_who_had_nothing_else() -> None:
    alice, bob, carol = host(ALICE, KEY, OTHER_KEY), host(BOB, KEY), host(CAROL, OTHER_KEY, KEY)
    deliver(bob.hello(), alice, bob)
    deliver(carol.hello(), alice, carol)
    assert alice.rekey(Keyring((KEY,))) == [CAROL]
    assert alice.receive(carol.message(b"", None), "x", 0.0) is None
    assert alice.receive(bob.message(b"", None), "x", 0.0) is not None


def test_leaving() -> None:
    alice, bob = acquainted()
    farewell = alice.leave()
    received = bob.receive(farewell, "x", 0.0)
    assert received is not None and received.leaving
    assert bob.receive(farewell, "x", 0.0) is None


class TestFlood:
    def test_forged_senders_cost_no_memory_and_bounded_work(self) -> None:
        bob = host(BOB)
        template = host(ALICE).message(b"x" * 100, None)

        def flood(count: int) -> None:
            for _turn in range(count):
                forged = template[:9] + os.urandom(24) + template[33:]
                assert bob.receive(forged, ("192.0.2.1", 7780), 0.0) is None

        flood(2000)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        flood(5000)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert grown < 20_000
        assert bob.counters["forged"] <= 40  # that many were deciphered, the others not
        assert bob.counters["unknown_session_rate"] >= 6800

    def test_recorded_sessions_are_not_answered_more_than_the_limit(self) -> None:
        """Replays of real old datagrams must not make us an amplifier."""
        bob = host(BOB)
        bob._unknown = type(bob._unknown)(1e9)
        old = host(ALICE).hello()
        answers = [bob.receive(old, "victim", now / 1000) for now in range(1000)]
        sent = [answer.reply for answer in answers if answer and answer.reply]
        assert len(sent) <= 4 + 2 * 1  # the burst, and one second of it
        assert max(map(len, sent)) <= len(old) * 2

    def test_replayed_challenges_are_not_answered_more_than_the_limit(self) -> None:
        alice, bob = host(ALICE), host(BOB)
        alice._unknown = type(alice._unknown)(1e9)
        asked = bob.receive(alice.hello(), "x", 0.0)
        assert asked and asked.reply
        answers = [alice.receive(asked.reply, "victim", now / 1000) for now in range(1000)]
        assert sum(1 for answer in answers if answer and answer.reply) <= 10 + 5

    def test_a_flood_does_not_lock_out_members(self) -> None:
        alice, bob = acquainted()
        template = host(CAROL).message(b"", None)
        for _turn in range(1000):
            bob.receive(template[:9] + os.urandom(24) + template[33:], "flood", 0.0)
        assert bob.receive(alice.message(b"through", BOB), "flood", 0.0)
        carol = host(CAROL)
        # One source in 256 shares the flood's bucket; which, is another one in each process.
        others = [f"source {number}" for number in range(3)]
        assert any(bob.receive(carol.hello(), other, 0.0) is not None for other in others)

    def test_limits_are_settings(self) -> None:
        bob = Seal(Keyring((KEY,)), BOB, GROUP, limits=Limits(challenges_per_session=0.5))
        hello = host(ALICE).hello()
        assert bob.receive(hello, "x", 0.0) is not None
        assert bob.receive(hello, "x", 0.1) is None
        assert bob.receive(hello, "x", 2.2) is not None


class TestKeyFile:
    def test_generate_and_load(self, tmp_path: Path) -> None:
        path = tmp_path / "group.key"
        made = keyrings.generate(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert Keyring.load(path) == made
        with pytest.raises(KeyFileError, match="exists already"):
            keyrings.generate(path)
        with pytest.raises(KeyFileError, match=r"no folder .*none; make it first"):
            keyrings.generate(tmp_path / "none" / "group.key")
        assert made.keys[0].hex() not in repr(made)

    def test_hex_base64_comments_and_order(self, tmp_path: Path) -> None:
        path = tmp_path / "group.key"
        path.touch(0o600)
        path.write_text(
            f"# the group's keys\n\n{KEY.hex().upper()}  # since May\n"
            "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=\n"
        )
        assert Keyring.load(path).keys == (KEY, OTHER_KEY)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("", "0 keys, expected 1 to"),
            ("zz\n", "line 1: not a key"),
            (f"{KEY.hex()}\n{KEY.hex()[:-2]}\n", "line 2: not a key"),
            (f"{KEY.hex()}\n{KEY.hex()}\n", "the same key twice"),
            ("00" * 32, "not random"),
            ("\n".join(bytes(range(n, n + 32)).hex() for n in range(9)), "9 keys"),
            ("#" * 70000, "larger than"),
        ],
    )
    def test_bad_content(self, tmp_path: Path, content: str, expected: str) -> None:
        path = tmp_path / "group.key"
        path.touch(0o600)
        path.write_text(content)
        with pytest.raises(KeyFileError, match=expected) as caught:
            Keyring.load(path)
        assert str(path) in str(caught.value)
        assert KEY.hex()[:-2] not in str(caught.value)

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
    def test_readable_by_others(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "group.key"
        keyrings.generate(path)
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*chmod 0600"):
            Keyring.load(path)

    def test_missing_directory_fifo_and_foreign_owner(self, tmp_path: Path) -> None:
        with pytest.raises(KeyFileError, match=r"No such file.*make a key"):
            Keyring.load(tmp_path / "none")
        with pytest.raises(KeyFileError, match="not a regular file"):
            Keyring.load(tmp_path)
        os.mkfifo(tmp_path / "fifo", 0o600)
        with pytest.raises(KeyFileError, match="not a regular file"):
            Keyring.load(tmp_path / "fifo")
        path = tmp_path / "group.key"
        keyrings.generate(path)
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
            with pytest.raises(KeyFileError, match="belongs to user 12345"):
                Keyring.load(path)

    @given(st.binary(max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_any_content_loads_or_is_refused(self, content: bytes) -> None:
        path = Path(f"/dev/shm/sockmi-test-{os.getpid()}.key")  # noqa: S108
        try:
            path.touch(0o600)
            path.write_bytes(content)
            Keyring.load(path)
        except KeyFileError:
            pass
        finally:
            path.unlink()


class TestIdentity:
    def test_made_once_and_kept(self, tmp_path: Path) -> None:
        first = Identity.load_or_create(tmp_path)
        assert first == Identity.load_or_create(tmp_path)
        assert first.path.stat().st_mode & 0o777 == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["identity.pem"]
        assert len(first.certificate) < 500
        assert check_certificate(first.certificate) == first.host_id
        (tmp_path / "second").mkdir()
        assert Identity.load_or_create(tmp_path / "second").host_id != first.host_id

    def test_damaged_mixed_and_open_files(self, tmp_path: Path) -> None:
        identity = Identity.load_or_create(tmp_path)
        pem = identity.path.read_bytes()
        identity.path.write_bytes(pem[: len(pem) // 2])
        with pytest.raises(IdentityError, match=r"damaged.*backup"):
            Identity.load_or_create(tmp_path)
        (tmp_path / "other").mkdir()
        other = Identity.load_or_create(tmp_path / "other").path.read_bytes()
        split = pem.index(b"-----BEGIN CERTIFICATE")
        identity.path.write_bytes(pem[:split] + other[other.index(b"-----BEGIN CERTIFICATE") :])
        with pytest.raises(IdentityError, match="do not belong together"):
            Identity.load_or_create(tmp_path)
        identity.path.chmod(0o644)
        with pytest.raises(IdentityError, match="chmod 0600"):
            Identity.load_or_create(tmp_path)
        with pytest.raises(IdentityError, match="writable directory"):
            Identity.load_or_create(tmp_path / "missing")

    @given(st.data())
    @settings(max_examples=100, deadline=None)
    def test_a_changed_certificate_names_nobody_else(self, data: st.DataObject) -> None:
        good = _CERTIFICATE
        place = data.draw(st.integers(0, len(good) - 1))
        changed = bytearray(good)
        changed[place] ^= data.draw(st.integers(1, 255))
        try:
            same = check_certificate(bytes(changed)) == check_certificate(good)
        except IdentityError:
            return
        # The name of the signature's algorithm stands twice, and one of them is not signed.
        assert same
        assert fingerprint_of(bytes(changed)) != fingerprint_of(good)

    @given(st.binary(max_size=600))
    @settings(max_examples=100, deadline=None)
    def test_garbage_certificates_are_refused(self, garbage: bytes) -> None:
        with pytest.raises(IdentityError):
            check_certificate(garbage)


def _certificate() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return Identity.load_or_create(Path(directory)).certificate


_CERTIFICATE = _certificate()

_NAMES = st.lists(
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=12), max_size=8
).map(tuple)


def _routable(address: IPv4Address | IPv6Address) -> bool:
    return not (address.is_unspecified or address.is_multicast or address.is_link_local)


class TestIntroduction:
    @given(
        st.binary(min_size=1, max_size=500),
        st.integers(1, 65535),
        st.text(max_size=20).filter(str.isprintable).filter(lambda text: len(text.encode()) <= 64),
        st.lists(st.ip_addresses().filter(_routable), max_size=8).map(tuple),
        _NAMES,
        _NAMES,
    )
    @settings(max_examples=100, deadline=None)
    def test_round_trip(  # noqa: PLR0917
        self,
        certificate: bytes,
        port: int,
        name: str,
        addresses: tuple[IPv4Address | IPv6Address, ...],
        engines: tuple[str, ...],
        redirects: tuple[str, ...],
    ) -> None:
        says = Introduction(certificate, port, name, addresses, engines, redirects)
        assert Introduction.decode(says.encode()) == says

    @given(st.binary(max_size=1400))
    @settings(max_examples=300, deadline=None)
    def test_garbage_is_a_value_error(self, garbage: bytes) -> None:
        for encoded in (garbage, Introduction(b"c", 1).encode() + garbage):
            with contextlib.suppress(ValueError):
                Introduction.decode(encoded)

    def test_unknown_fields_are_skipped_and_repeated_ones_refused(self) -> None:
        says = Introduction(b"certificate", 7781)
        extra = struct.pack("!BH", 200, 3) + b"new"
        assert Introduction.decode(extra + says.encode() + extra) == says
        with pytest.raises(ValueError, match="expected once"):
            Introduction.decode(says.encode() * 2)
        with pytest.raises(ValueError, match="field 1: expected once"):
            Introduction.decode(b"")

    @pytest.mark.parametrize("address", ["0.0.0.0", "224.0.0.1", "169.254.1.1", "::", "fe80::1", "ff02::1"])  # noqa: S104
    def test_addresses_that_lead_nowhere(self, address: str) -> None:
        with pytest.raises(ValueError, match="cannot connect"):
            Introduction(b"c", 1, addresses=(ip_address(address),))

    def test_bounds(self) -> None:
        for bad in (
            {"certificate": b""},
            {"certificate": bytes(501)},
            {"stream_port": 0},
            {"stream_port": 65536},
            {"host_name": "n" * 65},
            {"host_name": "two\nlines"},
            {"engines": ("",)},
            {"engines": ("e" * 33,)},
            {"redirects": ("r",) * 9},
        ):
            with pytest.raises(ValueError):
                Introduction(**{"certificate": b"c", "stream_port": 1, **bad})  # type: ignore[arg-type]


def test_cost_of_a_datagram_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = acquainted()
    payload, rounds = bytes(400), 2000
    start = time.perf_counter()
    datagrams = [alice.message(payload, BOB) for _turn in range(rounds)]
    sealed = time.perf_counter()
    assert all(bob.receive(datagram, "x", 0.0) for datagram in datagrams)
    opened = time.perf_counter()
    with capsys.disabled():
        print(
            f"\n  seal {(sealed - start) / rounds * 1e6:.1f} us, "
            f"open {(opened - sealed) / rounds * 1e6:.1f} us a datagram of {len(payload)} bytes"
        )
