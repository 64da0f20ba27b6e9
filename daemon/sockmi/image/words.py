# SPDX-License-Identifier: MIT
"""Words of the image format: section types, kinds, states, flags, limits and error classes.

The numbers are those of docs/image.md.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag, StrEnum

MAGIC = b"SOCKMI\x1a\n"
MAJOR, MINOR = 1, 0
HEADER_BYTES = 32
SECTION_HEADER_BYTES = 8
CHECKSUM_OFFSET = 28
TYPE_MAX = 1023
MANDATORY = 1

LIMIT_BYTES = 64 << 20
CONTEXT_MAX_BYTES = 1 << 20
FIDELITY_MAX_BYTES = 64 << 10
OPTIONS_MAX_BYTES = 64 << 10
OPTION_VALUE_MAX_BYTES = 4096
CONGESTION_MAX_BYTES = 1024
QUEUE_MAX_BYTES = 0x7FFFFFFF


class ErrorClass(StrEnum):
    """Why an image is refused: the words of C's ``sockmi_image_error_name()``."""

    LIMIT = "limit"
    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    LENGTH = "length"
    CHECKSUM = "checksum"
    SECTION = "section"
    DUPLICATE = "duplicate"
    UNKNOWN_MANDATORY = "unknown-mandatory"
    RESERVED = "reserved"
    VALUE = "value"
    ADDRESS = "address"
    STATE = "state"
    MISSING = "missing"
    SEQUENCE = "sequence"
    QUEUE = "queue"
    WINDOW = "window"


class ImageError(ValueError):
    """An image breaks a rule of docs/image.md; ``error_class`` says which kind of rule."""

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class Section(IntEnum):
    """Section types."""

    IDENTITY = 1
    SEQUENCE = 2
    WINDOW = 3
    NEGOTIATED = 4
    TIMESTAMP = 5
    RECEIVE_QUEUE = 6
    SENT_QUEUE = 7
    UNSENT_QUEUE = 8
    SOCKET_OPTIONS = 9
    LISTENER = 10
    PATH_MODEL = 11
    RECEIVE_AUTOTUNE = 12
    OUT_OF_ORDER = 13
    SACK_SCOREBOARD = 14
    RECEIVE_SACK = 15
    URGENT = 16
    ECN = 17
    TIMERS = 18
    COUNTERS = 19
    CONGESTION_PRIVATE = 20
    KTLS = 21
    CONTEXT = 22
    FIDELITY = 23
    EARLY_FIN = 24


MANDATORY_SECTIONS = frozenset(
    {
        Section.IDENTITY,
        Section.SEQUENCE,
        Section.WINDOW,
        Section.NEGOTIATED,
        Section.TIMESTAMP,
        Section.RECEIVE_QUEUE,
        Section.SENT_QUEUE,
        Section.UNSENT_QUEUE,
        Section.LISTENER,
        Section.URGENT,
        Section.KTLS,
    }
)


class Family(IntEnum):
    """Address family of the socket."""

    INET = 2
    INET6 = 10


class Kind(IntEnum):
    """What the socket is."""

    BOUND = 1
    LISTENING = 2
    CONNECTED = 3
    UNCONNECTED = 4


class State(IntEnum):
    """States of RFC 9293, section 3.3.2."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECEIVED = 3
    FIN_WAIT_1 = 4
    FIN_WAIT_2 = 5
    TIME_WAIT = 6
    CLOSED = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11

    @property
    def rfc_name(self) -> str:
        """``ESTABLISHED``, ``FIN-WAIT-1`` ..."""
        return self.name.replace("_", "-")


class BindLock(IntFlag):
    """What the application chose itself when it bound the socket."""

    ADDRESS = 1
    PORT = 2


class SequenceFlag(IntFlag):
    """Flags of SEQUENCE; a FIN takes one sequence number and no byte of a queue."""

    OWN_FIN = 1
    OWN_FIN_SENT = 2
    PEER_FIN = 4
    PEER_FIN_READ = 8
    SHUT_RD = 16
    SHUT_WR = 32


class WindowFlag(IntFlag):
    """Fields of WINDOW that are there."""

    CLAMP = 1
    SSTHRESH = 2
    RIGHT_EDGE = 4


class NegotiatedFlag(IntFlag):
    """What both ends agreed on (in SYN-SENT: what the SYN offered)."""

    WSCALE = 1
    SACK = 2
    TIMESTAMPS = 4
    ECN = 8
    ACCECN = 16
    FASTOPEN = 32


class TimestampFlag(IntFlag):
    """Fields of TIMESTAMP that are there."""

    RECENT = 1
    SYN = 2


class TimestampUnit(IntEnum):
    """Unit of the timestamp clock."""

    MS = 1
    US = 2


class PathFlag(IntFlag):
    """Groups of fields of PATH_MODEL that are there."""

    UNDO = 1
    RACK = 2
    PACING = 4


class RangeFlag(IntFlag):
    """State of a range of sent data."""

    SACKED = 1
    LOST = 2
    RETRANSMITTED = 4
    EVER_RETRANSMITTED = 8


class UrgentFlag(IntFlag):
    """SEND: snd_up is there; the others, of which one at most: what urg_seq says."""

    SEND = 1
    RECEIVED = 2
    READ = 4
    ANNOUNCED = 8


class EcnFlag(IntFlag):
    """State of the ECN machine (RFC 3168)."""

    QUEUE_CWR = 1
    DEMAND_CWR = 2
    SEEN = 4


class KtlsDirection(IntEnum):
    """Which half of a kernel TLS session."""

    TX = 1
    RX = 2


class FidelityClass(IntEnum):
    """What became of a piece of state."""

    CARRIED = 1
    APPROXIMATED = 2
    RESET = 3


class OptionType(IntEnum):
    """How an option's value is written."""

    INT = 1
    BYTES = 2


class OptionFlag(IntFlag):
    """MANDATORY: refuse the image if the option is unknown. LOCKED: a buffer that the application fixed."""

    MANDATORY = 1
    LOCKED = 2


def known_bits(flags: type[IntFlag]) -> int:
    """All bits of a flag type."""
    return sum(flags)
