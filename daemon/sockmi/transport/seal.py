# SPDX-License-Identifier: MIT
"""Sealed datagrams: only holders of the group key can make, read or repeat them usefully. No I/O.

A datagram is a header, which is authenticated, and an AEAD box (ChaCha20-Poly1305, RFC 8439)::

    magic 4 | version 1 | key id 4 | sender 16 | session 8 | sequence 8 | box (kind 1 | to 16 | payload) + 16

Each process start is a *session* with a random name. Its key is HKDF-SHA256 (RFC 5869) of the
group key with salt ``sender || session`` and the group's name as info; the nonce is the sequence
number, so no nonce is ever used twice with a key.

Replays: within a session a sliding window accepts each sequence number once. A session that the
receiver does not know is answered with CHALLENGE(nonce), and nothing of it is accepted before
a HELLO has brought that nonce back; a recorded session cannot do that. The nonce is a MAC, under a
secret of the receiver's process, of sender, session, a slot of monotonic time and the count of
sessions accepted from that sender, so a nonce serves once and the receiver keeps nothing for those
who have not proven themselves. No wall clock takes part.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sockmi.frozen import frozen
from sockmi.transport.identity import HOST_ID_BYTES, HostId
from sockmi.transport.keyring import KEY_BYTES, KEY_ID_BYTES, Keyring

DATAGRAM_BYTES_MAX = 1400
"""Below every usual path MTU minus IPv6 and UDP headers."""
WINDOW_SEQUENCES = 2048
"""How far datagrams may overtake each other."""

_MAGIC = b"SkMi"
_VERSION = 1
_SESSION_BYTES = 8
_HEADER = struct.Struct(f"!4sB{KEY_ID_BYTES}s{HOST_ID_BYTES}s{_SESSION_BYTES}sQ")
_INNER = struct.Struct(f"!B{HOST_ID_BYTES}s")
_TAG_BYTES = 16
_NONCE_BYTES = 16
_NO_NONCE = bytes(_NONCE_BYTES)
_ALL = bytes(HOST_ID_BYTES)
_OVERHEAD = _HEADER.size + _INNER.size + _TAG_BYTES
_MASK = (1 << WINDOW_SEQUENCES) - 1
_SLOT_S = 10.0

MESSAGE_BYTES_MAX = DATAGRAM_BYTES_MAX - _OVERHEAD
INTRODUCTION_BYTES_MAX = MESSAGE_BYTES_MAX - 2 * _NONCE_BYTES


class Kind(IntEnum):
    """What a datagram is for."""

    MESSAGE = 1  # the protocol's
    CHALLENGE = 2  # session (8) | nonce (16): prove that this session is alive
    HELLO = 3  # nonce brought back (16) | nonce to bring back (16) | introduction
    LEAVE = 4  # the sender stops


@frozen
class Received:
    """What a datagram meant. ``reply`` is a datagram to send back to where it came from.

    ``message``: from a proven session. ``introduction``: the sender says (again) who it is.
    ``new_session``: the first of a session; whoever spoke for ``sender`` before is gone.
    """

    sender: HostId
    message: bytes | None = None
    introduction: bytes | None = None
    new_session: bool = False
    leaving: bool = False
    reply: bytes | None = None


@dataclass(slots=True)
class Limits:
    """Rates per second, each for one of 256 hash buckets; a burst is twice the rate."""

    unknown_sessions_per_source: float = 20.0
    challenges_per_session: float = 2.0
    hellos_per_session: float = 5.0


class _Limiter:
    """Token buckets in constant memory; keys that collide share one."""

    __slots__ = ("_burst", "_rate", "_tokens", "_when")
    _BUCKETS = 256

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._burst = max(1.0, rate * 2)
        self._tokens = [self._burst] * self._BUCKETS
        self._when = [0.0] * self._BUCKETS

    def take(self, key: Hashable, now: float) -> bool:
        index = hash(key) % self._BUCKETS  # hashes of bytes and str are keyed: nobody can aim at a bucket
        refill = max(0.0, now - self._when[index]) * self._rate
        tokens = min(self._burst, self._tokens[index] + refill)
        self._when[index] = now
        allowed = tokens >= 1.0
        self._tokens[index] = tokens - 1.0 if allowed else tokens
        return allowed


class _Window:
    """Which sequence numbers of a session have been seen; all up to the first one count as seen."""

    __slots__ = ("_bits", "_top")

    def __init__(self, first: int) -> None:
        self._top = first
        self._bits = _MASK

    def take(self, sequence: int) -> bool:
        ahead = sequence - self._top
        if ahead > 0:
            self._bits = ((self._bits << ahead) | 1) & _MASK if ahead < WINDOW_SEQUENCES else 1
            self._top = sequence
            return True
        bit = 1 << -ahead if -ahead < WINDOW_SEQUENCES else 0
        if not bit or self._bits & bit:
            return False
        self._bits |= bit
        return True


class _Refused(Exception):
    """Why a datagram is dropped; a counter's name."""


