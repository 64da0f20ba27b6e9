# SPDX-License-Identifier: MIT
"""Why a socket is not moved: every refusal has a code, a sentence and what to do next.

The table below is the only place where codes are defined; engine, protocol, control socket,
command line, Ansible modules and documentation all use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """Refusal codes, stable across releases; the text is what users see in JSON."""

    # the socket (preflight, before any freeze)
    NOT_TCP = "not-tcp"
    NO_SUCH_SOCKET = "no-such-socket"
    NO_PRIVILEGE = "no-privilege"
    STATE = "state"
    URGENT_DATA = "urgent-data"
    ULP = "ulp"
    MPTCP = "mptcp"
    TCP_MD5 = "tcp-md5"
    TCP_AO = "tcp-ao"
    IPSEC = "ipsec"
    SOCKMAP = "sockmap"
    IN_REPAIR = "in-repair"
    ZERO_COPY = "zero-copy"
    TOO_LARGE = "too-large"
    LINK_LOCAL = "link-local"
    ALREADY_MIGRATING = "already-migrating"
    NO_DESCRIPTORS = "no-descriptors"
    LOCKED = "locked"
    # the owner
    OWNER_TRACED = "owner-traced"
    OWNER_IO_URING = "owner-io-uring"
    OWNER_UNSTOPPABLE = "owner-unstoppable"
    OWNER_IS_DAEMON = "owner-is-daemon"
    # the freeze
    CHANGED = "changed"
    FREEZE_DEADLINE = "freeze-deadline"
    # the other host
    NO_OFFER = "no-offer"
    NO_SUCH_HOST = "no-such-host"
    LIST_FULL = "list-full"
    PORT_TAKEN = "port-taken"
    TUPLE_TAKEN = "tuple-taken"
    WINDOW_SCALE = "window-scale"
    TIMESTAMP_UNIT = "timestamp-unit"
    IMAGE = "image"
    RESTORE = "restore"
    NO_REDIRECT = "no-redirect"
    REDIRECT = "redirect"
    PEER_LOST = "peer-lost"
    SHUTTING_DOWN = "shutting-down"
    TIMEOUT = "timeout"
    BAD_REQUEST = "bad-request"
    INTERNAL = "internal"
    # Messages count codes in this order: new ones come last.
    ENDED = "ended"  # the socket, too


@dataclass(unsafe_hash=True)
class Refusal(Exception):
    """One socket is not moved, and it goes on where it was.

    ``message`` says what, where, why and what to do next, in one or two sentences. A value, though
    not a frozen one: whoever raises an exception sets its traceback.
    """

    code: Code
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