class _Opened(NamedTuple):
    """A datagram that a holder of the key has made, now or once."""

    sender: HostId
    session: bytes
    sequence: int
    key_id: bytes
    kind: int
    payload: bytes
    now: float


@dataclass(slots=True)
class _Peer:
    """A sender whose session is proven."""

    session: bytes
    window: _Window
    generation: int
    key_id: bytes  # of the last HELLO: membership falls with the key that proved it
    boxes: dict[bytes, ChaCha20Poly1305] = field(default_factory=dict)  # by key id


class Seal:
    """One host's end of one group's sealed datagrams.

    ``group`` names the group (address and port), so that nothing is carried from one group to
    another that has the same key. ``introduction`` is what the HELLOs carry (see hello.py).
    ``counters`` counts what was accepted and, by reason, what was not; ``refused`` has of each reason
    whose datagram was the last, and when (monotonic, s).
    """

    def __init__(
        self,
        keyring: Keyring,
        host_id: HostId,
        group: bytes,
        introduction: bytes = b"",
        *,
        limits: Limits | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        limits = limits or Limits()
        self.host_id = host_id
        self.introduction = introduction
        self.counters: Counter[str] = Counter()
        self.refused: dict[str, tuple[Hashable, float]] = {}
        self._group = group
        self._session = random(_SESSION_BYTES)
        self._secret = random(KEY_BYTES)
        self._sequence = 0
        self._peers: dict[HostId, _Peer] = {}
        self._generation = 0  # counts accepted and forgotten sessions
        self._forgotten = 0  # the generation of everybody without an entry
        self._unknown = _Limiter(limits.unknown_sessions_per_source)
        self._challenges = _Limiter(limits.challenges_per_session)
        self._hellos = _Limiter(limits.hellos_per_session)
        self._use(keyring)

    def rekey(self, keyring: Keyring) -> list[HostId]:
        """Use another keyring; returns the members whose last proof needed a key that is gone."""
        self._use(keyring)
        gone = [host for host, peer in self._peers.items() if peer.key_id not in self._keys]
        for host in gone:
            self.forget(host)
        for peer in self._peers.values():
            peer.boxes = {key_id: box for key_id, box in peer.boxes.items() if key_id in self._keys}
        return gone

    def forget(self, host: HostId) -> None:
        """Close the session of ``host``; it must prove itself again."""
        if self._peers.pop(host, None) is not None:
            self._generation += 1
            self._forgotten = self._generation

    def message(self, payload: bytes, to: HostId | None) -> bytes:
        """Seal a message for one host or (None) for all. ValueError if it is too large."""
        return self._seal(Kind.MESSAGE, payload, to or _ALL)

    def hello(self) -> bytes:
        """The announcement, for all."""
        return self._seal(Kind.HELLO, _NO_NONCE + _NO_NONCE + self.introduction, _ALL)

    def leave(self) -> bytes:
        """The farewell, for all."""
        return self._seal(Kind.LEAVE, b"", _ALL)

    def receive(self, datagram: bytes, source: Hashable, now: float) -> Received | None:
        """Open a datagram from ``source`` at monotonic time ``now`` (s); None: nothing to do for it."""
        try:
            return self._receive(datagram, source, now)
        except _Refused as refused:
            self.counters[refused.args[0]] += 1
            self.refused[refused.args[0]] = source, now
            return None

    def _receive(self, datagram: bytes, source: Hashable, now: float) -> Received | None:
        if not _OVERHEAD <= len(datagram) <= DATAGRAM_BYTES_MAX:
            raise _Refused("size")
        magic, version, key_id, sender, session, sequence = _HEADER.unpack_from(datagram)
        if magic != _MAGIC or version != _VERSION:
            raise _Refused("not_ours")
        if key_id not in self._keys:
            raise _Refused("unknown_key")
        if sender == self.host_id:
            raise _Refused("own" if session == self._session else "own_id_elsewhere")
        peer = self._peers.get(sender)
        known = peer is not None and peer.session == session
        box = peer.boxes.get(key_id) if peer is not None and known else None
        if box is None:
            # The dear part: HKDF for a session not (yet) known; so much of it per source, not more.
            if not self._unknown.take(source, now):
                raise _Refused("unknown_session_rate")
            box = self._box(key_id, sender, session)
        try:
            inner = box.decrypt(
                sequence.to_bytes(12, "big"), datagram[_HEADER.size :], datagram[: _HEADER.size]
            )
        except InvalidTag:
            raise _Refused("forged") from None
        kind, to = _INNER.unpack_from(inner)
        if to not in (self.host_id, _ALL):
            raise _Refused("for_another")
        opened = _Opened(sender, session, sequence, key_id, kind, inner[_INNER.size :], now)
        if peer is None or not known:
            return self._stranger(opened, box)
        if not peer.window.take(sequence):
            raise _Refused("replayed")
        peer.boxes[key_id] = box
        return self._known(opened, peer)

    # --- a session that is proven ---

    def _known(self, opened: _Opened, peer: _Peer) -> Received | None:
        if opened.kind == Kind.MESSAGE:
            self.counters["messages"] += 1
            return Received(opened.sender, message=opened.payload)
        if opened.kind == Kind.HELLO and len(opened.payload) >= 2 * _NONCE_BYTES:
            peer.key_id = opened.key_id
            return self._introduced(opened, new=False)
        if opened.kind == Kind.CHALLENGE:
            return self._answer(opened, ask=False)
        if opened.kind == Kind.LEAVE:
            self.forget(opened.sender)
            return Received(opened.sender, leaving=True)
        raise _Refused("malformed")

    # --- a session that is not: recorded, or alive and new ---

    def _stranger(self, opened: _Opened, box: ChaCha20Poly1305) -> Received | None:
        if opened.kind == Kind.CHALLENGE:
            return self._answer(opened, ask=True)
        if opened.kind == Kind.HELLO and self._brings_back(opened):
            self._generation += 1
            self._peers[opened.sender] = _Peer(
                opened.session,
                _Window(opened.sequence),
                self._generation,
                opened.key_id,
                {opened.key_id: box},
            )
            self.counters["sessions"] += 1
            return self._introduced(opened, new=True)
        if opened.kind == Kind.LEAVE:
            raise _Refused("unproven")
        if not self._challenges.take(opened.sender + opened.session, opened.now):
            raise _Refused("challenge_rate")
        self.counters["unproven"] += 1
        challenge = opened.session + self._nonce(opened, 0)
        return Received(opened.sender, reply=self._seal(Kind.CHALLENGE, challenge, opened.sender))

    def _introduced(self, opened: _Opened, *, new: bool) -> Received:
        asked = opened.payload[_NONCE_BYTES : 2 * _NONCE_BYTES]
        reply = None
        if asked != _NO_NONCE and self._hellos.take(opened.sender + opened.session, opened.now):
            reply = self._seal(Kind.HELLO, asked + _NO_NONCE + self.introduction, opened.sender)
        self.counters["hellos"] += 1
        introduction = opened.payload[2 * _NONCE_BYTES :]
        return Received(opened.sender, introduction=introduction, new_session=new, reply=reply)

    def _answer(self, opened: _Opened, *, ask: bool) -> Received:
        """The HELLO that a CHALLENGE to this very session asks for; ``ask``: and prove yourself."""
        if (
            len(opened.payload) != _SESSION_BYTES + _NONCE_BYTES
            or opened.payload[:_SESSION_BYTES] != self._session
        ):
            raise _Refused("stale_challenge")
        # A recorded challenge is answered too: that costs a datagram now and then, and proves nothing.
        if not self._hellos.take(opened.sender + opened.session, opened.now):
            raise _Refused("hello_rate")
        nonces = opened.payload[_SESSION_BYTES:] + (self._nonce(opened, 0) if ask else _NO_NONCE)
        return Received(
            opened.sender, reply=self._seal(Kind.HELLO, nonces + self.introduction, opened.sender)
        )

    def _brings_back(self, opened: _Opened) -> bool:
        """Whether a HELLO carries the nonce of this time slot or of the one before."""
        back = opened.payload[:_NONCE_BYTES]
        return len(opened.payload) >= 2 * _NONCE_BYTES and any(
            hmac.compare_digest(back, self._nonce(opened, ago)) for ago in (0, 1)
        )

    # --- boxes ---

    def _use(self, keyring: Keyring) -> None:
        self._keys = keyring.by_id()
        self._key_id = next(iter(self._keys))
        self._own_box = self._box(self._key_id, self.host_id, self._session)

    def _box(self, key_id: bytes, sender: HostId, session: bytes) -> ChaCha20Poly1305:
        kdf = HKDF(
            hashes.SHA256(), KEY_BYTES, salt=sender + session, info=b"sockmi datagram 1 " + self._group
        )
        return ChaCha20Poly1305(kdf.derive(self._keys[key_id]))

    def _nonce(self, opened: _Opened, slots_ago: int) -> bytes:
        """What this sender must bring back to prove this session; another one after each proof."""
        peer = self._peers.get(opened.sender)
        generation = peer.generation if peer is not None else self._forgotten
        slot = int(opened.now // _SLOT_S) - slots_ago
        text = opened.sender + opened.session + struct.pack("!qQ", slot, generation)
        return hmac.digest(self._secret, text, "sha256")[:_NONCE_BYTES]

    def _seal(self, kind: Kind, payload: bytes, to: HostId) -> bytes:
        if len(payload) > MESSAGE_BYTES_MAX:
            raise ValueError(f"datagram message of {len(payload)} bytes, more than {MESSAGE_BYTES_MAX}")
        self._sequence += 1
        header = _HEADER.pack(_MAGIC, _VERSION, self._key_id, self.host_id, self._session, self._sequence)
        inner = _INNER.pack(kind, to) + payload
        return header + self._own_box.encrypt(self._sequence.to_bytes(12, "big"), inner, header)
